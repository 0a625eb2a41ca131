//! One pod of the world: what was asked for, how far it has come, and how RunPod shows it.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::billing::{DISK_GB_HOUR, Meter, VOLUME_GB_HOUR};
use super::catalog::{Cloud, DATA_CENTERS, GPUS, Gpu, find_data_center, find_gpu};
use super::container::Container;
use super::faults::{Fault, FaultKind};

/// What a create asked for, checked and filled up with the defaults.
#[derive(Debug, Clone)]
pub struct PodConfig {
    pub name: String,
    pub image: String,
    /// `Some("")` replaces the image's own start command with nothing, so nothing in the pod ever comes up.
    pub args: Option<String>,
    pub disk_gb: u32,
    /// As echoed: what was sent and what `startSsh` and `startJupyter` put in.
    pub env: BTreeMap<String, String>,
    pub ports: Vec<Port>,
    pub cloud: Cloud,
    pub gpu: &'static Gpu,
    pub gpu_count: u32,
    pub cuda: &'static str,
    pub mount: Option<Mount>,
    pub data_center: &'static str,
    pub global_networking: bool,
    pub registry: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    pub number: u16,
    pub http: bool,
}

#[derive(Debug, Clone)]
pub enum Mount {
    Network { volume_id: String, path: String },
    Persistent { size_gb: u32, path: String },
}

/// How far a pod has come on its way up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    Allocating,
    Starting,
    /// The container runs and its port is mapped, but nothing listens yet.
    ContainerUp,
    SshUp,
    ComfyUp,
    Stopped,
    /// The container's servers could not be started on this machine.
    Failed,
}

/// How long each step of a pod's way up takes in the world's time.
const ALLOCATION: Duration = Duration::from_secs(2);
const CONTAINER: Duration = Duration::from_secs(2);
const SSHD: Duration = Duration::from_secs(1);
const COMFYUI: Duration = Duration::from_secs(2);

/// One line of `GET /v2/pods/{id}/logs`.
#[derive(Debug, Clone)]
pub struct LogLine {
    pub at: Timestamp,
    /// `container` or `system`.
    pub source: &'static str,
    pub line: String,
}

pub struct Pod {
    pub id: String,
    pub config: PodConfig,
    pub stage: Stage,
    /// When the stage was reached.
    pub since: Timestamp,
    pub created_at: Timestamp,
    /// When its container last came up by a create or a start; a restart in place doesn't move it.
    pub started_at: Option<Timestamp>,
    /// When it was terminated; a pod that has ended is kept only for the control routes and the bills.
    pub ended_at: Option<Timestamp>,
    /// A machine stays assigned while the pod is stopped.
    pub has_machine: bool,
    pub restarting: bool,
    pub container: Option<Arc<Container>>,
    /// The SSH port of its latest container.
    pub ssh_port: Option<u16>,
    /// How often a container was started.
    pub container_starts: u32,
    /// What earlier containers of this pod had logged.
    pub past_events: Vec<Value>,
    pub meter: Meter,
    pub logs: Vec<LogLine>,
    /// The API key inside the container, good for this pod alone.
    pub scoped_key: String,
    /// Where its ports are on this machine.
    pub address: Ipv4Addr,
    /// USD an hour instead of the catalog's price.
    pub odd_price: Option<f64>,
    /// The stage that it won't get beyond this time.
    pub fails_at: Option<Stage>,
}

impl Pod {
    pub fn new(id: String, config: PodConfig, scoped_key: String, now: Timestamp) -> Self {
        let mut pod = Self {
            id,
            config,
            stage: Stage::Allocating,
            since: now,
            created_at: now,
            started_at: None,
            ended_at: None,
            has_machine: false,
            restarting: false,
            container: None,
            ssh_port: None,
            container_starts: 0,
            past_events: Vec::new(),
            meter: Meter::default(),
            logs: Vec::new(),
            scoped_key,
            address: Ipv4Addr::LOCALHOST,
            odd_price: None,
            fails_at: None,
        };
        pod.charge(now);
        pod.log(now, "system", "waiting for a machine");
        pod
    }

    pub fn is_gone(&self) -> bool {
        self.ended_at.is_some()
    }

    /// Whether it holds its GPUs, and so is charged for them.
    pub fn holds_gpus(&self) -> bool {
        !self.is_gone() && !matches!(self.stage, Stage::Stopped)
    }

