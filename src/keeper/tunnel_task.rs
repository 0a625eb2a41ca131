//! One tunnel's life: it waits for the pod's address, holds an ssh child, asks through it for ComfyUI, and follows the
//! pod to its new address.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

use super::Keeper;
use crate::comfy::{ComfyClient, ComfyError, ComfyTimeouts};
use crate::errors::chain;
use crate::fleet::PodRecord;
use crate::provider::{ProviderError, SshAddress};
use crate::ssh::{self, Cause, Forward, KeyError, Tunnel, host_key_alias};
use crate::state::StateError;
use crate::tunnel::{LocalPort, TunnelKnown, TunnelRecord, TunnelState};

/// How many ports after the first are tried when any will do.
const MOST_PORTS_TRIED: u16 = 100;
/// A tunnel that was up for this long starts its back-off anew.
const PROVEN_AFTER: Duration = Duration::from_secs(30);

/// The ssh of a keeper that was killed may hold the port a moment longer than its keeper lived.
const OWN_PORT_FREES_WITHIN: Duration = Duration::from_secs(10);

struct TunnelTask {
    keeper: Arc<Keeper>,
    name: String,
    intent: String,
    next_attempt: Instant,
    backoff: Duration,
    /// Ports that turned out to be in use, by this tunnel's attempts.
    taken: BTreeSet<u16>,
    /// Since when the port that it had before is in use by somebody else.
    own_port_busy_since: Option<Instant>,
}

/// Where a pod is reached now, and under which name its host key is pinned.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    address: SshAddress,
    host_key_alias: String,
}

enum Whereabouts {
    At(Target),
    NotYet(String),
    Gone,
}

/// Goes on until the tunnel isn't wanted, its pod is gone, it failed for good, or the keeper stops.
pub(super) async fn hold(keeper: Arc<Keeper>, name: String, intent: String) {
    let mut turn = keeper.turn.subscribe();
    let backoff = keeper.timing.backoff_first;
    let mut task = TunnelTask {
        keeper: keeper.clone(),
        name,
        intent,
        next_attempt: Instant::now(),
        backoff,
        taken: BTreeSet::new(),
        own_port_busy_since: None,
    };
    task.end_leftover().await;
    while !keeper.stop.is_cancelled() {
        match task.record() {
            Ok(Some(record)) if !record.wanted.open => {
                task.remove().await;
                return;
            }
            Ok(Some(record)) if record.is_open() => {
                if Instant::now() >= task.next_attempt {
                    task.attempt(record).await;
                }
            }
            Ok(_) => return,
            Err(error) => tracing::error!(error = %chain(&error), "the tunnels' records can't be read"),
        }
        keeper.wait(&mut turn, keeper.timing.keeper_turn).await;
    }
}

impl TunnelTask {
    /// An earlier keeper that was killed may have left its ssh behind, which would hold our port.
    async fn end_leftover(&self) {
        let Ok(Some(TunnelRecord { wanted, known, .. })) = self.record() else { return };
        if let Some(pid) = known.ssh_pid
            && !ssh::end_leftover(pid, &wanted.pod_id).await
        {
            tracing::error!(tunnel = self.name, pid, "the ssh of an earlier keeper can't be ended");
        }
    }

