//! comfy_run: a workflow to ComfyUI and its outputs back onto this machine.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::io::AsyncReadExt;
use uuid::Uuid;

use super::follow::{RunOutput, work};
use super::{Target, reach, without_seconds};
use crate::comfy::jobs::{JobInput, JobRecord, JobStore, Start};
use crate::comfy::workflow::{Workflow, WorkflowError};
use crate::tools::waiting::Waiting;
use crate::tools::{Context, Effect, Tool, ToolError};

/// Workflows have kilobytes; a file larger than this is something else.
const MOST_WORKFLOW_BYTES: u64 = 64 << 20;

pub struct ComfyRun;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunInput {
    /// The workflow in ComfyUI's API format; or give workflow_path.
    #[serde(default)]
    workflow: Option<Map<String, Value>>,
    /// Absolute path of a JSON file with the workflow in API format.
    #[schemars(extend("x-path" = true))]
    #[serde(default)]
    workflow_path: Option<String>,
    /// Local files for the workflow's loading nodes; they are uploaded.
    #[schemars(length(max = 100))]
    #[serde(default)]
    inputs: Vec<InputFile>,
    /// The pod's name or id; may be left out when there is only one.
    #[serde(default)]
    pod: Option<String>,
    /// Address of a ComfyUI instead of a pod.
    #[serde(default)]
    url: Option<String>,
    /// Absolute path of the folder for outputs; `outputs/<prompt_id>` in ~/.autopod when left out.
    #[schemars(extend("x-path" = true))]
    #[serde(default)]
    output_dir: Option<String>,
    /// Seconds to wait for the outputs; 40 when left out. After that it goes on; comfy_job finds it.
    #[schemars(range(min = 0, max = 45))]
    #[serde(default)]
    wait_seconds: Option<u64>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = r#"an object like {"path": "/home/me/a.png"}"#)]
struct InputFile {
    /// Absolute path.
    #[schemars(extend("x-path" = true))]
    path: String,
    /// The node that loads it, `id` or `id.input`; may be left out when only one node loads a file.
    #[serde(default)]
    node: Option<String>,
}

impl Tool for ComfyRun {
    const NAME: &'static str = "comfy_run";
    const TITLE: &'static str = "Run a workflow";
    const DESCRIPTION: &'static str = "Runs a ComfyUI workflow in a pod (through its tunnel, opened when there is none) \
        and saves all outputs on this machine. Each call is a new run: when time is up, go on with comfy_job. The pod \
        costs money until terminate_pod, also when the run is done.";
    const EFFECT: Effect = Effect::Creates;
    const EXAMPLE: &'static str = r#"{"workflow_path": "/home/me/workflow_api.json", "pod": "comfy"}"#;
    /// Nobody else can upload and submit.
    const MAY_OUTLAST_LIMIT: bool = true;
    type Input = RunInput;
    type Output = RunOutput;

    async fn run(context: &Context, input: RunInput) -> Result<RunOutput, ToolError> {
        let services = &context.services;
        let quiet = without_seconds(context);
        let waiting = Waiting::new(&quiet, input.wait_seconds);
        let workflow = workflow(input.workflow, input.workflow_path.as_deref()).await?;
        let inputs = local_files(&workflow, input.inputs).await?;
        let output_dir = input.output_dir.as_deref().map(|path| absolute("output_dir", path)).transpose()?;
        if let Some(path) = output_dir.as_deref().filter(|path| path.exists() && !path.is_dir()) {
            return Err(ToolError::invalid("output_dir", format!("{} is not a folder", path.display())));
        }
        let target = Target::choose(services, input.pod.as_deref(), input.url.as_deref()).await?;
        let ready = match reach(&waiting, &quiet, &target).await.map_err(|error| target.told(error))? {
            Ok(ready) => ready,
            Err(not_yet) => return Ok(RunOutput::not_begun(&target, not_yet)),
        };
        let id = Uuid::new_v4();
        let output_dir = output_dir.unwrap_or_else(|| services.home.outputs().join(id.to_string()));
        let record = JobRecord::new(id, Timestamp::now(), target.base(), &output_dir);
        let job = JobStore::new(services.home.root()).create(record)?;
        let start = Some(Start { workflow, inputs });
        let record = work(&waiting, context, context.progress.clone(), ready.client, job, start).await;
        let record = record.map_err(|error| target.told(error))?;
        Ok(RunOutput::of(&record)?.timed(&record))
    }

