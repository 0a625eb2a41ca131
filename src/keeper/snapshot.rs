//! One list of the account's pods for all tasks: however many pods are waited for, the provider is asked once.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::clocks::ProviderClock;
use crate::provider::{GpuProvider, Pod, ProviderError, Stamped};

type Listed = Arc<Stamped<Vec<Pod>>>;

#[derive(Debug, Default)]
pub(super) struct Snapshot {
    seen: Mutex<Seen>,
    /// Held while the provider is asked, so that the others wait for the same answer.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Seen {
    /// When it was asked for, and the answer.
    last: Option<(Instant, Listed)>,
    /// Counts what was forgotten, so that an answer to a question from before is not kept.
    changes: u64,
}

impl Snapshot {
    /// The list as it was at most `max_age` ago. Who comes while another asks waits for the same answer; a failure is
    /// nobody's answer but the asker's. Whoever asks hears the provider's clock, once.
    pub(super) async fn get(
        &self,
        provider: &dyn GpuProvider,
        clock: &ProviderClock,
        max_age: Duration,
    ) -> Result<Listed, ProviderError> {
        if let Some(listed) = self.seen().fresh(max_age) {
            return Ok(listed);
        }
        let _asking = self.asking.lock().await;
        if let Some(listed) = self.seen().fresh(max_age) {
            return Ok(listed);
        }
        let (asked, changes) = (Instant::now(), self.seen().changes);
        let listed = Arc::new(provider.pods().await?);
        if let Some(date) = listed.date {
            clock.heard(date);
        }
        let mut seen = self.seen();
        if seen.changes == changes {
            seen.last = Some((asked, listed.clone()));
        }
        Ok(listed)
    }

    /// What was seen before a change is no answer any more. Waits for nobody, for the provider may hang.
    pub(super) fn forget(&self) {
        let mut seen = self.seen();
        seen.last = None;
        seen.changes += 1;
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    fn fresh(&self, max_age: Duration) -> Option<Listed> {
        let fresh = self.last.as_ref().filter(|(at, _)| at.elapsed() < max_age);
        fresh.map(|(_, listed)| listed.clone())
    }
}
