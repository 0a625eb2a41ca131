//! The only file that starts `ssh`: its options, its causes of failure, our own key.
//!
//! ssh runs in `<home>/ssh` with relative file names, for it splits `UserKnownHostsFile` at blanks and expands `%`,
//! and with a cleared environment and `-F none`, for a user's ssh config can defeat a tunnel in many ways.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::oneshot;

use crate::state::{self, Lock, StateError};

/// The line by which the far end tells that the session, and so the forward, is up.
const READY: &str = "AUTOPOD_READY";
/// Keeps the session open until our end of its stdin closes, which happens when its holder dies too.
const HOLD: &str = "echo AUTOPOD_READY; exec cat >/dev/null";
const KEY: &str = "id_ed25519";
const KNOWN_HOSTS: &str = "known_hosts";
/// How long `ssh -V` may take.
const VERSION_WITHIN: Duration = Duration::from_secs(5);
/// What is kept of ssh's stderr to tell why it ended.
const MOST_STDERR_LINES: usize = 50;

/// Why an ssh connection is not there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    #[error("no `ssh` was found on PATH; install an OpenSSH client (Debian: openssh-client)")]
    NoSsh,
    #[error(
        "the pod refused our SSH key; a pod takes it only if it was created with it (PUBLIC_KEY), and images that don't start sshd can't be reached"
    )]
    KeyRefused,
    #[error(
        "the pod's host key changed within one start of the pod; the connection was refused, for somebody may stand in between"
    )]
    HostKeyChanged,
    #[error("the local port is in use by another program")]
    PortInUse,
    #[error("the pod's sshd does not allow forwarding")]
    ForwardingRefused,
    #[error("sshd in the pod does not answer yet (connection refused)")]
    SshdNotUp,
    #[error("the pod can't be reached ({0})")]
    Unreachable(String),
    #[error("the connection was lost ({0})")]
    Lost(String),
    #[error("ssh did not get ready within {0:?}")]
    Slow(Duration),
    #[error("ssh can't be started: {0}")]
    NotStarted(String),
}

impl Cause {
    /// Whether trying again can't help.
    pub fn is_terminal(&self) -> bool {
        matches!(
            self,
            Self::NoSsh | Self::KeyRefused | Self::HostKeyChanged | Self::PortInUse | Self::ForwardingRefused
        )
    }
}

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("no `ssh-keygen` was found on PATH; install an OpenSSH client (Debian: openssh-client)")]
    NoKeygen,
    #[error("ssh-keygen failed: {0}")]
    Keygen(String),
    #[error(transparent)]
    State(#[from] StateError),
}

/// Where ssh runs, and the environment it sees.
#[derive(Debug, Clone)]
pub struct Ssh {
    /// `<home>/ssh`.
    pub folder: PathBuf,
    pub environment: Vec<(String, OsString)>,
}

/// One forward: `127.0.0.1:local_port` here to `127.0.0.1:remote_port` in the pod.
#[derive(Debug, Clone)]
pub struct Forward {
    pub user: String,
    pub host: String,
    pub port: u16,
    /// Names the pod and its start, for host keys are pinned for each start.
    pub host_key_alias: String,
    pub local_port: u16,
    pub remote_port: u16,
}

