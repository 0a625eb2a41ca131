//! `pod logs`: what a pod has said, and with `--follow` what it says from now on.

use clap::Args;
use clap::builder::PossibleValuesParser;
use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::app::{self, AppOptions};
use crate::cli::render::{clean, text};
use crate::cli::signals::{Signals, interruptible};
use crate::cli::{output, progress};
use crate::tools::{self, Context, ToolError, follow_pod_logs};

/// Show what a pod has said
///
/// Oldest first: the time, whether it comes from the container or from the provider's system, and the line.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// The pod's name or id; may be left out when there is only one.
    pod: Option<String>,
    /// How many of the last lines; 100 when left out.
    #[arg(long)]
    tail: Option<u32>,
    /// Instead of the last lines, those since then, like 10m ago or 2026-01-31T12:00:00Z.
    #[arg(long, conflicts_with = "tail")]
    since: Option<String>,
    /// Only what the programs in the container print, or what the provider does with it.
    #[arg(long, value_parser = PossibleValuesParser::new(["container", "system"]))]
    source: Option<String>,
    /// Go on with every new line, until Ctrl-C or until the pod is gone.
    #[arg(long, short)]
    follow: bool,
    /// Print the answer as JSON.
    #[arg(long, conflicts_with = "follow")]
    json: bool,
}

impl LogsArgs {
    /// As the tool takes them.
    fn arguments(&self) -> Value {
        let mut arguments = json!({});
        if let Some(pod) = &self.pod {
            arguments["pod"] = json!(pod);
        }
        if let Some(tail) = self.tail {
            arguments["tail"] = json!(tail);
        }
        if let Some(since) = &self.since {
            arguments["since"] = json!(since);
        }
        if let Some(source) = &self.source {
            arguments["source"] = json!(source);
        }
        arguments
    }
}

pub(super) async fn run(options: &AppOptions, args: LogsArgs) -> Result<u8, ToolError> {
    if args.follow {
        return follow(options, &args).await;
    }
    let answer = interruptible(async {
        let context = Context { progress: progress::lines(), ..Context::new(app::services(options).await?) };
        tools::call(&context, "pod_logs", args.arguments()).await
    })
    .await?;
    if args.json {
        output::say_json(&answer.value)?;
        return Ok(0);
    }
    for line in answer.value["lines"].as_array().into_iter().flatten() {
        output::say(&clean(&text(line)));
    }
    if let Some(cut) = answer.value["cut"].as_u64().filter(|cut| *cut > 0) {
        output::complain(&format!("{cut} lines were left out; ask for fewer with --tail or --since"));
    }
    Ok(0)
}

/// The end of the pod is the good end of it.
async fn follow(options: &AppOptions, args: &LogsArgs) -> Result<u8, ToolError> {
    let mut signals = Signals::listen()?;
    let opened = async {
        let services = app::services(options).await?;
        follow_pod_logs(&services, args.arguments()).await
    };
    let mut lines = tokio::select! {
        lines = opened => lines?,
        code = signals.received() => return Ok(code),
    };
    loop {
        tokio::select! {
            line = lines.next() => match line {
                Some(line) => {
                    if !output::try_say(&clean(&line?)) {
                        return Ok(0);
                    }
                }
                None => return Ok(0),
            },
            code = signals.received() => return Ok(code),
        }
    }
}
