//! The client of one ComfyUI server: its HTTP calls here, [`watch`] for following a run, [`workflow`] for what is
//! submitted, [`outputs`] for what comes back, [`jobs`] for runs that outlive their caller.
//!
//! Nothing in here knows pods, tunnels or tools: a server is an address. Both generations of servers are spoken to:
//! those that take our prompt id and those that give one of their own.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::{Method, Response, Url};
use serde_json::{Map, Value, json};
use tokio::sync::OnceCell;
use uuid::Uuid;

pub mod error;
pub mod jobs;
pub mod outputs;
mod socket;
pub mod types;
pub mod watch;
pub mod workflow;

pub use error::{ComfyError, NodeError, Rejection};
use types::{Bad, parse_python_json};
pub use types::{
    Device, Failure, HistoryEntry, Queue, QueueItem, Submitted, SystemInfo, SystemStats, Uploaded, Verdict,
};
use workflow::Workflow;

/// The largest JSON answer that is read: `/object_info` with many custom nodes has tens of megabytes.
const MAX_JSON: u64 = 128 << 20;
/// How much of an error's text is kept.
const MAX_TEXT: usize = 2000;

/// Every wait of the client.
#[derive(Debug, Clone, Copy)]
pub struct ComfyTimeouts {
    pub connect: Duration,
    /// A whole call that answers JSON.
    pub request: Duration,
    /// A whole upload.
    pub upload: Duration,
    /// The longest silence within a download.
    pub stall: Duration,
    /// Between two looks at history and queue while a run is followed.
    pub poll: Duration,
    /// Between two pings on the socket; nothing heard for three of them makes it dead.
    pub ping: Duration,
    /// How long a submit whose answer was lost is looked for.
    pub reconcile: Duration,
    /// How long a run is followed while the server can't be reached.
    pub give_up: Duration,
}

impl Default for ComfyTimeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            request: Duration::from_secs(15),
            upload: Duration::from_secs(30 * 60),
            stall: Duration::from_secs(30),
            poll: Duration::from_secs(1),
            ping: Duration::from_secs(10),
            reconcile: Duration::from_secs(20),
            give_up: Duration::from_secs(5 * 60),
        }
    }
}

/// Cheap to clone; connections are shared by the clones.
#[derive(Debug, Clone)]
pub struct ComfyClient {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    base: Url,
    /// Host and port, for messages; never user or password.
    address: String,
    timeouts: ComfyTimeouts,
    http: OnceCell<reqwest::Client>,
}

/// What is sent to `POST /upload/image`.
#[derive(Debug, Clone, Copy)]
pub struct Upload<'a> {
    /// The name it shall have there; the server may choose another.
    pub name: &'a str,
    pub content: Content<'a>,
    pub subfolder: &'a str,
    /// `input`, `temp` or `output`.
    pub kind: &'a str,
    pub overwrite: bool,
}