impl Ssh {
    /// Our public key, one `authorized_keys` line; made on first use.
    pub async fn public_key(&self) -> Result<String, KeyError> {
        let public = self.folder.join(format!("{KEY}.pub"));
        let lock = self.folder.join("key.lock");
        let folder = self.folder.clone();
        let _lock = tokio::task::spawn_blocking(move || {
            state::make_private_folder(&folder)?;
            Lock::take(&lock, Duration::from_secs(10))
        })
        .await
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        if !(self.folder.join(KEY).exists() && public.exists()) {
            self.make_key().await?;
        }
        let bytes = state::read_file(&public)?.unwrap_or_default();
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// Made under another name and renamed, private half last, so that a crash leaves no half of a pair in use.
    async fn make_key(&self) -> Result<(), KeyError> {
        let fresh = self.folder.join("new_key");
        let fresh_public = self.folder.join("new_key.pub");
        let _ = std::fs::remove_file(&fresh);
        let _ = std::fs::remove_file(&fresh_public);
        let output = self
            .command("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "autopod", "-f", "new_key"])
            .stdin(Stdio::null())
            .output()
            .await
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => KeyError::NoKeygen,
                _ => KeyError::Keygen(error.to_string()),
            })?;
        if !output.status.success() {
            return Err(KeyError::Keygen(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        }
        let rename = |from: &Path, to: String| {
            std::fs::rename(from, self.folder.join(to)).map_err(|error| KeyError::Keygen(error.to_string()))
        };
        rename(&fresh_public, format!("{KEY}.pub"))?;
        rename(&fresh, KEY.to_owned())
    }

    /// The version of the client on PATH, once `ssh-keygen` was seen to be there too.
    pub async fn version(environment: &[(String, OsString)]) -> Result<String, Cause> {
        let path = environment.iter().find(|(name, _)| name == "PATH").map(|(_, path)| path.clone());
        let mut folders = std::env::split_paths(path.as_deref().unwrap_or_default());
        let version = Command::new("ssh")
            .arg("-V")
            .env_clear()
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(VERSION_WITHIN, version).await.map_err(|_| Cause::Slow(VERSION_WITHIN))?;
        let output = output.map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Cause::NoSsh,
            _ => Cause::NotStarted(error.to_string()),
        })?;
        if !output.status.success() {
            return Err(Cause::NotStarted(output.status.to_string()));
        }
        if !folders.any(|folder| folder.join("ssh-keygen").is_file()) {
            return Err(Cause::NotStarted("`ssh-keygen` is not on PATH".to_owned()));
        }
        Ok(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            // Its messages are read to tell causes apart, so they must not be translated.
            .env("LC_ALL", "C")
            .current_dir(&self.folder);
        command
    }

    /// Starts ssh with one forward. It ends when the returned value is dropped, or its holder dies.
    pub fn forward(&self, forward: &Forward) -> Result<Tunnel, Cause> {
        // ssh would make it readable by others; which hosts we know is nobody's business.
        let known_hosts = self.folder.join(KNOWN_HOSTS);
        let opened = OpenOptions::new().append(true).create(true).mode(0o600).open(&known_hosts);
        opened.map_err(|error| Cause::NotStarted(format!("{}: {error}", known_hosts.display())))?;
        let mut command = self.command("ssh");
        command.args(["-F", "none", "-T"]);
        let options = [
            "BatchMode=yes",
            "ExitOnForwardFailure=yes",
            "ServerAliveInterval=15",
            "ServerAliveCountMax=3",
            "ConnectTimeout=10",
            "StrictHostKeyChecking=accept-new",
            &format!("UserKnownHostsFile={KNOWN_HOSTS}"),
            "GlobalKnownHostsFile=/dev/null",
            &format!("HostKeyAlias={}", forward.host_key_alias),
            "UpdateHostKeys=no",
            "ControlMaster=no",
            "ControlPath=none",
            "PermitLocalCommand=no",
            "RemoteCommand=none",
            "StdinNull=no",
            "ForkAfterAuthentication=no",
            "SessionType=default",
            "LogLevel=INFO",
            "IdentitiesOnly=yes",
        ];
        for option in options {
            command.args(["-o", option]);
        }
        command
            .args(["-i", KEY])
            .args(["-L", &format!("127.0.0.1:{}:127.0.0.1:{}", forward.local_port, forward.remote_port)])
            .args(["-p", &forward.port.to_string()])
            // A user or host that begins with a dash would be read as an option.
            .args(["-l", &forward.user])
            .args(["--", &forward.host, HOLD])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Cause::NoSsh,
            _ => Cause::NotStarted(error.to_string()),
        })?;
        let stderr = Arc::new(Mutex::new(Vec::new()));
        let (ready, on_ready) = oneshot::channel();
        if let (Some(out), Some(err)) = (child.stdout.take(), child.stderr.take()) {
            tokio::spawn(watch_for_ready(out, ready));
            tokio::spawn(keep_lines(err, stderr.clone()));
        }
        let stdin = child.stdin.take();
        Ok(Tunnel { pid: child.id(), child, _stdin: stdin, on_ready: Some(on_ready), stderr })
    }
}

/// A running ssh that holds one forward.
#[derive(Debug)]
pub struct Tunnel {
    pub pid: Option<u32>,
    child: Child,
    _stdin: Option<ChildStdin>,
    on_ready: Option<oneshot::Receiver<()>>,
    stderr: Arc<Mutex<Vec<String>>>,
}

impl Tunnel {
    /// Waits for the READY line; the cause when ssh ends or time is up before it. Cancel-safe.
    pub async fn ready(&mut self, patience: Duration) -> Result<(), Cause> {
        let Some(on_ready) = &mut self.on_ready else { return Ok(()) };
        match tokio::time::timeout(patience, on_ready).await {
            Ok(Ok(())) => {
                self.on_ready = None;
                Ok(())
            }
            Ok(Err(_)) => Err(self.ended().await),
            Err(_) => Err(Cause::Slow(patience)),
        }
    }

