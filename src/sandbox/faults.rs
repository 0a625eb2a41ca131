//! Faults that a test queues, each used up by the requests that meet it.

use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

/// One queued fault, as `POST /_sandbox/faults` takes it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// An operationId of RunPod's OpenAPI file, such as `createPod`, or `*` for each of them.
    pub operation: String,
    pub kind: FaultKind,
    /// How many requests it still meets.
    #[serde(default = "once")]
    pub times: u32,
    /// The status of `status_before` and `status_after`; 500 if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// The text of `status_before`, `status_after` and `no_capacity` instead of the usual one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Seconds of `Retry-After`, which a 429 has in any case (then 1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<u64>,
    /// Real milliseconds that `delay_ms` waits before the request is looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay_ms: Option<u64>,
    /// The GPU type of `no_capacity`; every one if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<String>,
    /// `lagging_list` leaves out pods younger than this in the world's seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// Answers a status without doing anything.
    StatusBefore,
    /// Does it, then answers a status that hides it.
    StatusAfter,
    /// Never answers and does nothing.
    HangBefore,
    /// Does it and never answers.
    HangAfter,
    /// Cuts the connection and does nothing.
    ResetBefore,
    /// Does it and cuts the connection.
    ResetAfter,
    /// Does it and answers the right status with a body that can't be read.
    Garbage,
    /// Answers late. Goes together with another fault.
    DelayMs,
    /// The GPU can't be had, neither by a create nor by a start.
    NoCapacity,
    /// The list of pods doesn't know the newest ones yet.
    LaggingList,
}

impl FaultKind {
    /// The one operation this kind means anything for, if not all.
    pub fn only_for(self) -> Option<&'static [&'static str]> {
        match self {
            Self::NoCapacity => Some(&["createPod", "podAction"]),
            Self::LaggingList => Some(&["listPods"]),
            _ => None,
        }
    }
}

fn once() -> u32 {
    1
}

/// The queue. A request takes the first fault that fits, beside at most one delay.
#[derive(Debug, Default)]
pub struct Faults {
    queue: Mutex<Vec<Fault>>,
}

impl Faults {
    pub fn add(&self, fault: Fault) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push(fault);
    }

    pub fn clear(&self) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    pub fn pending(&self) -> Vec<Fault> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Uses up one delay for this operation.
    pub fn take_delay(&self, operation: &str) -> Option<Fault> {
        self.take(|fault| fault.kind == FaultKind::DelayMs && fault.meets(operation))
    }

    /// Uses up one fault other than a delay. `gpu` is the GPU type that the request wants, if it wants one.
    pub fn take_for(&self, operation: &str, gpu: Option<&str>) -> Option<Fault> {
        self.take(|fault| {
            fault.meets(operation)
                && match fault.kind {
                    FaultKind::DelayMs => false,
                    FaultKind::NoCapacity => gpu.is_some() && (fault.gpu.is_none() || fault.gpu.as_deref() == gpu),
                    _ => true,
                }
        })
    }

    fn take(&self, fits: impl Fn(&Fault) -> bool) -> Option<Fault> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let index = queue.iter().position(fits)?;
        let mut taken = queue[index].clone();
        taken.times = 1;
        if queue[index].times <= 1 {
            queue.remove(index);
        } else {
            queue[index].times -= 1;
        }
        Some(taken)
    }
}

impl Fault {
    fn meets(&self, operation: &str) -> bool {
        let allowed = self.kind.only_for().is_none_or(|operations| operations.contains(&operation));
        allowed && (self.operation == "*" || self.operation == operation)
    }
}
