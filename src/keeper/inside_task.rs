//! What is done in a running pod over SSH, anew for each of its starts: its own switch is armed, its volume is looked
//! for. A task of its own beside the pod's, which must never wait for a pod that doesn't answer.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::Keeper;
use super::inside::{self, NotArmed};
use crate::errors::chain;
use crate::fleet::{Actor, Inside, MountKnown, PodRecord};
use crate::provider::{PodStatus, SshAddress};
use crate::ssh::Target;
use crate::steps;

/// How often a volume is looked for in vain before that is told as the result.
const LOOKS_FOR_A_VOLUME: u32 = 5;
/// How often nobody answers before that is told as the reason for a missing switch.
const PROBES_IN_VAIN: u32 = 20;
/// A container that was restarted behind our back, between two looks at the pod, has lost its switch.
const ARMED_ANEW_EVERY: Duration = Duration::from_secs(300);
const PROBE: Duration = Duration::from_secs(2);

struct InsideTask {
    keeper: Arc<Keeper>,
    name: String,
    intent: String,
    next_try: Instant,
    backoff: Duration,
    /// The start and the deadline for which the pod said that it can't have a switch.
    cannot: Option<(u32, Timestamp)>,
    /// When this task armed the switch last.
    armed_at: Option<Instant>,
    probes_in_vain: u32,
    looks: u32,
}

/// Goes on until the pod is proven gone or the keeper stops.
pub(super) async fn look_inside(keeper: Arc<Keeper>, name: String, intent: String) {
    let mut turn = keeper.turn.subscribe();
    let mut task = InsideTask {
        backoff: keeper.timing.backoff_first,
        keeper: keeper.clone(),
        name,
        intent,
        next_try: Instant::now(),
        cannot: None,
        armed_at: None,
        probes_in_vain: 0,
        looks: 0,
    };
    while !keeper.stop.is_cancelled() {
        match keeper.fleet.of_intent(&task.intent) {
            Ok(Some(record)) if !record.is_open() => return,
            Ok(Some(record)) if !record.is_ending() => tokio::select! {
                () = task.step(&record) => {}
                // An ssh that hangs keeps no keeper from making room for the next.
                () = keeper.stop.cancelled() => return,
            },
            // A record that has left the file is written again by the pod's own task.
            Ok(_) => {}
            Err(error) => tracing::error!(error = %chain(&error), "the records can't be read"),
        }
        keeper.wait(&mut turn, keeper.timing.health_poll_waiting).await;
    }
}

impl InsideTask {
    async fn step(&mut self, record: &PodRecord) {
        let known = &record.known;
        let Some(id) = known.pod_id.clone() else { return };
        let Some(address) = known.ssh.clone().filter(|_| known.status == Some(PodStatus::Running)) else {
            if record.reserved_until() != record.expires_at() && !may_have_a_switch(record) {
                self.move_deadline(record, record.reserved_until(), None).await;
            }
            return;
        };
        if known.inside.start != Some(known.starts) {
            let start = known.starts;
            self.know(move |record| record.known.inside = Inside { start: Some(start), ..Inside::default() }).await;
            (self.looks, self.probes_in_vain) = (0, 0);
            (self.next_try, self.backoff) = (Instant::now(), self.keeper.timing.backoff_first);
            return;
        }
        if Instant::now() < self.next_try {
            return;
        }
        let target = Target {
            user: address.user.clone(),
            host: address.host.clone(),
            port: address.port,
            host_key_alias: format!("autopod-{id}-{}", known.starts),
        };
        let deadline = record.reserved_until();
        let is_armed = known.inside.switch_until == Some(deadline)
            && self.armed_at.is_some_and(|at| at.elapsed() < ARMED_ANEW_EVERY);
        let may_arm = !is_armed && self.cannot != Some((known.starts, deadline));
        let mount_path = record.wanted.request.volume.as_ref().map(|volume| volume.path.clone());
        if may_arm {
            if sshd_answers(&address).await {
                self.probes_in_vain = 0;
                self.arm(record, &target, deadline).await;
            } else {
                self.nobody_answers(record, deadline).await;
            }
        } else if let (Some(path), None) = (mount_path, &known.inside.mount) {
            self.look_for_volume(&target, &path).await;
        }
    }

    async fn arm(&mut self, record: &PodRecord, target: &Target, deadline: Timestamp) {
        // By a clock that is not the deadline's own the pod might end itself at once.
        let Some(now) = self.keeper.clock.told() else { return };
        let by_ours = record.expires_by_our_clock().duration_since(Timestamp::now());
        let remaining = deadline.duration_since(now).min(by_ours).max(SignedDuration::ZERO);
        let remaining = Duration::try_from(remaining).unwrap_or_default();
        match inside::arm(&self.keeper.ssh, target, remaining, &self.keeper.origin).await {
            Ok(_) => {
                steps::reached("keeper: switch moved");
                self.backoff = self.keeper.timing.backoff_first;
                if self.move_deadline(record, deadline, Some(deadline)).await {
                    self.armed_at = Some(Instant::now());
                } else {
                    self.back_off();
                }
            }
            Err(NotArmed::Lacking(why)) => {
                self.cannot = Some((record.known.starts, deadline));
                self.not_armed(record, deadline, format!("the pod can't end itself: {why}"), true).await;
            }
            Err(error) => {
                self.back_off();
                let was_reached = matches!(error, NotArmed::Unclear(_));
                self.not_armed(record, deadline, chain(&error), was_reached).await;
            }
        }
    }

