//! Tunnels: start, list, stop; and the one function by which ComfyUI tools get theirs.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::context::Services;
use super::pods::{find, find_or_only, stopped};
use super::waiting::Waiting;
use super::words::word;
use super::{Context, Effect, StillBilling, Tool, ToolError};
use crate::fleet::Phase;
use crate::tunnel::{COMFY_PORT, LocalPort, Opened, TunnelRecord, TunnelState, name_of};

pub struct StartTunnel;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StartTunnelInput {
    /// The pod's name or id; may be left out when there is only one.
    #[serde(default)]
    pod: Option<String>,
    /// Port on this machine. Left out: 8188 or the next free one. 0: any free one.
    #[schemars(range(min = 0, max = 65535))]
    #[serde(default)]
    local_port: Option<u16>,
    /// Port inside the pod; 8188 (ComfyUI) when left out.
    #[schemars(range(min = 1, max = 65535))]
    #[serde(default)]
    remote_port: Option<u16>,
    /// Seconds to wait for a healthy tunnel; 40 when left out.
    #[schemars(range(min = 0, max = 45))]
    #[serde(default)]
    wait_seconds: Option<u64>,
}

/// How far a tunnel is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Stage {
    WaitingForPod,
    Connecting,
    Checking,
    Healthy,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct StartTunnelOutput {
    pod: String,
    state: Stage,
    done: bool,
    /// False when there was such a tunnel already.
    created: bool,
    /// Where the pod's port is reached on this machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    local_port: Option<u16>,
    remote_port: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    latency_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting_for: Option<String>,
    still_billing: StillBilling,
    next: String,
}

