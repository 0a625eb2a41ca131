//! Pods: create, list, get, control, logs, terminate. What they share is here: finding a pod by name or id, and what it
//! costs.

mod agree;
mod control;
mod create;
mod get;
mod list;
mod logs;
mod placement;
mod reach;
mod row;
mod terminate;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::Serialize;

use super::context::Services;
use super::words::usd;
use super::{ErrorKind, StillBilling, ToolError};
use crate::fleet::{ENV_OWNER, HomeIdentity, Phase, PodRecord};
use crate::provider::{Pod, PodStatus, ProviderError};

pub use control::ControlPod;
pub use create::CreatePodWithVolume;
pub use get::GetPod;
pub use list::ListPods;
pub use logs::{PodLogs, follow_pod_logs};
pub use reach::reach_pod;
pub use terminate::TerminatePod;

/// As many are named where one has to be chosen.
const MOST_NAMES: usize = 20;

/// A pod as it was found: in our records, at the provider, or in both.
#[derive(Debug, Clone)]
pub(super) struct Found {
    /// Its name in our records, else its id.
    pub name: String,
    pub record: Option<PodRecord>,
    pub pod: Option<Pod>,
}

impl Found {
    pub(super) fn pod_id(&self) -> Option<&str> {
        self.pod.as_ref().map(|pod| pod.id.as_str()).or_else(|| self.record.as_ref()?.known.pod_id.as_deref())
    }
}

/// Whose a pod is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Owner {
    Ours,
    OtherMachine,
    Unmanaged,
}

pub(super) fn owner_of(pod: &Pod, identity: Option<&HomeIdentity>) -> Owner {
    match (pod.env.get(ENV_OWNER), identity) {
        (Some(owner), Some(identity)) if *owner == identity.owner => Owner::Ours,
        (Some(_), _) => Owner::OtherMachine,
        (None, _) => Owner::Unmanaged,
    }
}

/// Every pod there is, and when that was so by the provider's clock.
pub(super) struct Listed {
    pub pods: Vec<Found>,
    date: Option<Timestamp>,
}

/// Every open pod of the account, the provider's list joined with our records; or our records alone when no key is
/// set. A listing that fails is an error, never "none".
pub(super) async fn all(services: &Services) -> Result<Listed, ToolError> {
    let records = services.fleet.read()?;
    let mut open: Vec<_> = records.into_iter().filter(|(_, record)| record.is_open()).collect();
    let mut found = Vec::new();
    let mut date = None;
    if let Some(provider) = &services.provider {
        let listed = provider.pods().await?;
        date = listed.date;
        for pod in listed.value {
            if pod.status == PodStatus::Terminated {
                continue;
            }
            let ours = open.iter().position(|(name, record)| record.is_of(name, &pod));
            let (name, record) = match ours {
                Some(index) => {
                    let (name, record) = open.swap_remove(index);
                    (name, Some(record))
                }
                None => (pod.id.clone(), None),
            };
            found.push(Found { name, record, pod: Some(pod) });
        }
    }
    found.extend(open.into_iter().map(|(name, record)| Found { name, record: Some(record), pod: None }));
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Listed { pods: found, date })
}

/// The pod of that name or id. Our records answer for our own; the provider is asked about others.
pub(super) async fn find(services: &Services, wanted: &str) -> Result<Found, ToolError> {
    let records = services.fleet.read()?;
    let ours = records
        .iter()
        .find(|(name, record)| record.is_open() && (*name == wanted || record.known.pod_id.as_deref() == Some(wanted)));
    if let Some((name, record)) = ours {
        return Ok(Found { name: name.clone(), record: Some(record.clone()), pod: None });
    }
    let everything = all(services).await?.pods;
    let same = |found: &&Found| {
        found.name == wanted || found.pod.as_ref().is_some_and(|pod| pod.id == wanted || pod.name == wanted)
    };
    let matching: Vec<_> = everything.iter().filter(same).collect();
    match matching.as_slice() {
        [only] => Ok((*only).clone()),
        [] => {
            let closed = records.get(wanted).map(|record| format!("; {}", closed(record))).unwrap_or_default();
            Err(ToolError::not_found(format!("`pod`: there is no pod with the name or id `{wanted}`{closed}"))
                .hint(names(&everything)))
        }
        several => {
            let ids: Vec<_> = several.iter().filter_map(|found| found.pod_id()).collect();
            Err(ToolError::invalid("pod", format!("the name `{wanted}` is that of several pods"))
                .hint(format!("use an id: {}", ids.join(", "))))
        }
    }
}

