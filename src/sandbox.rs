//! A RunPod on loopback: pods with real SSH servers and a real ComfyUI-compatible server behind them, on a clock that
//! tests drive.
//!
//! It imports nothing else of the crate, so that it cannot agree with the client by sharing its mistakes.
//!
//! - `/v2/...` is RunPod's REST API as far as the product uses it, stricter than the original; see `runpod_api`.
//! - `/_sandbox/...` are the levers of the world; see `control_api`.
//! - `/_proxy/{podId}-{port}/...` stands for RunPod's HTTP proxy; see `http_proxy`.

mod billing;
mod catalog;
mod clock;
mod comfy_api;
pub mod container;
mod control_api;
mod faults;
mod http_proxy;
mod life;
mod listener;
mod pod;
mod rate_limit;
mod request_log;
mod runpod_api;
mod ssh_server;
mod world;

use std::fmt;
use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use jiff::fmt::rfc2822::DateTimePrinter;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub use clock::ClockMode;
use listener::{CuttableListener, Peer};
use runpod_api::Problem;
use world::World;

/// Requests whose User-Agent begins so don't keep an idle sandbox awake.
const KEEPER_AGENT: &str = "autopod-keeper";

/// How long answers under way may take once the sandbox ends.
const FAREWELL: Duration = Duration::from_secs(2);

#[derive(Debug, Clone)]
pub struct SandboxOptions {
    /// Where to listen; port 0 takes a free one. Anything that isn't loopback is refused.
    pub listen: SocketAddr,
    /// Holds sandbox.json and world.key while the sandbox runs, the pods' folders, and the volumes, which outlive it.
    /// It is made, 0700, if it isn't there.
    pub folder: PathBuf,
    pub clock: ClockMode,
    /// URL of a real ComfyUI to stand behind the pods instead of the sandbox's own.
    pub comfyui: Option<String>,
    /// Ends by itself when it has no pod and no client request came for so long.
    pub idle_limit: Option<Duration>,
    /// False lets the pods do as on a kernel that refuses user namespaces: no commands run in them.
    pub namespaces: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("the sandbox listens on loopback only, not on {0}")]
    NotLoopback(SocketAddr),
    #[error("the sandbox can't listen on {address}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("the sandbox can't write to {}", path.display())]
    Folder { path: PathBuf, source: io::Error },
}

/// A running sandbox. Dropping it ends it too, only without waiting for that.
pub struct Sandbox {
    url: String,
    key_file: PathBuf,
    world: Arc<World>,
    ended: CancellationToken,
}

/// Starts a sandbox. That nobody else uses the folder is the caller's to see to.
pub async fn start(options: SandboxOptions) -> Result<Sandbox, SandboxError> {
    if !options.listen.ip().is_loopback() {
        return Err(SandboxError::NotLoopback(options.listen));
    }
    let folder = options.folder;
    let folder_error = |path: &Path| {
        let path = path.to_owned();
        move |source| SandboxError::Folder { path, source }
    };
    prepare_folder(&folder).map_err(folder_error(&folder))?;
    let listen_error = |source| SandboxError::Listen { address: options.listen, source };
    let listener = TcpListener::bind(options.listen).await.map_err(listen_error)?;
    let address = listener.local_addr().map_err(listen_error)?;
    let url = format!("http://{address}");

    let world = Arc::new(World::new(folder.clone(), options.clock, options.comfyui, options.namespaces));
    let key_file = folder.join("world.key");
    write_private(&folder, &key_file, &format!("{}\n", world.key)).map_err(folder_error(&key_file))?;
    let server = serve(listener, address.port(), Arc::clone(&world));
    let description = folder.join("sandbox.json");
    let about = json!({
        "url": url, "pid": std::process::id(), "key_file": key_file, "started_at": jiff::Timestamp::now()
    });
    write_private(&folder, &description, &format!("{about:#}\n")).map_err(|source| {
        world.stopping.cancel();
        SandboxError::Folder { path: description.clone(), source }
    })?;

    let ended = CancellationToken::new();
    tracing::info!(url, folder = %folder.display(), "the sandbox listens");
    tokio::spawn({
        let (world, ended, files) = (Arc::clone(&world), ended.clone(), [description, key_file.clone()]);
        async move {
            live(&world, options.idle_limit).await;
            end(&world, server, &files).await;
            ended.cancel();
        }
    });
    Ok(Sandbox { url, key_file, world, ended })
}

impl Sandbox {
    /// The origin without `/v2`, such as `http://127.0.0.1:4711`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The account's API key, random for each world.
    pub fn key(&self) -> &str {
        &self.world.key
    }

    /// The key of a second account, which has no pods and no volumes, and no balance to make any.
    pub fn other_key(&self) -> &str {
        &self.world.other_key
    }

    pub fn key_file(&self) -> &Path {
        &self.key_file
    }

    /// Every RunPod request with its answer, as `GET /_sandbox/requests` gives them; also after the end.
    pub fn requests(&self) -> Vec<serde_json::Value> {
        self.world.log.all().iter().map(|entry| json!(entry)).collect()
    }

