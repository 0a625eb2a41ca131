//! Locks and atomic JSON files.
//!
//! A lock is a permanent file of its own beside the data, never the data (a rename changes the inode) and never
//! deleted. The kernel frees it when its holder dies, so there is no question of stale process ids.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fs2::FileExt;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{} can't be {doing}", path.display())]
    Io { path: PathBuf, doing: &'static str, source: std::io::Error },
    #[error("{} is held by {holder} for longer than {waited:?}", path.display())]
    Locked { path: PathBuf, holder: String, waited: Duration },
    #[error("{} was written by a newer version (schema {found}, this version knows {known}); it was left alone", path.display())]
    Newer { path: PathBuf, found: u32, known: u32 },
    #[error("{} is no JSON of ours", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
}

fn io(path: &Path, doing: &'static str) -> impl FnOnce(std::io::Error) -> StateError {
    move |source| StateError::Io { path: path.to_owned(), doing, source }
}

const TEMPORARY: &str = ".writing-";

/// An exclusive lock, freed when dropped or when the process dies.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Lock {
    /// `None` when another process (or another handle of this one) holds it. The holder's process id is written
    /// inside, for messages only.
    pub fn try_take(path: &Path) -> Result<Option<Self>, StateError> {
        if let Some(folder) = path.parent() {
            make_private_folder(folder)?;
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(io(path, "opened"))?;
        match file.try_lock_exclusive() {
            Ok(()) => {
                file.set_len(0).and_then(|()| file.rewind()).map_err(io(path, "written"))?;
                // A full disk must not keep a lock from being taken: the pid only serves messages.
                let _ = write!(file, "{}", std::process::id());
                Ok(Some(Self { file }))
            }
            Err(error) if error.kind() == fs2::lock_contended_error().kind() => Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Ok(None),
            Err(error) => Err(io(path, "locked")(error)),
        }
    }

    /// Waits with jitter until `patience` is over. Blocks the thread.
    pub fn take(path: &Path, patience: Duration) -> Result<Self, StateError> {
        let started = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            if let Some(lock) = Self::try_take(path)? {
                return Ok(lock);
            }
            if started.elapsed() >= patience {
                let holder = holder(path).map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"));
                return Err(StateError::Locked { path: path.to_owned(), holder, waited: patience });
            }
            let jitter = Duration::from_micros(u64::from(uuid::Uuid::new_v4().as_fields().1) % 2000);
            std::thread::sleep(pause + jitter);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Between fork and exec a child shares the lock, so closing the file alone may not free it yet.
        let _ = FileExt::unlock(&self.file);
    }
}

/// The process id that the holder of a lock wrote into it, if it did.
pub fn holder(path: &Path) -> Option<u32> {
    let mut text = String::new();
    File::open(path).ok()?.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// Whether somebody holds the lock now.
pub fn is_held(path: &Path) -> bool {
    path.exists() && matches!(Lock::try_take_shared(path), Ok(false))
}

impl Lock {
    /// Whether a shared lock could be had; unlike an exclusive probe it doesn't disturb other probes.
    fn try_take_shared(path: &Path) -> Result<bool, StateError> {
        let file = File::open(path).map_err(io(path, "opened"))?;
        match FileExt::try_lock_shared(&file) {
            Ok(()) => {
                let _ = FileExt::unlock(&file);
                Ok(true)
            }
            Err(error) if error.kind() == fs2::lock_contended_error().kind() => Ok(false),
            Err(error) => Err(io(path, "locked")(error)),
        }
    }
}

/// Creates a folder and its parents, closed to others.
pub fn make_private_folder(path: &Path) -> Result<(), StateError> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io(path, "created"))
}

/// `None` when there is no such file.
pub fn read_file(path: &Path) -> Result<Option<Vec<u8>>, StateError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io(path, "read")(error)),
    }
}

/// Replaces the file so that after a crash there is the old content or the new, mode 0600.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), StateError> {
    replace(path, bytes, true)
}

/// Like [`write_file`], but what was written last may be lost with the power: for what is soon written again.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<(), StateError> {
    replace(path, bytes, false)
}

fn replace(path: &Path, bytes: &[u8], durable: bool) -> Result<(), StateError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let mut temporary = temporary_file(folder)?;
    temporary.write_all(bytes).map_err(io(path, "written"))?;
    if durable {
        temporary.as_file().sync_all().map_err(io(path, "written"))?;
    }
    temporary.persist(path).map_err(|error| io(path, "replaced")(error.error))?;
    if !durable {
        return Ok(());
    }
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io(folder, "synced"))
}

/// A file of its own that goes with the value, or is swept later when its process was killed.
pub fn temporary_file(folder: &Path) -> Result<NamedTempFile, StateError> {
    make_private_folder(folder)?;
    tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(folder).map_err(io(folder, "written"))
}

/// Removes what writers that were killed left behind. One that writes at this moment is younger than a minute.
pub fn sweep_temporary_files(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(TEMPORARY)) {
        let age = entry.metadata().and_then(|metadata| metadata.modified()).ok().and_then(|at| at.elapsed().ok());
        if age.is_some_and(|age| age > Duration::from_secs(60)) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Like [`write_file`], as JSON.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), StateError> {
    let bytes =
        serde_json::to_vec_pretty(value).map_err(|source| StateError::Json { path: path.to_owned(), source })?;
    write_file(path, &bytes)
}

