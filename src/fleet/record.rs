//! One pod as a record: asked for once, by one intent.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::civil::Date;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::money::{self, add_cost};
use super::request::PodRequest;
use super::{later, name_of};
use crate::provider::{Pod, PodAction, PodStatus, SshAddress};

/// USD an hour; less is rounding.
const LEAST_TOO_MUCH: f64 = 0.005;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PodRecord {
    /// Unique for this request; part of the pod's name in the cloud.
    pub intent: String,
    pub wanted: PodWanted,
    pub known: PodKnown,
}

/// Written by tools only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PodWanted {
    pub state: WantedState,
    pub request: PodRequest,
    /// What to try, in this order; the next one only after a definite refusal.
    pub candidates: Vec<Candidate>,
    pub lifetime_seconds: i64,
    pub requested_at: Timestamp,
    /// USD an hour above which the pod is ended at once: the cap, or less when the caller said so. `None` for pods that
    /// were there already.
    #[serde(default)]
    pub max_price_per_hour: Option<f64>,
    /// End the pod after so long without use.
    #[serde(default)]
    pub idle_minutes: Option<u32>,
    /// A later deadline than the one it was made with.
    #[serde(default)]
    pub extended_until: Option<Timestamp>,
    /// Start, stop or restart, once.
    #[serde(default)]
    pub action: Option<ActionWish>,
    /// The intent without a known outcome that this one was allowed to take the place of.
    #[serde(default)]
    pub supersedes: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WantedState {
    Present,
    Gone,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    pub gpu: String,
    pub price_per_hour: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ActionWish {
    /// Tells this wish from an equal one before it.
    pub id: String,
    pub action: PodAction,
    pub requested_at: Timestamp,
}

/// Written by the keeper only.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PodKnown {
    pub phase: Phase,
    pub at: Option<Timestamp>,
    pub pod_id: Option<String>,
    pub attempts: Vec<Attempt>,
    /// When the POST whose answer is awaited was sent.
    pub posted_at: Option<Timestamp>,
    /// The list has lacked the pod of an unclear create from here to there, by the provider's clock.
    pub lacked: Option<(Timestamp, Timestamp)>,
    pub status: Option<PodStatus>,
    pub gpu: Option<String>,
    pub data_center: Option<String>,
    /// As the provider tells it now; it may be 0 for a stopped pod.
    pub cost_per_hour: f64,
    /// The last price above 0.
    pub price_per_hour: f64,
    pub created_at: Option<Timestamp>,
    pub started_at: Option<Timestamp>,
    /// How often the pod was started; host keys are pinned for each start.
    pub starts: u32,
    pub ssh: Option<SshAddress>,
    /// When it came to its present step on the way up, by the provider's clock; cleared by each start.
    pub reached: Reached,
    /// What was found in the pod over SSH, for one start.
    pub inside: Inside,
    /// By the provider's clock; before its first answer the one in `wanted` counts.
    pub expires_at: Option<Timestamp>,
    /// What it has cost, counted at the provider's clock while it was billed.
    pub cost_usd: f64,
    /// The same by days (UTC).
    pub cost_by_day: BTreeMap<Date, f64>,
    pub cost_counted_at: Option<Timestamp>,
    /// Since when nobody used it, where `idle_minutes` is asked for.
    pub idle_since: Option<Timestamp>,
    /// Why it can't be told whether somebody uses it, so that the deadline alone decides.
    pub idle_unknown: Option<String>,
    pub action: Option<ActionKnown>,
    pub ending_since: Option<Timestamp>,
    pub ending_cause: Option<String>,
    pub gone_at: Option<Timestamp>,
    /// What went wrong last, in a sentence.
    pub problem: Option<String>,
    /// The create was refused because of the key or the balance, which no other GPU would mend.
    pub refused_by_account: bool,
}

/// The steps of one start.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Reached {
    pub allocated: Option<Timestamp>,
    pub container: Option<Timestamp>,
    pub sshd: Option<Timestamp>,
}

