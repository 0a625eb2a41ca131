//! The one way from a prepared job to a finished one, with the record truthful at every step. A new run and one that
//! was left behind go through the same steps; the latter starts where its record says.

use std::time::Duration;

use tokio::time::Instant;

use super::{Job, JobError, JobInput, JobRecord, JobState};
use crate::comfy::outputs::{DownloadLimits, Outputs, SaveError, SkippedFile, save};
use crate::comfy::watch::{Outcome, Progress, Watch};
use crate::comfy::workflow::Workflow;
use crate::comfy::{ComfyClient, ComfyError, Content, Submitted, Upload};

/// Progress is written to the record no more often than this.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// What a new run needs; a run that is taken up needs nothing but its record.
#[derive(Debug, Clone)]
pub struct Start {
    pub workflow: Workflow,
    /// Local files for loading nodes; their paths were checked by the caller.
    pub inputs: Vec<JobInput>,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct DriveOptions {
    /// When following stops; uploads, the submit and downloads aren't cut off by it.
    pub until: Option<Instant>,
    pub limits: DownloadLimits,
}

/// Brings the job as far as it gets: upload, submit, follow, download. With `start` for a new job, without for one
/// that was left behind by another process.
///
/// `Ok` means that the record tells how it stands, also when that is bad (`failed`, `rejected`, `lost`) or not the
/// end yet (`until` came). An error means that the server or the disk kept it from going on: the record holds the
/// error too, and the same call takes it up again unless the state is final.
pub async fn drive(
    client: &ComfyClient,
    job: &mut Job,
    start: Option<Start>,
    options: DriveOptions,
    mut on_change: impl FnMut(&JobRecord),
) -> Result<(), JobError> {
    let driven = Driver { client, job, options, on_change: &mut on_change }.run(start).await;
    if let Err(error) = &driven {
        let message = crate::errors::chain(error);
        job.note(|record| record.error = Some(message));
        on_change(job.record());
    }
    driven
}

struct Driver<'a, F> {
    client: &'a ComfyClient,
    job: &'a mut Job,
    options: DriveOptions,
    on_change: &'a mut F,
}