    pub fn status(&self) -> &'static str {
        if self.is_gone() {
            return "TERMINATED";
        }
        match self.stage {
            Stage::Allocating => "PROVISIONING",
            Stage::Starting => "STARTING",
            Stage::ContainerUp | Stage::SshUp | Stage::ComfyUp => "RUNNING",
            Stage::Stopped => "EXITED",
            Stage::Failed => "ERROR",
        }
    }

    /// What the API allows now.
    pub fn actions(&self) -> &'static [&'static str] {
        match self.status() {
            "RUNNING" => &["stop", "restart", "terminate"],
            "PROVISIONING" | "STARTING" => &["stop", "terminate"],
            "EXITED" | "ERROR" => &["start", "terminate"],
            _ => &[],
        }
    }

    /// USD an hour for its GPUs, whether or not they are charged right now.
    pub fn price(&self) -> f64 {
        let usual = || self.config.gpu.price(self.config.cloud).unwrap_or_default() * f64::from(self.config.gpu_count);
        self.odd_price.unwrap_or_else(usual)
    }

    /// What befalls it by a fault of the create or start that it comes from.
    pub fn suffer(&mut self, fault: &Fault) {
        let config = &mut self.config;
        match fault.kind {
            FaultKind::Elsewhere => {
                let other = DATA_CENTERS.iter().find(|center| center.id != config.data_center);
                let named = fault.data_center.as_deref().and_then(find_data_center);
                config.data_center = named.or(other).map_or(config.data_center, |center| center.id);
            }
            FaultKind::ChangedGpu => {
                let other = GPUS.iter().find(|gpu| gpu.id != config.gpu.id && gpu.price(config.cloud).is_some());
                config.gpu = fault.gpu.as_deref().and_then(find_gpu).or(other).unwrap_or(config.gpu);
            }
            FaultKind::ChangedAddress => {
                let [.., last] = self.address.octets();
                self.address = Ipv4Addr::new(127, 0, 0, last % 250 + 1);
            }
            FaultKind::ErrorState => self.fails_at = Some(fault.stage.unwrap_or(Stage::Allocating)),
            FaultKind::Price => self.odd_price = Some(fault.cost.unwrap_or(2.0 * self.price())),
            _ => {}
        }
    }

    pub fn charge(&mut self, at: Timestamp) {
        let disk = f64::from(self.config.disk_gb) * DISK_GB_HOUR;
        let volume = self.volume_gb() * VOLUME_GB_HOUR;
        self.meter.charge(at, self.price(), disk + volume);
    }

    /// A stopped pod costs nothing but a volume disk of its own; network volumes are the account's.
    pub fn charge_stopped(&mut self, at: Timestamp) {
        self.meter.charge(at, 0.0, 2.0 * self.volume_gb() * VOLUME_GB_HOUR);
    }

    fn volume_gb(&self) -> f64 {
        match &self.config.mount {
            Some(Mount::Persistent { size_gb, .. }) => f64::from(*size_gb),
            _ => 0.0,
        }
    }

    /// When its next step is due, if one is.
    pub fn due(&self) -> Option<Timestamp> {
        if self.is_gone() {
            return None;
        }
        let wait = match self.stage {
            Stage::Allocating => ALLOCATION,
            Stage::Starting => CONTAINER,
            Stage::ContainerUp => SSHD,
            Stage::SshUp => COMFYUI,
            Stage::ComfyUp | Stage::Stopped | Stage::Failed => return None,
        };
        self.since.checked_add(wait).ok()
    }

    pub fn enter(&mut self, stage: Stage, at: Timestamp) {
        self.stage = stage;
        self.since = at;
    }

    pub fn log(&mut self, at: Timestamp, source: &'static str, line: impl Into<String>) {
        self.logs.push(LogLine { at, source, line: line.into() });
    }

    pub fn exposes(&self, number: u16, http: bool) -> bool {
        self.config.ports.contains(&Port { number, http })
    }

    /// Whether the image's own start command runs, which starts sshd and ComfyUI.
    pub fn start_command_runs(&self) -> bool {
        self.config.args.as_deref() != Some("")
    }

    pub fn public_key(&self) -> &str {
        self.config.env.get("PUBLIC_KEY").map_or("", String::as_str)
    }

    /// The events of all its containers, oldest first.
    pub fn events(&self) -> Vec<Value> {
        let mut events = self.past_events.clone();
        if let Some(container) = &self.container {
            events.extend(container.events());
        }
        events
    }

    /// The `Pod` of RunPod's API.
    pub fn view(&self, now: Timestamp) -> Value {
        let config = &self.config;
        json!({
            "id": self.id,
            "name": config.name,
            "image": config.image,
            "args": config.args.as_deref().unwrap_or_default(),
            "disk": config.disk_gb,
            "ports": config.ports.iter().map(Port::text).collect::<Vec<_>>(),
            "env": config.env,
            "registry": config.registry,
            "status": self.status(),
            "actions": self.actions(),
            "mounts": self.mounts(),
            "gpu": { "id": config.gpu.id, "count": config.gpu_count },
            "cloud": config.cloud.as_str(),
            "dataCenterId": self.has_machine.then_some(config.data_center),
            "cudaVersion": self.has_machine.then_some(config.cuda),
            "ssh": { "proxy": self.ssh_proxy(), "direct": self.ssh_direct() },
            "template": null,
            "cost": if self.holds_gpus() { self.price() } else { 0.0 },
            "locked": false,
            "globalNetworking": self.global_networking(),
            "runtime": self.runtime(now),
            "createdAt": self.created_at,
            "startedAt": self.started_at,
        })
    }

    fn mounts(&self) -> Value {
        match &self.config.mount {
            None => json!({}),
            Some(Mount::Network { volume_id, path }) => json!({ "network": [{ "volumeId": volume_id, "path": path }] }),
            Some(Mount::Persistent { size_gb, path }) => json!({ "persistent": { "size": size_gb, "path": path } }),
        }
    }

    fn ssh_proxy(&self) -> Value {
        if !self.has_machine {
            return Value::Null;
        }
        let username = format!("{}-64411eb2", self.id);
        let command = format!("ssh {username}@ssh.runpod.io");
        json!({ "host": "ssh.runpod.io", "port": 22, "username": username, "command": command })
    }

    fn ssh_direct(&self) -> Value {
        match &self.container {
            Some(container) if self.exposes(22, false) => {
                let port = container.ssh_port();
                let host = self.address;
                let command = format!("ssh root@{host} -p {port}");
                json!({ "host": host, "port": port, "username": "root", "command": command })
            }
            _ => Value::Null,
        }
    }

    fn global_networking(&self) -> Value {
        if !self.config.global_networking {
            return json!({ "enabled": false });
        }
        json!({ "enabled": true, "ip": "10.65.1.42", "internalDns": format!("{}.runpod.internal", self.id) })
    }

    fn runtime(&self, now: Timestamp) -> Value {
        let Some(container) = &self.container else { return Value::Null };
        let up_since = self.started_at.unwrap_or(now);
        let ports =
            self.config.ports.iter().map(|port| port.mapping(self.address, container.ssh_port())).collect::<Vec<_>>();
        let gpus = (0..self.config.gpu_count).map(|_| json!({ "util": 0, "memoryUtil": 1 })).collect::<Vec<_>>();
        json!({
            "uptime": now.duration_since(up_since).as_secs().max(0),
            "gpus": gpus,
            "cpu": { "util": 2 },
            "memory": { "util": 4 },
            "ports": ports,
        })
    }

    /// What `GET /_sandbox/pods` shows, pods that have ended included.
    pub fn inner_view(&self, now: Timestamp) -> Value {
        let cost = self.meter.total(now);
        let mut view = Map::new();
        view.insert("id".into(), json!(self.id));
        view.insert("name".into(), json!(self.config.name));
        view.insert("status".into(), json!(self.status()));
        view.insert("stage".into(), json!(format!("{:?}", self.stage)));
        view.insert("gpu".into(), json!(self.config.gpu.id));
        view.insert("gpu_count".into(), json!(self.config.gpu_count));
        view.insert("data_center".into(), json!(self.config.data_center));
        view.insert("price_per_hour".into(), json!(self.price()));
        view.insert("accrued_usd".into(), json!(cost.total()));
        view.insert("accrued_gpu_usd".into(), json!(cost.gpu));
        view.insert("accrued_disk_usd".into(), json!(cost.disk));
        view.insert("created_at".into(), json!(self.created_at));
        view.insert("started_at".into(), json!(self.started_at));
        view.insert("ended_at".into(), json!(self.ended_at));
        view.insert("container_starts".into(), json!(self.container_starts));
        view.insert("scoped_key".into(), json!(self.scoped_key));
        view.insert("ssh_port".into(), json!(self.container.as_ref().map(|container| container.ssh_port())));
        view.insert("events".into(), Value::Array(self.events()));
        Value::Object(view)
    }
}

impl Port {
    pub fn text(&self) -> String {
        format!("{}/{}", self.number, if self.http { "http" } else { "tcp" })
    }

    /// An HTTP port is reached through RunPod's proxy, so its mapping shows an address inside; of the TCP ports the
    /// world maps sshd's alone.
    fn mapping(&self, address: Ipv4Addr, ssh_port: u16) -> Value {
        match (self.http, self.number) {
            (true, number) => json!({
                "private": number, "public": 60_000 + u32::from(number % 5_000), "type": "http", "ip": "100.65.24.7"
            }),
            (false, 22) => json!({ "private": 22, "public": ssh_port, "type": "tcp", "ip": address }),
            (false, number) => json!({ "private": number, "public": null, "type": "tcp", "ip": null }),
        }
    }
}
