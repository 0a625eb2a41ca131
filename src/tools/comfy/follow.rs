//! A run that goes on in a task of its own while its caller waits, and what is told of it.

use std::path::PathBuf;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::Serialize;
use tokio::sync::watch;

use super::errors::{ending, stuck, word};
use super::{NotYet, Target};
use crate::comfy::jobs::{DriveOptions, Job, JobRecord, JobState, Start, drive};
use crate::comfy::watch::Progress as RunProgress;
use crate::comfy::{ComfyClient, NodeError};
use crate::tools::context::Progress;
use crate::tools::waiting::Waiting;
use crate::tools::{Context, ErrorKind, StillBilling, ToolError};

/// How far a run is. One that ended badly is an error instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum RunState {
    /// ComfyUI can't be reached yet; nothing was submitted.
    Waiting,
    Uploading,
    Submitting,
    Pending,
    Running,
    Downloading,
    Done,
    /// Its process ended before ComfyUI had it.
    NotSubmitted,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct RunOutput {
    /// For comfy_job; left out while nothing was submitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_id: Option<String>,
    state: RunState,
    done: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    progress: Option<Now>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    files: Vec<File>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    texts: Vec<Text>,
    /// Outputs that were not saved.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    skipped: Vec<Skipped>,
    /// Outputs that ComfyUI dropped while it ran the others.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    node_errors: Vec<NodeError>,
    #[serde(skip_serializing_if = "Option::is_none")]
    elapsed_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting_for: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    still_billing: Option<StillBilling>,
    next: String,
}

#[derive(Debug, Serialize, JsonSchema)]
struct Now {
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    step: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    steps: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nodes_done: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nodes_total: Option<usize>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct File {
    /// Absolute, on this machine.
    path: PathBuf,
    bytes: u64,
    node: String,
}

#[derive(Debug, Serialize, JsonSchema)]
struct Text {
    node: String,
    text: String,
}

#[derive(Debug, Serialize, JsonSchema)]
struct Skipped {
    node: String,
    filename: String,
    reason: String,
}

/// Lets the job go on until it has ended, and watches it until the time is up. Its task outlives the call where the
/// process does; where it does not, the call stays until ComfyUI has the run or refused it.
pub(super) async fn work(
    waiting: &Waiting<'_>,
    context: &Context,
    progress: Progress,
    client: ComfyClient,
    mut job: Job,
    start: Option<Start>,
) -> Result<JobRecord, ToolError> {
    let (sender, mut changes) = watch::channel(job.record().clone());
    let mut teller = Teller::new(progress);
    let task = async move {
        let driven = drive(&client, &mut job, start, DriveOptions::default(), |record| {
            teller.tell(record);
            sender.send_replace(record.clone());
        });
        let driven = driven.await;
        (job.record().clone(), driven)
    };
    let mut task = match &context.after_answer {
        Some(tracker) => tracker.spawn(task),
        None => tokio::spawn(task),
    };
    let goes_on_without_us = |record: &JobRecord| {
        use JobState::*;
        context.after_answer.is_some() || !matches!(record.state, Prepared | Uploading | Submitting)
    };
    let time_is_up = async {
        tokio::select! {
            () = tokio::time::sleep(waiting.left()) => {}
            () = context.cancel.cancelled() => {}
        }
        let record = changes.wait_for(goes_on_without_us).await.map(|record| record.clone());
        match record {
            Ok(record) => record,
            // The task has ended, so it is the one to answer.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        ended = &mut task => {
            let (record, driven) = ended.map_err(|error| {
                ToolError::new(ErrorKind::Internal, format!("a defect in this program stopped the run: {error}"))
            })?;
            driven.map_err(|error| stuck(error, &record))?;
            Ok(record)
        }
        record = time_is_up => Ok(record),
    }
}

/// Tells progress: each step as the server counts it, and otherwise only words. The value never falls, so a second
/// sampler counts on from where the first one ended.
pub(super) struct Teller {
    progress: Progress,
    value: f64,
    total: Option<f64>,
    /// The node whose steps are counted, and the value when it began.
    series: Option<(String, f64)>,
    told: String,
}

impl Teller {
    pub(super) fn new(progress: Progress) -> Self {
        Self { progress, value: 0.0, total: None, series: None, told: String::new() }
    }

