//! Bounded waiting: no call takes over 45 seconds; what goes on is found again by name.

use std::time::Duration;

use tokio::time::Instant;

use super::Context;
use crate::timing::{WAIT_DEFAULT_SECONDS, WAIT_MOST_SECONDS};

/// How long a call may still wait, and how it looks again.
pub(super) struct Waiting<'a> {
    context: &'a Context,
    started: Instant,
    until: Instant,
}

impl<'a> Waiting<'a> {
    pub(super) fn new(context: &'a Context, wait_seconds: Option<u64>) -> Self {
        let seconds = wait_seconds.unwrap_or(WAIT_DEFAULT_SECONDS).min(WAIT_MOST_SECONDS);
        let started = Instant::now();
        Self { context, started, until: started + Duration::from_secs(seconds) }
    }

    /// Pauses until it is time to look again; false when the time is up or the caller has gone.
    pub(super) async fn again(&self) -> bool {
        let now = Instant::now();
        if now >= self.until || self.context.cancel.is_cancelled() {
            return false;
        }
        let pause = self.context.services.timing.record_poll.min(self.until - now);
        tokio::select! {
            () = tokio::time::sleep(pause) => true,
            () = self.context.cancel.cancelled() => false,
        }
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    pub(super) fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    /// Progress in seconds waited, of the seconds there are.
    pub(super) fn tell(&self, message: impl Into<String>) {
        let total = (self.until - self.started).as_secs_f64();
        self.context.progress.tell(message, self.elapsed().as_secs_f64().min(total), Some(total));
    }
}
