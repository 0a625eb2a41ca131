//! A pod as list_pods and get_pod show it: the provider's word joined with our record.

use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::Serialize;

use super::{Found, MountedVolume, Owner, cents, cost_now, mounted_volume, owner_of};
use crate::fleet::{ActionState, HomeIdentity, MountKnown, PodRecord, TURNS_UP_WITHIN, later};
use crate::provider::PodStatus;
use crate::tools::words::usd;
use crate::tunnel::TunnelRecord;

#[derive(Debug, Serialize, JsonSchema)]
pub struct PodRow {
    /// The name by which every tool knows it; the id for a pod without a record.
    pub(super) pod: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pod_id: Option<String>,
    pub(super) owner: Owner,
    /// The provider's word; `PLACING`, `UNKNOWN_OUTCOME`, `CANCELLED` or `ENDING` from our records;
    /// `NOT_LISTED` for a pod of ours that the provider doesn't show.
    pub(super) status: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_center: Option<String>,
    pub(super) price_per_hour: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    volume: Option<MountedVolume>,
    /// Whether the volume was found at its path in the present start.
    #[serde(skip_serializing_if = "Option::is_none")]
    mount: Option<String>,
    /// When the keeper ends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<Timestamp>,
    /// Whether the pod also ends itself then.
    #[serde(skip_serializing_if = "Option::is_none")]
    switch: Option<String>,
    /// When it is ended unless it is used before.
    #[serde(skip_serializing_if = "Option::is_none")]
    idle_ends_at: Option<Timestamp>,
    /// USD so far by our own count, for billed time only.
    #[serde(skip_serializing_if = "Option::is_none")]
    cost_usd: Option<f64>,
    /// The billed time, by its present price.
    #[serde(skip_serializing_if = "Option::is_none")]
    billed_seconds: Option<u64>,
    /// USD it can still cost until its deadline.
    #[serde(skip_serializing_if = "Option::is_none")]
    reserved_usd: Option<f64>,
    /// The last start, stop or restart that was asked for, and what came of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    action: Option<String>,
    /// Of a create without a known outcome.
    #[serde(skip_serializing_if = "Option::is_none")]
    intent: Option<String>,
    /// Addresses of its tunnels on this machine.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tunnels: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) problem: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) next: Option<String>,
}

/// What rows are made with.
pub(super) struct Surroundings {
    pub tunnels: Vec<TunnelRecord>,
    pub identity: Option<HomeIdentity>,
    /// The provider was asked, so that a pod it doesn't show is worth telling.
    pub asked: bool,
}

impl Surroundings {
    pub(super) fn row(&self, found: &Found) -> PodRow {
        let Found { name, record, pod } = found;
        let record = record.as_ref();
        let known = record.map(|record| &record.known);
        let missing = self.is_missing(found);
        let price = match pod {
            Some(pod) => pod.cost_per_hour,
            None if missing => 0.0,
            None => known.map_or(0.0, |known| known.cost_per_hour),
        };
        let pod_id = found.pod_id().map(str::to_owned);
        let status = if missing { "NOT_LISTED".to_owned() } else { status(found) };
        let placed = record.filter(|record| record.known.pod_id.is_some());
        PodRow {
            pod: name.clone(),
            owner: match (record, pod) {
                (Some(_), _) => Owner::Ours,
                (None, Some(pod)) => owner_of(pod, self.identity.as_ref()),
                (None, None) => Owner::Unmanaged,
            },
            status: status.clone(),
            gpu: pod.as_ref().and_then(|pod| pod.gpu.clone()).or_else(|| known?.gpu.clone()),
            data_center: pod.as_ref().and_then(|pod| pod.data_center.clone()).or_else(|| known?.data_center.clone()),
            price_per_hour: cents(price),
            volume: mounted_volume(record, pod.as_ref()),
            mount: placed.and_then(mount),
            expires_at: record.map(PodRecord::expires_at),
            switch: placed.map(switch),
            idle_ends_at: record.and_then(idle_ends_at),
            cost_usd: record.map(|record| cents(cost_now(record))),
            billed_seconds: placed.and_then(billed_seconds),
            reserved_usd: record.map(|record| cents(record.reserved_usd(Timestamp::now()))),
            action: record.and_then(action),
            intent: record.filter(|record| record.is_unknown()).map(|record| record.intent.clone()),
            tunnels: self
                .tunnels
                .iter()
                // One to a stopped pod leads nowhere.
                .filter(|_| status != "EXITED")
                .filter(|tunnel| tunnel.wanted.open && Some(&tunnel.wanted.pod_id) == pod_id.as_ref())
                .filter_map(TunnelRecord::url)
                .collect(),
            problem: record.and_then(|record| self.problem(found, record)),
            next: record.and_then(|record| next(name, record)),
            pod_id,
        }
    }

