//! Where a pod's sshd is reached, for the commands that people run in it.

use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::{Found, find_or_only};
use crate::errors::chain;
use crate::provider::{Pod, PodStatus, SshAddress};
use crate::ssh::{Cause, KeyError, Target, host_key_alias};
use crate::tools::context::Services;
use crate::tools::{ErrorKind, StillBilling, ToolError};

/// As long as any call waits; an image that is pulled takes longer, and then there is no address yet.
const SSHD_COMES_WITHIN: Duration = Duration::from_secs(40);

/// A pod's name and where its sshd is reached now: the named pod, or the only one there is.
pub async fn reach_pod(services: &Services, wanted: Option<&str>) -> Result<(String, Target), ToolError> {
    let found = find_or_only(services, wanted).await?;
    services.ssh.public_key().await?;
    let Some(id) = found.pod_id().map(str::to_owned) else {
        return Err(unreachable(&found.name, "is not placed yet"));
    };
    services.fleet.mark_used(&id);
    let found = wait_for_sshd(services, found).await?;
    let asked = if found.pod.is_none() && !services.keeper.is_alive() && services.provider.is_some() {
        // Without a keeper nobody brings the record up to date.
        let answer = services.provider()?.pod(&id).await?;
        Some((answer.value, answer.date))
    } else {
        found.pod.clone().map(|pod| (pod, None))
    };
    let Found { name, record, .. } = found;
    let (address, start) = match (record, &asked) {
        (Some(mut record), asked) => {
            if let Some((pod, date)) = asked {
                record.learn(pod, date.unwrap_or_else(Timestamp::now));
            }
            (record.known.ssh.clone(), record.known.starts.to_string())
        }
        (None, Some((pod, _))) => (pod.ssh.clone(), pod.started_at.map_or(0, Timestamp::as_second).to_string()),
        (None, None) => (None, String::new()),
    };
    match address {
        Some(SshAddress { host, port, user }) => {
            Ok((name, Target { user, host, port, host_key_alias: host_key_alias(&id, start) }))
        }
        None => Err(unreachable(&name, &why_no_address(asked.as_ref().map(|(pod, _)| pod)))),
    }
}

/// Commands follow a create at once, and sshd comes seconds after the pod. The keeper sees it first.
async fn wait_for_sshd(services: &Services, mut found: Found) -> Result<Found, ToolError> {
    let started = Instant::now();
    while let Some(record) = &found.record {
        let comes = matches!(
            record.known.status,
            None | Some(PodStatus::Provisioning | PodStatus::Starting | PodStatus::Running)
        );
        let known = record.known.reached.sshd.is_some() || record.known.inside.switch_problem.is_some();
        if !comes
            || known
            || record.is_ending()
            || !services.keeper.is_alive()
            || started.elapsed() >= SSHD_COMES_WITHIN
        {
            break;
        }
        tokio::time::sleep(services.timing.record_poll).await;
        let Some(record) = services.fleet.of_intent(&record.intent)? else { break };
        found.record = Some(record);
    }
    Ok(found)
}

fn why_no_address(pod: Option<&Pod>) -> String {
    match pod {
        Some(pod) if pod.status != PodStatus::Running => format!("is {}", pod.status),
        Some(pod) if pod.has_ssh_proxy => "has no SSH address of its own, only RunPod's SSH proxy, which runs no \
                                           commands, copies no files and forwards nothing; a pod needs 22/tcp among \
                                           its ports"
            .to_owned(),
        _ => "has no address for SSH (yet): it may be starting, stopped, or without 22/tcp among its ports".to_owned(),
    }
}

fn unreachable(name: &str, why: &str) -> ToolError {
    ToolError::failed(format!("the pod `{name}` {why}"))
        .hint(format!("see get_pod {{\"pod\": \"{name}\"}}"))
        .billing(StillBilling::Possible)
}

impl From<KeyError> for ToolError {
    fn from(error: KeyError) -> Self {
        Self::new(ErrorKind::Setup, chain(&error))
    }
}

/// For work in a pod, which goes on costing money whether it is reached or not.
impl From<Cause> for ToolError {
    fn from(cause: Cause) -> Self {
        let kind = match cause {
            Cause::NoSsh | Cause::NotStarted(_) => ErrorKind::Setup,
            Cause::SshdNotUp | Cause::Unreachable(_) | Cause::Lost(_) | Cause::Slow(_) => ErrorKind::Network,
            _ => ErrorKind::Failed,
        };
        Self::new(kind, chain(&cause)).billing(StillBilling::Possible)
    }
}