    pub(super) fn tell(&mut self, record: &JobRecord) {
        if let (JobState::Running, Some(RunProgress::Step { node, value, max, .. })) = (record.state, &record.progress)
        {
            let base = match &self.series {
                Some((counted, base)) if counted == node => *base,
                _ => self.value,
            };
            self.series = Some((node.clone(), base));
            self.value = self.value.max(base + value);
            self.total = Some((base + max).max(self.value));
        }
        let message = message(record);
        if message != self.told {
            self.progress.tell(message.clone(), self.value, self.total);
            self.told = message;
        }
    }
}

fn message(record: &JobRecord) -> String {
    match (record.state, &record.progress) {
        (JobState::Pending | JobState::Running, Some(progress)) => progress.to_string(),
        (JobState::Uploading, _) => {
            let there = record.inputs.iter().filter(|input| input.uploaded.is_some()).count();
            format!("uploading, {there} of {} files are there", record.inputs.len())
        }
        (JobState::Downloading, _) => {
            format!("downloading, {} of {} files are here", record.saved.len(), record.files.len())
        }
        (JobState::Prepared, _) => "preparing".to_owned(),
        (state, _) => word(state).to_owned(),
    }
}

impl RunOutput {
    /// A run that wasn't begun, because ComfyUI can't be reached yet.
    pub(super) fn not_begun(target: &Target, not_yet: NotYet) -> Self {
        Self {
            waiting_for: Some(not_yet.waiting_for),
            pod: target.pod().map(str::to_owned),
            still_billing: target.billing(),
            next: "comfy_run again with the same arguments; nothing was submitted".to_owned(),
            ..Self::empty(RunState::Waiting)
        }
    }

    /// What a record tells; an error when the run ended badly.
    pub(super) fn of(record: &JobRecord) -> Result<Self, ToolError> {
        let target = Target::of_base(&record.base);
        if let Some(error) = ending(record) {
            return Err(target.told(error));
        }
        let state = match record.state {
            JobState::Prepared | JobState::Uploading => RunState::Uploading,
            JobState::Submitting => RunState::Submitting,
            JobState::Pending => RunState::Pending,
            JobState::Running => RunState::Running,
            JobState::Downloading => RunState::Downloading,
            JobState::Done => RunState::Done,
            _ => return Ok(Self::not_submitted(record)),
        };
        let done = state == RunState::Done;
        let id = record.prompt_id;
        Ok(Self {
            prompt_id: Some(id.to_string()),
            pod: target.pod().map(str::to_owned),
            progress: (!done).then(|| Now::of(record)),
            files: record
                .saved
                .iter()
                .map(|saved| File { path: saved.path.clone(), bytes: saved.bytes, node: saved.source.node.clone() })
                .collect(),
            texts: record.texts.iter().map(|text| Text { node: text.node.clone(), text: text.text.clone() }).collect(),
            skipped: record
                .skipped
                .iter()
                .map(|skipped| Skipped {
                    node: skipped.source.node.clone(),
                    filename: skipped.source.filename.clone(),
                    reason: skipped.reason.clone(),
                })
                .collect(),
            node_errors: record.node_errors.clone(),
            waiting_for: match state {
                RunState::Uploading | RunState::Submitting => Some("ComfyUI to take the run".to_owned()),
                RunState::Pending | RunState::Running => Some("the run to end".to_owned()),
                RunState::Downloading => Some("the outputs to be saved".to_owned()),
                RunState::Waiting | RunState::Done | RunState::NotSubmitted => None,
            },
            still_billing: target.billing(),
            next: match target.pod() {
                _ if !done => format!("comfy_job {{\"prompt_id\": \"{id}\"}}"),
                Some(pod) => format!("comfy_run, or terminate_pod {{\"pod\": \"{pod}\"}} to stop the cost"),
                None => "comfy_run".to_owned(),
            },
            ..Self::empty(state)
        })
    }

