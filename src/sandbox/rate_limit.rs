//! Quotas per minute, hour and day, counted in real time, because that is the time clients wait in.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Name, length in seconds, and quota of each window. Ten times and more above RunPod's example policy, so that tests
/// are not slowed down; `PUT /_sandbox/rate_limit` lowers the quota of a minute.
const WINDOWS: [(&str, u64, u64); 3] = [("minute", 60, 6_000), ("hour", 3_600, 120_000), ("day", 86_400, 1_000_000)];

#[derive(Debug)]
pub struct RateLimit {
    windows: Mutex<[Window; 3]>,
}

#[derive(Debug)]
struct Window {
    name: &'static str,
    seconds: u64,
    quota: u64,
    used: u64,
    began: Instant,
}

/// The two headers that come with every answer, and how long to wait if a window is used up.
#[derive(Debug, Clone)]
pub struct Quota {
    pub rate_limit: String,
    pub policy: String,
    /// The used up window and the seconds until it starts anew.
    pub exceeded: Option<(&'static str, u64)>,
}

impl Default for RateLimit {
    fn default() -> Self {
        let began = Instant::now();
        let windows = WINDOWS.map(|(name, seconds, quota)| Window { name, seconds, quota, used: 0, began });
        Self { windows: Mutex::new(windows) }
    }
}

impl RateLimit {
    /// Counts one request.
    pub fn count(&self) -> Quota {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let mut exceeded = None;
        for window in windows.iter_mut() {
            if window.began.elapsed() >= Duration::from_secs(window.seconds) {
                window.began = Instant::now();
                window.used = 0;
            }
            if window.used >= window.quota {
                exceeded = exceeded.or(Some((window.name, window.left())));
            } else {
                window.used += 1;
            }
        }
        let rate_limit = windows.iter().map(|window| {
            format!("\"{}\";r={};t={}", window.name, window.quota - window.used.min(window.quota), window.left())
        });
        let policy =
            windows.iter().map(|window| format!("\"{}\";q={};w={}", window.name, window.quota, window.seconds));
        Quota {
            rate_limit: rate_limit.collect::<Vec<_>>().join(", "),
            policy: policy.collect::<Vec<_>>().join(", "),
            exceeded,
        }
    }

    pub fn set_per_minute(&self, quota: u64) {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)[0].quota = quota;
    }
}

impl Window {
    /// Whole seconds until the window starts anew, at least 1.
    fn left(&self) -> u64 {
        self.seconds.saturating_sub(self.began.elapsed().as_secs()).max(1)
    }
}
