//! Our pods and our money as records: what is wanted of each pod and what is known of it, in `pods.json`; caps and
//! reservations over them; the audit log.
//!
//! Tools write `wanted`, the keeper writes `known`. The cloud is the truth about pods; a record holds what the cloud
//! can't know: who asked for what, until when, and how far the one POST has come.
//!
//! A record stands under its pod's name. One that had to make room for a new pod of that name (its pod is gone but
//! counts for the day's cap, or its create has no known outcome) stands under `name~intent`.

mod audit;
mod money;
mod owner;
mod record;
mod request;
mod use_mark;
mod volumes;

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};

use crate::config::{Home, Limits};
use crate::provider::{PodAction, PodStatus};
use crate::state::{RecordFile, StateError};
use crate::timing::Timing;

pub use audit::{Actor, Audit};
pub use money::{Claim, Committed, OverCap, check, check_lifetime, committed, day, hours, hours_by_day};
pub use owner::{ENV_EXPIRES_AT, ENV_OWNER, HomeIdentity};
pub use record::{
    ActionKnown, ActionState, ActionWish, Attempt, Candidate, Inside, MountKnown, Phase, PodKnown, PodRecord,
    PodWanted, Reached, WantedState,
};
pub use request::{EnvValue, PodRequest};
pub use volumes::{
    EnsuredVolume, OverVolumeCap, VolumeKnown, VolumeList, VolumePhase, VolumeRecord, VolumeWanted, Volumes,
    monthly_usd,
};

/// A create without a clear answer may be made anew once the list has lacked its pod for so long.
pub const TURNS_UP_WITHIN: SignedDuration = SignedDuration::from_mins(10);

/// For so long a pod that is gone is still known by its name, to who asks for its end again or for what it cost.
const REMEMBERED_FOR: SignedDuration = SignedDuration::from_hours(7 * 24);

/// Stands between a name and an intent in the key of a record that made room; no name holds it.
const MADE_ROOM: char = '~';

/// The records of this home's pods.
#[derive(Debug, Clone)]
pub struct Fleet {
    pub home: Home,
    records: RecordFile<PodRecord>,
}

/// What asking for a pod by name came to.
#[derive(Debug)]
pub enum Ensured {
    /// This call made the intent.
    New(PodRecord),
    /// There is one by that name with the same request.
    Joined(PodRecord),
    Differs {
        differences: Vec<String>,
        record: PodRecord,
    },
    BeingTerminated(PodRecord),
    InError(PodRecord),
    /// The create that was to be superseded may still turn up.
    TooEarly(PodRecord),
    OverCap(OverCap),
}

/// What changing a pod that is there came to.
#[derive(Debug)]
pub enum Changed {
    Written(PodRecord),
    /// No open record has that intent any more.
    NotThere,
    BeingTerminated(PodRecord),
    /// Another action is under way.
    Busy(PodRecord),
    OverCap(OverCap),
}

/// The pod's name in the key of a record.
pub fn name_of(key: &str) -> &str {
    key.split(MADE_ROOM).next().unwrap_or(key)
}

impl Fleet {
    pub fn new(home: &Home, timing: &Timing) -> Self {
        Self { home: home.clone(), records: RecordFile::new(home.pods_file(), home.lock("state"), timing.state_lock) }
    }

    pub fn read(&self) -> Result<BTreeMap<String, PodRecord>, StateError> {
        Ok(self.records.read()?.entries)
    }

    /// Whether any pod may cost money. Takes no lock, so it can be asked under the one over the records.
    pub fn has_open(&self) -> Result<bool, StateError> {
        Ok(self.records.look()?.entries.values().any(PodRecord::is_open))
    }

    pub fn get(&self, name: &str) -> Result<Option<PodRecord>, StateError> {
        Ok(self.read()?.remove(name))
    }

    /// The record of an intent, whatever key it stands under.
    pub fn of_intent(&self, intent: &str) -> Result<Option<PodRecord>, StateError> {
        Ok(self.read()?.into_values().find(|record| record.intent == intent))
    }

    /// Finds the pod of that name, or writes the intent for `fresh` when the caps leave room: decided in one go under
    /// the lock, so that of any number of callers one makes the pod and the others join it.
    pub async fn ensure(&self, name: &str, fresh: PodRecord, limits: &Limits) -> Result<Ensured, StateError> {
        let (name, limits) = (name.to_owned(), limits.clone());
        self.records.change(move |entries| ensure(entries, &name, fresh, &limits)).await
    }

    /// What [`Self::ensure`] would find, without making an intent; `None` where it would make one.
    pub fn join(&self, name: &str, fresh: &PodRecord) -> Result<Option<Ensured>, StateError> {
        let there = self.get(name)?.filter(PodRecord::is_open);
        Ok(there.and_then(|record| found(record, fresh)))
    }

