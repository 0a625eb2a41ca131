//! How the failures of ComfyUI are told, and what to try.

use crate::comfy::jobs::{JobError, JobRecord, JobState};
use crate::comfy::{ComfyError, Failure, NodeError};
use crate::errors::chain;
use crate::tools::{ErrorKind, ToolError};

impl From<ComfyError> for ToolError {
    fn from(error: ComfyError) -> Self {
        let kind = match &error {
            ComfyError::Refused { .. }
            | ComfyError::Cut { .. }
            | ComfyError::Unreachable { .. }
            | ComfyError::TimedOut { .. } => ErrorKind::Network,
            ComfyError::Rejected(_) => ErrorKind::InvalidInput,
            ComfyError::OutcomeUnknown { .. } => ErrorKind::UnknownOutcome,
            ComfyError::File { .. } | ComfyError::Setup(_) => ErrorKind::Setup,
            ComfyError::HttpStatus { .. }
            | ComfyError::Redirected { .. }
            | ComfyError::WrongService { .. }
            | ComfyError::Unreadable { .. }
            | ComfyError::TooLarge { .. }
            | ComfyError::NotAccepted { .. } => ErrorKind::Failed,
        };
        let hint = match &error {
            ComfyError::Rejected(rejection) => Some(try_for_rejection(&rejection.kind, &rejection.node_errors)),
            _ if error.is_transient() => Some("comfy_status says what is up and what is not".to_owned()),
            _ => None,
        };
        let told = Self::new(kind, chain(&error)).retryable(error.is_transient());
        match hint {
            Some(hint) => told.hint(hint),
            None => told,
        }
    }
}

impl From<JobError> for ToolError {
    fn from(error: JobError) -> Self {
        match error {
            JobError::Comfy(error) => error.into(),
            JobError::Workflow(error) => Self::invalid("workflow", error),
            JobError::NotFound(_) => Self::not_found(error.to_string()),
            JobError::Held(_) => Self::failed(error.to_string()).retryable(true),
            JobError::Unreadable { .. } | JobError::Newer { .. } | JobError::Disk { .. } | JobError::State(_) => {
                Self::new(ErrorKind::Setup, chain(&error))
            }
        }
    }
}

/// Why a job can't go on at the moment, with its id, so that it is never run twice by mistake.
pub(super) fn stuck(error: JobError, record: &JobRecord) -> ToolError {
    let id = record.prompt_id;
    let outcome_unknown = matches!(error, JobError::Comfy(ComfyError::OutcomeUnknown { .. }));
    let error = ToolError::from(error);
    if outcome_unknown {
        return error
            .hint(format!("comfy_job {{\"prompt_id\": \"{id}\"}} finds out; don't run it again before"))
            .retryable(false);
    }
    if record.state == JobState::NotSubmitted {
        let message = format!("nothing was submitted: {}", error.message);
        return ToolError { message, ..error };
    }
    let message = format!("the run {id} was {} when it was last seen: {}", word(record.state), error.message);
    ToolError { message, ..error }.hint(format!("comfy_job {{\"prompt_id\": \"{id}\"}} takes it up again"))
}

/// The error of a run that ended badly; `None` for every other state.
pub(super) fn ending(record: &JobRecord) -> Option<ToolError> {
    let cause = record.error.clone().unwrap_or_else(|| format!("the run is {}", word(record.state)));
    let id = record.prompt_id;
    Some(match record.state {
        JobState::Rejected => {
            ToolError::new(ErrorKind::InvalidInput, cause).hint(try_for_rejection("", &record.node_errors))
        }
        JobState::Failed => {
            let hint = record.failure.as_ref().map_or_else(String::new, try_for_failure);
            ToolError::failed(format!("the run {id} failed: {cause}")).hint(hint)
        }
        JobState::Interrupted => ToolError::failed(format!("{cause} ({id})")).hint("run it again with comfy_run"),
        JobState::Lost => {
            ToolError::failed(format!("the run {id} is lost: {cause}")).hint("run it again with comfy_run")
        }
        _ => return None,
    })
}

/// As JSON says it too.
pub(super) fn word(state: JobState) -> &'static str {
    match state {
        JobState::Prepared => "prepared",
        JobState::Uploading => "uploading",
        JobState::Submitting => "submitting",
        JobState::Pending => "pending",
        JobState::Running => "running",
        JobState::Downloading => "downloading",
        JobState::Done => "done",
        JobState::Failed => "failed",
        JobState::Interrupted => "interrupted",
        JobState::Lost => "lost",
        JobState::Rejected => "rejected",
        JobState::NotSubmitted => "not_submitted",
    }
}

/// One advice for each kind of error that occurs.
fn try_for_rejection(kind: &str, node_errors: &[NodeError]) -> String {
    let mut advice: Vec<&str> = Vec::new();
    for kind in node_errors.iter().map(|error| error.kind.as_str()).chain([kind]) {
        let one = match kind {
            "value_not_in_list" => "choose one of the values that the server lists (for a model: one that the pod has)",
            "value_smaller_than_min" | "value_bigger_than_max" => "bring the value into the range",
            "required_input_missing" => "give the missing input, also where it has a default",
            "bad_linked_input" | "return_type_mismatch" => "link the input to an output of the type it takes",
            "invalid_input_type" => "give the value in the type the input takes",
            "prompt_no_outputs" => "add a node that puts something out, such as SaveImage",
            "custom_validation_failed" => "for a file that is missing: send it along with `inputs`",
            _ => continue,
        };
        if !advice.contains(&one) {
            advice.push(one);
        }
    }
    match advice.as_slice() {
        [] => "mend the workflow; a class that the server doesn't know needs its custom nodes in the pod".to_owned(),
        advice => format!("{}; then run it again", advice.join("; ")),
    }
}

fn try_for_failure(failure: &Failure) -> String {
    let text = format!("{} {}", failure.exception_type, failure.message).to_lowercase();
    let advice = if text.contains("out of memory") || text.contains("outofmemory") {
        "use a smaller picture or batch, a smaller model, or a GPU with more memory"
    } else if text.contains("no such file") || text.contains("filenotfound") {
        "see that the pod has the file, or send it along with `inputs`"
    } else {
        "mend that node's inputs, then run it again"
    };
    // The innermost call is last and tells custom nodes' authors the most.
    match failure.traceback.iter().rev().find(|line| line.trim_start().starts_with("File")) {
        Some(line) => format!("{advice} (raised in {})", line.trim().lines().next().unwrap_or_default()),
        None => advice.to_owned(),
    }
}
