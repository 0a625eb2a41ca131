//! The routes around the queue: `/prompt`, `/queue`, `/history`, `/interrupt`, `/free`.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::queue::Job;
use super::routes::crash;
use super::validate::{self, Invalid};
use super::{Comfy, timestamp};

pub async fn remaining(State(comfy): State<Arc<Comfy>>) -> Json<Value> {
    Json(comfy.queue.status())
}

pub async fn submit(State(comfy): State<Arc<Comfy>>, body: Bytes) -> Response {
    let Ok(Value::Object(mut request)) = serde_json::from_slice(&body) else { return crash() };
    let front = is_true(request.get("front"));
    let number = match request.get("number") {
        // As Python's float, whatever was sent.
        Some(number) => match number.as_f64() {
            Some(number) => json!(number),
            None => return crash(),
        },
        None => comfy.queue.next_number(front),
    };
    let Some(mut prompt) = request.shift_remove("prompt") else {
        return refuse("no_prompt", "No prompt provided", "No prompt provided");
    };
    let id = match request.get("prompt_id") {
        None | Some(Value::Null) => Uuid::new_v4().to_string(),
        Some(Value::String(id)) if is_canonical_uuid(id) => id.clone(),
        Some(_) => {
            let details = "prompt_id must be a UUID in its canonical lower-case form";
            return refuse("invalid_prompt_id", "The prompt_id is not valid", details);
        }
    };
    let targets: Option<Vec<String>> = match request.get("partial_execution_targets") {
        None | Some(Value::Null) => None,
        Some(targets) => match serde_json::from_value(targets.clone()) {
            Ok(targets) => Some(targets),
            Err(_) => return crash(),
        },
    };
    let mut extra_data = match request.shift_remove("extra_data") {
        None => Map::new(),
        Some(Value::Object(extra_data)) => extra_data,
        Some(_) => return crash(),
    };
    if let Some(client) = request.shift_remove("client_id") {
        extra_data.insert("client_id".into(), client);
    }
    extra_data.insert("create_time".into(), json!(timestamp()));
    let valid = match validate::validate(&mut prompt, targets.as_deref(), &comfy.files) {
        Ok(valid) => valid,
        Err(Invalid::Refused(answer)) => return (StatusCode::BAD_REQUEST, Json(answer)).into_response(),
        Err(Invalid::Crash) => return crash(),
    };
    let Value::Object(prompt) = prompt else { return crash() };
    comfy.queue.put(Job {
        number: number.clone(),
        id: id.clone(),
        prompt,
        extra_data,
        outputs: valid.outputs,
        interrupted: Arc::default(),
    });
    comfy.tell_queue();
    Json(json!({ "prompt_id": id, "number": number, "node_errors": valid.node_errors })).into_response()
}

pub async fn queue(State(comfy): State<Arc<Comfy>>) -> Json<Value> {
    Json(comfy.queue.describe())
}

pub async fn change_queue(State(comfy): State<Arc<Comfy>>, body: Bytes) -> Response {
    let Some(change) = Change::read(&body) else { return crash() };
    if change.clear {
        comfy.queue.clear();
    }
    change.delete.iter().for_each(|id| comfy.queue.delete(id));
    comfy.tell_queue();
    StatusCode::OK.into_response()
}

#[derive(Deserialize)]
pub struct Page {
    max_items: Option<String>,
    offset: Option<String>,
}

pub async fn history(State(comfy): State<Arc<Comfy>>, Query(page): Query<Page>) -> Response {
    // -1 is ComfyUI's own "not given".
    let number = |text: Option<String>| match text.map(|text| text.parse::<i64>()) {
        None => Ok(None),
        Some(Ok(number)) => Ok(usize::try_from(number).ok()),
        Some(Err(error)) => Err(error),
    };
    match (number(page.max_items), number(page.offset)) {
        (Ok(most), Ok(offset)) => Json(comfy.queue.history(most, offset)).into_response(),
        _ => crash(),
    }
}

pub async fn history_of(State(comfy): State<Arc<Comfy>>, Path(id): Path<String>) -> Json<Value> {
    Json(comfy.queue.history_of(&id))
}

pub async fn change_history(State(comfy): State<Arc<Comfy>>, body: Bytes) -> Response {
    let Some(change) = Change::read(&body) else { return crash() };
    if change.clear {
        comfy.queue.clear_history();
    }
    change.delete.iter().for_each(|id| comfy.queue.delete_history(id));
    StatusCode::OK.into_response()
}

/// With an id only if that prompt runs, else whatever runs. Always 200.
pub async fn interrupt(State(comfy): State<Arc<Comfy>>, body: Bytes) -> StatusCode {
    let request: Value = serde_json::from_slice(&body).unwrap_or_default();
    comfy.queue.interrupt(request.get("prompt_id").and_then(Value::as_str));
    StatusCode::OK
}

/// There are no models to unload; freeing memory forgets the results of earlier prompts.
pub async fn free(State(comfy): State<Arc<Comfy>>, body: Bytes) -> Response {
    let Ok(Value::Object(request)) = serde_json::from_slice(&body) else { return crash() };
    if is_true(request.get("free_memory")) {
        comfy.forget_results.store(true, Ordering::Relaxed);
    }
    StatusCode::OK.into_response()
}

/// `{clear: true}` or `{delete: [ids]}`.
struct Change {
    clear: bool,
    delete: Vec<String>,
}

impl Change {
    fn read(body: &[u8]) -> Option<Change> {
        let request: Map<String, Value> = serde_json::from_slice(body).ok()?;
        let delete = match request.get("delete") {
            None => Vec::new(),
            Some(ids) => ids.as_array()?.iter().filter_map(|id| id.as_str().map(str::to_owned)).collect(),
        };
        Some(Change { clear: is_true(request.get("clear")), delete })
    }
}

/// As Python's `if`.
fn is_true(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Number(number)) => number.as_f64() != Some(0.0),
        Some(Value::String(text)) => !text.is_empty(),
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::Object(map)) => !map.is_empty(),
        Some(Value::Bool(true)) => true,
    }
}

fn is_canonical_uuid(id: &str) -> bool {
    Uuid::parse_str(id).is_ok_and(|uuid| uuid.to_string() == id)
}

fn refuse(kind: &str, message: &str, details: &str) -> Response {
    let error = json!({ "type": kind, "message": message, "details": details, "extra_info": {} });
    (StatusCode::BAD_REQUEST, Json(json!({ "error": error, "node_errors": {} }))).into_response()
}
