//! Where a pod's commands run: user, mount and process namespaces of their own, which an unprivileged user can make.
//!
//! Inside, the container's disk is the root, this machine's programs are there read-only, the volume is at its path, and
//! process 1 has the pod's environment. All commands of a pod share the namespaces, so what one leaves in the background
//! goes on and is seen by the next. They end with process 1, and process 1 ends when the pipe to its stdin does: when
//! the pod ends, and when the sandbox dies, however it dies.
//!
//! The network is the machine's own, so that a pod reaches the sandbox's API on loopback as a real one reaches RunPod's.
//! It is a fence against accidents, not against hostile code.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::log::EventLog;

mod root;

use root::Root;

/// A command's PATH and HOME, and process 1's where the pod's environment has none.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const HOME: &str = "/root";
const INIT: &str = include_str!("isolation/init.sh");
/// What the kernel needs to end every process of a pod; above it something is wrong.
const ENDING: Duration = Duration::from_secs(5);
/// A mount can hang, on a network file system that is gone.
const PREPARING: Duration = Duration::from_secs(10);
/// On the disk while the namespaces are made.
const FSTAB: &str = ".fstab";
const MOST_COMPLAINT: u64 = 4096;

/// What a pod's inside is made of.
pub struct Inside {
    /// A canonical path, as it is compared with mount points.
    pub disk: PathBuf,
    pub volume: Option<(PathBuf, String)>,
    pub env: BTreeMap<String, String>,
    /// False stands for a kernel that refuses user namespaces.
    pub namespaces: bool,
}

/// The namespaces of one pod. Cheap to clone.
#[derive(Clone)]
pub struct Isolation {
    state: watch::Receiver<State>,
}

#[derive(Clone)]
enum State {
    Preparing,
    /// Names a live process that has the namespaces open.
    Ready(u32),
    Refused(Refusal),
}

/// Why commands can't be kept apart from this machine, in one line.
#[derive(Debug, Clone, thiserror::Error)]
#[error("this sandbox can't isolate commands here: {0}")]
pub struct Refusal(Arc<str>);

impl Isolation {
    /// Begins to make the namespaces; whether that works shows only when a command wants in.
    pub fn start(inside: Inside, log: EventLog, stop: CancellationToken, tasks: &TaskTracker) -> Isolation {
        let (publish, state) = watch::channel(State::Preparing);
        tasks.spawn(async move {
            let init = match Init::start(inside).await {
                Ok(init) => init,
                Err(refusal) => {
                    log.add("isolation", json!({ "refused": refusal.0.as_ref() }));
                    publish.send_replace(State::Refused(refusal));
                    return;
                }
            };
            log.add("isolation", json!({ "refused": null }));
            publish.send_replace(State::Ready(init.id));
            stop.cancelled().await;
            publish.send_replace(State::Refused(Refusal("the pod has ended".into())));
            init.end().await;
        });
        Isolation { state }
    }

    /// A shell in the pod that runs `line` in HOME, with nothing in its environment but HOME and PATH.
    pub async fn shell(&self, line: &OsStr) -> Result<Command, Refusal> {
        let id = self.ready().await?;
        let mut command = Command::new(program("nsenter")?);
        let namespace = |kind: &str| format!("/proc/{id}/ns/{kind}");
        command
            .arg(format!("--user={}", namespace("user")))
            .arg(format!("--mount={}", namespace("mnt")))
            .arg(format!("--pid={}", namespace("pid_for_children")))
            .arg("--preserve-credentials")
            .args(["--", "/bin/sh", "-c", "cd && exec /bin/sh -c \"$1\"", "sh"])
            .arg(line)
            .env_clear()
            .env("PATH", PATH)
            .env("HOME", HOME);
        Ok(command)
    }

    /// Waits until it is known whether commands can run.
    pub async fn ready(&self) -> Result<u32, Refusal> {
        let mut state = self.state.clone();
        match state.wait_for(|state| !matches!(state, State::Preparing)).await.map(|state| state.clone()) {
            Ok(State::Ready(id)) => Ok(id),
            Ok(State::Refused(refusal)) => Err(refusal),
            Ok(State::Preparing) | Err(_) => Err(Refusal("the pod has ended".into())),
        }
    }
}

