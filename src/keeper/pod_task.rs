//! One pod's life: journaled, POSTed once, looked for when the answer was unclear, followed, ended in time.

mod acting;
mod ending;
mod placing;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::Keeper;
use super::clocks::Lifetime;
use crate::errors::chain;
use crate::fleet::{Actor, HomeIdentity, Phase, PodRecord, WantedState};
use crate::provider::{GpuProvider, Pod, PodStatus, ProviderError, Stamped};
use crate::steps;

/// The task of one intent.
struct PodTask {
    keeper: Arc<Keeper>,
    name: String,
    intent: String,
    /// When the provider may be asked again.
    next_call: Instant,
    backoff: Duration,
    lifetime: Lifetime,
    /// As it was last read or written: while the file can't be read or has lost it, nothing else knows of the pod.
    last: Option<PodRecord>,
    /// A pod that exists and that the disk didn't take: the only trace of it, so it is followed and ended from here.
    unrecorded: Option<(Pod, Timestamp)>,
    /// The account whose key last showed us the pod.
    seen_by: Option<String>,
}

/// Goes on until the pod is proven gone or refused, or the keeper stops.
pub(super) async fn look_after(keeper: Arc<Keeper>, name: String, intent: String) {
    let mut turn = keeper.turn.subscribe();
    let backoff = keeper.timing.backoff_first;
    let mut task = PodTask {
        keeper: keeper.clone(),
        name,
        intent,
        next_call: Instant::now(),
        backoff,
        lifetime: Lifetime::start(),
        last: None,
        unrecorded: None,
        seen_by: None,
    };
    // A POST that was under way when the last keeper died has an outcome that nobody read.
    task.know(|record| {
        if record.known.phase == Phase::Posting {
            record.known.phase = Phase::Unknown;
            record.known.problem = Some("the keeper died while the create was under way".to_owned());
        }
    })
    .await;
    while !keeper.stop.is_cancelled() {
        match task.record() {
            Ok(Some(record)) if record.is_open() => {
                task.last = Some(record.clone());
                task.step(record).await;
            }
            Ok(Some(_)) => return,
            // Nobody takes the record of an open pod away but a broken file: it is made anew, from the provider if we
            // know no pod.
            Ok(None) => {
                if !task.restore().await {
                    keeper.pods_may_be_lost.send_replace(true);
                    return;
                }
            }
            Err(error) => {
                tracing::error!(error = %chain(&error), "the records can't be read");
                task.end_from_memory().await;
            }
        }
        keeper.wait(&mut turn, keeper.timing.keeper_turn).await;
    }
}

impl PodTask {
    async fn step(&mut self, mut record: PodRecord) {
        if let Some((pod, at)) = self.unrecorded.take() {
            record.learn_and_judge(&pod, at);
            self.found(pod, at).await;
        }
        let Some(provider) = self.keeper.provider() else {
            if record.known.problem.as_deref() != Some(NO_KEY) {
                self.know(|record| record.known.problem = Some(NO_KEY.to_owned())).await;
            }
            return;
        };
        if let Some(cause) = self.reason_to_end(&record) {
            if record.known.ending_since.is_none() {
                self.know(|record| {
                    record.known.ending_since = Some(Timestamp::now());
                    record.known.ending_cause = Some(cause.to_owned());
                })
                .await;
                self.note("ending", json!({ "cause": cause }));
                steps::reached("keeper: ending decided");
                // An ending doesn't wait for the next poll.
                self.next_call = Instant::now();
            }
            if self.may_call() {
                self.end(&*provider, record).await;
            }
        } else if self.may_call() {
            match record.known.phase {
                Phase::Journaled if self.others_are_due() => {}
                Phase::Journaled => self.place(&*provider, record).await,
                Phase::Posting | Phase::Unknown => {
                    self.search(&*provider, &record).await;
                }
                Phase::Placed => match record.pending_action().cloned() {
                    Some(_) if self.others_are_due() => {}
                    Some(wish) => self.act(&*provider, record, wish).await,
                    None => self.follow(&*provider, record).await,
                },
                Phase::Refused | Phase::Gone => {}
            }
        }
    }

