//! comfy_queue: what runs, what waits, what has ended.

use std::collections::HashMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Target, reach, without_seconds};
use crate::comfy::jobs::JobStore;
use crate::comfy::outputs::Outputs;
use crate::comfy::{HistoryEntry, QueueItem, Verdict};
use crate::tools::waiting::Waiting;
use crate::tools::{Context, Effect, Tool, ToolError};

/// So many pending ones are listed; the rest is counted.
const MOST_LISTED: usize = 50;
const MOST_FILES: usize = 20;

pub struct ComfyQueue;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QueueInput {
    /// The pod's name or id; may be left out when there is only one.
    #[serde(default)]
    pod: Option<String>,
    /// Address of a ComfyUI instead of a pod.
    #[serde(default)]
    url: Option<String>,
    /// Also the last so many runs that ended, newest first; none when left out.
    #[schemars(range(min = 0, max = 50))]
    #[serde(default)]
    history: Option<usize>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct QueueOutput {
    running: Vec<Queued>,
    /// In the order they will run; the first 50.
    pending: Vec<Queued>,
    pending_total: usize,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    history: Vec<Ended>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct Queued {
    /// 0 while it runs, 1 for the next one.
    position: usize,
    prompt_id: String,
    nodes: usize,
    /// Our own run: the id that comfy_job takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    job: Option<String>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct Ended {
    prompt_id: String,
    status: EndedStatus,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// Names on the server.
    outputs: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    job: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum EndedStatus {
    Done,
    Failed,
    Interrupted,
}

impl Tool for ComfyQueue {
    const NAME: &'static str = "comfy_queue";
    const TITLE: &'static str = "ComfyUI's queue";
    const DESCRIPTION: &'static str =
        "Running and pending runs with their positions, our own marked, and on request the last that ended.";
    /// A tunnel may be opened on the way, but nothing in the pod or the account changes.
    const EFFECT: Effect = Effect::Reads;
    const EXAMPLE: &'static str = r#"{"pod": "comfy", "history": 5}"#;
    type Input = QueueInput;
    type Output = QueueOutput;

    async fn run(context: &Context, input: QueueInput) -> Result<QueueOutput, ToolError> {
        let services = &context.services;
        let quiet = without_seconds(context);
        let waiting = Waiting::new(&quiet, None);
        let target = Target::choose(services, input.pod.as_deref(), input.url.as_deref()).await?;
        let ready = reach(&waiting, &quiet, &target).await.map_err(|error| target.told(error))?;
        let ready = ready.map_err(|not_yet| {
            let error = ToolError::failed(format!("ComfyUI can't be asked yet: {}", not_yet.cause)).retryable(true);
            target.told(error.hint(format!("{} waits for it", target.call("comfy_status"))))
        })?;
        let queue = ready.client.queue().await.map_err(|error| target.told(error.into()))?;
        let history = match input.history.unwrap_or(0) {
            0 => Vec::new(),
            count => ready.client.history_last(count).await.map_err(|error| target.told(error.into()))?,
        };
        let jobs = JobStore::new(services.home.root()).list()?;
        let ours: HashMap<String, String> =
            jobs.into_iter().map(|job| (job.comfy_prompt_id, job.prompt_id.to_string())).collect();
        Ok(QueueOutput {
            running: queue.running.iter().map(|item| Queued::of(item, &ours)).collect(),
            pending: queue.pending.iter().take(MOST_LISTED).map(|item| Queued::of(item, &ours)).collect(),
            pending_total: queue.pending.len(),
            history: history.iter().rev().map(|entry| Ended::of(entry, &ours)).collect(),
        })
    }

    fn text(output: &QueueOutput) -> String {
        let own = |job: &Option<String>| if job.is_some() { " (ours)" } else { "" };
        let mut lines = vec![format!("{} running, {} pending.", output.running.len(), output.pending_total)];
        lines.extend(output.running.iter().map(|item| format!("running: {}{}", item.prompt_id, own(&item.job))));
        lines.extend(
            output.pending.iter().map(|item| format!("{}: {}{}", item.position, item.prompt_id, own(&item.job))),
        );
        lines.extend(output.history.iter().map(|entry| {
            let error = entry.error.as_ref().map_or_else(String::new, |error| format!(": {error}"));
            let outputs = entry.outputs.join(", ");
            format!("{:?}: {}{}{error} {outputs}", entry.status, entry.prompt_id, own(&entry.job))
        }));
        lines.join("\n")
    }
}

impl Queued {
    fn of(item: &QueueItem, ours: &HashMap<String, String>) -> Self {
        let job = ours.get(&item.prompt_id).cloned();
        Self { position: item.position, prompt_id: item.prompt_id.clone(), nodes: item.nodes, job }
    }
}

impl Ended {
    fn of(entry: &HistoryEntry, ours: &HashMap<String, String>) -> Self {
        let (status, error) = match entry.verdict() {
            Verdict::Done => (EndedStatus::Done, None),
            Verdict::Failed(failure) => (EndedStatus::Failed, Some(failure.to_string())),
            Verdict::Interrupted => (EndedStatus::Interrupted, None),
        };
        let files = Outputs::collect(&entry.outputs).files.into_iter().take(MOST_FILES);
        let name = |subfolder: String, name| if subfolder.is_empty() { name } else { format!("{subfolder}/{name}") };
        Self {
            prompt_id: entry.prompt_id.clone(),
            status,
            error,
            outputs: files.map(|file| name(file.subfolder, file.filename)).collect(),
            job: ours.get(&entry.prompt_id).cloned(),
        }
    }
}
