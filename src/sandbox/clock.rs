//! The world's clock. Everything that lives, waits or costs in the world goes by it, and every answer's `Date` is it.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

/// How the world's time passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockMode {
    /// Real time, so that a person can watch; `POST /_sandbox/clock` can still leap forward.
    Live,
    /// Stands still but for `POST /_sandbox/clock`, so that tests need no waiting and never race.
    Manual,
}

/// The furthest one leap may go: ten years, far from where timestamps end.
const LONGEST_LEAP: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

pub struct WorldClock {
    mode: ClockMode,
    /// Where a manual clock started; a live one needs no start.
    started: Timestamp,
    /// The sum of all leaps.
    leapt: Mutex<SignedDuration>,
}

impl WorldClock {
    pub fn new(mode: ClockMode) -> Self {
        Self { mode, started: Timestamp::now(), leapt: Mutex::new(SignedDuration::ZERO) }
    }

    pub fn mode(&self) -> ClockMode {
        self.mode
    }

    /// Now in the world, in whole milliseconds as RunPod's answers have them.
    pub fn now(&self) -> Timestamp {
        let base = match self.mode {
            ClockMode::Live => Timestamp::now(),
            ClockMode::Manual => self.started,
        };
        let leapt = *self.leapt.lock().unwrap_or_else(PoisonError::into_inner);
        let now = base.saturating_add(leapt).unwrap_or(Timestamp::MAX);
        Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
    }

    /// Leaps forward; `false` if that is further than a world may leap.
    pub fn advance(&self, by: Duration) -> bool {
        let mut leapt = self.leapt.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(by) = SignedDuration::try_from(by) else { return false };
        let Some(sum) = leapt.checked_add(by) else { return false };
        if sum > SignedDuration::try_from(LONGEST_LEAP).unwrap_or(SignedDuration::MAX) {
            return false;
        }
        *leapt = sum;
        true
    }
}
