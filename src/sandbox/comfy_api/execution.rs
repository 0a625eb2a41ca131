//! Executes a prompt: in the order of its links, with the results of the prompt before kept.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::PoisonError;

use serde_json::{Map, Value, json};

use super::classes;
use super::nodes::{Call, Failure, Made, Output};
use super::queue::{Finished, Job};
use super::{Comfy, timestamp};

/// What makes two nodes the same: class, constants, and the same of all they are linked to. Two hashes of 64 bits.
type Signature = (u64, u64);

/// Keeps the results of the last prompt's nodes.
#[derive(Default)]
pub struct Executor {
    results: HashMap<Signature, Made>,
}

impl Executor {
    pub fn execute(&mut self, comfy: &Comfy, job: &Job) -> Finished {
        let mut signatures = HashMap::new();
        for node in job.prompt.keys() {
            sign(comfy, &job.prompt, node, &mut signatures);
        }
        let wanted: HashSet<Signature> = signatures.values().copied().collect();
        self.results.retain(|signature, _| wanted.contains(signature));
        let mut run = Run {
            comfy,
            job,
            signatures,
            executed: Vec::new(),
            states: Map::new(),
            finished: Finished { outputs: Map::new(), meta: Map::new(), success: false, messages: Vec::new() },
        };
        run.message("execution_start", json!({ "prompt_id": job.id }), false);
        let cached: Vec<&String> =
            job.prompt.keys().filter(|node| self.results.contains_key(&run.signatures[*node])).collect();
        run.message("execution_cached", json!({ "nodes": cached, "prompt_id": job.id }), false);
        let done = job.outputs.iter().try_for_each(|node| {
            if let Some(kept) = self.results.get(&run.signatures[node]) {
                run.show(node, kept.shown.clone());
                return Ok(());
            }
            upstream_first(&job.prompt, node).into_iter().try_for_each(|node| run.run(node, &mut self.results))
        });
        if done.is_ok() {
            run.message("execution_success", json!({ "prompt_id": job.id }), false);
            run.finished.success = true;
        }
        run.finished
    }
}

/// One prompt being executed.
struct Run<'a> {
    comfy: &'a Comfy,
    job: &'a Job,
    signatures: HashMap<String, Signature>,
    executed: Vec<String>,
    /// `progress_state` of each node so far.
    states: Map<String, Value>,
    finished: Finished,
}

/// The run is over; why is in its messages.
struct Stopped;

impl Run<'_> {
    /// Executes a node, when all it is linked to has been, unless its result is known.
    fn run(&mut self, node: &str, results: &mut HashMap<Signature, Made>) -> Result<(), Stopped> {
        let signature = self.signatures[node];
        if results.contains_key(&signature) {
            return Ok(());
        }
        let (class, inputs) = parts(&self.job.prompt, node);
        let mut values = Map::new();
        let mut links = Vec::new();
        for (name, value) in inputs {
            match link(&self.job.prompt, value) {
                Some((from, slot)) => {
                    let made = results.get(&self.signatures[from]);
                    if let Some(output) = made.and_then(|made| made.outputs.get(slot)) {
                        links.push((name.to_owned(), Output::clone(output)));
                    }
                }
                None => {
                    values.insert(name.to_owned(), value.clone());
                }
            }
        }
        if self.comfy.is_interrupted(self.job) {
            return Err(self.fail(node, class, &values, Failure::Interrupted));
        }
        self.begin(node);
        let states = std::cell::RefCell::new(&mut self.states);
        let (comfy, job) = (self.comfy, self.job);
        let call = Call {
            comfy,
            job,
            values,
            links,
            progress: &|value, most| tell_progress(comfy, job, node, value, most, &mut states.borrow_mut()),
        };
        let made = call.run(class);
        let values = call.values;
        match made {
            Ok(made) => {
                self.set_state(node, 1, "finished");
                if made.shown.is_some() {
                    self.show(node, made.shown.clone());
                }
                self.executed.push(node.to_owned());
                results.insert(signature, made);
                Ok(())
            }
            Err(failure) => Err(self.fail(node, class, &values, failure)),
        }
    }

    fn begin(&mut self, node: &str) {
        if let Some(client) = self.job.client() {
            let current = Some((client.to_owned(), node.to_owned()));
            *self.comfy.current.lock().unwrap_or_else(PoisonError::into_inner) = current;
            let data = json!({ "node": node, "display_node": node, "prompt_id": self.job.id });
            self.comfy.sockets.send("executing", data, Some(client));
        }
        self.set_state(node, 0, "running");
    }

    fn set_state(&mut self, node: &str, value: u64, state: &str) {
        self.states.insert(node.to_owned(), progress_of(self.job, node, value, 1, state));
        tell_states(self.comfy, self.job, &self.states);
    }

    /// Tells what an output node shows, and keeps it for the history.
    fn show(&mut self, node: &str, shown: Option<Value>) {
        if let Some(client) = self.job.client() {
            let data = json!({ "node": node, "display_node": node, "output": shown, "prompt_id": self.job.id });
            self.comfy.sockets.send("executed", data, Some(client));
        }
        if let Some(shown) = shown {
            self.finished.outputs.insert(node.to_owned(), shown);
            let meta = json!({ "node_id": node, "display_node": node, "parent_node": null, "real_node_id": node });
            self.finished.meta.insert(node.to_owned(), meta);
        }
    }

    fn fail(&mut self, node: &str, class: &str, values: &Map<String, Value>, failure: Failure) -> Stopped {
        let mut data =
            json!({ "prompt_id": self.job.id, "node_id": node, "node_type": class, "executed": self.executed });
        match failure {
            Failure::Interrupted => self.message("execution_interrupted", data, true),
            Failure::Raised { exception, message } => {
                self.set_state(node, 0, "error");
                let inputs: Map<String, Value> =
                    values.iter().map(|(name, value)| (name.clone(), json!([value]))).collect();
                data["exception_message"] = json!(format!("{message}\n"));
                data["exception_type"] = json!(exception);
                data["traceback"] = json!([
                    "  File \"sandbox/execution\", in execute\n    made = call.run(class)\n",
                    format!("  File \"sandbox/nodes\", in {class}\n    {exception}: {message}\n"),
                ]);
                data["current_inputs"] = Value::Object(inputs);
                data["current_outputs"] = json!(self.executed);
                self.message("execution_error", data, false);
            }
        }
        Stopped
    }

    /// Keeps an event for the history and sends it to the prompt's client. Without a client only what is marked as
    /// `broadcast` is heard, by everyone.
    fn message(&mut self, event: &str, mut data: Value, broadcast: bool) {
        data["timestamp"] = json!(timestamp());
        self.finished.messages.push(json!([event, data]));
        if broadcast || self.job.client().is_some() {
            self.comfy.sockets.send(event, data, self.job.client());
        }
    }
}