impl Tool for StartTunnel {
    const NAME: &'static str = "start_tunnel";
    const TITLE: &'static str = "Open a tunnel to a pod";
    const DESCRIPTION: &'static str = "Makes a pod's port (ComfyUI's 8188) reachable on 127.0.0.1 through SSH. Lives \
        as long as the pod, also after this server ends.";
    const EFFECT: Effect = Effect::Creates;
    const EXAMPLE: &'static str = r#"{"pod": "comfy"}"#;
    type Input = StartTunnelInput;
    type Output = StartTunnelOutput;

    async fn run(context: &Context, input: StartTunnelInput) -> Result<StartTunnelOutput, ToolError> {
        let waiting = Waiting::new(context, input.wait_seconds);
        let pod = find_or_only(&context.services, input.pod.as_deref()).await?.name;
        let local_port = match input.local_port {
            None => LocalPort::From(COMFY_PORT),
            Some(0) => LocalPort::Any,
            Some(port) => LocalPort::Fixed(port),
        };
        let remote_port = input.remote_port.unwrap_or(COMFY_PORT);
        let open = open(&waiting, context, &pod, remote_port, local_port).await?;
        let again = || {
            let mut arguments = serde_json::json!({"pod": pod});
            for (field, port) in [("local_port", input.local_port), ("remote_port", input.remote_port)] {
                if let Some(port) = port {
                    arguments[field] = port.into();
                }
            }
            format!("start_tunnel {arguments}")
        };
        let next = match open.stage {
            Stage::Healthy => format!("comfy_run, or comfy_status {{\"pod\": \"{pod}\"}}"),
            _ => again(),
        };
        Ok(StartTunnelOutput {
            state: open.stage,
            done: open.stage == Stage::Healthy,
            created: open.created,
            url: open.record.as_ref().and_then(TunnelRecord::url),
            local_port: open.record.as_ref().and_then(|record| record.known.local_port),
            latency_ms: open.record.as_ref().and_then(|record| record.known.latency_ms),
            remote_port,
            waiting_for: open.waiting_for,
            still_billing: if open.record.is_some() { StillBilling::Yes } else { StillBilling::Possible },
            next,
            pod,
        })
    }

    fn text(output: &StartTunnelOutput) -> String {
        match (&output.url, output.done) {
            (Some(url), true) => {
                format!("{url} is {}'s port {}.\nNext: {}", output.pod, output.remote_port, output.next)
            }
            _ => {
                let waiting_for = output.waiting_for.as_deref().unwrap_or("the pod");
                format!("The tunnel to {} is not up yet: {waiting_for}.\nNext: {}", output.pod, output.next)
            }
        }
    }
}

/// A tunnel as far as it came within the time there was.
pub(super) struct Open {
    pub stage: Stage,
    pub created: bool,
    pub record: Option<TunnelRecord>,
    pub waiting_for: Option<String>,
}

/// Opens a tunnel or joins the one there is, and waits until it is healthy or time is up. The one way to a new tunnel.
pub(super) async fn open(
    waiting: &Waiting<'_>,
    context: &Context,
    pod: &str,
    remote_port: u16,
    local_port: LocalPort,
) -> Result<Open, ToolError> {
    let services = &context.services;
    // It would be waited for in vain.
    if let Some(error) = services.fleet.get(pod)?.and_then(|record| stopped(pod, &record)) {
        return Err(error);
    }
    services.keeper_for_changes().await?;
    let Some(pod_id) = pod_id(waiting, services, pod).await? else {
        return Ok(Open {
            stage: Stage::WaitingForPod,
            created: false,
            record: None,
            waiting_for: Some("the provider to place the pod".to_owned()),
        });
    };
    services.fleet.mark_used(&pod_id);
    let name = name_of(pod, remote_port);
    refuse_taken_port(services, &name, local_port)?;
    let fresh = TunnelRecord::new(pod, &pod_id, remote_port, local_port);
    let (created, intent) = match services.tunnels.want_open(&name, fresh).await? {
        Opened::New(record) => (true, record.intent),
        Opened::Joined(record) => (false, record.intent),
        Opened::OnAnotherPort(record) => {
            let port = record.known.local_port.unwrap_or_default();
            return Err(ToolError::invalid("local_port", format!("the tunnel to `{pod}` is on port {port} already"))
                .hint(format!("use {}, or stop_tunnel first", record.url().unwrap_or_default())));
        }
    };
    services.keeper_for_changes().await?;
    watch(waiting, services, pod, &name, &intent, created).await
}

/// The tunnel there is, waited for until it is healthy or time is up; `None` when nobody has opened one.
pub(super) async fn join(
    waiting: &Waiting<'_>,
    services: &Services,
    pod: &str,
    remote_port: u16,
) -> Result<Option<Open>, ToolError> {
    let name = name_of(pod, remote_port);
    let Some(record) = services.tunnels.get(&name)?.filter(TunnelRecord::is_open) else { return Ok(None) };
    services.fleet.mark_used(&record.wanted.pod_id);
    watch(waiting, services, pod, &name, &record.intent, false).await.map(Some)
}

async fn watch(
    waiting: &Waiting<'_>,
    services: &Services,
    pod: &str,
    name: &str,
    intent: &str,
    created: bool,
) -> Result<Open, ToolError> {
    let mut told = String::new();
    loop {
        let record = services.tunnels.get(name)?.filter(|record| record.intent == intent);
        let Some(record) = record else {
            return Err(ToolError::failed(format!(
                "the tunnel to `{pod}` was closed: the pod is gone, or somebody stopped it"
            ))
            .hint(format!("see get_pod {{\"pod\": \"{pod}\"}}")));
        };
        if record.known.state == TunnelState::Failed {
            let cause = record.known.cause.clone().unwrap_or_default();
            return Err(ToolError::failed(format!("no tunnel to `{pod}`: {cause}"))
                .hint("mend that and call start_tunnel again; another local_port can be given")
                .billing(StillBilling::Yes));
        }
        let (stage, waiting_for) = stage_of(&record);
        let step = waiting_for.clone().unwrap_or_else(|| "healthy".to_owned());
        if step != told {
            waiting.tell(&step);
            told = step;
        }
        if stage == Stage::Healthy || !waiting.again().await {
            return Ok(Open { stage, created, record: Some(record), waiting_for });
        }
        if !services.keeper.is_alive() {
            services.keeper_for_changes().await?;
        }
    }
}

/// A port that is taken is told at once and by whom, though ssh binds it itself and would say so later.
fn refuse_taken_port(services: &Services, name: &str, local_port: LocalPort) -> Result<(), ToolError> {
    let LocalPort::Fixed(port) = local_port else { return Ok(()) };
    let tunnels = services.tunnels.read()?;
    if tunnels.get(name).is_some_and(TunnelRecord::is_open) {
        return Ok(());
    }
    let ours = tunnels.iter().find(|(other, record)| *other != name && record.known.local_port == Some(port));
    let holder = match ours {
        Some((_, record)) => format!("the tunnel to `{}`", record.wanted.pod),
        None if std::net::TcpListener::bind(("127.0.0.1", port)).is_err() => "another program".to_owned(),
        None => return Ok(()),
    };
    Err(ToolError::invalid("local_port", format!("port {port} on this machine is in use by {holder}"))
        .hint("leave local_port out for the next free one, or give 0 for any"))
}

/// Waits until the pod has an id, which it gets when it is placed.
async fn pod_id(waiting: &Waiting<'_>, services: &Services, pod: &str) -> Result<Option<String>, ToolError> {
    loop {
        let found = find(services, pod).await?;
        if let Some(id) = found.pod_id() {
            return Ok(Some(id.to_owned()));
        }
        if found.record.is_some_and(|record| record.known.phase == Phase::Refused) {
            return Err(ToolError::not_found(format!("the pod `{pod}` was refused")));
        }
        if !waiting.again().await {
            return Ok(None);
        }
    }
}

fn stage_of(record: &TunnelRecord) -> (Stage, Option<String>) {
    let known = &record.known;
    let cause = known.cause.clone();
    match known.state {
        TunnelState::Healthy => (Stage::Healthy, None),
        TunnelState::WaitingForPod => {
            (Stage::WaitingForPod, Some(cause.unwrap_or_else(|| "the pod's address".to_owned())))
        }
        TunnelState::Connecting => (Stage::Connecting, Some("ssh to connect".to_owned())),
        TunnelState::BackingOff => {
            (Stage::Connecting, Some(cause.unwrap_or_else(|| "ssh to connect again".to_owned())))
        }
        _ => (Stage::Checking, Some(cause.unwrap_or_else(|| "ComfyUI to answer".to_owned()))),
    }
}

pub struct ListTunnels;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListTunnelsInput {}

#[derive(Debug, Serialize, JsonSchema)]
pub struct ListTunnelsOutput {
    tunnels: Vec<TunnelRow>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct TunnelRow {
    pod: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    remote_port: u16,
    state: RowState,
    #[serde(skip_serializing_if = "Option::is_none")]
    cause: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    since: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    latency_ms: Option<u64>,
    reconnects: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum RowState {
    WaitingForPod,
    Connecting,
    SshUp,
    RemoteRefused,
    HttpTimeout,
    WrongService,
    Healthy,
    BackingOff,
    Failed,
    Closing,
    /// No keeper lives, so nobody holds it; it is being started.
    NotHeld,
}

impl Tool for ListTunnels {
    const NAME: &'static str = "list_tunnels";
    const TITLE: &'static str = "List tunnels";
    const DESCRIPTION: &'static str = "Tunnels of this machine with their address, state and the cause of trouble.";
    const EFFECT: Effect = Effect::Reads;
    const EXAMPLE: &'static str = "{}";
    type Input = ListTunnelsInput;
    type Output = ListTunnelsOutput;

    async fn run(context: &Context, _: ListTunnelsInput) -> Result<ListTunnelsOutput, ToolError> {
        let services = &context.services;
        let held = services.keeper.is_alive();
        let records = services.tunnels.read()?;
        if !held
            && records.values().any(TunnelRecord::needs_keeper)
            && let Err(error) = services.keeper_for_changes().await
        {
            // The rows say `not_held`, which is what was asked for.
            tracing::warn!(%error, "the keeper can't be started");
        }
        let tunnels = records
            .into_values()
            .map(|record| TunnelRow {
                state: row_state(&record, held),
                url: record.url(),
                pod: record.wanted.pod,
                remote_port: record.wanted.remote_port,
                cause: record.known.cause,
                since: record.known.since,
                latency_ms: record.known.latency_ms,
                reconnects: record.known.reconnects,
            })
            .collect();
        Ok(ListTunnelsOutput { tunnels })
    }

    fn text(output: &ListTunnelsOutput) -> String {
        if output.tunnels.is_empty() {
            return "No tunnels.".to_owned();
        }
        let line = |row: &TunnelRow| {
            let url = row.url.as_deref().unwrap_or("no address yet");
            let cause = row.cause.as_ref().map_or_else(String::new, |cause| format!(" ({cause})"));
            format!("{url} -> {}:{}: {}{cause}", row.pod, row.remote_port, word(row.state))
        };
        output.tunnels.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

fn row_state(record: &TunnelRecord, held: bool) -> RowState {
    match record.known.state {
        _ if !record.wanted.open => RowState::Closing,
        TunnelState::Failed => RowState::Failed,
        _ if !held => RowState::NotHeld,
        TunnelState::WaitingForPod => RowState::WaitingForPod,
        TunnelState::Connecting => RowState::Connecting,
        TunnelState::SshUp => RowState::SshUp,
        TunnelState::RemoteRefused => RowState::RemoteRefused,
        TunnelState::HttpTimeout => RowState::HttpTimeout,
        TunnelState::WrongService => RowState::WrongService,
        TunnelState::Healthy => RowState::Healthy,
        TunnelState::BackingOff => RowState::BackingOff,
    }
}

pub struct StopTunnel;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StopTunnelInput {
    /// The pod whose tunnels stop: name or id. Left out only with `which`.
    #[serde(default)]
    pod: Option<String>,
    /// Only the tunnel to this port inside the pod.
    #[schemars(range(min = 1, max = 65535))]
    #[serde(default)]
    remote_port: Option<u16>,
    /// Instead of a pod: `all` tunnels, or only the `dead` ones.
    #[serde(default)]
    which: Option<Which>,
    /// Seconds to wait for the proof; 40 when left out.
    #[schemars(range(min = 0, max = 45))]
    #[serde(default)]
    wait_seconds: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Which {
    All,
    Dead,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct StopTunnelOutput {
    /// Records taken out of the file, their ssh ended.
    stopped: Vec<String>,
    done: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting_for: Option<String>,
}

impl Tool for StopTunnel {
    const NAME: &'static str = "stop_tunnel";
    const TITLE: &'static str = "Stop tunnels";
    const DESCRIPTION: &'static str = "Closes the tunnels of a pod, all tunnels, or the dead ones. Pods go on running.";
    const EFFECT: Effect = Effect::Changes;
    const EXAMPLE: &'static str = r#"{"pod": "comfy"}"#;
    type Input = StopTunnelInput;
    type Output = StopTunnelOutput;

    async fn run(context: &Context, input: StopTunnelInput) -> Result<StopTunnelOutput, ToolError> {
        let services = &context.services;
        let waiting = Waiting::new(context, input.wait_seconds);
        if input.pod.is_none() && input.which.is_none() {
            return Err(ToolError::invalid("pod", "name the pod whose tunnels stop")
                .hint("or say which: all | dead; see list_tunnels"));
        }
        let records = services.tunnels.read()?;
        let belongs = |record: &TunnelRecord, pod: &str| record.wanted.pod == pod || record.wanted.pod_id == pod;
        if let Some(pod) = &input.pod
            && !records.values().any(|record| belongs(record, pod))
        {
            let there: Vec<_> = records.values().map(|record| record.wanted.pod.as_str()).collect();
            let there = if there.is_empty() { "there are none".to_owned() } else { there.join(", ") };
            return Err(ToolError::not_found(format!("`pod`: there is no tunnel to `{pod}`"))
                .hint(format!("tunnels lead to: {there}")));
        }
        let wanted_closed = services
            .tunnels
            .want_closed(move |_, record| {
                input.pod.as_ref().is_none_or(|pod| belongs(record, pod))
                    && input.remote_port.is_none_or(|port| record.wanted.remote_port == port)
                    && (input.which != Some(Which::Dead) || record.known.state == TunnelState::Failed)
            })
            .await?;
        if !wanted_closed.is_empty() {
            services.keeper_for_changes().await?;
        }
        loop {
            let there = services.tunnels.read()?;
            let still = |(name, closed): &&(String, TunnelRecord)| {
                there.get(name).is_some_and(|record| record.intent == closed.intent)
            };
            let left: Vec<_> = wanted_closed.iter().filter(still).map(|(name, _)| name.clone()).collect();
            if left.is_empty() || !waiting.again().await {
                let stopped = wanted_closed.into_iter().map(|(name, _)| name).filter(|name| !left.contains(name));
                return Ok(StopTunnelOutput {
                    done: left.is_empty(),
                    stopped: stopped.collect(),
                    waiting_for: (!left.is_empty()).then(|| format!("the keeper to close {}", left.join(", "))),
                });
            }
        }
    }

    fn text(output: &StopTunnelOutput) -> String {
        match (&output.waiting_for, output.stopped.as_slice()) {
            (Some(waiting_for), _) => format!("Waiting for {waiting_for}."),
            (None, []) => "There was nothing to stop.".to_owned(),
            (None, stopped) => format!("Stopped: {}.", stopped.join(", ")),
        }
    }
}
