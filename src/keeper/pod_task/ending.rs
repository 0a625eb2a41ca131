//! Ending a pod: DELETE until both the pod's own page and the list prove it gone.

use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;

use super::placing::Search;
use super::{OTHER_ACCOUNT, PodTask};
use crate::errors::chain;
use crate::fleet::{Phase, PodRecord, TURNS_UP_WITHIN};
use crate::provider::{GpuProvider, delete_and_prove};
use crate::steps;
use crate::tunnel::{TunnelRecord, TunnelState};

/// Neither we nor anybody of this home.
pub(super) const ENDED_WITHOUT_US: &str = "it ended without us";

impl PodTask {
    pub(super) async fn end(&mut self, provider: &dyn GpuProvider, record: PodRecord) {
        match (&record.known.pod_id, record.known.phase) {
            (Some(id), _) => self.delete(provider, id.clone(), &record).await,
            // Nothing was ever sent.
            (None, Phase::Journaled) => self.gone("it was never created").await,
            (None, _) => {
                // The POST may have made a pod: ended on sight, and paid for in our books until its deadline.
                let late = self.is_due(&record) && record.lacked_for() >= TURNS_UP_WITHIN;
                match self.search(provider, &record).await {
                    Search::Found => self.next_call = Instant::now(),
                    Search::NotListed if late => self.gone("it never turned up").await,
                    Search::NotListed | Search::Failed => {}
                }
            }
        }
    }

    pub(super) async fn delete(&mut self, provider: &dyn GpuProvider, id: String, record: &PodRecord) {
        match delete_and_prove(provider, &id, self.may_lag(record)).await {
            Ok(answer) => {
                self.succeeded(&answer);
                steps::reached("keeper: deleted");
                self.deleted_by_us |= answer.value.was_there;
                if answer.value.is_proven {
                    self.gone(if self.deleted_by_us { "" } else { ENDED_WITHOUT_US }).await;
                } else {
                    self.call_again_in(self.until_next_proof());
                }
            }
            Err(error) => self.trouble(&error).await,
        }
    }

    /// Soon at first; where it takes long, the provider isn't asked more often than for a pod that starts.
    fn until_next_proof(&self) -> Duration {
        let timing = &self.keeper.timing;
        let soon = timing.record_poll * 5;
        let for_long = self.ending_begun.map_or(timing.pod_poll_waiting, |begun| begun.elapsed());
        (for_long / 4).clamp(soon, timing.pod_poll_waiting.max(soon))
    }

    /// Closes the record. What it cost is counted to this moment by the provider's clock.
    pub(super) async fn gone(&mut self, cause: &'static str) {
        let was_sent = self.last.as_ref().is_some_and(|record| record.known.phase != Phase::Journaled);
        if was_sent && !self.may_prove_absence() {
            self.back_off();
            self.know(|record| record.known.problem = Some(OTHER_ACCOUNT.to_owned())).await;
            return;
        }
        let now = self.keeper.clock.now();
        let closed = self
            .know(move |record| {
                // Its switch has fired while nobody looked; what it cost since is nothing.
                let switched_off = record.known.inside.switch_until.filter(|until| *until <= now);
                match switched_off.filter(|_| cause == ENDED_WITHOUT_US) {
                    Some(until) => {
                        record.close(until);
                        record.known.ending_cause = Some("its own switch ended it".to_owned());
                    }
                    None => record.close(now),
                }
                if record.known.ending_cause.is_none() || !cause.is_empty() && cause != ENDED_WITHOUT_US {
                    record.known.ending_cause = Some(cause.to_owned());
                }
            })
            .await;
        if !closed {
            // It is proven again when the disk takes it.
            self.back_off();
            return;
        }
        self.unrecorded = None;
        tracing::info!(pod = self.name, "proven gone");
        let closed = self.last.as_ref().map(|record| record.known.clone()).unwrap_or_default();
        self.note("gone", json!({ "cause": closed.ending_cause, "cost_usd": closed.cost_usd }));
        steps::reached("keeper: gone recorded");
        self.forget_failed_tunnels().await;
    }
}

impl PodTask {
    /// Those that failed for good have no task that would see the end of their pod.
    async fn forget_failed_tunnels(&self) {
        let Ok(Some(record)) = self.record() else { return };
        let Some(id) = record.known.pod_id else { return };
        let failed = move |_: &str, tunnel: &TunnelRecord| {
            tunnel.wanted.pod_id == id && tunnel.known.state == TunnelState::Failed
        };
        if let Err(error) = self.keeper.tunnels.want_closed(failed).await {
            tracing::error!(pod = self.name, error = %chain(&error), "its failed tunnels can't be forgotten");
        }
    }
}
