//! The way from nothing to ComfyUI, step by step: what is reached, how long it took, and what is waited for.

use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::Serialize;

use crate::fleet::{MountKnown, PodRecord};
use crate::provider::{Pod, PodStatus};
use crate::tunnel::{TunnelRecord, TunnelState};

#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct Step {
    pub step: &'static str,
    pub done: bool,
    /// By the provider's clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reached_at: Option<Timestamp>,
    /// Seconds from the step before to this one, or up to now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub elapsed_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<String>,
}

/// What the steps are read from.
pub(super) struct Ladder<'a> {
    pub record: Option<&'a PodRecord>,
    pub pod: Option<&'a Pod>,
    pub tunnel: Option<&'a TunnelRecord>,
    /// What the keeper wrote of a tunnel counts only while it lives.
    pub held: bool,
    /// How far the provider's clock is ahead of ours.
    pub ahead: SignedDuration,
}

/// One step before it is measured against the one before it.
struct Mark {
    step: &'static str,
    done: bool,
    reached: Option<Timestamp>,
    waiting_for: String,
}

impl Ladder<'_> {
    pub(super) fn steps(&self) -> Vec<Step> {
        // The first start began when the pod was made; when a later one was asked for isn't told by the provider.
        let first_start = self.record.filter(|record| record.known.starts <= 1);
        let mut before = first_start.and_then(|record| record.known.created_at);
        let mut is_next = true;
        let now = self.at_provider(Timestamp::now());
        let mut steps = Vec::new();
        for mark in self.marks() {
            let reached = mark.reached.filter(|_| mark.done);
            let until = if mark.done { reached } else { is_next.then_some(now) };
            steps.push(Step {
                step: mark.step,
                done: mark.done,
                reached_at: reached,
                elapsed_seconds: before.zip(until).map(|(from, to)| seconds(from, to)),
                waiting_for: (!mark.done).then_some(mark.waiting_for),
            });
            is_next &= mark.done;
            before = reached;
        }
        steps
    }

    fn marks(&self) -> [Mark; 5] {
        let reached = self.record.map(|record| record.known.reached).unwrap_or_default();
        let status = self.status();
        let running = status == Some(PodStatus::Running);
        let allocated = matches!(status, Some(PodStatus::Starting | PodStatus::Running | PodStatus::Unknown));
        let tunnel = self.tunnel.filter(|_| self.held).map(|tunnel| &tunnel.known);
        let tunnel_up = running && tunnel.is_some_and(|known| is_up(known.state));
        let healthy = running && tunnel.is_some_and(|known| known.state == TunnelState::Healthy);
        let since = tunnel.and_then(|known| known.since).map(|since| self.at_provider(since));
        let mark = |step, done, reached, waiting_for: String| Mark { step, done, reached, waiting_for };
        [
            mark("allocated", allocated, reached.allocated, self.for_a_machine(status)),
            mark("container", running, reached.container, "the container to start".to_owned()),
            mark("sshd", running && (tunnel_up || self.ssh_answered()), reached.sshd, self.for_ssh()),
            // Its record tells when it became what it is now.
            mark("tunnel", tunnel_up, since.filter(|_| !healthy), self.for_the_tunnel("not up yet")),
            mark("comfyui", healthy, since, self.for_the_tunnel("no answer through the tunnel yet")),
        ]
    }

    fn status(&self) -> Option<PodStatus> {
        self.pod.map(|pod| pod.status).or_else(|| self.record?.known.status)
    }

    /// Whether somebody came in by SSH in the present start.
    fn ssh_answered(&self) -> bool {
        self.record.is_some_and(|record| {
            let inside = &record.known.inside;
            let looked = matches!(inside.mount, Some(MountKnown::Mounted { .. } | MountKnown::NotMounted));
            let current = inside.start == Some(record.known.starts);
            record.known.reached.sshd.is_some() || current && (looked || inside.switch_until.is_some())
        })
    }

    fn for_a_machine(&self, status: Option<PodStatus>) -> String {
        match status {
            None => "the provider to place the pod",
            Some(PodStatus::Exited) => "a start, for the pod is stopped",
            Some(PodStatus::Error) => "nothing: the pod is in the state ERROR, end it with terminate_pod",
            Some(PodStatus::Terminated) => "nothing: the pod is gone",
            Some(_) => "the provider to find a machine",
        }
        .to_owned()
    }

    fn for_ssh(&self) -> String {
        let has_address = match (self.pod, self.record) {
            (Some(pod), _) => pod.ssh.is_some(),
            (None, record) => record.is_some_and(|record| record.known.ssh.is_some()),
        };
        match (self.record, has_address) {
            (None, _) => "a look inside, which only pods of this home get",
            (_, false) => "the provider to tell its address for ssh",
            (_, true) => "sshd to answer",
        }
        .to_owned()
    }

    fn for_the_tunnel(&self, otherwise: &str) -> String {
        match self.tunnel {
            None => "a tunnel: open it with start_tunnel".to_owned(),
            Some(_) if !self.held => "the keeper, which is being started".to_owned(),
            Some(tunnel) => tunnel.known.cause.clone().unwrap_or_else(|| otherwise.to_owned()),
        }
    }

    fn at_provider(&self, ours: Timestamp) -> Timestamp {
        crate::fleet::later(ours, self.ahead)
    }
}

fn is_up(state: TunnelState) -> bool {
    match state {
        TunnelState::SshUp
        | TunnelState::Healthy
        | TunnelState::RemoteRefused
        | TunnelState::HttpTimeout
        | TunnelState::WrongService => true,
        TunnelState::WaitingForPod | TunnelState::Connecting | TunnelState::BackingOff | TunnelState::Failed => false,
    }
}

fn seconds(from: Timestamp, to: Timestamp) -> f64 {
    let seconds = to.duration_since(from).as_secs_f64().max(0.0);
    (seconds * 10.0).round() / 10.0
}