    /// Marks the pod as not wanted any more; `None` when no open record has that intent.
    pub async fn want_gone(&self, intent: &str) -> Result<Option<PodRecord>, StateError> {
        self.change(intent, |record| record.is_open().then(|| record.wanted.state = WantedState::Gone))
            .await
            .map(|changed| changed.and_then(|(record, was_open)| was_open.map(|()| record)))
    }

    /// Wants the pod started, stopped or restarted. The same wish while one is under way joins it.
    pub async fn want_action(&self, intent: &str, wish: ActionWish, limits: &Limits) -> Result<Changed, StateError> {
        let limits = limits.clone();
        self.change_wanted(intent, move |entries, name, record| {
            if let Some(pending) = record.pending_action() {
                return if pending.action == wish.action {
                    Ok(())
                } else {
                    Err(Box::new(Changed::Busy(record.clone())))
                };
            }
            if wish.action == PodAction::Start {
                // A pod whose price was never told may cost what the cap allows, and is ended if it costs more.
                let most = *record.wanted.max_price_per_hour.get_or_insert(limits.max_price_per_hour);
                let price_per_hour = if record.price() > 0.0 { record.price() } else { most };
                let claim = Claim { price_per_hour, from: Timestamp::now(), until: record.reserved_until() };
                check(entries, name, claim, false, &limits).map_err(over_cap)?;
            }
            record.wanted.action = Some(wish);
            Ok(())
        })
        .await
    }

    /// Wants a later deadline.
    pub async fn want_extended(&self, intent: &str, until: Timestamp, limits: &Limits) -> Result<Changed, StateError> {
        let limits = limits.clone();
        self.change_wanted(intent, move |entries, name, record| {
            if until <= record.reserved_until() {
                return Ok(());
            }
            check_lifetime(record, until, &limits).map_err(over_cap)?;
            // What it has cost since that was counted last is neither spent in the books nor set aside otherwise.
            let now = Timestamp::now();
            let from = record.known.cost_counted_at.map_or(now, |counted_at| counted_at.min(now));
            let claim = Claim { price_per_hour: record.reserved_per_hour(), from, until };
            check(entries, name, claim, false, &limits).map_err(over_cap)?;
            let more = until.duration_since(record.reserved_until()).as_secs();
            record.wanted.lifetime_seconds = record.wanted.lifetime_seconds.saturating_add(more);
            record.wanted.extended_until = Some(until);
            Ok(())
        })
        .await
    }

    /// Writes what the keeper knows of an intent; `None` when no record has it.
    pub async fn know(
        &self,
        intent: &str,
        change: impl FnOnce(&mut PodRecord) + Send + 'static,
    ) -> Result<Option<PodRecord>, StateError> {
        let known = self.change(intent, |record| {
            change(record);
            record.known.at = Some(Timestamp::now());
            if !matches!(record.known.phase, Phase::Journaled | Phase::Posting) {
                let salt = record.intent.clone();
                record.wanted.request.forget_env_values(&salt);
            }
        });
        Ok(known.await?.map(|(record, ())| record))
    }

    /// Takes a pod into the records that no open one knows; false when one does, or when the name is taken.
    pub async fn adopt(&self, name: &str, record: PodRecord) -> Result<bool, StateError> {
        let name = name.to_owned();
        self.records
            .change(move |entries| {
                let id = record.known.pod_id.clone();
                let same = |other: &PodRecord| id.is_some() && other.is_open() && other.known.pod_id == id;
                if entries.values().any(same) || entries.get(&name).is_some_and(PodRecord::is_open) {
                    return false;
                }
                make_room(entries, &name, Timestamp::now());
                entries.insert(name, record);
                true
            })
            .await
    }

    /// Writes a record again that has left the file, beside the one that may have been given its name meanwhile.
    pub async fn restore(&self, name: &str, record: PodRecord) -> Result<bool, StateError> {
        let beside = format!("{name}{MADE_ROOM}{}", record.intent);
        Ok(self.adopt(name, record.clone()).await? || self.adopt(&beside, record).await?)
    }

    async fn change<R: Send + 'static>(
        &self,
        intent: &str,
        change: impl FnOnce(&mut PodRecord) -> R + Send + 'static,
    ) -> Result<Option<(PodRecord, R)>, StateError> {
        let intent = intent.to_owned();
        self.records
            .change(move |entries| {
                let record = entries.values_mut().find(|record| record.intent == intent)?;
                let result = change(record);
                Some((record.clone(), result))
            })
            .await
    }

    /// Changes what is wanted of an open pod, with a look at all records for the caps. Nothing is changed on an error.
    async fn change_wanted(
        &self,
        intent: &str,
        change: impl FnOnce(&BTreeMap<String, PodRecord>, &str, &mut PodRecord) -> Result<(), Box<Changed>> + Send + 'static,
    ) -> Result<Changed, StateError> {
        let intent = intent.to_owned();
        self.records
            .change(move |entries| {
                let found = entries.iter().find(|(_, record)| record.intent == intent && record.is_open());
                let Some((name, mut record)) = found.map(|(name, record)| (name.clone(), record.clone())) else {
                    return Changed::NotThere;
                };
                if record.is_ending() {
                    return Changed::BeingTerminated(record);
                }
                if let Err(refused) = change(entries, &name, &mut record) {
                    return *refused;
                }
                entries.insert(name, record.clone());
                Changed::Written(record)
            })
            .await
    }
}