    /// A run whose process ended before ComfyUI had it.
    pub(super) fn not_submitted(record: &JobRecord) -> Self {
        let target = Target::of_base(&record.base);
        Self {
            prompt_id: Some(record.prompt_id.to_string()),
            pod: target.pod().map(str::to_owned),
            still_billing: target.billing(),
            next: "run again: comfy_run with the same arguments; ComfyUI never got this run".to_owned(),
            ..Self::empty(RunState::NotSubmitted)
        }
    }

    /// A run whose pod has ended since.
    pub(super) fn of_gone_pod(self) -> Self {
        let next = "create_pod_with_volume before the next comfy_run; the pod of this run is gone".to_owned();
        Self { still_billing: Some(StillBilling::No), next, ..self }
    }

    /// With the time since the run began, for a call that was there.
    pub(super) fn timed(mut self, record: &JobRecord) -> Self {
        let seconds = Timestamp::now().duration_since(record.created_at).as_secs_f64();
        self.elapsed_seconds = Some((seconds.max(0.0) * 10.0).round() / 10.0);
        self
    }

    /// What keeps a run from going on that ComfyUI has.
    pub(super) fn waiting_for(mut self, not_yet: NotYet) -> Self {
        self.waiting_for = Some(not_yet.waiting_for);
        self
    }

    fn empty(state: RunState) -> Self {
        Self {
            prompt_id: None,
            state,
            done: matches!(state, RunState::Done | RunState::NotSubmitted),
            pod: None,
            progress: None,
            files: Vec::new(),
            texts: Vec::new(),
            skipped: Vec::new(),
            node_errors: Vec::new(),
            elapsed_seconds: None,
            waiting_for: None,
            still_billing: None,
            next: String::new(),
        }
    }

    pub(super) fn text(&self) -> String {
        let mut lines = Vec::new();
        let id = self.prompt_id.as_deref().unwrap_or_default();
        let seconds = self.elapsed_seconds.map_or_else(String::new, |seconds| format!(" in {seconds} s"));
        let waiting_for = self.waiting_for.as_deref().unwrap_or_default();
        let now = self.progress.as_ref().map_or("", |now| now.message.as_str());
        lines.push(match self.state {
            RunState::Done => format!("The run {id} is done{seconds}; files saved: {}.", self.files.len()),
            RunState::NotSubmitted => format!("The run {id} was never submitted."),
            RunState::Waiting => format!("Nothing was submitted yet; waiting for {waiting_for}."),
            _ => format!("The run {id} goes on ({now}); waiting for {waiting_for}."),
        });
        lines.extend(
            self.files.iter().map(|file| format!("{} ({} bytes, node {})", file.path.display(), file.bytes, file.node)),
        );
        lines.extend(self.texts.iter().map(|text| format!("node {} says: {}", text.node, text.text)));
        lines.extend(
            self.skipped
                .iter()
                .map(|skipped| format!("not saved: {} of node {}: {}", skipped.filename, skipped.node, skipped.reason)),
        );
        lines.extend(self.node_errors.iter().map(|error| format!("dropped: {error}")));
        lines.push(format!("Next: {}", self.next));
        lines.join("\n")
    }
}

impl Now {
    fn of(record: &JobRecord) -> Self {
        let none = Self { message: message(record), step: None, steps: None, nodes_done: None, nodes_total: None };
        match (record.state, &record.progress) {
            (JobState::Running, Some(RunProgress::Running { nodes_done, nodes_total, .. })) => {
                Self { nodes_done: Some(*nodes_done), nodes_total: Some(*nodes_total), ..none }
            }
            (JobState::Running, Some(RunProgress::Step { value, max, nodes_done, nodes_total, .. })) => Self {
                step: Some(*value),
                steps: Some(*max),
                nodes_done: Some(*nodes_done),
                nodes_total: Some(*nodes_total),
                ..none
            },
            _ => none,
        }
    }
}