    /// Waits until ssh has ended, and says why. Cancel-safe.
    pub async fn ended(&mut self) -> Cause {
        let status = self.child.wait().await;
        // The reader of stderr may be a moment behind the exit.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let lines = self.stderr.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        classify(&lines, &status)
    }

    /// Ends ssh and proves it.
    pub async fn stop(mut self) {
        let _ = self.child.kill().await;
    }
}

async fn watch_for_ready(stdout: impl AsyncRead + Unpin, ready: oneshot::Sender<()>) {
    let mut lines = BufReader::new(stdout).lines();
    let mut ready = Some(ready);
    // Read on after it, so that a chatty far end can't fill the pipe.
    while let Ok(Some(line)) = lines.next_line().await {
        if line.trim() == READY
            && let Some(ready) = ready.take()
        {
            let _ = ready.send(());
        }
    }
}

async fn keep_lines(stderr: impl AsyncRead + Unpin, kept: Arc<Mutex<Vec<String>>>) {
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        tracing::debug!(ssh = %line);
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == MOST_STDERR_LINES {
            kept.remove(0);
        }
        kept.push(line);
    }
}

/// Ends an ssh whose keeper was killed. It ends with its stdin, but not as long as somebody has a connection open
/// through it, and until then it holds the port. `false` when it could not be ended.
pub async fn end_leftover(pid: u32, pod_id: &str) -> bool {
    // Process ids are given to others again: only what is still an ssh to this pod is ended.
    let mark = format!("HostKeyAlias=autopod-{pod_id}-");
    let lives = || command_line(pid).is_some_and(|line| line.contains(&mark));
    let Some(process) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return true };
    for _ in 0..100 {
        if !lives() {
            return true;
        }
        let _ = rustix::process::kill_process(process, Signal::KILL);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    false
}

#[cfg(target_os = "linux")]
fn command_line(pid: u32) -> Option<String> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    Some(String::from_utf8_lossy(&line).replace('\0', " "))
}

#[cfg(not(target_os = "linux"))]
fn command_line(pid: u32) -> Option<String> {
    let output = std::process::Command::new("ps").args(["-ww", "-o", "args=", "-p", &pid.to_string()]).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// ssh exits with 255 for network, authentication and bind alike; only its messages tell them apart.
fn classify(lines: &[String], status: &str) -> Cause {
    // Lines about a channel speak of one forwarded connection, not of the session.
    let session: Vec<_> = lines.iter().filter(|line| !line.starts_with("channel ")).collect();
    let says = |text: &str| session.iter().any(|line| line.contains(text));
    let last = || session.last().map_or_else(|| status.to_owned(), |line| line.trim().to_owned());
    if says("REMOTE HOST IDENTIFICATION HAS CHANGED") || says("Host key verification failed") {
        Cause::HostKeyChanged
    } else if says("Permission denied") || says("Too many authentication failures") {
        Cause::KeyRefused
    } else if says("Address already in use")
        || says("cannot listen to port")
        || says("Could not request local forwarding")
    {
        Cause::PortInUse
    } else if lines.iter().any(|line| line.contains("administratively prohibited")) && session.is_empty() {
        Cause::ForwardingRefused
    } else if says("Connection refused") {
        Cause::SshdNotUp
    } else if ["timed out", "No route to host", "Network is unreachable", "Could not resolve"]
        .iter()
        .any(|text| says(text))
        && !says("Timeout, server")
    {
        Cause::Unreachable(last())
    } else {
        Cause::Lost(last())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_apart_by_what_ssh_says() {
        let says = |text: &str| classify(&text.lines().map(str::to_owned).collect::<Vec<_>>(), "exit status: 255");
        assert_eq!(says("root@127.0.0.1: Permission denied (publickey)."), Cause::KeyRefused);
        assert_eq!(
            says(
                "bind [127.0.0.1]:8188: Address already in use\nchannel_setup_fwd_listener_tcpip: cannot listen to port: 8188"
            ),
            Cause::PortInUse
        );
        assert_eq!(says("@  WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!  @"), Cause::HostKeyChanged);
        assert_eq!(says("ssh: connect to host 127.0.0.1 port 1: Connection refused"), Cause::SshdNotUp);
        assert!(matches!(says("ssh: connect to host 10.0.0.1 port 22: Connection timed out"), Cause::Unreachable(_)));
        assert!(matches!(says("Timeout, server 127.0.0.1 not responding."), Cause::Lost(_)));
        assert!(matches!(
            says(
                "channel 2: open failed: connect failed: Connection refused\nConnection to 127.0.0.1 closed by remote host."
            ),
            Cause::Lost(_)
        ));
    }
}
