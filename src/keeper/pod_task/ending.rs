//! Ending a pod: DELETE until both the pod's own page and the list prove it gone.

use jiff::Timestamp;
use tokio::time::Instant;

use super::PodTask;
use super::placing::Search;
use crate::errors::chain;
use crate::fleet::{Phase, PodRecord};
use crate::provider::{GpuProvider, PodStatus, ProviderError};

impl PodTask {
    pub(super) async fn end(&mut self, provider: &dyn GpuProvider, record: PodRecord) {
        match (&record.known.pod_id, record.known.phase) {
            (Some(id), _) => self.delete(provider, id.clone()).await,
            // Nothing was ever sent.
            (None, Phase::Journaled) => self.gone("it was never created").await,
            (None, _) => {
                // The POST may have made a pod: ended on sight, and paid for in our books until its deadline.
                let late = Timestamp::now() >= record.expires_at();
                match self.search(provider, &record).await {
                    Search::Found => self.next_call = Instant::now(),
                    Search::NotListed if late => self.gone("it never turned up").await,
                    Search::NotListed | Search::Failed => {}
                }
            }
        }
    }

    async fn delete(&mut self, provider: &dyn GpuProvider, id: String) {
        match provider.delete_pod(&id).await {
            Ok(answer) => {
                self.succeeded(&answer);
            }
            Err(ProviderError::NotFound { .. }) => {}
            Err(error) => {
                self.trouble(&error).await;
                return;
            }
        }
        match proven_gone(provider, &id).await {
            Ok(true) => self.gone("").await,
            Ok(false) => self.call_again_in(self.keeper.timing.record_poll * 5),
            Err(error) => self.trouble(&error).await,
        }
    }

    /// Closes the record. What it cost is counted to this moment by the provider's clock.
    pub(super) async fn gone(&self, cause: &'static str) {
        let now = Timestamp::now() + self.provider_ahead;
        let closed = self
            .know(move |record| {
                let known = &mut record.known;
                if let Some(from) = known.cost_counted_at.filter(|from| now > *from)
                    && !matches!(known.status, Some(PodStatus::Exited | PodStatus::Terminated))
                {
                    known.cost_usd += known.cost_per_hour * now.duration_since(from).as_secs_f64() / 3600.0;
                }
                known.phase = Phase::Gone;
                known.status = known.pod_id.as_ref().map(|_| PodStatus::Terminated);
                known.gone_at = Some(Timestamp::now());
                known.cost_counted_at = Some(now);
                known.ssh = None;
                known.problem = None;
                if !cause.is_empty() {
                    known.ending_cause = Some(cause.to_owned());
                }
            })
            .await;
        if closed {
            tracing::info!(pod = self.name, "proven gone");
        }
    }
}

/// A 404 of its own page may be lag, so the list has to lack it too.
async fn proven_gone(provider: &dyn GpuProvider, id: &str) -> Result<bool, ProviderError> {
    match provider.pod(id).await {
        Ok(answer) if answer.value.status != PodStatus::Terminated => return Ok(false),
        Ok(_) | Err(ProviderError::NotFound { .. }) => {}
        Err(error) => {
            tracing::warn!(pod = id, error = %chain(&error), "can't be proven gone yet");
            return Err(error);
        }
    }
    let listed = provider.pods().await?.value;
    Ok(!listed.iter().any(|pod| pod.id == id && pod.status != PodStatus::Terminated))
}
