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
    Closed,
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
}
