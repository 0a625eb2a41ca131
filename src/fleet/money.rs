//! What our pods have cost, what is set aside for them, and what the caps say of more.
//!
//! Everything is a function of the records and the time, so that it is decided under the records' lock.

use std::collections::BTreeMap;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, ToSpan};

use super::later;
use super::record::{Phase, PodKnown, PodRecord};
use crate::config::Limits;

/// USD; less is rounding.
const ROUNDING: f64 = 0.0005;

/// Money that somebody asks for: for a new pod, a start, or more time.
#[derive(Debug, Clone, Copy)]
pub struct Claim {
    pub price_per_hour: f64,
    pub from: Timestamp,
    pub until: Timestamp,
}

/// The cap that a claim would break.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum OverCap {
    #[error("there are {} pods already ({}) and the cap is {cap} (limits.max_pods)", open.len(), open.join(", "))]
    Pods { open: Vec<String>, cap: usize },
    #[error("it may cost ${price:.2}/h and the cap for a pod is ${cap:.2}/h (limits.max_price_per_hour)")]
    PodPrice { price: f64, cap: f64 },
    #[error(
        "it may cost ${price:.2}/h beside the ${there:.2}/h of what is there, and the cap for all pods is ${cap:.2}/h (limits.max_total_per_hour)"
    )]
    TotalPerHour { there: f64, price: f64, cap: f64 },
    #[error(
        "it may cost ${claim:.2} on {day} (UTC) beside the ${there:.2} that are spent or set aside for that day, and the cap is ${cap:.2} a day (limits.max_usd_per_day)"
    )]
    Day { day: Date, there: f64, claim: f64, cap: f64 },
    #[error(
        "it would live {minutes} minutes in all and the longest lifetime is {cap} minutes (limits.max_lifetime_minutes)"
    )]
    Lifetime { minutes: i64, cap: u32 },
}

/// What is spent and set aside, as the caps count it.
#[derive(Debug, Clone, PartialEq)]
pub struct Committed {
    pub open: Vec<String>,
    pub per_hour: f64,
    pub by_day: BTreeMap<Date, f64>,
}

/// The day that the caps count by.
pub fn day(at: Timestamp) -> Date {
    at.to_zoned(TimeZone::UTC).date()
}

pub fn hours(from: Timestamp, to: Timestamp) -> f64 {
    (to.duration_since(from).as_secs_f64() / 3600.0).max(0.0)
}

/// The hours between two moments, by days.
pub fn hours_by_day(from: Timestamp, to: Timestamp) -> Vec<(Date, f64)> {
    let mut days = Vec::new();
    let mut start = from;
    // No pod lives for a year; times from outside may lie anywhere.
    while start < to && days.len() < 366 {
        let today = day(start);
        let midnight = today
            .checked_add(1.day())
            .and_then(|tomorrow| tomorrow.to_zoned(TimeZone::UTC))
            .map_or(to, |tomorrow| tomorrow.timestamp());
        let end = midnight.min(to);
        days.push((today, hours(start, end)));
        start = end;
    }
    days
}

pub(super) fn add_cost(known: &mut PodKnown, price: f64, from: Timestamp, to: Timestamp) {
    for (day, hours) in hours_by_day(from, to) {
        known.cost_usd += price * hours;
        *known.cost_by_day.entry(day).or_default() += price * hours;
    }
}

/// What all records but `except` have spent and set aside.
pub fn committed(entries: &BTreeMap<String, PodRecord>, except: Option<&str>, now: Timestamp) -> Committed {
    let mut committed = Committed { open: Vec::new(), per_hour: 0.0, by_day: BTreeMap::new() };
    for (name, record) in entries.iter().filter(|(name, _)| except != Some(name.as_str())) {
        for (day, usd) in &record.known.cost_by_day {
            *committed.by_day.entry(*day).or_default() += usd;
        }
        if !record.is_open() {
            continue;
        }
        committed.open.push(name.clone());
        let per_hour = record.reserved_per_hour();
        committed.per_hour += per_hour;
        // What was counted ends where the reservation begins.
        let from = record.known.cost_counted_at.unwrap_or(now);
        for (day, hours) in hours_by_day(from, record.reserved_until().max(from)) {
            *committed.by_day.entry(day).or_default() += per_hour * hours;
        }
    }
    committed
}