impl<F: FnMut(&JobRecord)> Driver<'_, F> {
    async fn run(mut self, start: Option<Start>) -> Result<(), JobError> {
        let watch = match (start, self.job.record().state) {
            (Some(start), JobState::Prepared) => match self.start(start).await? {
                Some(watch) => watch,
                None => return Ok(()),
            },
            (_, JobState::Prepared | JobState::Uploading) => {
                let reason = "the process that prepared this run ended before it was submitted";
                self.end(JobState::NotSubmitted, Some(reason.to_owned()));
                return Ok(());
            }
            (_, JobState::Submitting) => {
                let Some(found) = self.find_submitted().await? else {
                    let reason = "the process that submitted this run ended before the server had it";
                    self.end(JobState::NotSubmitted, Some(reason.to_owned()));
                    return Ok(());
                };
                self.accepted(found);
                self.watch().await
            }
            (_, JobState::Pending | JobState::Running) => self.watch().await,
            (_, JobState::Downloading) => return self.download().await,
            (_, _) => return Ok(()),
        };
        self.follow(watch).await
    }

    /// Uploads and submits. `None` when the server refused the workflow.
    async fn start(&mut self, start: Start) -> Result<Option<Watch>, JobError> {
        let Start { mut workflow, inputs } = start;
        let uploaded = self.upload(&mut workflow, inputs).await;
        if uploaded.is_err() {
            self.end(JobState::NotSubmitted, None);
        }
        uploaded?;
        let watch = self.watch().await;
        let (prompt_id, client_id) = (self.job.record().prompt_id, self.job.record().client_id.clone());
        // If this can't be written, a crash during the submit couldn't be cleared up: so nothing is sent.
        self.job.update(|record| record.state = JobState::Submitting)?;
        (self.on_change)(self.job.record());
        match self.client.submit(prompt_id, &client_id, &workflow).await {
            Ok(submitted) => {
                self.accepted(submitted);
                Ok(Some(watch))
            }
            Err(ComfyError::Rejected(rejection)) => {
                self.job.note(|record| record.node_errors = rejection.node_errors.clone());
                self.end(JobState::Rejected, Some(rejection.to_string()));
                Ok(None)
            }
            Err(unknown @ ComfyError::OutcomeUnknown { .. }) => Err(unknown.into()),
            Err(error) => {
                self.end(JobState::NotSubmitted, None);
                Err(error.into())
            }
        }
    }

    async fn upload(&mut self, workflow: &mut Workflow, inputs: Vec<JobInput>) -> Result<(), JobError> {
        // All places are known before the first byte is sent.
        workflow.resolve_all(inputs.iter().map(|input| input.selector.as_str()))?;
        let classes = workflow.classes();
        let state = if inputs.is_empty() { JobState::Prepared } else { JobState::Uploading };
        self.job.update(|record| (record.classes, record.inputs, record.state) = (classes, inputs.clone(), state))?;
        (self.on_change)(self.job.record());
        let mut files = Vec::new();
        for (at, input) in inputs.iter().enumerate() {
            let name = input.path.file_name().map(|name| name.to_string_lossy()).unwrap_or("input".into());
            let content = Content::File(&input.path);
            let upload = Upload { name: &name, content, subfolder: "", kind: "input", overwrite: false };
            let uploaded = self.client.upload(upload).await?.as_input();
            files.push((input.selector.clone(), uploaded.clone()));
            self.job.note(|record| record.inputs[at].uploaded = Some(uploaded));
            (self.on_change)(self.job.record());
        }
        Ok(workflow.set_input_files(&files)?)
    }

    fn accepted(&mut self, submitted: Submitted) {
        let Submitted { prompt_id, node_errors, .. } = submitted;
        self.job.note(|record| {
            record.comfy_prompt_id = prompt_id;
            record.node_errors = node_errors;
            record.state = JobState::Pending;
            record.error = None;
        });
        (self.on_change)(self.job.record());
    }

    /// Two looks, so that one that came while the server still read the request isn't believed.
    async fn find_submitted(&self) -> Result<Option<Submitted>, JobError> {
        let record = self.job.record();
        let found = self.client.find(&record.comfy_prompt_id, &record.client_id).await?;
        if found.is_some() {
            return Ok(found);
        }
        tokio::time::sleep(self.client.timeouts().poll).await;
        Ok(self.client.find(&record.comfy_prompt_id, &record.client_id).await?)
    }

    async fn watch(&self) -> Watch {
        let record = self.job.record();
        Watch::open(self.client, &record.client_id, record.classes.clone()).await
    }

    async fn follow(mut self, watch: Watch) -> Result<(), JobError> {
        let prompt_id = self.job.record().comfy_prompt_id.clone();
        let mut written: Option<Instant> = None;
        let (job, on_change) = (&mut *self.job, &mut *self.on_change);
        let outcome = watch.follow(&prompt_id, self.options.until, |progress| {
            let state = match progress {
                Progress::Pending { .. } => JobState::Pending,
                Progress::OutOfContact { .. } => job.record.state,
                Progress::Running { .. } | Progress::Step { .. } => JobState::Running,
            };
            let turned = job.record.state != state;
            job.record.state = state;
            job.record.progress = Some(progress.clone());
            job.record.error = None;
            if turned || written.is_none_or(|at| at.elapsed() >= PROGRESS_EVERY) {
                job.note_progress();
                written = Some(Instant::now());
            }
            on_change(&job.record);
        });
        match outcome.await? {
            Outcome::StillRunning(_) => self.job.note_progress(),
            Outcome::Done(entry) => {
                let Outputs { files, texts } = Outputs::collect(&entry.outputs);
                self.job.note(|record| {
                    (record.files, record.texts) = (files, texts);
                    (record.state, record.error) = (JobState::Downloading, None);
                });
                (self.on_change)(self.job.record());
                return self.download().await;
            }
            Outcome::Failed(failure, _) => {
                let message = failure.to_string();
                self.job.note(|record| record.failure = Some(failure));
                self.end(JobState::Failed, Some(message));
            }
            Outcome::Interrupted(_) => self.end(JobState::Interrupted, Some("the run was interrupted".to_owned())),
            Outcome::Lost => {
                let reason = "ComfyUI no longer knows this run: it was cancelled, the history was cleared, or ComfyUI \
                              restarted; it did not finish as far as can be told";
                self.end(JobState::Lost, Some(reason.to_owned()));
            }
        }
        Ok(())
    }

    /// Fetches what isn't on the disk yet; the record names each file as soon as it is there.
    async fn download(mut self) -> Result<(), JobError> {
        let files = self.job.record().files.clone();
        for file in files {
            let record = self.job.record();
            let is_here =
                |path: &std::path::Path, bytes| std::fs::metadata(path).is_ok_and(|found| found.len() == bytes);
            if record.saved.iter().any(|saved| saved.source == file && is_here(&saved.path, saved.bytes)) {
                continue;
            }
            let used: u64 = record.saved.iter().filter(|saved| saved.source != file).map(|saved| saved.bytes).sum();
            let limits = self.options.limits;
            let limit = limits.per_file.min(limits.total.saturating_sub(used));
            let output_dir = record.output_dir.clone();
            let saved = save(self.client, &file, &output_dir, limit).await;
            self.job.note(|record| {
                record.saved.retain(|saved| saved.source != file);
                record.skipped.retain(|skipped| skipped.source != file);
            });
            match saved {
                Ok(saved) => self.job.note(|record| record.saved.push(saved)),
                Err(SaveError::Skip(reason)) => {
                    self.job.note(|record| record.skipped.push(SkippedFile { reason, source: file }));
                }
                Err(SaveError::Comfy(error)) => return Err(error.into()),
            }
            (self.on_change)(self.job.record());
        }
        self.end(JobState::Done, None);
        Ok(())
    }

    fn end(&mut self, state: JobState, error: Option<String>) {
        self.job.note(|record| {
            record.state = state;
            record.error = error;
        });
        (self.on_change)(self.job.record());
    }
}
