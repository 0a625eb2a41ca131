//! The only module that starts `ssh`: its options, its causes of failure, our own key.
//!
//! ssh runs in `<home>/ssh` with relative file names, for it splits `UserKnownHostsFile` at blanks and expands `%`,
//! and with a cleared environment and `-F none`, for a user's ssh config can defeat a tunnel in many ways.
//!
//! What it is started for: a tunnel (`forward.rs`), one command in a pod (`run.rs`), files to and from it
//! (`copy.rs`), the user's own shell ([`Ssh::shell`]).

mod cause;
mod copy;
mod elsewhere;
mod forward;
mod run;

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use crate::state::{self, Lock, StateError};

pub use cause::Cause;
pub use copy::CopyError;
pub use elsewhere::is_used_elsewhere;
pub use forward::{Forward, Tunnel, end_leftover};
pub use run::{Limits, Output, Session, Stdin};

const KEY: &str = "id_ed25519";
const KNOWN_HOSTS: &str = "known_hosts";
/// How long `ssh -V` may take.
const VERSION_WITHIN: Duration = Duration::from_secs(5);
const HOST_KEY_ALIAS: &str = "HostKeyAlias";
/// Options of every connection. No file of the user's or the machine's has a say, and nothing outlives our child.
const OPTIONS: [&str; 14] = [
    "ServerAliveInterval=15",
    "ServerAliveCountMax=3",
    "ConnectTimeout=10",
    "StrictHostKeyChecking=accept-new",
    "GlobalKnownHostsFile=/dev/null",
    "UpdateHostKeys=no",
    "ControlMaster=no",
    "ControlPath=none",
    "PermitLocalCommand=no",
    "RemoteCommand=none",
    "StdinNull=no",
    "ForkAfterAuthentication=no",
    "SessionType=default",
    "IdentitiesOnly=yes",
];

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

/// Where a pod's sshd is reached, and under which name its host key is pinned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub user: String,
    pub host: String,
    pub port: u16,
    /// See [`host_key_alias`].
    pub host_key_alias: String,
}

/// Names a pod and one start of it: a pod has a new disk, and so a new host key, with each start; within one start the
/// key is pinned.
pub fn host_key_alias(pod_id: &str, start: impl std::fmt::Display) -> String {
    format!("autopod-{pod_id}-{start}")
}

/// A word that the pod's shell reads as it is.
pub fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Whether a person sits at our end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Terminal {
    /// Nobody can be asked, and the pod's end is given no terminal.
    None,
    Users,
}

/// Where ssh says what it has to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Log<'a> {
    Stderr,
    /// A file in its folder, with all that it takes to know how the command in the pod ended.
    File(&'a Path),
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

    /// ssh with everything but the host and the command.
    fn client(&self, target: &Target, terminal: Terminal, log: Log<'_>) -> Result<Command, Cause> {
        // ssh would make it readable by others; which hosts we know is nobody's business.
        let known_hosts = self.folder.join(KNOWN_HOSTS);
        let opened = OpenOptions::new().append(true).create(true).mode(0o600).open(&known_hosts);
        opened.map_err(|error| Cause::NotStarted(format!("{}: {error}", known_hosts.display())))?;
        let mut command = self.command("ssh");
        command.args(["-F", "none"]);
        match terminal {
            Terminal::None => command.args(["-T", "-o", "BatchMode=yes"]),
            Terminal::Users => command.arg("-t"),
        };
        match log {
            Log::Stderr => command.args(["-o", "LogLevel=INFO"]),
            Log::File(name) => command.args(["-o", "LogLevel=DEBUG1", "-E"]).arg(name),
        };
        for option in OPTIONS {
            command.args(["-o", option]);
        }
        command
            .args(["-o", &format!("UserKnownHostsFile={KNOWN_HOSTS}")])
            .args(["-o", &format!("{HOST_KEY_ALIAS}={}", target.host_key_alias)])
            .args(["-i", KEY])
            .args(["-p", &target.port.to_string()])
            // A user or host that begins with a dash would be read as an option.
            .args(["-l", &target.user]);
        Ok(command)
    }

    /// The user's own shell in the pod, to be started in place of this program: ssh then has the terminal and every
    /// signal to itself, and its exit code is ours.
    pub fn shell(&self, target: &Target) -> Result<std::process::Command, Cause> {
        let mut command = self.client(target, Terminal::Users, Log::Stderr)?;
        command.args(["--", &target.host]);
        Ok(command.into_std())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_a_quoted_word_as_it_is() {
        for word in ["plain", "", "two words", "it's", "$HOME `id` \\ \"x\" *", "a\nb", "''"] {
            let command = format!("printf %s {}", quoted(word));
            let output = std::process::Command::new("sh").args(["-c", &command]).output().expect("sh");
            assert_eq!(String::from_utf8_lossy(&output.stdout), word, "{command}");
        }
    }
}