    /// One ssh child from its start to its end.
    async fn attempt(&mut self, record: TunnelRecord) {
        let target = match self.whereabouts(&record).await {
            Whereabouts::At(target) => target,
            Whereabouts::NotYet(cause) => {
                self.next_attempt = Instant::now() + self.keeper.timing.pod_poll_waiting;
                if record.known.state != TunnelState::WaitingForPod || record.known.cause.as_ref() != Some(&cause) {
                    self.know(move |known| {
                        known.state = TunnelState::WaitingForPod;
                        known.cause = Some(cause);
                        known.ssh_pid = None;
                    })
                    .await;
                }
                return;
            }
            Whereabouts::Gone => {
                tracing::info!(tunnel = self.name, "its pod is gone");
                self.remove().await;
                return;
            }
        };
        let Some(local_port) = self.pick_port(&record) else {
            self.failed(Cause::PortInUse.to_string()).await;
            return;
        };
        let forward = Forward {
            target: ssh::Target {
                user: target.address.user.clone(),
                host: target.address.host.clone(),
                port: target.address.port,
                host_key_alias: target.host_key_alias.clone(),
            },
            local_port,
            remote_port: record.wanted.remote_port,
        };
        let mut tunnel = match self.connect(&forward).await {
            Ok(Some(tunnel)) => tunnel,
            Ok(None) => return,
            Err(cause) => return self.not_connected(cause, &record, local_port).await,
        };
        self.own_port_busy_since = None;
        let reconnected = record.known.local_port.is_some();
        let pid = tunnel.pid;
        self.know(move |known| {
            known.state = TunnelState::SshUp;
            known.cause = None;
            known.local_port = Some(local_port);
            known.ssh_pid = pid;
            if reconnected {
                known.reconnects += 1;
                known.reconnected_at = Some(Timestamp::now());
            }
        })
        .await;
        let up_since = Instant::now();
        let cause = self.watch(&mut tunnel, &target, local_port).await;
        tunnel.stop().await;
        if up_since.elapsed() >= PROVEN_AFTER {
            self.backoff = self.keeper.timing.backoff_first;
        }
        if let Some(cause) = cause {
            self.not_connected(cause, &record, local_port).await;
        }
    }

    /// Starts ssh and waits for its READY line; `None` when the tunnel isn't wanted any more.
    async fn connect(&self, forward: &Forward) -> Result<Option<Tunnel>, Cause> {
        self.keeper.ssh.public_key().await.map_err(|error| match error {
            KeyError::NoKeygen => Cause::NoSsh,
            error => Cause::NotStarted(chain(&error)),
        })?;
        let mut tunnel = self.keeper.ssh.forward(forward)?;
        let pid = tunnel.pid;
        self.know(move |known| {
            known.state = TunnelState::Connecting;
            known.ssh_pid = pid;
        })
        .await;
        let outcome = tokio::select! {
            ready = tunnel.ready(self.keeper.timing.ssh_ready) => Some(ready),
            () = self.until_unwanted() => None,
        };
        match outcome {
            Some(Ok(())) => Ok(Some(tunnel)),
            Some(Err(cause)) => {
                tunnel.stop().await;
                Err(cause)
            }
            None => {
                tunnel.stop().await;
                Ok(None)
            }
        }
    }

    /// Stays with a running ssh: `None` when it is to end, the cause when it ended or the pod has moved.
    async fn watch(&self, tunnel: &mut Tunnel, target: &Target, local_port: u16) -> Option<Cause> {
        let timing = &self.keeper.timing;
        let timeouts =
            ComfyTimeouts { connect: timing.http_connect, request: timing.http_connect, ..Default::default() };
        let client = match ComfyClient::new(&format!("http://127.0.0.1:{local_port}"), timeouts) {
            Ok(client) => client,
            Err(error) => return Some(Cause::NotStarted(error.to_string())),
        };
        tokio::select! {
            cause = tunnel.ended() => Some(cause),
            () = self.until_unwanted() => None,
            why = self.until_moved(target) => Some(Cause::Lost(why.to_owned())),
            () = self.check_on_and_on(&client) => None,
        }
    }

    async fn check_on_and_on(&self, client: &ComfyClient) {
        loop {
            let timing = &self.keeper.timing;
            let healthy = self.check(client).await;
            let pause = if healthy { timing.health_poll_settled } else { timing.health_poll_waiting };
            tokio::time::sleep(pause).await;
        }
    }

