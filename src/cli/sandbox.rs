//! `sandbox`: a RunPod on this machine, with no account and no money behind it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncReadExt;

use super::output;
use super::signals::terminated;
use crate::app;
use crate::config::Home;
use crate::environment::Environment;
use crate::errors::chain;
use crate::sandbox::{self, ClockMode, SandboxOptions};
use crate::state::{self, Lock, StateError};
use crate::tools::{ErrorKind, ToolError};

const IDLE_LIMIT: Duration = Duration::from_secs(30 * 60);
/// With its pods' servers and its keeper.
const STOPS_WITHIN: Duration = Duration::from_secs(30);
/// How long a lock may be held by somebody who only looks at it.
const LONGEST_LOOK: Duration = Duration::from_millis(300);
const STAYS_AWAY: Duration = Duration::from_millis(500);

/// Run a stand-in for RunPod on this machine, with real SSH and a small ComfyUI in its pods
#[derive(Debug, Args)]
pub struct SandboxArgs {
    /// Where to listen; only loopback is allowed, port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Folder of its files [default: the sandbox's home, `~/.autopod/sandbox`]
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Put a real ComfyUI behind the pods, like http://127.0.0.1:8188
    #[arg(long, value_name = "URL")]
    comfyui: Option<String>,
    /// Stop its clock: only `POST /_sandbox/clock` moves it
    #[arg(long)]
    manual_clock: bool,
    /// End the sandbox that runs in that folder
    #[arg(long)]
    stop: bool,
    /// Run detached, and end after 30 minutes without a pod and a request; `--sandbox` starts it so
    #[arg(long, hide = true)]
    background: bool,
    /// Run detached, and end, with its whole folder, when stdin ends; `demo` starts it so
    #[arg(long, hide = true)]
    tethered: bool,
    /// Run no commands in the pods, as on a kernel without user namespaces
    #[arg(long, hide = true)]
    no_namespaces: bool,
}

pub async fn run(args: SandboxArgs, environment: &Environment) -> Result<u8, ToolError> {
    let home = match &args.folder {
        Some(folder) => Home::open(std::path::absolute(folder).unwrap_or_else(|_| folder.clone()))?,
        None => Home::open(app::home(environment)?.sandbox())?,
    };
    if args.stop {
        return stop(&home).await;
    }
    app::refuse_real_home(&home)?;
    let detached = args.background || args.tethered;
    if detached {
        // The terminal or server that started us may be killed with its process group.
        let _ = rustix::process::setsid();
    }
    let Some(lock) = take_lock(&home).await? else { return Err(runs_already(&home)) };
    let sandbox = sandbox::start(SandboxOptions {
        listen: args.listen,
        folder: home.root().to_owned(),
        clock: if args.manual_clock { ClockMode::Manual } else { ClockMode::Live },
        comfyui: args.comfyui,
        idle_limit: detached.then_some(IDLE_LIMIT),
        namespaces: !args.no_namespaces,
    })
    .await
    .map_err(|error| ToolError::new(ErrorKind::Setup, chain(&error)))?;
    if !detached {
        output::say(&format!(
            "The sandbox listens on {}, its key is in {}.\nUse it with --sandbox{}, end it with Ctrl-C.",
            sandbox.url(),
            sandbox.key_file().display(),
            if args.folder.is_some() { " and AUTOPOD_HOME set to its folder" } else { "" }
        ));
    }
    tokio::select! {
        () = sandbox.ended() => {}
        () = terminated() => {}
        () = stdin_ended(), if args.tethered => {}
    }
    sandbox.stop().await;
    if args.tethered {
        drop(lock);
        remove_home(&home).await;
        return Ok(0);
    }
    // Before the lock is let go of: afterwards the records may be those of another world.
    app::close_world(&home).await?;
    drop(lock);
    Ok(0)
}

/// `None` when another sandbox holds it. Who looks whether a sandbox lives takes the lock for a moment, which must not
/// pass for a sandbox.
async fn take_lock(home: &Home) -> Result<Option<Lock>, ToolError> {
    let path = home.lock("sandbox");
    let taken = tokio::task::spawn_blocking(move || Lock::take(&path, LONGEST_LOOK)).await;
    match taken.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic())) {
        Ok(lock) => Ok(Some(lock)),
        Err(StateError::Locked { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

async fn stop(home: &Home) -> Result<u8, ToolError> {
    let path = home.lock("sandbox");
    if !state::is_held(&path) {
        output::say("No sandbox runs there.");
        return Ok(0);
    }
    // That the lock is held proves that the process id inside is that of the sandbox.
    let pid = state::holder(&path).and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
    let ended = async {
        while state::is_held(&path) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let stopped = match pid {
        Some(pid) => {
            let _ = kill_process(pid, Signal::TERM);
            tokio::time::timeout(STOPS_WITHIN, ended).await.is_ok()
        }
        None => false,
    };
    if !stopped {
        return Err(ToolError::failed(format!("the sandbox in {} did not end", home.root().display())));
    }
    output::say("The sandbox has ended, and its pods with it.");
    Ok(0)
}

fn runs_already(home: &Home) -> ToolError {
    let url = app::read_sandbox_file(home.root())
        .map_or_else(|| "an address it has not told yet".to_owned(), |file| file.url);
    ToolError::refused(format!("a sandbox runs in {} already, on {url}", home.root().display()))
        .hint("use it with --sandbox, end it with `autopod-mcp sandbox --stop`, or give another --folder")
}

async fn stdin_ended() {
    let mut rest = [0; 256];
    let mut stdin = tokio::io::stdin();
    while !matches!(stdin.read(&mut rest).await, Ok(0) | Err(_)) {}
}

/// The keeper of this home is tethered to the same process as we are and ends by itself; then nobody needs the folder.
/// One that was just being started may still make it anew, so it has to stay away for a while.
async fn remove_home(home: &Home) {
    let removed = async {
        let mut absent_since = None;
        while absent_since.is_none_or(|since: Instant| since.elapsed() < STAYS_AWAY) {
            tokio::time::sleep(Duration::from_millis(20)).await;
            if !home.root().exists() {
                absent_since.get_or_insert_with(Instant::now);
            } else if !state::is_held(&home.lock("keeper")) {
                absent_since = None;
                if let Err(error) = std::fs::remove_dir_all(home.root()) {
                    tracing::warn!(folder = %home.root().display(), %error, "can't be removed yet");
                }
            }
        }
    };
    let _ = tokio::time::timeout(STOPS_WITHIN, removed).await;
}
