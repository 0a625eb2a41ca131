//! One list of the account's pods for all tasks: however many pods are waited for, the provider is asked once.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::provider::{GpuProvider, Pod, ProviderError, Stamped};

type Listed = Arc<Stamped<Vec<Pod>>>;

#[derive(Debug, Default)]
pub(super) struct Snapshot {
    /// When the answer came, and the answer.
    last: Mutex<Option<(Instant, Listed)>>,
}

impl Snapshot {
    /// The list as it was at most `max_age` ago. Who comes while another asks waits for the same answer; a failure is
    /// nobody's answer but the asker's.
    pub(super) async fn get(&self, provider: &dyn GpuProvider, max_age: Duration) -> Result<Listed, ProviderError> {
        let mut last = self.last.lock().await;
        if let Some((at, listed)) = &*last
            && at.elapsed() < max_age
        {
            return Ok(listed.clone());
        }
        let asked = Instant::now();
        let listed = Arc::new(provider.pods().await?);
        *last = Some((asked, listed.clone()));
        Ok(listed)
    }

    /// What was seen before a change is no answer any more.
    pub(super) async fn forget(&self) {
        *self.last.lock().await = None;
    }
}
