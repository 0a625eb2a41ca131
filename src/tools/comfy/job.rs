//! comfy_job: a run found again, and brought to its end when nobody else works on it.

use schemars::JsonSchema;
use serde::Deserialize;
use uuid::Uuid;

use super::errors::word;
use super::follow::{RunOutput, Teller, work};
use super::{Target, reach, without_seconds};
use crate::comfy::jobs::{JobError, JobState, JobStore};
use crate::tools::context::Services;
use crate::tools::waiting::Waiting;
use crate::tools::{Context, Effect, StillBilling, Tool, ToolError};

/// So many are listed for somebody who lost the id.
const MOST_LISTED: usize = 5;

pub struct ComfyJob;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JobInput {
    /// As comfy_run gave it.
    prompt_id: String,
    /// Seconds to wait for the outputs; 40 when left out.
    #[schemars(range(min = 0, max = 45))]
    #[serde(default)]
    wait_seconds: Option<u64>,
}

impl Tool for ComfyJob {
    const NAME: &'static str = "comfy_job";
    const TITLE: &'static str = "Find a run again";
    const DESCRIPTION: &'static str = "State, progress and outputs of a run of comfy_run; takes it up when its process has ended. Never runs it again.";
    const EFFECT: Effect = Effect::Creates;
    const EXAMPLE: &'static str = r#"{"prompt_id": "0b5e7bd4-9d0c-4c4e-8f6e-0d6a3c1f2a10"}"#;
    type Input = JobInput;
    type Output = RunOutput;

    async fn run(context: &Context, input: JobInput) -> Result<RunOutput, ToolError> {
        let store = JobStore::new(context.services.home.root());
        let id: Uuid = input.prompt_id.trim().parse().map_err(|_| {
            ToolError::invalid("prompt_id", format!("{:?} is not an id as comfy_run gives it", input.prompt_id))
        })?;
        let answer = find(context, &store, id, input.wait_seconds).await;
        // A run is remembered for longer than its pod lives.
        if !store.read(id).is_ok_and(|record| is_pod_gone(&context.services, &record.base)) {
            return answer;
        }
        answer.map(RunOutput::of_gone_pod).map_err(|error| error.billing(StillBilling::No))
    }

    fn text(output: &RunOutput) -> String {
        output.text()
    }
}

async fn find(
    context: &Context,
    store: &JobStore,
    id: Uuid,
    wait_seconds: Option<u64>,
) -> Result<RunOutput, ToolError> {
    let quiet = without_seconds(context);
    let waiting = Waiting::new(&quiet, wait_seconds);
    let mut teller = Teller::new(context.progress.clone());
    let job = loop {
        let record = match store.read(id) {
            Err(error @ JobError::NotFound(_)) => return Err(unknown(error, store)),
            record => record?,
        };
        if record.state.is_final() {
            return RunOutput::of(&record);
        }
        match store.take(id) {
            Ok(job) => break job,
            Err(JobError::Held(_)) => {}
            Err(error) => return Err(error.into()),
        }
        teller.tell(&record);
        if !waiting.again().await {
            return Ok(RunOutput::of(&record)?.timed(&record));
        }
    };
    // Only under the lock does the record say what became of a process that worked on it.
    let record = job.record().clone();
    if record.state.is_final() {
        return RunOutput::of(&record);
    }
    if matches!(record.state, JobState::Prepared | JobState::Uploading) {
        return Ok(RunOutput::not_submitted(&record));
    }
    let target = Target::of_base(&record.base);
    let ready = match reach(&waiting, &quiet, &target).await {
        Ok(Ok(ready)) => ready,
        Ok(Err(not_yet)) => return Ok(RunOutput::of(&record)?.timed(&record).waiting_for(not_yet)),
        Err(error) => {
            let state = word(record.state);
            let message = format!("the run was {state} when it was last seen, and now: {}", error.message);
            return Err(ToolError { message, ..error });
        }
    };
    let record = work(&waiting, context, context.progress.clone(), ready.client, job, None).await;
    let record = record.map_err(|error| target.told(error))?;
    Ok(RunOutput::of(&record)?.timed(&record))
}

/// Whether the pod that a job's record names is one of ours that has ended.
fn is_pod_gone(services: &Services, base: &str) -> bool {
    let target = Target::of_base(base);
    let record = target.pod().and_then(|name| services.fleet.get(name).ok().flatten());
    record.is_some_and(|record| !record.is_open())
}

fn unknown(error: JobError, store: &JobStore) -> ToolError {
    let jobs = store.list().unwrap_or_default();
    let last: Vec<_> =
        jobs.iter().take(MOST_LISTED).map(|job| format!("{} ({})", job.prompt_id, word(job.state))).collect();
    let hint = match last.as_slice() {
        [] => "there are none; comfy_run makes one".to_owned(),
        last => format!("the last ones: {}", last.join(", ")),
    };
    ToolError::from(error).hint(hint)
}
