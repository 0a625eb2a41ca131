//! The queue of prompts and the history of those that ran.

use std::cmp::Ordering;
use std::sync::atomic::{AtomicBool, Ordering as Memory};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value, json};
use tokio::sync::Notify;

/// ComfyUI forgets the oldest beyond this many.
const MOST_HISTORY: usize = 10_000;

/// One queued prompt.
#[derive(Debug, Clone)]
pub struct Job {
    /// Its place: lower runs first. An integer unless the client chose it.
    pub number: Value,
    pub id: String,
    /// `{node id: {class_type, inputs}}`, validated.
    pub prompt: Map<String, Value>,
    /// As sent, with `client_id` put in when there is one.
    pub extra_data: Map<String, Value>,
    /// Ids of the output nodes to execute.
    pub outputs: Vec<String>,
    /// Set to ask the prompt to end, once it runs.
    pub interrupted: Arc<AtomicBool>,
}

/// How a prompt ended, for its history.
pub struct Finished {
    /// `{node id: what the node showed}`.
    pub outputs: Map<String, Value>,
    pub meta: Map<String, Value>,
    pub success: bool,
    /// `[event, data]` pairs.
    pub messages: Vec<Value>,
}

#[derive(Default)]
pub struct Queue {
    state: Mutex<State>,
    added: Notify,
}

#[derive(Default)]
struct State {
    pending: Vec<Job>,
    running: Option<Job>,
    history: Map<String, Value>,
    next_number: u64,
}

impl Job {
    /// The client that hears of this prompt.
    pub fn client(&self) -> Option<&str> {
        self.extra_data.get("client_id").and_then(Value::as_str)
    }

    /// `[number, prompt_id, prompt, extra_data, output ids]`, as `/queue` and `/history` show it.
    fn tuple(&self) -> Value {
        json!([self.number, self.id, self.prompt, self.extra_data, self.outputs])
    }

    fn compare(&self, other: &Job) -> Ordering {
        let place = |job: &Job| job.number.as_f64().unwrap_or(0.0);
        place(self).total_cmp(&place(other)).then_with(|| self.id.cmp(&other.id))
    }
}

impl Queue {
    /// The next free place; negative when the prompt is to go to the front.
    pub fn next_number(&self, front: bool) -> Value {
        let mut state = self.state();
        let number = state.next_number;
        state.next_number += 1;
        if front { json!(-(number as i64)) } else { json!(number) }
    }

    /// Queues a prompt. An id that is already there is queued again, as ComfyUI does: ids are the client's business.
    pub fn put(&self, job: Job) {
        self.state().pending.push(job);
        self.added.notify_one();
    }

    /// Waits for the next prompt and marks it as running.
    pub async fn take(&self) -> Job {
        loop {
            if let Some(job) = self.take_now() {
                return job;
            }
            self.added.notified().await;
        }
    }

    fn take_now(&self) -> Option<Job> {
        let mut state = self.state();
        let (first, _) = state.pending.iter().enumerate().min_by(|(_, one), (_, other)| one.compare(other))?;
        let job = state.pending.swap_remove(first);
        state.running = Some(job.clone());
        Some(job)
    }

    pub fn finish(&self, job: &Job, result: Finished) {
        let mut state = self.state();
        state.running = None;
        if state.history.len() >= MOST_HISTORY
            && let Some(oldest) = state.history.keys().next().cloned()
        {
            state.history.shift_remove(&oldest);
        }
        let status = json!({
            "status_str": if result.success { "success" } else { "error" },
            "completed": result.success,
            "messages": result.messages,
        });
        let entry = json!({ "prompt": job.tuple(), "outputs": result.outputs, "status": status, "meta": result.meta });
        state.history.insert(job.id.clone(), entry);
    }

    /// Asks the running prompt to end; with an id only if it is that one.
    pub fn interrupt(&self, id: Option<&str>) {
        if let Some(job) = &self.state().running
            && id.is_none_or(|id| job.id == id)
        {
            job.interrupted.store(true, Memory::Relaxed);
        }
    }

    /// `{queue_running, queue_pending}`; the latter in no useful order, as ComfyUI's heap.
    pub fn describe(&self) -> Value {
        let state = self.state();
        json!({
            "queue_running": state.running.iter().map(Job::tuple).collect::<Vec<_>>(),
            "queue_pending": state.pending.iter().map(Job::tuple).collect::<Vec<_>>(),
        })
    }

    pub fn status(&self) -> Value {
        let state = self.state();
        json!({ "exec_info": { "queue_remaining": state.pending.len() + usize::from(state.running.is_some()) } })
    }

    pub fn clear(&self) {
        self.state().pending.clear();
    }

    /// Drops one waiting prompt of this id. What runs already is not touched.
    pub fn delete(&self, id: &str) {
        let mut state = self.state();
        if let Some(index) = state.pending.iter().position(|job| job.id == id) {
            state.pending.remove(index);
        }
    }

    /// The last `most` entries, or from `offset` on when that is given.
    pub fn history(&self, most: Option<usize>, offset: Option<usize>) -> Value {
        let state = self.state();
        let offset = offset.unwrap_or_else(|| most.map_or(0, |most| state.history.len().saturating_sub(most)));
        let entries = state.history.iter().skip(offset).take(most.unwrap_or(usize::MAX));
        Value::Object(entries.map(|(id, entry)| (id.clone(), entry.clone())).collect())
    }

    /// `{id: entry}`, or `{}` when there is none.
    pub fn history_of(&self, id: &str) -> Value {
        match self.state().history.get(id) {
            Some(entry) => json!({ id: entry }),
            None => json!({}),
        }
    }

    pub fn clear_history(&self) {
        self.state().history.clear();
    }

    pub fn delete_history(&self, id: &str) {
        self.state().history.shift_remove(id);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
