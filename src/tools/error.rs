//! The one error a tool answers with, whichever face asked.

use serde::{Deserialize, Serialize};

use crate::background::KeeperError;
use crate::errors::{chain, harmless};
use crate::provider::ProviderError;
use crate::state::StateError;

/// The longest message or hint.
const MOST_CHARS: usize = 6000;

/// Picks the exit code, the JSON-RPC code and the wording.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The arguments are not what the tool takes.
    InvalidInput,
    NotFound,
    /// A cap, a missing confirmation or a rule of ours; nothing was done.
    Refused,
    /// What this machine lacks: a key, an `ssh`, a readable file.
    Setup,
    /// It was tried and did not work.
    Failed,
    /// The provider answered with an error.
    Provider,
    Network,
    /// It may or may not have happened; money may be spent.
    UnknownOutcome,
    Interrupted,
    /// A defect of this program.
    Internal,
}

impl ErrorKind {
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Failed | Self::Setup | Self::Internal => 1,
            Self::InvalidInput => 2,
            Self::NotFound => 3,
            Self::Refused => 4,
            Self::Provider | Self::Network => 5,
            Self::UnknownOutcome => 6,
            Self::Interrupted => 130,
        }
    }

    /// JSON-RPC 2.0 reserves -32602 for bad parameters and -32603 for internal errors; -32000 to -32099 are ours.
    pub fn json_rpc_code(self) -> i32 {
        match self {
            Self::InvalidInput => -32602,
            Self::Internal => -32603,
            Self::Failed => -32000,
            Self::NotFound => -32001,
            Self::Refused => -32002,
            Self::Setup => -32003,
            Self::Provider => -32004,
            Self::Network => -32005,
            Self::UnknownOutcome => -32006,
            Self::Interrupted => -32007,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StillBilling {
    Yes,
    No,
    Possible,
}

impl std::fmt::Display for StillBilling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Yes => "Still being billed: yes.",
            Self::No => "Still being billed: no.",
            Self::Possible => "Still being billed: possibly.",
        })
    }
}

/// What happened, whether money is being spent, and the exact next call.
#[derive(Debug, Clone, Serialize)]
pub struct ToolError {
    pub kind: ErrorKind,
    pub message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    pub retryable: bool,
    /// Left out where no pod is concerned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub still_billing: Option<StillBilling>,
}

impl ToolError {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let retryable = matches!(kind, ErrorKind::Network);
        Self { kind, message: message.into(), hint: None, retryable, still_billing: None }
    }

    pub fn invalid(field: &str, expected: impl std::fmt::Display) -> Self {
        Self::new(ErrorKind::InvalidInput, format!("`{field}`: {expected}"))
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Refused, message)
    }

    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Failed, message)
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub fn retryable(mut self, retryable: bool) -> Self {
        self.retryable = retryable;
        self
    }

    pub fn billing(mut self, still_billing: StillBilling) -> Self {
        self.still_billing = Some(still_billing);
        self
    }

    /// Messages and hints quote arguments and names from outside, which may be of any length and hold anything.
    pub(super) fn harmless(mut self) -> Self {
        self.message = bounded(&harmless(&self.message));
        self.hint = self.hint.map(|hint| bounded(&harmless(&hint)));
        self
    }

    /// The tool's name goes before the message, once, where the error leaves the registry.
    pub(super) fn of_tool(mut self, tool: &str) -> Self {
        let prefix = format!("{tool}: ");
        if !self.message.starts_with(&prefix) {
            self.message.insert_str(0, &prefix);
        }
        self
    }
}

/// An assistant has to read it all.
fn bounded(text: &str) -> String {
    match text.char_indices().nth(MOST_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

impl std::fmt::Display for ToolError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)?;
        if let Some(still_billing) = self.still_billing {
            write!(f, "\n{still_billing}")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "\nNext: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ToolError {}

impl From<ProviderError> for ToolError {
    fn from(error: ProviderError) -> Self {
        let message = chain(&error);
        let key_hint =
            "check the key (RUNPOD_API_KEY, or api_key in config.json) at https://console.runpod.io/user/settings";
        match error {
            ProviderError::MissingKey | ProviderError::Setup(_) => Self::new(ErrorKind::Setup, message),
            ProviderError::Unauthorized { .. } => Self::new(ErrorKind::Provider, message)
                .hint(format!("{key_hint}; nothing can be said about running pods until then"))
                .billing(StillBilling::Possible),
            ProviderError::Forbidden { .. } => Self::new(ErrorKind::Provider, message).hint(key_hint),
            ProviderError::NotFound { .. } => Self::new(ErrorKind::NotFound, message),
            ProviderError::PaymentRequired { .. } => Self::new(ErrorKind::Provider, message)
                .hint("add credit at https://console.runpod.io/user/billing, then call again"),
            ProviderError::RateLimited { .. } => Self::new(ErrorKind::Provider, message).retryable(true),
            ProviderError::Unreachable { .. }
            | ProviderError::TimedOut { .. }
            | ProviderError::Broken { .. }
            | ProviderError::Server { .. } => {
                Self::new(ErrorKind::Network, message).retryable(true).hint("try again in a moment")
            }
            ProviderError::Invalid { .. }
            | ProviderError::Refused { .. }
            | ProviderError::Conflict { .. }
            | ProviderError::Unreadable { .. } => Self::new(ErrorKind::Provider, message),
        }
    }
}

impl From<StateError> for ToolError {
    fn from(error: StateError) -> Self {
        let retryable = matches!(error, StateError::Locked { .. });
        Self::new(ErrorKind::Setup, chain(&error)).retryable(retryable).hint(match retryable {
            true => "call again in a moment",
            false => "`autopod-mcp doctor` says what to do; terminate_pod ends a pod all the same",
        })
    }
}

impl From<KeeperError> for ToolError {
    fn from(error: KeeperError) -> Self {
        Self::new(ErrorKind::Setup, chain(&error)).retryable(true)
    }
}
