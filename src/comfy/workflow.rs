//! Workflows: which of ComfyUI's formats a file has, what is wrong with it before the server is asked, and putting
//! the names of uploaded files into its loading nodes.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// A workflow in API format, `{node_id: {class_type, inputs}}`, checked in itself: whether the server has its classes
/// and files only the server knows.
#[derive(Debug, Clone, PartialEq)]
pub struct Workflow {
    nodes: Map<String, Value>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WorkflowError {
    #[error("the workflow is {found}, not an object of nodes")]
    NotAnObject { found: &'static str },
    #[error("the workflow has no nodes")]
    Empty,
    #[error(
        "this is a workflow as ComfyUI's editor saves it ({nodes} nodes with their places on the canvas), which the \
         server can't run: export it in the editor with `Workflow > Export (API)` (older editors: `Save (API Format)`, \
         after switching on the dev mode options) and use that file"
    )]
    EditorFormat { nodes: usize },
    #[error("node {node} is {found}, not an object with `class_type` and `inputs`")]
    NotANode { node: String, found: &'static str },
    #[error("node {node} has no `class_type`")]
    MissingClassType { node: String },
    #[error("`inputs` of node {node} is {found}, not an object")]
    InputsNotAnObject { node: String, found: &'static str },
    #[error("input `{input}` of node {node} is linked to node {target}, which the workflow doesn't have")]
    MissingNode { node: String, input: String, target: String },
    #[error("{0}")]
    Input(String),
}

/// A place in the workflow that takes the name of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileInput {
    pub node: String,
    pub class_type: String,
    pub input: String,
    /// The name that stands there now.
    pub value: String,
}

/// The inputs by which loading nodes take a file from the server's input folder.
const FILE_INPUTS: &[&str] = &["image", "mask", "video", "audio", "latent", "model_file", "file"];

impl Workflow {
    /// Accepts the API format, also wrapped as `{"prompt": {...}}`.
    pub fn parse(value: &Value) -> Result<Self, WorkflowError> {
        let mut nodes = value.as_object().ok_or(WorkflowError::NotAnObject { found: kind_of(value) })?;
        if let Some(Value::Object(wrapped)) = nodes.get("prompt")
            && !wrapped.get("class_type").is_some_and(Value::is_string)
        {
            nodes = wrapped;
        }
        if let Some(Value::Array(list)) = nodes.get("nodes") {
            return Err(WorkflowError::EditorFormat { nodes: list.len() });
        }
        if nodes.is_empty() {
            return Err(WorkflowError::Empty);
        }
        nodes.iter().try_for_each(|(id, node)| check_node(nodes, id, node))?;
        Ok(Self { nodes: nodes.clone() })
    }

    pub fn nodes(&self) -> &Map<String, Value> {
        &self.nodes
    }

    /// Node id -> class.
    pub fn classes(&self) -> BTreeMap<String, String> {
        let class_of = |id: &String| self.class_type(id).unwrap_or_default().to_owned();
        self.nodes.keys().map(|id| (id.clone(), class_of(id))).collect()
    }

    pub fn class_type(&self, node: &str) -> Option<&str> {
        self.nodes.get(node)?.get("class_type")?.as_str()
    }

    /// Where a file's name can be put in without being told: the file inputs of loading nodes that aren't links.
    pub fn file_inputs(&self) -> Vec<FileInput> {
        let places = self.nodes.iter().flat_map(|(id, node)| {
            let class_type = node["class_type"].as_str().unwrap_or_default();
            FILE_INPUTS.iter().filter(|_| class_type.contains("Load")).filter_map(move |input| {
                let value = node.get("inputs")?.get(input)?.as_str()?.to_owned();
                let (node, class_type, input) = (id.clone(), class_type.to_owned(), (*input).to_owned());
                Some(FileInput { node, class_type, input, value })
            })
        });
        places.collect()
    }