/// Moves a file that can't be read aside, so that nothing is lost, and says where it went. What was set aside before
/// under that name stays: a number is added.
pub fn set_aside(path: &Path, suffix: &str) -> Result<PathBuf, StateError> {
    let name = path.file_name().unwrap_or_default();
    let named = |end: &str| {
        let mut name = name.to_owned();
        name.push(format!(".{suffix}{end}"));
        path.with_file_name(name)
    };
    let numbered = (2..).map(|number: u32| named(&format!("-{number}")));
    let free = |aside: &PathBuf| aside.symlink_metadata().is_err();
    let aside = std::iter::once(named("")).chain(numbered).find(free).unwrap_or_else(|| named(""));
    std::fs::rename(path, &aside).map_err(io(path, "moved aside"))?;
    Ok(aside)
}

/// The end of the name under which a file of the predecessor is kept.
pub const PREDECESSOR: &str = "autopod-v1";
/// The beginning of what is added to the name of a broken file.
pub const CORRUPT: &str = "corrupt-";

const SCHEMA: u32 = 1;

/// The entries of a record file, by name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Records<E> {
    pub schema: u32,
    /// Raised by every write.
    pub revision: u64,
    pub entries: BTreeMap<String, E>,
}

impl<E> Default for Records<E> {
    fn default() -> Self {
        Self { schema: SCHEMA, revision: 0, entries: BTreeMap::new() }
    }
}

/// A JSON file of named entries that many processes change, each under the lock and after reading it anew.
#[derive(Debug)]
pub struct RecordFile<E> {
    path: PathBuf,
    lock: PathBuf,
    patience: Duration,
    entries: std::marker::PhantomData<fn() -> E>,
}

impl<E> Clone for RecordFile<E> {
    fn clone(&self) -> Self {
        Self::new(self.path.clone(), self.lock.clone(), self.patience)
    }
}

impl<E> RecordFile<E> {
    pub fn new(path: PathBuf, lock: PathBuf, patience: Duration) -> Self {
        Self { path, lock, patience, entries: std::marker::PhantomData }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl<E: Serialize + DeserializeOwned + PartialEq + Clone + Send + 'static> RecordFile<E> {
    /// What is on disk now. Needs no lock, for the file is only ever replaced whole.
    pub fn read(&self) -> Result<Records<E>, StateError> {
        let Some(bytes) = read_file(&self.path)? else { return Ok(Records::default()) };
        self.parse(&bytes).unwrap_or_else(|_| {
            // Only a writer sets a broken file aside; a reader would race with it.
            let _lock = Lock::take(&self.lock, self.patience)?;
            self.read_or_set_aside()
        })
    }

    /// Like [`Self::read`], but a file that can't be read is an error and stays where it is.
    pub fn look(&self) -> Result<Records<E>, StateError> {
        let Some(bytes) = read_file(&self.path)? else { return Ok(Records::default()) };
        self.parse(&bytes).unwrap_or_else(|source| Err(StateError::Json { path: self.path.clone(), source }))
    }

    /// Changes the entries under the lock; writes only when something changed, and not at all when `change` fails.
    pub async fn change<R: Send + 'static>(
        &self,
        change: impl FnOnce(&mut BTreeMap<String, E>) -> R + Send + 'static,
    ) -> Result<R, StateError> {
        let this = self.clone();
        let work = move || {
            let _lock = Lock::take(&this.lock, this.patience)?;
            let mut records = this.read_or_set_aside()?;
            let before = records.entries.clone();
            let result = change(&mut records.entries);
            if records.entries != before {
                records.revision += 1;
                write_json(&this.path, &records)?;
            }
            Ok(result)
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }

    fn read_or_set_aside(&self) -> Result<Records<E>, StateError> {
        let Some(bytes) = read_file(&self.path)? else { return Ok(Records::default()) };
        self.parse(&bytes).unwrap_or_else(|reason| {
            let file = self.path.display();
            if is_the_predecessors(&bytes) {
                let aside = set_aside(&self.path, PREDECESSOR)?;
                tracing::warn!(
                    "{file} was written by the predecessor of this program; it is kept as {}. What it tells of is not \
                     managed here: pods that it names may still run and cost money",
                    aside.display()
                );
            } else {
                let now = jiff::Timestamp::now().as_second();
                let aside = set_aside(&self.path, &format!("{CORRUPT}{now}"))?;
                tracing::warn!("{file} can't be read ({reason}); it is kept as {}", aside.display());
            }
            Ok(Records::default())
        })
    }

    /// The outer error is for content that isn't ours to read: broken, or of the predecessor's shape.
    fn parse(&self, bytes: &[u8]) -> Result<Result<Records<E>, StateError>, serde_json::Error> {
        #[derive(Deserialize)]
        struct Version {
            schema: u32,
        }
        let version: Version = serde_json::from_slice(bytes)?;
        if version.schema > SCHEMA {
            return Ok(Err(StateError::Newer { path: self.path.clone(), found: version.schema, known: SCHEMA }));
        }
        serde_json::from_slice(bytes).map(Ok)
    }
}

/// JSON of our own always names its schema; the predecessor's files never did.
fn is_the_predecessors(bytes: &[u8]) -> bool {
    match serde_json::from_slice(bytes) {
        Ok(serde_json::Value::Object(fields)) => !fields.contains_key("schema"),
        Ok(other) => other.is_array(),
        Err(_) => false,
    }
}
