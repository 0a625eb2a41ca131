//! A pod's log: a stream of server-sent events that the provider never ends. Read up to a limit, or followed across
//! broken connections.

mod events;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use jiff::Timestamp;
use tokio::time::{Instant, sleep, timeout};

use super::GET_POD_LOGS;
use super::transport::{Call, Transport};
use crate::errors::chain;
use crate::provider::{LogLimits, LogLine, LogPage, LogQuery, LogSource, LogStream, ProviderError};
use events::{Event, Events};

/// The most that the API takes.
const MOST_TAIL: u32 = 5000;
/// So long without a byte means that nobody is at the other end any more.
const SILENCE: Duration = Duration::from_secs(120);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// So many attempts in a row that reach nobody end the following.
const MOST_FAILURES: u32 = 10;
/// Lines of one moment that are remembered to know them again.
const MOST_SEEN: usize = 1000;

/// Reads until a limit is reached or the pod is quiet.
pub(super) async fn page(
    transport: &Transport,
    id: &str,
    query: &LogQuery,
    limits: &LogLimits,
) -> Result<LogPage, ProviderError> {
    let deadline = Instant::now() + limits.time;
    let mut events = Events::new(transport.open(&call(id, query)).await?);
    let mut page = LogPage { lines: Vec::new(), more: false };
    let mut bytes = 0;
    loop {
        let wait = limits.quiet.min(deadline.saturating_duration_since(Instant::now()));
        let mut line = match timeout(wait, events.next()).await {
            Ok(Ok(Some(event))) => event.line,
            Ok(Ok(None)) => break,
            Ok(Err(error)) if page.lines.is_empty() => return Err(error),
            Ok(Err(_)) => {
                page.more = true;
                break;
            }
            Err(_) => {
                page.more = Instant::now() >= deadline && !page.lines.is_empty();
                break;
            }
        };
        let room = limits.bytes.saturating_sub(bytes);
        page.more = page.lines.len() >= limits.lines || line.text.len() > room;
        if page.lines.len() < limits.lines && room > 0 {
            line.text.truncate(line.text.floor_char_boundary(room));
            bytes += line.text.len();
            page.lines.push(line);
        }
        if page.more {
            break;
        }
    }
    Ok(page)
}

/// Opens the stream, so that a pod that isn't there is told at once, and takes it up again whenever it breaks.
pub(super) async fn follow(
    transport: Arc<Transport>,
    id: &str,
    query: &LogQuery,
    first_pause: Duration,
) -> Result<LogStream, ProviderError> {
    let events = Events::new(transport.open(&call(id, query)).await?);
    let follower = Follower {
        transport,
        id: id.to_owned(),
        query: query.clone(),
        place: Place::default(),
        events: Some(events),
        first_pause,
        pause: first_pause,
        failures: 0,
        is_over: false,
    };
    let next = |mut follower: Follower| async { follower.next().await.map(|item| (item, follower)) };
    Ok(futures_util::stream::unfold(follower, next).boxed())
}

fn call<'a>(id: &'a str, query: &LogQuery) -> Call<'a> {
    let mut call = Call::new(&GET_POD_LOGS).id(id);
    match query.source {
        Some(LogSource::Container) => call = call.query("source", "container"),
        Some(LogSource::System) => call = call.query("source", "system"),
        None => {}
    }
    match (query.since, query.tail) {
        (Some(since), _) => call.query("since", since.to_string()),
        (None, Some(tail)) => call.query("tail", tail.min(MOST_TAIL).to_string()),
        (None, None) => call,
    }
}

struct Follower {
    transport: Arc<Transport>,
    id: String,
    query: LogQuery,
    place: Place,
    events: Option<Events>,
    first_pause: Duration,
    pause: Duration,
    failures: u32,
    is_over: bool,
}

impl Follower {
    async fn next(&mut self) -> Option<Result<LogLine, ProviderError>> {
        while !self.is_over {
            let Some(events) = &mut self.events else {
                match self.open_again().await {
                    Ok(()) => continue,
                    Err(error) => {
                        self.is_over = true;
                        return Some(Err(error));
                    }
                }
            };
            match timeout(SILENCE, events.next()).await {
                Ok(Ok(Some(event))) => {
                    self.pause = self.first_pause;
                    if self.place.move_to(&event) {
                        return Some(Ok(event.line));
                    }
                }
                Ok(Ok(None)) => self.events = None,
                Ok(Err(error)) => {
                    tracing::debug!(error = chain(&error), "the log broke off");
                    self.events = None;
                }
                Err(_) => {
                    tracing::debug!(after = ?SILENCE, "the log fell silent");
                    self.events = None;
                }
            }
        }
        None
    }

    /// An error is one that asking again won't mend.
    async fn open_again(&mut self) -> Result<(), ProviderError> {
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        match self.transport.open(&self.place.resume(&self.id, &self.query)).await {
            Ok(response) => {
                self.failures = 0;
                self.events = Some(Events::new(response));
                Ok(())
            }
            Err(error) if error.is_transient() && self.failures < MOST_FAILURES => {
                self.failures += 1;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// How far the stream was read. The provider may begin again with the very line it broke off at, and several lines may
/// share one moment, so those of the last moment are known again by what they say.
#[derive(Default)]
struct Place {
    id: Option<String>,
    at: Option<Timestamp>,
    seen: HashSet<(Option<LogSource>, String)>,
}

impl Place {
    /// False for a line that was told already.
    fn move_to(&mut self, event: &Event) -> bool {
        let (id, at) = (event.id.clone(), event.line.at);
        if (&id, at) != (&self.id, self.at) {
            (self.id, self.at) = (id, at);
            self.seen.clear();
        }
        if self.id.is_none() && self.at.is_none() {
            return true;
        }
        let is_new = self.seen.insert((event.line.source, event.line.text.clone()));
        if self.seen.len() > MOST_SEEN {
            self.seen.clear();
        }
        is_new
    }

    fn resume<'a>(&self, id: &'a str, query: &LogQuery) -> Call<'a> {
        let from_here = LogQuery { tail: None, since: self.at, ..*query };
        match (&self.id, self.at) {
            (Some(last), _) => call(id, &LogQuery { since: None, ..from_here }).last_event_id(last.clone()),
            (None, Some(_)) => call(id, &from_here),
            (None, None) => call(id, query),
        }
    }
}
