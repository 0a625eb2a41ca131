//! The record of what happened in a pod, for tests and for the sandbox's own routes.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value};

/// Older entries are dropped, so that a pod that runs for days does not grow without end.
const MOST_ENTRIES: usize = 20_000;

/// An append-only list of JSON objects, each with `event` and `pod`. Cheap to clone.
#[derive(Clone)]
pub struct EventLog {
    pod_id: Arc<str>,
    entries: Arc<Mutex<VecDeque<Value>>>,
}

impl EventLog {
    pub fn new(pod_id: String) -> EventLog {
        EventLog { pod_id: pod_id.into(), entries: Arc::default() }
    }

    /// Appends `details` (an object) under the name `event`.
    pub fn add(&self, event: &str, details: Value) {
        let mut entry = Map::new();
        entry.insert("event".into(), event.into());
        entry.insert("pod".into(), self.pod_id.as_ref().into());
        if let Value::Object(details) = details {
            entry.extend(details);
        }
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() == MOST_ENTRIES {
            entries.pop_front();
        }
        entries.push_back(Value::Object(entry));
    }

    pub fn entries(&self) -> Vec<Value> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}
