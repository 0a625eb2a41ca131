//! Ends a pod that nobody uses, where its create asked for that with `idle_minutes`.
//!
//! Idle is what was seen to be idle, at each look of a whole such time: ComfyUI's queue was read and is empty, nobody is
//! connected to one of the pod's tunnels, no run of ours is open, no call was made and no shell is open in the pod.
//! Whatever can't be told (a queue that doesn't answer, or on a system other than Linux who is connected to a tunnel)
//! is not known to be idle: then the deadline decides. Time in which nobody looked, because the machine slept or the
//! keeper was dead, counts for nothing. Not seen is what begins and ends between two looks without a trace in any of
//! these, such as a short run that was sent by another program than ours.

mod connections;

use std::sync::Arc;
use std::time::SystemTime;

use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use super::clocks::Lifetime;
use super::{Keeper, inside};
use crate::comfy::jobs::{JobRecord, JobState, JobStore};
use crate::comfy::{ComfyClient, ComfyTimeouts, Queue};
use crate::errors::chain;
use crate::fleet::{Actor, Fleet, PodRecord};
use crate::provider::PodStatus;
use crate::ssh::{self, Target, host_key_alias};
use crate::tunnel::{COMFY_PORT, TunnelRecord, TunnelState};

/// After so long without a look nothing is known of the time between; a look itself takes up to half a minute.
const GAP: SignedDuration = SignedDuration::from_mins(2);

/// What a look came to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    InUse(&'static str),
    /// It can't be told; why.
    Unknown(String),
    Idle,
}

/// What calls leave behind: while it stays the same there was none.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Traces {
    used_at: Option<SystemTime>,
    deadline: Timestamp,
    /// The last action that was wanted.
    action: Option<String>,
}

/// How long nothing but idleness was seen.
#[derive(Debug, Default)]
struct Count {
    since: Option<Lifetime>,
    last_look: Option<Lifetime>,
}

struct IdleTask {
    keeper: Arc<Keeper>,
    name: String,
    intent: String,
    traces: Option<Traces>,
    count: Count,
}

/// Goes on until the pod is proven gone or the keeper stops.
pub(super) async fn look_for_use(keeper: Arc<Keeper>, name: String, intent: String) {
    let mut task = IdleTask { keeper: keeper.clone(), name, intent, traces: None, count: Count::default() };
    while !keeper.stop.is_cancelled() {
        match keeper.fleet.of_intent(&task.intent) {
            Ok(Some(record)) if !record.is_open() => {
                if let Some(id) = &record.known.pod_id {
                    keeper.fleet.forget_use(id);
                }
                return;
            }
            Ok(Some(record)) if !record.is_ending() => {
                tokio::select! {
                    () = task.look(&record) => {}
                    () = keeper.stop.cancelled() => return,
                }
            }
            // A record that has left the file is written again by the pod's own task.
            Ok(_) => {}
            Err(error) => tracing::error!(error = %chain(&error), "the records can't be read"),
        }
        tokio::select! {
            () = tokio::time::sleep(keeper.timing.idle_poll) => {}
            () = keeper.stop.cancelled() => return,
        }
    }
}

impl IdleTask {
    async fn look(&mut self, record: &PodRecord) {
        let (Some(minutes), Some(id)) = (record.wanted.idle_minutes, record.known.pod_id.clone()) else { return };
        let traces = Traces::of(&self.keeper.fleet, record, &id);
        let is_touched = self.traces.replace(traces.clone()).is_some_and(|before| before != traces);
        let seen = if is_touched { Seen::InUse("a call") } else { self.see(record, &id).await };
        tracing::debug!(pod = self.name, ?seen, "looked whether the pod is used");
        let is_new = self.count.add(seen == Seen::Idle);
        self.tell(record, &seen, is_new).await;
        if self.count.is_over(to_signed(self.keeper.timing.idle_minute * minutes)) {
            self.end(minutes, traces, id).await;
        }
    }