    /// A pod may have no sshd at all, and get more time all the same.
    async fn nobody_answers(&mut self, record: &PodRecord, deadline: Timestamp) {
        self.probes_in_vain += 1;
        let waits_for_us = deadline > record.expires_at() && !may_have_a_switch(record);
        if waits_for_us || self.probes_in_vain == PROBES_IN_VAIN {
            self.not_armed(record, deadline, "nothing answers at the pod's SSH port".to_owned(), false).await;
        }
    }

    /// The keeper's deadline follows the switch's, so that a pod never ends itself before the deadline that was told.
    async fn move_deadline(&self, record: &PodRecord, deadline: Timestamp, switch_until: Option<Timestamp>) -> bool {
        let now = self.keeper.clock.now();
        let is_news = (record.known.expires_at, record.known.inside.switch_until) != (Some(deadline), switch_until);
        let is_recorded = self
            .know(move |record| {
                record.known.expires_at = Some(deadline);
                record.known.inside.switch_until = switch_until;
                record.known.inside.switch_problem = None;
                if switch_until.is_some() {
                    record.known.reached.sshd.get_or_insert(now);
                }
            })
            .await;
        if is_recorded && is_news {
            steps::reached("keeper: extend recorded");
            self.note("deadline_set", json!({ "expires_at": deadline, "switch_armed": switch_until.is_some() }));
        }
        is_recorded
    }

    async fn not_armed(&mut self, record: &PodRecord, deadline: Timestamp, problem: String, was_reached: bool) {
        tracing::warn!(pod = self.name, problem, "the pod's own switch is not armed");
        let now = self.keeper.clock.now();
        let holds_us = may_have_a_switch(record);
        self.know(move |record| {
            if !holds_us && deadline > record.expires_at() {
                record.known.expires_at = Some(deadline);
            }
            record.known.inside.switch_problem = Some(problem);
            if was_reached {
                record.known.reached.sshd.get_or_insert(now);
            }
        })
        .await;
    }

    async fn look_for_volume(&mut self, target: &Target, path: &str) {
        self.looks += 1;
        let found = match inside::check_mount(&self.keeper.ssh, target, path).await {
            Ok(mount) if mount.mounted => {
                MountKnown::Mounted { free_gb: rounded(mount.free_gb), total_gb: rounded(mount.total_gb) }
            }
            Ok(_) => MountKnown::NotMounted,
            Err(error) if self.looks >= LOOKS_FOR_A_VOLUME => MountKnown::NotVerified { why: chain(&error) },
            Err(error) => {
                tracing::debug!(pod = self.name, error = chain(&error), "the volume can't be looked for");
                self.back_off();
                return;
            }
        };
        self.know(move |record| record.known.inside.mount = Some(found)).await;
    }

    fn back_off(&mut self) {
        self.next_try = Instant::now() + self.backoff;
        self.backoff = (self.backoff * 2).min(self.keeper.timing.backoff_most);
    }

    fn note(&self, event: &str, mut facts: serde_json::Value) {
        facts["pod"] = json!(self.name);
        facts["intent"] = json!(self.intent);
        self.keeper.audit.note(Actor::Keeper, event, facts);
    }

    async fn know(&self, change: impl FnOnce(&mut PodRecord) + Send + 'static) -> bool {
        match self.keeper.fleet.know(&self.intent, change).await {
            Ok(record) => record.is_some(),
            Err(error) => {
                tracing::error!(pod = self.name, error = %chain(&error), "what is known can't be written");
                false
            }
        }
    }
}

/// One that is armed for an earlier moment would end the pod then, whatever we told. It dies with its container.
fn may_have_a_switch(record: &PodRecord) -> bool {
    let known = &record.known;
    let may_run = matches!(known.status, Some(PodStatus::Running | PodStatus::Error | PodStatus::Unknown));
    may_run && known.inside.start == Some(known.starts) && known.inside.switch_until.is_some()
}

/// A port can be mapped before sshd listens; ssh itself would take much longer to find that out.
async fn sshd_answers(address: &SshAddress) -> bool {
    let greeting = async {
        let mut stream = TcpStream::connect((address.host.as_str(), address.port)).await.ok()?;
        let mut start = [0; 4];
        stream.read_exact(&mut start).await.ok()?;
        Some(start == *b"SSH-")
    };
    tokio::time::timeout(PROBE, greeting).await.ok().flatten() == Some(true)
}

fn rounded(gb: f64) -> f64 {
    (gb * 10.0).round() / 10.0
}
