//! createPod: the contract of the body (422), the rules across fields (400), and a place for the pod (400 if none).

use std::collections::BTreeMap;

use serde_json::Value;

use super::super::templates;
use super::super::validation::{Fields, Violations, cuda_number, is_cuda_version};
use super::super::{Answer, Call, Problem};
use crate::sandbox::catalog::{self, CUDA_VERSIONS, Cloud, DATA_CENTERS, DEFAULT_CUDA, Gpu};
use crate::sandbox::faults::{Fault, FaultKind};
use crate::sandbox::pod::{Mount, PodConfig, Port};
use crate::sandbox::world::{ACCOUNT_SSH_KEY, State, World, new_id};

// The texts of RunPod's capacity refusals, which no code tells apart from a broken rule.
const SOLD_OUT: &str = "There are no longer any instances available with the requested specifications. \
                        Please refresh and try again.";
const FALSE_SOLD_OUT: &str = "create pod: There are no instances currently available";
const NO_SUCH_PODS: &str = "create pod: could not find any pods with required specifications";
const MACHINE_TOO_SMALL: &str =
    "This machine does not have the resources to deploy your pod. Please try a different machine";

const MOST_HTTP_PORTS: usize = 10;
const DEFAULT_DISK_GB: u32 = 50;
const LARGEST_DISK_GB: u32 = 20_000;

const KEYS: &[&str] = &[
    "args",
    "cloud",
    "cpu",
    "dataCenterIds",
    "disk",
    "env",
    "globalNetworking",
    "gpu",
    "image",
    "mounts",
    "name",
    "ports",
    "registry",
    "startJupyter",
    "startSsh",
    "templateId",
];

pub async fn create(world: &World, call: &Call, faults: &[Fault]) -> Result<Answer, Problem> {
    super::Parameters::none(call)?;
    let request = PodRequest::read(call.json()?)?;
    let mut state = world.state().await;
    let config = request.place(&state)?;
    if let Some(fault) = faults.iter().find(|fault| fault.kind == FaultKind::NoCapacity) {
        return Err(Problem::new(400, fault.detail.as_deref().unwrap_or(SOLD_OUT)));
    }
    let now = world.clock.now();
    let pod = state.add_pod(config, now);
    for fault in faults {
        pod.suffer(fault);
    }
    pod.charge(now);
    let view = pod.view(now);
    world.changed.notify_one();
    Ok(Answer::created(view))
}

/// A body that keeps to the contract.
struct PodRequest {
    name: String,
    image: Option<String>,
    args: Option<String>,
    disk_gb: u32,
    env: BTreeMap<String, String>,
    ports: Vec<String>,
    registry: Option<String>,
    cloud: Cloud,
    gpu: Option<GpuRequest>,
    cpu: bool,
    persistent: Option<Mount>,
    network: Option<Mount>,
    data_centers: Vec<String>,
    global_networking: bool,
    start_ssh: bool,
    start_jupyter: bool,
    template: Option<String>,
}

struct GpuRequest {
    id: String,
    count: Option<u32>,
    allowed_cuda: Vec<String>,
    min_cuda: Option<String>,
}

impl PodRequest {
    fn read(body: &Value) -> Result<Self, Problem> {
        let mut violations = Violations::default();
        let required: &[&str] = if body.get("templateId").is_some() { &["name"] } else { &["name", "image"] };
        let request = violations.object("$", body, KEYS, required).map(|fields| Self::fields(&mut violations, &fields));
        violations.check()?;
        let request = request.ok_or_else(|| Problem::new(400, "a request body is required"))?;
        match (&request.template, body) {
            (Some(template), Value::Object(body)) => {
                let filled = templates::filled_in(body, template)?;
                let mut violations = Violations::default();
                let fields = violations.object("$", &filled, KEYS, &["name"]);
                let request = fields.map(|fields| Self::fields(&mut violations, &fields)).unwrap_or(request);
                violations.check()?;
                Ok(request)
            }
            _ => Ok(request),
        }
    }

    fn fields(violations: &mut Violations, fields: &Fields<'_>) -> Self {
        let (persistent, network) = mounts(violations, fields);
        Self {
            name: fields.text(violations, "name").unwrap_or_default(),
            image: fields.string(violations, "image"),
            args: fields.string(violations, "args"),
            disk_gb: fields.integer(violations, "disk", 1, u32::MAX).unwrap_or(DEFAULT_DISK_GB),
            env: fields.string_map(violations, "env").unwrap_or_default(),
            ports: fields.strings(violations, "ports").unwrap_or_default(),
            registry: match fields.get("registry") {
                None | Some(Value::Null) => None,
                Some(_) => fields.string(violations, "registry"),
            },
            cloud: match fields.choice(violations, "cloud", &["SECURE", "COMMUNITY"]) {
                Some("COMMUNITY") => Cloud::Community,
                _ => Cloud::Secure,
            },
            gpu: fields.get("gpu").and_then(|gpu| GpuRequest::read(violations, &fields.path("gpu"), gpu)),
            cpu: fields.get("cpu").is_some_and(|cpu| read_cpu(violations, &fields.path("cpu"), cpu)),
            persistent,
            network,
            data_centers: fields.strings(violations, "dataCenterIds").unwrap_or_default(),
            global_networking: fields.boolean(violations, "globalNetworking").unwrap_or_default(),
            start_ssh: fields.boolean(violations, "startSsh").unwrap_or_default(),
            start_jupyter: fields.boolean(violations, "startJupyter").unwrap_or_default(),
            template: fields.text(violations, "templateId"),
        }
    }

