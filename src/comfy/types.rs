//! What ComfyUI answers, as far as it is used here. Unknown fields are left aside, and so is `extra_data`, which can
//! hold API keys of the user who queued the prompt.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::{NodeError, text};

/// `GET /system_stats`. Sizes in bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SystemStats {
    pub system: SystemInfo,
    pub devices: Vec<Device>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SystemInfo {
    pub os: Option<String>,
    pub comfyui_version: Option<String>,
    pub python_version: Option<String>,
    pub pytorch_version: Option<String>,
    pub ram_total: Option<u64>,
    pub ram_free: Option<u64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Device {
    pub name: String,
    /// `cuda`, `cpu`, `mps`, ...
    #[serde(rename = "type")]
    pub kind: String,
    pub index: Option<i64>,
    pub vram_total: Option<u64>,
    pub vram_free: Option<u64>,
    pub torch_vram_total: Option<u64>,
    pub torch_vram_free: Option<u64>,
}

/// `GET /queue`.
#[derive(Debug, Clone, Default)]
pub struct Queue {
    pub running: Vec<QueueItem>,
    /// In the order in which they will run.
    pub pending: Vec<QueueItem>,
}

#[derive(Debug, Clone)]
pub struct QueueItem {
    pub prompt_id: String,
    /// Smaller runs earlier; negative when it was put in front.
    pub number: f64,
    /// 0 while it runs, 1 for the next one.
    pub position: usize,
    /// How many nodes the workflow has.
    pub nodes: usize,
    pub output_nodes: Vec<String>,
    /// Who queued it: by this a submit is found again on servers that give the prompt an id of their own.
    pub client_id: Option<String>,
}

impl Queue {
    pub(super) fn from_body(body: &Value) -> Result<Self, Bad> {
        let part = |field: &'static str| -> Result<Vec<QueueItem>, Bad> {
            let list = body.get(field).and_then(Value::as_array).ok_or(Bad::new(field, "a list is missing"))?;
            let items = list.iter().enumerate().map(|(at, item)| {
                QueueItem::from_tuple(item).ok_or(Bad::new(format!("{field}[{at}]"), "not [number, prompt_id, ...]"))
            });
            items.collect()
        };
        let (running, mut pending) = (part("queue_running")?, part("queue_pending")?);
        pending.sort_by(|a, b| a.number.total_cmp(&b.number).then_with(|| a.prompt_id.cmp(&b.prompt_id)));
        pending.iter_mut().enumerate().for_each(|(at, item)| item.position = at + 1);
        Ok(Self { running, pending })
    }

    /// From the body of an answer that came another way than through a client.
    pub fn parse(body: &[u8]) -> Option<Self> {
        Self::from_body(&parse_python_json(body).ok()?).ok()
    }

    pub fn is_empty(&self) -> bool {
        self.running.is_empty() && self.pending.is_empty()
    }

    /// Running ones first.
    pub fn iter(&self) -> impl Iterator<Item = &QueueItem> {
        self.running.iter().chain(&self.pending)
    }
}

impl QueueItem {
    /// `[number, prompt_id, prompt, extra_data, [output ids], ...]`
    fn from_tuple(item: &Value) -> Option<Self> {
        Some(Self {
            number: item.get(0)?.as_f64()?,
            prompt_id: item.get(1)?.as_str()?.to_owned(),
            position: 0,
            nodes: item.get(2).and_then(Value::as_object).map_or(0, Map::len),
            client_id: item.get(3).and_then(|extra| extra.get("client_id")?.as_str()).map(str::to_owned),
            output_nodes: item
                .get(4)
                .and_then(Value::as_array)
                .map_or(Vec::new(), |ids| ids.iter().filter_map(Value::as_str).map(str::to_owned).collect()),
        })
    }
}

