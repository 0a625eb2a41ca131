//! Quotas per minute, hour and day for each key, counted in real time, because that is the time clients wait in.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

/// Name, length in seconds, and quota of each window. Ten times and more above RunPod's example policy, so that tests
/// are not slowed down; `PUT /_sandbox/rate_limit` changes them.
const WINDOWS: [Window; 3] = [
    Window { name: "minute", seconds: 60, quota: 6_000 },
    Window { name: "hour", seconds: 3_600, quota: 120_000 },
    Window { name: "day", seconds: 86_400, quota: 1_000_000 },
];

/// What `PUT /_sandbox/rate_limit` takes; what is left out stays as it is.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewPolicy {
    pub per_minute: Option<u64>,
    pub per_hour: Option<u64>,
    pub per_day: Option<u64>,
    /// The length of the window that is called a minute, so that a test needn't wait for a real one.
    pub minute_seconds: Option<u64>,
}

#[derive(Debug)]
pub struct RateLimit {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    policy: [Window; 3],
    used: HashMap<String, [Use; 3]>,
}

#[derive(Debug, Clone, Copy)]
struct Window {
    name: &'static str,
    seconds: u64,
    quota: u64,
}

/// What one key has used of a window.
#[derive(Debug, Clone, Copy)]
struct Use {
    count: u64,
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
        Self { state: Mutex::new(State { policy: WINDOWS, used: HashMap::new() }) }
    }
}

impl RateLimit {
    /// Counts one request; each key has a caller of its own.
    pub fn count(&self, caller: &str) -> Quota {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { policy, used } = &mut *state;
        let fresh = Use { count: 0, began: Instant::now() };
        let used = used.entry(caller.to_owned()).or_insert([fresh; 3]);
        let mut exceeded = None;
        let mut left = Vec::new();
        for (window, used) in policy.iter().zip(used) {
            if used.began.elapsed() >= Duration::from_secs(window.seconds) {
                *used = fresh;
            }
            let until_anew = window.until_anew(used);
            if used.count >= window.quota {
                exceeded = exceeded.or(Some((window.name, until_anew)));
            } else {
                used.count += 1;
            }
            left.push(format!("\"{}\";r={};t={until_anew}", window.name, window.quota.saturating_sub(used.count)));
        }
        let policy = policy.iter().map(|window| format!("\"{}\";q={};w={}", window.name, window.quota, window.seconds));
        Quota { rate_limit: left.join(", "), policy: policy.collect::<Vec<_>>().join(", "), exceeded }
    }

    /// Changes the policy, and gives it. `None` if no request could ever be made under it.
    pub fn set(&self, new: &NewPolicy) -> Option<Value> {
        if new.minute_seconds == Some(0) {
            return None;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let [minute, hour, day] = &mut state.policy;
        minute.quota = new.per_minute.unwrap_or(minute.quota);
        minute.seconds = new.minute_seconds.unwrap_or(minute.seconds);
        hour.quota = new.per_hour.unwrap_or(hour.quota);
        day.quota = new.per_day.unwrap_or(day.quota);
        Some(json!({
            "per_minute": minute.quota, "minute_seconds": minute.seconds, "per_hour": hour.quota, "per_day": day.quota
        }))
    }
}

impl Window {
    /// Whole seconds until it starts anew, at least 1; rounded up, so that who waits so long doesn't come too early.
    fn until_anew(&self, used: &Use) -> u64 {
        let left = Duration::from_secs(self.seconds).saturating_sub(used.began.elapsed());
        (left.as_secs_f64().ceil() as u64).max(1)
    }
}