    /// Asks the far end for `/system_stats`: a connection alone proves nothing.
    async fn check(&self, client: &ComfyClient) -> bool {
        let asked = Instant::now();
        let (state, cause) = match client.system_stats().await {
            Ok(_) => (TunnelState::Healthy, None),
            Err(error) => {
                tracing::debug!(tunnel = self.name, error = %chain(&error), "not healthy");
                (state_of(&error), Some(why_not_healthy(&error)))
            }
        };
        let latency = u64::try_from(asked.elapsed().as_millis()).ok().filter(|_| cause.is_none());
        self.know(move |known| {
            known.state = state;
            known.cause = cause;
            known.checked_at = Some(Timestamp::now());
            known.latency_ms = latency;
        })
        .await;
        state == TunnelState::Healthy
    }

    async fn not_connected(&mut self, cause: Cause, record: &TunnelRecord, local_port: u16) {
        tracing::warn!(tunnel = self.name, %cause, "the tunnel is not up");
        if cause == Cause::PortInUse {
            self.taken.insert(local_port);
            // It had this port before: somebody took it in a moment without ssh, and callers know the tunnel by it.
            let keeps_its_port =
                record.known.local_port.is_some() || matches!(record.wanted.local_port, LocalPort::Fixed(_));
            if !keeps_its_port {
                self.next_attempt = Instant::now();
                self.keeper.turn.send_modify(|turn| *turn += 1);
                return;
            }
        }
        let had_it = cause == Cause::PortInUse && record.known.local_port.is_some();
        let waits_for_its_port = had_it && {
            let since = *self.own_port_busy_since.get_or_insert_with(Instant::now);
            since.elapsed() < OWN_PORT_FREES_WITHIN
        };
        if cause.is_terminal() && !waits_for_its_port {
            let text = match cause {
                Cause::PortInUse => format!("port {local_port} on this machine is in use by another program"),
                cause => cause.to_string(),
            };
            self.failed(text).await;
            return;
        }
        let jitter = 0.75 + f64::from(uuid::Uuid::new_v4().as_fields().1) / f64::from(u16::MAX) / 2.0;
        self.next_attempt = Instant::now() + self.backoff.mul_f64(jitter);
        self.backoff = (self.backoff * 2).min(self.keeper.timing.backoff_most);
        self.know(move |known| {
            known.state = TunnelState::BackingOff;
            known.cause = Some(cause.to_string());
            known.ssh_pid = None;
        })
        .await;
    }

    async fn failed(&self, cause: String) {
        self.know(move |known| {
            known.state = TunnelState::Failed;
            known.cause = Some(cause);
            known.ssh_pid = None;
        })
        .await;
    }

    /// ssh itself binds, so a port is only ever proposed here. Once it had one, it keeps it.
    fn pick_port(&self, record: &TunnelRecord) -> Option<u16> {
        if let Some(port) = record.known.local_port {
            return Some(port);
        }
        match record.wanted.local_port {
            LocalPort::Fixed(port) => Some(port),
            LocalPort::Any => std::net::TcpListener::bind(("127.0.0.1", 0)).ok()?.local_addr().ok().map(|at| at.port()),
            LocalPort::From(first) => {
                let others: BTreeSet<_> = self
                    .keeper
                    .tunnels
                    .read()
                    .ok()?
                    .into_iter()
                    .filter(|(name, _)| *name != self.name)
                    .filter_map(|(_, other)| other.known.local_port)
                    .collect();
                let last = first.saturating_add(MOST_PORTS_TRIED);
                (first..=last).find(|port| !others.contains(port) && !self.taken.contains(port))
            }
        }
    }

