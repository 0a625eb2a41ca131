//! Runs as records on disk: `jobs/<prompt_id>.json` says how far a run has come, so that it is found again after the
//! process that started it ended, and `locks/job-<prompt_id>.lock` says whether a process works on it.
//!
//! The record is written before the first byte is sent. A write that fails later stops nothing: the run goes on and
//! the record is behind, which whoever takes the job up next makes good by asking the server.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::outputs::{OutputFile, OutputText, SavedFile, SkippedFile};
use super::watch::Progress;
use super::workflow::WorkflowError;
use super::{ComfyError, Failure, NodeError};
use crate::state::{self, Lock, StateError};

mod drive;

pub use drive::{DriveOptions, Start, drive};

/// The shape of the records; a higher one was written by a newer version of the program.
pub const SCHEMA: u32 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Nothing was sent yet.
    Prepared,
    Uploading,
    /// The workflow is being sent: whether the server has it is not known yet.
    Submitting,
    Pending,
    Running,
    Downloading,
    Done,
    Failed,
    Interrupted,
    /// The server knows nothing of it any more: cancelled, its history wiped, or the server restarted.
    Lost,
    /// The server refused the workflow.
    Rejected,
    /// It never got to the server: run it again.
    NotSubmitted,
}

impl JobState {
    /// Whether nothing will change any more.
    pub fn is_final(self) -> bool {
        use JobState::*;
        matches!(self, Done | Failed | Interrupted | Lost | Rejected | NotSubmitted)
    }
}

/// A local file for a loading node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobInput {
    /// As `Workflow::resolve` takes it.
    pub selector: String,
    pub path: PathBuf,
    /// The server's name for it, once it is there.
    #[serde(default)]
    pub uploaded: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JobRecord {
    pub schema: u32,
    pub prompt_id: Uuid,
    /// The id the server knows it by: the same, unless the server is an old one that gives its own.
    pub comfy_prompt_id: String,
    pub created_at: Timestamp,
    /// What the caller finds the server by again: the name of a pod, or an address.
    pub base: String,
    /// Belongs to this one prompt.
    pub client_id: String,
    pub state: JobState,
    /// The class of each node of the workflow.
    pub classes: BTreeMap<String, String>,
    pub inputs: Vec<JobInput>,
    pub output_dir: PathBuf,
    pub progress: Option<Progress>,
    /// What the server has for us; filled when the run is done.
    pub files: Vec<OutputFile>,
    pub saved: Vec<SavedFile>,
    pub skipped: Vec<SkippedFile>,
    pub texts: Vec<OutputText>,
    /// Why it ended badly, or why it doesn't go on at the moment.
    pub error: Option<String>,
    pub failure: Option<Failure>,
    /// Of a refused workflow, or of outputs that the server dropped while it ran the others.
    pub node_errors: Vec<NodeError>,
}