    fn text(output: &RunOutput) -> String {
        output.text()
    }
}

async fn workflow(given: Option<Map<String, Value>>, path: Option<&str>) -> Result<Workflow, ToolError> {
    let (field, value) = match (given, path) {
        (Some(_), Some(_)) => {
            return Err(ToolError::invalid("workflow", "give the workflow or workflow_path, not both"));
        }
        (None, None) => {
            return Err(ToolError::invalid("workflow", "is missing: give the workflow, or its file as workflow_path"));
        }
        (Some(workflow), None) => ("workflow", Value::Object(workflow)),
        (None, Some(path)) => ("workflow_path", read_workflow(&absolute("workflow_path", path)?).await?),
    };
    Workflow::parse(&value).map_err(|error| {
        let is_editors = matches!(error, WorkflowError::EditorFormat { .. });
        let told = ToolError::invalid(field, error);
        if is_editors { told.hint("only the API format can be run for now") } else { told }
    })
}

async fn read_workflow(path: &Path) -> Result<Value, ToolError> {
    let invalid = |what: String| ToolError::invalid("workflow_path", format!("{}: {what}", path.display()));
    let about = tokio::fs::metadata(path).await.map_err(|error| invalid(error.to_string()))?;
    if !about.is_file() {
        return Err(invalid("not a file".to_owned()));
    }
    if about.len() > MOST_WORKFLOW_BYTES {
        return Err(invalid(format!("{} bytes are too many for a workflow", about.len())));
    }
    // Its length says nothing of a file that grows, or of one that the system makes up as it is read.
    let mut bytes = Vec::new();
    let file = tokio::fs::File::open(path).await.map_err(|error| invalid(error.to_string()))?;
    file.take(MOST_WORKFLOW_BYTES + 1).read_to_end(&mut bytes).await.map_err(|error| invalid(error.to_string()))?;
    if bytes.len() as u64 > MOST_WORKFLOW_BYTES {
        return Err(invalid(format!("over {MOST_WORKFLOW_BYTES} bytes are too many for a workflow")));
    }
    serde_json::from_slice(&bytes).map_err(|error| {
        let png = bytes.starts_with(b"\x89PNG");
        invalid(if png { "a picture, not a workflow in JSON".to_owned() } else { format!("not JSON: {error}") })
    })
}

/// Checked before anything is sent: every file is there, and every file has its place.
async fn local_files(workflow: &Workflow, inputs: Vec<InputFile>) -> Result<Vec<JobInput>, ToolError> {
    let mut files = Vec::new();
    for (index, input) in inputs.into_iter().enumerate() {
        let field = format!("inputs[{index}].path");
        let path = absolute(&field, &input.path)?;
        let invalid = |what: &dyn std::fmt::Display| ToolError::invalid(&field, format!("{}: {what}", path.display()));
        // Asked before it is opened: opening a pipe waits until somebody writes to it.
        let about = tokio::fs::metadata(&path).await.map_err(|error| invalid(&error))?;
        if !about.is_file() {
            return Err(invalid(&"not a file"));
        }
        tokio::fs::File::open(&path).await.map_err(|error| invalid(&error))?;
        files.push(JobInput { selector: input.node.unwrap_or_default(), path, uploaded: None });
    }
    workflow
        .resolve_all(files.iter().map(|file| file.selector.as_str()))
        .map_err(|error| ToolError::invalid("inputs", error))?;
    Ok(files)
}

fn absolute(field: &str, path: &str) -> Result<PathBuf, ToolError> {
    let found = PathBuf::from(path);
    if found.is_absolute() {
        return Ok(found);
    }
    Err(ToolError::invalid(field, format!("{path:?} is relative; expected an absolute path"))
        .hint("a server's folder is arbitrary, so give the whole path"))
}
