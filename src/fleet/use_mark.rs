//! That somebody uses a pod, told to the keeper by the time of a small file, `locks/used-<pod id>`.
//!
//! Only pods that are to end when nobody uses them have one. A mark is all that a call leaves behind: one that can't be
//! left fails no call.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::SystemTime;

use super::Fleet;
use crate::state;

impl Fleet {
    /// Leaves the mark, where anybody looks at it.
    pub fn mark_used(&self, pod_id: &str) {
        let Some(path) = self.use_mark(pod_id).filter(|_| self.ends_when_unused(pod_id)) else { return };
        let touched = touch(&path);
        if let Err(error) = touched {
            tracing::warn!(file = %path.display(), error, "that the pod is used can't be marked");
        }
    }

    /// When the mark was left last. Only whether it changes means anything: clocks are set.
    pub fn marked_used_at(&self, pod_id: &str) -> Option<SystemTime> {
        self.use_mark(pod_id)?.metadata().ok()?.modified().ok()
    }

    /// Takes the mark of a pod away that is gone.
    pub fn forget_use(&self, pod_id: &str) {
        if let Some(path) = self.use_mark(pod_id) {
            let _ = std::fs::remove_file(path);
        }
    }

    fn ends_when_unused(&self, pod_id: &str) -> bool {
        let Ok(records) = self.records.look() else { return false };
        records.entries.values().any(|record| {
            record.is_open() && record.wanted.idle_minutes.is_some() && record.known.pod_id.as_deref() == Some(pod_id)
        })
    }

    /// `None` for an id that is no file name; the provider picks ids.
    fn use_mark(&self, pod_id: &str) -> Option<PathBuf> {
        let plain = pod_id.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
        (plain && !pod_id.is_empty()).then(|| self.home.lock(&format!("used-{pod_id}")))
    }
}

/// The error as text, for it is only told.
fn touch(path: &std::path::Path) -> Result<(), String> {
    if let Some(folder) = path.parent() {
        state::make_private_folder(folder).map_err(|error| crate::errors::chain(&error))?;
    }
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
    file.and_then(|file: File| file.set_modified(SystemTime::now())).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;
    use crate::config::{Home, Limits};
    use crate::fleet::{PodRecord, PodRequest, new_intent};
    use crate::timing::Timing;

    fn record(pod_id: &str, idle_minutes: Option<u32>) -> PodRecord {
        let request = PodRequest::for_tests();
        let mut record = PodRecord::new(new_intent(), request, Vec::new(), SignedDuration::from_mins(10));
        record.known.pod_id = Some(pod_id.to_owned());
        record.wanted.idle_minutes = idle_minutes;
        record
    }

    #[tokio::test]
    async fn only_a_pod_that_ends_when_unused_is_marked() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(folder.path().join("home")).unwrap();
        let fleet = Fleet::new(&home, &Timing::quick());
        for (name, id, minutes) in [("a", "idler", Some(5)), ("b", "other", None), ("c", "../up", Some(5))] {
            fleet.ensure(name, record(id, minutes), &Limits { max_pods: 9, ..Limits::default() }).await.unwrap();
        }
        for id in ["idler", "other", "../up", "unknown", ""] {
            fleet.mark_used(id);
            assert_eq!(fleet.marked_used_at(id).is_some(), id == "idler", "{id}");
        }
        assert!(!home.root().join("up").exists());
        let before = fleet.marked_used_at("idler");
        std::thread::sleep(std::time::Duration::from_millis(20));
        fleet.mark_used("idler");
        assert!(fleet.marked_used_at("idler") > before);
        fleet.forget_use("idler");
        assert_eq!(fleet.marked_used_at("idler"), None);
    }
}