/// The named pod, or the only one there is; with several they are listed. For tools that end nothing.
pub(super) async fn find_or_only(services: &Services, wanted: Option<&str>) -> Result<Found, ToolError> {
    if let Some(wanted) = wanted {
        return find(services, wanted).await;
    }
    let records = services.fleet.read()?;
    let mut open = records.into_iter().filter(|(_, record)| record.is_open());
    if let (Some((name, record)), None) = (open.next(), open.next()) {
        return Ok(Found { name, record: Some(record), pod: None });
    }
    let mut everything = all(services).await?.pods;
    if everything.len() == 1 {
        return Ok(everything.remove(0));
    }
    if everything.is_empty() {
        return Err(ToolError::not_found("there is no pod").hint("create one with create_pod_with_volume"));
    }
    Err(ToolError::invalid("pod", "there are several pods, so one has to be named").hint(names(&everything)))
}

fn names(everything: &[Found]) -> String {
    if everything.is_empty() {
        return "there are no pods; create one with create_pod_with_volume".to_owned();
    }
    let names: Vec<_> = everything.iter().take(MOST_NAMES).map(|found| found.name.as_str()).collect();
    let more = match everything.len() - names.len() {
        0 => String::new(),
        more => format!(" and {more} more (list_pods)"),
    };
    format!("use one of: {}{more}", names.join(", "))
}

/// What became of a pod whose record is closed.
fn closed(record: &PodRecord) -> String {
    match (record.known.phase, never_seen(record)) {
        (_, Some(create)) => create.to_owned(),
        (Phase::Gone, None) => format!("the pod of that name is gone (it cost {})", usd(record.known.cost_usd)),
        _ => "the last create of that name was refused".to_owned(),
    }
}

/// What is true of a closed record that no pod was ever known of; that one is gone would say too much.
fn never_seen(record: &PodRecord) -> Option<&'static str> {
    let known = &record.known;
    let is_closed = known.phase == Phase::Gone && known.pod_id.is_none();
    // The end of a sandbox's world is the end of all its pods.
    if !is_closed || known.ending_cause.as_deref() == Some("world_ended") {
        return None;
    }
    Some(match known.lacked {
        Some(_) => "its create had no clear answer, and the pod never turned up",
        None => "its create was cancelled before it made a pod",
    })
}

/// The name a pod may be given: it becomes part of names in the cloud and of file names.
fn check_name(name: &str) -> Result<(), ToolError> {
    let fits = name.len() <= 40
        && name.starts_with(|first: char| first.is_ascii_lowercase() || first.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    if fits {
        return Ok(());
    }
    Err(ToolError::invalid("name", "expected 1 to 40 lower-case letters, digits or dashes, the first no dash"))
}

/// A volume as it is mounted.
#[derive(Debug, Serialize, JsonSchema)]
struct MountedVolume {
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    mount_path: String,
}

fn mounted_volume(record: Option<&PodRecord>, pod: Option<&Pod>) -> Option<MountedVolume> {
    let mount = pod
        .and_then(|pod| pod.volume.clone())
        .or_else(|| record.and_then(|record| record.wanted.request.volume.clone()))?;
    let name = record.and_then(|record| record.wanted.request.volume_name.clone());
    Some(MountedVolume { id: mount.volume_id, name, mount_path: mount.path })
}

pub(super) fn billing_of(record: &PodRecord) -> StillBilling {
    match record.known.phase {
        Phase::Placed if record.known.status != Some(PodStatus::Exited) => StillBilling::Yes,
        Phase::Gone | Phase::Refused => StillBilling::No,
        _ => StillBilling::Possible,
    }
}

/// The error of whoever waits for something inside a pod that is stopped and that nobody has asked to start.
pub(super) fn stopped(name: &str, record: &PodRecord) -> Option<ToolError> {
    let is_stopped = record.known.status == Some(PodStatus::Exited) && record.pending_action().is_none();
    is_stopped.then(|| {
        ToolError::failed(format!("the pod `{name}` is stopped"))
            .hint(format!("control_pod {{\"pod\": \"{name}\", \"action\": \"start\"}}"))
            .billing(billing_of(record))
    })
}

/// What a pod cost up to now: what was counted, and the time since.
pub(super) fn cost_now(record: &PodRecord) -> f64 {
    let known = &record.known;
    let billed = !matches!(known.status, None | Some(PodStatus::Exited | PodStatus::Terminated));
    let since = known.at.filter(|_| billed && record.is_open());
    let seconds = since.map_or(0.0, |at| Timestamp::now().duration_since(at).as_secs_f64().max(0.0));
    known.cost_usd + known.cost_per_hour * seconds / 3600.0
}

pub(super) fn cents(usd: f64) -> f64 {
    // The sum of nothing is -0.0.
    (usd * 10_000.0).round() / 10_000.0 + 0.0
}

/// A provider's failure while a pod of ours may be running.
fn while_a_pod_runs(error: ProviderError) -> ToolError {
    let mut error = ToolError::from(error);
    error.still_billing.get_or_insert(StillBilling::Possible);
    if error.kind == ErrorKind::NotFound {
        error.still_billing = None;
    }
    error
}
