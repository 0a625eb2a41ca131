//! Wishes for network volumes as records, in `volumes.json`: what a volume is to be, and how far its one POST has come.
//!
//! A volume's name is not unique at the provider and nothing of ours can be written onto it, so a create without a
//! clear answer is looked for by name and data center among the ids that weren't listed before. Volumes themselves are
//! not recorded: the provider's list is the truth about them.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::TURNS_UP_WITHIN;
use crate::config::Home;
use crate::provider::Volume;
use crate::state::{RecordFile, StateError};
use crate::timing::Timing;

/// USD a GB and month: the standard tier up to 1 TB, for what lies above, and the high-performance tier.
const STANDARD: (f64, f64) = (0.07, 0.05);
const HIGH_PERFORMANCE: f64 = 0.14;
/// A wish that lay about for longer, its keeper dead or the machine asleep, is nobody's wish any more.
const ASKED_FOR_WITHIN: SignedDuration = SignedDuration::from_mins(15);
/// USD a month; less is rounding.
const ROUNDING: f64 = 0.005;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VolumeRecord {
    pub intent: String,
    pub wanted: VolumeWanted,
    pub known: VolumeKnown,
}

/// Written by tools only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VolumeWanted {
    pub name: String,
    pub size_gb: u32,
    pub data_center: String,
    pub requested_at: Timestamp,
    /// The id of the volume that is to grow; `None` for a new one.
    #[serde(default)]
    pub grows: Option<String>,
    /// The intent without a known outcome that this one was allowed to take the place of.
    #[serde(default)]
    pub supersedes: Option<String>,
}

/// Written by the keeper only.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct VolumeKnown {
    pub phase: VolumePhase,
    pub at: Option<Timestamp>,
    pub volume_id: Option<String>,
    pub size_gb: u32,
    pub tier: Option<String>,
    /// Every volume of the account before the POST: none of these is the one that it made.
    pub listed_before: Vec<String>,
    pub posted_at: Option<Timestamp>,
    /// The list has lacked the volume of an unclear create from here to there, by the provider's clock.
    pub lacked: Option<(Timestamp, Timestamp)>,
    /// What went wrong last, in a sentence.
    pub problem: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumePhase {
    /// On disk, nothing sent yet.
    #[default]
    Journaled,
    /// The POST is under way, or was when the keeper died.
    Posting,
    /// There was no clear answer; the list is searched.
    Unknown,
    /// It is there, as large as wanted.
    Placed,
    /// Definitely not made or grown.
    Refused,
}

impl VolumeRecord {
    pub fn new(intent: String, wanted: VolumeWanted) -> Self {
        Self { intent, wanted, known: VolumeKnown::default() }
    }

    /// Its key in the file. No data center's id holds a slash.
    pub fn key(&self) -> String {
        format!("{}/{}", self.wanted.data_center, self.wanted.name)
    }

    /// Neither settled nor given up: it may come to cost money, and the keeper has work with it.
    pub fn is_open(&self) -> bool {
        matches!(self.known.phase, VolumePhase::Journaled | VolumePhase::Posting | VolumePhase::Unknown)
    }

    /// Whether nobody would expect it to be carried out any more.
    pub fn is_stale(&self) -> bool {
        self.known.phase == VolumePhase::Journaled
            && Timestamp::now().duration_since(self.wanted.requested_at) > ASKED_FOR_WITHIN
    }

    /// Whether its request is still to be sent, or is under way: then another account's key must not come between.
    pub fn is_being_sent(&self) -> bool {
        let sent = matches!(self.known.phase, VolumePhase::Journaled | VolumePhase::Posting);
        sent && Timestamp::now().duration_since(self.wanted.requested_at) < ASKED_FOR_WITHIN
    }

    /// The create had no clear answer and no volume was found since.
    pub fn is_unknown(&self) -> bool {
        matches!(self.known.phase, VolumePhase::Posting | VolumePhase::Unknown) && self.wanted.grows.is_none()
    }

    /// For how long the list has lacked the volume of an unclear create.
    pub fn lacked_for(&self) -> SignedDuration {
        self.known.lacked.map_or(SignedDuration::ZERO, |(from, to)| to.duration_since(from))
    }