    /// What is seen at this moment, the network last.
    async fn see(&self, record: &PodRecord, id: &str) -> Seen {
        if record.known.status != Some(PodStatus::Running) {
            return Seen::Unknown("the pod does not run".to_owned());
        }
        let tunnels = match self.keeper.tunnels.read() {
            Ok(tunnels) => tunnels.into_values().filter(|tunnel| tunnel.wanted.pod_id == id).collect::<Vec<_>>(),
            Err(error) => return Seen::Unknown(chain(&error)),
        };
        let ports: Vec<_> = tunnels.iter().filter_map(|tunnel| tunnel.known.local_port).collect();
        let (jobs, name) = (JobStore::new(self.keeper.home.root()), self.name.clone());
        let (since, pod_id) = (record.wanted.requested_at, id.to_owned());
        let here = move || seen_on_this_machine(&jobs, &name, since, &pod_id, &ports);
        let here = tokio::task::spawn_blocking(here)
            .await
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
        if here != Seen::Idle {
            return here;
        }
        match self.queue(record, id, &tunnels).await {
            Ok(queue) if queue.is_empty() => Seen::Idle,
            Ok(_) => Seen::InUse("a run in ComfyUI"),
            Err(why) => Seen::Unknown(format!("ComfyUI's queue can't be read: {why}")),
        }
    }

    /// Through the tunnel to ComfyUI if there is one that works, else over SSH. Neither is use.
    async fn queue(&self, record: &PodRecord, id: &str, tunnels: &[TunnelRecord]) -> Result<Queue, String> {
        let healthy = |tunnel: &&TunnelRecord| {
            tunnel.wanted.remote_port == COMFY_PORT && tunnel.known.state == TunnelState::Healthy
        };
        let limit = self.keeper.timing.http_connect;
        if let Some(url) = tunnels.iter().find(healthy).and_then(TunnelRecord::url) {
            let timeouts = ComfyTimeouts { connect: limit, request: limit, ..ComfyTimeouts::default() };
            let client = ComfyClient::new(&url, timeouts).map_err(|error| chain(&error))?;
            return client.queue().await.map_err(|error| chain(&error));
        }
        let address = record.known.ssh.clone().ok_or("the pod has no address for SSH")?;
        let target = Target {
            user: address.user,
            host: address.host,
            port: address.port,
            host_key_alias: host_key_alias(id, record.known.starts),
        };
        inside::queue(&self.keeper.ssh, &target, COMFY_PORT).await.map_err(|error| chain(&error))
    }

    /// Into the record, where it changes what stands there. `is_new`: idleness begins, or begins anew.
    async fn tell(&self, record: &PodRecord, seen: &Seen, is_new: bool) {
        let since = match seen {
            Seen::Idle if is_new => Some(self.keeper.clock.now()),
            Seen::Idle => record.known.idle_since,
            _ => None,
        };
        let unknown = match seen {
            Seen::Unknown(why) => Some(why.clone()),
            _ => None,
        };
        if (record.known.idle_since, &record.known.idle_unknown) == (since, &unknown) {
            return;
        }
        let told = self.keeper.fleet.know(&self.intent, move |record| {
            record.known.idle_since = since;
            record.known.idle_unknown = unknown;
        });
        if let Err(error) = told.await {
            tracing::error!(pod = self.name, error = %chain(&error), "what is known can't be written");
        }
    }

    /// Under the lock it is looked once more whether somebody has come meanwhile.
    async fn end(&mut self, minutes: u32, traces: Traces, id: String) {
        let cause = format!("nobody used it for {minutes} minute{}", if minutes == 1 { "" } else { "s" });
        let (fleet, told) = (self.keeper.fleet.clone(), cause.clone());
        let ended = self.keeper.fleet.know(&self.intent, move |record| {
            if Traces::of(&fleet, record, &id) == traces {
                record.end_because(told);
            }
        });
        match ended.await {
            Ok(Some(record)) if record.known.ending_cause.as_ref() == Some(&cause) => {
                tracing::info!(pod = self.name, cause, "the pod is ended");
                let facts = json!({
                    "pod": self.name, "intent": self.intent, "pod_id": record.known.pod_id, "cause": cause,
                    "idle_since": record.known.idle_since,
                });
                self.keeper.audit.note(Actor::Keeper, "ending", facts);
                self.keeper.turn.send_modify(|turn| *turn += 1);
            }
            Ok(_) => {}
            // Tried again at the next look.
            Err(error) => tracing::error!(pod = self.name, error = %chain(&error), "the pod's end can't be written"),
        }
    }
}

