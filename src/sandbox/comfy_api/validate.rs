//! Checks a prompt before it is queued, and says what is wrong in ComfyUI's words.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value, json};

use super::classes::{self, Input, NodeClass};
use super::files::Files;
use super::python_text;

/// Chains of links longer than this are refused, as Python refuses to recurse much deeper.
const MOST_DEPTH: usize = 400;

/// A prompt that may run.
pub struct Valid {
    /// The output nodes that are good.
    pub outputs: Vec<String>,
    /// What is wrong with nodes that only the others need.
    pub node_errors: Value,
}

/// A prompt that may not.
pub enum Invalid {
    /// The body of a 400.
    Refused(Box<Value>),
    /// Not of the shape of a prompt at all, for which ComfyUI has no answer but a 500.
    Crash,
}

/// Checks the prompt and converts its values to their types. `targets` are the only outputs wanted, if given.
pub fn validate(prompt: &mut Value, targets: Option<&[String]>, files: &Files) -> Result<Valid, Invalid> {
    let prompt = prompt.as_object_mut().ok_or(Invalid::Crash)?;
    let mut outputs = Vec::new();
    for (id, node) in prompt.iter() {
        let class = class_of(id, node)?;
        if class.output_node && targets.is_none_or(|targets| targets.contains(id)) {
            outputs.push(id.clone());
        }
    }
    if outputs.is_empty() {
        return Err(refused("prompt_no_outputs", "Prompt has no outputs", String::new(), json!({}), json!({})));
    }
    let mut check = Check {
        prompt,
        files,
        results: HashMap::new(),
        order: Vec::new(),
        raised: HashMap::new(),
        converted: Vec::new(),
    };
    let mut good = Vec::new();
    let mut node_errors = Map::new();
    let mut details = Vec::new();
    for output in outputs {
        let valid = match check.with_upstream(&output) {
            Ok(valid) => valid,
            Err(exception) => {
                let reason = error(
                    "exception_during_validation",
                    "Exception when validating node",
                    exception.text.clone(),
                    json!({ "exception_type": exception.kind, "traceback": exception.traceback() }),
                );
                check.keep(&output, false, vec![reason]);
                false
            }
        };
        if valid {
            good.push(output);
            continue;
        }
        for reason in &check.results[&output].1 {
            details.push(format!("{}: {}", python_text(&reason["message"]), python_text(&reason["details"])));
        }
        for id in &check.order {
            let (valid, reasons) = &check.results[id];
            if !valid && !reasons.is_empty() {
                let class_type = &check.prompt[id]["class_type"];
                let entry = node_errors
                    .entry(id.clone())
                    .or_insert_with(|| json!({ "errors": reasons, "dependent_outputs": [], "class_type": class_type }));
                if let Some(dependent) = entry["dependent_outputs"].as_array_mut() {
                    dependent.push(json!(output));
                }
            }
        }
    }
    let node_errors = Value::Object(node_errors);
    if good.is_empty() {
        let message = "Prompt outputs failed validation";
        let details = details.join("\n");
        return Err(refused("prompt_outputs_failed_validation", message, details, json!({}), node_errors));
    }
    for (node, name, value) in check.converted {
        prompt[&node]["inputs"][name] = value;
    }
    Ok(Valid { outputs: good, node_errors })
}

/// The class of a node, which must be known before anything else is looked at.
fn class_of(id: &str, node: &Value) -> Result<&'static NodeClass, Invalid> {
    let class = match node {
        Value::Object(node) => node.get("class_type"),
        Value::Array(_) | Value::String(_) => None,
        _ => return Err(Invalid::Crash),
    };
    let place = format!("Node ID '#{id}'");
    let Some(class) = class else {
        let message = "Cannot execute because a node is missing the class_type property.";
        return Err(refused("invalid_prompt", message, place, json!({}), json!({})));
    };
    let name = python_text(class);
    classes::find(&name).ok_or_else(|| {
        let message = format!("Cannot execute because node {name} does not exist.");
        let known: Vec<_> = classes::CLASSES.iter().map(|class| class.name).collect();
        let details = format!("{place} (the sandbox's ComfyUI has only: {})", known.join(", "));
        refused("invalid_prompt", &message, details, json!({}), json!({}))
    })
}

/// What Python would have raised.
#[derive(Clone)]
struct Exception {
    kind: &'static str,
    text: String,
}

impl Exception {
    fn new(kind: &'static str, text: impl Into<String>) -> Exception {
        Exception { kind, text: text.into() }
    }

    fn traceback(&self) -> Value {
        json!([format!("  File \"sandbox/validate\", in validate_inputs\n    {}: {}\n", self.kind, self.text)])
    }
}

struct Check<'a> {
    prompt: &'a Map<String, Value>,
    files: &'a Files,
    results: HashMap<String, (bool, Vec<Value>)>,
    /// The nodes of `results` in the order in which they were done.
    order: Vec<String>,
    /// The nodes whose check itself went wrong.
    raised: HashMap<String, Exception>,
    /// Node, input and value of what was converted.
    converted: Vec<(String, String, Value)>,
}

