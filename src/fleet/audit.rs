//! `audit.jsonl`: every money action and its cause, one JSON line each, appended and never rewritten.
//!
//! It holds no secrets: names, ids, prices and causes only. That it can't be written keeps nobody from ending a pod, so
//! a failure is logged and nothing more.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::config::Home;
use crate::errors::harmless;

/// A line is written by one call, so that lines of several processes don't mix; a longer one would be no line.
const MOST_BYTES: usize = 8 * 1024;
/// How far back the last notes are looked for.
const TAIL_BYTES: u64 = 256 * 1024;

#[derive(Debug, Clone)]
pub struct Audit {
    path: PathBuf,
}

/// Who acted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Actor {
    /// A tool, on somebody's call.
    Tool(&'static str),
    Keeper,
    /// A command of the command line that is no tool.
    Command(&'static str),
}

impl std::fmt::Display for Actor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tool(name) => f.write_str(name),
            Self::Keeper => f.write_str("keeper"),
            Self::Command(name) => write!(f, "command {name}"),
        }
    }
}

impl Audit {
    pub fn new(home: &Home) -> Self {
        Self { path: home.audit_file() }
    }

    /// `facts` is a JSON object, like `{"pod": "comfy", "usd_per_hour": 0.5}`.
    pub fn note(&self, actor: Actor, event: &str, facts: Value) {
        let mut line = Map::new();
        line.insert("at".to_owned(), json!(Timestamp::now()));
        line.insert("actor".to_owned(), json!(actor.to_string()));
        line.insert("event".to_owned(), json!(event));
        if let Value::Object(facts) = facts {
            line.extend(facts.into_iter().filter(|(_, value)| !value.is_null()));
        }
        for value in line.values_mut() {
            if let Value::String(text) = value {
                *text = harmless(text).chars().take(1000).collect();
            }
        }
        let mut bytes = Value::Object(line).to_string().into_bytes();
        bytes.truncate(MOST_BYTES - 1);
        bytes.push(b'\n');
        let written = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&self.path)
            .and_then(|mut file| file.write_all(&bytes));
        if let Err(error) = written {
            tracing::error!(file = %self.path.display(), %error, event, "the audit log can't be written");
        }
    }

    /// The last notes, the newest last. Lines that are no notes of ours are left out.
    pub fn last(&self, most: usize) -> std::io::Result<Vec<Map<String, Value>>> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        let mut notes: Vec<_> = bytes
            .split(|byte| *byte == b'\n')
            .rev()
            .filter_map(|line| serde_json::from_slice(line).ok())
            .take(most)
            .collect();
        notes.reverse();
        Ok(notes)
    }
}
