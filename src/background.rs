//! Detached processes of ours: starting one, waiting until it is ready, knowing whether it lives (it holds a lock for
//! life). The client of the keeper is in `background/keeper_client.rs`.

mod keeper_client;
pub mod version;

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::{ChildStdin, Command};
use tokio_util::sync::CancellationToken;

use crate::state::{self, StateError};

pub use keeper_client::{
    Hello, KeeperClient, KeeperError, KeeperSeed, Request, account_of, launch_keeper, refuse_foreign_folder,
    socket_path,
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
    /// our session itself (first thing it does), so that it outlives our terminal and process group.
    pub async fn start(
        &self,
        command: &'static str,
        arguments: &[OsString],
        first_line: &str,
        log: &Path,
    ) -> Result<Started, LaunchError> {
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
        let mut stdin = child.stdin.take().ok_or_else(|| failed(std::io::ErrorKind::BrokenPipe.into()))?;
        stdin.write_all(format!("{first_line}\n").as_bytes()).await.map_err(failed)?;
        stdin.flush().await.map_err(failed)?;
        let ended = CancellationToken::new();
        // Somebody has to take its exit status, or it stays a zombie as long as we live.
        tokio::spawn({
            let ended = ended.clone();
            async move {
                let _ = child.wait().await;
                ended.cancel();
            }
        });
        Ok(Started { stdin, ended })
    }
}

/// A process that was started, as long as we care. Letting go of it ends a tethered one and no other.
#[derive(Debug)]
pub struct Started {
    stdin: ChildStdin,
    ended: CancellationToken,
}

impl Started {
    /// Closes its stdin, which a tethered process takes as the order to end, and waits until it has.
    pub async fn let_go(self, patience: Duration) -> bool {
        drop(self.stdin);
        tokio::time::timeout(patience, self.ended.cancelled()).await.is_ok()
    }
}
