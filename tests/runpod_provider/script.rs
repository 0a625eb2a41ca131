//! An HTTP/1.1 server that says exactly what a test tells it to, byte by byte, and records what it is asked. It
//! shares no code with the client and knows nothing of HTTP beyond finding the end of a request.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use autopod_mcp::runpod::{RunPod, RunPodOptions, RunPodTimeouts, SharedBudget};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::http::install_crypto;

/// What a connection does once it has read a request.
pub enum Step {
    /// These bytes, then the end of the connection.
    Say(Vec<u8>),
    /// These bytes; the connection stays open.
    SayAndHold(Vec<u8>),
    /// These bytes; the connection stays, and is reset after a second request was read.
    SayThenReset(Vec<u8>),
    /// Nothing, for as long as the client waits.
    Hang,
    /// The connection is reset after the request was read.
    Reset,
}

#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: String,
}

pub struct Script {
    pub url: String,
    requests: Arc<Mutex<Vec<Request>>>,
    server: tokio::task::JoinHandle<()>,
}

pub const KEY: &str = "rpa_TESTKEY0123456789";

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(header, _)| header == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect("a JSON body")
    }

    pub fn line(&self) -> String {
        format!("{} {}", self.method, self.target)
    }
}

impl Script {
    /// Serves the steps in order; a request beyond them is answered with a 418.
    pub async fn start(steps: impl IntoIterator<Item = Step>) -> Self {
        let steps = Mutex::new(steps.into_iter().collect::<VecDeque<Step>>());
        Self::answering(move |_| {
            let step = steps.lock().expect("no test panicked here").pop_front();
            step.unwrap_or_else(|| json(418, "{\"detail\":\"the script is over\"}"))
        })
        .await
    }

    /// Asks `script` what to do with each request.
    pub async fn answering(script: impl Fn(&Request) -> Step + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let recorded = requests.clone();
        let script = Arc::new(script);
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (script, recorded) = (script.clone(), recorded.clone());
                tokio::spawn(async move { serve(stream, &*script, &recorded).await });
            }
        });
        Self { url, requests, server }
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("no test panicked here").clone()
    }

    pub fn client(&self) -> RunPod {
        client(&self.url, quick())
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Ample limits and short delays: only tests of time-outs shorten the limits.
pub fn quick() -> RunPodTimeouts {
    RunPodTimeouts { first_retry: Duration::from_millis(1), ..RunPodTimeouts::default() }
}

pub fn impatient() -> RunPodTimeouts {
    let limit = Duration::from_millis(400);
    RunPodTimeouts { request: limit, create: limit, ..quick() }
}

pub fn client(url: &str, timeouts: RunPodTimeouts) -> RunPod {
    client_with_key(url, timeouts, KEY)
}

pub fn client_with_key(url: &str, timeouts: RunPodTimeouts, key: &str) -> RunPod {
    with_options(url, timeouts, key, None)
}

pub fn with_budget(url: &str, timeouts: RunPodTimeouts, budget: SharedBudget) -> RunPod {
    with_options(url, timeouts, KEY, Some(budget))
}

fn with_options(url: &str, timeouts: RunPodTimeouts, key: &str, budget: Option<SharedBudget>) -> RunPod {
    install_crypto();
    RunPod::new(RunPodOptions {
        origin: url.parse().expect("a loopback origin"),
        key: key.to_owned().into(),
        user_agent: "autopod-test/1.2.3".to_owned(),
        timeouts,
        budget,
    })
}

pub fn json(status: u16, body: &str) -> Step {
    answer(status, "Content-Type: application/json\r\n", body)
}

pub fn problem(status: u16, headers: &str, body: &str) -> Step {
    answer(status, &format!("Content-Type: application/problem+json\r\n{headers}"), body)
}

/// `headers` are whole lines.
pub fn answer(status: u16, headers: &str, body: &str) -> Step {
    let length = body.len();
    let head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n");
    Step::Say(format!("{head}{body}").into_bytes())
}

async fn serve(mut stream: TcpStream, script: &(impl Fn(&Request) -> Step + Sync), recorded: &Mutex<Vec<Request>>) {
    let Some(request) = read_request(&mut stream).await else { return };
    let step = script(&request);
    recorded.lock().expect("no test panicked here").push(request);
    match step {
        Step::Say(bytes) => {
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
        }
        Step::SayThenReset(bytes) => {
            let _ = stream.write_all(&bytes).await;
            let Some(request) = read_request(&mut stream).await else { return };
            recorded.lock().expect("no test panicked here").push(request);
            stream.set_zero_linger().expect("an open socket");
        }
        Step::SayAndHold(bytes) => {
            let _ = stream.write_all(&bytes).await;
            let _ = stream.read(&mut [0; 1]).await;
        }
        Step::Hang => {
            let _ = stream.read(&mut [0; 1]).await;
        }
        Step::Reset => stream.set_zero_linger().expect("an open socket"),
    }
}

async fn read_request(stream: &mut TcpStream) -> Option<Request> {
    let mut bytes = Vec::new();
    let head_end = loop {
        if let Some(position) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break position;
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(bytes[..head_end].to_vec()).ok()?;
    let mut lines = head.split("\r\n");
    let mut first = lines.next()?.split(' ');
    let (method, target) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers: Vec<_> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let length = headers
        .iter()
        .find(|(name, _)| name == "content-length")
        .map_or(0, |(_, length)| length.parse::<usize>().expect("a length"));
    let mut body = bytes.split_off(head_end + 4);
    while body.len() < length {
        if stream.read_buf(&mut body).await.ok()? == 0 {
            return None;
        }
    }
    Some(Request { method, target, headers, body: String::from_utf8(body).ok()? })
}
