//! The table of routes, what guards them, and the routes that only report.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::connect_info::ConnectInfo;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Map, Value, json};

use super::super::container::network::Via;
use super::{Comfy, VERSION, classes, files, page, prompts, socket, transfers};

/// The largest body of a request, in bytes; beyond it 413.
const LARGEST_BODY: usize = 100 * 1024 * 1024;
/// What the server says it has of main memory.
const RAM_BYTES: u64 = 64 << 30;

/// Every route, bare and under `/api`.
pub fn router(comfy: Arc<Comfy>) -> Router {
    let routes = Router::new()
        .route("/system_stats", get(system_stats))
        .route("/queue", get(prompts::queue).post(prompts::change_queue))
        .route("/prompt", get(prompts::remaining).post(prompts::submit))
        .route("/history", get(prompts::history).post(prompts::change_history))
        .route("/history/{id}", get(prompts::history_of))
        .route("/interrupt", post(prompts::interrupt))
        .route("/free", post(prompts::free))
        .route("/object_info", get(object_info))
        .route("/object_info/{class}", get(object_info_of))
        .route("/upload/image", post(transfers::upload))
        .route("/view", get(transfers::view))
        .route("/models", get(async || Json(files::MODEL_FOLDERS)))
        .route("/models/{folder}", get(models))
        .route("/embeddings", get(embeddings))
        .route("/features", get(async || Json(features())))
        .route("/ws", get(socket::connect));
    Router::new()
        .route("/", get(page::show))
        .merge(routes.clone())
        .nest("/api", routes)
        .fallback(async || (StatusCode::NOT_FOUND, "404: Not Found"))
        .layer(DefaultBodyLimit::max(LARGEST_BODY))
        .layer(middleware::from_fn(only_own_origin))
        .layer(middleware::from_fn_with_state(comfy.clone(), log))
        .with_state(comfy)
}

pub fn features() -> Value {
    json!({ "supports_preview_metadata": false, "max_upload_size": LARGEST_BODY })
}

/// What the real server says when it has no other answer, such as to JSON that it can't read.
pub fn crash() -> Response {
    let text = "500 Internal Server Error\n\nServer got itself in trouble";
    (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
}

async fn system_stats(State(comfy): State<Arc<Comfy>>) -> Json<Value> {
    Json(json!({
        "system": {
            "os": "posix",
            "ram_total": RAM_BYTES,
            "ram_free": RAM_BYTES / 2,
            "comfyui_version": VERSION,
            "required_frontend_version": "0",
            "python_version": "none: this is the sandbox's ComfyUI",
            "pytorch_version": "none",
            "embedded_python": false,
            "argv": ["main.py", "--listen", "127.0.0.1", "--port", "8188"],
        },
        "devices": [{
            "name": format!("cuda:0 {} (sandbox)", comfy.gpu_name),
            "type": "cuda",
            "index": 0,
            "vram_total": comfy.vram_bytes,
            "vram_free": comfy.vram_bytes,
            "torch_vram_total": 0,
            "torch_vram_free": 0,
        }],
    }))
}

async fn object_info(State(comfy): State<Arc<Comfy>>) -> Json<Value> {
    let described = classes::CLASSES.iter().map(|class| (class.name.to_owned(), class.describe(&comfy.files)));
    Json(Value::Object(described.collect::<Map<_, _>>()))
}

async fn object_info_of(State(comfy): State<Arc<Comfy>>, Path(name): Path<String>) -> Json<Value> {
    match classes::find(&name) {
        Some(class) => Json(json!({ name: class.describe(&comfy.files) })),
        None => Json(json!({})),
    }
}

async fn models(State(comfy): State<Arc<Comfy>>, Path(folder): Path<String>) -> Response {
    if files::MODEL_FOLDERS.contains(&folder.as_str()) {
        Json(comfy.files.models(&folder)).into_response()
    } else {
        StatusCode::NOT_FOUND.into_response()
    }
}

/// Without their extensions, unlike every other list of models.
async fn embeddings(State(comfy): State<Arc<Comfy>>) -> Json<Vec<String>> {
    let names = comfy.files.models("embeddings");
    let stem = |name: String| name.rsplit_once('.').map_or(name.clone(), |(stem, _)| stem.to_owned());
    Json(names.into_iter().map(stem).collect())
}

async fn log(
    State(comfy): State<Arc<Comfy>>,
    ConnectInfo(via): ConnectInfo<Via>,
    request: Request,
    next: Next,
) -> Response {
    let (method, path) = (request.method().to_string(), request.uri().path().to_owned());
    let response = next.run(request).await;
    let status = response.status().as_u16();
    comfy.log.add("comfy", json!({ "via": via.name(), "method": method, "path": path, "status": status }));
    response
}

/// Refuses what a browser sends on behalf of some other page, and answers every OPTIONS with nothing.
async fn only_own_origin(request: Request, next: Next) -> Response {
    if is_foreign(request.headers()) {
        return StatusCode::FORBIDDEN.into_response();
    }
    if request.method() == Method::OPTIONS {
        return StatusCode::OK.into_response();
    }
    next.run(request).await
}

/// Whether Host and Origin differ while the host is loopback. The port counts where both name one.
fn is_foreign(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_lowercase);
    if text(header::HeaderName::from_static("sec-fetch-site")).is_some_and(|site| site == "cross-site") {
        return true;
    }
    let (Some(host), Some(origin)) = (text(header::HOST), text(header::ORIGIN)) else { return false };
    let Ok(host) = host.parse::<axum::http::uri::Authority>() else { return false };
    let origin = origin.parse::<Uri>().ok().and_then(|origin| origin.authority().cloned());
    // An origin that names no server ("null") can't be compared, and passes.
    let Some(origin) = origin else { return false };
    let same_port = match (host.port_u16(), origin.port_u16()) {
        (Some(one), Some(other)) => one == other,
        _ => true,
    };
    is_loopback(host.host()) && (host.host() != origin.host() || !same_port)
}

fn is_loopback(host: &str) -> bool {
    let address: Result<IpAddr, _> = host.trim_matches(['[', ']']).parse();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}