    /// Checks the rules across fields and finds a data center with enough free GPUs.
    fn place(self, state: &State) -> Result<PodConfig, Problem> {
        if let Some(registry) = &self.registry {
            templates::check_registry(registry)?;
        }
        let Some(image) = self.image.clone().filter(|image| !image.trim().is_empty()) else {
            return Err(Problem::new(400, "image must not be empty"));
        };
        let wanted = match (&self.gpu, self.cpu) {
            (Some(gpu), false) => gpu,
            (None, true) => return Err(Problem::new(501, "the sandbox doesn't have CPU pods")),
            _ => return Err(Problem::new(400, "exactly one of gpu or cpu must be set")),
        };
        let ports = read_ports(&self.ports)?;
        let centers = self.allowed_data_centers(state)?;
        let gpu = catalog::find_gpu(&wanted.id)
            .ok_or_else(|| Problem::new(400, format!("unknown GPU type '{}'", wanted.id)))?;
        let cuda = wanted.cuda()?;
        let count = wanted.count.ok_or_else(|| Problem::new(400, FALSE_SOLD_OUT))?;
        if gpu.price(self.cloud).is_none() {
            return Err(Problem::new(400, NO_SUCH_PODS));
        }
        if count > gpu.max_count || self.disk_gb > LARGEST_DISK_GB {
            return Err(Problem::new(400, MACHINE_TOO_SMALL));
        }
        let data_center = pick(state, &centers, gpu, self.cloud, count).ok_or_else(|| Problem::new(400, SOLD_OUT))?;
        let cuda = cuda.ok_or_else(|| Problem::new(400, NO_SUCH_PODS))?;
        Ok(PodConfig {
            env: self.container_env(),
            name: self.name,
            image,
            args: self.args,
            disk_gb: self.disk_gb,
            ports,
            cloud: self.cloud,
            gpu,
            gpu_count: count,
            cuda,
            mount: self.network.or(self.persistent),
            data_center,
            global_networking: self.global_networking,
            registry: self.registry,
        })
    }

    /// Where the pod may land: in the volume's data center if it has one, else where it asked to, else anywhere.
    fn allowed_data_centers(&self, state: &State) -> Result<Vec<&'static str>, Problem> {
        if self.network.is_some() && self.persistent.is_some() {
            return Err(Problem::new(400, "mounts.persistent and mounts.network are mutually exclusive"));
        }
        for mount in self.network.iter().chain(&self.persistent) {
            let (Mount::Network { path, .. } | Mount::Persistent { path, .. }) = mount;
            if !path.starts_with('/') {
                return Err(Problem::new(400, format!("the mount path '{path}' must be absolute")));
            }
        }
        let mut asked = Vec::new();
        for id in &self.data_centers {
            let center = catalog::find_data_center(id)
                .ok_or_else(|| Problem::new(400, format!("unknown data center '{id}'")))?;
            asked.push(center.id);
        }
        if self.global_networking {
            if asked.is_empty() {
                asked = DATA_CENTERS.iter().map(|center| center.id).collect();
            }
            asked.retain(|id| catalog::find_data_center(id).is_some_and(|center| center.global_network));
            if asked.is_empty() {
                return Err(Problem::new(400, "none of these data centers has global networking"));
            }
        }
        let Some(Mount::Network { volume_id, .. }) = &self.network else {
            let everywhere = || DATA_CENTERS.iter().map(|center| center.id).collect();
            return Ok(if asked.is_empty() { everywhere() } else { asked });
        };
        let volume = state.volumes.get(volume_id);
        let volume = volume.ok_or_else(|| Problem::new(404, format!("network volume '{volume_id}' not found")))?;
        if self.cloud == Cloud::Community {
            return Err(Problem::new(400, "network volumes are available on secure cloud only"));
        }
        if !asked.is_empty() && !asked.contains(&volume.data_center) {
            let detail = format!("network volume '{volume_id}' is in {}, not in dataCenterIds", volume.data_center);
            return Err(Problem::new(400, detail));
        }
        Ok(vec![volume.data_center])
    }

    /// What was sent, and what the provisioner puts in unless it was sent.
    fn container_env(&self) -> BTreeMap<String, String> {
        let mut env = self.env.clone();
        if self.start_ssh {
            env.entry("PUBLIC_KEY".to_owned()).or_insert_with(|| ACCOUNT_SSH_KEY.to_owned());
        }
        if self.start_jupyter {
            env.entry("JUPYTER_PASSWORD".to_owned()).or_insert_with(|| new_id(20));
        }
        env
    }
}

