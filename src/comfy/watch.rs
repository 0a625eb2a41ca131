//! Following one prompt to its end. The socket tells the steps, looks at history and queue beside it tell the truth:
//! losing the socket loses nothing but detail, and only history says how a run ended.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::Instant;

use super::error::text;
use super::socket::{Event, Events};
use super::types::is_blocked;
use super::{ComfyClient, ComfyError, Failure, HistoryEntry, Verdict};

/// After the socket told the end, history follows within moments.
const SOON: Duration = Duration::from_millis(50);
/// So many hurried looks before the usual pace is taken up again.
const HURRIED_LOOKS: u32 = 40;
/// So many looks in a row must find the prompt nowhere before it counts as lost.
const LOOKS_TO_BE_LOST: u32 = 2;

/// What a run is doing now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Progress {
    /// `position` 1 runs next.
    Pending { position: usize },
    /// `node` is missing where only the queue told that it runs.
    Running { node: Option<String>, class_type: Option<String>, nodes_done: usize, nodes_total: usize },
    /// Within one node, such as a sampler's steps.
    Step { node: String, class_type: Option<String>, value: f64, max: f64, nodes_done: usize, nodes_total: usize },
    /// The server can't be asked at the moment; the run itself may go on.
    OutOfContact { error: String },
}

/// How following ended.
#[derive(Debug, Clone)]
pub enum Outcome {
    Done(HistoryEntry),
    Failed(Failure, HistoryEntry),
    Interrupted(HistoryEntry),
    /// Neither queued nor in history: cancelled, its history wiped, or the server restarted. Never a success.
    Lost,
    /// The time given is up.
    StillRunning(Progress),
}

/// A socket that is open, or tried to be, before the prompt is submitted.
#[derive(Debug)]
pub struct Watch {
    client: ComfyClient,
    client_id: String,
    events: Events,
    classes: BTreeMap<String, String>,
}

impl Watch {
    /// `client_id` belongs to this one prompt. `classes` (see `Workflow::classes`) lends its nodes their names; it
    /// may be empty.
    pub async fn open(client: &ComfyClient, client_id: &str, classes: BTreeMap<String, String>) -> Self {
        let events = Events::open(client, client_id).await;
        Self { client: client.clone(), client_id: client_id.to_owned(), events, classes }
    }

    pub fn client_id(&self) -> &str {
        &self.client_id
    }

    /// Until the prompt has ended or `until` has come. Dropping the future only stops following.
    ///
    /// Errors only when the server couldn't be asked for as long as `ComfyTimeouts::give_up`.
    pub async fn follow(
        mut self,
        prompt_id: &str,
        until: Option<Instant>,
        mut on_progress: impl FnMut(&Progress),
    ) -> Result<Outcome, ComfyError> {
        let (poll, give_up) = (self.client.timeouts().poll, self.client.timeouts().give_up);
        let mut tracker = Tracker::new(prompt_id, self.classes);
        let (mut nowhere, mut hurried, mut silent_since) = (0, 0, None);
        let look_after = |pause| look_after(&self.client, prompt_id, pause);
        let mut look = std::pin::pin!(look_after(Duration::ZERO));
        loop {
            tokio::select! {
                event = self.events.next() => {
                    let before = tracker.progress.clone();
                    if tracker.hear(&event) {
                        hurried = HURRIED_LOOKS;
                        look.set(look_after(SOON));
                    } else if tracker.progress != before {
                        on_progress(&tracker.progress);
                    }
                    continue;
                }
                () = at(until) => return Ok(Outcome::StillRunning(tracker.progress)),
                seen = &mut look => {
                    let before = tracker.progress.clone();
                    match seen {
                        Ok(Seen::Ended(entry)) => return Ok(Outcome::from_entry(*entry)),
                        Ok(Seen::Nowhere) if nowhere + 1 >= LOOKS_TO_BE_LOST => return Ok(Outcome::Lost),
                        Ok(seen) => {
                            silent_since = None;
                            nowhere = if matches!(seen, Seen::Nowhere) { nowhere + 1 } else { 0 };
                            tracker.see(&seen);
                        }
                        Err(error) => {
                            if silent_since.get_or_insert_with(Instant::now).elapsed() >= give_up {
                                return Err(error);
                            }
                            tracker.progress = Progress::OutOfContact { error: error.to_string() };
                        }
                    }
                    if tracker.progress != before {
                        on_progress(&tracker.progress);
                    }
                }
            }
            let pause = if hurried > 0 { SOON.min(poll) } else { poll };
            hurried = hurried.saturating_sub(1);
            look.set(look_after(pause));
        }
    }
}

/// [`Watch::open`] and [`Watch::follow`] in one, for a prompt that is queued already.
pub async fn watch(
    client: &ComfyClient,
    prompt_id: &str,
    client_id: &str,
    until: Option<Instant>,
    on_progress: impl FnMut(&Progress),
) -> Result<Outcome, ComfyError> {
    Watch::open(client, client_id, BTreeMap::new()).await.follow(prompt_id, until, on_progress).await
}