    pub fn volume_id(&self) -> Option<&String> {
        self.known.volume_id.as_ref().or(self.wanted.grows.as_ref())
    }

    /// Whether a listed volume can be what an unclear create made.
    pub fn may_be(&self, volume: &Volume) -> bool {
        volume.name == self.wanted.name
            && volume.data_center == self.wanted.data_center
            && !self.known.listed_before.contains(&volume.id)
    }

    /// Takes over a volume that is as it was wanted.
    pub fn place(&mut self, volume: &Volume) {
        let known = &mut self.known;
        known.phase = VolumePhase::Placed;
        known.volume_id = Some(volume.id.clone());
        known.size_gb = volume.size_gb;
        known.tier = volume.tier.clone();
        known.problem = None;
    }

    /// The size that money is counted for.
    fn counted_gb(&self) -> u32 {
        if self.is_open() { self.wanted.size_gb.max(self.known.size_gb) } else { self.known.size_gb }
    }

    /// Whether it says more than a list that was asked for then: the list may lag behind what was just made.
    fn is_newer_than(&self, listed_at: Timestamp, lag: Duration) -> bool {
        let lag = SignedDuration::try_from(lag).unwrap_or(SignedDuration::ZERO);
        self.known.phase == VolumePhase::Placed && self.known.at.is_some_and(|at| listed_at.duration_since(at) < lag)
    }
}

/// The account's volumes, and when they were asked for.
#[derive(Debug, Clone)]
pub struct VolumeList {
    pub volumes: Vec<Volume>,
    pub at: Timestamp,
}

/// What all network volumes would cost, which is more than the config allows.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error(
    "all network volumes together would cost ${after:.2} a month (${there:.2} now; $0.07 a GB and month up to 1 TB, $0.05 for what lies above, $0.14 in the high-performance tier), and the cap is ${cap:.2} (limits.max_volumes_per_month)"
)]
pub struct OverVolumeCap {
    pub there: f64,
    pub after: f64,
    pub cap: f64,
}

/// What asking for a volume came to.
#[derive(Debug)]
pub enum EnsuredVolume {
    /// This call made the intent.
    New(VolumeRecord),
    /// One that is large enough is in the making, or was made a moment ago.
    Joined(VolumeRecord),
    /// A smaller one is in the making.
    Busy(VolumeRecord),
    /// The create that was to be superseded may still turn up.
    TooEarly(VolumeRecord),
    OverCap(OverVolumeCap),
}

/// The records of this home's wishes for volumes.
#[derive(Debug, Clone)]
pub struct Volumes {
    records: RecordFile<VolumeRecord>,
    lag: Duration,
}

impl Volumes {
    pub fn new(home: &Home, timing: &Timing) -> Self {
        Self {
            records: RecordFile::new(home.volumes_file(), home.lock("state"), timing.state_lock),
            lag: timing.provider_lag,
        }
    }

    pub fn read(&self) -> Result<BTreeMap<String, VolumeRecord>, StateError> {
        Ok(self.records.read()?.entries)
    }

    /// Whether the keeper is at work on any. Takes no lock, so it can be asked under the one over the records.
    pub fn is_any_being_sent(&self) -> Result<bool, StateError> {
        Ok(self.records.look()?.entries.values().any(VolumeRecord::is_being_sent))
    }

    pub fn of_intent(&self, intent: &str) -> Result<Option<VolumeRecord>, StateError> {
        Ok(self.read()?.into_values().find(|record| record.intent == intent))
    }

    /// Joins what is under way for that name and data center, or writes the intent when the cap leaves room: decided in
    /// one go under the lock.
    pub async fn ensure(&self, list: &VolumeList, fresh: VolumeRecord, cap: f64) -> Result<EnsuredVolume, StateError> {
        let (list, lag) = (list.clone(), self.lag);
        self.records.change(move |entries| ensure(entries, &list, lag, fresh, cap)).await
    }

    /// What all volumes cost a month, those in the making with them.
    pub fn total_monthly_usd(&self, list: &VolumeList) -> Result<f64, StateError> {
        Ok(total_monthly_usd(&self.read()?, list, self.lag))
    }

    /// The records that say more than the list: what is in the making, and what was made a moment ago.
    pub fn beyond(&self, list: &VolumeList) -> Result<Vec<VolumeRecord>, StateError> {
        Ok(self
            .read()?
            .into_values()
            .filter(|record| record.is_open() || record.is_newer_than(list.at, self.lag))
            .collect())
    }

