//! The world's RunPod REST v2: who may ask, which route it is, which fault has its hand in it, and how it is answered.
//!
//! Stricter than RunPod where a client might rely on leniency: unknown body keys and query parameters are a 422, and a
//! route the world doesn't have is a loud 501.

mod answer;
mod billing;
mod catalog;
mod logs;
mod pods;
mod templates;
mod validation;
mod volumes;

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{ConnectInfo, Query, Request, State};
use axum::http::{HeaderMap, Method, Uri, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::faults::{Fault, FaultKind};
use super::listener::Peer;
use super::rate_limit::Quota;
use super::request_log::Entry;
use super::world::World;
use answer::Outcome;
pub use answer::{Answer, Problem};

/// Bodies above this are refused with a 413; the largest honest one, a create with a long environment, has some KiB.
const BODY_LIMIT: usize = 1 << 20;

/// One request, read completely.
pub struct Call {
    pub method: Method,
    /// The path's segments after `/v2`, percent-decoded.
    pub segments: Vec<String>,
    pub path: String,
    /// Parameters in the order sent, decoded.
    pub query: Vec<(String, String)>,
    pub headers: HeaderMap,
    pub body: RequestBody,
}

/// A request's body as far as it could be read.
#[derive(Debug, Clone)]
pub enum RequestBody {
    None,
    Json(Value),
    NotJson(String),
}

/// The route handler for everything under `/v2`.
pub async fn handle(
    State(world): State<Arc<World>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
) -> Response {
    let (parts, body) = request.into_parts();
    let Ok(bytes) = to_bytes(body, BODY_LIMIT).await else {
        return Problem::new(413, format!("the body is larger than {BODY_LIMIT} bytes")).into_response();
    };
    let call = Call::new(parts.method, &parts.uri, parts.headers, &bytes);
    let number = world.log.begin(call.log_entry(&world, parts.uri.query()));

    // A task of its own, because a request once sent has its effect even if the client goes away meanwhile.
    let work = tokio::spawn({
        let world = Arc::clone(&world);
        async move {
            let outcome = decide(&world, &call).await;
            world.log.finish(number, |entry| outcome.write_down(entry));
            outcome
        }
    });
    let stopping = world.stopping.clone();
    match work.await {
        Ok(Outcome::Answered { answer, .. }) => answer.into_response(),
        Ok(Outcome::Silent) => {
            stopping.cancelled().await;
            peer.cut();
            Body::empty().into_response()
        }
        Ok(Outcome::Cut) => {
            peer.cut();
            Body::empty().into_response()
        }
        Err(error) => {
            tracing::error!(%error, "a request broke the sandbox");
            Problem::new(500, "the sandbox itself failed at this request; this is a bug in it")
                .into_answer()
                .into_response()
        }
    }
}

/// Everything between the request and its answer.
async fn decide(world: &Arc<World>, call: &Call) -> Outcome {
    let caller = match authorize(world, call).await {
        Ok(caller) => caller,
        Err(problem) => return Outcome::plain(problem.into_answer()),
    };
    let quota = world.rate_limit.count(caller.name());
    let route = Route::find(&call.method, &call.segments);
    let operation = route.as_ref().map_or("", Route::operation);
    let delay = world.faults.take_delay(operation);
    if let Some(delay) = &delay {
        tokio::time::sleep(Duration::from_millis(delay.delay_ms.unwrap_or(1_000))).await;
    }
    let faults = world.faults.take_for(operation, wanted_gpu(world, &route, call).await.as_deref());
    let mut outcome = match (&quota, &route) {
        (Quota { exceeded: Some((window, seconds)), .. }, _) => Outcome::plain(
            Problem::new(429, format!("rate limit exceeded for the {window} window"))
                .into_answer()
                .with_header("retry-after", seconds.to_string()),
        ),
        _ => faulty(world, call, &caller, route, &faults).await,
    };
    if let Outcome::Answered { answer, injected } = &mut outcome {
        *injected |= delay.is_some();
        answer.set_header("ratelimit", quota.rate_limit);
        answer.set_header("ratelimit-policy", quota.policy);
    }
    outcome
}

/// Answers the request the way the faults want it.
async fn faulty(world: &Arc<World>, call: &Call, caller: &Caller, route: Option<Route>, faults: &[Fault]) -> Outcome {
    let Some(fault) = faults.first() else { return Outcome::plain(perform(world, call, caller, route, &[]).await) };
    let done = match fault.kind.is_before() {
        true => None,
        false => Some(perform(world, call, caller, route, faults).await),
    };
    match (fault.kind, done) {
        (FaultKind::HangBefore | FaultKind::HangAfter, _) => Outcome::Silent,
        (FaultKind::ResetBefore | FaultKind::ResetAfter, _) => Outcome::Cut,
        (FaultKind::Garbage, Some(answer)) => Outcome::injected(answer.garbled()),
        (FaultKind::StatusBefore | FaultKind::StatusAfter, _) | (_, None) => Outcome::injected(fault_answer(fault)),
        (_, Some(answer)) => Outcome::injected(answer),
    }
}

fn fault_answer(fault: &Fault) -> Answer {
    let status = fault.status.unwrap_or(500);
    let detail = fault.detail.clone().unwrap_or_else(|| match status {
        401 => "invalid bearer token".to_owned(),
        402 => "Your account balance is too low to rent a pod.".to_owned(),
        403 => "access denied".to_owned(),
        429 => "rate limit exceeded for the minute window".to_owned(),
        _ => "upstream request failed".to_owned(),
    });
    let answer = Problem::new(status, detail).into_answer();
    match fault.retry_after.or((status == 429).then_some(1)) {
        Some(seconds) => answer.with_header("retry-after", seconds.to_string()),
        None => answer,
    }
}

/// Who asks.
#[derive(Debug, PartialEq, Eq)]
pub enum Caller {
    Account,
    /// The second account, see [`Route::of_nobody`].
    OtherAccount,
    /// The key inside this pod.
    Pod(String),
}

impl Caller {
    fn name(&self) -> &str {
        match self {
            Self::Account => "account",
            Self::OtherAccount => "other account",
            Self::Pod(id) => id,
        }
    }
}

async fn authorize(world: &World, call: &Call) -> Result<Caller, Problem> {
    let agent = call.headers.get(header::USER_AGENT).map(|agent| agent.as_bytes());
    if agent.is_none_or(<[u8]>::is_empty) {
        return Err(Problem::new(403, "requests without a User-Agent are blocked"));
    }
    let Some(sent) = call.headers.get(header::AUTHORIZATION) else {
        return Err(Problem::new(401, "missing bearer token"));
    };
    let token = sent.to_str().ok().and_then(|text| text.strip_prefix("Bearer ")).map(str::trim);
    let Some(token) = token else { return Err(Problem::new(401, "malformed authorization header")) };
    if token == world.key {
        return Ok(Caller::Account);
    }
    if token == world.other_key {
        return Ok(Caller::OtherAccount);
    }
    let state = world.state().await;
    // Of a pod that has ended too: what waits inside for the end is to read a 404 and not that its key is wrong.
    match state.pods.iter().find(|pod| pod.scoped_key == token) {
        Some(pod) => Ok(Caller::Pod(pod.id.clone())),
        None => Err(Problem::new(401, "invalid bearer token")),
    }
}

/// The routes the world has, each named like its operation in RunPod's OpenAPI file.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Route {
    ListPods,
    CreatePod,
    GetPod(String),
    DeletePod(String),
    PodAction(String),
    GetPodLogs(String),
    ListNetworkVolumes,
    CreateNetworkVolume,
    GetNetworkVolume(String),
    UpdateNetworkVolume(String),
    DeleteNetworkVolume(String),
    ListGpuTypes,
    GetGpuType(String),
    ListDataCenters,
    GetDataCenter(String),
    GetSshKeys,
    ListPodBilling,
    ListTemplates,
    GetTemplate(String),
    ListPublicTemplates,
    ListRegistries,
    GetRegistry(String),
}