/// Whether the caps leave room for the claim beside what the other records hold. `is_new`: one more pod.
pub fn check(
    entries: &BTreeMap<String, PodRecord>,
    name: &str,
    claim: Claim,
    is_new: bool,
    limits: &Limits,
) -> Result<(), OverCap> {
    // What the same record has cost stays spent; what it held is claimed anew.
    let others = committed(entries, Some(name), claim.from);
    let own = entries.get(name);
    if is_new && others.open.len() >= limits.max_pods {
        return Err(OverCap::Pods { open: others.open, cap: limits.max_pods });
    }
    if claim.price_per_hour > limits.max_price_per_hour + ROUNDING {
        return Err(OverCap::PodPrice { price: claim.price_per_hour, cap: limits.max_price_per_hour });
    }
    if others.per_hour + claim.price_per_hour > limits.max_total_per_hour + ROUNDING {
        return Err(OverCap::TotalPerHour {
            there: others.per_hour,
            price: claim.price_per_hour,
            cap: limits.max_total_per_hour,
        });
    }
    for (day, hours) in hours_by_day(claim.from, claim.until) {
        let spent = own.and_then(|record| record.known.cost_by_day.get(&day)).copied().unwrap_or(0.0);
        let there = others.by_day.get(&day).copied().unwrap_or(0.0) + spent;
        let more = claim.price_per_hour * hours;
        if there + more > limits.max_usd_per_day + ROUNDING {
            return Err(OverCap::Day { day, there, claim: more, cap: limits.max_usd_per_day });
        }
    }
    Ok(())
}

/// Whether a pod may live until then, counted from when it was made.
pub fn check_lifetime(record: &PodRecord, until: Timestamp, limits: &Limits) -> Result<(), OverCap> {
    let made = record.known.created_at.unwrap_or(record.wanted.requested_at);
    let longest = SignedDuration::from_mins(i64::from(limits.max_lifetime_minutes));
    if until > later(made, longest) {
        let minutes = until.duration_since(made).as_mins();
        return Err(OverCap::Lifetime { minutes, cap: limits.max_lifetime_minutes });
    }
    Ok(())
}

/// Whether a closed record still counts for the caps of a day.
pub(super) fn still_counts(record: &PodRecord, now: Timestamp) -> bool {
    let yesterday = day(later(now, SignedDuration::from_hours(-24)));
    let spent = record.known.cost_by_day.keys().any(|day| *day >= yesterday);
    record.is_open() || record.known.phase == Phase::Gone && spent
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{Candidate, PodRequest};

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    fn reserving(price: f64, hours: i64, requested_at: Timestamp) -> PodRecord {
        let candidates = vec![Candidate { gpu: "gpu".to_owned(), price_per_hour: price }];
        let request = PodRequest::for_tests();
        let mut record = PodRecord::new("intent".to_owned(), request, candidates, SignedDuration::from_hours(hours));
        record.wanted.requested_at = requested_at;
        record
    }

    #[test]
    fn only_the_part_of_a_reservation_that_falls_into_a_day_counts_there() {
        let evening = at("2026-11-22T22:00:00Z");
        let entries = BTreeMap::from([("one".to_owned(), reserving(1.0, 6, evening))]);
        let there = committed(&entries, None, evening);
        let days: Vec<_> = there.by_day.into_iter().map(|(day, usd)| (day.to_string(), usd.round())).collect();
        assert_eq!(days, [("2026-11-22".to_owned(), 2.0), ("2026-11-23".to_owned(), 4.0)]);
        let limits = Limits { max_usd_per_day: 5.0, ..Limits::default() };
        let claim = |hours| Claim {
            price_per_hour: 1.0,
            from: evening,
            until: later(evening, SignedDuration::from_hours(hours)),
        };
        assert_eq!(check(&entries, "two", claim(3), true, &limits), Ok(()));
        let refused = check(&entries, "two", claim(4), true, &limits);
        let Err(OverCap::Day { day, .. }) = refused else { panic!("{refused:?}") };
        assert_eq!(day.to_string(), "2026-11-23");
    }

    #[test]
    fn each_cap_refuses_what_breaks_it_and_nothing_less() {
        let now = at("2026-11-22T01:00:00Z");
        let limits = Limits::default();
        let until = later(now, SignedDuration::from_hours(1));
        let claim = |price_per_hour| Claim { price_per_hour, from: now, until };
        let none = BTreeMap::new();
        assert_eq!(check(&none, "a", claim(limits.max_price_per_hour), true, &limits), Ok(()));
        assert!(matches!(check(&none, "a", claim(1.51), true, &limits), Err(OverCap::PodPrice { .. })));
        let one = BTreeMap::from([("b".to_owned(), reserving(1.0, 1, now))]);
        let tight = Limits { max_total_per_hour: 2.0, ..limits.clone() };
        assert_eq!(check(&one, "a", claim(1.0), true, &tight), Ok(()));
        assert!(matches!(check(&one, "a", claim(1.01), true, &tight), Err(OverCap::TotalPerHour { .. })));
        let single = Limits { max_pods: 1, ..limits.clone() };
        assert!(matches!(check(&one, "a", claim(0.1), true, &single), Err(OverCap::Pods { .. })));
        assert_eq!(check(&one, "a", claim(0.1), false, &single), Ok(()), "a start makes no more pods");
        let long = later(now, SignedDuration::from_hours(25));
        assert!(matches!(check_lifetime(&one["b"], long, &limits), Err(OverCap::Lifetime { .. })));
    }
}