impl Traces {
    fn of(fleet: &Fleet, record: &PodRecord, pod_id: &str) -> Self {
        Self {
            used_at: fleet.marked_used_at(pod_id),
            deadline: record.reserved_until(),
            action: record.wanted.action.as_ref().map(|wish| wish.id.clone()),
        }
    }
}

impl Count {
    /// Adds a look. True when idleness begins with it, or begins anew after a gap.
    fn add(&mut self, is_idle: bool) -> bool {
        let unobserved = self.last_look.is_none_or(|last| last.is_over(GAP));
        self.last_look = Some(Lifetime::start());
        if !is_idle || unobserved {
            self.since = None;
        }
        let begins = is_idle && self.since.is_none();
        if begins {
            self.since = Some(Lifetime::start());
        }
        begins
    }

    fn is_over(&self, limit: SignedDuration) -> bool {
        self.since.is_some_and(|since| since.is_over(limit))
    }
}

/// What this machine tells without asking anybody; blocks for a moment.
fn seen_on_this_machine(jobs: &JobStore, name: &str, since: Timestamp, pod_id: &str, ports: &[u16]) -> Seen {
    match jobs.list() {
        Ok(records) if records.iter().any(|job| job.base == name && job.created_at >= since && is_open(jobs, job)) => {
            return Seen::InUse("a run of comfy_run");
        }
        Ok(_) => {}
        Err(error) => return Seen::Unknown(chain(&error)),
    }
    if ssh::is_used_elsewhere(pod_id) {
        return Seen::InUse("a shell, a command or a copy over SSH");
    }
    for port in ports {
        match connections::others_are_connected(*port) {
            Some(false) => {}
            Some(true) => return Seen::InUse("a connection through a tunnel"),
            None => return Seen::Unknown("this system does not tell who is connected to a tunnel".to_owned()),
        }
    }
    Seen::Idle
}

/// A run whose outputs nobody has fetched yet is open, also when its process is gone; one that was never sent is not.
fn is_open(jobs: &JobStore, job: &JobRecord) -> bool {
    let was_sent = !matches!(job.state, JobState::Prepared | JobState::Uploading);
    !job.state.is_final() && (was_sent || jobs.is_held(job.prompt_id).unwrap_or(true))
}

fn to_signed(duration: std::time::Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks every half minute, from so many minutes ago.
    fn idle_for(minutes: i64) -> Count {
        let mut count = Count::default();
        assert!(count.add(true), "idleness begins");
        count.since = Some(Lifetime::started_ago(SignedDuration::from_mins(minutes)));
        assert!(!count.add(true), "it goes on");
        count
    }

    #[test]
    fn idleness_is_counted_from_its_first_look() {
        assert!(!idle_for(4).is_over(SignedDuration::from_mins(5)));
        assert!(idle_for(5).is_over(SignedDuration::from_mins(5)));
        assert!(!Count::default().is_over(SignedDuration::ZERO), "nobody has looked yet");
    }

    #[test]
    fn use_and_what_can_not_be_told_begin_it_anew() {
        let mut count = idle_for(60);
        assert!(!count.add(false));
        assert!(!count.is_over(SignedDuration::ZERO));
        assert!(count.add(true));
        assert!(!count.is_over(SignedDuration::from_mins(1)));
    }

    #[test]
    fn time_in_which_nobody_looked_counts_for_nothing() {
        let mut count = idle_for(60);
        count.last_look = Some(Lifetime::started_ago(SignedDuration::from_mins(3)));
        assert!(count.add(true), "it begins anew");
        assert!(!count.is_over(SignedDuration::from_mins(1)));
    }

    #[test]
    fn a_run_is_open_until_its_outputs_are_here() {
        let home = tempfile::tempdir().unwrap();
        let jobs = JobStore::new(home.path());
        let mut job = JobRecord::new(uuid::Uuid::new_v4(), Timestamp::now(), "comfy", home.path());
        let held = jobs.create(job.clone()).unwrap();
        assert!(is_open(&jobs, &job), "its process is about to send it");
        drop(held);
        assert!(!is_open(&jobs, &job), "nobody will send it any more");
        for (state, open) in [
            (JobState::Submitting, true),
            (JobState::Running, true),
            (JobState::Downloading, true),
            (JobState::Done, false),
            (JobState::Failed, false),
        ] {
            job.state = state;
            assert_eq!(is_open(&jobs, &job), open, "{state:?}");
        }
    }
}
