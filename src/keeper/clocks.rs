//! The clocks that a deadline is kept by: ours, which somebody may set; the provider's; and the machine's own, which
//! goes on while it sleeps and which nobody can set.

use std::sync::{Mutex, PoisonError};

use jiff::{SignedDuration, Timestamp};
use rustix::time::{ClockId, clock_gettime};

use crate::fleet::later;

#[cfg(target_os = "linux")]
const COUNTS_SLEEP: ClockId = ClockId::Boottime;
#[cfg(not(target_os = "linux"))]
const COUNTS_SLEEP: ClockId = ClockId::Monotonic;

#[derive(Debug, Clone, Copy)]
struct Moment(SignedDuration);

impl Moment {
    fn now() -> Self {
        let at = clock_gettime(COUNTS_SLEEP);
        Self(SignedDuration::new(at.tv_sec, i32::try_from(at.tv_nsec).unwrap_or(0)))
    }

    fn elapsed(self) -> SignedDuration {
        Self::now().0.saturating_sub(self.0)
    }
}

/// The provider's clock, by the last answer to any task of the keeper.
#[derive(Debug, Default)]
pub(super) struct ProviderClock(Mutex<Option<(Timestamp, Moment)>>);

impl ProviderClock {
    pub(super) fn heard(&self, date: Timestamp) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((date, Moment::now()));
    }

    /// The provider's time by its last answer that told one.
    pub(super) fn told(&self) -> Option<Timestamp> {
        let heard = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        heard.map(|(date, at)| later(date, at.elapsed()))
    }

    /// The provider's time; ours before it told one.
    pub(super) fn now(&self) -> Timestamp {
        self.told().unwrap_or_else(Timestamp::now)
    }
}

/// The time since its start: that one task has lasted, say, for no pod of a task was made before it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lifetime {
    since: Moment,
}

impl Lifetime {
    pub(super) fn start() -> Self {
        Self { since: Moment::now() }
    }

    #[cfg(test)]
    pub(super) fn started_ago(ago: SignedDuration) -> Self {
        Self { since: Moment(Moment::now().0 - ago) }
    }

    pub(super) fn is_over(&self, lifetime: SignedDuration) -> bool {
        self.since.elapsed() >= lifetime
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: SignedDuration = SignedDuration::from_hours(1);

    #[test]
    fn ours_stands_in_until_the_provider_told_its_time() {
        let clock = ProviderClock::default();
        let ours = Timestamp::now();
        assert_eq!(clock.told(), None);
        assert!(clock.now() >= ours && clock.now() < later(ours, HOUR));
        clock.heard(later(ours, -HOUR));
        assert!(clock.told().is_some_and(|told| told < ours));
    }

    #[test]
    fn a_lifetime_is_over_by_the_machines_own_clock() {
        let mut lifetime = Lifetime::start();
        assert!(!lifetime.is_over(HOUR));
        lifetime.since.0 -= HOUR;
        assert!(lifetime.is_over(HOUR));
    }

    #[test]
    fn the_providers_time_goes_on_between_its_answers() {
        let clock = ProviderClock::default();
        let date: Timestamp = "2031-01-01T00:00:00Z".parse().expect("a time");
        clock.heard(date);
        if let Some((_, at)) = &mut *clock.0.lock().expect("no panic") {
            at.0 -= HOUR;
        }
        assert!(clock.now() >= date + HOUR && clock.now() < date + HOUR * 2);
        clock.heard(Timestamp::MAX);
        assert_eq!(clock.now(), Timestamp::MAX);
    }
}
