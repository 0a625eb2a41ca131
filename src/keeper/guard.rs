//! The guard: a process that holds the key and starts the worker again when it dies.

use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;

use crate::background::{KeeperSeed, Launcher};
use crate::config::Home;

const PAUSE_BEFORE_RESTART: Duration = Duration::from_millis(500);
/// The pause before a worker is started that has died at once again and again: starting it without end would keep the
/// machine busy and fill the log.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A worker that has lived for so long did not die at once.
const LIVED: Duration = Duration::from_secs(1);
/// How long a worker that was told to end may take before it is killed. A POST in flight is waited for by the worker
/// itself, and its intent is on disk.
const WORKER_ENDS_WITHIN: Duration = Duration::from_secs(60);

/// Keeps a worker running until one ends by itself or `stop` is cancelled.
pub async fn run(launcher: &Launcher, home: &Home, mut seed: KeeperSeed, stop: CancellationToken) {
    let mut pause = PAUSE_BEFORE_RESTART;
    while !stop.is_cancelled() {
        let started = Instant::now();
        match start_worker(launcher, home, &seed).await {
            Ok(worker) => {
                if watch_worker(worker, &mut seed, &stop).await {
                    return;
                }
                tracing::warn!("the keeper's worker died and is started again");
            }
            Err(error) => tracing::error!(%error, "the keeper's worker can't be started"),
        }
        pause = pause_after(started.elapsed(), pause);
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Half a second for one that worked, longer each time for one that doesn't.
fn pause_after(lived: Duration, last: Duration) -> Duration {
    if lived >= LIVED { PAUSE_BEFORE_RESTART } else { (last * 5 / 4).min(LONGEST_PAUSE) }
}

/// The worker's stderr is ours, the log; its stdout brings newer keys; its stdin ends with us.
async fn start_worker(launcher: &Launcher, home: &Home, seed: &KeeperSeed) -> std::io::Result<Child> {
    let mut child = Command::new(&launcher.program)
        .arg0("autopod-mcp")
        .arg("keeper")
        .arg(home.root())
        .arg("--worker")
        .env_clear()
        .envs(launcher.environment.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = serde_json::to_string(seed).map_err(std::io::Error::other)?;
    line.push('\n');
    if let Some(stdin) = &mut child.stdin {
        stdin.write_all(line.as_bytes()).await?;
    }
    Ok(child)
}

/// True when the worker ended by itself or was told to.
async fn watch_worker(mut worker: Child, seed: &mut KeeperSeed, stop: &CancellationToken) -> bool {
    // tokio's `wait` would close the stdin, by which the worker knows that we live.
    let stdin = worker.stdin.take();
    let mut keys = worker.stdout.take().map(|stdout| BufReader::new(stdout).lines());
    loop {
        let next_key = async {
            match &mut keys {
                Some(lines) => lines.next_line().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            status = worker.wait() => return status.is_ok_and(|status| status.success()),
            line = next_key => match line {
                Ok(Some(key)) => seed.key = Some(key),
                _ => keys = None,
            },
            () = stop.cancelled() => break,
        }
    }
    // By a signal, for the end of its stdin would tell it that we died, and it would start another guard.
    if let Some(pid) = worker.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) {
        let _ = kill_process(pid, Signal::TERM);
    }
    if tokio::time::timeout(WORKER_ENDS_WITHIN, worker.wait()).await.is_err() {
        let _ = worker.kill().await;
    }
    drop(stdin);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_dies_at_once_is_started_less_and_less_often() {
        let at_once = Duration::from_millis(20);
        let first = pause_after(at_once, PAUSE_BEFORE_RESTART);
        assert!(first < Duration::from_secs(1), "a kill may hit it at its start");
        let later = (0..30).fold(first, |pause, _| pause_after(at_once, pause));
        assert_eq!(later, LONGEST_PAUSE);
        assert_eq!(pause_after(Duration::from_secs(2), later), PAUSE_BEFORE_RESTART);
    }
}