    /// From our records where the pod is in them, for its own task asks the provider; else from the provider.
    async fn whereabouts(&self, record: &TunnelRecord) -> Whereabouts {
        let id = &record.wanted.pod_id;
        let pods = match self.keeper.fleet.read() {
            Ok(pods) => pods,
            Err(error) => return Whereabouts::NotYet(chain(&error)),
        };
        let target = |address: SshAddress, starts: u32| {
            Whereabouts::At(Target { address, host_key_alias: host_key_alias(id, starts) })
        };
        if let Some(pod) = pods.values().find(|pod| pod.known.pod_id.as_ref() == Some(id)) {
            return match (&pod.known.ssh, pod.is_open()) {
                (_, false) => Whereabouts::Gone,
                (Some(address), true) => target(address.clone(), pod.known.starts),
                (None, true) => Whereabouts::NotYet(why_no_address(pod)),
            };
        }
        let Some(provider) = self.keeper.provider() else {
            return Whereabouts::NotYet("the keeper has no API key to ask where the pod is".to_owned());
        };
        match provider.pod(id).await {
            Ok(answer) => match answer.value.ssh {
                Some(address) => {
                    let start = answer.value.started_at.map_or(0, Timestamp::as_second);
                    Whereabouts::At(Target { address, host_key_alias: host_key_alias(id, start) })
                }
                None => Whereabouts::NotYet("the pod has no address for SSH (is 22/tcp among its ports?)".to_owned()),
            },
            Err(ProviderError::NotFound { .. }) => Whereabouts::Gone,
            Err(error) => Whereabouts::NotYet(chain(&error)),
        }
    }

    async fn until_moved(&self, target: &Target) -> &'static str {
        loop {
            tokio::time::sleep(self.keeper.timing.keeper_turn).await;
            let Ok(Some(record)) = self.record() else { continue };
            let Ok(pods) = self.keeper.fleet.read() else { continue };
            let id = Some(&record.wanted.pod_id);
            let Some(pod) = pods.values().find(|pod| pod.known.pod_id.as_ref() == id) else { continue };
            match &pod.known.ssh {
                _ if !pod.is_open() => return "the pod is gone",
                None => return "the pod has no address any more",
                Some(address) if *address != target.address => return "the pod has a new address",
                Some(_) if host_key_alias(&record.wanted.pod_id, pod.known.starts) != target.host_key_alias => {
                    return "the pod was started anew";
                }
                Some(_) => {}
            }
        }
    }

    async fn until_unwanted(&self) {
        let mut turn = self.keeper.turn.subscribe();
        loop {
            let wanted = match self.record() {
                Ok(record) => record.is_some_and(|record| record.wanted.open),
                // Records that can't be read for a moment are no order to close anything.
                Err(_) => true,
            };
            if self.keeper.stop.is_cancelled() || !wanted {
                return;
            }
            self.keeper.wait(&mut turn, self.keeper.timing.keeper_turn).await;
        }
    }

    fn record(&self) -> Result<Option<TunnelRecord>, StateError> {
        Ok(self.keeper.tunnels.get(&self.name)?.filter(|record| record.intent == self.intent))
    }

    async fn remove(&self) {
        if let Err(error) = self.keeper.tunnels.remove(&self.name, &self.intent).await {
            tracing::error!(tunnel = self.name, error = %chain(&error), "a closed tunnel's record can't be removed");
        }
    }

    async fn know(&self, change: impl FnOnce(&mut TunnelKnown) + Send + 'static) {
        if let Err(error) = self.keeper.tunnels.know(&self.name, &self.intent, change).await {
            tracing::error!(tunnel = self.name, error = %chain(&error), "what is known can't be written");
        }
    }
}

fn why_no_address(pod: &PodRecord) -> String {
    match pod.known.status {
        Some(status) => format!("the pod is {status} and has no address for SSH yet"),
        None => "the pod is not placed yet".to_owned(),
    }
}

/// A broken connection behind a working tunnel means that nothing listens at its far end.
fn why_not_healthy(error: &ComfyError) -> String {
    match state_of(error) {
        TunnelState::RemoteRefused => "nothing listens on that port of the pod yet".to_owned(),
        _ => chain(error),
    }
}

fn state_of(error: &ComfyError) -> TunnelState {
    match error {
        ComfyError::Refused { .. } | ComfyError::Cut { .. } | ComfyError::Unreachable { .. } => {
            TunnelState::RemoteRefused
        }
        ComfyError::TimedOut { .. } => TunnelState::HttpTimeout,
        ComfyError::WrongService { .. } => TunnelState::WrongService,
        _ => TunnelState::SshUp,
    }
}
