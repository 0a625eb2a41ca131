//! RunPod as a [`GpuProvider`], over its REST API v2. Three layers: `transport` sends, this file names the
//! operations, `wire` turns JSON into the domain's types and back.

mod answer;
mod budget;
mod logs;
mod origin;
mod transport;
mod wire;

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use reqwest::Method;
use secrecy::SecretString;
use serde::de::DeserializeOwned;

use answer::Answer;
pub use budget::SharedBudget;
pub use origin::{ApiOrigin, OriginError};
use transport::{Call, Operation, Transport};
use wire::{BillPage, GpuPage, Next, Page, PodBody, PodPage, SshKeys, VolumeBody, VolumePage};

use crate::provider::{
    Cloud, GpuProvider, GpuType, LogLimits, LogPage, LogQuery, LogStream, Pod, PodAction, PodBill, PodSpec,
    ProviderError, Stamped, Volume, VolumeSpec,
};

/// Far more pages than an account has; a list that goes on longer is none.
const MAX_PAGES: usize = 200;

static LIST_PODS: Operation = operation("listPods", Method::GET, "/v2/pods", "list of pods");
static CREATE_POD: Operation = operation("createPod", Method::POST, "/v2/pods", "thing that the new pod names");
static GET_POD: Operation = operation("getPod", Method::GET, "/v2/pods/{id}", "pod");
static POD_ACTION: Operation = operation("podAction", Method::POST, "/v2/pods/{id}/action", "pod");
static GET_POD_LOGS: Operation = operation("getPodLogs", Method::GET, "/v2/pods/{id}/logs", "pod");
static DELETE_POD: Operation = operation("deletePod", Method::DELETE, "/v2/pods/{id}", "pod");
static LIST_VOLUMES: Operation =
    operation("listNetworkVolumes", Method::GET, "/v2/network-volumes", "list of network volumes");
static CREATE_VOLUME: Operation =
    operation("createNetworkVolume", Method::POST, "/v2/network-volumes", "thing that the new volume names");
static UPDATE_VOLUME: Operation =
    operation("updateNetworkVolume", Method::PATCH, "/v2/network-volumes/{id}", "network volume");
static DELETE_VOLUME: Operation =
    operation("deleteNetworkVolume", Method::DELETE, "/v2/network-volumes/{id}", "network volume");
static LIST_GPUS: Operation = operation("listGpuTypes", Method::GET, "/v2/catalog/gpus", "GPU catalog");
static GET_SSH_KEYS: Operation = operation("getSshKeys", Method::GET, "/v2/account/ssh-keys", "list of SSH keys");
static LIST_POD_BILLING: Operation = operation("listPodBilling", Method::GET, "/v2/billing/pods", "billing of pods");

/// The `operationId`s of RunPod's OpenAPI document that this client uses.
pub const OPERATIONS: &[&str] = &[
    LIST_PODS.id,
    CREATE_POD.id,
    GET_POD.id,
    POD_ACTION.id,
    GET_POD_LOGS.id,
    DELETE_POD.id,
    LIST_VOLUMES.id,
    CREATE_VOLUME.id,
    UPDATE_VOLUME.id,
    DELETE_VOLUME.id,
    LIST_GPUS.id,
    GET_SSH_KEYS.id,
    LIST_POD_BILLING.id,
];

/// What a [`RunPod`] is made of.
#[derive(Debug)]
pub struct RunPodOptions {
    pub origin: ApiOrigin,
    pub key: SecretString,
    /// Names the program to the API, which refuses some libraries' defaults.
    pub user_agent: String,
    pub timeouts: RunPodTimeouts,
    /// What is known of the rate limits, shared with other processes; `None` keeps it in this client alone.
    pub budget: Option<SharedBudget>,
}

/// How long a call may take, and how a safe one is repeated.
#[derive(Debug, Clone)]
pub struct RunPodTimeouts {
    pub connect: Duration,
    /// One attempt of a GET or DELETE, its answer included.
    pub request: Duration,
    /// The one attempt of anything that is never repeated: creates, actions, changes.
    pub create: Duration,
    /// All attempts of a GET or DELETE and the waits between them.
    pub total: Duration,
    /// Attempts of a GET or DELETE, the first one included.
    pub attempts: usize,
    /// The wait before the second attempt; it doubles, with jitter.
    pub first_retry: Duration,
    /// The longest `Retry-After` that is waited for; a longer one is the caller's to decide.
    pub longest_rate_limit_wait: Duration,
}

impl Default for RunPodTimeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            request: Duration::from_secs(20),
            create: Duration::from_secs(30),
            total: Duration::from_secs(40),
            attempts: 3,
            first_retry: Duration::from_millis(300),
            longest_rate_limit_wait: Duration::from_secs(5),
        }
    }
}

/// A client of RunPod's REST API v2. Nothing is read or opened before the first call.
pub struct RunPod {
    transport: Arc<Transport>,
    first_retry: Duration,
}

impl RunPod {
    pub fn new(options: RunPodOptions) -> Self {
        Self { first_retry: options.timeouts.first_retry, transport: Arc::new(Transport::new(options)) }
    }

    async fn call<Body: DeserializeOwned, Value: From<Body>>(
        &self,
        call: Call<'_>,
    ) -> Result<Stamped<Value>, ProviderError> {
        let answer = self.transport.send(&call).await?;
        Ok(Stamped { value: self.decode::<Body>(&call, &answer)?.into(), date: answer.date })
    }

