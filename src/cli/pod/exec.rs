//! `pod exec`: one command in a pod, as if it ran here.

use std::process::Stdio;
use std::time::Duration;

use clap::Args;

use crate::app::{self, AppOptions};
use crate::cli::signals::Signals;
use crate::ssh::{Cause, quoted};
use crate::tools::{ErrorKind, ToolError, reach_pod};

/// Run a command in a pod
///
/// stdin, stdout and stderr are passed through, and the command's exit code is this program's. The words reach the
/// command as they are; for pipes and variables of the pod's shell write `-- sh -c '...'`.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// The pod's name or id; may be left out when there is only one.
    pod: Option<String>,
    /// How long the command may take, like 90s or 2h; for ever when left out. It may go on in the pod after that.
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
    /// The command and its arguments, after `--`.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub(super) async fn run(options: &AppOptions, args: ExecArgs) -> Result<u8, ToolError> {
    let mut signals = Signals::listen()?;
    let code = tokio::select! {
        code = exit_code(options, args) => code?,
        _ = signals.received() => {
            return Err(ToolError::new(ErrorKind::Interrupted, "interrupted; the command may go on in the pod"));
        }
    };
    Ok(u8::try_from(code).unwrap_or(u8::MAX))
}

async fn exit_code(options: &AppOptions, args: ExecArgs) -> Result<i32, ToolError> {
    let services = app::services(options).await?;
    let (_, target) = reach_pod(&services, args.pod.as_deref()).await?;
    let words: Vec<_> = args.command.iter().map(|word| quoted(word)).collect();
    let (stdin, stdout, stderr) = (Stdio::inherit(), Stdio::inherit(), Stdio::inherit());
    let mut session = services.ssh.session(&target, &words.join(" "), stdin, stdout, stderr)?;
    let Some(timeout) = args.timeout else { return Ok(session.ended().await?) };
    match tokio::time::timeout(timeout, session.ended()).await {
        Ok(ended) => Ok(ended?),
        Err(_) => {
            session.stop().await;
            Err(Cause::TimedOut(timeout).into())
        }
    }
}