/// One prompt of `GET /history`: what ran to its end, well or not.
#[derive(Debug, Clone)]
pub struct HistoryEntry {
    pub prompt_id: String,
    pub nodes: usize,
    pub client_id: Option<String>,
    /// Node id -> what it put out, as the server says it.
    pub outputs: Map<String, Value>,
    /// `success` or `error`; old servers leave it out.
    pub status: Option<String>,
    /// `[event, data]` in the order of the run.
    pub messages: Vec<(String, Value)>,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    Done,
    Failed(Failure),
    Interrupted,
}

/// A node that raised an exception.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub node_id: String,
    pub node_type: String,
    pub message: String,
    pub exception_type: String,
    /// The lines of Python's traceback.
    pub traceback: Vec<String>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "node {} ({}) failed: ", self.node_id, self.node_type)?;
        if !self.exception_type.is_empty() {
            write!(out, "{}: ", self.exception_type)?;
        }
        out.write_str(self.message.trim())
    }
}

impl HistoryEntry {
    pub(super) fn from_value(prompt_id: &str, value: &Value) -> Result<Self, Bad> {
        let fields = value.as_object().ok_or(Bad::new(prompt_id, "not an object"))?;
        let prompt = fields.get("prompt").and_then(QueueItem::from_tuple);
        let outputs = fields.get("outputs").and_then(Value::as_object).cloned().unwrap_or_default();
        let status = fields.get("status").unwrap_or(&Value::Null);
        let messages = status.get("messages").and_then(Value::as_array).into_iter().flatten();
        let messages = messages.filter_map(|pair| Some((pair.get(0)?.as_str()?.to_owned(), pair.get(1)?.clone())));
        Ok(Self {
            prompt_id: prompt_id.to_owned(),
            nodes: prompt.as_ref().map_or(0, |prompt| prompt.nodes),
            client_id: prompt.and_then(|prompt| prompt.client_id),
            outputs,
            status: status.get("status_str").and_then(Value::as_str).map(str::to_owned),
            messages: messages.collect(),
        })
    }

    /// An interrupted run has the status `error` too: only its messages tell the two apart.
    pub fn verdict(&self) -> Verdict {
        if self.messages.iter().any(|(event, _)| event == "execution_interrupted") {
            return Verdict::Interrupted;
        }
        if self.status.as_deref() != Some("error") {
            return Verdict::Done;
        }
        let error = self.messages.iter().rev().find(|(event, data)| event == "execution_error" && !is_blocked(data));
        Verdict::Failed(match error {
            Some((_, data)) => Failure::from_data(data),
            None => Failure { message: "ComfyUI recorded an error without saying which".into(), ..Failure::default() },
        })
    }
}

/// A node whose input was blocked on purpose: told as an error, but the run goes on.
pub(super) fn is_blocked(data: &Value) -> bool {
    data.get("exception_type").and_then(Value::as_str).is_some_and(|kind| kind.ends_with("ExecutionBlocked"))
}

impl Failure {
    fn from_data(data: &Value) -> Self {
        let lines = data.get("traceback").and_then(Value::as_array).into_iter().flatten();
        Self {
            node_id: text(data, "node_id"),
            node_type: text(data, "node_type"),
            message: text(data, "exception_message"),
            exception_type: text(data, "exception_type"),
            traceback: lines.filter_map(Value::as_str).map(str::to_owned).collect(),
        }
    }
}

/// What `POST /prompt` accepted.
#[derive(Debug, Clone)]
pub struct Submitted {
    /// Ours, unless the server is one that gives its own.
    pub prompt_id: String,
    pub number: Option<f64>,
    /// Not empty when some outputs were dropped and the rest runs.
    pub node_errors: Vec<NodeError>,
}

/// Where an upload landed; `name` may differ from the one that was sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uploaded {
    pub name: String,
    #[serde(default)]
    pub subfolder: String,
    #[serde(rename = "type", default)]
    pub kind: String,
}

impl Uploaded {
    /// The value that a loading node takes.
    pub fn as_input(&self) -> String {
        let name = match self.subfolder.as_str() {
            "" => self.name.clone(),
            subfolder => format!("{subfolder}/{}", self.name),
        };
        // Without a note a loading node looks in `input`.
        if self.kind.is_empty() || self.kind == "input" { name } else { format!("{name} [{}]", self.kind) }
    }
}

