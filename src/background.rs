//! Detached processes of ours: starting one, waiting until it is ready, knowing whether it lives (it holds a lock for
//! life). The client of the keeper is in `background/keeper_client.rs`.

mod keeper_client;

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::io::AsyncWriteExt;
use tokio::process::{ChildStdin, Command};

use crate::state::{self, StateError};

pub use keeper_client::{
    Hello, KeeperClient, KeeperError, KeeperSeed, Request, account_of, launch_keeper, socket_path,
};

#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("`{program} {command}` can't be started", program = program.display())]
    Spawn { program: PathBuf, command: &'static str, source: std::io::Error },
    #[error(transparent)]
    State(#[from] StateError),
}

/// How this program starts itself again.
#[derive(Debug, Clone)]
pub struct Launcher {
    /// Passed in from `main`: under `cargo test` the running executable is the test's.
    pub program: PathBuf,
    /// The whole environment of the child; the key is never in it.
    pub environment: Vec<(String, OsString)>,
}

impl Launcher {
    /// Starts `program command arguments...` with `first_line` on its stdin and its output in a log. The child leaves
    /// our session itself (first thing it does), so that it outlives our terminal and process group. Dropping the
    /// returned stdin closes it, which a tethered child takes as the order to end.
    pub async fn start(
        &self,
        command: &'static str,
        arguments: &[OsString],
        first_line: &str,
        log: &Path,
    ) -> Result<(u32, ChildStdin), LaunchError> {
        if let Some(folder) = log.parent() {
            state::make_private_folder(folder)?;
        }
        let log_file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(log)
            .map_err(|source| StateError::Io { path: log.to_owned(), doing: "opened", source })?;
        let failed = |source| LaunchError::Spawn { program: self.program.clone(), command, source };
        let mut child = Command::new(&self.program)
            .arg0("autopod-mcp")
            .arg(command)
            .args(arguments)
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log_file)
            .kill_on_drop(false)
            .spawn()
            .map_err(failed)?;
        let pid = child.id().unwrap_or_default();
        let mut stdin = child.stdin.take().ok_or_else(|| failed(std::io::ErrorKind::BrokenPipe.into()))?;
        stdin.write_all(format!("{first_line}\n").as_bytes()).await.map_err(failed)?;
        stdin.flush().await.map_err(failed)?;
        // Somebody has to take its exit status, or it stays a zombie as long as we live.
        tokio::spawn(async move { child.wait().await });
        Ok((pid, stdin))
    }
}
