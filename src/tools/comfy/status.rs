//! comfy_status: whether ComfyUI answers now, and what it runs on.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Target, reach};
use crate::comfy::Device;
use crate::tools::waiting::Waiting;
use crate::tools::{Context, Effect, ErrorKind, StillBilling, Tool, ToolError};

pub struct ComfyStatus;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StatusInput {
    /// The pod's name or id; may be left out when there is only one.
    #[serde(default)]
    pod: Option<String>,
    /// Address of a ComfyUI instead of a pod.
    #[serde(default)]
    url: Option<String>,
    /// Seconds to wait until it answers; 40 when left out, 0: as it is now.
    #[schemars(range(min = 0, max = 45))]
    #[serde(default)]
    wait_seconds: Option<u64>,
}

#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct StatusOutput {
    ready: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
    /// Why it is not ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    cause: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    latency_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    comfyui_version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    python_version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pytorch_version: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    devices: Vec<DeviceRow>,
    /// In GiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    ram_total_gb: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ram_free_gb: Option<f64>,
    /// Prompts in the queue.
    #[serde(skip_serializing_if = "Option::is_none")]
    running: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pending: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    still_billing: Option<StillBilling>,
    next: String,
}

#[derive(Debug, Serialize, JsonSchema)]
struct DeviceRow {
    name: String,
    /// `cuda`, `cpu`, ...
    kind: String,
    /// In GiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    vram_total_gb: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vram_free_gb: Option<f64>,
}

impl Tool for ComfyStatus {
    const NAME: &'static str = "comfy_status";
    const TITLE: &'static str = "Is ComfyUI ready?";
    const DESCRIPTION: &'static str = "Asks ComfyUI now, through the pod's tunnel (opened when there is none): ready or \
        why not, versions, GPUs and memory, queue lengths.";
    /// A tunnel may be opened on the way, but nothing in the pod or the account changes.
    const EFFECT: Effect = Effect::Reads;
    const EXAMPLE: &'static str = r#"{"pod": "comfy"}"#;
    type Input = StatusInput;
    type Output = StatusOutput;

    async fn run(context: &Context, input: StatusInput) -> Result<StatusOutput, ToolError> {
        let waiting = Waiting::new(context, input.wait_seconds);
        let target = match Target::choose(&context.services, input.pod.as_deref(), input.url.as_deref()).await {
            Ok(target) => target,
            Err(error) => return not_ready(error, None, input.pod.is_none()),
        };
        let ready = match reach(&waiting, context, &target).await {
            Err(error) => return not_ready(error, Some(&target), false),
            Ok(Err(not_yet)) => {
                return Ok(StatusOutput {
                    pod: target.pod().map(str::to_owned),
                    url: not_yet.url,
                    cause: Some(not_yet.cause),
                    still_billing: target.billing(),
                    next: match &target {
                        Target::Pod(_) => format!("{} to wait on, or list_tunnels", target.call("comfy_status")),
                        Target::Url(_) => "see that ComfyUI runs at this address".to_owned(),
                    },
                    ..StatusOutput::default()
                });
            }
            Ok(Ok(ready)) => ready,
        };
        // The lengths are a courtesy: without them the server is ready all the same.
        let queue = ready.client.queue().await.ok();
        let system = ready.stats.system;
        Ok(StatusOutput {
            ready: true,
            pod: target.pod().map(str::to_owned),
            url: Some(ready.url),
            cause: None,
            latency_ms: Some(ready.latency.as_millis() as u64),
            comfyui_version: system.comfyui_version,
            python_version: system.python_version,
            pytorch_version: system.pytorch_version,
            devices: ready.stats.devices.into_iter().map(DeviceRow::from).collect(),
            ram_total_gb: system.ram_total.map(gib),
            ram_free_gb: system.ram_free.map(gib),
            running: queue.as_ref().map(|queue| queue.running.len()),
            pending: queue.as_ref().map(|queue| queue.pending.len()),
            still_billing: target.billing(),
            next: "comfy_run".to_owned(),
        })
    }

    fn text(output: &StatusOutput) -> String {
        let url = output.url.as_deref().unwrap_or("no address yet");
        if !output.ready {
            let cause = output.cause.as_deref().unwrap_or("unknown");
            return format!("ComfyUI is not ready ({url}): {cause}\nNext: {}", output.next);
        }
        let mut lines = vec![format!(
            "ComfyUI {} is ready at {url}.",
            output.comfyui_version.as_deref().unwrap_or("of an unknown version")
        )];
        lines.extend(output.devices.iter().map(|device| match (device.vram_free_gb, device.vram_total_gb) {
            (Some(free), Some(total)) => format!("{}: {free} of {total} GiB free", device.name),
            _ => device.name.clone(),
        }));
        if let (Some(running), Some(pending)) = (output.running, output.pending) {
            lines.push(format!("Queue: {running} running, {pending} pending."));
        }
        lines.join("\n")
    }
}

/// A failure on the way to the server is a plain answer; only what the caller has to mend stays an error.
fn not_ready(error: ToolError, target: Option<&Target>, nothing_named: bool) -> Result<StatusOutput, ToolError> {
    use ErrorKind::*;
    let is_state = match error.kind {
        Failed | Provider | Network | UnknownOutcome => true,
        NotFound => nothing_named,
        InvalidInput | Refused | Setup | Interrupted | Internal => false,
    };
    if !is_state {
        return Err(error);
    }
    Ok(StatusOutput {
        pod: target.and_then(Target::pod).map(str::to_owned),
        cause: Some(error.message),
        still_billing: error.still_billing.or(target.and_then(Target::billing)),
        next: error.hint.unwrap_or_else(|| "call again in a moment; see list_pods and list_tunnels".to_owned()),
        ..StatusOutput::default()
    })
}

impl From<Device> for DeviceRow {
    fn from(device: Device) -> Self {
        Self {
            name: device.name,
            kind: device.kind,
            vram_total_gb: device.vram_total.map(gib),
            vram_free_gb: device.vram_free.map(gib),
        }
    }
}

fn gib(bytes: u64) -> f64 {
    (bytes as f64 / f64::from(1 << 30) * 10.0).round() / 10.0
}
