//! A ComfyUI-compatible server that really executes a small set of nodes, on the CPU.
//!
//! It follows ComfyUI 0.3.64 in its shapes and in its oddities (who gets which event, what a second socket of the same
//! client hears, when history is written), because those are what a client stumbles over. Where generations differ it
//! takes the stricter one.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;

use super::container::log::EventLog;
use super::container::network::{PodListener, Via};

mod classes;
mod execution;
mod files;
mod nodes;
mod page;
mod pictures;
mod prompts;
mod queue;
mod routes;
mod socket;
mod transfers;
mod validate;

use execution::Executor;
use files::Files;
use queue::{Finished, Job, Queue};
use socket::Sockets;

/// What the server reports as its version.
const VERSION: &str = "0.3.64";

pub struct ComfySettings {
    /// Holds `input`, `output` and `temp`.
    pub folder: PathBuf,
    /// The network volume, where models may lie.
    pub volume: Option<PathBuf>,
    pub gpu_name: String,
    pub vram_bytes: u64,
    pub log: EventLog,
    pub stop: CancellationToken,
}

/// The state of one server.
pub struct Comfy {
    gpu_name: String,
    vram_bytes: u64,
    log: EventLog,
    stop: CancellationToken,
    files: Files,
    queue: Queue,
    sockets: Sockets,
    /// Asks for the results of earlier prompts to be forgotten before the next one starts.
    forget_results: AtomicBool,
    /// Whose prompt runs and at which node, told to that client when it connects again.
    current: Mutex<Option<(String, String)>>,
}

impl Comfy {
    pub fn new(settings: ComfySettings) -> Arc<Comfy> {
        Arc::new(Comfy {
            files: Files::new(settings.folder, settings.volume),
            gpu_name: settings.gpu_name,
            vram_bytes: settings.vram_bytes,
            log: settings.log,
            stop: settings.stop,
            queue: Queue::default(),
            sockets: Sockets::default(),
            forget_results: AtomicBool::new(false),
            current: Mutex::new(None),
        })
    }

    /// Answers requests until the pod stops.
    pub async fn serve(self: Arc<Self>, listener: PodListener) {
        let stop = self.stop.clone();
        let service = routes::router(self).into_make_service_with_connect_info::<Via>();
        let serving = axum::serve(listener, service).with_graceful_shutdown(stop.clone().cancelled_owned());
        if let Err(error) = serving.await {
            tracing::error!(%error, "the sandbox's ComfyUI ended");
        }
    }

    /// Executes what is queued, one prompt at a time, until the pod stops.
    pub async fn work(self: Arc<Self>) {
        let mut executor = Executor::default();
        while let Some(job) = self.stop.run_until_cancelled(self.queue.take()).await {
            self.tell_queue();
            let (comfy, running) = (self.clone(), job.clone());
            let working = tokio::task::spawn_blocking(move || {
                if comfy.forget_results.swap(false, Ordering::Relaxed) {
                    executor = Executor::default();
                }
                let result = executor.execute(&comfy, &running);
                (executor, result)
            });
            let (kept, result) = working.await.unwrap_or_else(|error| {
                tracing::error!(%error, prompt = job.id, "a node of the sandbox's ComfyUI panicked");
                let lost = Finished { outputs: Map::new(), meta: Map::new(), success: false, messages: Vec::new() };
                (Executor::default(), lost)
            });
            executor = kept;
            *self.current.lock().unwrap_or_else(PoisonError::into_inner) = None;
            // History first: who hears the end looks there at once.
            self.queue.finish(&job, result);
            self.tell_queue();
            if let Some(client) = job.client() {
                self.sockets.send("executing", json!({ "node": null, "prompt_id": job.id }), Some(client));
            }
        }
    }

    fn tell_queue(&self) {
        self.sockets.send("status", json!({ "status": self.queue.status() }), None);
    }

    /// Whether a running prompt is to end. A stopping pod ends it too.
    fn is_interrupted(&self, job: &Job) -> bool {
        job.interrupted.load(Ordering::Relaxed) || self.stop.is_cancelled()
    }
}

impl Connected<IncomingStream<'_, PodListener>> for Via {
    fn connect_info(stream: IncomingStream<'_, PodListener>) -> Via {
        *stream.remote_addr()
    }
}

/// Milliseconds since 1970, as ComfyUI stamps its messages. The pod's own clock, not the sandbox world's.
fn timestamp() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_millis() as u64)
}

/// How Python's `str` writes a JSON value, for messages that quote one.
fn python_text(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