impl Route {
    fn find(method: &Method, segments: &[String]) -> Option<Self> {
        let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
        let route = match (method.as_str(), segments.as_slice()) {
            ("GET", ["pods"]) => Self::ListPods,
            ("POST", ["pods"]) => Self::CreatePod,
            ("GET", ["pods", id]) => Self::GetPod((*id).to_owned()),
            ("DELETE", ["pods", id]) => Self::DeletePod((*id).to_owned()),
            ("POST", ["pods", id, "action"]) => Self::PodAction((*id).to_owned()),
            ("GET", ["pods", id, "logs"]) => Self::GetPodLogs((*id).to_owned()),
            ("GET", ["network-volumes"]) => Self::ListNetworkVolumes,
            ("POST", ["network-volumes"]) => Self::CreateNetworkVolume,
            ("GET", ["network-volumes", id]) => Self::GetNetworkVolume((*id).to_owned()),
            ("PATCH", ["network-volumes", id]) => Self::UpdateNetworkVolume((*id).to_owned()),
            ("DELETE", ["network-volumes", id]) => Self::DeleteNetworkVolume((*id).to_owned()),
            ("GET", ["catalog", "gpus"]) => Self::ListGpuTypes,
            ("GET", ["catalog", "gpus", id]) => Self::GetGpuType((*id).to_owned()),
            ("GET", ["catalog", "datacenters"]) => Self::ListDataCenters,
            ("GET", ["catalog", "datacenters", id]) => Self::GetDataCenter((*id).to_owned()),
            ("GET", ["account", "ssh-keys"]) => Self::GetSshKeys,
            ("GET", ["billing", "pods"]) => Self::ListPodBilling,
            ("GET", ["templates"]) => Self::ListTemplates,
            ("GET", ["templates", id]) => Self::GetTemplate((*id).to_owned()),
            ("GET", ["catalog", "templates"]) => Self::ListPublicTemplates,
            ("GET", ["registries"]) => Self::ListRegistries,
            ("GET", ["registries", id]) if *id != "delegations" => Self::GetRegistry((*id).to_owned()),
            _ => return None,
        };
        Some(route)
    }

