//! `demo`: the whole main job on a private sandbox, from no GPU to a picture on disk. Every step is a tool's call, as
//! an assistant makes it.

mod screen;
mod stage;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};

use super::output;
use super::render::usd;
use super::signals::Signals;
use crate::environment::Environment;
use crate::tools::{self, Context, ErrorKind, ToolError};
use screen::Screen;
use stage::Stage;

const POD: &str = "demo";
const LIFETIME_MINUTES: u32 = 10;
/// Far more than the story takes; a demo that hangs is worse than one that fails.
const STEP_LIMIT: Duration = Duration::from_secs(120);

/// Watch the whole job on this machine, from no GPU to a picture; no account, no key, no money
#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// Where the picture and the log go
    #[arg(long, value_name = "FOLDER", default_value = "autopod-demo")]
    output_dir: PathBuf,
    /// Leave the pod and its tunnel up, and say how to use and end them
    #[arg(long)]
    keep: bool,
}

pub(super) async fn run(args: DemoArgs, environment: Environment, program: PathBuf) -> Result<u8, ToolError> {
    let mut signals = Signals::listen()?;
    let output_dir = make_output_folder(&args.output_dir)?;
    let screen = Screen::new(&output_dir)?;
    let stage = Stage::set_up(environment, program, args.keep).await?;
    let told = tokio::select! {
        told = tell(&stage, &screen, &output_dir, args.keep) => told,
        code = signals.received() => {
            screen.interrupted();
            stage.tear_down().await?;
            return Ok(if code == 0 { 143 } else { code });
        }
    };
    if args.keep
        && let Ok(story) = &told
    {
        screen.kept(stage.home(), story);
        stage.leave_standing();
        return Ok(0);
    }
    let torn_down = stage.tear_down().await;
    let story = told?;
    torn_down?;
    screen.close(&story);
    Ok(0)
}

/// What the closing table tells.
#[derive(Debug, Default)]
struct Story {
    steps: Vec<(&'static str, String, Duration)>,
    cost_usd: f64,
    pictures: Vec<String>,
    took: Duration,
}

async fn tell(stage: &Stage, screen: &Screen, output_dir: &Path, keep: bool) -> Result<Story, ToolError> {
    let started = Instant::now();
    let mut teller = Teller { stage, screen, story: Story::default() };
    screen.say(&format!(
        "A sandbox stands in for RunPod on {}: real HTTP, real SSH, a real (small) ComfyUI. Nothing costs money.",
        stage.url()
    ));
    teller
        .step("GPUs in stock", "list_gpus", json!({"min_vram_gb": 16}), |answer| {
            let gpus = answer["gpus"].as_array().map_or(0, Vec::len);
            let first = &answer["gpus"][0];
            format!("{gpus} offers, the cheapest {} at {}/h", word(&first["name"]), usd(&first["price_per_hour"]))
        })
        .await?;
    let pod = json!({"name": POD, "volume": "comfy-models", "lifetime_minutes": LIFETIME_MINUTES});
    teller
        .step("GPU pod with volume", "create_pod_with_volume", pod, |answer| {
            format!(
                "{} in {} at {}/h, volume {} at {}",
                word(&answer["gpu"]),
                word(&answer["data_center"]),
                usd(&answer["price_per_hour"]),
                word(&answer["volume"]["name"]),
                word(&answer["volume"]["mount_path"])
            )
        })
        .await?;
    teller
        .step("SSH tunnel", "start_tunnel", json!({"pod": POD}), |answer| {
            format!("{} leads to port {} of the pod", word(&answer["url"]), answer["remote_port"])
        })
        .await?;
    teller
        .step("Inside the pod", "get_pod", json!({"pod": POD}), |answer| {
            format!("volume: {}; its own switch: {}", word(&answer["mount"]), word(&answer["switch"]))
        })
        .await?;
    teller
        .step("ComfyUI answers", "comfy_status", json!({"pod": POD}), |answer| {
            format!("version {} on {}", word(&answer["comfyui_version"]), word(&answer["devices"][0]["name"]))
        })
        .await?;
    let run = json!({"pod": POD, "workflow": workflow(), "output_dir": output_dir});
    let ran = teller
        .step("Workflow runs", "comfy_run", run, |answer| {
            format!("{} picture(s) downloaded", answer["files"].as_array().map_or(0, Vec::len))
        })
        .await?;
    let files = ran["files"].as_array().into_iter().flatten();
    teller.story.pictures = files.map(|file| word(&file["path"])).collect();
    if !keep {
        let ended = teller
            .step("Pod terminated", "terminate_pod", json!({"pod": POD}), |answer| {
                format!("proven gone, {} tunnel(s) closed", answer["tunnels_stopped"])
            })
            .await?;
        teller.story.cost_usd = ended["cost_usd"].as_f64().unwrap_or_default();
        teller
            .step("What is left", "list_pods", json!({}), |answer| {
                match answer["pods"].as_array().map_or(0, Vec::len) {
                    0 => "no pod, nothing is billed".to_owned(),
                    left => format!("{left} pod(s)"),
                }
            })
            .await?;
    }
    teller.story.took = started.elapsed();
    Ok(teller.story)
}

/// The sandbox's own painter takes the place of a model's sampler.
fn workflow() -> Value {
    json!({
        "1": {"class_type": "SandboxSampler",
              "inputs": {"width": 512, "height": 512, "steps": 24, "seed": 42, "step_ms": 60}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "autopod-demo"}}
    })
}

fn word(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

struct Teller<'a> {
    stage: &'a Stage,
    screen: &'a Screen,
    story: Story,
}

impl Teller<'_> {
    /// Calls a tool until it is done, as an assistant would, and tells what came of it.
    async fn step(
        &mut self,
        title: &'static str,
        tool: &str,
        mut arguments: Value,
        tell: impl Fn(&Value) -> String,
    ) -> Result<Value, ToolError> {
        let started = Instant::now();
        let line = self.screen.begin(title);
        let context = Context { progress: line.progress(), ..Context::new(self.stage.services()?) };
        let mut tool = tool.to_owned();
        loop {
            let answer = tools::call(&context, &tool, arguments.clone()).await?;
            self.screen.log(&tool, &arguments, &answer.value);
            if answer.value["done"] != false && answer.value["ready"] != false {
                let told = tell(&answer.value);
                line.done(&told, started.elapsed());
                self.story.steps.push((title, told, started.elapsed()));
                return Ok(answer.value);
            }
            if started.elapsed() >= STEP_LIMIT {
                let problem = format!("{tool} was not done after {STEP_LIMIT:?}: {}", answer.text);
                return Err(ToolError::new(ErrorKind::Failed, problem));
            }
            // A run goes on by its id; asking for it again would paint twice.
            if let Some(id) = answer.value["prompt_id"].as_str() {
                tool = "comfy_job".to_owned();
                arguments = json!({"prompt_id": id});
            }
        }
    }
}

fn make_output_folder(folder: &Path) -> Result<PathBuf, ToolError> {
    let unusable = |error: std::io::Error| {
        ToolError::invalid("--output-dir", format!("`{}` can't be used: {error}", folder.display()))
    };
    std::fs::create_dir_all(folder).map_err(unusable)?;
    folder.canonicalize().map_err(unusable)
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}
