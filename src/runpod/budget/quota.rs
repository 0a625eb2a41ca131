//! The arithmetic of the rate budget, without a clock and a file of its own.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Told;

/// Since the epoch.
pub(super) type Millis = i64;

const SECOND: Millis = 1000;
/// Kept for endings in each window; a small window keeps less.
const RESERVE: u64 = 4;
const RESERVE_SHARE: u64 = 8;
/// Whole seconds are told, rounded who knows how.
const ROUNDING: Millis = SECOND;
/// Resets that lie closer together are the same one.
const SAME_RESET: Millis = 2 * SECOND;
/// So long after the last word nothing is held back any more without asking: one request goes and brings news.
const BELIEVED: Millis = 60 * SECOND;
/// The longest window, whatever the provider says.
const LONGEST_WINDOW: u64 = 24 * 3600;
const MOST_QUOTA: u64 = 1_000_000_000;
const LONGEST_RETRY: Duration = Duration::from_secs(3600);
const MOST_WINDOWS: usize = 8;
const MOST_UNDERWAY: usize = 1000;
/// Before the first answer nobody knows how much is left, so only a few ask for it, and the others wait that long.
const FIRST_ASKERS: usize = 4;
const FIRST_WAIT: Millis = SECOND;
/// A window that a refusal without any told window makes.
const REFUSED: &str = "refused";

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Quotas {
    pub account: String,
    /// When this was changed last.
    pub at: Millis,
    /// An answer came, though it may have told of no window.
    answered: bool,
    windows: Vec<Window>,
    underway: Vec<Underway>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Window {
    name: String,
    /// As of the last word; requests under way are not in it.
    remaining: u64,
    resets_at: Millis,
    told_at: Millis,
    quota: Option<u64>,
    seconds: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Underway {
    id: u64,
    at: Millis,
    /// Its process may have died.
    until: Millis,
}

/// Why a request may not be sent now.
#[derive(Debug, PartialEq)]
pub(super) struct Hold {
    /// Before then nothing can change.
    pub look_in: Duration,
    /// When there is room for certain.
    pub free_in: Duration,
}

impl Quotas {
    /// Nothing is known yet.
    pub fn of(account: &str) -> Self {
        Self { account: account.to_owned(), ..Self::default() }
    }

    /// Forgets what is over, and what can't be so because a clock jumped or somebody wrote nonsense.
    pub fn tidy(&mut self, now: Millis) {
        self.windows.truncate(MOST_WINDOWS);
        self.windows.retain(|window| {
            let length = Millis::try_from(window.seconds.unwrap_or(LONGEST_WINDOW).min(LONGEST_WINDOW)).unwrap_or(0);
            window.told_at <= now + SECOND && window.resets_at <= now + length * SECOND + SAME_RESET
        });
        let is_over = |window: &Window| window.resets_at <= now;
        self.windows.retain(|window| !is_over(window) || window.quota.is_some() && window.seconds.is_some());
        for window in self.windows.iter_mut().filter(|window| is_over(window)) {
            // A new one began, of which the provider hasn't told anything yet.
            window.remaining = window.quota.unwrap_or_default();
            window.resets_at = now + Millis::try_from(window.seconds.unwrap_or_default()).unwrap_or(0) * SECOND;
            window.told_at = now;
        }
        self.underway.retain(|request| request.at <= now + SECOND && request.until > now);
        self.underway.truncate(MOST_UNDERWAY);
    }

    /// Counts the request as under way, unless it has to wait.
    pub fn admit(&mut self, id: u64, now: Millis, time_limit: Duration, urgent: bool) -> Result<(), Hold> {
        if !urgent {
            self.hold(now).map_or(Ok(()), Err)?;
        }
        for window in &mut self.windows {
            // Let through to bring news: the next one waits for it.
            if !urgent && window.is_short(self.underway.len()) {
                window.told_at = now;
            }
        }
        let until = now.saturating_add(time_limit.as_millis().try_into().unwrap_or(Millis::MAX));
        self.underway.push(Underway { id, at: now, until });
        Ok(())
    }

    fn hold(&self, now: Millis) -> Option<Hold> {
        let underway = self.underway.len();
        if !self.answered {
            let asking = self.underway.iter().filter(|request| request.at + FIRST_WAIT > now);
            let oldest = asking.clone().map(|request| request.at).min();
            return oldest
                .filter(|_| asking.count() >= FIRST_ASKERS)
                .map(|oldest| Hold { look_in: Duration::ZERO, free_in: duration(oldest + FIRST_WAIT - now) });
        }
        let short = self.windows.iter().filter(|window| window.is_short(underway));
        let holds = short.filter(|window| window.told_at + BELIEVED > now).map(|window| {
            // Requests that are under way may turn out to leave more than they seem to.
            let look_at = if window.is_short(0) { window.resets_at.min(window.told_at + BELIEVED) } else { now };
            Hold { look_in: duration(look_at - now), free_in: duration(window.resets_at - now).min(LONGEST_RETRY) }
        });
        holds.reduce(|one, other| Hold {
            look_in: one.look_in.max(other.look_in),
            free_in: one.free_in.max(other.free_in),
        })
    }

    /// What the answer to a request tells, of which some may be older than what is known by now.
    pub fn settle(&mut self, id: u64, sent_at: Millis, now: Millis, told: Option<Told>) {
        self.underway.retain(|request| request.id != id);
        let Some(told) = told else { return };
        self.answered = true;
        let policies: Vec<_> = told.policies.iter().flat_map(|text| members(text, "q", "w")).collect();
        for (name, remaining, seconds) in told.limits.iter().flat_map(|text| members(text, "r", "t")) {
            let policy = policies.iter().find(|(of, ..)| *of == name);
            let (quota, length) = (policy.map(|policy| policy.1), policy.map(|policy| policy.2));
            let left = seconds.min(length.unwrap_or(LONGEST_WINDOW)).min(LONGEST_WINDOW);
            let resets_at = now + Millis::try_from(left).unwrap_or(0) * SECOND + ROUNDING;
            let (name, told_at) = (name.to_owned(), now);
            self.learn(Window { name, remaining, resets_at, told_at, quota, seconds: length }, sent_at);
        }
        if let Some(wait) = told.retry_after {
            let resets_at = now + Millis::try_from(wait.min(LONGEST_RETRY).as_millis()).unwrap_or(0);
            let name = REFUSED.to_owned();
            let refused = Window { name, remaining: 0, resets_at, told_at: now, quota: None, seconds: None };
            self.learn(refused, sent_at);
        }
    }

    fn learn(&mut self, told: Window, sent_at: Millis) {
        let Some(known) = self.windows.iter_mut().find(|window| window.name == told.name) else {
            if self.windows.len() < MOST_WINDOWS {
                self.windows.push(told);
            }
            return;
        };
        // Answers overtake each other: only one whose request was sent after the last word is newer for certain.
        let is_newer = known.told_at <= sent_at;
        if is_newer || told.resets_at > known.resets_at + SAME_RESET {
            *known = told;
        } else if told.resets_at >= known.resets_at - SAME_RESET {
            let remaining = known.remaining.min(told.remaining);
            let resets_at = known.resets_at.max(told.resets_at);
            *known = Window { remaining, resets_at, ..told };
        }
    }
}

impl Window {
    /// Whether an ordinary request would use what is kept for endings.
    fn is_short(&self, underway: usize) -> bool {
        let reserve = match self.quota {
            Some(quota) => (quota / RESERVE_SHARE).clamp(1, RESERVE),
            None => RESERVE,
        };
        self.remaining.saturating_sub(underway as u64) <= reserve
    }
}

fn duration(millis: Millis) -> Duration {
    Duration::from_millis(millis.try_into().unwrap_or(0))
}

/// The members of a list like `"minute";r=0;t=12, "hour";r=2800;t=1812`; what isn't of this shape is left out.
fn members<'a>(text: &'a str, first: &'static str, second: &'static str) -> impl Iterator<Item = (&'a str, u64, u64)> {
    text.split(',').filter_map(move |member| {
        let mut parts = member.split(';').map(str::trim);
        let name = parts.next()?.trim_matches('"');
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let mut values = [None, None];
        for (key, value) in parts.filter_map(|part| part.split_once('=')) {
            let number = value.trim().parse::<u64>().ok().map(|number| number.min(MOST_QUOTA));
            match key.trim() {
                key if key == first => values[0] = number,
                key if key == second => values[1] = number,
                _ => {}
            }
        }
        let is_fine = !name.is_empty() && name.len() <= 32 && name.chars().all(is_name) && name != REFUSED;
        Some((name, values[0]?, values[1]?)).filter(|_| is_fine)
    })
}
