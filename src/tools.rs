//! The one list of tools, and the one way to call them.
//!
//! Every face (MCP, JSON-RPC, the command line) reads [`TOOLS`] and goes through [`call`]: it decodes the arguments,
//! checks them, runs the tool, catches panics and names the tool in errors, so that no tool and no face does it again.

mod comfy;
pub mod context;
pub mod error;
mod gpus;
pub mod offer;
mod pods;
mod schema;
mod spending;
mod tunnels;
pub mod volumes;
mod waiting;
mod words;

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::task::JoinHandle;

use crate::errors::harmless;

pub use context::Context;
pub use error::{ErrorKind, StillBilling, ToolError};
pub use offer::{Offer, Toolset};
pub use pods::{follow_pod_logs, reach_pod};
pub use schema::PATH_MARK;
pub use words::usd;

/// What a call does to the world; the annotations of every face follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    Reads,
    Creates,
    Changes,
    Destroys,
}

/// One tool: its words, its input and output, and what it does, side by side in one file of `tools/`.
pub trait Tool {
    const NAME: &'static str;
    const TITLE: &'static str;
    const DESCRIPTION: &'static str;
    const EFFECT: Effect;
    /// Arguments that decode, as JSON; shown in help, checked by a test.
    const EXAMPLE: &'static str;
    /// Whether a call whose process ends with the answer may take longer than any other, because its work can't be
    /// left to anyone else.
    const MAY_OUTLAST_LIMIT: bool = false;
    type Input: DeserializeOwned + JsonSchema + Send;
    type Output: Serialize + JsonSchema + Send;

    fn run(context: &Context, input: Self::Input) -> impl Future<Output = Result<Self::Output, ToolError>> + Send;

    /// The answer in a few short lines, for readers who don't see the structured part.
    fn text(output: &Self::Output) -> String;
}

/// A tool as the faces see it.
#[derive(Debug)]
pub struct ToolDef {
    pub name: &'static str,
    pub title: &'static str,
    pub description: &'static str,
    pub effect: Effect,
    pub toolset: Toolset,
    pub example: &'static str,
    pub may_outlast_limit: bool,
    pub input_schema: fn() -> Value,
    pub output_schema: fn() -> Value,
    run: for<'a> fn(&'a Context, Value) -> BoxFuture<'a, Result<Answer, ToolError>>,
    decodes: fn(Value) -> Result<(), ToolError>,
}

/// What a tool answered: the same value for every face, and its short text.
#[derive(Debug, Clone)]
pub struct Answer {
    pub value: Value,
    pub text: String,
}

pub static TOOLS: &[ToolDef] = &[
    ToolDef::of::<pods::CreatePodWithVolume>(Toolset::Pods),
    ToolDef::of::<tunnels::StartTunnel>(Toolset::Tunnels),
    ToolDef::of::<comfy::ComfyStatus>(Toolset::Comfy),
    ToolDef::of::<comfy::ComfyQueue>(Toolset::Comfy),
    ToolDef::of::<pods::TerminatePod>(Toolset::Pods),
    ToolDef::of::<pods::ListPods>(Toolset::Pods),
    ToolDef::of::<pods::GetPod>(Toolset::Pods),
    ToolDef::of::<pods::ControlPod>(Toolset::Pods),
    ToolDef::of::<pods::PodLogs>(Toolset::Pods),
    ToolDef::of::<volumes::ListVolumes>(Toolset::Volumes),
    ToolDef::of::<volumes::CreateVolume>(Toolset::Volumes),
    ToolDef::of::<gpus::ListGpus>(Toolset::Pods),
    ToolDef::of::<tunnels::ListTunnels>(Toolset::Tunnels),
    ToolDef::of::<tunnels::StopTunnel>(Toolset::Tunnels),
    ToolDef::of::<comfy::ComfyRun>(Toolset::Comfy),
    ToolDef::of::<comfy::ComfyJob>(Toolset::Comfy),
    ToolDef::of::<spending::Spending>(Toolset::Spending),
];

pub fn find(name: &str) -> Option<&'static ToolDef> {
    TOOLS.iter().find(|tool| tool.name == name)
}

/// The tool of that name, or an error that lists the names there are.
pub fn known(name: &str) -> Result<&'static ToolDef, ToolError> {
    Offer::everything().find(name)
}

/// Decodes, checks, runs, catches panics, keeps the time limit. `arguments` may be null for none.
pub async fn call(context: &Context, name: &str, arguments: Value) -> Result<Answer, ToolError> {
    let tool = known(name)?;
    let arguments = if arguments.is_null() { Value::Object(Default::default()) } else { arguments };
    let started = std::time::Instant::now();
    let result = within_limit(context, tool, arguments).await;
    tracing::info!(tool = name, ok = result.is_ok(), elapsed_ms = started.elapsed().as_millis() as u64, "call");
    match result {
        Ok(mut answer) => {
            if let Some(warning) = context.services.config_warning() {
                warn(tool, &mut answer, &warning);
            }
            Ok(Answer { text: harmless(&answer.text), ..answer })
        }
        Err(mut error) => {
            if tool.effect == Effect::Destroys && error.kind == ErrorKind::InvalidInput {
                // An ending that wasn't even begun leaves something running.
                error.still_billing.get_or_insert(StillBilling::Possible);
            }
            Err(error.of_tool(name).harmless())
        }
    }
}

