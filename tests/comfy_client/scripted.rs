//! A server that speaks ComfyUI's shapes on a real socket and does exactly what a test tells it to.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use autopod_mcp::comfy::{ComfyClient, ComfyTimeouts};
use axum::body::{Body, Bytes};
use axum::extract::ws::{Message, WebSocketUpgrade};
use axum::extract::{DefaultBodyLimit, Multipart, Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Map, Value, json};
use tokio::sync::broadcast;
use tokio_util::task::AbortOnDropHandle;

use crate::support::http::install_crypto;

/// What `POST /prompt` does next; it accepts when nothing is planned.
pub enum OnPrompt {
    CutAfterAccepting,
    CutWithoutAccepting,
    /// As old servers do: our id is ignored, theirs is used, and this is the answer lost.
    OwnId(&'static str),
    Answer(StatusCode, Value),
    Redirect,
}

/// What `GET /view` does next; it sends the file, or 404, when nothing is planned.
pub enum OnView {
    Truncate,
    Answer(StatusCode),
}

#[derive(Default)]
pub struct World {
    pub running: Vec<Value>,
    pub pending: Vec<Value>,
    pub history: Map<String, Value>,
    pub files: BTreeMap<String, Vec<u8>>,
    /// The bodies of every `POST /prompt`.
    pub prompts: Vec<Value>,
    pub uploads: Vec<(String, Vec<u8>)>,
    /// The client ids of every socket, in the order of opening.
    pub sockets: Vec<String>,
    /// `METHOD path` of every request.
    pub requests: Vec<String>,
    pub origins: usize,
    pub on_prompt: VecDeque<OnPrompt>,
    pub on_view: VecDeque<OnView>,
    pub stats: Option<(&'static str, &'static str)>,
    /// Everything answers 502.
    pub outage: bool,
    /// Sockets are accepted and then neither spoken on nor listened to.
    pub deaf: bool,
}

#[derive(Clone)]
pub struct Shared {
    world: Arc<Mutex<World>>,
    events: broadcast::Sender<Option<String>>,
}

pub struct Server {
    pub url: String,
    shared: Shared,
    _serving: AbortOnDropHandle<()>,
}

pub fn timeouts() -> ComfyTimeouts {
    ComfyTimeouts {
        connect: Duration::from_secs(5),
        request: Duration::from_secs(5),
        upload: Duration::from_secs(5),
        stall: Duration::from_secs(5),
        poll: Duration::from_millis(20),
        ping: Duration::from_millis(500),
        reconcile: Duration::from_millis(200),
        give_up: Duration::from_millis(300),
    }
}

pub fn client_at(url: &str, timeouts: ComfyTimeouts) -> ComfyClient {
    install_crypto();
    ComfyClient::new(url, timeouts).unwrap()
}

impl Server {
    pub async fn start() -> Self {
        let shared = Shared { world: Arc::default(), events: broadcast::channel(64).0 };
        let app = Router::new()
            .route("/system_stats", get(stats))
            .route("/queue", get(queue).post(change_queue))
            .route("/prompt", post(prompt))
            .route("/history", get(whole_history))
            .route("/history/{id}", get(history))
            .route("/object_info/{class}", get(object_info))
            .route("/upload/image", post(upload))
            .route("/interrupt", post(interrupt))
            .route("/view", get(view))
            .route("/ws", get(socket))
            .layer(DefaultBodyLimit::disable())
            .layer(axum::middleware::from_fn_with_state(shared.clone(), record))
            .with_state(shared.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let serving = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { url, shared, _serving: AbortOnDropHandle::new(serving) }
    }

    pub fn client(&self) -> ComfyClient {
        client_at(&self.url, timeouts())
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        self.shared.world.lock().unwrap()
    }

    /// Waits, but not for ever, until the world is as wanted.
    pub async fn until(&self, what: &str, wanted: impl Fn(&World) -> bool) {
        for _ in 0..1000 {
            if wanted(&self.world()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("never came about: {what}");
    }

    pub fn tell(&self, kind: &str, data: Value) {
        let _ = self.shared.events.send(Some(json!({"type": kind, "data": data}).to_string()));
    }

    /// Every socket breaks without a closing frame.
    pub fn cut_sockets(&self) {
        let _ = self.shared.events.send(None);
    }

    /// Takes the first pending prompt to work.
    pub fn begin(&self) -> String {
        let mut world = self.world();
        let item = world.pending.remove(0);
        world.running.push(item.clone());
        item[1].as_str().unwrap().to_owned()
    }

    /// Ends the running prompt with these outputs.
    pub fn finish(&self, outputs: Value) {
        self.end(outputs, json!({"status_str": "success", "completed": true, "messages": []}));
    }

    pub fn end(&self, outputs: Value, status: Value) {
        let mut world = self.world();
        let item = world.running.remove(0);
        let entry = json!({"prompt": item, "outputs": outputs, "status": status, "meta": {}});
        world.history.insert(item[1].as_str().unwrap().to_owned(), entry);
    }

    pub fn put_file(&self, folder: &str, subfolder: &str, name: &str, content: &[u8]) {
        self.world().files.insert(format!("{folder}|{subfolder}|{name}"), content.to_vec());
    }
}

async fn record(State(shared): State<Shared>, request: Request, next: Next) -> Response {
    {
        let mut world = shared.world.lock().unwrap();
        world.requests.push(format!("{} {}", request.method(), request.uri().path()));
        world.origins += usize::from(request.headers().contains_key(header::ORIGIN));
        if world.outage {
            return StatusCode::BAD_GATEWAY.into_response();
        }
    }
    next.run(request).await
}

async fn stats(State(shared): State<Shared>) -> Response {
    let planned = shared.world.lock().unwrap().stats;
    if let Some((kind, body)) = planned {
        return ([(header::CONTENT_TYPE, kind)], body).into_response();
    }
    let system =
        json!({"os": "posix", "comfyui_version": "0.3.64", "ram_total": 8, "ram_free": 4, "argv": ["main.py"]});
    let device = json!({"name": "cuda:0", "type": "cuda", "index": 0, "vram_total": 24, "vram_free": 20});
    Json(json!({"system": system, "devices": [device]})).into_response()
}

async fn queue(State(shared): State<Shared>) -> Json<Value> {
    let world = shared.world.lock().unwrap();
    Json(json!({"queue_running": world.running, "queue_pending": world.pending}))
}

async fn change_queue(State(shared): State<Shared>, Json(body): Json<Value>) {
    let deleted = body["delete"].as_array().cloned().unwrap_or_default();
    shared.world.lock().unwrap().pending.retain(|item| !deleted.contains(&item[1]));
}

async fn interrupt(State(shared): State<Shared>, Json(body): Json<Value>) {
    shared.world.lock().unwrap().running.retain(|item| item[1] != body["prompt_id"]);
}

/// A head that promises more than what comes before the connection breaks.
fn cut(head: Response<Body>, sent: &[u8]) -> Response {
    let sent = Bytes::copy_from_slice(sent);
    let stream = async_stream_of(sent);
    head.map(|_| Body::from_stream(stream))
}

fn async_stream_of(sent: Bytes) -> impl futures_util::Stream<Item = Result<Bytes, std::io::Error>> {
    futures_util::stream::unfold(0, move |step| {
        let sent = sent.clone();
        async move {
            // What was sent reaches the other side before the break does.
            tokio::time::sleep(Duration::from_millis(20)).await;
            match step {
                0 => Some((Ok(sent), 1)),
                1 => Some((Err(std::io::Error::other("cut by the test")), 2)),
                _ => None,
            }
        }
    })
}

async fn prompt(State(shared): State<Shared>, Json(body): Json<Value>) -> Response {
    let mut world = shared.world.lock().unwrap();
    world.prompts.push(body.clone());
    let number = world.prompts.len();
    let planned = world.on_prompt.pop_front();
    let id = match planned {
        Some(OnPrompt::OwnId(id)) => json!(id),
        _ => body["prompt_id"].clone(),
    };
    let extra = json!({"client_id": body["client_id"], "api_key": "secret"});
    let item = json!([number, id, body["prompt"], extra, ["2"]]);
    let answer = json!({"prompt_id": id, "number": number, "node_errors": {}});
    match planned {
        Some(OnPrompt::CutWithoutAccepting) => return cut(Response::default(), b"{"),
        Some(OnPrompt::CutAfterAccepting | OnPrompt::OwnId(_)) => {
            world.pending.push(item);
            return cut(Response::default(), b"{\"prompt_id\":");
        }
        Some(OnPrompt::Answer(status, body)) => return (status, Json(body)).into_response(),
        Some(OnPrompt::Redirect) => return (StatusCode::FOUND, [(header::LOCATION, "/prompt2")]).into_response(),
        None => world.pending.push(item),
    }
    Json(answer).into_response()
}

async fn whole_history(State(shared): State<Shared>) -> Json<Value> {
    Json(Value::Object(shared.world.lock().unwrap().history.clone()))
}

async fn history(State(shared): State<Shared>, Path(id): Path<String>) -> Response {
    let found = shared.world.lock().unwrap().history.get(&id).cloned();
    // As Python writes it: what JSON can't say stands there all the same.
    let body = json!(found.map(|entry| BTreeMap::from([(id, entry)])).unwrap_or_default()).to_string();
    ([(header::CONTENT_TYPE, "application/json")], body.replace("\"<NaN>\"", "NaN")).into_response()
}

async fn object_info(Path(class): Path<String>) -> Json<Value> {
    Json(if class == "EmptyImage" { json!({class: {"input": {"required": {}}}}) } else { json!({}) })
}

async fn upload(State(shared): State<Shared>, mut form: Multipart) -> Json<Value> {
    let mut subfolder = String::new();
    while let Some(field) = form.next_field().await.unwrap() {
        match field.name() {
            Some("image") => {
                let name = field.file_name().unwrap().to_owned();
                let content = field.bytes().await.unwrap().to_vec();
                shared.world.lock().unwrap().uploads.push((name, content));
            }
            Some("subfolder") => subfolder = field.text().await.unwrap(),
            _ => {}
        }
    }
    // The name is taken, so the server gives another.
    Json(json!({"name": "given (1).png", "subfolder": subfolder, "type": "input"}))
}

async fn view(State(shared): State<Shared>, Query(query): Query<BTreeMap<String, String>>) -> Response {
    let mut world = shared.world.lock().unwrap();
    let key = format!("{}|{}|{}", query["type"], query["subfolder"], query["filename"]);
    let Some(content) = world.files.get(&key).cloned() else { return StatusCode::NOT_FOUND.into_response() };
    match world.on_view.pop_front() {
        Some(OnView::Truncate) => {
            let head = Response::builder().header(header::CONTENT_LENGTH, content.len());
            cut(head.body(Body::empty()).unwrap(), &content[..content.len() / 2])
        }
        Some(OnView::Answer(status)) => status.into_response(),
        None => content.into_response(),
    }
}

async fn socket(
    State(shared): State<Shared>,
    Query(query): Query<BTreeMap<String, String>>,
    upgrade: WebSocketUpgrade,
) -> Response {
    let mut events = shared.events.subscribe();
    let deaf = {
        let mut world = shared.world.lock().unwrap();
        world.sockets.push(query["clientId"].clone());
        world.deaf
    };
    upgrade.on_upgrade(async move |mut socket| {
        if deaf {
            return std::future::pending().await;
        }
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Ok(Some(event)) if socket.send(Message::Text(event.as_str().into())).await.is_ok() => {}
                    _ => return,
                },
                message = socket.recv() => if !matches!(message, Some(Ok(_))) { return },
            }
        }
    })
}