    /// The operationId.
    fn operation(&self) -> &'static str {
        match self {
            Self::ListPods => "listPods",
            Self::CreatePod => "createPod",
            Self::GetPod(_) => "getPod",
            Self::DeletePod(_) => "deletePod",
            Self::PodAction(_) => "podAction",
            Self::GetPodLogs(_) => "getPodLogs",
            Self::ListNetworkVolumes => "listNetworkVolumes",
            Self::CreateNetworkVolume => "createNetworkVolume",
            Self::GetNetworkVolume(_) => "getNetworkVolume",
            Self::UpdateNetworkVolume(_) => "updateNetworkVolume",
            Self::DeleteNetworkVolume(_) => "deleteNetworkVolume",
            Self::ListGpuTypes => "listGpuTypes",
            Self::GetGpuType(_) => "getGpuType",
            Self::ListDataCenters => "listDataCenters",
            Self::GetDataCenter(_) => "getDataCenter",
            Self::GetSshKeys => "getSshKeys",
            Self::ListPodBilling => "listPodBilling",
            Self::ListTemplates => "listTemplates",
            Self::GetTemplate(_) => "getTemplate",
            Self::ListPublicTemplates => "listPublicTemplates",
            Self::ListRegistries => "listRegistries",
            Self::GetRegistry(_) => "getRegistry",
        }
    }

    /// What an account is answered that has nothing and no balance; `None` where all accounts are answered alike.
    fn of_nobody(&self) -> Option<Result<Answer, Problem>> {
        Some(match self {
            Self::ListPods => Ok(Answer::ok(json!({ "pods": [] }))),
            Self::ListNetworkVolumes => Ok(Answer::ok(json!({ "networkVolumes": [] }))),
            Self::GetSshKeys => Ok(Answer::ok(json!({ "keys": [] }))),
            Self::GetPod(_) | Self::DeletePod(_) | Self::PodAction(_) | Self::GetPodLogs(_) => Err(pods::unknown_pod()),
            Self::CreatePod | Self::CreateNetworkVolume => {
                Err(Problem::new(402, "Your account balance is too low to rent a pod."))
            }
            Self::GetNetworkVolume(_) | Self::UpdateNetworkVolume(_) | Self::DeleteNetworkVolume(_) => {
                Err(Problem::new(404, "network volume not found"))
            }
            _ => return None,
        })
    }

    /// Whether the key inside this pod may do it; an account's key may do everything.
    fn is_for_pod(&self, own: &str, call: &Call) -> bool {
        match self {
            Self::GetPod(id) | Self::DeletePod(id) => id == own,
            Self::PodAction(id) => {
                id == own && matches!(&call.body, RequestBody::Json(body) if body["action"] == "terminate")
            }
            _ => false,
        }
    }
}