#[derive(Debug, Clone, Copy)]
pub enum Content<'a> {
    Bytes(&'a [u8]),
    /// Streamed, not read into memory.
    File(&'a Path),
}

/// A whole answer whose status is 2xx or 4xx/5xx, redirects being errors already.
struct Answer {
    call: String,
    status: u16,
    server: String,
    content_type: String,
    body: Vec<u8>,
}

impl ComfyClient {
    /// `base_url` like `http://127.0.0.1:8188`; a path in it is kept as a prefix. Nothing is connected yet.
    pub fn new(base_url: &str, timeouts: ComfyTimeouts) -> Result<Self, ComfyError> {
        let base = Url::parse(base_url)
            .map_err(|error| ComfyError::Setup(format!("{base_url:?} is not an address of ComfyUI: {error}")))?;
        let host = base.host_str().unwrap_or_default();
        if !matches!(base.scheme(), "http" | "https") || host.is_empty() {
            return Err(ComfyError::Setup(format!("{base_url:?} is not an http:// or https:// address")));
        }
        let port = base.port().map_or(String::new(), |port| format!(":{port}"));
        let address = format!("{}://{host}{port}", base.scheme());
        Ok(Self { inner: Arc::new(Inner { base, address, timeouts, http: OnceCell::new() }) })
    }

    /// Scheme, host and port.
    pub fn address(&self) -> &str {
        &self.inner.address
    }

    pub fn timeouts(&self) -> &ComfyTimeouts {
        &self.inner.timeouts
    }

    /// The health check: says [`ComfyError::WrongService`] when something else answers there.
    pub async fn system_stats(&self) -> Result<SystemStats, ComfyError> {
        let wrong = |found: String| ComfyError::WrongService { address: self.address().to_owned(), found };
        let answer = match self.get(&["system_stats"], &[]).await {
            Err(ComfyError::Redirected { to, .. }) => return Err(wrong(format!("it redirects to {to}"))),
            answer => answer?,
        };
        if matches!(answer.status, 401 | 404 | 405) {
            return Err(wrong(answer.describe()));
        }
        let answer = answer.successful()?;
        let stats = parse_python_json(&answer.body).ok().and_then(|body| serde_json::from_value(body).ok());
        stats.ok_or_else(|| wrong(answer.describe()))
    }

    pub async fn queue(&self) -> Result<Queue, ComfyError> {
        let answer = self.get(&["queue"], &[]).await?.successful()?;
        let body = answer.json()?;
        Queue::from_body(&body).map_err(|bad| answer.unreadable(bad))
    }

    /// Every class of node the server has: `{class: {input, output, ...}}`.
    pub async fn object_info(&self) -> Result<Map<String, Value>, ComfyError> {
        let answer = self.get(&["object_info"], &[]).await?.successful()?;
        answer.object()
    }

    /// One class of node; `None` when the server doesn't have it.
    pub async fn object_info_class(&self, class: &str) -> Result<Option<Value>, ComfyError> {
        let answer = self.get(&["object_info", class], &[]).await?.successful()?;
        Ok(answer.object()?.remove(class))
    }

    /// `None` until the prompt has ended, and again after the server forgot it (a restart, a cleared history).
    pub async fn history(&self, prompt_id: &str) -> Result<Option<HistoryEntry>, ComfyError> {
        let answer = self.get(&["history", prompt_id], &[]).await?.successful()?;
        let found = answer.object()?.remove(prompt_id);
        found.map(|value| HistoryEntry::from_value(prompt_id, &value)).transpose().map_err(|bad| answer.unreadable(bad))
    }

    /// The last `count` prompts that ended, oldest first.
    pub async fn history_last(&self, count: usize) -> Result<Vec<HistoryEntry>, ComfyError> {
        let answer = self.get(&["history"], &[("max_items", &count.to_string())]).await?.successful()?;
        let entries = answer.object()?;
        let entries = entries.iter().map(|(prompt_id, value)| HistoryEntry::from_value(prompt_id, value));
        entries.collect::<Result<_, _>>().map_err(|bad| answer.unreadable(bad))
    }

    /// Queues the workflow under our own id with one POST, which is never sent again: when its answer is lost, queue
    /// and history are searched for it. Older servers ignore `prompt_id` and give their own, so `client_id` must be
    /// used for this one prompt only: by it the prompt is found there.
    pub async fn submit(&self, prompt_id: Uuid, client_id: &str, workflow: &Workflow) -> Result<Submitted, ComfyError> {
        let prompt_id = prompt_id.to_string();
        let body = json!({"prompt": workflow.nodes(), "prompt_id": prompt_id, "client_id": client_id});
        let outcome = async {
            let answer = self.post(&["prompt"], &body).await?;
            if answer.status == 400
                && let Some(rejection) = answer.json().ok().as_ref().and_then(Rejection::from_body)
            {
                return Err(ComfyError::Rejected(Box::new(rejection)));
            }
            let answer = answer.successful()?;
            let body = answer.json()?;
            let id = body.get("prompt_id").and_then(Value::as_str);
            Ok(Submitted {
                prompt_id: id.ok_or_else(|| answer.unreadable(Bad::new("prompt_id", "missing")))?.to_owned(),
                number: body.get("number").and_then(Value::as_f64),
                node_errors: NodeError::all_from(&body["node_errors"]),
            })
        };
        match outcome.await {
            Err(lost) if answer_was_lost(&lost) => self.reconcile(&prompt_id, client_id, lost).await,
            outcome => outcome,
        }
    }

    /// Looks for a prompt in history and queue, by its id or by the client id it was submitted with.
    pub async fn find(&self, prompt_id: &str, client_id: &str) -> Result<Option<Submitted>, ComfyError> {
        // History is read before and after the queue, so that a prompt that ends meanwhile isn't missed.
        if let Some(id) = self.find_in_history(prompt_id, client_id).await? {
            return Ok(Some(Submitted { prompt_id: id, number: None, node_errors: Vec::new() }));
        }
        let queue = self.queue().await?;
        let ours = |item: &&QueueItem| item.prompt_id == prompt_id || item.client_id.as_deref() == Some(client_id);
        if let Some(item) = queue.iter().find(ours) {
            let (prompt_id, number) = (item.prompt_id.clone(), Some(item.number));
            return Ok(Some(Submitted { prompt_id, number, node_errors: Vec::new() }));
        }
        let id = self.find_in_history(prompt_id, client_id).await?;
        Ok(id.map(|prompt_id| Submitted { prompt_id, number: None, node_errors: Vec::new() }))
    }

    pub async fn upload(&self, upload: Upload<'_>) -> Result<Uploaded, ComfyError> {
        use reqwest::multipart::{Form, Part};
        let part = match upload.content {
            Content::Bytes(bytes) => Part::bytes(bytes.to_vec()),
            Content::File(path) => Part::file(path)
                .await
                .map_err(|source| ComfyError::File { path: path.display().to_string(), source })?,
        };
        let form = Form::new()
            .part("image", part.file_name(upload.name.to_owned()))
            .text("type", upload.kind.to_owned())
            .text("subfolder", upload.subfolder.to_owned())
            .text("overwrite", if upload.overwrite { "true" } else { "false" });
        let call = Call::new(Method::POST, self.url(&["upload", "image"], &[]), self.inner.timeouts.upload);
        let answer = self.exchange(call, |request| request.multipart(form)).await?.successful()?;
        serde_path_to_error::deserialize(answer.json()?)
            .map_err(|error| answer.unreadable(Bad::new(error.path().to_string(), error.inner().to_string())))
    }

    /// Asks the server to stop this prompt, which it does between nodes or steps. `false` when it wasn't running:
    /// then nothing is sent, because older servers stop whatever runs.
    pub async fn interrupt(&self, prompt_id: &str) -> Result<bool, ComfyError> {
        if !self.queue().await?.running.iter().any(|item| item.prompt_id == prompt_id) {
            return Ok(false);
        }
        self.post(&["interrupt"], &json!({"prompt_id": prompt_id})).await?.successful()?;
        Ok(true)
    }

    /// Takes the prompt out of the queue. The server answers the same whether it was there or not; so `true` means
    /// that it was pending before and isn't in the queue any more.
    pub async fn delete_pending(&self, prompt_id: &str) -> Result<bool, ComfyError> {
        if !self.queue().await?.pending.iter().any(|item| item.prompt_id == prompt_id) {
            return Ok(false);
        }
        self.post(&["queue"], &json!({"delete": [prompt_id]})).await?.successful()?;
        Ok(!self.queue().await?.iter().any(|item| item.prompt_id == prompt_id))
    }

    async fn find_in_history(&self, prompt_id: &str, client_id: &str) -> Result<Option<String>, ComfyError> {
        if self.history(prompt_id).await?.is_some() {
            return Ok(Some(prompt_id.to_owned()));
        }
        let mut last = self.history_last(20).await?.into_iter();
        Ok(last.find(|entry| entry.client_id.as_deref() == Some(client_id)).map(|entry| entry.prompt_id))
    }

    /// The first look that can be made and finds nothing isn't believed: the server may still be checking the
    /// workflow. So absence counts only at the end of the time given.
    async fn reconcile(&self, prompt_id: &str, client_id: &str, lost: ComfyError) -> Result<Submitted, ComfyError> {
        tracing::warn!(prompt_id, error = %lost, "the answer to a submit was lost, looking for the prompt");
        let until = Instant::now() + self.inner.timeouts.reconcile;
        loop {
            let look = self.find(prompt_id, client_id).await;
            if let Ok(Some(found)) = look {
                return Ok(found);
            }
            if Instant::now() >= until {
                let (prompt_id, source) = (prompt_id.to_owned(), Box::new(lost));
                return Err(match look {
                    Ok(_) => ComfyError::NotAccepted { prompt_id, source },
                    Err(_) => ComfyError::OutcomeUnknown { prompt_id, source },
                });
            }
            tokio::time::sleep(self.inner.timeouts.poll).await;
        }
    }

    /// `base` + `segments` (escaped) + `query`.
    fn url(&self, segments: &[&str], query: &[(&str, &str)]) -> Url {
        let mut url = self.inner.base.clone();
        url.set_query(None);
        url.set_fragment(None);
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(segments);
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        url
    }

    async fn get(&self, segments: &[&str], query: &[(&str, &str)]) -> Result<Answer, ComfyError> {
        let call = Call::new(Method::GET, self.url(segments, query), self.inner.timeouts.request);
        self.exchange(call, |request| request).await
    }

    async fn post(&self, segments: &[&str], body: &Value) -> Result<Answer, ComfyError> {
        let call = Call::new(Method::POST, self.url(segments, &[]), self.inner.timeouts.request);
        self.exchange(call, |request| request.json(body)).await
    }

    /// One call within its time-out, the body read as a whole.
    async fn exchange(
        &self,
        call: Call,
        build: impl FnOnce(reqwest::RequestBuilder) -> reqwest::RequestBuilder,
    ) -> Result<Answer, ComfyError> {
        let timeout = call.timeout;
        let name = call.name();
        let mut response = self.send(call, |request| build(request.timeout(timeout))).await?;
        let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or("").to_owned();
        let mut answer = Answer {
            call: name,
            status: response.status().as_u16(),
            server: header(reqwest::header::SERVER),
            content_type: header(reqwest::header::CONTENT_TYPE),
            body: Vec::new(),
        };
        loop {
            let chunk = response.chunk().await;
            match chunk.map_err(|e| ComfyError::from_reqwest(e, &answer.call, self.address(), timeout))? {
                None => return Ok(answer),
                Some(chunk) if (answer.body.len() + chunk.len()) as u64 > MAX_JSON => {
                    return Err(ComfyError::TooLarge { call: answer.call, limit: MAX_JSON });
                }
                Some(chunk) => answer.body.extend_from_slice(&chunk),
            }
        }
    }

    /// One call up to the head of its answer, logged. A redirect is an error.
    async fn send(
        &self,
        call: Call,
        build: impl FnOnce(reqwest::RequestBuilder) -> reqwest::RequestBuilder,
    ) -> Result<Response, ComfyError> {
        let name = call.name();
        let http = self.inner.http.get_or_try_init(|| async { self.build_http() }).await?;
        let started = Instant::now();
        let sent = build(http.request(call.method, call.url)).send().await;
        let elapsed_ms = started.elapsed().as_millis() as u64;
        let response = match sent {
            Ok(response) => response,
            Err(error) => {
                let error = ComfyError::from_reqwest(error, &name, self.address(), call.timeout);
                tracing::debug!(address = self.address(), call = name, elapsed_ms, %error, "call failed");
                return Err(error);
            }
        };
        let status = response.status();
        tracing::debug!(address = self.address(), call = name, status = status.as_u16(), elapsed_ms, "called");
        if status.is_redirection() && status.as_u16() != 304 {
            let to = response.headers().get(reqwest::header::LOCATION).and_then(|to| to.to_str().ok());
            return Err(ComfyError::Redirected { call: name, to: excerpt(to.unwrap_or("nowhere").as_bytes(), 200) });
        }
        Ok(response)
    }

    /// Plain http gets a client without any certificates, which builds everywhere and at once; https reads the
    /// system's roots, here, on the first call. HTTP/1 only: the socket of a run is an upgrade of a connection.
    fn build_http(&self) -> Result<reqwest::Client, ComfyError> {
        let mut builder = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .http1_only()
            .connect_timeout(self.inner.timeouts.connect)
            // Shorter than the keep-alive of any server, so that a POST doesn't meet a connection being closed.
            .pool_idle_timeout(Duration::from_secs(15));
        let host = self.inner.base.host_str().unwrap_or_default();
        let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
        if host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback()) {
            builder = builder.no_proxy();
        }
        if self.inner.base.scheme() == "http" {
            builder = builder.tls_certs_only([]);
        }
        builder.build().map_err(|error| {
            ComfyError::Setup(format!(
                "no https client can be built (are the system's CA certificates, package `ca-certificates`, installed?): {error}"
            ))
        })
    }
}

