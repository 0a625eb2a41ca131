//! One pod's life: journaled, POSTed once, looked for when the answer was unclear, followed, ended in time.

mod acting;
mod caps;
mod ending;
mod placing;

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
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
    /// Since when it is being ended, whether the disk took that or not.
    ending_begun: Option<Instant>,
    /// A pod that exists and that the disk didn't take: the only trace of it, so it is followed and ended from here.
    unrecorded: Option<(Pod, Timestamp)>,
    /// The account whose key last showed us the pod.
    seen_by: Option<String>,
    /// A DELETE of ours was taken.
    deleted_by_us: bool,
    /// The provider was asked once more for a time that was far from ours.
    asked_for_time: bool,
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
        ending_begun: None,
        unrecorded: None,
        seen_by: None,
        deleted_by_us: false,
        asked_for_time: false,
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
            self.begin_ending(&record, cause).await;
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

    async fn begin_ending(&mut self, record: &PodRecord, cause: &'static str) {
        if record.known.ending_since.is_none() {
            self.know(|record| record.end_because(cause.to_owned())).await;
        }
        if self.ending_begun.is_none() {
            self.ending_begun = Some(Instant::now());
            let cause = record.known.ending_cause.clone().unwrap_or_else(|| cause.to_owned());
            self.note("ending", json!({ "cause": cause }));
            steps::reached("keeper: ending decided");
            // An ending doesn't wait for the next poll.
            self.next_call = Instant::now();
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

    /// By the clock that nobody can set, too: the pod was asked for before this task or its POST began.
    fn may_lag(&self, record: &PodRecord) -> bool {
        let lag = self.keeper.timing.provider_lag;
        let over = SignedDuration::try_from(lag).is_ok_and(|lag| self.lifetime.is_over(lag));
        record.may_lag(lag) && !over
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
        if let Some(date) = answer.date {
            self.keeper.clock.heard(date);
        }
        self.calm_down()
    }

    /// The provider's time, after an answer whose date was heard.
    fn calm_down(&mut self) -> Timestamp {
        self.backoff = self.keeper.timing.backoff_first;
        self.keeper.clock.now()
    }

    /// Looks at the pod in the list that all tasks share; drops the question when the pod is to end, for an ending waits
    /// for nothing.
    async fn follow(&mut self, provider: &dyn GpuProvider, record: PodRecord) {
        let Some(id) = record.known.pod_id.clone() else { return };
        let listed = tokio::select! {
            listed = self.list(provider) => listed,
            () = self.until_ending() => return,
        };
        let listed = match listed {
            Ok(listed) => listed,
            Err(error) => return self.trouble(&error).await,
        };
        let now = self.calm_down();
        match listed.value.iter().find(|pod| pod.id == id && pod.status != PodStatus::Terminated) {
            Some(pod) => self.learn(pod.clone(), now).await,
            None => self.look_at_its_own_page(provider, &id, &record).await,
        }
    }

    async fn list(&self, provider: &dyn GpuProvider) -> Result<Arc<Stamped<Vec<Pod>>>, ProviderError> {
        self.keeper.snapshot.get(provider, &self.keeper.clock, self.keeper.timing.pod_poll_waiting / 2).await
    }

    /// The list lacks it, which may be lag; that it is gone is proven by both.
    async fn look_at_its_own_page(&mut self, provider: &dyn GpuProvider, id: &str, record: &PodRecord) {
        let page = tokio::select! {
            page = provider.pod(id) => page,
            () = self.until_ending() => return,
        };
        match page {
            Ok(answer) if answer.value.status != PodStatus::Terminated => {
                let now = self.succeeded(&answer);
                self.learn(answer.value, now).await;
            }
            Ok(_) | Err(ProviderError::NotFound { .. }) if self.may_lag(record) => self.back_off(),
            Ok(_) | Err(ProviderError::NotFound { .. }) => {
                self.gone(ending::ENDED_WITHOUT_US).await;
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
                Err(_) => self.remembered().is_some_and(|record| self.reason_to_end(&record).is_some()),
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
        self.call_again_in(match settled {
            // A second witness for the provider's clock, on which deadlines hang.
            _ if self.keeper.clock.is_in_doubt() => timing.backoff_first,
            true => timing.pod_poll_settled,
            false => timing.pod_poll_waiting,
        });
        let reserved = self.reserved_per_hour();
        let is_told = self.keeper.clock.told().is_some();
        self.know(move |record| {
            record.learn_and_judge(&pod, now);
            if is_told {
                record.set_deadline(now);
            }
            record.known.problem = None;
        })
        .await;
        self.keep_within_caps(reserved).await;
    }

    fn reserved_per_hour(&self) -> f64 {
        self.last.as_ref().map_or(0.0, PodRecord::reserved_per_hour)
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
        match self.keeper.fleet.restore(&self.name, record).await {
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