    /// Writes what the keeper knows of an intent; `None` when no record has it.
    pub async fn know(
        &self,
        intent: &str,
        change: impl FnOnce(&mut VolumeRecord) + Send + 'static,
    ) -> Result<Option<VolumeRecord>, StateError> {
        let intent = intent.to_owned();
        self.records
            .change(move |entries| {
                let record = entries.values_mut().find(|record| record.intent == intent)?;
                change(record);
                record.known.at = Some(Timestamp::now());
                Some(record.clone())
            })
            .await
    }

    /// Writes a record again that has left the file; false when another one stands in its place.
    pub async fn restore(&self, record: VolumeRecord) -> Result<bool, StateError> {
        self.records
            .change(move |entries| {
                let is_free = !entries.contains_key(&record.key());
                if is_free {
                    entries.insert(record.key(), record);
                }
                is_free
            })
            .await
    }

    /// Drops what is settled of a volume that is gone.
    pub async fn forget(&self, volume_id: &str) -> Result<(), StateError> {
        let id = volume_id.to_owned();
        self.records
            .change(move |entries| entries.retain(|_, record| record.is_open() || record.volume_id() != Some(&id)))
            .await
    }
}

fn ensure(
    entries: &mut BTreeMap<String, VolumeRecord>,
    list: &VolumeList,
    lag: Duration,
    mut fresh: VolumeRecord,
    cap: f64,
) -> EnsuredVolume {
    let key = fresh.key();
    if let Some(record) = entries.get(&key).filter(|record| record.is_open()) {
        let superseded = record.is_unknown() && fresh.wanted.supersedes.as_ref() == Some(&record.intent);
        if superseded && record.lacked_for() < TURNS_UP_WITHIN {
            return EnsuredVolume::TooEarly(record.clone());
        }
        if !superseded {
            let is_enough = record.wanted.size_gb >= fresh.wanted.size_gb;
            let record = record.clone();
            return if is_enough { EnsuredVolume::Joined(record) } else { EnsuredVolume::Busy(record) };
        }
    } else if let Some(record) = entries.get(&key).filter(|record| record.is_newer_than(list.at, lag)) {
        if record.known.size_gb >= fresh.wanted.size_gb {
            return EnsuredVolume::Joined(record.clone());
        }
        // The caller's list didn't show it yet.
        fresh.wanted.grows = record.known.volume_id.clone();
    }
    let there = total_monthly_usd(entries, list, lag);
    let mut with_it = entries.clone();
    with_it.insert(key, fresh.clone());
    let after = total_monthly_usd(&with_it, list, lag);
    if after > cap + ROUNDING {
        return EnsuredVolume::OverCap(OverVolumeCap { there, after, cap });
    }
    *entries = with_it;
    EnsuredVolume::New(fresh)
}

/// What is listed, and of the records what the list can't show yet.
fn total_monthly_usd(entries: &BTreeMap<String, VolumeRecord>, list: &VolumeList, lag: Duration) -> f64 {
    let listed = list.volumes.iter().map(|volume| (volume.id.as_str(), (volume.size_gb, volume.tier.as_deref())));
    let mut volumes: BTreeMap<&str, (u32, Option<&str>)> = listed.collect();
    for record in entries.values().filter(|record| record.is_open() || record.is_newer_than(list.at, lag)) {
        let turned_up = || list.volumes.iter().find(|volume| record.is_unknown() && record.may_be(volume));
        let id = record.volume_id().or_else(|| turned_up().map(|volume| &volume.id)).unwrap_or(&record.intent);
        let (size, _) = volumes.entry(id).or_insert((0, record.known.tier.as_deref()));
        *size = record.counted_gb().max(*size);
    }
    // An empty sum of floats is -0.0.
    volumes.values().fold(0.0, |sum, (size_gb, tier)| sum + monthly_usd(*size_gb, *tier))
}

