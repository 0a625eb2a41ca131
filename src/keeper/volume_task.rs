//! One wish for a network volume: journaled, POSTed once, looked for when the answer was unclear. Growing is repeatable:
//! it names the size to come to, and the list tells whether it came to it.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::Keeper;
use crate::errors::chain;
use crate::fleet::{Actor, TURNS_UP_WITHIN, VolumePhase, VolumeRecord, monthly_usd};
use crate::provider::{GpuProvider, ProviderError, Stamped, Volume, VolumeSpec};
use crate::state::StateError;

/// How long a provider that can't be reached, or that has no calls left for us, is tried.
const TRY_FOR: SignedDuration = SignedDuration::from_mins(3);
/// A volume that the list has lacked for so long was never made.
const GIVEN_UP_AFTER: SignedDuration = SignedDuration::from_hours(24);

const NO_KEY: &str = "the keeper has no API key, so it can neither create nor grow volumes";

/// The task of one intent.
struct VolumeTask {
    keeper: Arc<Keeper>,
    intent: String,
    /// When the provider may be asked again.
    next_call: Instant,
    backoff: Duration,
    /// As it was last read or written: a broken file may lose a record whose POST was sent.
    last: Option<VolumeRecord>,
    /// A volume that is there and that the disk didn't take: written with the next step.
    unrecorded: Option<Volume>,
}

/// Goes on until the wish is settled, or the keeper stops.
pub(super) async fn look_after(keeper: Arc<Keeper>, intent: String) {
    let mut turn = keeper.turn.subscribe();
    let backoff = keeper.timing.backoff_first;
    let mut task =
        VolumeTask { keeper: keeper.clone(), intent, next_call: Instant::now(), backoff, last: None, unrecorded: None };
    // A POST that was under way when the last keeper died has an outcome that nobody read.
    task.know(|record| {
        if record.known.phase == VolumePhase::Posting {
            record.known.phase = VolumePhase::Unknown;
            record.known.problem = Some("the keeper died while the request was under way".to_owned());
        }
    })
    .await;
    while !keeper.stop.is_cancelled() {
        match task.record() {
            Ok(Some(record)) if record.is_open() => {
                task.last = Some(record.clone());
                if Instant::now() >= task.next_call {
                    task.step(record).await;
                }
            }
            Ok(Some(_)) => return,
            Ok(None) => {
                if !task.restore().await {
                    return;
                }
            }
            Err(error) => tracing::error!(error = %chain(&error), "the volumes' records can't be read"),
        }
        keeper.wait(&mut turn, keeper.timing.keeper_turn).await;
    }
}

impl VolumeTask {
    async fn step(&mut self, record: VolumeRecord) {
        if let Some(volume) = self.unrecorded.take() {
            self.placed(volume, "volume_adopted").await;
            return;
        }
        let Some(provider) = self.keeper.provider() else {
            if record.known.problem.as_deref() != Some(NO_KEY) {
                self.know(|record| record.known.problem = Some(NO_KEY.to_owned())).await;
            }
            return;
        };
        if record.is_stale() {
            let minutes = Timestamp::now().duration_since(record.wanted.requested_at).as_mins();
            self.refused(format!("it was asked for {minutes} minutes ago and not made in time; ask again")).await;
            return;
        }
        // Before anything is sent the list tells what is there; after it, what came of it.
        match provider.volumes().await {
            Ok(listed) => match (record.wanted.grows.clone(), record.known.phase) {
                (Some(id), _) => self.grow(&*provider, &record, &id, listed.value).await,
                (None, VolumePhase::Journaled) => self.create(&*provider, &record, listed.value).await,
                (None, _) => self.search(&record, listed).await,
            },
            Err(error) if record.known.phase == VolumePhase::Journaled => self.not_sent(error).await,
            Err(error) => {
                self.back_off();
                tracing::warn!(intent = self.intent, error = %chain(&error), "a volume can't be looked for");
            }
        }
    }