    /// The provider was asked and doesn't show a pod that we know: it is gone, or its list lags.
    fn is_missing(&self, found: &Found) -> bool {
        let is_known = found.record.as_ref().is_some_and(|record| record.known.pod_id.is_some() && !record.is_ending());
        self.asked && found.pod.is_none() && is_known
    }

    fn problem(&self, found: &Found, record: &PodRecord) -> Option<String> {
        if record.is_unknown() && record.is_ending() {
            return Some(cancelled(record));
        }
        let current = record.known.inside.start == Some(record.known.starts);
        let not_mounted = current && record.known.inside.mount == Some(MountKnown::NotMounted);
        let late = record.is_open() && record.expires_at() < Timestamp::now();
        record
            .known
            .problem
            .clone()
            .or_else(|| {
                self.is_missing(found)
                    .then(|| "the provider doesn't show it; the keeper finds out whether it is gone".to_owned())
            })
            .or_else(|| late.then(|| "its deadline has passed; the keeper is ending it".to_owned()))
            .or_else(|| not_mounted.then(|| "its volume is not mounted: what is written there is lost".to_owned()))
    }
}

impl PodRow {
    /// Without what get_pod tells.
    pub(super) fn concise(self) -> Self {
        Self {
            data_center: None,
            volume: None,
            mount: None,
            switch: None,
            billed_seconds: None,
            reserved_usd: None,
            action: None,
            ..self
        }
    }

    pub(super) fn line(&self) -> String {
        let mut text = format!("{}: {}", self.pod, self.status);
        if let Some(gpu) = &self.gpu {
            text.push_str(&format!(", {gpu}"));
        }
        // Before it is placed it has no price yet.
        match self.reserved_usd {
            Some(reserved) if self.pod_id.is_none() => text.push_str(&format!(", {} set aside", usd(reserved))),
            _ => text.push_str(&format!(", ${:.2}/h", self.price_per_hour)),
        }
        match self.owner {
            Owner::Ours => {}
            Owner::OtherMachine => text.push_str(", of another machine"),
            Owner::Unmanaged => text.push_str(", not made by this program"),
        }
        if let Some(cost) = self.cost_usd.filter(|_| self.pod_id.is_some()) {
            text.push_str(&format!(", {} so far", usd(cost)));
        }
        if let Some(at) = self.expires_at {
            text.push_str(&format!(", ends at {at:.0}"));
        }
        for tunnel in &self.tunnels {
            text.push_str(&format!(", {tunnel}"));
        }
        if let Some(problem) = &self.problem {
            text.push_str(&format!(" ({problem})"));
        }
        if let Some(next) = &self.next {
            text.push_str(&format!(". Next: {next}"));
        }
        text
    }
}

fn status(found: &Found) -> String {
    let record = found.record.as_ref();
    match (record, &found.pod) {
        (Some(record), None) if record.is_unknown() && record.is_ending() => "CANCELLED".to_owned(),
        (Some(record), _) if record.is_ending() => "ENDING".to_owned(),
        (_, Some(pod)) => pod.status.to_string(),
        (Some(record), None) if record.is_unknown() && record.known.problem.is_some() => "UNKNOWN_OUTCOME".to_owned(),
        (Some(record), None) => record.known.status.map_or_else(|| "PLACING".to_owned(), |status| status.to_string()),
        (None, None) => "UNKNOWN".to_owned(),
    }
}

