//! The rate budget. What every answer tells of the API's quotas is known to all processes of a home, so that a request
//! waits before it would be refused, and something is left for whoever has to end a pod.
//!
//! It only ever holds a request back for a while: knowledge that is missing, broken or old lets everything pass, and
//! nothing here is an error of its own.

mod quota;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use reqwest::{Response, StatusCode};
use tokio::time::Instant;

use super::answer::retry_after;
use crate::provider::ProviderError;
use crate::state::{self, Lock};
use quota::{Hold, Millis, Quotas};

/// Where the processes of a home share what they know of the rate limits.
#[derive(Debug, Clone)]
pub struct SharedBudget {
    pub file: PathBuf,
    pub lock: PathBuf,
}

/// A lock that is held for longer is given up on, for everything done under it takes a fraction of a millisecond.
const LOCK_PATIENCE: Duration = Duration::from_millis(250);
/// A file that is larger is none of ours.
const MOST_BYTES: u64 = 256 * 1024;
const FIRST_LOOK_AFTER: Duration = Duration::from_millis(20);
const LOOK_EVERY: Duration = Duration::from_millis(500);

pub(super) struct Budget {
    shared: Option<SharedBudget>,
    /// Whose quotas these are; what the file says of another account doesn't count.
    account: String,
    /// What this client knows by itself, for when the file can't be read or written.
    own: Arc<Mutex<Quotas>>,
}

/// The permission for one request; to be settled with its answer. One that never is stops counting by itself.
pub(super) struct Ticket {
    id: u64,
    sent_at: Millis,
}

/// What an answer tells of the quotas.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// `RateLimit`, and `RateLimit-Policy`.
    pub limits: Vec<String>,
    pub policies: Vec<String>,
    pub retry_after: Option<Duration>,
}

impl Told {
    pub fn from_response(response: &Response) -> Self {
        let all = |name: &str| -> Vec<String> {
            let values = response.headers().get_all(name).iter();
            values.filter_map(|value| value.to_str().ok()).map(str::to_owned).collect()
        };
        let is_refused = response.status() == StatusCode::TOO_MANY_REQUESTS;
        Self {
            limits: all("ratelimit"),
            policies: all("ratelimit-policy"),
            retry_after: is_refused.then(|| retry_after(response.headers())),
        }
    }
}

impl Budget {
    pub fn new(shared: Option<SharedBudget>, account: String) -> Self {
        let own = Arc::new(Mutex::new(Quotas::of(&account)));
        Self { shared, account, own }
    }

    /// Waits until a request may be sent, or says at once that it won't be by `until`. An urgent one never waits: what
    /// is known here may be wrong, and the worst that can come is a refusal. The request counts for `time_limit` at
    /// most.
    pub async fn take(&self, urgent: bool, time_limit: Duration, until: Instant) -> Result<Ticket, ProviderError> {
        let id = uuid::Uuid::new_v4().as_u64_pair().0;
        let mut pause = FIRST_LOOK_AFTER;
        let mut is_told = false;
        loop {
            let admitted = self.change(move |quotas, now| {
                quotas.admit(id, now, time_limit, urgent).map(|()| Ticket { id, sent_at: now })
            });
            let Hold { look_in, free_in } = match admitted.await {
                Ok(ticket) => return Ok(ticket),
                Err(hold) => hold,
            };
            let left = until.saturating_duration_since(Instant::now());
            if look_in > left || left.is_zero() {
                tracing::debug!(?free_in, "not sent: the rate limit is used up for longer than the call may take");
                return Err(ProviderError::RateLimited { retry_after: free_in });
            }
            if !is_told {
                tracing::debug!(?free_in, "waiting for the rate limit");
                is_told = true;
            }
            // All who wait would come at once otherwise.
            let jitter = Duration::from_micros(id % 20_000);
            tokio::time::sleep(look_in.max(pause).min(LOOK_EVERY).min(left) + jitter).await;
            pause *= 2;
        }
    }

    /// The request is over; `None` where no answer came.
    pub async fn settle(&self, ticket: Ticket, told: Option<Told>) {
        self.change(move |quotas, now| quotas.settle(ticket.id, ticket.sent_at, now, told)).await;
    }

    /// Changes what is known, in the file too where that can be had.
    async fn change<R: Send + 'static>(&self, change: impl FnOnce(&mut Quotas, Millis) -> R + Send + 'static) -> R {
        let (shared, account, own) = (self.shared.clone(), self.account.clone(), self.own.clone());
        let work = move || {
            let mut own = own.lock().unwrap_or_else(PoisonError::into_inner);
            let lock = shared.as_ref().and_then(lock);
            if let Some(newer) =
                shared.as_ref().and_then(read).filter(|told| told.account == account && told.at > own.at)
            {
                *own = newer;
            }
            let now = wall_clock();
            own.tidy(now);
            let result = change(&mut own, now);
            own.at = now.max(own.at + 1);
            if let (Some(shared), Some(_held)) = (&shared, lock) {
                write(shared, &own);
            }
            result
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }
}

/// A home that was removed meanwhile is not made anew.
fn lock(shared: &SharedBudget) -> Option<Lock> {
    if !shared.file.parent()?.is_dir() {
        return None;
    }
    Lock::take(&shared.lock, LOCK_PATIENCE).inspect_err(|error| tracing::debug!(%error, "no shared rate budget")).ok()
}

fn read(shared: &SharedBudget) -> Option<Quotas> {
    let metadata = std::fs::metadata(&shared.file).ok()?;
    if !metadata.is_file() || metadata.len() > MOST_BYTES {
        return None;
    }
    serde_json::from_slice(&std::fs::read(&shared.file).ok()?).ok()
}

fn write(shared: &SharedBudget, quotas: &Quotas) {
    let written = serde_json::to_vec(quotas).map(|bytes| state::replace_file(&shared.file, &bytes));
    if let Ok(Err(error)) = written {
        tracing::debug!(%error, "the rate budget can't be shared");
    }
}

/// Other processes read it too, so it can't be a clock of this one. What a jump of it does is bounded by
/// [`Quotas::tidy`].
fn wall_clock() -> Millis {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    since.as_millis().try_into().unwrap_or(Millis::MAX)
}