impl Check<'_> {
    /// Checks all that an output is linked to and then the output itself. By a stack of its own: how deep the links go
    /// is up to the client.
    fn with_upstream(&mut self, output: &str) -> Result<bool, Exception> {
        let mut open = HashSet::new();
        let mut stack = vec![output.to_owned()];
        while let Some(id) = stack.last().cloned() {
            if !self.is_done(&id) {
                if open.insert(id.clone()) && stack.len() <= MOST_DEPTH {
                    let upstream = self.upstream(&id);
                    let more: Vec<String> =
                        upstream.into_iter().filter(|from| !self.is_done(from) && !open.contains(from)).collect();
                    if !more.is_empty() {
                        stack.extend(more);
                        continue;
                    }
                }
                if let Err(exception) = self.node(&id) {
                    self.raised.insert(id, exception);
                }
            }
            stack.pop();
        }
        match self.raised.get(output) {
            Some(exception) => Err(exception.clone()),
            None => Ok(self.results.get(output).is_some_and(|(valid, _)| *valid)),
        }
    }

    fn is_done(&self, id: &str) -> bool {
        self.results.contains_key(id) || self.raised.contains_key(id)
    }

    /// The nodes of the prompt that a node's inputs are linked to.
    fn upstream(&self, id: &str) -> Vec<String> {
        let Some(node) = self.prompt.get(id) else { return Vec::new() };
        let inputs = node["class_type"].as_str().and_then(classes::find).map_or(&[][..], |class| class.inputs);
        let links = inputs.iter().filter_map(|(name, _)| node.get("inputs")?.get(name)?.as_array()?.first()?.as_str());
        links.filter(|from| self.prompt.contains_key(*from)).map(str::to_owned).collect()
    }

    /// Checks a node, when all it is linked to has been. Its own errors are kept; false also stands for those of
    /// others.
    fn node(&mut self, id: &str) -> Result<bool, Exception> {
        let prompt = self.prompt;
        let node = prompt.get(id).ok_or_else(|| Exception::new("KeyError", format!("'{id}'")))?;
        let class = node["class_type"].as_str().and_then(classes::find);
        let class = class.ok_or_else(|| Exception::new("KeyError", "'class_type'"))?;
        let inputs = node.get("inputs").ok_or_else(|| Exception::new("KeyError", "'inputs'"))?;
        let inputs = inputs
            .as_object()
            .ok_or_else(|| Exception::new("TypeError", "list indices must be integers or slices, not str"))?;
        let mut errors = Vec::new();
        let mut valid = true;
        for (name, input) in class.inputs {
            let config = input.config(name, self.files);
            let Some(value) = inputs.get(*name) else {
                let extra = json!({ "input_name": name });
                errors.push(error("required_input_missing", "Required input is missing", (*name).to_owned(), extra));
                continue;
            };
            match value {
                Value::Array(parts) => match self.link(name, input, &config, parts)? {
                    Link::Good => {}
                    Link::BadUpstream => valid = false,
                    Link::Wrong(wrong) => errors.push(wrong),
                },
                value => match constant(name, input, &config, value, self.files) {
                    Ok(Some(converted)) => self.converted.push((id.to_owned(), (*name).to_owned(), converted)),
                    Ok(None) => {}
                    Err(wrong) => errors.push(wrong),
                },
            }
        }
        valid &= errors.is_empty();
        self.keep(id, valid, errors);
        Ok(valid)
    }

    fn link(&mut self, name: &str, input: &Input, config: &Value, parts: &[Value]) -> Result<Link, Exception> {
        let [from, slot] = parts else {
            let message = "Bad linked input, must be a length-2 list of [node_id, slot_index]";
            let extra = json!({ "input_name": name, "input_config": config, "received_value": parts });
            return Ok(Link::Wrong(error("bad_linked_input", message, name.to_owned(), extra)));
        };
        let unknown = || Exception::new("KeyError", python_quoted(from));
        let from_id = from.as_str().ok_or_else(unknown)?;
        let class = self.prompt.get(from_id).and_then(|node| node["class_type"].as_str()).and_then(classes::find);
        let outputs = class.ok_or_else(unknown)?.outputs;
        let slot =
            slot.as_u64().ok_or_else(|| Exception::new("TypeError", "tuple indices must be integers or slices"))?;
        let received = usize::try_from(slot).ok().and_then(|slot| outputs.get(slot));
        let received = *received.ok_or_else(|| Exception::new("IndexError", "tuple index out of range"))?;
        if received != input.type_name() {
            let details = format!("{name}, received_type({received}) mismatch input_type({})", input.type_name());
            let extra = json!({
                "input_name": name,
                "input_config": config,
                "received_type": received,
                "linked_node": parts,
            });
            let message = "Return type mismatch between linked nodes";
            return Ok(Link::Wrong(error("return_type_mismatch", message, details, extra)));
        }
        if let Some((valid, _)) = self.results.get(from_id) {
            return Ok(if *valid { Link::Good } else { Link::BadUpstream });
        }
        match self.raised.get(from_id).cloned() {
            // It was begun and is not done: the links go in a circle, or on and on.
            None => Err(Exception::new("RecursionError", "maximum recursion depth exceeded")),
            Some(exception) => {
                let extra = json!({
                    "input_name": name,
                    "input_config": config,
                    "exception_message": exception.text,
                    "exception_type": exception.kind,
                    "traceback": exception.traceback(),
                    "linked_node": parts,
                });
                let message = "Exception when validating inner node";
                let reason = error("exception_during_inner_validation", message, exception.text, extra);
                self.keep(from_id, false, vec![reason]);
                Ok(Link::BadUpstream)
            }
        }
    }

    fn keep(&mut self, id: &str, valid: bool, errors: Vec<Value>) {
        if self.results.insert(id.to_owned(), (valid, errors)).is_none() {
            self.order.push(id.to_owned());
        }
    }
}

