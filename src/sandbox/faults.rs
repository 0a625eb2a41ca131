//! Faults that a test queues, each used up by the requests that meet it.

use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::catalog;
use super::pod::Stage;

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
    /// The GPU type of `no_capacity`, every one if left out; the new one of `changed_gpu`, any other if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<String>,
    /// Where `elsewhere` puts the pod; any other data center if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_center: Option<String>,
    /// The stage that `error_state` doesn't let the pod get beyond; `allocating` if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage: Option<Stage>,
    /// USD an hour that `price` charges and tells; twice the catalog's price if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<f64>,
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
    /// The pod lands in another data center than it may.
    Elsewhere,
    /// The pod goes to ERROR on its way up, and is charged all the same.
    ErrorState,
    /// The pod comes up with another GPU type.
    ChangedGpu,
    /// The pod comes up at another address.
    ChangedAddress,
    /// The pod costs something else than the catalog says.
    Price,
}

impl FaultKind {
    /// The one operation this kind means anything for, if not all.
    pub fn only_for(self) -> Option<&'static [&'static str]> {
        match self {
            Self::NoCapacity | Self::ErrorState | Self::Price => Some(&["createPod", "podAction"]),
            Self::Elsewhere => Some(&["createPod"]),
            Self::ChangedGpu | Self::ChangedAddress => Some(&["podAction"]),
            Self::LaggingList => Some(&["listPods"]),
            _ => None,
        }
    }

    /// Whether nothing is done at all.
    pub fn is_before(self) -> bool {
        matches!(self, Self::StatusBefore | Self::HangBefore | Self::ResetBefore)
    }

    /// Whether it befalls the pod, and not the answer.
    fn befalls_the_pod(self) -> bool {
        matches!(self, Self::Elsewhere | Self::ErrorState | Self::ChangedGpu | Self::ChangedAddress | Self::Price)
    }
}

fn once() -> u32 {
    1
}

/// The queue. A request takes at most one delay, one fault of its answer and one that befalls its pod, the first that
/// fits of each.
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

    /// Uses up the faults other than a delay. `gpu` is the GPU type that the request wants, if it wants one.
    pub fn take_for(&self, operation: &str, gpu: Option<&str>) -> Vec<Fault> {
        let of_the_answer = self.take(|fault| {
            fault.meets(operation)
                && match fault.kind {
                    FaultKind::DelayMs => false,
                    FaultKind::NoCapacity => gpu.is_some() && (fault.gpu.is_none() || fault.gpu.as_deref() == gpu),
                    kind => !kind.befalls_the_pod(),
                }
        });
        let comes_to_pass = of_the_answer.as_ref().is_none_or(|fault| !fault.kind.is_before());
        let of_the_pod = (comes_to_pass && gpu.is_some())
            .then(|| self.take(|fault| fault.meets(operation) && fault.kind.befalls_the_pod()))
            .flatten();
        of_the_answer.into_iter().chain(of_the_pod).collect()
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
    /// Whether some request could meet it.
    pub fn is_possible(&self) -> bool {
        let meets_one = self
            .kind
            .only_for()
            .is_none_or(|operations| self.operation == "*" || operations.contains(&self.operation.as_str()));
        let is_on_the_way_up =
            |stage: Stage| matches!(stage, Stage::Allocating | Stage::Starting | Stage::ContainerUp | Stage::SshUp);
        meets_one
            && self.times > 0
            && self.status.is_none_or(|status| (200..=599).contains(&status))
            && self.gpu.as_deref().is_none_or(|gpu| catalog::find_gpu(gpu).is_some())
            && self.data_center.as_deref().is_none_or(|center| catalog::find_data_center(center).is_some())
            && self.stage.is_none_or(is_on_the_way_up)
            && self.cost.is_none_or(|cost| cost.is_finite() && cost >= 0.0)
    }

    fn meets(&self, operation: &str) -> bool {
        let allowed = self.kind.only_for().is_none_or(|operations| operations.contains(&operation));
        allowed && (self.operation == "*" || self.operation == operation)
    }
}