impl GpuRequest {
    fn read(violations: &mut Violations, path: &str, gpu: &Value) -> Option<Self> {
        let fields =
            violations.object(path, gpu, &["id", "count", "allowedCudaVersions", "minCudaVersion"], &["id"])?;
        let request = Self {
            id: fields.string(violations, "id").unwrap_or_default(),
            count: fields.integer(violations, "count", 1, u32::MAX),
            allowed_cuda: fields.strings(violations, "allowedCudaVersions").unwrap_or_default(),
            min_cuda: fields.string(violations, "minCudaVersion"),
        };
        for (key, version) in request
            .allowed_cuda
            .iter()
            .map(|version| ("allowedCudaVersions", version))
            .chain(request.min_cuda.iter().map(|version| ("minCudaVersion", version)))
        {
            if !is_cuda_version(version) {
                violations.add(&fields.path(key), format_args!("'{version}' does not match pattern '^\\d+\\.\\d+$'"));
            }
        }
        Some(request)
    }

    /// The CUDA version of the machine; `None` if no machine has what is asked for.
    fn cuda(&self) -> Result<Option<&'static str>, Problem> {
        if self.min_cuda.is_some() && !self.allowed_cuda.is_empty() {
            return Err(Problem::new(400, "allowedCudaVersions and minCudaVersion are mutually exclusive"));
        }
        let least = self.min_cuda.as_deref().and_then(cuda_number);
        let fits = |version: &&&'static str| {
            (self.allowed_cuda.is_empty() || self.allowed_cuda.iter().any(|allowed| allowed == **version))
                && least.is_none_or(|least| cuda_number(version).is_some_and(|number| number >= least))
        };
        let usual = [DEFAULT_CUDA];
        Ok(usual.iter().find(fits).or_else(|| CUDA_VERSIONS.iter().find(fits)).copied())
    }
}

/// `mounts` as (persistent, network).
fn mounts(violations: &mut Violations, fields: &Fields<'_>) -> (Option<Mount>, Option<Mount>) {
    let Some(value) = fields.get("mounts") else { return (None, None) };
    let path = fields.path("mounts");
    let Some(mounts) = violations.object(&path, value, &["persistent", "network"], &[]) else { return (None, None) };
    let persistent = mounts.get("persistent").and_then(|value| {
        let fields = violations.object(&mounts.path("persistent"), value, &["size", "path"], &["size", "path"])?;
        let size_gb = fields.integer(violations, "size", 10, u32::MAX)?;
        Some(Mount::Persistent { size_gb, path: fields.string(violations, "path")? })
    });
    let networks = mounts.array(violations, "network").map_or(&[][..], Vec::as_slice);
    if networks.len() > 1 {
        violations.add(&mounts.path("network"), format_args!("maxItems: got {}, want 1", networks.len()));
    }
    let network = networks.first().and_then(|value| {
        let path = format!("{}[0]", mounts.path("network"));
        let fields = violations.object(&path, value, &["volumeId", "path"], &["volumeId", "path"])?;
        let volume_id = fields.string(violations, "volumeId")?;
        Some(Mount::Network { volume_id, path: fields.string(violations, "path")? })
    });
    (persistent, network)
}

fn read_cpu(violations: &mut Violations, path: &str, cpu: &Value) -> bool {
    if let Some(fields) = violations.object(path, cpu, &["id", "vcpuCount"], &["id", "vcpuCount"]) {
        fields.text(violations, "id");
        fields.integer(violations, "vcpuCount", 2, u32::MAX);
    }
    true
}

fn read_ports(texts: &[String]) -> Result<Vec<Port>, Problem> {
    let mut ports: Vec<Port> = Vec::new();
    for text in texts {
        let parsed = text.split_once('/').and_then(|(number, protocol)| {
            let number: u16 = number.parse().ok().filter(|number| *number > 0)?;
            let http = match protocol {
                "http" => true,
                "tcp" => false,
                _ => return None,
            };
            Some(Port { number, http })
        });
        let Some(port) = parsed else {
            return Err(Problem::new(400, format!("'{text}' is not a port like 8188/http or 22/tcp")));
        };
        if ports.iter().any(|other| other.number == port.number) {
            return Err(Problem::new(400, format!("port {} is exposed twice", port.number)));
        }
        ports.push(port);
    }
    if ports.iter().filter(|port| port.http).count() > MOST_HTTP_PORTS {
        return Err(Problem::new(400, format!("at most {MOST_HTTP_PORTS} HTTP ports can be exposed")));
    }
    Ok(ports)
}

/// The first allowed data center with enough free GPUs.
fn pick(state: &State, centers: &[&'static str], gpu: &Gpu, cloud: Cloud, count: u32) -> Option<&'static str> {
    centers.iter().find(|center| state.free(gpu, center, cloud) >= count).copied()
}