    fn reason_to_end(&self, record: &PodRecord) -> Option<&'static str> {
        if record.wanted.state == WantedState::Gone {
            Some("terminated")
        } else if self.is_due(record) {
            Some("its deadline passed")
        } else if record.known.ending_since.is_some() {
            // Decided before; endings aren't taken back.
            Some("ending")
        } else {
            None
        }
    }

    /// Whichever clock comes first, each by its own count: a deadline is never kept too late, and one clock that is hours
    /// away from the other ends no fresh pod.
    fn is_due(&self, record: &PodRecord) -> bool {
        self.keeper.is_due(record) || self.lifetime.is_over(record.lifetime())
    }

    /// Whether another pod is to end that nobody has begun to end: after a sleep of the machine, say. Nothing new is asked
    /// of the provider before.
    fn others_are_due(&self) -> bool {
        let due = |record: &PodRecord| {
            record.intent != self.intent
                && record.is_open()
                && record.known.ending_since.is_none()
                && (record.wanted.state == WantedState::Gone || self.keeper.is_due(record))
        };
        self.keeper.fleet.read().is_ok_and(|records| records.values().any(due))
    }

    fn may_lag(&self, record: &PodRecord) -> bool {
        record.may_lag(self.keeper.timing.provider_lag)
    }

    fn may_call(&self) -> bool {
        Instant::now() >= self.next_call
    }

    fn call_again_in(&mut self, pause: Duration) {
        self.next_call = Instant::now() + pause;
    }

    /// Waits longer each time, with jitter, until something succeeds.
    fn back_off(&mut self) {
        let jitter = 0.75 + f64::from(uuid::Uuid::new_v4().as_fields().1) / f64::from(u16::MAX) / 2.0;
        self.call_again_in(self.backoff.mul_f64(jitter));
        self.backoff = (self.backoff * 2).min(self.keeper.timing.backoff_most);
    }

    fn succeeded<T>(&mut self, answer: &Stamped<T>) -> Timestamp {
        self.backoff = self.keeper.timing.backoff_first;
        if let Some(date) = answer.date {
            self.keeper.clock.heard(date);
        }
        self.keeper.clock.now()
    }

    /// Looks at the pod in the list that all tasks share; drops the question when the pod is to end, for an ending waits
    /// for nothing.
    async fn follow(&mut self, provider: &dyn GpuProvider, record: PodRecord) {
        let Some(id) = record.known.pod_id.clone() else { return };
        let listed = tokio::select! {
            listed = self.keeper.snapshot.get(provider, self.keeper.timing.pod_poll_waiting / 2) => listed,
            () = self.until_ending() => return,
        };
        let listed = match listed {
            Ok(listed) => listed,
            Err(error) => return self.trouble(&error).await,
        };
        let now = self.succeeded(&listed);
        match listed.value.iter().find(|pod| pod.id == id && pod.status != PodStatus::Terminated) {
            Some(pod) => self.learn(pod.clone(), now).await,
            None => self.look_at_its_own_page(provider, &id, &record).await,
        }
    }

    /// The list lacks it, which may be lag; that it is gone is proven by both.
    async fn look_at_its_own_page(&mut self, provider: &dyn GpuProvider, id: &str, record: &PodRecord) {
        match provider.pod(id).await {
            Ok(answer) if answer.value.status != PodStatus::Terminated => {
                let now = self.succeeded(&answer);
                self.learn(answer.value, now).await;
            }
            Ok(_) | Err(ProviderError::NotFound { .. }) if self.may_lag(record) => self.back_off(),
            Ok(_) | Err(ProviderError::NotFound { .. }) => {
                self.gone("it ended without us").await;
                // Nobody has ended it, so a second look at the list is due.
                self.keeper.pods_may_be_lost.send_replace(true);
            }
            Err(error) => self.trouble(&error).await,
        }
    }

    async fn until_ending(&self) {
        loop {
            tokio::time::sleep(self.keeper.timing.record_poll).await;
            let ending = match self.record() {
                Ok(Some(record)) => self.reason_to_end(&record).is_some(),
                Ok(None) => true,
                Err(_) => false,
            };
            if ending || self.keeper.stop.is_cancelled() {
                return;
            }
        }
    }

    /// Whether it proves anything that our key doesn't show the pod: the key of another account shows none of ours.
    fn may_prove_absence(&self) -> bool {
        let ours = self.keeper.account.borrow().clone();
        let bound = HomeIdentity::read(&self.keeper.home).ok().flatten().and_then(|identity| identity.account);
        bound.is_none() || bound == ours || self.seen_by.is_some() && self.seen_by == ours
    }

    async fn learn(&mut self, pod: Pod, now: Timestamp) {
        self.seen_by = self.keeper.account.borrow().clone();
        let settled = pod.status == PodStatus::Exited || pod.status == PodStatus::Running && pod.ssh.is_some();
        let timing = &self.keeper.timing;
        self.call_again_in(if settled { timing.pod_poll_settled } else { timing.pod_poll_waiting });
        self.know(move |record| {
            record.learn_and_judge(&pod, now);
            record.known.problem = None;
        })
        .await;
    }

    async fn trouble(&mut self, error: &ProviderError) {
        self.back_off();
        let problem = chain(error);
        tracing::warn!(pod = self.name, error = problem, "the provider failed");
        self.know(|record| record.known.problem = Some(problem)).await;
    }

    /// What we know of the pod without the file.
    fn remembered(&self) -> Option<PodRecord> {
        let mut record = self.last.clone()?;
        if let Some((pod, at)) = &self.unrecorded {
            record.learn_and_judge(pod, *at);
        }
        Some(record)
    }

    /// Writes the record again that has left the file. False when that can't be, or when nothing was ever sent.
    async fn restore(&mut self) -> bool {
        let Some(record) =
            self.remembered().filter(|record| record.is_open() && record.known.phase != Phase::Journaled)
        else {
            return false;
        };
        match self.keeper.fleet.adopt(&self.name, record).await {
            Ok(restored) => {
                tracing::warn!(pod = self.name, restored, "its record has left the file");
                restored
            }
            Err(error) => {
                tracing::error!(pod = self.name, error = %chain(&error), "its record can't be written again");
                self.end_from_memory().await;
                true
            }
        }
    }

    /// Records that can't be read keep no pod alive. Nothing else is done from memory, for a wish may have changed.
    async fn end_from_memory(&mut self) {
        let Some(record) = self.remembered() else { return };
        let (Some(provider), Some(id)) = (self.keeper.provider(), record.known.pod_id.clone()) else { return };
        if self.reason_to_end(&record).is_some() && self.may_call() {
            self.delete(&*provider, id, &record).await;
        }
    }

    fn record(&self) -> Result<Option<PodRecord>, crate::state::StateError> {
        self.keeper.fleet.of_intent(&self.intent)
    }

    /// Into the audit log, with what names the pod.
    fn note(&self, event: &str, facts: Value) {
        let known = self.last.as_ref().map(|record| &record.known);
        let mut line = json!({
            "pod": self.name, "intent": self.intent, "pod_id": known.and_then(|known| known.pod_id.clone()),
        });
        if let (Some(line), Value::Object(facts)) = (line.as_object_mut(), facts) {
            line.extend(facts);
        }
        self.keeper.audit.note(Actor::Keeper, event, line);
    }

    /// Writes what is known. A disk that is full must not keep a pod alive, so a failure is logged and the task goes
    /// on from what it knows; what has to be on disk before a step is checked by that step.
    async fn know(&mut self, change: impl FnOnce(&mut PodRecord) + Send + 'static) -> bool {
        match self.keeper.fleet.know(&self.intent, change).await {
            Ok(Some(record)) => {
                self.last = Some(record);
                true
            }
            Ok(None) => false,
            Err(error) => {
                tracing::error!(pod = self.name, error = %chain(&error), "what is known can't be written");
                false
            }
        }
    }
}

const OTHER_ACCOUNT: &str =
    "the keeper's API key doesn't show it, which proves nothing, for the home belongs to another key";
const NO_KEY: &str = "the keeper has no API key, so it can neither create nor end pods";
