//! The JSON of RunPod's REST v2 and the domain's types. Tolerant in reading: unknown fields, statuses and
//! enumeration values are no error, nor are optional fields that are missing or null. Strict in sending: the API
//! answers an unknown key with a 422.

mod billing;
mod ssh;

use std::collections::{BTreeMap, HashSet};

use jiff::Timestamp;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

pub(super) use billing::{BillPage, bills};
use ssh::{RuntimePort, Ssh};

use crate::provider::{Cloud, GpuType, Pod, PodAction, PodSpec, PodStatus, Stock, Volume, VolumeMount, VolumeSpec};

/// Far more than any pod costs; a higher number is a mistake, and still too dear.
const MOST_COST_PER_HOUR: f64 = 1_000_000.0;

/// Where and why a body can't be read.
pub(super) struct DecodeError {
    /// Like `pods[3].cost`; `.` is the whole body.
    pub path: String,
    pub reason: String,
}

pub(super) fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, DecodeError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json)
        .map_err(|error| DecodeError { path: error.path().to_string(), reason: error.into_inner().to_string() })?;
    json.end().map_err(|error| DecodeError { path: ".".to_owned(), reason: error.to_string() })?;
    Ok(value)
}

/// The body of createPod. An empty `args` is never sent: it has replaced the image's own start command.
pub(super) fn create_pod(spec: &PodSpec) -> Value {
    // Left out, `gpu.count` has produced refusals for a lack of stock that there wasn't.
    let mut gpu = json!({ "id": spec.gpu, "count": spec.gpu_count });
    if let Some(version) = &spec.min_cuda {
        gpu["minCudaVersion"] = json!(version);
    }
    let mut body = json!({
        "name": spec.name,
        "gpu": gpu,
        "cloud": cloud_name(spec.cloud),
        "disk": spec.disk_gb,
        "ports": spec.ports,
        "env": spec.env,
    });
    for (name, value) in [("image", &spec.image), ("templateId", &spec.template), ("registry", &spec.registry)] {
        if let Some(value) = value {
            body[name] = json!(value);
        }
    }
    if !spec.data_centers.is_empty() {
        body["dataCenterIds"] = json!(spec.data_centers);
    }
    if let Some(VolumeMount { volume_id, path }) = &spec.volume {
        body["mounts"] = json!({ "network": [{ "volumeId": volume_id, "path": path }] });
    }
    if spec.ports.iter().any(|port| port == "22/tcp") {
        body["startSsh"] = json!(true);
    }
    body
}

/// The body of podAction.
pub(super) fn pod_action(action: PodAction) -> Value {
    json!({ "action": action })
}

/// The body of createNetworkVolume.
pub(super) fn create_volume(spec: &VolumeSpec) -> Value {
    json!({ "name": spec.name, "size": spec.size_gb, "dataCenter": spec.data_center })
}

/// The body of updateNetworkVolume.
pub(super) fn grow_volume(size_gb: u32) -> Value {
    json!({ "size": size_gb })
}

/// One page of a list. The wrapping field is required: an answer without it is no empty list.
pub(super) trait Page: DeserializeOwned {
    type Item;
    fn into_parts(self) -> (Vec<Self::Item>, Option<Pagination>);
    /// `None` where items have none and every one counts.
    fn id(item: &Self::Item) -> Option<&str>;
}

