//! Every RunPod request the world was sent, with its answer, for `GET /_sandbox/requests`.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;

/// The log forgets its oldest entries beyond this many.
const KEPT: usize = 10_000;

/// One request. It is written down when it arrives, so that a request without an answer shows too: its `status` stays
/// null. The authorization header is never kept.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    /// Counts up from 0 over the world's life.
    pub number: u64,
    /// The world's time of arrival.
    pub at: Timestamp,
    pub method: String,
    /// As sent, still percent-encoded.
    pub path: String,
    pub query: Option<String>,
    pub user_agent: Option<String>,
    /// The operationId, null for a route the world doesn't serve.
    pub operation: Option<&'static str>,
    /// JSON where it was JSON, else a string, null where there was none.
    pub request_body: Value,
    pub status: Option<u16>,
    pub content_type: Option<String>,
    pub response_body: Value,
    /// Whether a fault had its hand in the answer.
    pub injected: bool,
}

#[derive(Debug, Default)]
pub struct RequestLog {
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    next: u64,
    kept: VecDeque<Entry>,
}

impl RequestLog {
    /// Writes down an arrival; its number is needed for [`Self::finish`].
    pub fn begin(&self, mut entry: Entry) -> u64 {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entry.number = entries.next;
        entries.next += 1;
        if entries.kept.len() == KEPT {
            entries.kept.pop_front();
        }
        let number = entry.number;
        entries.kept.push_back(entry);
        number
    }

    pub fn finish(&self, number: u64, change: impl FnOnce(&mut Entry)) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.kept.iter_mut().rev().find(|entry| entry.number == number) {
            change(entry);
        }
    }

    pub fn all(&self) -> Vec<Entry> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).kept.iter().cloned().collect()
    }
}
