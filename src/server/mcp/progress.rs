//! A call's progress as MCP notifications: few enough for any client, and the last one always.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rmcp::RoleServer;
use rmcp::model::ProgressNotificationParam;
use rmcp::service::RequestContext;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::tools::context::{Progress, ProgressUpdate};

/// At most four a second.
const PAUSE: Duration = Duration::from_millis(250);
/// An answer never waits longer than this for its last progress, say when the client reads no more.
const PATIENCE: Duration = Duration::from_millis(300);
/// MCP wants the value to rise with every notification, also where only the message changed.
const STEP: f64 = 0.001;

/// Holds the latest update only: what was overtaken is not sent.
type Latest = watch::Sender<Option<ProgressUpdate>>;

/// Sends the latest update whenever the pause is over. Without a token from the client it does nothing.
pub(super) struct ProgressPump {
    updates: Option<Arc<Mutex<Option<Latest>>>>,
    task: Option<JoinHandle<()>>,
}

impl ProgressPump {
    pub(super) fn start(context: &RequestContext<RoleServer>) -> Self {
        let Some(token) = context.meta.get_progress_token() else { return Self { updates: None, task: None } };
        let (sender, receiver) = watch::channel(None);
        let peer = context.peer.clone();
        let send = move |update: ProgressUpdate| {
            let mut notification =
                ProgressNotificationParam::new(token.clone(), update.value).with_message(update.message);
            notification.total = update.total;
            let peer = peer.clone();
            async move { peer.notify_progress(notification).await.is_ok() }
        };
        let task = tokio::spawn(pump(send, receiver));
        Self { updates: Some(Arc::new(Mutex::new(Some(sender)))), task: Some(task) }
    }

    pub(super) fn progress(&self) -> Progress {
        let Some(updates) = self.updates.clone() else { return Progress::none() };
        Progress::to(move |update| {
            if let Some(sender) = updates.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
                sender.send_replace(Some(update));
            }
        })
    }

    /// Sends what is left, so that no progress comes after the answer. Work that goes on after the answer tells its
    /// progress to nobody.
    pub(super) async fn finish(self) {
        if let Some(updates) = &self.updates {
            updates.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
        if let Some(mut task) = self.task
            && tokio::time::timeout(PATIENCE, &mut task).await.is_err()
        {
            task.abort();
        }
    }
}

async fn pump<S, F>(send: S, mut updates: watch::Receiver<Option<ProgressUpdate>>)
where
    S: Fn(ProgressUpdate) -> F,
    F: Future<Output = bool>,
{
    let mut last: Option<ProgressUpdate> = None;
    // A closed channel still yields the value that nobody has seen yet.
    while updates.changed().await.is_ok() {
        let Some(update) = updates.borrow_and_update().clone() else { continue };
        let Some(value) = next_value(last.as_ref(), &update) else { continue };
        let update = ProgressUpdate { value, ..update };
        if !send(update.clone()).await {
            return;
        }
        last = Some(update);
        // The end of the call cuts the pause short.
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = closed(updates.clone()) => {}
        }
    }
}

/// Returns when the sender is gone.
async fn closed(mut updates: watch::Receiver<Option<ProgressUpdate>>) {
    while updates.changed().await.is_ok() {}
}

/// The value to send, above the last one; `None` for an update that says nothing new.
fn next_value(last: Option<&ProgressUpdate>, update: &ProgressUpdate) -> Option<f64> {
    match last {
        Some(last) if update.value <= last.value && update.message == last.message => None,
        Some(last) if update.value <= last.value => Some(last.value + STEP),
        _ => Some(update.value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(message: &str, value: f64) -> ProgressUpdate {
        ProgressUpdate { message: message.to_owned(), value, total: None }
    }

    #[tokio::test]
    async fn a_burst_is_thinned_out_and_its_last_update_sent() {
        let sent = Arc::new(Mutex::new(Vec::new()));
        let (sender, receiver) = watch::channel(None);
        let record = sent.clone();
        let pump = tokio::spawn(pump(
            move |update: ProgressUpdate| {
                record.lock().unwrap_or_else(PoisonError::into_inner).push(update.value);
                std::future::ready(true)
            },
            receiver,
        ));
        for step in 0..500 {
            sender.send_replace(Some(update("running", f64::from(step))));
            tokio::task::yield_now().await;
        }
        drop(sender);
        pump.await.expect("the pump ends with its sender");
        let sent = sent.lock().unwrap_or_else(PoisonError::into_inner);
        assert_eq!(sent.last(), Some(&499.0));
        assert!(sent.len() < 100, "{} of 500 updates were sent", sent.len());
        assert!(sent.windows(2).all(|pair| pair[0] < pair[1]), "{sent:?}");
    }

    #[test]
    fn values_rise_with_every_notification() {
        let last = update("placing", 5.0);
        assert_eq!(next_value(None, &last), Some(5.0));
        assert_eq!(next_value(Some(&last), &update("placing", 5.0)), None);
        assert_eq!(next_value(Some(&last), &update("placing", 6.0)), Some(6.0));
        assert!(next_value(Some(&last), &update("starting", 5.0)).is_some_and(|value| value > 5.0));
        assert!(next_value(Some(&last), &update("starting", 1.0)).is_some_and(|value| value > 5.0));
    }
}
