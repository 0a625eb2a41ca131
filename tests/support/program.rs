//! The program itself, as tests start it and wait for what it does.

use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::Command;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_autopod-mcp");
/// No test measures by it: it only keeps a hang from lasting for ever. Generous, for the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The program with no environment but `PATH`, nothing on stdin, and its output for the test to read.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// Looks until there is something, or fails telling what was waited for.
pub async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(started.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain for {what}");
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}