/// What becomes of a create without a known outcome that nobody wants any more.
pub(super) fn cancelled(record: &PodRecord) -> String {
    let (reserved, until) = (record.reserved_usd(Timestamp::now()), record.reserved_until());
    format!(
        "its create had no clear answer and was cancelled: should its pod turn up, it is ended on sight; \
         ${reserved:.2} stay set aside for it until {until:.0}"
    )
}

fn mount(record: &PodRecord) -> Option<String> {
    record.wanted.request.volume.as_ref()?;
    let inside = &record.known.inside;
    if record.known.status == Some(PodStatus::Exited) {
        return Some("not verified: the pod is stopped".to_owned());
    }
    let found = inside.mount.as_ref().filter(|_| inside.start == Some(record.known.starts));
    Some(match found {
        Some(MountKnown::Mounted { free_gb, total_gb }) => {
            format!("verified, {free_gb:.1} of {total_gb:.1} GB are free")
        }
        Some(MountKnown::NotMounted) => "it is not mounted".to_owned(),
        Some(MountKnown::NotVerified { why }) => format!("not verified: {why}"),
        None => "not verified".to_owned(),
    })
}

/// Until when the pod's own switch lets it live, in words.
pub(super) fn switch(record: &PodRecord) -> String {
    let inside = &record.known.inside;
    if record.known.status == Some(PodStatus::Exited) {
        return "not armed: the pod is stopped".to_owned();
    }
    if inside.start != Some(record.known.starts) {
        return "not armed yet".to_owned();
    }
    match (inside.switch_until, &inside.switch_problem) {
        (Some(until), _) => format!("armed until {until:.0}"),
        (None, Some(why)) => format!("not armed: {why}"),
        (None, None) => "not armed yet".to_owned(),
    }
}

fn idle_ends_at(record: &PodRecord) -> Option<Timestamp> {
    let minutes = record.wanted.idle_minutes?;
    let since = record.known.idle_since?;
    Some(later(since, SignedDuration::from_mins(i64::from(minutes))).min(record.expires_at()))
}

fn billed_seconds(record: &PodRecord) -> Option<u64> {
    let seconds = cost_now(record) / record.price() * 3600.0;
    // Without a price there is nothing to count by.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a finite number of seconds above 0")]
    seconds.is_finite().then_some(seconds.max(0.0).round() as u64)
}

fn action(record: &PodRecord) -> Option<String> {
    let wish = record.wanted.action.as_ref()?;
    let known = record.known.action.as_ref().filter(|known| known.id == wish.id);
    let word = super::control::word(wish.action);
    let why = known.and_then(|known| known.problem.as_deref()).map(|why| format!(" ({why})")).unwrap_or_default();
    Some(match known.map(|known| known.state) {
        None => format!("{word}: not sent yet"),
        Some(ActionState::Sent) => format!("{word}: sent{why}"),
        Some(ActionState::Done) => format!("{word}: done"),
        Some(ActionState::Refused) => format!("{word}: refused{why}"),
        Some(ActionState::Unclear) => format!("{word}: sent, without a clear answer{why}"),
    })
}

fn next(name: &str, record: &PodRecord) -> Option<String> {
    if record.is_ending() {
        return None;
    }
    if record.is_unknown() && record.known.problem.is_some() {
        let intent = &record.intent;
        let missing = record.lacked_for();
        return Some(if missing >= TURNS_UP_WITHIN {
            format!(
                "create_pod_with_volume with the same arguments and retry_unknown: \"{intent}\", \
                 or terminate_pod {{\"pod\": \"{name}\"}}"
            )
        } else {
            format!(
                "get_pod {{\"pod\": \"{name}\"}} later: its pod has been missing from the list for {} of {} minutes, \
                 after which retry_unknown creates anew; or terminate_pod {{\"pod\": \"{name}\"}}",
                missing.as_mins(),
                TURNS_UP_WITHIN.as_mins()
            )
        });
    }
    match record.known.status {
        Some(PodStatus::Exited) if record.pending_action().is_none() => {
            Some(format!("control_pod {{\"pod\": \"{name}\", \"action\": \"start\"}}"))
        }
        Some(PodStatus::Error) => Some(format!("terminate_pod {{\"pod\": \"{name}\"}}")),
        _ => None,
    }
}
