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

/// A difference that needs no second witness.
const BELIEVED_AT_ONCE: SignedDuration = SignedDuration::from_secs(60);

/// The provider's clock, by its answers to any task of the keeper.
///
/// All pods' deadlines, costs and switches hang on it, and one answer of a proxy whose clock is wrong must not end them
/// all. So a time that fits neither what the provider told before nor our own clock counts once the next answer tells
/// the same.
#[derive(Debug, Default)]
pub(super) struct ProviderClock(Mutex<Heard>);

#[derive(Debug, Default, Clone, Copy)]
struct Heard {
    believed: Option<Told>,
    doubted: Option<Told>,
}

#[derive(Debug, Clone, Copy)]
struct Told {
    date: Timestamp,
    at: Moment,
}

impl Told {
    /// What a clock that told this shows now.
    fn now(self) -> Timestamp {
        later(self.date, self.at.elapsed())
    }
}

impl ProviderClock {
    /// To be called once for each answer, for another call is another witness.
    pub(super) fn heard(&self, date: Timestamp) {
        let fits = |other: Timestamp| date.duration_since(other).abs() <= BELIEVED_AT_ONCE;
        let mut heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let told = Told { date, at: Moment::now() };
        let Heard { believed, doubted } = *heard;
        let fits_before = believed.into_iter().chain(doubted).any(|before| fits(before.now()));
        *heard = match fits_before || fits(Timestamp::now()) {
            true => Heard { believed: Some(told), doubted: None },
            false => Heard { believed, doubted: Some(told) },
        };
    }

    /// Whether the last answer told a time that waits for a second one, which is worth asking for soon.
    pub(super) fn is_in_doubt(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).doubted.is_some()
    }

    /// The provider's time by its last believed answer.
    pub(super) fn told(&self) -> Option<Timestamp> {
        let heard = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        heard.believed.map(Told::now)
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
        self.elapsed() >= lifetime
    }

    pub(super) fn elapsed(&self) -> SignedDuration {
        self.since.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: SignedDuration = SignedDuration::from_hours(1);

    fn heard_twice(clock: &ProviderClock, date: Timestamp) {
        clock.heard(date);
        clock.heard(date);
    }

    #[test]
    fn ours_stands_in_until_the_provider_told_its_time() {
        let clock = ProviderClock::default();
        let ours = Timestamp::now();
        assert_eq!(clock.told(), None);
        assert!(clock.now() >= ours && clock.now() < later(ours, HOUR));
        heard_twice(&clock, later(ours, -HOUR));
        assert!(clock.told().is_some_and(|told| told < ours));
    }

    #[test]
    fn one_answer_of_another_time_counts_only_when_the_next_says_so_too() {
        let clock = ProviderClock::default();
        let ours = Timestamp::now();
        for wrong in [Timestamp::MAX, later(ours, HOUR * 24), later(ours, -HOUR * 24), Timestamp::MIN] {
            clock.heard(wrong);
            assert!(clock.is_in_doubt());
            assert!(clock.now() >= ours && clock.now() < later(ours, HOUR), "{wrong}");
        }
        clock.heard(Timestamp::now());
        assert!(!clock.is_in_doubt());
        clock.heard(later(ours, HOUR));
        assert!(clock.now() < later(ours, HOUR));
        clock.heard(later(ours, HOUR));
        assert!(clock.now() >= later(ours, HOUR) && !clock.is_in_doubt());
        // Our own time needs no second witness.
        clock.heard(Timestamp::now());
        assert!(clock.now() < later(ours, HOUR));
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
        heard_twice(&clock, date);
        if let Some(told) = &mut clock.0.lock().expect("no panic").believed {
            told.at.0 -= HOUR;
        }
        assert!(clock.now() >= date + HOUR && clock.now() < date + HOUR * 2);
        heard_twice(&clock, Timestamp::MAX);
        assert_eq!(clock.now(), Timestamp::MAX);
    }
}