    async fn create(&mut self, provider: &dyn GpuProvider, record: &VolumeRecord, listed: Vec<Volume>) {
        if let Some(there) = listed.iter().find(|volume| record.may_be(volume)) {
            // Somebody made it meanwhile.
            if there.size_gb >= record.wanted.size_gb {
                self.placed(there.clone(), "volume_adopted").await;
            } else {
                self.refused(format!("there is one of that name since, with {} GB; ask again", there.size_gb)).await;
            }
            return;
        }
        let ids: Vec<_> = listed.into_iter().map(|volume| volume.id).collect();
        if !self.journal(ids).await {
            return;
        }
        let wanted = &record.wanted;
        let spec =
            VolumeSpec { name: wanted.name.clone(), size_gb: wanted.size_gb, data_center: wanted.data_center.clone() };
        self.note("volume_posted", record, json!({}));
        match provider.create_volume(&spec).await {
            Ok(answer) => self.placed(answer.value, "volume_created").await,
            Err(error) => self.failed(error).await,
        }
    }

    async fn grow(&mut self, provider: &dyn GpuProvider, record: &VolumeRecord, id: &str, listed: Vec<Volume>) {
        let Some(there) = listed.into_iter().find(|volume| volume.id == id) else {
            self.refused("the volume that was to grow is not there any more".to_owned()).await;
            return;
        };
        if there.size_gb >= record.wanted.size_gb {
            self.placed(there, "volume_grown").await;
            return;
        }
        if record.known.phase != VolumePhase::Journaled && !self.asked_recently() {
            let problem = format!("no request to grow it had a clear answer, and it has {} GB still", there.size_gb);
            self.refused(problem).await;
            return;
        }
        if !self.journal(Vec::new()).await {
            return;
        }
        self.note("volume_grow_sent", record, json!({ "from_gb": there.size_gb }));
        match provider.grow_volume(id, record.wanted.size_gb).await {
            Ok(answer) if answer.value.size_gb >= record.wanted.size_gb => {
                self.placed(answer.value, "volume_grown").await;
            }
            Ok(_) => {
                self.back_off();
                self.know(|record| record.known.phase = VolumePhase::Unknown).await;
            }
            Err(error) => self.failed(error).await,
        }
    }

    /// Without this on disk nothing is sent; and the list took a moment, in which we may have been told to end.
    async fn journal(&mut self, listed_before: Vec<String>) -> bool {
        let journaled = self
            .know(|record| {
                record.known.phase = VolumePhase::Posting;
                record.known.posted_at = Some(Timestamp::now());
                record.known.listed_before = listed_before;
                record.known.problem = None;
            })
            .await;
        if journaled && !self.keeper.stop.is_cancelled() {
            return true;
        }
        self.back_off();
        self.know(|record| record.known.phase = VolumePhase::Journaled).await;
        false
    }

    async fn failed(&mut self, error: ProviderError) {
        if !error.may_have_happened() {
            self.not_sent(error).await;
            return;
        }
        let problem = chain(&error);
        tracing::warn!(intent = self.intent, error = problem, "a volume's request had no clear answer");
        self.call_again_in(self.keeper.timing.backoff_first);
        if let Some(record) = self.last.clone() {
            self.note("volume_unknown", &record, json!({ "cause": problem }));
        }
        self.know(|record| {
            record.known.phase = VolumePhase::Unknown;
            record.known.problem = Some(problem);
        })
        .await;
    }

    /// Nothing came of the request. What passes is waited for.
    async fn not_sent(&mut self, error: ProviderError) {
        let problem = chain(&error);
        if !error.is_transient() || !self.asked_recently() {
            self.refused(problem).await;
            return;
        }
        match error {
            ProviderError::RateLimited { retry_after } => self.call_again_in(retry_after),
            _ => self.back_off(),
        }
        self.know(|record| {
            record.known.phase = VolumePhase::Journaled;
            record.known.problem = Some(problem);
        })
        .await;
    }