/// A call whose request was sent and whose answer says nothing about what became of it.
fn answer_was_lost(error: &ComfyError) -> bool {
    match error {
        ComfyError::HttpStatus { status, .. } => *status >= 502,
        ComfyError::Cut { .. }
        | ComfyError::TimedOut { .. }
        | ComfyError::Unreadable { .. }
        | ComfyError::TooLarge { .. } => true,
        _ => false,
    }
}

struct Call {
    method: Method,
    url: Url,
    timeout: Duration,
}

impl Call {
    fn new(method: Method, url: Url, timeout: Duration) -> Self {
        Self { method, url, timeout }
    }

    /// Like `GET /queue`.
    fn name(&self) -> String {
        let query = self.url.query().map_or(String::new(), |query| format!("?{query}"));
        format!("{} {}{query}", self.method, self.url.path())
    }
}

impl Answer {
    fn successful(self) -> Result<Self, ComfyError> {
        if (200..300).contains(&self.status) {
            return Ok(self);
        }
        Err(ComfyError::HttpStatus { status: self.status, text: excerpt(&self.body, MAX_TEXT), call: self.call })
    }

    fn json(&self) -> Result<Value, ComfyError> {
        parse_python_json(&self.body).map_err(|error| {
            let starts = excerpt(&self.body, 80);
            self.unreadable(Bad::new(".", format!("not JSON ({error}); it starts with {starts:?}")))
        })
    }

    fn object(&self) -> Result<Map<String, Value>, ComfyError> {
        match self.json()? {
            Value::Object(object) => Ok(object),
            _ => Err(self.unreadable(Bad::new(".", "not an object"))),
        }
    }

    fn unreadable(&self, bad: Bad) -> ComfyError {
        ComfyError::Unreadable { call: self.call.clone(), path: bad.path, reason: bad.reason }
    }

    /// What it is that answered, for people who look for the wrong turn.
    fn describe(&self) -> String {
        let server = if self.server.is_empty() { String::new() } else { format!(" from {:?}", self.server) };
        let starts = excerpt(&self.body, 80);
        format!("HTTP {}{server}, {:?}, starting with {starts:?}", self.status, self.content_type)
    }
}

/// The beginning of a text from outside, on one line and without control characters.
fn excerpt(bytes: &[u8], max: usize) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(max * 4)]);
    let line: Vec<&str> = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|w| !w.is_empty()).collect();
    line.join(" ").chars().take(max).collect()
}