    /// The place that `selector` means: `node_id.input`, `node_id` when that node has one file input, or nothing
    /// when the workflow has only one.
    pub fn resolve(&self, selector: &str) -> Result<(String, String), WorkflowError> {
        let all = self.file_inputs();
        if selector.is_empty() {
            return match all.as_slice() {
                [only] => Ok((only.node.clone(), only.input.clone())),
                [] => Err(WorkflowError::Input("the workflow has no node that loads a file".into())),
                _ => Err(WorkflowError::Input(format!("say which node the file is for: {}", listed(&all)))),
            };
        }
        if self.nodes.contains_key(selector) {
            let of_node: Vec<_> = all.iter().filter(|place| place.node == selector).cloned().collect();
            return match of_node.as_slice() {
                [only] => Ok((only.node.clone(), only.input.clone())),
                [] => Err(WorkflowError::Input(format!(
                    "node {selector} ({}) has no input that takes a file; {}",
                    self.class_type(selector).unwrap_or_default(),
                    if all.is_empty() { "nor has any other node".to_owned() } else { format!("use {}", listed(&all)) }
                ))),
                _ => Err(WorkflowError::Input(format!("node {selector} takes several files: {}", listed(&of_node)))),
            };
        }
        let place = selector.rsplit_once('.').filter(|(node, _)| self.nodes.contains_key(*node));
        let Some((node, input)) = place else {
            let known: Vec<_> = self.nodes.keys().map(String::as_str).take(50).collect();
            let (node, known) = (selector.split('.').next().unwrap_or(selector), known.join(", "));
            return Err(WorkflowError::Input(format!("the workflow has no node {node:?}; its nodes are {known}")));
        };
        let inputs = self.nodes[node].get("inputs").and_then(Value::as_object);
        if !inputs.is_some_and(|inputs| inputs.contains_key(input)) {
            let names: Vec<_> = inputs.into_iter().flat_map(Map::keys).map(String::as_str).collect();
            let names = names.join(", ");
            return Err(WorkflowError::Input(format!("node {node} has no input {input:?}; its inputs are {names}")));
        }
        Ok((node.to_owned(), input.to_owned()))
    }

    /// Puts the names of uploaded files in. All selectors are resolved before anything is changed.
    pub fn set_input_files(&mut self, files: &[(String, String)]) -> Result<(), WorkflowError> {
        let places = self.resolve_all(files.iter().map(|(selector, _)| selector.as_str()))?;
        for ((node, input), (_, name)) in places.into_iter().zip(files) {
            self.nodes[&node]["inputs"][&input] = Value::String(name.clone());
        }
        Ok(())
    }

    /// [`Workflow::resolve`] for several files, which must have different places.
    pub fn resolve_all<'a>(
        &self,
        selectors: impl Iterator<Item = &'a str>,
    ) -> Result<Vec<(String, String)>, WorkflowError> {
        let mut places: Vec<(String, String)> = Vec::new();
        for selector in selectors {
            let place = self.resolve(selector)?;
            if places.contains(&place) {
                let (node, input) = place;
                return Err(WorkflowError::Input(format!("two files are given for input `{input}` of node {node}")));
            }
            places.push(place);
        }
        Ok(places)
    }
}

fn check_node(nodes: &Map<String, Value>, id: &str, node: &Value) -> Result<(), WorkflowError> {
    let id = || id.to_owned();
    let fields = node.as_object().ok_or_else(|| WorkflowError::NotANode { node: id(), found: kind_of(node) })?;
    if fields.get("class_type").and_then(Value::as_str).unwrap_or_default().is_empty() {
        return Err(WorkflowError::MissingClassType { node: id() });
    }
    let inputs = match fields.get("inputs") {
        None => return Ok(()),
        Some(Value::Object(inputs)) => inputs,
        Some(other) => return Err(WorkflowError::InputsNotAnObject { node: id(), found: kind_of(other) }),
    };
    for (input, value) in inputs {
        if let Some([Value::String(target), Value::Number(_)]) = value.as_array().map(Vec::as_slice)
            && !nodes.contains_key(target)
        {
            return Err(WorkflowError::MissingNode { node: id(), input: input.clone(), target: target.clone() });
        }
    }
    Ok(())
}

