//! Tunnels as records: what is wanted and what is known of each, in `tunnels.json`. The keeper holds the ssh children.

use std::collections::BTreeMap;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::Home;
use crate::state::{RecordFile, StateError};
use crate::timing::Timing;

/// The port that ComfyUI listens on inside a pod, and the one first tried on this machine.
pub const COMFY_PORT: u16 = 8188;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TunnelRecord {
    /// Unique for this request, so that a stop and a new start aren't mixed up.
    pub intent: String,
    pub wanted: TunnelWanted,
    pub known: TunnelKnown,
}

/// Written by tools only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TunnelWanted {
    pub open: bool,
    /// The pod's name in our records, or its id at the provider.
    pub pod: String,
    pub pod_id: String,
    pub remote_port: u16,
    pub local_port: LocalPort,
    pub requested_at: Timestamp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LocalPort {
    /// This one or none.
    Fixed(u16),
    /// This one, or the next free one after it.
    From(u16),
    /// Whichever is free.
    Any,
}

/// Written by the keeper only.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TunnelKnown {
    pub state: TunnelState,
    pub at: Option<Timestamp>,
    pub since: Option<Timestamp>,
    /// Where it listens on 127.0.0.1; kept over reconnects.
    pub local_port: Option<u16>,
    pub ssh_pid: Option<u32>,
    /// Why it is not healthy, in a sentence.
    pub cause: Option<String>,
    pub checked_at: Option<Timestamp>,
    pub latency_ms: Option<u64>,
    pub reconnects: u32,
    pub reconnected_at: Option<Timestamp>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TunnelState {
    /// The pod has no address for ssh yet.
    #[default]
    WaitingForPod,
    Connecting,
    /// ssh is up, the far end was not asked yet or does not answer as ComfyUI does.
    SshUp,
    RemoteRefused,
    HttpTimeout,
    WrongService,
    Healthy,
    /// Between two attempts.
    BackingOff,
    /// It will not come up by itself; `cause` says why.
    Failed,
}

/// The records of this home's tunnels.
#[derive(Debug, Clone)]
pub struct Tunnels {
    records: RecordFile<TunnelRecord>,
}

impl Tunnels {
    pub fn new(home: &Home, timing: &Timing) -> Self {
        Self { records: RecordFile::new(home.tunnels_file(), home.lock("state"), timing.state_lock) }
    }

    pub fn read(&self) -> Result<BTreeMap<String, TunnelRecord>, StateError> {
        Ok(self.records.read()?.entries)
    }

    pub fn get(&self, name: &str) -> Result<Option<TunnelRecord>, StateError> {
        Ok(self.read()?.remove(name))
    }

    /// Finds the tunnel of that name, or writes the wish for `fresh`: decided under the lock, so that a pod's port
    /// never gets two. One that has failed or is being closed makes room.
    pub async fn want_open(&self, name: &str, fresh: TunnelRecord) -> Result<Opened, StateError> {
        let name = name.to_owned();
        self.records
            .change(move |entries| {
                if let Some(record) = entries.get(&name).filter(|record| record.is_open()) {
                    let taken = record.known.local_port;
                    return match fresh.wanted.local_port {
                        LocalPort::Fixed(port) if taken.is_some_and(|taken| taken != port) => {
                            Opened::OnAnotherPort(record.clone())
                        }
                        _ if record.wanted.pod_id != fresh.wanted.pod_id => {
                            entries.insert(name, fresh.clone());
                            Opened::New(fresh)
                        }
                        _ => Opened::Joined(record.clone()),
                    };
                }
                entries.insert(name, fresh.clone());
                Opened::New(fresh)
            })
            .await
    }

    /// Marks those that `which` picks as not wanted any more, and names them.
    pub async fn want_closed(
        &self,
        which: impl Fn(&str, &TunnelRecord) -> bool + Send + 'static,
    ) -> Result<Vec<(String, TunnelRecord)>, StateError> {
        self.records
            .change(move |entries| {
                let picked = entries.iter_mut().filter(|(name, record)| which(name, record));
                picked
                    .map(|(name, record)| {
                        record.wanted.open = false;
                        (name.clone(), record.clone())
                    })
                    .collect()
            })
            .await
    }

    /// Writes what the keeper knows; `None` when the record has meanwhile become another's or left.
    pub async fn know(
        &self,
        name: &str,
        intent: &str,
        change: impl FnOnce(&mut TunnelKnown) + Send + 'static,
    ) -> Result<Option<TunnelRecord>, StateError> {
        let (name, intent) = (name.to_owned(), intent.to_owned());
        self.records
            .change(move |entries| {
                let record = entries.get_mut(&name).filter(|record| record.intent == intent)?;
                let before = record.known.state;
                change(&mut record.known);
                let now = Timestamp::now();
                record.known.at = Some(now);
                if record.known.state != before || record.known.since.is_none() {
                    record.known.since = Some(now);
                }
                Some(record.clone())
            })
            .await
    }

    /// Takes the record of a closed tunnel out of the file.
    pub async fn remove(&self, name: &str, intent: &str) -> Result<(), StateError> {
        let (name, intent) = (name.to_owned(), intent.to_owned());
        self.records
            .change(move |entries| {
                if entries.get(&name).is_some_and(|record| record.intent == intent) {
                    entries.remove(&name);
                }
            })
            .await
    }
}

/// What asking for a tunnel by name came to.
#[derive(Debug)]
pub enum Opened {
    New(TunnelRecord),
    Joined(TunnelRecord),
    /// There is one, and it listens elsewhere than was asked for.
    OnAnotherPort(TunnelRecord),
}

impl TunnelRecord {
    pub fn new(pod: &str, pod_id: &str, remote_port: u16, local_port: LocalPort) -> Self {
        Self {
            intent: uuid::Uuid::new_v4().simple().to_string()[..12].to_owned(),
            wanted: TunnelWanted {
                open: true,
                pod: pod.to_owned(),
                pod_id: pod_id.to_owned(),
                remote_port,
                local_port,
                requested_at: Timestamp::now(),
            },
            known: TunnelKnown::default(),
        }
    }

    /// Wanted, and not given up.
    pub fn is_open(&self) -> bool {
        self.wanted.open && self.known.state != TunnelState::Failed
    }

    /// Whether there is something to do: hold it, or close it. One that failed for good only stays to be read.
    pub fn needs_keeper(&self) -> bool {
        self.is_open() || !self.wanted.open
    }

    /// Where it is reached from this machine, once it has a port.
    pub fn url(&self) -> Option<String> {
        self.known.local_port.map(|port| format!("http://127.0.0.1:{port}"))
    }
}

/// The name of a tunnel's record: one for each port of a pod.
pub fn name_of(pod: &str, remote_port: u16) -> String {
    format!("{pod}:{remote_port}")
}