enum Link {
    Good,
    /// Something that it leads to is invalid, and says so itself.
    BadUpstream,
    Wrong(Value),
}

/// Checks a constant. Ok with a value: it was converted.
fn constant(name: &str, input: &Input, config: &Value, value: &Value, files: &Files) -> Result<Option<Value>, Value> {
    let wrong = |kind: &str, message: String, details: String, value: &Value| {
        let extra = json!({ "input_name": name, "input_config": config, "received_value": value });
        error(kind, &message, details, extra)
    };
    let unconvertible = |reason: String| {
        let message = format!("Failed to convert an input value to a {} value", input.type_name());
        let details = format!("{name}, {}, {reason}", python_text(value));
        let mut answer = wrong("invalid_input_type", message, details, value);
        answer["extra_info"]["exception_message"] = json!(reason);
        answer
    };
    match input {
        // ComfyUI lets any constant pass for a link, and the node fails on it.
        Input::Link(_) => Ok(None),
        Input::Text { .. } => Ok(Some(json!(python_text(value)))),
        Input::Int { min, max, .. } => {
            let number = python_int(value).map_err(unconvertible)?;
            let shown = i64::try_from(number).map(Value::from).or_else(|_| u64::try_from(number).map(Value::from));
            let shown = shown.unwrap_or_else(|_| value.clone());
            if number < i128::from(*min) {
                let message = format!("Value {number} smaller than min of {min}");
                return Err(wrong("value_smaller_than_min", message, name.to_owned(), &shown));
            }
            if number > i128::from(*max) {
                let message = format!("Value {number} bigger than max of {max}");
                return Err(wrong("value_bigger_than_max", message, name.to_owned(), &shown));
            }
            Ok(Some(shown))
        }
        Input::Choice(choices) => {
            if choices.iter().any(|choice| value.as_str() == Some(choice)) {
                return Ok(None);
            }
            let list: Vec<String> = choices.iter().map(|choice| format!("'{choice}'")).collect();
            let details = format!("{name}: '{}' not in [{}]", python_text(value), list.join(", "));
            Err(wrong("value_not_in_list", "Value not in list".into(), details, value))
        }
        Input::File => {
            if value.as_str().and_then(|file| files.annotated(file)).is_some() {
                return Ok(None);
            }
            let details = format!("{name} - Invalid image file: {}", python_text(value));
            Err(wrong("custom_validation_failed", "Custom validation failed for node".into(), details, value))
        }
    }
}

/// Python's `int(value)`, or the text of what it raises.
fn python_int(value: &Value) -> Result<i128, String> {
    let wrong_type =
        |kind| Err(format!("int() argument must be a string, a bytes-like object or a real number, not '{kind}'"));
    match value {
        Value::Bool(value) => Ok(i128::from(*value)),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(number), _, _) => Ok(i128::from(number)),
            (_, Some(number), _) => Ok(i128::from(number)),
            // Saturates, far outside of every range.
            (_, _, number) => Ok(number.unwrap_or(f64::MAX) as i128),
        },
        Value::String(text) => {
            let wrong = |_| format!("invalid literal for int() with base 10: {}", python_quoted(value));
            text.trim().parse().map_err(wrong)
        }
        Value::Null => wrong_type("NoneType"),
        Value::Object(_) => wrong_type("dict"),
        Value::Array(_) => wrong_type("list"),
    }
}

fn python_quoted(value: &Value) -> String {
    match value {
        Value::String(text) => format!("'{text}'"),
        other => python_text(other),
    }
}

fn error(kind: &str, message: &str, details: String, extra_info: Value) -> Value {
    json!({ "type": kind, "message": message, "details": details, "extra_info": extra_info })
}

fn refused(kind: &str, message: &str, details: String, extra_info: Value, node_errors: Value) -> Invalid {
    let error = error(kind, message, details, extra_info);
    Invalid::Refused(Box::new(json!({ "error": error, "node_errors": node_errors })))
}