async fn perform(world: &Arc<World>, call: &Call, caller: &Caller, route: Option<Route>, faults: &[Fault]) -> Answer {
    let Some(route) = route else {
        let detail = format!("the sandbox doesn't have the route {} {}", call.method, call.path);
        tracing::warn!(method = %call.method, path = call.path, "a route that the sandbox doesn't have");
        return Problem::new(501, detail).into_answer();
    };
    if let Caller::Pod(own) = caller
        && !route.is_for_pod(own, call)
    {
        return Problem::new(403, "this key can only look at its own pod and terminate it").into_answer();
    }
    if *caller == Caller::OtherAccount
        && let Some(answer) = route.of_nobody()
    {
        return answer.unwrap_or_else(Problem::into_answer);
    }
    let answer = match &route {
        Route::ListPods => pods::list(world, call, faults).await,
        Route::CreatePod => pods::create(world, call, faults).await,
        Route::GetPod(id) => pods::get(world, call, id).await,
        Route::DeletePod(id) => pods::delete(world, call, id).await,
        Route::PodAction(id) => pods::act(world, call, id, faults).await,
        Route::GetPodLogs(id) => logs::stream(world, call, id).await,
        Route::ListNetworkVolumes => volumes::list(world, call).await,
        Route::CreateNetworkVolume => volumes::create(world, call).await,
        Route::GetNetworkVolume(id) => volumes::get(world, call, id).await,
        Route::UpdateNetworkVolume(id) => volumes::update(world, call, id).await,
        Route::DeleteNetworkVolume(id) => volumes::delete(world, call, id).await,
        Route::ListGpuTypes => catalog::list_gpus(world, call).await,
        Route::GetGpuType(id) => catalog::get_gpu(world, call, id).await,
        Route::ListDataCenters => catalog::list_data_centers(world, call).await,
        Route::GetDataCenter(id) => catalog::get_data_center(world, call, id).await,
        Route::GetSshKeys => pods::ssh_keys(call),
        Route::ListPodBilling => billing::list(world, call).await,
        Route::ListTemplates => templates::list(call),
        Route::GetTemplate(id) => templates::get(call, id),
        Route::ListPublicTemplates => templates::list_public(call),
        Route::ListRegistries => templates::list_registries(call),
        Route::GetRegistry(id) => templates::get_registry(call, id),
    };
    answer.unwrap_or_else(Problem::into_answer)
}

/// The GPU type that a create or a start wants, which is what `no_capacity` goes by.
async fn wanted_gpu(world: &World, route: &Option<Route>, call: &Call) -> Option<String> {
    let RequestBody::Json(body) = &call.body else { return None };
    match route {
        Some(Route::CreatePod) => Some(body["gpu"]["id"].as_str()?.to_owned()),
        Some(Route::PodAction(id)) if body["action"] == "start" => {
            Some(world.state().await.pod(id)?.config.gpu.id.to_owned())
        }
        _ => None,
    }
}

impl Call {
    fn new(method: Method, uri: &Uri, headers: HeaderMap, bytes: &[u8]) -> Self {
        let path = uri.path().to_owned();
        let rest = path.strip_prefix("/v2").unwrap_or(&path).trim_start_matches('/');
        let segments = rest.split('/').map(percent_decoded).collect();
        let query = Query::<Vec<(String, String)>>::try_from_uri(uri).map(|Query(pairs)| pairs).unwrap_or_default();
        let body = match bytes {
            [] => RequestBody::None,
            bytes => match serde_json::from_slice(bytes) {
                Ok(json) => RequestBody::Json(json),
                Err(_) => RequestBody::NotJson(String::from_utf8_lossy(bytes).into_owned()),
            },
        };
        Self { method, segments, path, query, headers, body }
    }

    fn log_entry(&self, world: &World, query: Option<&str>) -> Entry {
        let agent = self.headers.get(header::USER_AGENT);
        Entry {
            number: 0,
            at: world.clock.now(),
            method: self.method.to_string(),
            path: self.path.clone(),
            query: query.map(str::to_owned),
            user_agent: agent.map(|agent| String::from_utf8_lossy(agent.as_bytes()).into_owned()),
            operation: Route::find(&self.method, &self.segments).map(|route| route.operation()),
            request_body: match &self.body {
                RequestBody::None => Value::Null,
                RequestBody::Json(body) => body.clone(),
                RequestBody::NotJson(text) => Value::String(text.clone()),
            },
            status: None,
            content_type: None,
            response_body: Value::Null,
            injected: false,
        }
    }

    /// The JSON body of an operation that needs one.
    pub fn json(&self) -> Result<&Value, Problem> {
        let content_type = self.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or("");
        match &self.body {
            RequestBody::None => Err(Problem::new(400, "a request body is required")),
            RequestBody::NotJson(_) => Err(Problem::new(400, "the request body is not JSON")),
            RequestBody::Json(_) if !content_type.starts_with("application/json") => {
                Err(Problem::new(415, "the request body must be sent as application/json"))
            }
            RequestBody::Json(body) => Ok(body),
        }
    }
}

/// `%20` and the like resolved; whatever isn't UTF-8 then can't be the name of anything here.
fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped = match (first, tail) {
            (b'%', [high, low, ..]) => {
                let digit = |byte: &u8| char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
                digit(high).zip(digit(low)).map(|(high, low)| high * 16 + low)
            }
            _ => None,
        };
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