/// What an open record means for a create by its name; `None` when it makes room for a new one.
fn found(record: PodRecord, fresh: &PodRecord) -> Option<Ensured> {
    let differences = record.wanted.request.differences(&record.intent, &fresh.wanted.request);
    Some(if record.is_unknown() && fresh.wanted.supersedes.as_ref() == Some(&record.intent) {
        if record.lacked_for() >= TURNS_UP_WITHIN {
            return None;
        }
        Ensured::TooEarly(record)
    } else if record.is_ending() {
        Ensured::BeingTerminated(record)
    } else if !differences.is_empty() {
        Ensured::Differs { differences, record }
    } else if record.known.status == Some(PodStatus::Error) {
        Ensured::InError(record)
    } else {
        Ensured::Joined(record)
    })
}

fn ensure(entries: &mut BTreeMap<String, PodRecord>, name: &str, fresh: PodRecord, limits: &Limits) -> Ensured {
    let open = entries.get(name).filter(|record| record.is_open()).cloned();
    let superseded = open.is_some();
    if let Some(found) = open.and_then(|record| found(record, &fresh)) {
        return found;
    }
    let now = Timestamp::now();
    let claim = Claim { price_per_hour: fresh.reserved_per_hour(), from: now, until: fresh.expires_at() };
    let mut others = entries.clone();
    if let Some(record) = others.get_mut(name).filter(|_| superseded) {
        // Its pod is ended on sight; until its deadline its money stays set aside.
        record.wanted.state = WantedState::Gone;
    }
    make_room(&mut others, name, now);
    if let Err(over) = check(&others, name, claim, true, limits) {
        return Ensured::OverCap(over);
    }
    *entries = others;
    entries.insert(name.to_owned(), fresh.clone());
    Ensured::New(fresh)
}

fn over_cap(over: OverCap) -> Box<Changed> {
    Box::new(Changed::OverCap(over))
}

/// Moves the record of that name out of the way where it still counts, and drops those that count no more.
fn make_room(entries: &mut BTreeMap<String, PodRecord>, name: &str, now: Timestamp) {
    if let Some(record) = entries.remove(name)
        && money::still_counts(&record, now)
    {
        entries.insert(format!("{name}{MADE_ROOM}{}", record.intent), record);
    }
    entries.retain(|key, record| {
        let is_remembered = !key.contains(MADE_ROOM) && closed_for(record, now) < REMEMBERED_FOR;
        is_remembered || money::still_counts(record, now)
    });
}

fn closed_for(record: &PodRecord, now: Timestamp) -> SignedDuration {
    let closed_at = record.known.gone_at.or(record.known.at).unwrap_or(record.wanted.requested_at);
    now.duration_since(closed_at)
}

/// Times come from outside and may lie at the end of all time, where adding would panic.
pub fn later(from: Timestamp, by: SignedDuration) -> Timestamp {
    from.saturating_add(by).unwrap_or(from)
}