    /// All pages, stamped with the date of the last one.
    async fn list<P: Page>(&self, call: Call<'_>) -> Result<Stamped<Vec<P::Item>>, ProviderError> {
        let path = format!("{} {}", call.operation.method, call.operation.path);
        let incomplete = |reason: &str| ProviderError::Unreadable { path: path.clone(), reason: reason.to_owned() };
        let mut items = Vec::new();
        let mut cursors = HashSet::new();
        let mut page_call = call.clone();
        for _ in 0..MAX_PAGES {
            let answer = self.transport.send(&page_call).await?;
            let (more, pagination) = self.decode::<P>(&page_call, &answer)?.into_parts();
            items.extend(more);
            match pagination.map_or(Next::End, wire::Pagination::next) {
                Next::End => return Ok(Stamped { value: wire::without_repeats::<P>(items), date: answer.date }),
                Next::Lost => return Err(incomplete("there are more pages, but no cursor that leads to them")),
                Next::Cursor(cursor) if !cursors.insert(cursor.clone()) => {
                    return Err(incomplete("the pages lead back to one that was read already"));
                }
                Next::Cursor(cursor) => page_call = call.clone().query("cursor", cursor),
            }
        }
        Err(incomplete("the list has no end"))
    }

    fn decode<T: DeserializeOwned>(&self, call: &Call<'_>, answer: &Answer) -> Result<T, ProviderError> {
        wire::decode(&answer.body).map_err(|error| ProviderError::Unreadable {
            path: self.transport.clean(&error.path, call),
            reason: self.transport.clean(&error.reason, call),
        })
    }
}

impl fmt::Debug for RunPod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunPod").field("origin", &self.transport.origin().to_string()).finish_non_exhaustive()
    }
}

#[async_trait]
impl GpuProvider for RunPod {
    async fn create_pod(&self, spec: &PodSpec) -> Result<Stamped<Pod>, ProviderError> {
        self.call::<PodBody, _>(Call::new(&CREATE_POD).body(wire::create_pod(spec)).hiding(spec.env.values())).await
    }

    async fn pod(&self, id: &str) -> Result<Stamped<Pod>, ProviderError> {
        self.call::<PodBody, _>(Call::new(&GET_POD).id(id)).await
    }

    async fn pods(&self) -> Result<Stamped<Vec<Pod>>, ProviderError> {
        self.list::<PodPage>(Call::new(&LIST_PODS)).await
    }

    async fn control_pod(&self, id: &str, action: PodAction) -> Result<Stamped<Pod>, ProviderError> {
        if action == PodAction::Terminate {
            // The API answers it with nothing, so there is no pod to return; deleting has the same effect.
            let detail = "a pod is ended by deleting it".to_owned();
            return Err(ProviderError::Invalid { detail, errors: Vec::new() });
        }
        self.call::<PodBody, _>(Call::new(&POD_ACTION).id(id).body(wire::pod_action(action))).await
    }

    async fn delete_pod(&self, id: &str) -> Result<Stamped<()>, ProviderError> {
        let answer = self.transport.send(&Call::new(&DELETE_POD).id(id)).await?;
        Ok(Stamped { value: (), date: answer.date })
    }

    async fn volumes(&self) -> Result<Stamped<Vec<Volume>>, ProviderError> {
        self.list::<VolumePage>(Call::new(&LIST_VOLUMES)).await
    }

    async fn create_volume(&self, spec: &VolumeSpec) -> Result<Stamped<Volume>, ProviderError> {
        self.call::<VolumeBody, _>(Call::new(&CREATE_VOLUME).body(wire::create_volume(spec))).await
    }

    async fn grow_volume(&self, id: &str, size_gb: u32) -> Result<Stamped<Volume>, ProviderError> {
        self.call::<VolumeBody, _>(Call::new(&UPDATE_VOLUME).id(id).body(wire::grow_volume(size_gb))).await
    }

    async fn delete_volume(&self, id: &str) -> Result<Stamped<()>, ProviderError> {
        let answer = self.transport.send(&Call::new(&DELETE_VOLUME).id(id)).await?;
        Ok(Stamped { value: (), date: answer.date })
    }

    async fn gpus(&self, count: u32, cloud: Cloud) -> Result<Stamped<Vec<GpuType>>, ProviderError> {
        let call = Call::new(&LIST_GPUS).query("include", "AVAILABILITY").query("product", "POD");
        let call = call.query("count", count.max(1).to_string()).query("cloud", wire::cloud_name(cloud));
        self.list::<GpuPage>(call).await
    }

    async fn ssh_keys(&self) -> Result<Stamped<Vec<String>>, ProviderError> {
        self.call::<SshKeys, _>(Call::new(&GET_SSH_KEYS)).await
    }

    async fn pod_logs(&self, id: &str, query: &LogQuery, limits: &LogLimits) -> Result<LogPage, ProviderError> {
        logs::page(&self.transport, id, query, limits).await
    }

    async fn follow_logs(&self, id: &str, query: &LogQuery) -> Result<LogStream, ProviderError> {
        logs::follow(self.transport.clone(), id, query, self.first_retry).await
    }

    async fn billing(&self, from: Timestamp, until: Option<Timestamp>) -> Result<Stamped<Vec<PodBill>>, ProviderError> {
        let mut call = Call::new(&LIST_POD_BILLING).query("bucketSize", "hour").query("startTime", from.to_string());
        if let Some(until) = until {
            call = call.query("endTime", until.to_string());
        }
        let records = self.list::<BillPage>(call).await?;
        Ok(Stamped { value: wire::bills(records.value), date: records.date })
    }
}

const fn operation(id: &'static str, method: Method, path: &'static str, what: &'static str) -> Operation {
    Operation { id, method, path, what }
}