async fn at(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

impl Outcome {
    fn from_entry(entry: HistoryEntry) -> Self {
        match entry.verdict() {
            Verdict::Done => Self::Done(entry),
            Verdict::Failed(failure) => Self::Failed(failure, entry),
            Verdict::Interrupted => Self::Interrupted(entry),
        }
    }
}

enum Seen {
    Pending(usize),
    Running,
    Ended(Box<HistoryEntry>),
    Nowhere,
}

async fn look_after(client: &ComfyClient, prompt_id: &str, pause: Duration) -> Result<Seen, ComfyError> {
    tokio::time::sleep(pause).await;
    if let Some(entry) = client.history(prompt_id).await? {
        return Ok(Seen::Ended(Box::new(entry)));
    }
    let queue = client.queue().await?;
    if queue.running.iter().any(|item| item.prompt_id == prompt_id) {
        return Ok(Seen::Running);
    }
    if let Some(item) = queue.pending.iter().find(|item| item.prompt_id == prompt_id) {
        return Ok(Seen::Pending(item.position));
    }
    // It may have ended between the two looks.
    Ok(client.history(prompt_id).await?.map_or(Seen::Nowhere, |entry| Seen::Ended(Box::new(entry))))
}

/// Turns what is heard and seen into what the run is doing.
struct Tracker<'a> {
    prompt_id: &'a str,
    classes: BTreeMap<String, String>,
    current: Option<String>,
    finished: BTreeSet<String>,
    progress: Progress,
}

impl<'a> Tracker<'a> {
    fn new(prompt_id: &'a str, classes: BTreeMap<String, String>) -> Self {
        let progress = Progress::Pending { position: 0 };
        Self { prompt_id, classes, current: None, finished: BTreeSet::new(), progress }
    }

    /// What the queue shows. It knows less than the socket, so it doesn't overwrite what that said of a run.
    fn see(&mut self, seen: &Seen) {
        match seen {
            Seen::Pending(position) => self.progress = Progress::Pending { position: *position },
            Seen::Running if matches!(self.progress, Progress::Pending { .. } | Progress::OutOfContact { .. }) => {
                self.progress = self.running();
            }
            _ => {}
        }
    }

    /// Whether the run has ended by what was heard. Events of other prompts are left aside: a server broadcasts
    /// those that were queued without a client id. Only the word on where a run is, which a socket gets when it is
    /// opened again, comes without an id.
    fn hear(&mut self, event: &Event) -> bool {
        let data = &event.data;
        let is_greeting = || event.kind == "executing" && data["node"].is_string();
        match data.get("prompt_id").and_then(Value::as_str) {
            Some(id) if id == self.prompt_id => {}
            None if is_greeting() => {}
            _ => return false,
        }
        match event.kind.as_str() {
            "execution_success" | "execution_interrupted" => return true,
            "execution_error" => return !is_blocked(data),
            "execution_start" => self.progress = self.running(),
            "execution_cached" => {
                let nodes = data["nodes"].as_array().into_iter().flatten().filter_map(Value::as_str);
                self.finished.extend(nodes.map(str::to_owned));
                self.progress = self.running();
            }
            "executing" => {
                self.finished.extend(self.current.take());
                self.current = data["node"].as_str().map(str::to_owned);
                if self.current.is_none() {
                    return true;
                }
                self.progress = self.running();
            }
            "executed" => {
                let node = text(data, "node");
                if self.current.as_ref() == Some(&node) {
                    self.current = None;
                }
                self.finished.insert(node);
                self.progress = self.running();
            }
            "progress" => {
                let node = data["node"].as_str().map(str::to_owned).or_else(|| self.current.clone());
                self.step(node.unwrap_or_default(), data);
            }
            "progress_state" => self.hear_states(data),
            _ => {}
        }
        false
    }

    fn hear_states(&mut self, data: &Value) {
        let nodes = data["nodes"].as_object().into_iter().flatten();
        let mut running = None;
        for (node, state) in nodes {
            match state["state"].as_str() {
                Some("finished") => _ = self.finished.insert(node.clone()),
                Some("running") => running = Some((node, state)),
                _ => {}
            }
        }
        if let Some((node, state)) = running {
            self.current = Some(node.clone());
            self.step(node.clone(), state);
        }
    }

    /// Every plain node counts from 0 to 1; only more than that are steps.
    fn step(&mut self, node: String, data: &Value) {
        let number = |field: &str| data[field].as_f64().filter(|number| number.is_finite()).unwrap_or(0.0);
        let (value, max) = (number("value"), number("max"));
        if max <= 1.0 {
            self.progress = self.running();
            return;
        }
        let class_type = self.classes.get(&node).cloned();
        let (nodes_done, nodes_total) = self.counted();
        self.progress = Progress::Step { node, class_type, value, max, nodes_done, nodes_total };
    }

    fn running(&self) -> Progress {
        let class_type = self.current.as_ref().and_then(|node| self.classes.get(node)).cloned();
        let (nodes_done, nodes_total) = self.counted();
        Progress::Running { node: self.current.clone(), class_type, nodes_done, nodes_total }
    }

    /// Nodes that a node expands into while it runs aren't counted, so that the part never passes the whole.
    fn counted(&self) -> (usize, usize) {
        if self.classes.is_empty() {
            return (self.finished.len(), 0);
        }
        (self.finished.iter().filter(|node| self.classes.contains_key(*node)).count(), self.classes.len())
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = |node: &str, class: &Option<String>| match class {
            Some(class) => format!("{class} (node {node})"),
            None => format!("node {node}"),
        };
        match self {
            Self::Pending { position: 0 } => write!(out, "submitted"),
            Self::Pending { position } => write!(out, "pending, number {position} in the queue"),
            Self::Running { node: None, .. } => write!(out, "running"),
            Self::Running { node: Some(node), class_type, .. } => write!(out, "running {}", named(node, class_type)),
            Self::Step { node, class_type, value, max, .. } => {
                write!(out, "running {}: step {value} of {max}", named(node, class_type))
            }
            Self::OutOfContact { error } => write!(out, "out of contact ({error})"),
        }
    }
}
