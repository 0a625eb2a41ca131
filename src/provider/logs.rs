//! What a pod says: lines with their time and where they come from.

use std::time::Duration;

use futures_util::stream::BoxStream;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::ProviderError;

/// Lines as they come, until an error or until it is dropped.
pub type LogStream = BoxStream<'static, Result<LogLine, ProviderError>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogSource {
    /// What the programs in the container print.
    Container,
    /// What the provider does with it: pulling the image, starting, stopping.
    System,
}

/// Which lines are wanted. With `since`, `tail` doesn't count.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogQuery {
    /// Both, when left out.
    pub source: Option<LogSource>,
    /// How many of the lines that there are already; the provider's own number when left out.
    pub tail: Option<u32>,
    pub since: Option<Timestamp>,
}

/// When reading a stream that has no end is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLimits {
    pub lines: usize,
    /// The bytes of all texts together.
    pub bytes: usize,
    /// So long without a further line means that all there is has been read.
    pub quiet: Duration,
    pub time: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    pub at: Option<Timestamp>,
    /// `None` for a source that this version doesn't know.
    pub source: Option<LogSource>,
    /// As the pod printed it, escape sequences included.
    pub text: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogPage {
    /// Oldest first.
    pub lines: Vec<LogLine>,
    /// A limit ended the reading before the pod was quiet: there may be more.
    pub more: bool,
}

impl Default for LogLimits {
    /// For an answer that an assistant reads.
    fn default() -> Self {
        Self { lines: 1000, bytes: 256 * 1024, quiet: Duration::from_millis(1500), time: Duration::from_secs(15) }
    }
}
