//! The clocks that a deadline is kept by: ours, which somebody may set; the provider's; and the machine's own, which
//! goes on while it sleeps and which nobody can set.

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

#[derive(Debug)]
pub(super) struct Clocks {
    /// No pod of this task was made before.
    since: Moment,
    /// The provider's last `Date`, and when it came.
    provider: Option<(Timestamp, Moment)>,
}

impl Clocks {
    pub(super) fn new() -> Self {
        Self { since: Moment::now(), provider: None }
    }

    /// Counts from here: the pod is made now, if at all.
    pub(super) fn start(&mut self) {
        self.since = Moment::now();
    }

    pub(super) fn heard(&mut self, date: Timestamp) {
        self.provider = Some((date, Moment::now()));
    }

    /// The provider's time by its last answer that told one; ours before.
    pub(super) fn provider_now(&self) -> Timestamp {
        self.provider.map_or_else(Timestamp::now, |(date, at)| later(date, at.elapsed()))
    }

    /// Whichever clock comes first ends a pod: a deadline is never kept too late.
    pub(super) fn is_due(&self, expires_at: Timestamp, lifetime: SignedDuration) -> bool {
        self.latest() >= expires_at || self.since.elapsed() >= lifetime
    }

    pub(super) fn latest(&self) -> Timestamp {
        self.provider_now().max(Timestamp::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: SignedDuration = SignedDuration::from_hours(1);

    #[test]
    fn a_pod_is_due_by_whichever_clock_comes_first() {
        let mut clocks = Clocks::new();
        let soon = later(Timestamp::now(), HOUR);
        assert!(!clocks.is_due(soon, HOUR));
        assert!(clocks.is_due(Timestamp::now(), HOUR), "ours");
        clocks.heard(later(soon, HOUR));
        assert!(clocks.is_due(soon, HOUR), "the provider's");
        // Ours was set back by a day, say, and the provider tells no time any more.
        clocks.heard(later(Timestamp::now(), -HOUR));
        let tomorrow = later(Timestamp::now(), HOUR * 24);
        assert!(!clocks.is_due(tomorrow, HOUR));
        clocks.since.0 -= HOUR;
        assert!(clocks.is_due(tomorrow, HOUR), "the machine's");
        clocks.start();
        assert!(!clocks.is_due(tomorrow, HOUR));
    }

    #[test]
    fn the_providers_time_goes_on_between_its_answers() {
        let mut clocks = Clocks::new();
        let date: Timestamp = "2031-01-01T00:00:00Z".parse().unwrap();
        clocks.heard(date);
        if let Some((_, at)) = &mut clocks.provider {
            at.0 -= HOUR;
        }
        assert!(clocks.provider_now() >= date + HOUR && clocks.provider_now() < date + HOUR * 2);
        clocks.heard(Timestamp::MAX);
        assert_eq!(clocks.latest(), Timestamp::MAX);
    }
}