/// Where and why an answer can't be read.
#[derive(Debug)]
pub(super) struct Bad {
    pub path: String,
    pub reason: String,
}

impl Bad {
    pub(super) fn new(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { path: path.into(), reason: reason.into() }
    }
}

/// Python writes `NaN`, `Infinity` and `-Infinity`, which JSON doesn't know: read them as `null`.
pub(super) fn parse_python_json(bytes: &[u8]) -> Result<Value, serde_json::Error> {
    match serde_json::from_slice(bytes) {
        Ok(value) => Ok(value),
        Err(error) => without_non_numbers(bytes).map_or(Err(error), |cleaned| serde_json::from_slice(&cleaned)),
    }
}

/// `None` when there was nothing to replace.
fn without_non_numbers(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut cleaned = Vec::with_capacity(bytes.len());
    let (mut rest, mut in_string, mut replaced) = (bytes, false, false);
    while let Some(&byte) = rest.first() {
        if !in_string && let Some(word) = [&b"NaN"[..], b"-Infinity", b"Infinity"].iter().find(|w| rest.starts_with(w))
        {
            cleaned.extend_from_slice(b"null");
            rest = &rest[word.len()..];
            replaced = true;
            continue;
        }
        // An escaped character is copied together with its backslash, so that `\"` doesn't end the string.
        let taken = if in_string && byte == b'\\' { rest.len().min(2) } else { 1 };
        in_string ^= byte == b'"';
        cleaned.extend_from_slice(&rest[..taken]);
        rest = &rest[taken..];
    }
    replaced.then_some(cleaned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_pythons_non_numbers_only_outside_of_strings() {
        let body =
            br#"{"a": NaN, "b": [-Infinity, Infinity, 1.5], "c": "NaN \" Infinity \\", "d": 18446744073709551615}"#;
        let read = parse_python_json(body).unwrap();
        assert_eq!(
            read,
            json!({"a": null, "b": [null, null, 1.5], "c": "NaN \" Infinity \\", "d": 18_446_744_073_709_551_615_u64})
        );
        for broken in [&b"{\"a\": NaN"[..], b"\"\\", b"NaNNaN", b""] {
            assert!(parse_python_json(broken).is_err());
        }
    }

    #[test]
    fn pending_ones_are_sorted_by_number_then_id() {
        let item =
            |number: Value, id: &str| json!([number, id, {"1": {}}, {"client_id": "me", "api_key": "secret"}, ["1"]]);
        let body = json!({"queue_running": [item(json!(1), "r")],
            "queue_pending": [item(json!(9), "b"), item(json!(-2), "z"), item(json!(9), "a")]});
        let queue = Queue::from_body(&body).unwrap();
        let order: Vec<_> = queue.pending.iter().map(|item| (item.position, item.prompt_id.as_str())).collect();
        assert_eq!(order, [(1, "z"), (2, "a"), (3, "b")]);
        assert!(!format!("{queue:?}").contains("secret"));
    }

    #[test]
    fn an_interrupted_run_is_not_a_failed_one() {
        let entry = |messages: Value| {
            let status = json!({"status_str": "error", "completed": false, "messages": messages});
            HistoryEntry::from_value("p", &json!({"outputs": {}, "status": status})).unwrap().verdict()
        };
        assert_eq!(entry(json!([["execution_interrupted", {"node_id": "3"}]])), Verdict::Interrupted);
        let error = json!({"node_id": 3, "node_type": "KSampler", "exception_message": "boom", "exception_type": "E",
            "traceback": ["line"]});
        let blocked = json!({"node_id": "9", "exception_type": "ExecutionBlocked"});
        let Verdict::Failed(failure) = entry(json!([["execution_error", error], ["execution_error", blocked]])) else {
            panic!("not failed");
        };
        assert_eq!((failure.node_id.as_str(), failure.message.as_str()), ("3", "boom"));
    }
}