/// A short random id for an intent.
pub fn new_intent() -> String {
    uuid::Uuid::new_v4().simple().to_string()[..12].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(intent: &str) -> PodRecord {
        let candidates = vec![Candidate { gpu: "gpu".to_owned(), price_per_hour: 1.0 }];
        PodRecord::new(intent.to_owned(), PodRequest::for_tests(), candidates, SignedDuration::from_hours(1))
    }

    fn closed(intent: &str, days_ago: i64) -> PodRecord {
        let mut record = open(intent);
        let at = later(Timestamp::now(), SignedDuration::from_hours(-24 * days_ago));
        record.known.cost_by_day.insert(day(at), 1.0);
        record.close(at);
        record.known.gone_at = Some(at);
        record
    }

    #[test]
    fn a_closed_record_makes_room_but_counts_for_its_day_and_is_forgotten_in_the_end() {
        let mut entries = BTreeMap::from([
            ("comfy".to_owned(), closed("first", 0)),
            ("last-week".to_owned(), closed("old", 5)),
            ("last-month".to_owned(), closed("older", 30)),
            ("comfy~ancient".to_owned(), closed("ancient", 3)),
            ("running".to_owned(), open("open")),
        ]);
        let limits = Limits { max_pods: 9, ..Limits::default() };
        let made = ensure(&mut entries, "comfy", open("second"), &limits);
        assert!(matches!(made, Ensured::New(_)), "{made:?}");
        let keys: Vec<_> = entries.keys().map(String::as_str).collect();
        assert_eq!(keys, ["comfy", "comfy~first", "last-week", "running"]);
        assert_eq!(entries["comfy~first"].cloud_name("comfy~first"), "autopod-comfy-first");
        let there = committed(&entries, None, Timestamp::now());
        assert_eq!(there.open, ["comfy", "running"]);
        assert!((there.per_hour - 2.0).abs() < 0.001, "{there:?}");
    }

    /// A home of its own with these records.
    async fn fleet(records: &[(&str, PodRecord)]) -> (tempfile::TempDir, Fleet) {
        let folder = tempfile::tempdir().expect("a folder");
        let fleet = Fleet::new(&Home::open(folder.path().join("home")).expect("a home"), &Timing::default());
        for (name, record) in records {
            assert!(fleet.adopt(name, record.clone()).await.expect("written"));
        }
        (folder, fleet)
    }

    fn running(intent: &str, price: f64) -> PodRecord {
        let mut record = open(intent);
        record.known.phase = Phase::Placed;
        record.known.pod_id = Some(format!("id-{intent}"));
        record.known.status = Some(PodStatus::Running);
        (record.known.cost_per_hour, record.known.price_per_hour) = (price, price);
        record
    }

    #[tokio::test]
    async fn a_lost_record_comes_back_beside_the_one_that_has_its_name() {
        let (_folder, fleet) = fleet(&[("comfy", open("second"))]).await;
        assert!(fleet.restore("comfy", open("first")).await.expect("written"));
        let keys: Vec<_> = fleet.read().expect("records").into_keys().collect();
        assert_eq!(keys, ["comfy", "comfy~first"]);
        // One whose pod is known there already is there.
        assert!(fleet.restore("comfy", running("third", 0.1)).await.expect("written"));
        assert!(!fleet.restore("comfy", running("third", 0.1)).await.expect("not written"));
    }

    /// What it has cost since the books were last written is claimed with the rest.
    #[tokio::test]
    async fn more_time_counts_from_where_the_cost_was_counted() {
        let (hour, now) = (SignedDuration::from_hours(1), Timestamp::now());
        let (counted_at, expires_at) = (later(now, -hour * 3), later(now, SignedDuration::from_mins(1)));
        let mut record = running("one", 1.0);
        record.wanted.requested_at = counted_at;
        record.known.created_at = Some(counted_at);
        record.known.cost_counted_at = Some(counted_at);
        record.known.expires_at = Some(expires_at);
        let (_folder, fleet) = fleet(&[("comfy", record)]).await;
        // Of three hours at least one and a half lie in one day, whenever this runs.
        let limits = Limits { max_usd_per_day: 1.4, ..Limits::default() };
        let until = later(expires_at, SignedDuration::from_mins(5));
        let refused = fleet.want_extended("one", until, &limits).await.expect("written");
        assert!(matches!(refused, Changed::OverCap(OverCap::Day { .. })), "{refused:?}");
    }

    #[test]
    fn an_unknown_create_is_superseded_only_after_the_list_has_lacked_it_for_ten_minutes() {
        let mut unknown = open("lost");
        unknown.known.phase = Phase::Unknown;
        let mut fresh = open("again");
        fresh.wanted.supersedes = Some("lost".to_owned());
        let limits = Limits::default();
        let lacked = |minutes| {
            let mut record = unknown.clone();
            let from = Timestamp::now();
            record.known.lacked = Some((from, later(from, SignedDuration::from_mins(minutes))));
            BTreeMap::from([("comfy".to_owned(), record)])
        };
        let mut early = lacked(9);
        assert!(matches!(ensure(&mut early, "comfy", fresh.clone(), &limits), Ensured::TooEarly(_)));
        assert_eq!(early["comfy"].wanted.state, WantedState::Present);
        // One more pod than the caps allow supersedes nothing.
        let full = Limits { max_pods: 1, ..Limits::default() };
        let mut refused = lacked(10);
        assert!(matches!(ensure(&mut refused, "comfy", fresh.clone(), &full), Ensured::OverCap(_)));
        assert_eq!(refused["comfy"].wanted.state, WantedState::Present);
        let mut late = lacked(10);
        assert!(matches!(ensure(&mut late, "comfy", fresh.clone(), &limits), Ensured::New(_)));
        assert_eq!((late["comfy"].intent.as_str(), late["comfy~lost"].wanted.state), ("again", WantedState::Gone));
        // The same call again, after a lost answer, finds what it made.
        assert!(matches!(ensure(&mut late, "comfy", fresh, &limits), Ensured::Joined(_)));
    }
}