    /// Looks for what an unclear create made.
    async fn search(&mut self, record: &VolumeRecord, listed: Stamped<Vec<Volume>>) {
        if let Some(date) = listed.date {
            self.keeper.clock.heard(date);
        }
        let now = self.keeper.clock.now();
        if let Some(volume) = listed.value.into_iter().find(|volume| record.may_be(volume)) {
            self.placed(volume, "volume_adopted").await;
            return;
        }
        let from = record.known.lacked.map_or(now, |(from, _)| from.min(now));
        let lacked_for = now.duration_since(from);
        if lacked_for > GIVEN_UP_AFTER {
            let problem = record.known.problem.clone().unwrap_or_default();
            self.refused(format!("it never turned up in a day ({problem})")).await;
            return;
        }
        let timing = &self.keeper.timing;
        let pause = if lacked_for < TURNS_UP_WITHIN { timing.pod_poll_waiting } else { timing.pod_poll_settled };
        self.backoff = timing.backoff_first;
        self.call_again_in(pause);
        self.know(move |record| record.known.lacked = Some((from, now))).await;
    }

    /// If the disk doesn't take it, it is kept in memory and written with the next step.
    async fn placed(&mut self, volume: Volume, event: &'static str) {
        let placed = volume.clone();
        if !self.know(move |record| record.place(&placed)).await {
            tracing::error!(volume = volume.id, "a volume that is there can't be recorded; trying again");
            self.back_off();
            self.unrecorded = Some(volume);
            return;
        }
        tracing::info!(volume = volume.id, event, "a volume is as it was wanted");
        if let Some(record) = self.last.clone() {
            self.note(event, &record, json!({}));
        }
    }

    async fn refused(&mut self, problem: String) {
        if let Some(record) = self.last.clone() {
            self.note("volume_refused", &record, json!({ "cause": problem }));
        }
        self.know(|record| {
            record.known.phase = VolumePhase::Refused;
            record.known.problem = Some(problem);
        })
        .await;
    }

    fn note(&self, event: &str, record: &VolumeRecord, more: Value) {
        let (wanted, known) = (&record.wanted, &record.known);
        let mut facts = json!({
            "volume": wanted.name, "data_center": wanted.data_center, "size_gb": wanted.size_gb,
            "volume_id": record.volume_id(), "intent": record.intent,
            "usd_per_month": monthly_usd(wanted.size_gb, known.tier.as_deref()),
        });
        if let (Some(facts), Value::Object(more)) = (facts.as_object_mut(), more) {
            facts.extend(more);
        }
        self.keeper.audit.note(Actor::Keeper, event, facts);
    }

    /// Writes the record again that has left the file. False when that can't be, or when nothing was ever sent.
    async fn restore(&mut self) -> bool {
        let sent = |record: &VolumeRecord| record.is_open() && record.known.phase != VolumePhase::Journaled;
        let Some(record) = self.last.clone().filter(sent) else { return false };
        match self.keeper.volumes.restore(record).await {
            Ok(restored) => restored,
            Err(error) => {
                tracing::error!(intent = self.intent, error = %chain(&error), "its record can't be written again");
                true
            }
        }
    }

    fn asked_recently(&self) -> bool {
        let asked = self.last.as_ref().map(|record| record.wanted.requested_at);
        asked.is_some_and(|at| Timestamp::now().duration_since(at) < TRY_FOR)
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

    fn record(&self) -> Result<Option<VolumeRecord>, StateError> {
        self.keeper.volumes.of_intent(&self.intent)
    }

    /// Writes what is known; false when the disk doesn't take it or no record has the intent.
    async fn know(&mut self, change: impl FnOnce(&mut VolumeRecord) + Send + 'static) -> bool {
        match self.keeper.volumes.know(&self.intent, change).await {
            Ok(Some(record)) => {
                self.last = Some(record);
                true
            }
            Ok(None) => false,
            Err(error) => {
                tracing::error!(intent = self.intent, error = %chain(&error), "what is known can't be written");
                false
            }
        }
    }
}