#[derive(Deserialize)]
pub(super) struct PodPage {
    pods: Vec<PodBody>,
    pagination: Option<Pagination>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct VolumePage {
    network_volumes: Vec<VolumeBody>,
    pagination: Option<Pagination>,
}

#[derive(Deserialize)]
pub(super) struct GpuPage {
    gpus: Vec<GpuBody>,
    pagination: Option<Pagination>,
}

#[derive(Deserialize)]
pub(super) struct SshKeys {
    keys: Vec<String>,
}

impl From<SshKeys> for Vec<String> {
    fn from(body: SshKeys) -> Self {
        body.keys
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Pagination {
    next_cursor: Option<String>,
    has_next_page: Option<bool>,
}

/// What a page says about the one after it.
#[derive(Debug, PartialEq)]
pub(super) enum Next {
    End,
    Cursor(String),
    /// There is more, and no way to it.
    Lost,
}

impl Pagination {
    pub fn next(self) -> Next {
        match (self.has_next_page, self.next_cursor.filter(|cursor| !cursor.is_empty())) {
            (Some(false), _) | (None, None) => Next::End,
            (_, Some(cursor)) => Next::Cursor(cursor),
            (Some(true), None) => Next::Lost,
        }
    }
}

impl Page for PodPage {
    type Item = Pod;

    fn into_parts(self) -> (Vec<Pod>, Option<Pagination>) {
        (self.pods.into_iter().map(Pod::from).collect(), self.pagination)
    }

    fn id(pod: &Pod) -> Option<&str> {
        Some(&pod.id)
    }
}

impl Page for VolumePage {
    type Item = Volume;

    fn into_parts(self) -> (Vec<Volume>, Option<Pagination>) {
        (self.network_volumes.into_iter().map(Volume::from).collect(), self.pagination)
    }

    fn id(volume: &Volume) -> Option<&str> {
        Some(&volume.id)
    }
}

impl Page for GpuPage {
    type Item = GpuType;

    fn into_parts(self) -> (Vec<GpuType>, Option<Pagination>) {
        (self.gpus.into_iter().map(GpuType::from).collect(), self.pagination)
    }

    fn id(gpu: &GpuType) -> Option<&str> {
        Some(&gpu.id)
    }
}

/// Drops what a page repeats because the list moved on between two pages: a pod counted twice is money counted twice.
pub(super) fn without_repeats<P: Page>(mut items: Vec<P::Item>) -> Vec<P::Item> {
    let mut seen = HashSet::new();
    items.retain(|item| P::id(item).is_none_or(|id| seen.insert(id.to_owned())));
    items
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodBody {
    id: String,
    name: Option<String>,
    status: Option<String>,
    actions: Option<Vec<String>>,
    image: Option<String>,
    gpu: Option<PodGpu>,
    cloud: Option<String>,
    data_center_id: Option<String>,
    disk: Option<u32>,
    mounts: Option<Mounts>,
    ports: Option<Vec<String>>,
    /// Never a decode error, for that would quote a secret.
    #[serde(default)]
    env: Value,
    cost: Option<f64>,
    created_at: Option<String>,
    started_at: Option<String>,
    ssh: Option<Ssh>,
    runtime: Option<Runtime>,
    registry: Option<String>,
    cuda_version: Option<String>,
    locked: Option<bool>,
}

#[derive(Deserialize)]
struct PodGpu {
    id: String,
    count: Option<u32>,
}

#[derive(Deserialize)]
struct Mounts {
    network: Option<Vec<NetworkMount>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct NetworkMount {
    volume_id: String,
    path: Option<String>,
}

#[derive(Deserialize)]
struct Runtime {
    uptime: Option<f64>,
    ports: Option<Vec<RuntimePort>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct VolumeBody {
    id: String,
    name: Option<String>,
    size: u32,
    data_center: String,
    r#type: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct GpuBody {
    id: String,
    name: Option<String>,
    memory: u32,
    secure: Option<bool>,
    community: Option<bool>,
    price: Option<PerCloud<f64>>,
    max_count: Option<PerCloud<u32>>,
    availability: Option<String>,
    data_centers: Option<Vec<DataCenterStock>>,
}

#[derive(Deserialize)]
struct PerCloud<T> {
    secure: Option<T>,
    community: Option<T>,
}

#[derive(Deserialize)]
struct DataCenterStock {
    id: String,
    availability: Option<String>,
}

impl<T> Default for PerCloud<T> {
    fn default() -> Self {
        Self { secure: None, community: None }
    }
}

impl From<PodBody> for Pod {
    fn from(body: PodBody) -> Self {
        let runtime_ports = body.runtime.as_ref().and_then(|runtime| runtime.ports.as_deref()).unwrap_or_default();
        let (ssh, has_ssh_proxy) = ssh::address(body.ssh, runtime_ports);
        let mount = body.mounts.and_then(|mounts| mounts.network).and_then(|mounts| mounts.into_iter().next());
        Self {
            ssh,
            has_ssh_proxy,
            id: body.id,
            name: body.name.unwrap_or_default(),
            status: body.status.as_deref().map_or(PodStatus::Unknown, status),
            actions: body.actions.unwrap_or_default().iter().filter_map(|name| action(name)).collect(),
            image: body.image.unwrap_or_default(),
            gpu_count: body.gpu.as_ref().map_or(0, |gpu| gpu.count.unwrap_or(1)),
            gpu: body.gpu.map(|gpu| gpu.id),
            cloud: body.cloud.as_deref().and_then(cloud),
            data_center: body.data_center_id.filter(|id| !id.is_empty()),
            disk_gb: body.disk.unwrap_or_default(),
            volume: mount.map(|mount| VolumeMount { volume_id: mount.volume_id, path: mount.path.unwrap_or_default() }),
            ports: body.ports.unwrap_or_default(),
            env: environment(body.env),
            // What can't be summed up can't be written into the records either.
            cost_per_hour: body.cost.unwrap_or_default().clamp(0.0, MOST_COST_PER_HOUR),
            created_at: body.created_at.as_deref().and_then(timestamp),
            started_at: body.started_at.as_deref().and_then(timestamp),
            registry: body.registry.filter(|id| !id.is_empty()),
            cuda: body.cuda_version.filter(|version| !version.is_empty()),
            locked: body.locked.unwrap_or(false),
            uptime_seconds: body.runtime.and_then(|runtime| runtime.uptime).map(|seconds| seconds.max(0.0) as u64),
        }
    }
}

impl From<VolumeBody> for Volume {
    fn from(body: VolumeBody) -> Self {
        Self {
            id: body.id,
            name: body.name.unwrap_or_default(),
            size_gb: body.size,
            data_center: body.data_center,
            tier: body.r#type,
        }
    }
}

impl From<GpuBody> for GpuType {
    fn from(body: GpuBody) -> Self {
        // A cloud that doesn't offer the GPU is told by its flag, by a price of 0, or both.
        let offered = |price: Option<f64>, flag: Option<bool>| price.filter(|p| *p > 0.0 && flag != Some(false));
        let (price, max) = (body.price.unwrap_or_default(), body.max_count.unwrap_or_default());
        let secure_price = offered(price.secure, body.secure);
        let community_price = offered(price.community, body.community);
        let max_count = |told: Option<u32>, price: Option<f64>| told.unwrap_or(u32::from(price.is_some()));
        Self {
            max_count_secure: max_count(max.secure, secure_price),
            max_count_community: max_count(max.community, community_price),
            name: body.name.unwrap_or_else(|| body.id.clone()),
            id: body.id,
            vram_gb: body.memory,
            secure_price,
            community_price,
            stock: stock(body.availability.as_deref()),
            data_centers: (body.data_centers.unwrap_or_default().into_iter())
                .map(|center| (center.id, stock(center.availability.as_deref())))
                .collect(),
        }
    }
}

fn status(name: &str) -> PodStatus {
    match name {
        "PROVISIONING" => PodStatus::Provisioning,
        "STARTING" => PodStatus::Starting,
        "RUNNING" => PodStatus::Running,
        "EXITED" => PodStatus::Exited,
        "ERROR" => PodStatus::Error,
        "TERMINATED" => PodStatus::Terminated,
        _ => PodStatus::Unknown,
    }
}

fn action(name: &str) -> Option<PodAction> {
    match name {
        "start" => Some(PodAction::Start),
        "stop" => Some(PodAction::Stop),
        "restart" => Some(PodAction::Restart),
        "terminate" => Some(PodAction::Terminate),
        _ => None,
    }
}

pub(super) fn cloud_name(cloud: Cloud) -> &'static str {
    match cloud {
        Cloud::Secure => "SECURE",
        Cloud::Community => "COMMUNITY",
    }
}

fn cloud(name: &str) -> Option<Cloud> {
    match name {
        "SECURE" => Some(Cloud::Secure),
        "COMMUNITY" => Some(Cloud::Community),
        _ => None,
    }
}

/// A level that this version doesn't know is some stock, for "none" has a name of its own.
fn stock(level: Option<&str>) -> Stock {
    match level {
        None | Some("NONE") => Stock::None,
        Some("MEDIUM") => Stock::Medium,
        Some("HIGH") => Stock::High,
        Some(_) => Stock::Low,
    }
}

fn timestamp(text: &str) -> Option<Timestamp> {
    text.parse().ok()
}

fn environment(env: Value) -> BTreeMap<String, String> {
    let Value::Object(entries) = env else { return BTreeMap::new() };
    let text = |value| match value {
        Value::String(text) => text,
        other => other.to_string(),
    };
    entries.into_iter().map(|(name, value)| (name, text(value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(json: Value) -> Pod {
        decode::<PodBody>(json.to_string().as_bytes()).ok().expect("a pod").into()
    }

    #[test]
    fn a_secret_in_a_malformed_environment_is_not_quoted() {
        assert_eq!(pod(json!({ "id": "p", "env": "HF_TOKEN=secret" })).env, BTreeMap::new());
        let env = pod(json!({ "id": "p", "env": { "A": "x", "N": 7 } })).env;
        assert_eq!(env, BTreeMap::from([("A".to_owned(), "x".to_owned()), ("N".to_owned(), "7".to_owned())]));
    }

    #[test]
    fn a_page_says_what_follows() {
        let next = |json: Value| serde_json::from_value::<Pagination>(json).unwrap().next();
        assert_eq!(next(json!({})), Next::End);
        assert_eq!(next(json!({ "nextCursor": null, "hasNextPage": false })), Next::End);
        assert_eq!(next(json!({ "nextCursor": "" })), Next::End);
        assert_eq!(next(json!({ "nextCursor": "a", "hasNextPage": false })), Next::End);
        assert_eq!(next(json!({ "nextCursor": "a" })), Next::Cursor("a".into()));
        assert_eq!(next(json!({ "nextCursor": "a", "hasNextPage": true })), Next::Cursor("a".into()));
        assert_eq!(next(json!({ "hasNextPage": true })), Next::Lost);
    }

    #[test]
    fn a_cloud_that_does_not_offer_a_gpu_has_no_price() {
        let gpu = |json: Value| GpuType::from(decode::<GpuBody>(json.to_string().as_bytes()).ok().expect("a GPU"));
        let none =
            gpu(json!({ "id": "G", "memory": 24, "secure": false, "price": { "secure": 0, "community": null } }));
        assert_eq!((none.secure_price, none.community_price, none.max_count_secure), (None, None, 0));
        let bare = gpu(json!({ "id": "G", "memory": 24, "price": null, "maxCount": null }));
        assert_eq!((bare.secure_price, bare.community_price, bare.stock), (None, None, Stock::None));
        let some = gpu(json!({ "id": "G", "memory": 24, "secure": true, "community": false, "availability": "PLENTY",
            "price": { "secure": 0.44, "community": 0.31 }, "maxCount": { "secure": 8, "community": 4 } }));
        assert_eq!((some.secure_price, some.community_price), (Some(0.44), None));
        assert_eq!((some.max_count_secure, some.stock, some.name.as_str()), (8, Stock::Low, "G"));
    }
}
