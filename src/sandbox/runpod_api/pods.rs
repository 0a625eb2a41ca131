//! Pods: listPods, getPod, podAction, deletePod, and the account's ssh keys. createPod is in `create`.

mod create;

use jiff::SignedDuration;
use serde_json::{Map, Value, json};

use super::validation::{Parameters, Violations};
use super::{Answer, Call, Problem};
use crate::sandbox::faults::{Fault, FaultKind};
use crate::sandbox::world::{ACCOUNT_SSH_KEY, World};
pub use create::create;

const NO_FREE_GPU_TO_START: &str = "There are not enough free GPUs on the host machine to start this pod.";

pub async fn list(world: &World, call: &Call, faults: &[Fault]) -> Result<Answer, Problem> {
    let mut parameters = Parameters::new(call, &["includeClusterPods", "limit", "cursor"]);
    parameters.boolean("includeClusterPods");
    let page = Page::read(&mut parameters);
    parameters.violations.check()?;
    let state = world.state().await;
    let now = world.clock.now();
    let lag = faults
        .iter()
        .find(|fault| fault.kind == FaultKind::LaggingList)
        .map(|fault| SignedDuration::from_secs(i64::try_from(fault.seconds.unwrap_or(10)).unwrap_or(i64::MAX)));
    let listed = state.pods.iter().filter(|pod| !pod.is_gone());
    let listed = listed.filter(|pod| lag.is_none_or(|lag| now.duration_since(pod.created_at) >= lag));
    page.answer("pods", listed.map(|pod| (pod.id.as_str(), pod.view(now))).collect())
}

pub async fn get(world: &World, call: &Call, id: &str) -> Result<Answer, Problem> {
    Parameters::none(call)?;
    let state = world.state().await;
    Ok(Answer::ok(state.pod(id).ok_or_else(unknown_pod)?.view(world.clock.now())))
}

pub async fn delete(world: &World, call: &Call, id: &str) -> Result<Answer, Problem> {
    Parameters::none(call)?;
    let mut state = world.state().await;
    let pod = state.pod_mut(id).ok_or_else(unknown_pod)?;
    world.end_pod(pod, world.clock.now()).await;
    Ok(Answer::no_content())
}

pub async fn act(world: &World, call: &Call, id: &str, faults: &[Fault]) -> Result<Answer, Problem> {
    Parameters::none(call)?;
    let mut violations = Violations::default();
    let fields = violations.object("$", call.json()?, &["action"], &["action"]);
    let action =
        fields.and_then(|fields| fields.choice(&mut violations, "action", &["start", "stop", "restart", "terminate"]));
    violations.check()?;
    let action = action.unwrap_or_default();

    let mut state = world.state().await;
    let now = world.clock.now();
    let pod = state.pod(id).ok_or_else(unknown_pod)?;
    if !pod.actions().contains(&action) {
        let detail = format!("action '{action}' is not valid for a pod with status {}", pod.status());
        return Err(Problem::new(409, detail));
    }
    if action == "start" {
        let config = &pod.config;
        let refused = faults.iter().any(|fault| fault.kind == FaultKind::NoCapacity);
        // A pod in ERROR still holds its own.
        let own = if pod.holds_gpus() { config.gpu_count } else { 0 };
        if refused || state.free(config.gpu, config.data_center, config.cloud) + own < config.gpu_count {
            return Err(Problem::new(400, NO_FREE_GPU_TO_START));
        }
    }
    let pod = state.pod_mut(id).ok_or_else(unknown_pod)?;
    match action {
        "start" => {
            for fault in faults {
                pod.suffer(fault);
            }
            world.start_pod(pod, now);
        }
        "stop" => world.stop_pod(pod, now).await,
        "restart" => world.restart_pod(pod, now).await,
        _ => {
            world.end_pod(pod, now).await;
            return Ok(Answer::no_content());
        }
    }
    world.changed.notify_one();
    Ok(Answer::ok(pod.view(now)))
}

pub fn ssh_keys(call: &Call) -> Result<Answer, Problem> {
    Parameters::none(call)?;
    Ok(Answer::ok(json!({ "keys": [ACCOUNT_SSH_KEY] })))
}

pub fn unknown_pod() -> Problem {
    Problem::new(404, "pod not found")
}

/// What newer answers of RunPod have: `?limit&cursor` in, `pagination` out; without `limit`, all in one.
pub struct Page {
    limit: Option<u32>,
    after: Option<String>,
}

impl Page {
    pub fn read(parameters: &mut Parameters<'_>) -> Self {
        let limit = parameters.integer("limit", 1, 100);
        let after = parameters.text("cursor").map(str::to_owned);
        if after.is_some() && !parameters.has("limit") {
            parameters.violations.add("query.cursor", "needs limit");
        }
        Self { limit, after }
    }

    /// `items` are id and view.
    pub fn answer(self, name: &str, items: Vec<(&str, Value)>) -> Result<Answer, Problem> {
        let mut body = Map::new();
        let Some(limit) = self.limit else {
            body.insert(name.to_owned(), items.into_iter().map(|(_, view)| view).collect());
            return Ok(Answer::ok(Value::Object(body)));
        };
        let start = match &self.after {
            None => 0,
            Some(cursor) => {
                let last = items.iter().position(|(id, _)| cursor.strip_prefix("after:") == Some(id));
                last.ok_or_else(|| Problem::new(400, "the cursor is not valid any more"))? + 1
            }
        };
        let rest = &items[start..];
        let shown = &rest[..rest.len().min(limit as usize)];
        let more = rest.len() > shown.len();
        let next = shown.last().filter(|_| more).map(|(id, _)| format!("after:{id}"));
        body.insert(name.to_owned(), shown.iter().map(|(_, view)| view.clone()).collect());
        body.insert("pagination".to_owned(), json!({ "nextCursor": next, "hasNextPage": more }));
        Ok(Answer::ok(Value::Object(body)))
    }
}