/// What a volume costs a month, with no pod attached too.
pub fn monthly_usd(size_gb: u32, tier: Option<&str>) -> f64 {
    let usd = match tier {
        Some("HIGH_PERFORMANCE") => f64::from(size_gb) * HIGH_PERFORMANCE,
        _ => f64::from(size_gb.min(1000)) * STANDARD.0 + f64::from(size_gb.saturating_sub(1000)) * STANDARD.1,
    };
    (usd * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(sizes: &[u32]) -> VolumeList {
        let volume = |(number, size_gb): (usize, &u32)| Volume {
            id: format!("v{number}"),
            name: format!("volume-{number}"),
            size_gb: *size_gb,
            data_center: "DC-1".to_owned(),
            tier: Some("STANDARD".to_owned()),
        };
        VolumeList { volumes: sizes.iter().enumerate().map(volume).collect(), at: Timestamp::now() }
    }

    fn wish(name: &str, size_gb: u32) -> VolumeRecord {
        VolumeRecord::new(
            super::super::new_intent(),
            VolumeWanted {
                name: name.to_owned(),
                size_gb,
                data_center: "DC-1".to_owned(),
                requested_at: Timestamp::now(),
                grows: None,
                supersedes: None,
            },
        )
    }

    const LAG: Duration = Duration::from_secs(60);

    #[test]
    fn the_price_follows_size_and_tier() {
        let high = Some("HIGH_PERFORMANCE");
        let prices = [(10, None), (1000, Some("STANDARD")), (2000, None), (100, high)];
        assert_eq!(prices.map(|(size, tier)| monthly_usd(size, tier)), [0.7, 70.0, 120.0, 14.0]);
    }

    #[test]
    fn the_cap_counts_what_is_listed_in_the_making_or_just_made_and_each_once() {
        let mut entries = BTreeMap::new();
        // 7 there, 7 in the making.
        assert!(matches!(ensure(&mut entries, &listing(&[100]), LAG, wish("a", 100), 14.0), EnsuredVolume::New(_)));
        let refused = ensure(&mut entries, &listing(&[100]), LAG, wish("b", 10), 14.0);
        let EnsuredVolume::OverCap(over) = refused else { panic!("{refused:?}") };
        assert_eq!((over.there, over.after, over.cap), (14.0, 14.7, 14.0));
        // Made, and not listed yet.
        let volume = Volume { id: "v9".to_owned(), name: "a".to_owned(), ..listing(&[100]).volumes.remove(0) };
        let made = entries.get_mut("DC-1/a").expect("the record");
        made.place(&volume);
        made.known.at = Some(Timestamp::now());
        assert_eq!(total_monthly_usd(&entries, &listing(&[100]), LAG), 14.0);
        let mut list = listing(&[100]);
        list.volumes.push(volume);
        assert_eq!(total_monthly_usd(&entries, &list, LAG), 14.0, "listed, and counted once");
        // Growing counts by the size it comes to.
        let mut growing = wish("volume-0", 200);
        growing.wanted.grows = Some("v0".to_owned());
        assert!(matches!(ensure(&mut entries, &list, LAG, growing, 21.0), EnsuredVolume::New(_)));
        assert_eq!(total_monthly_usd(&entries, &list, LAG), 21.0);
    }

    #[test]
    fn one_that_was_just_made_is_joined_or_grown_though_no_list_shows_it() {
        let list = listing(&[]);
        let mut made = wish("a", 50);
        made.place(&Volume { id: "v1".to_owned(), name: "a".to_owned(), ..listing(&[50]).volumes.remove(0) });
        made.known.at = Some(Timestamp::now());
        let mut entries = BTreeMap::from([(made.key(), made.clone())]);
        assert!(matches!(ensure(&mut entries, &list, LAG, wish("a", 20), 50.0), EnsuredVolume::Joined(_)));
        let grown = ensure(&mut entries, &list, LAG, wish("a", 60), 50.0);
        assert!(
            matches!(&grown, EnsuredVolume::New(record) if record.wanted.grows.as_deref() == Some("v1")),
            "{grown:?}"
        );
        // Long after, only the list counts.
        made.known.at = Some(Timestamp::now() - SignedDuration::from_mins(5));
        let mut entries = BTreeMap::from([(made.key(), made)]);
        let anew = ensure(&mut entries, &list, LAG, wish("a", 20), 50.0);
        assert!(matches!(&anew, EnsuredVolume::New(record) if record.wanted.grows.is_none()), "{anew:?}");
    }
}
