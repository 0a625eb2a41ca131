//! The world's own levers under `/_sandbox`, which RunPod has nothing like.
//!
//! | route | what it does |
//! |---|---|
//! | `GET /_sandbox/clock` | `{now, mode}` |
//! | `POST /_sandbox/clock {"advance_seconds": n}` | leaps forward; whatever was due on the way has happened when it answers |
//! | `GET /_sandbox/requests` | `{requests: [...]}`, every RunPod request with its answer, see [`super::request_log::Entry`] |
//! | `GET, POST, DELETE /_sandbox/faults` | the queue; one more, see [`super::faults::Fault`]; none any more |
//! | `GET /_sandbox/pods` | `{pods: [...]}`, with those that have ended, their cost so far and their containers' events |
//! | `GET, PUT /_sandbox/stock {"gpu", "data_center", "secure"?, "community"?}` | how many GPUs there are in all |
//! | `PUT /_sandbox/rate_limit {"per_minute"?, "per_hour"?, "per_day"?, "minute_seconds"?}` | each key's quotas |

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::routing::{get, put};
use axum::{Json, Router};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::catalog::{self, Stock};
use super::clock::ClockMode;
use super::faults::Fault;
use super::rate_limit::NewPolicy;
use super::runpod_api::Problem;
use super::world::World;

pub fn routes() -> Router<Arc<World>> {
    Router::new()
        .route("/_sandbox/clock", get(read_clock).post(advance_clock))
        .route("/_sandbox/requests", get(requests))
        .route("/_sandbox/faults", get(list_faults).post(add_fault).delete(clear_faults))
        .route("/_sandbox/pods", get(pods))
        .route("/_sandbox/stock", get(list_stock).put(set_stock))
        .route("/_sandbox/rate_limit", put(set_rate_limit))
}

async fn read_clock(State(world): State<Arc<World>>) -> Json<Value> {
    let mode = match world.clock.mode() {
        ClockMode::Live => "live",
        ClockMode::Manual => "manual",
    };
    Json(json!({ "now": world.clock.now(), "mode": mode }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Advance {
    advance_seconds: f64,
}

async fn advance_clock(State(world): State<Arc<World>>, body: Bytes) -> Result<Json<Value>, Problem> {
    let advance: Advance = read(&body)?;
    let refused = || Problem::new(422, "advance_seconds must be from 0 to ten years in all");
    let by = Duration::try_from_secs_f64(advance.advance_seconds).map_err(|_| refused())?;
    if !world.clock.advance(by) {
        return Err(refused());
    }
    drop(world.state().await);
    world.changed.notify_one();
    Ok(read_clock(State(world)).await)
}

async fn requests(State(world): State<Arc<World>>) -> Json<Value> {
    Json(json!({ "requests": world.log.all() }))
}

async fn list_faults(State(world): State<Arc<World>>) -> Json<Value> {
    Json(json!({ "faults": world.faults.pending() }))
}

async fn add_fault(State(world): State<Arc<World>>, body: Bytes) -> Result<Json<Value>, Problem> {
    let fault: Fault = read(&body)?;
    if !fault.is_possible() {
        return Err(Problem::new(422, "this fault could never happen"));
    }
    world.faults.add(fault);
    Ok(list_faults(State(world)).await)
}

async fn clear_faults(State(world): State<Arc<World>>) -> Json<Value> {
    world.faults.clear();
    list_faults(State(world)).await
}

async fn pods(State(world): State<Arc<World>>) -> Json<Value> {
    let state = world.state().await;
    let now = world.clock.now();
    Json(json!({ "pods": state.pods.iter().map(|pod| pod.inner_view(now)).collect::<Vec<_>>() }))
}

async fn list_stock(State(world): State<Arc<World>>) -> Json<Value> {
    let state = world.state().await;
    let stock = state.stock.iter().map(|stock| {
        json!({
            "gpu": stock.gpu,
            "data_center": stock.data_center,
            "secure": stock.secure,
            "community": stock.community,
        })
    });
    Json(json!({ "stock": stock.collect::<Vec<_>>() }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewStock {
    gpu: String,
    data_center: String,
    secure: Option<u32>,
    community: Option<u32>,
}

async fn set_stock(State(world): State<Arc<World>>, body: Bytes) -> Result<Json<Value>, Problem> {
    let new: NewStock = read(&body)?;
    let gpu = catalog::find_gpu(&new.gpu).ok_or_else(|| Problem::new(422, "unknown GPU type"))?.id;
    let center = catalog::find_data_center(&new.data_center);
    let data_center = center.ok_or_else(|| Problem::new(422, "unknown data center"))?.id;
    let mut state = world.state().await;
    let index = state.stock.iter().position(|stock| stock.gpu == gpu && stock.data_center == data_center);
    let index = index.unwrap_or_else(|| {
        state.stock.push(Stock { gpu, data_center, secure: 0, community: 0 });
        state.stock.len() - 1
    });
    let stock = &mut state.stock[index];
    stock.secure = new.secure.unwrap_or(stock.secure);
    stock.community = new.community.unwrap_or(stock.community);
    drop(state);
    Ok(list_stock(State(world)).await)
}

async fn set_rate_limit(State(world): State<Arc<World>>, body: Bytes) -> Result<Json<Value>, Problem> {
    let new: NewPolicy = read(&body)?;
    let policy = world.rate_limit.set(&new).ok_or_else(|| Problem::new(422, "minute_seconds must be at least 1"))?;
    Ok(Json(policy))
}

/// The body whatever its content type, so that a bare `curl -d` does.
fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    serde_json::from_slice(body).map_err(|error| Problem::new(422, format!("the body can't be read: {error}")))
}