/// Progress goes to the prompt's client or, when it has none, to everyone.
fn tell_progress(comfy: &Comfy, job: &Job, node: &str, value: u64, most: u64, states: &mut Map<String, Value>) {
    states.insert(node.to_owned(), progress_of(job, node, value, most, "running"));
    tell_states(comfy, job, states);
    let data = json!({ "value": value, "max": most, "prompt_id": job.id, "node": node });
    comfy.log.add("progress", data.clone());
    comfy.sockets.send("progress", data, job.client());
}

fn tell_states(comfy: &Comfy, job: &Job, states: &Map<String, Value>) {
    comfy.sockets.send("progress_state", json!({ "prompt_id": job.id, "nodes": states }), job.client());
}

fn progress_of(job: &Job, node: &str, value: u64, most: u64, state: &str) -> Value {
    json!({
        "value": value,
        "max": most,
        "state": state,
        "node_id": node,
        "prompt_id": job.id,
        "display_node_id": node,
        "parent_node_id": null,
        "real_node_id": node,
    })
}

/// A node's class and those of its inputs that the class declares. Others are never looked at: what they hold or lead to
/// was not validated.
fn parts<'a>(prompt: &'a Map<String, Value>, node: &str) -> (&'a str, Vec<(&'static str, &'a Value)>) {
    let node = prompt.get(node);
    let name = node.and_then(|node| node.get("class_type")).and_then(Value::as_str).unwrap_or_default();
    let inputs = node.and_then(|node| node.get("inputs"));
    let declared = classes::find(name).map_or(&[][..], |class| class.inputs).iter();
    (name, declared.filter_map(|(input, _)| Some((*input, inputs?.get(input)?))).collect())
}

/// What a linked input leads to: a node of the prompt and a slot.
fn link<'a>(prompt: &'a Map<String, Value>, value: &'a Value) -> Option<(&'a str, usize)> {
    let [from, slot] = value.as_array()?.as_slice() else { return None };
    let (from, _) = prompt.get_key_value(from.as_str()?)?;
    Some((from, usize::try_from(slot.as_u64()?).ok()?))
}

/// A node and all it is linked to, each behind what it needs. Validation has seen to it that there is no circle.
fn upstream_first<'a>(prompt: &'a Map<String, Value>, node: &'a str) -> Vec<&'a str> {
    let mut order = Vec::new();
    let (mut open, mut done) = (HashSet::new(), HashSet::new());
    let mut stack = vec![node];
    while let Some(node) = stack.last().copied() {
        if open.insert(node) {
            let (_, inputs) = parts(prompt, node);
            let upstream = inputs.iter().filter_map(|(_, value)| link(prompt, value)).map(|(from, _)| from);
            stack.extend(upstream.filter(|from| !open.contains(from)));
            continue;
        }
        stack.pop();
        if done.insert(node) {
            order.push(node);
        }
    }
    order
}

/// Works out the signatures of a node and of all it is linked to. Nodes that no output needs were not validated: they
/// may be linked in a circle or without end, so this goes by a stack of its own.
fn sign(comfy: &Comfy, prompt: &Map<String, Value>, node: &str, signatures: &mut HashMap<String, Signature>) {
    let mut open = HashSet::new();
    let mut stack = vec![node];
    while let Some(node) = stack.last().copied() {
        if signatures.contains_key(node) {
            stack.pop();
            continue;
        }
        let (class, inputs) = parts(prompt, node);
        let unsigned = inputs.iter().filter_map(|(_, value)| link(prompt, value)).map(|(from, _)| from);
        let unsigned: Vec<&str> = unsigned.filter(|from| !signatures.contains_key(*from)).collect();
        if open.insert(node) && !unsigned.is_empty() {
            stack.extend(unsigned);
            continue;
        }
        let mut hashers = [DefaultHasher::new(), DefaultHasher::new()];
        hashers[1].write_u8(1);
        for hasher in &mut hashers {
            class.hash(hasher);
            for (name, value) in &inputs {
                name.hash(hasher);
                match link(prompt, value) {
                    Some((from, slot)) => (signatures.get(from), slot).hash(hasher),
                    None => value.to_string().hash(hasher),
                }
            }
            // A file may have changed under its name.
            if class == "LoadImage"
                && let Some(name) = inputs.first().and_then(|(_, value)| value.as_str())
            {
                comfy.files.annotated(name).and_then(|path| std::fs::read(path).ok()).hash(hasher);
            }
        }
        signatures.insert(node.to_owned(), (hashers[0].finish(), hashers[1].finish()));
        stack.pop();
    }
}
