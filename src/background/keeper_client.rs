//! The client of the keeper: is there one, does it have the key, wake it, start it.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::{LaunchError, Launcher, Started, version};
use crate::config::Home;
use crate::state::{self, Lock, StateError};
use crate::timing::Timing;

/// One line to the keeper.
#[derive(Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Request {
    Hello,
    /// The key it lacks, or a newer one. Only ever over the 0600 socket.
    Key {
        key: String,
    },
    /// Records were changed: compare now.
    Wake,
    /// Somebody saw a pod of this home that no record knows.
    LookForPods,
    /// Start nothing new and end, so that a newer version can take over.
    Retire,
}

/// What a keeper says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Hello {
    pub pid: u32,
    pub version: String,
    pub has_key: bool,
    /// Which account its key is for, as [`account_of`] tells; `None` without a key.
    pub account: Option<String>,
    /// The provider's origin that it talks to.
    pub origin: String,
    /// It was told to end and starts nothing new.
    pub is_ending: bool,
    /// Milliseconds since its loop last compared wanted with known.
    pub loop_age_ms: u64,
}

/// The first line on a new keeper's stdin.
#[derive(Clone, Serialize, Deserialize)]
pub struct KeeperSeed {
    pub key: Option<String>,
    pub origin: String,
    /// End when stdin ends.
    pub tethered: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    #[error("the keeper (the background process that holds pods and tunnels) can't be started")]
    Launch(#[from] LaunchError),
    #[error("the keeper did not answer within {waited:?}; its log is {}", log.display())]
    Silent { waited: Duration, log: PathBuf },
    #[error(
        "version {newer} of this program keeps this home, and this is {}; restart the client so that it starts the newer one",
        version::OURS
    )]
    Newer { newer: String },
    #[error(transparent)]
    State(#[from] StateError),
}

/// Where the keeper of a home listens. A socket's path is limited to about 100 bytes, so a deep home gets a private
/// folder under `/tmp`, named by who and which home.
pub fn socket_path(home: &Home) -> PathBuf {
    let direct = home.root().join("keeper.sock");
    if direct.as_os_str().len() <= 100 {
        return direct;
    }
    let name = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_URL, home.root().as_os_str().as_bytes()).simple();
    let user = rustix::process::getuid().as_raw();
    Path::new("/tmp").join(format!("autopod-{user}-{name}")).join("keeper.sock")
}

/// The provider's origin and a fingerprint of the key.
pub fn account_of(origin: &str, key: &SecretString) -> String {
    let fingerprint = uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_URL, key.expose_secret().as_bytes()).simple();
    format!("{origin} {fingerprint}")
}

/// What lies in a folder of somebody else's may be somebody else's socket, and the key goes over it.
pub fn refuse_foreign_folder(socket: &Path) -> std::io::Result<()> {
    let Some(folder) = socket.parent() else { return Ok(()) };
    // Not through a link: whoever owns that could turn it.
    let metadata = std::fs::symlink_metadata(folder)?;
    let ours = metadata.is_dir() && metadata.uid() == rustix::process::getuid().as_raw();
    if ours && metadata.permissions().mode() & 0o077 == 0 {
        return Ok(());
    }
    Err(std::io::Error::other(format!("{} belongs to another user or is open to others", folder.display())))
}

#[derive(Debug)]
pub struct KeeperClient {
    home: Home,
    timing: Timing,
    /// `None` in tests that run the keeper as a task: then it is never started here.
    launcher: Option<Launcher>,
    key: Option<SecretString>,
    origin: String,
    /// Tethered keepers, which end with this process.
    tether: Option<Mutex<Vec<Started>>>,
}

impl KeeperClient {
    pub fn new(
        home: &Home,
        timing: &Timing,
        launcher: Option<Launcher>,
        key: Option<SecretString>,
        origin: &str,
        tethered: bool,
    ) -> Self {
        Self {
            home: home.clone(),
            timing: timing.clone(),
            launcher,
            key,
            origin: origin.to_owned(),
            tether: tethered.then(Mutex::default),
        }
    }

    /// Which account this client speaks for.
    pub fn account(&self) -> Option<String> {
        Some(account_of(&self.origin, self.key.as_ref()?))
    }

    /// The key and the provider's origin that this client was made with.
    pub fn access(&self) -> (Option<SecretString>, &str) {
        (self.key.clone(), &self.origin)
    }

    /// Whether a keeper holds its lock, so that what it wrote as known still counts.
    pub fn is_alive(&self) -> bool {
        state::is_held(&self.home.lock("keeper"))
    }

