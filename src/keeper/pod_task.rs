//! One pod's life: journaled, POSTed once, looked for when the answer was unclear, followed, ended in time.

mod clocks;
mod ending;
mod placing;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use self::clocks::Clocks;
use super::Keeper;
use crate::errors::chain;
use crate::fleet::{Phase, PodRecord, WantedState};
use crate::provider::{GpuProvider, Pod, PodStatus, ProviderError, Stamped};

/// The task of one intent.
struct PodTask {
    keeper: Arc<Keeper>,
    name: String,
    intent: String,
    /// When the provider may be asked again.
    next_call: Instant,
    backoff: Duration,
    clocks: Clocks,
    /// As it was last read or written: while the file can't be read or has lost it, nothing else knows of the pod.
    last: Option<PodRecord>,
    /// A pod that exists and that the disk didn't take: the only trace of it, so it is followed and ended from here.
    unrecorded: Option<(Pod, Timestamp)>,
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
        clocks: Clocks::new(),
        last: None,
        unrecorded: None,
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
                // An ending doesn't wait for the next poll.
                self.next_call = Instant::now();
            }
            if self.may_call() {
                self.end(&*provider, record).await;
            }
        } else if self.may_call() {
            match record.known.phase {
                Phase::Journaled => self.place(&*provider, record).await,
                Phase::Posting | Phase::Unknown => {
                    self.search(&*provider, &record).await;
                }
                Phase::Placed => self.follow(&*provider, record).await,
                Phase::Refused | Phase::Gone => {}
            }
        }
    }

    fn reason_to_end(&self, record: &PodRecord) -> Option<&'static str> {
        if record.wanted.state == WantedState::Gone {
            Some("terminated")
        } else if self.clocks.is_due(record.expires_at(), record.lifetime()) {
            Some("its deadline passed")
        } else if record.known.ending_since.is_some() {
            // Decided before; endings aren't taken back.
            Some("ending")
        } else {
            None
        }
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
            self.clocks.heard(date);
        }
        self.clocks.provider_now()
    }

    /// Asks after the pod, but drops the question when the pod is to end: an ending waits for nothing.
    async fn follow(&mut self, provider: &dyn GpuProvider, record: PodRecord) {
        let Some(id) = record.known.pod_id.clone() else { return };
        let answer = tokio::select! {
            answer = provider.pod(&id) => answer,
            () = self.until_ending() => return,
        };
        match answer {
            Ok(answer) if answer.value.status != PodStatus::Terminated => {
                let now = self.succeeded(&answer);
                let settled = answer.value.status == PodStatus::Exited
                    || answer.value.status == PodStatus::Running && answer.value.ssh.is_some();
                let timing = &self.keeper.timing;
                self.call_again_in(if settled { timing.pod_poll_settled } else { timing.pod_poll_waiting });
                self.learn(answer.value, now).await;
            }
            Ok(_) | Err(ProviderError::NotFound { .. }) => {
                // It may be lag right after a create; only the list proves that it is gone.
                match provider.pods().await {
                    Ok(listed) => {
                        self.succeeded(&listed);
                        let there = listed.value.iter().any(|pod| pod.id == id && pod.status != PodStatus::Terminated);
                        if there || self.may_lag(&record) {
                            self.back_off();
                        } else {
                            self.gone("it ended without us").await;
                            // Nobody has ended it, so a second look at the list is due.
                            self.keeper.pods_may_be_lost.send_replace(true);
                        }
                    }
                    Err(error) => self.trouble(&error).await,
                }
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

    async fn learn(&mut self, pod: Pod, now: Timestamp) {
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

const NO_KEY: &str = "the keeper has no API key, so it can neither create nor end pods";