fn listed(places: &[FileInput]) -> String {
    let each = places.iter().map(|place| format!("\"{}.{}\" ({})", place.node, place.input, place.class_type));
    each.collect::<Vec<_>>().join(" or ")
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn loader(image: &str) -> Value {
        json!({"class_type": "LoadImage", "inputs": {"image": image}})
    }

    #[test]
    fn seeds_up_to_the_largest_survive() {
        let text = r#"{"3":{"class_type":"KSampler","inputs":{"seed":18446744073709551615,"cfg":7.5}}}"#;
        let workflow = Workflow::parse(&serde_json::from_str(text).unwrap()).unwrap();
        assert_eq!(serde_json::to_string(workflow.nodes()).unwrap(), text);
    }

    #[test]
    fn unwraps_a_prompt_but_not_a_node_of_that_name() {
        let node = json!({"class_type": "X", "inputs": {}});
        let wrapped = Workflow::parse(&json!({"prompt": {"1": node}, "client_id": "c"})).unwrap();
        assert_eq!(wrapped.nodes().keys().collect::<Vec<_>>(), ["1"]);
        let named = Workflow::parse(&json!({"prompt": node})).unwrap();
        assert_eq!(named.class_type("prompt"), Some("X"));
    }

    #[test]
    fn says_what_is_wrong_and_where() {
        let said = |value: Value| Workflow::parse(&value).unwrap_err();
        assert_eq!(said(json!([1])), WorkflowError::NotAnObject { found: "a list" });
        assert_eq!(said(json!({})), WorkflowError::Empty);
        assert_eq!(said(json!({"prompt": {}})), WorkflowError::Empty);
        let editor = said(json!({"nodes": [{"id": 1}], "links": [], "version": 0.4}));
        assert!(editor.to_string().contains("Export (API)") && editor == WorkflowError::EditorFormat { nodes: 1 });
        assert_eq!(said(json!({"1": 5})), WorkflowError::NotANode { node: "1".into(), found: "a number" });
        assert_eq!(said(json!({"7": {"inputs": {}}})), WorkflowError::MissingClassType { node: "7".into() });
        let inputs = json!({"7": {"class_type": "X", "inputs": []}});
        assert_eq!(said(inputs), WorkflowError::InputsNotAnObject { node: "7".into(), found: "a list" });
        let dangling = said(json!({"1": {"class_type": "X", "inputs": {"images": ["9", 0]}}}));
        let (node, input, target) = ("1".into(), "images".into(), "9".into());
        assert_eq!(dangling, WorkflowError::MissingNode { node, input, target });
    }

    #[test]
    fn puts_files_where_they_are_wanted() {
        let set = |nodes: Value, files: &[(&str, &str)]| {
            let mut workflow = Workflow::parse(&nodes).unwrap();
            let files: Vec<_> = files.iter().map(|(at, name)| ((*at).to_owned(), (*name).to_owned())).collect();
            workflow.set_input_files(&files).map(|()| Value::Object(workflow.nodes.clone()))
        };
        let model = json!({"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "m"}});
        let one = json!({"1": loader("old.png"), "2": model});
        assert_eq!(set(one.clone(), &[("", "new.png")]).unwrap()["1"], loader("new.png"));
        assert_eq!(set(one.clone(), &[("1", "new.png")]).unwrap()["1"], loader("new.png"));
        assert_eq!(set(one.clone(), &[("2.ckpt_name", "n")]).unwrap()["2"]["inputs"]["ckpt_name"], "n");

        let refused = |nodes: &Value, files: &[(&str, &str)]| set(nodes.clone(), files).unwrap_err().to_string();
        let two = json!({"1": loader("a"), "4:2": loader("b")});
        let ambiguous = refused(&two, &[("", "x")]);
        assert!(ambiguous.contains("\"1.image\" (LoadImage)") && ambiguous.contains("\"4:2.image\""), "{ambiguous}");
        assert!(refused(&one, &[("2", "x")]).contains("use \"1.image\""));
        assert!(refused(&one, &[("1.nope", "x")]).contains("its inputs are image"));
        assert!(refused(&one, &[("5.image", "x")]).contains("no node \"5\""));
        assert!(refused(&one, &[("", "x"), ("1.image", "y")]).contains("two files"));
    }
}