    /// Starts the keeper if there is none, gives it the key if it lacks one, and has it look at the records now.
    pub async fn ensure_and_wake(&self) -> Result<(), KeeperError> {
        let started = Instant::now();
        let mut killed_wedged = false;
        loop {
            let hello = self.hello().await;
            // One that is ending may wait for the answer to a POST, so it is not wedged.
            let answered = hello.is_some();
            match hello.filter(|hello| !hello.is_ending) {
                // Its successor would get no key from us, and without one nobody keeps the deadlines.
                Some(hello) if hello.has_key && self.key.is_none() => {
                    let _ = self.send(&Request::Wake).await;
                    return Ok(());
                }
                Some(hello) if hello.origin != self.origin => {
                    tracing::info!(from = hello.origin, to = self.origin, "the keeper is replaced");
                    self.retire().await;
                }
                Some(hello) if version::is_newer(version::OURS, &hello.version) => {
                    tracing::info!(from = hello.version, to = version::OURS, "a newer version takes over");
                    self.retire().await;
                }
                Some(hello) => {
                    if let Some(key) = self.key.as_ref().filter(|_| hello.account != self.account()) {
                        let _ = self.send(&Request::Key { key: key.expose_secret().to_owned() }).await;
                    }
                    let _ = self.send(&Request::Wake).await;
                    return Ok(());
                }
                None => {}
            }
            if !self.is_alive() {
                self.launch().await?;
            } else if !answered && started.elapsed() >= self.timing.keeper_hello && !killed_wedged {
                killed_wedged = true;
                self.kill_wedged();
            }
            if started.elapsed() >= self.timing.keeper_hello * 2 {
                return Err(KeeperError::Silent { waited: started.elapsed(), log: self.log() });
            }
            tokio::time::sleep(self.timing.record_poll).await;
        }
    }

    pub async fn hello(&self) -> Option<Hello> {
        let line = self.send(&Request::Hello).await.ok()?;
        serde_json::from_str(&line).ok()
    }

    /// Ends tethered keepers and waits until they have ended.
    pub async fn let_go(&self) {
        let Some(tether) = &self.tether else { return };
        let keepers = std::mem::take(&mut *tether.lock().unwrap_or_else(PoisonError::into_inner));
        for keeper in keepers {
            keeper.let_go(self.timing.keeper_hello).await;
        }
    }

    /// Has the keeper look for pods of this home that no record knows, which it does by itself only now and then.
    pub async fn look_for_pods(&self) {
        let _ = self.send(&Request::LookForPods).await;
    }

    pub async fn retire(&self) {
        let _ = self.send(&Request::Retire).await;
    }

    fn log(&self) -> PathBuf {
        self.home.logs().join("keeper.log")
    }

    /// Starts one, unless somebody else is starting one at this moment, or has.
    async fn launch(&self) -> Result<(), KeeperError> {
        let Some(launcher) = &self.launcher else { return Ok(()) };
        let Some(_starting) = Lock::try_take(&self.home.lock("keeper-start"))? else { return Ok(()) };
        if self.is_alive() {
            return Ok(());
        }
        if let Some(newer) = version::newer_keeper(&self.home) {
            return Err(KeeperError::Newer { newer });
        }
        let seed = KeeperSeed {
            key: self.key.as_ref().map(|key| key.expose_secret().to_owned()),
            origin: self.origin.clone(),
            tethered: self.tether.is_some(),
        };
        let keeper = launch_keeper(launcher, &self.home, &seed).await?;
        if let Some(tether) = &self.tether {
            tether.lock().unwrap_or_else(PoisonError::into_inner).push(keeper);
        }
        // The start lock is held until the new keeper has its own, so that nobody starts a second one.
        let started = Instant::now();
        while !self.is_alive() && started.elapsed() < self.timing.keeper_hello {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Ends a keeper that holds its lock but has not answered. That the lock is still held proves that the process
    /// id inside is that of its holder.
    fn kill_wedged(&self) {
        let path = self.home.lock("keeper");
        let pid = state::holder(&path).and_then(|pid| rustix::process::Pid::from_raw(pid as i32));
        if let Some(pid) = pid.filter(|_| state::is_held(&path)) {
            tracing::warn!(pid = pid.as_raw_nonzero().get(), "the keeper is wedged and is ended");
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }

    async fn send(&self, request: &Request) -> std::io::Result<String> {
        let talk = async {
            let path = socket_path(&self.home);
            refuse_foreign_folder(&path)?;
            let mut stream = UnixStream::connect(path).await?;
            let mut line = serde_json::to_string(request).map_err(std::io::Error::other)?;
            line.push('\n');
            stream.write_all(line.as_bytes()).await?;
            let mut answer = String::new();
            BufReader::new(stream.take(64 * 1024)).read_line(&mut answer).await?;
            Ok(answer)
        };
        tokio::time::timeout(Duration::from_secs(2), talk)
            .await
            .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
    }
}

/// Starts a keeper's guard, which starts the worker.
pub async fn launch_keeper(launcher: &Launcher, home: &Home, seed: &KeeperSeed) -> Result<Started, KeeperError> {
    let line = serde_json::to_string(seed).map_err(|source| StateError::Json { path: home.keeper_file(), source })?;
    Ok(launcher.start("keeper", &[home.root().into()], &line, &home.logs().join("keeper.log")).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_goes_to_no_socket_in_a_folder_that_others_may_write_to() {
        let folder = tempfile::tempdir().unwrap();
        let private = folder.path().join("private");
        let open = folder.path().join("open");
        let linked = folder.path().join("linked");
        for (path, mode) in [(&private, 0o700), (&open, 0o777)] {
            std::fs::create_dir(path).unwrap();
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        std::os::unix::fs::symlink(&private, &linked).unwrap();
        assert!(refuse_foreign_folder(&private.join("keeper.sock")).is_ok());
        assert!(refuse_foreign_folder(&open.join("keeper.sock")).is_err());
        assert!(refuse_foreign_folder(&linked.join("keeper.sock")).is_err());
    }
}