    /// Waits until it has ended, be it by idleness or by [`Self::stop`].
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// Ends it with every pod's servers.
    pub async fn stop(self) {
        self.world.stopping.cancel();
        self.ended.cancelled().await;
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.world.stopping.cancel();
    }
}

/// Without the key.
impl fmt::Debug for Sandbox {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Sandbox").field("url", &self.url).finish_non_exhaustive()
    }
}

/// Drives a live world, and watches for idleness, until it is to end.
async fn live(world: &Arc<World>, idle_limit: Option<Duration>) {
    loop {
        let mut quiet = match world.clock.mode() {
            ClockMode::Live => world.quiet_for().await,
            ClockMode::Manual => Duration::from_secs(1),
        };
        if let Some(limit) = idle_limit {
            if world.is_idle_for(limit).await {
                tracing::info!("the sandbox ends: no pod, and no request for {limit:?}");
                return;
            }
            quiet = quiet.min(limit.max(Duration::from_millis(20)));
        }
        tokio::select! {
            () = world.stopping.cancelled() => return,
            () = world.changed.notified() => {}
            () = tokio::time::sleep(quiet) => {}
        }
        drop(world.state().await);
    }
}

async fn end(world: &World, mut server: JoinHandle<()>, files: &[PathBuf]) {
    world.stopping.cancel();
    world.shut_down().await;
    if tokio::time::timeout(FAREWELL, &mut server).await.is_err() {
        server.abort();
    }
    let pods = world::pods_folder(&world.folder);
    let results = files.iter().map(fs::remove_file).chain([fs::remove_dir_all(&pods)]);
    for error in results.filter_map(Result::err).filter(|error| error.kind() != io::ErrorKind::NotFound) {
        tracing::warn!(%error, "a file of the sandbox can't be removed");
    }
}

fn serve(listener: TcpListener, port: u16, world: Arc<World>) -> JoinHandle<()> {
    let routes = Router::new()
        .route("/v2", any(runpod_api::handle))
        .route("/v2/{*rest}", any(runpod_api::handle))
        .route("/_proxy/{target}", any(http_proxy::handle_root))
        .route("/_proxy/{target}/", any(http_proxy::handle_root))
        .route("/_proxy/{target}/{*rest}", any(http_proxy::handle))
        .merge(control_api::routes())
        .fallback(unknown_route)
        .layer(middleware::from_fn_with_state(port, refuse_strangers))
        .layer(middleware::from_fn_with_state(Arc::clone(&world), stamp))
        .with_state(Arc::clone(&world));
    let stopping = world.stopping.clone();
    tokio::spawn(async move {
        let service = routes.into_make_service_with_connect_info::<Peer>();
        let served = axum::serve(CuttableListener(listener), service)
            .with_graceful_shutdown(async move { stopping.cancelled().await })
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "the sandbox's server failed");
        }
    })
}

/// A port of this machine is open to every page in its browser: one on another site may send requests here and, by
/// DNS rebinding, read the answers. So only requests to this machine's own address are answered, and none that
/// another site's page makes.
async fn refuse_strangers(State(port): State<u16>, request: Request, next: Next) -> Response {
    if is_for_us(request.headers(), port) {
        return next.run(request).await;
    }
    Problem::new(403, "the sandbox answers only requests to this machine's own address").into_response()
}

fn is_for_us(headers: &HeaderMap, port: u16) -> bool {
    let ours = |authority: &str| {
        authority.rsplit_once(':').is_some_and(|(host, given)| {
            let literal = host.trim_start_matches('[').trim_end_matches(']');
            let is_loopback = literal.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
            (is_loopback || host == "localhost") && given.parse() == Ok(port)
        })
    };
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    let origin_is_ours = text(header::ORIGIN).is_none_or(|origin| origin.strip_prefix("http://").is_some_and(ours));
    text(header::HOST).is_some_and(ours) && origin_is_ours
}

/// Notes who keeps the world awake, and puts the world's clock on every answer.
async fn stamp(State(world): State<Arc<World>>, request: Request, next: Next) -> Response {
    let agent = request.headers().get(header::USER_AGENT).and_then(|agent| agent.to_str().ok());
    if !agent.is_some_and(|agent| agent.starts_with(KEEPER_AGENT)) {
        world.note_client_request();
    }
    let mut response = next.run(request).await;
    let date = DateTimePrinter::new().timestamp_to_rfc9110_string(&world.clock.now());
    if let Some(date) = date.ok().and_then(|date| HeaderValue::from_str(&date).ok()) {
        response.headers_mut().insert(header::DATE, date);
    }
    response
}

async fn unknown_route(request: Request) -> Problem {
    let detail = format!("the sandbox doesn't have the route {} {}", request.method(), request.uri().path());
    tracing::warn!("{detail}");
    Problem::new(501, detail)
}

fn prepare_folder(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    fs::set_permissions(folder, Permissions::from_mode(0o700))?;
    match fs::remove_dir_all(world::pods_folder(folder)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Replaces the file in one step; a temporary file is 0600 from its beginning.
fn write_private(folder: &Path, path: &Path, text: &str) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(text.as_bytes())?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}
