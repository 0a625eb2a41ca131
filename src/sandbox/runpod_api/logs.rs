//! getPodLogs: a pod's lines as server-sent events. What there is comes at once, then each line as it is written,
//! until the pod is gone.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use jiff::Timestamp;
use serde_json::json;

use super::pods::unknown_pod;
use super::validation::Parameters;
use super::{Answer, Call, Problem};
use crate::sandbox::pod::LogLine;
use crate::sandbox::world::World;

/// How often the stream looks for new lines, and a comment is sent so that a dead connection shows.
const LOOK_EVERY: Duration = Duration::from_millis(250);
const KEEP_ALIVE_LOOKS: u32 = 40;

const DEFAULT_TAIL: u32 = 100;
const MOST_TAIL: u32 = 5_000;

pub struct LogStream {
    world: Arc<World>,
    pod: String,
    source: Option<&'static str>,
    /// The index of the next line to send.
    next: usize,
    quiet_looks: u32,
}

pub async fn stream(world: &Arc<World>, call: &Call, id: &str) -> Result<Answer, Problem> {
    let mut parameters = Parameters::new(call, &["source", "tail", "since"]);
    let source = parameters.choice("source", &["container", "system"]);
    let tail = parameters.integer("tail", 0, MOST_TAIL).unwrap_or(DEFAULT_TAIL);
    let since = parameters.time("since");
    let resume = call.headers.get("last-event-id").and_then(|value| value.to_str().ok());
    let resume: Option<Timestamp> = match resume.map(str::parse) {
        Some(Err(_)) => {
            parameters.violations.add("header.Last-Event-ID", "want an RFC 3339 time");
            None
        }
        Some(Ok(time)) => Some(time),
        None => None,
    };
    parameters.violations.check()?;
    let state = world.state().await;
    let pod = state.pod(id).ok_or_else(unknown_pod)?;
    let next = match resume.or(since) {
        Some(time) => pod.logs.iter().position(|line| line.at > time).unwrap_or(pod.logs.len()),
        None => {
            let fitting = (0..pod.logs.len()).rev().filter(|index| fits(source, &pod.logs[*index]));
            fitting.take(tail as usize).last().unwrap_or(pod.logs.len())
        }
    };
    let world = Arc::clone(world);
    let stream = LogStream { world, pod: id.to_owned(), source, next, quiet_looks: 0 };
    Ok(Answer::events(stream)
        .with_header("cache-control", "no-cache".to_owned())
        .with_header("x-accel-buffering", "no".to_owned()))
}

impl LogStream {
    pub fn into_body(self) -> Body {
        Body::from_stream(futures_util::stream::unfold(self, |mut stream| async move {
            let chunk = stream.chunk().await?;
            Some((Ok::<_, Infallible>(chunk), stream))
        }))
    }

    /// The next lines; `None` when the pod or the world has ended.
    async fn chunk(&mut self) -> Option<Bytes> {
        loop {
            let lines = {
                let state = self.world.state().await;
                let pod = state.pod(&self.pod)?;
                let from = self.next.min(pod.logs.len());
                self.next = pod.logs.len();
                pod.logs[from..].iter().filter(|line| fits(self.source, line)).map(event).collect::<String>()
            };
            if !lines.is_empty() {
                self.quiet_looks = 0;
                return Some(Bytes::from(lines));
            }
            tokio::select! {
                () = self.world.stopping.cancelled() => return None,
                () = tokio::time::sleep(LOOK_EVERY) => self.quiet_looks += 1,
            }
            if self.quiet_looks == KEEP_ALIVE_LOOKS {
                self.quiet_looks = 0;
                return Some(Bytes::from_static(b": still here\n\n"));
            }
        }
    }
}

fn fits(source: Option<&str>, line: &LogLine) -> bool {
    source.is_none_or(|source| source == line.source)
}

fn event(line: &LogLine) -> String {
    let data = json!({ "source": line.source, "line": line.line, "ts": line.at });
    format!("id: {}\ndata: {data}\n\n", line.at)
}