/// The process that made the namespaces and waits for process 1 in them.
struct Init {
    child: Child,
    id: u32,
}

impl Init {
    async fn start(inside: Inside) -> Result<Init, Refusal> {
        if !inside.namespaces {
            return Err(Refusal("user namespaces are switched off".into()));
        }
        let failed = |error: io::Error| Refusal(one_line(&error.to_string()));
        let (disk, volume, env) = (inside.disk, inside.volume, inside.env);
        let fstab = disk.join(FSTAB);
        let arguments = tokio::task::spawn_blocking(move || arguments(&disk, volume.as_ref()));
        let arguments = arguments.await.map_err(io::Error::other).and_then(|made| made).map_err(failed)?;
        let mut command = Command::new(program("unshare")?);
        // The loader's variables would act on the programs of this machine that set the pod up.
        let env = env.into_iter().filter(|(name, _)| !name.starts_with("LD_"));
        command
            .args(["--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child", "--", "/bin/sh", "-c"])
            .arg(INIT)
            .arg("init")
            .args(arguments)
            .env_clear()
            .env("PATH", PATH)
            .env("HOME", HOME)
            .envs(env)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Keys of a terminal are for the sandbox alone.
            .process_group(0)
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(failed)?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            let mut stdout = BufReader::new(stdout);
            let answer = tokio::time::timeout(PREPARING, stdout.read_line(&mut line));
            answer.await.map_err(|_| Refusal("preparing the pod takes too long".into()))?.map_err(failed)?;
        }
        // It names folders of this machine, which are no business of the pod's.
        let _ = tokio::fs::remove_file(fstab).await;
        match child.id() {
            Some(id) if line == "ready\n" => Ok(Init { child, id }),
            _ => Err(complaint(child).await),
        }
    }

    /// Returns when every process of the pod is gone.
    async fn end(mut self) {
        drop(self.child.stdin.take());
        if tokio::time::timeout(ENDING, self.child.wait()).await.is_err() {
            tracing::error!("a pod's process 1 did not end by itself");
            // With it goes its child, process 1.
            if let Err(error) = self.child.kill().await {
                tracing::error!(%error, "a pod's process 1 can't be killed");
            }
        }
    }
}

/// What it said last before it failed.
async fn complaint(mut child: Child) -> Refusal {
    drop(child.stdin.take());
    let mut said = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        // Half of a complaint is better than none.
        let _ = stderr.take(MOST_COMPLAINT).read_to_end(&mut said).await;
    }
    let _ = child.kill().await;
    let said = String::from_utf8_lossy(&said);
    let last = said.lines().map(str::trim).rfind(|line| !line.is_empty());
    Refusal(one_line(last.unwrap_or("`unshare` ended without a word")))
}

fn one_line(text: &str) -> Arc<str> {
    text.replace('\n', " ").into()
}

/// What the script takes: see its beginning.
fn arguments(disk: &Path, volume: Option<&(PathBuf, String)>) -> io::Result<Vec<OsString>> {
    let root = Root::prepare(disk, volume)?;
    let fstab = disk.join(FSTAB);
    std::fs::write(&fstab, root.fstab)?;
    let mut arguments = vec![disk.into(), fstab.into()];
    for name in ["mount", "umount", "pivot_root", "env", "cat"] {
        arguments.push(program(name).map_err(|refusal| io::Error::other(refusal.0.to_string()))?.into());
    }
    arguments.extend(root.mounts_below.into_iter().map(PathBuf::into_os_string));
    Ok(arguments)
}

/// Where the machine has a program; only in folders that are there inside the pod too.
fn program(name: &str) -> Result<PathBuf, Refusal> {
    let mut found = PATH.split(':').map(|folder| Path::new(folder).join(name));
    found.find(|path| path.is_file()).ok_or_else(|| Refusal(format!("there is no `{name}` on this machine").into()))
}
