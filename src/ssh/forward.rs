//! The ssh child that holds a tunnel.

use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, ChildStdin};
use tokio::sync::oneshot;

use super::cause::classify;
use super::{Cause, HOST_KEY_ALIAS, Log, Ssh, Target, Terminal, host_key_alias};

/// The line by which the far end tells that the session, and so the forward, is up.
const READY: &str = "AUTOPOD_READY";
/// Keeps the session open until our end of its stdin closes, which happens when its holder dies too.
const HOLD: &str = "echo AUTOPOD_READY; exec cat >/dev/null";
/// What is kept of ssh's stderr to tell why it ended.
const MOST_STDERR_LINES: usize = 50;

/// One forward: `127.0.0.1:local_port` here to `127.0.0.1:remote_port` in the pod.
#[derive(Debug, Clone)]
pub struct Forward {
    pub target: Target,
    pub local_port: u16,
    pub remote_port: u16,
}

impl Ssh {
    /// Starts ssh with one forward. It ends when the returned value is dropped, or its holder dies.
    pub fn forward(&self, forward: &Forward) -> Result<Tunnel, Cause> {
        let mut command = self.client(&forward.target, Terminal::None, Log::Stderr)?;
        command
            .args(["-o", "ExitOnForwardFailure=yes"])
            .args(["-L", &format!("127.0.0.1:{}:127.0.0.1:{}", forward.local_port, forward.remote_port)])
            .args(["--", &forward.target.host, HOLD])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(Cause::of_spawn)?;
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
    let mark = format!("{HOST_KEY_ALIAS}={}", host_key_alias(pod_id, ""));
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