/// What one start of the pod was found to be like inside.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Inside {
    /// The start that the rest speaks of.
    pub start: Option<u32>,
    /// Until when the pod's own switch lets it live, by the provider's clock.
    pub switch_until: Option<Timestamp>,
    /// Why the switch is not armed.
    pub switch_problem: Option<String>,
    pub mount: Option<MountKnown>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountKnown {
    Mounted { free_gb: f64, total_gb: f64 },
    NotMounted,
    NotVerified { why: String },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ActionKnown {
    pub id: String,
    pub action: PodAction,
    pub state: ActionState,
    /// Why it was refused, or what is unclear.
    pub problem: Option<String>,
    /// GPU and address before it, for what it changed is told.
    pub gpu_before: Option<String>,
    pub ssh_before: Option<SshAddress>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActionState {
    /// Sent, or about to be; never sent again.
    Sent,
    Done,
    Refused,
    /// There was no answer; the pod's status tells what came of it.
    Unclear,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// On disk, nothing sent yet.
    #[default]
    Journaled,
    /// The POST is under way, or was when the keeper died.
    Posting,
    /// The POST had no clear answer; the pod is looked for by its name.
    Unknown,
    /// A pod exists.
    Placed,
    /// Every candidate was definitely refused: there is no pod.
    Refused,
    /// Proven gone.
    Gone,
}

/// One candidate that was tried.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Attempt {
    pub gpu: String,
    pub outcome: String,
}

impl PodRecord {
    pub fn new(intent: String, request: PodRequest, candidates: Vec<Candidate>, lifetime: SignedDuration) -> Self {
        Self {
            intent,
            wanted: PodWanted {
                state: WantedState::Present,
                request,
                candidates,
                lifetime_seconds: lifetime.as_secs(),
                requested_at: Timestamp::now(),
                max_price_per_hour: None,
                idle_minutes: None,
                extended_until: None,
                action: None,
                supersedes: None,
            },
            known: PodKnown::default(),
        }
    }

    /// A record for a pod that exists already.
    pub fn of_existing(pod: &Pod, intent: String, lifetime: SignedDuration) -> Self {
        let mut record = Self::new(intent, PodRequest::of_existing(pod), Vec::new(), lifetime);
        record.known.phase = Phase::Placed;
        record.known.pod_id = Some(pod.id.clone());
        record
    }

    /// The pod's name in the cloud, which nobody else uses. `key` is the record's key in the file.
    pub fn cloud_name(&self, key: &str) -> String {
        format!("autopod-{}-{}", name_of(key), self.intent)
    }

    /// Whether this is the record of that pod.
    pub fn is_of(&self, key: &str, pod: &Pod) -> bool {
        self.known.pod_id.as_ref() == Some(&pod.id) || self.cloud_name(key) == pod.name
    }

    /// When the keeper ends it, whatever happens.
    pub fn expires_at(&self) -> Timestamp {
        self.known.expires_at.unwrap_or_else(|| later(self.wanted.requested_at, self.lifetime()))
    }

    /// The same by our own clock, from which the provider's may be hours away.
    pub fn expires_by_our_clock(&self) -> Timestamp {
        later(self.known.posted_at.unwrap_or(self.wanted.requested_at), self.lifetime())
    }

    pub fn lifetime(&self) -> SignedDuration {
        SignedDuration::from_secs(self.wanted.lifetime_seconds)
    }

    /// USD an hour that are set aside for it: by its own price once that is known, before by the dearest GPU that may
    /// still be tried. A stopped pod's GPU isn't charged; starting it is checked against the caps again.
    pub fn reserved_per_hour(&self) -> f64 {
        match (self.known.phase, self.known.status) {
            (Phase::Refused | Phase::Gone, _) => 0.0,
            (Phase::Placed, Some(PodStatus::Exited)) if !self.is_starting() => 0.0,
            (Phase::Placed, _) if self.price() > 0.0 => self.price(),
            // A start of a pod whose price was never told.
            (Phase::Placed, Some(PodStatus::Exited)) => self.wanted.max_price_per_hour.unwrap_or(0.0),
            _ => {
                let untried = self.wanted.candidates.iter().skip(self.known.attempts.len());
                untried.map(|candidate| candidate.price_per_hour).fold(0.0, f64::max)
            }
        }
    }

    /// USD an hour while it runs.
    pub fn price(&self) -> f64 {
        if self.known.cost_per_hour > 0.0 { self.known.cost_per_hour } else { self.known.price_per_hour }
    }

    /// The most it can still cost until its deadline, beside what it has cost.
    pub fn reserved_usd(&self, now: Timestamp) -> f64 {
        self.reserved_per_hour() * money::hours(now, self.reserved_until())
    }

    /// Until the later one of two deadlines while it is being moved.
    pub fn reserved_until(&self) -> Timestamp {
        self.wanted.extended_until.map_or(self.expires_at(), |extended| extended.max(self.expires_at()))
    }

    /// A start that is wanted and not refused reserves like a pod that runs.
    fn is_starting(&self) -> bool {
        let Some(wish) = &self.wanted.action else { return false };
        let refused = self
            .known
            .action
            .as_ref()
            .is_some_and(|known| known.id == wish.id && matches!(known.state, ActionState::Refused));
        wish.action != PodAction::Stop && !refused
    }

    /// The action that is wanted and not settled yet.
    pub fn pending_action(&self) -> Option<&ActionWish> {
        let settled = |wish: &&ActionWish| {
            self.known.action.as_ref().is_none_or(|known| known.id != wish.id || known.state == ActionState::Sent)
        };
        self.wanted.action.as_ref().filter(settled)
    }

    /// Whether the provider may not show a pod yet that it has made, so that its absence proves nothing.
    pub fn may_lag(&self, lag: Duration) -> bool {
        let lag = SignedDuration::try_from(lag).unwrap_or(SignedDuration::ZERO);
        self.known.posted_at.is_some_and(|at| Timestamp::now().duration_since(at) < lag)
    }

    /// Neither proven gone nor refused: it may cost money.
    pub fn is_open(&self) -> bool {
        !matches!(self.known.phase, Phase::Gone | Phase::Refused)
    }

    pub fn is_ending(&self) -> bool {
        self.wanted.state == WantedState::Gone || self.known.ending_since.is_some()
    }

    /// The create had no clear answer and no pod was found since.
    pub fn is_unknown(&self) -> bool {
        matches!(self.known.phase, Phase::Posting | Phase::Unknown)
    }

    /// For how long the list has lacked the pod of an unclear create.
    pub fn lacked_for(&self) -> SignedDuration {
        self.known.lacked.map_or(SignedDuration::ZERO, |(from, to)| to.duration_since(from))
    }

    /// Decided once; endings aren't taken back.
    pub fn end_because(&mut self, cause: String) {
        if self.known.ending_since.is_none() {
            self.known.ending_since = Some(Timestamp::now());
            self.known.ending_cause = Some(cause);
        }
    }

    /// Like [`Self::learn`], and a pod that is not what was asked for is to end: prices in a catalog may be old, and a
    /// data center is only a preference to the provider.
    pub fn learn_and_judge(&mut self, pod: &Pod, now: Timestamp) {
        // A start may change the price, and its answer may have been lost.
        let is_new_price = self.known.price_per_hour <= 0.0 || self.known.status == Some(PodStatus::Exited);
        let is_charged = pod.status != PodStatus::Exited;
        self.learn(pod, now);
        if let Some(most) = self.wanted.max_price_per_hour
            && (is_new_price && is_charged)
            && pod.cost_per_hour > most + LEAST_TOO_MUCH
        {
            self.end_because(format!(
                "it costs ${:.2}/h, more than the ${most:.2}/h that were allowed",
                pod.cost_per_hour
            ));
        }
        let wanted = &self.wanted.request.data_centers;
        if let Some(landed) = &pod.data_center
            && !wanted.is_empty()
            && !wanted.contains(landed)
        {
            let wanted = wanted.join(", ");
            self.end_because(format!("the provider placed it in {landed}, and {wanted} was asked for"));
        }
    }

    /// Takes over what the provider says of the pod, and counts the cost up to the provider's `now`.
    pub fn learn(&mut self, pod: &Pod, now: Timestamp) {
        self.count_cost(pod, now);
        let known = &mut self.known;
        // A restart in place moves no `startedAt`, but shows in a status that wasn't running or in a new address.
        let was_started = pod.started_at.is_some() && pod.started_at != known.started_at;
        let came_up = pod.status == PodStatus::Running && known.status.is_some_and(|was| was != PodStatus::Running);
        let moved = known.ssh.is_some() && pod.ssh.is_some() && pod.ssh != known.ssh;
        if was_started || came_up || moved {
            known.starts += 1;
            known.started_at = pod.started_at.or(known.started_at);
        }
        known.phase = Phase::Placed;
        known.pod_id = Some(pod.id.clone());
        known.status = Some(pod.status);
        known.cost_per_hour = pod.cost_per_hour;
        if pod.cost_per_hour > 0.0 {
            known.price_per_hour = pod.cost_per_hour;
        }
        known.created_at = pod.created_at.or(known.created_at);
        known.data_center = pod.data_center.clone().or(known.data_center.take());
        known.gpu = pod.gpu.clone().or(known.gpu.take());
        known.ssh = pod.ssh.clone();
        known.reached.follow(pod.status, now);
    }

    /// Sets the deadline of a pod that was made before the provider told its time, which is `now`. Until then our own
    /// clock counts.
    pub fn set_deadline(&mut self, now: Timestamp) {
        if self.known.expires_at.is_none() {
            // A pod that says it was made in the future lives no longer for it.
            let from = self.known.created_at.unwrap_or(now).min(now);
            self.known.expires_at = Some(later(from, self.lifetime()));
        }
    }

    fn count_cost(&mut self, pod: &Pod, now: Timestamp) {
        let known = &mut self.known;
        let from = known.cost_counted_at.or(pod.created_at).unwrap_or(now);
        // A stopped pod may keep a price that isn't charged.
        let was_billed = !matches!(known.status, Some(PodStatus::Exited | PodStatus::Terminated));
        if was_billed {
            let price = if known.cost_per_hour > 0.0 { known.cost_per_hour } else { pod.cost_per_hour };
            add_cost(known, price, from, now);
        }
        known.cost_counted_at = Some(known.cost_counted_at.map_or(now, |before| before.max(now)));
    }

    /// Closes the books at the provider's `now`.
    pub fn close(&mut self, now: Timestamp) {
        let known = &mut self.known;
        let was_billed = !matches!(known.status, Some(PodStatus::Exited | PodStatus::Terminated));
        if let Some(from) = known.cost_counted_at.filter(|_| was_billed) {
            add_cost(known, known.cost_per_hour, from, now);
        }
        known.phase = Phase::Gone;
        known.status = known.pod_id.as_ref().map(|_| PodStatus::Terminated);
        known.gone_at = Some(Timestamp::now());
        known.cost_counted_at = Some(now);
        known.ssh = None;
        known.problem = None;
    }
}

impl Reached {
    fn follow(&mut self, status: PodStatus, now: Timestamp) {
        match status {
            PodStatus::Provisioning | PodStatus::Exited | PodStatus::Error | PodStatus::Terminated => {
                *self = Self::default();
            }
            PodStatus::Starting | PodStatus::Unknown => {
                self.allocated.get_or_insert(now);
                (self.container, self.sshd) = (None, None);
            }
            PodStatus::Running => {
                self.allocated.get_or_insert(now);
                self.container.get_or_insert(now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::Cloud;

    fn told(status: PodStatus, cost_per_hour: f64) -> Pod {
        Pod {
            id: "p1".to_owned(),
            name: "autopod-comfy-intent".to_owned(),
            status,
            actions: Vec::new(),
            image: "image".to_owned(),
            gpu: None,
            gpu_count: 1,
            cloud: Some(Cloud::Secure),
            data_center: None,
            disk_gb: 40,
            volume: None,
            ports: Vec::new(),
            env: BTreeMap::new(),
            cost_per_hour,
            created_at: None,
            started_at: None,
            ssh: None,
            has_ssh_proxy: false,
            uptime_seconds: None,
            registry: None,
            cuda: None,
            locked: false,
        }
    }

    #[test]
    fn the_price_after_a_start_is_judged_though_its_answer_was_lost() {
        let request = PodRequest::for_tests();
        let mut record = PodRecord::new("intent".to_owned(), request, Vec::new(), SignedDuration::from_hours(1));
        record.wanted.max_price_per_hour = Some(0.5);
        let now = Timestamp::now();
        for (status, price) in [(PodStatus::Running, 0.4), (PodStatus::Exited, 0.4), (PodStatus::Exited, 0.9)] {
            record.learn_and_judge(&told(status, price), now);
            assert!(!record.is_ending(), "{status:?} at {price}");
        }
        let mut cheap = record.clone();
        cheap.learn_and_judge(&told(PodStatus::Running, 0.5), now);
        assert!(!cheap.is_ending());
        record.learn_and_judge(&told(PodStatus::Provisioning, 0.9), now);
        let cause = record.known.ending_cause.expect("an ending");
        assert_eq!(cause, "it costs $0.90/h, more than the $0.50/h that were allowed");
    }
}
