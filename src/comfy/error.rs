//! Why a call to ComfyUI failed, told so that the reader knows what to do next.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

type Source = Box<dyn std::error::Error + Send + Sync>;

/// `Display` is one sentence (a rejection lists its nodes below); the cause is in `source()`.
#[derive(Debug, thiserror::Error)]
pub enum ComfyError {
    /// The port is closed: no tunnel, or no ComfyUI on this machine.
    #[error("nothing listens at {address}")]
    Refused { address: String, source: Source },
    /// The connection was opened and then closed without a whole answer. A tunnel accepts connections even when
    /// nothing listens at its far end, so this is also how a ComfyUI that isn't up yet looks.
    #[error("{call}: the connection broke before the answer was complete (behind a tunnel: ComfyUI is not up)")]
    Cut { call: String, source: Source },
    /// Another reason why no connection came about (name, route, certificate, connecting took too long).
    #[error("{address} can't be reached")]
    Unreachable { address: String, source: Source },
    #[error("{call}: no answer within {after:?}")]
    TimedOut { call: String, after: Duration },
    #[error("{call} answered HTTP {status}{}", colon(.text))]
    HttpStatus { call: String, status: u16, text: String },
    /// Redirects are never followed: a redirected POST becomes a GET that answers 200 and does nothing.
    #[error("{call} was redirected to {to}: give the address that ComfyUI itself has")]
    Redirected { call: String, to: String },
    #[error("what answers at {address} is not ComfyUI: {found}")]
    WrongService { address: String, found: String },
    #[error("{call}: the answer can't be read at `{path}`: {reason}")]
    Unreadable { call: String, path: String, reason: String },
    #[error("{call}: the answer is larger than {limit} bytes")]
    TooLarge { call: String, limit: u64 },
    #[error("{0}")]
    Rejected(Box<Rejection>),
    /// The answer to the submit was lost and the server, asked afterwards, doesn't know the prompt.
    #[error(
        "the workflow was sent but ComfyUI doesn't know it (prompt {prompt_id}): it was not accepted, run it again"
    )]
    NotAccepted { prompt_id: String, source: Box<ComfyError> },
    /// The answer to the submit was lost and the server couldn't be asked afterwards.
    #[error(
        "the workflow was sent but whether ComfyUI accepted it is not known (prompt {prompt_id}): look for this prompt before running it again"
    )]
    OutcomeUnknown { prompt_id: String, source: Box<ComfyError> },
    #[error("the file {path} can't be read or written")]
    File { path: String, source: std::io::Error },
    /// What this machine lacks to make the call at all, or an address that can't be one.
    #[error("{0}")]
    Setup(String),
}

fn colon(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

impl ComfyError {
    /// Whether the request surely never reached the server.
    pub fn was_never_sent(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Unreachable { .. } | Self::Setup(_) | Self::File { .. })
    }

    /// Whether the same question may be answered a little later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Refused { .. } | Self::Cut { .. } | Self::Unreachable { .. } | Self::TimedOut { .. } => true,
            Self::HttpStatus { status, .. } => *status >= 500 || *status == 429,
            _ => false,
        }
    }

    /// Sorts a failure of the HTTP library. `after` is the time-out that applied.
    pub(super) fn from_reqwest(error: reqwest::Error, call: &str, address: &str, after: Duration) -> Self {
        let error = error.without_url();
        if error.is_connect() {
            let refused = io_kind(&error) == Some(std::io::ErrorKind::ConnectionRefused);
            let (address, source) = (address.to_owned(), error.into());
            return if refused { Self::Refused { address, source } } else { Self::Unreachable { address, source } };
        }
        if error.is_timeout() {
            return Self::TimedOut { call: call.to_owned(), after };
        }
        if error.is_builder() {
            return Self::Setup(format!("{call}: the request can't be built: {error}"));
        }
        Self::Cut { call: call.to_owned(), source: error.into() }
    }
}

fn io_kind(error: &(dyn std::error::Error + 'static)) -> Option<std::io::ErrorKind> {
    let mut cause = Some(error);
    while let Some(current) = cause {
        if let Some(io) = current.downcast_ref::<std::io::Error>() {
            return Some(io.kind());
        }
        cause = current.source();
    }
    None
}

/// A workflow that ComfyUI refused to queue (HTTP 400 of `POST /prompt`). The cause is usually in `node_errors`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rejection {
    /// Like `prompt_outputs_failed_validation`.
    pub kind: String,
    pub message: String,
    pub details: String,
    pub node_errors: Vec<NodeError>,
}

/// One thing that is wrong with one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct NodeError {
    pub node_id: String,
    pub class_type: String,
    /// ComfyUI's name of the error, like `value_not_in_list`.
    pub kind: String,
    pub message: String,
    pub details: String,
}

impl fmt::Display for NodeError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "node {} ({}): {}", self.node_id, self.class_type, self.message)?;
        if !self.details.is_empty() {
            write!(out, ": {}", self.details)?;
        }
        if self.kind.is_empty() { Ok(()) } else { write!(out, " [{}]", self.kind) }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "ComfyUI refused the workflow: {}", self.message)?;
        if !self.details.is_empty() {
            write!(out, " ({})", self.details.trim())?;
        }
        if !self.kind.is_empty() {
            write!(out, " [{}]", self.kind)?;
        }
        self.node_errors.iter().try_for_each(|error| write!(out, "\n- {error}"))
    }
}

impl Rejection {
    /// From `{error: {type, message, details}, node_errors: {...}}`; `None` when the body isn't of this kind.
    pub(super) fn from_body(body: &Value) -> Option<Self> {
        let error = body.get("error")?;
        let (kind, message, details) = match error {
            Value::String(message) => (String::new(), message.clone(), String::new()),
            _ => (text(error, "type"), text(error, "message"), text(error, "details")),
        };
        Some(Self { kind, message, details, node_errors: NodeError::all_from(&body["node_errors"]) })
    }
}

impl NodeError {
    /// From `{node_id: {class_type, errors: [{type, message, details}]}}`; an empty list stands for no errors.
    pub(super) fn all_from(node_errors: &Value) -> Vec<Self> {
        let nodes = node_errors.as_object().into_iter().flatten();
        nodes
            .flat_map(|(node_id, node)| {
                let class_type = text(node, "class_type");
                let errors = node["errors"].as_array().cloned().unwrap_or_default();
                errors.into_iter().map(move |error| Self {
                    node_id: node_id.clone(),
                    class_type: class_type.clone(),
                    kind: text(&error, "type"),
                    message: text(&error, "message"),
                    details: text(&error, "details"),
                })
            })
            .collect()
    }
}

/// A field as text, whatever it is; empty where it is missing.
pub(super) fn text(value: &Value, field: &str) -> String {
    match value.get(field) {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}