/// Each step of a tool has its own time-out, but several slow ones add up. A change that is cut off in the middle is
/// worse than a late one, so it goes on while its caller is answered; what only reads is stopped.
async fn within_limit(context: &Context, tool: &'static ToolDef, arguments: Value) -> Result<Answer, ToolError> {
    let limit = context.services.timing.call_limit;
    if tool.may_outlast_limit && context.after_answer.is_none() {
        return guarded(context, tool, arguments).await;
    }
    let context = context.clone();
    let mut task = tokio::spawn(async move { guarded(&context, tool, arguments).await });
    match tokio::time::timeout(limit, &mut task).await {
        Ok(Ok(result)) => result,
        Ok(Err(error)) => Err(ToolError::new(ErrorKind::Internal, format!("the call was stopped: {error}"))),
        Err(_) => Err(out_of_time(tool, limit, &task)),
    }
}

fn out_of_time(tool: &ToolDef, limit: Duration, task: &JoinHandle<Result<Answer, ToolError>>) -> ToolError {
    if tool.effect == Effect::Reads {
        task.abort();
        return ToolError::new(
            ErrorKind::Network,
            format!("there was no answer within {limit:?}; nothing was changed"),
        )
        .hint("the provider or the pod is slow to answer: call again in a moment");
    }
    ToolError::new(ErrorKind::UnknownOutcome, format!("it was not done within {limit:?}; what was begun goes on"))
        .hint("the provider or the pod is slow to answer: see list_pods, then make the same call again")
        .retryable(true)
        .billing(StillBilling::Possible)
}

/// Adds a warning to the answer of a tool that has a place for one. What it tells is not of the tool's own making.
fn warn(tool: &ToolDef, answer: &mut Answer, warning: &str) {
    let schema = (tool.output_schema)();
    let has_place = |field: &str| schema.pointer(&format!("/properties/{field}")).is_some();
    if has_place("warning") {
        let own = answer.value["warning"].as_str();
        let both = own.map_or_else(|| warning.to_owned(), |own| format!("{own}; {warning}"));
        answer.value["warning"] = both.into();
    } else if has_place("warnings") {
        let mut all = answer.value["warnings"].as_array().cloned().unwrap_or_default();
        all.push(warning.into());
        answer.value["warnings"] = all.into();
    } else {
        return;
    }
    answer.text.push_str(&format!("\nWarning: {warning}"));
}

async fn guarded(context: &Context, tool: &ToolDef, arguments: Value) -> Result<Answer, ToolError> {
    AssertUnwindSafe((tool.run)(context, arguments)).catch_unwind().await.unwrap_or_else(|panic| {
        let what = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        tracing::error!(tool = tool.name, panic = what, "a tool panicked");
        Err(ToolError::new(ErrorKind::Internal, format!("a defect in this program stopped the call ({what})"))
            .hint("see what there is with list_pods; please report this"))
    })
}

impl ToolDef {
    pub const fn of<T: Tool + 'static>(toolset: Toolset) -> Self {
        Self {
            name: T::NAME,
            title: T::TITLE,
            description: T::DESCRIPTION,
            effect: T::EFFECT,
            toolset,
            example: T::EXAMPLE,
            may_outlast_limit: T::MAY_OUTLAST_LIMIT,
            input_schema: schema::input::<T::Input>,
            output_schema: schema::output::<T::Output>,
            run: |context, arguments| {
                Box::pin(async move {
                    let input = decode::<T::Input>(arguments)?;
                    let output = T::run(context, input).await?;
                    let mut text = T::text(&output);
                    let value = serde_json::to_value(&output).map_err(|error| {
                        ToolError::new(ErrorKind::Internal, format!("the answer can't be written as JSON: {error}"))
                    })?;
                    if let Some(cost) = cost_of_waiting(&value) {
                        text.push_str(&format!("\n{cost}"));
                    }
                    Ok(Answer { value, text })
                })
            },
            decodes: |arguments| decode::<T::Input>(arguments).map(drop),
        }
    }

    /// Whether these arguments would be taken, without running anything.
    pub fn check(&self, arguments: Value) -> Result<(), ToolError> {
        (self.decodes)(arguments).map_err(|error| error.of_tool(self.name))
    }
}

/// Whoever reads only the text of an unfinished answer has to know what it costs to wait.
fn cost_of_waiting(answer: &Value) -> Option<StillBilling> {
    if answer["done"] != false {
        return None;
    }
    StillBilling::deserialize(&answer["still_billing"]).ok().filter(|billing| *billing != StillBilling::No)
}

fn decode<T: DeserializeOwned + JsonSchema>(arguments: Value) -> Result<T, ToolError> {
    schema::check(&schema::input::<T>(), &arguments)?;
    serde_path_to_error::deserialize(arguments).map_err(|error| {
        let field = error.path().to_string();
        ToolError::invalid(if field == "." { "arguments" } else { &field }, error.inner())
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_an_unfinished_answer_tells_what_waiting_costs() {
        let cost = |done, still_billing| cost_of_waiting(&json!({"done": done, "still_billing": still_billing}));
        assert_eq!(cost(false, "yes"), Some(StillBilling::Yes));
        assert_eq!(cost(false, "possible"), Some(StillBilling::Possible));
        assert_eq!(cost(false, "no"), None);
        assert_eq!(cost(true, "yes"), None);
        assert_eq!(cost_of_waiting(&json!({"done": false})), None);
        assert_eq!(StillBilling::Possible.to_string(), "Still being billed: possibly.");
    }
}