impl JobRecord {
    pub fn new(prompt_id: Uuid, created_at: Timestamp, base: &str, output_dir: &Path) -> Self {
        Self {
            schema: SCHEMA,
            prompt_id,
            comfy_prompt_id: prompt_id.to_string(),
            created_at,
            base: base.to_owned(),
            client_id: Uuid::new_v4().simple().to_string(),
            state: JobState::Prepared,
            classes: BTreeMap::new(),
            inputs: Vec::new(),
            output_dir: output_dir.to_owned(),
            progress: None,
            files: Vec::new(),
            saved: Vec::new(),
            skipped: Vec::new(),
            texts: Vec::new(),
            error: None,
            failure: None,
            node_errors: Vec::new(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error("there is no job {0}")]
    NotFound(Uuid),
    #[error("another process works on job {0}")]
    Held(Uuid),
    #[error("the record {path} can't be read: {reason}")]
    Unreadable { path: PathBuf, reason: String },
    #[error("the record {path} was written by a newer version (schema {schema}, this one knows {SCHEMA})")]
    Newer { path: PathBuf, schema: u32 },
    #[error("{path} can't be read or written")]
    Disk { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Workflow(#[from] WorkflowError),
    #[error(transparent)]
    Comfy(#[from] ComfyError),
}

/// Where the records lie.
#[derive(Debug, Clone)]
pub struct JobStore {
    jobs: PathBuf,
    locks: PathBuf,
}

/// A record held by this process: only through it is the record changed. Dropping it frees the lock.
#[derive(Debug)]
pub struct Job {
    store: JobStore,
    record: JobRecord,
    _lock: Lock,
}

impl JobStore {
    /// `home/jobs` and `home/locks`, made when they are needed.
    pub fn new(home: &Path) -> Self {
        Self { jobs: home.join("jobs"), locks: home.join("locks") }
    }

    /// Takes the lock and writes the record: if either fails, nothing may be sent.
    pub fn create(&self, record: JobRecord) -> Result<Job, JobError> {
        let id = record.prompt_id;
        let lock = self.try_lock(id)?.ok_or(JobError::Held(id))?;
        let job = Job { store: self.clone(), record, _lock: lock };
        job.write(true)?;
        Ok(job)
    }

    /// Takes up a job that nobody works on; [`JobError::Held`] when somebody does.
    pub fn take(&self, id: Uuid) -> Result<Job, JobError> {
        self.read(id)?;
        let lock = self.try_lock(id)?.ok_or(JobError::Held(id))?;
        // Read again under the lock: the one before may have gone on meanwhile.
        Ok(Job { store: self.clone(), record: self.read(id)?, _lock: lock })
    }

    pub fn read(&self, id: Uuid) -> Result<JobRecord, JobError> {
        let path = self.path(id);
        match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(JobError::NotFound(id)),
            Err(source) => Err(JobError::Disk { path, source }),
            Ok(bytes) => parse(path, &bytes),
        }
    }

    /// Whether a process works on it now.
    pub fn is_held(&self, id: Uuid) -> Result<bool, JobError> {
        Ok(state::is_held(&self.lock_path(id)))
    }

    /// All readable records, newest first.
    pub fn list(&self) -> Result<Vec<JobRecord>, JobError> {
        let disk = |source| JobError::Disk { path: self.jobs.clone(), source };
        let entries = match std::fs::read_dir(&self.jobs) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(disk)?,
        };
        let mut records = Vec::new();
        for entry in entries {
            let name = entry.map_err(disk)?.file_name();
            let id = name.to_str().and_then(|name| name.strip_suffix(".json")).and_then(|id| id.parse().ok());
            match id.map(|id| self.read(id)) {
                Some(Ok(record)) => records.push(record),
                Some(Err(error)) => tracing::warn!(%error, "a job is left out"),
                None => {}
            }
        }
        records.sort_by_key(|record| std::cmp::Reverse(record.created_at));
        Ok(records)
    }

    fn path(&self, id: Uuid) -> PathBuf {
        self.jobs.join(format!("{id}.json"))
    }

    /// `None` when another process, or another job value in this one, has it.
    fn try_lock(&self, id: Uuid) -> Result<Option<Lock>, JobError> {
        Ok(Lock::try_take(&self.lock_path(id))?)
    }

    fn lock_path(&self, id: Uuid) -> PathBuf {
        self.locks.join(format!("job-{id}.lock"))
    }
}

impl Job {
    pub fn record(&self) -> &JobRecord {
        &self.record
    }

    /// Changes the record and writes it through to the disk.
    fn update(&mut self, change: impl FnOnce(&mut JobRecord)) -> Result<(), JobError> {
        change(&mut self.record);
        self.write(true)
    }

    /// [`Job::update`] for what happens after the submit, where a full disk must not stop the run.
    fn note(&mut self, change: impl FnOnce(&mut JobRecord)) {
        if let Err(error) = self.update(change) {
            tracing::warn!(prompt_id = %self.record.prompt_id, %error, "the job's record is behind");
        }
    }

    /// Progress may be lost with the power, so it doesn't wait for the disk.
    fn note_progress(&mut self) {
        if let Err(error) = self.write(false) {
            tracing::debug!(prompt_id = %self.record.prompt_id, %error, "the job's progress wasn't written");
        }
    }

    fn write(&self, durable: bool) -> Result<(), JobError> {
        let path = self.store.path(self.record.prompt_id);
        let content = serde_json::to_vec_pretty(&self.record)
            .map_err(|error| JobError::Unreadable { path: path.clone(), reason: error.to_string() })?;
        Ok(if durable { state::write_file(&path, &content) } else { state::replace_file(&path, &content) }?)
    }
}

fn parse(path: PathBuf, bytes: &[u8]) -> Result<JobRecord, JobError> {
    #[derive(Deserialize)]
    struct Versioned {
        schema: u32,
    }
    let unreadable =
        |error: &dyn std::fmt::Display| JobError::Unreadable { path: path.clone(), reason: error.to_string() };
    let Versioned { schema } = serde_json::from_slice(bytes).map_err(|error| unreadable(&error))?;
    if schema > SCHEMA {
        return Err(JobError::Newer { path, schema });
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    serde_path_to_error::deserialize(&mut json).map_err(|error| unreadable(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_held_by_one_and_read_by_all() {
        let home = tempfile::tempdir().unwrap();
        let store = JobStore::new(home.path());
        let id = Uuid::new_v4();
        assert!(matches!(store.take(id), Err(JobError::NotFound(_))));
        let job = store.create(JobRecord::new(id, Timestamp::UNIX_EPOCH, "comfy", Path::new("/out"))).unwrap();
        assert!(store.is_held(id).unwrap());
        assert!(matches!(store.take(id), Err(JobError::Held(_))));
        assert_eq!(store.read(id).unwrap().client_id, job.record().client_id);
        drop(job);
        assert!(!store.is_held(id).unwrap());
        let mut job = store.take(id).unwrap();
        job.update(|record| record.state = JobState::Done).unwrap();
        assert_eq!(store.list().unwrap()[0].state, JobState::Done);

        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(home.path().join(format!("jobs/{id}.json"))).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn newer_and_broken_records_are_told() {
        let home = tempfile::tempdir().unwrap();
        let store = JobStore::new(home.path());
        let id = Uuid::new_v4();
        drop(store.create(JobRecord::new(id, Timestamp::UNIX_EPOCH, "comfy", Path::new("/out"))).unwrap());
        std::fs::write(store.path(id), r#"{"schema": 99, "other": 1}"#).unwrap();
        assert!(matches!(store.read(id), Err(JobError::Newer { schema: 99, .. })));
        std::fs::write(store.path(id), r#"{"schema": 1, "prom"#).unwrap();
        assert!(matches!(store.read(id), Err(JobError::Unreadable { .. })));
        assert!(store.list().unwrap().is_empty());
    }
}
