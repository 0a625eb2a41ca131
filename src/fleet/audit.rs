//! `audit.jsonl`: every money action and its cause, one JSON line each, appended and never rewritten.
//!
//! It holds no secrets: names, ids, prices and causes only. That it can't be written keeps nobody from ending a pod, so
//! a failure is logged and nothing more.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;

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
        if let Err(error) = self.append(&written(line)) {
            tracing::error!(file = %self.path.display(), %error, event, "the audit log can't be written");
        }
    }

    fn append(&self, line: &str) -> std::io::Result<()> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&self.path)?;
        wait_for_others(&file);
        // What a full disk or a crash has cut short stays a line of its own.
        let mut last = [b'\n'];
        if file.metadata()?.len() > 0 {
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
        }
        let before = if last == *b"\n" { "" } else { "\n" };
        file.write_all(format!("{before}{line}\n").as_bytes())
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

/// Half of another's line would look like one that was cut short. Nobody waits for long: a writer that hangs keeps no
/// pod from being ended. The lock goes with the file.
fn wait_for_others(file: &File) {
    for _ in 0..50 {
        if fs2::FileExt::try_lock_exclusive(file).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The note as JSON, without its longest facts where it would be too long with them.
fn written(mut note: Map<String, Value>) -> String {
    loop {
        let line = Value::Object(note.clone()).to_string();
        if line.len() < MOST_BYTES {
            return line;
        }
        let length = |value: &Value| value.to_string().len();
        let longest = note.iter().max_by_key(|(_, value)| length(value)).map(|(name, _)| name.clone());
        note.insert(longest.unwrap_or_default(), json!("left out: too long"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_is_a_note_after_a_torn_one_and_with_facts_of_any_length() {
        let folder = tempfile::tempdir().expect("a folder");
        let audit = Audit { path: folder.path().join("audit.jsonl") };
        audit.note(Actor::Keeper, "first", json!({ "pod": "a" }));
        let torn = r#"{"at": "2026-01-01T00:00:00Z", "actor": "kee"#;
        let mut file = OpenOptions::new().append(true).open(&audit.path).expect("the log");
        file.write_all(torn.as_bytes()).expect("written");
        let many: Vec<_> = (0..2000).map(|number| format!("cause {number}")).collect();
        audit.note(Actor::Keeper, "long", json!({ "pod": "b", "cause": "\n\u{1b}".repeat(5000), "causes": many }));
        audit.note(Actor::Keeper, "last", json!({ "pod": "c" }));
        let events: Vec<_> = audit.last(9).expect("notes").iter().map(|note| note["event"].clone()).collect();
        assert_eq!(events, ["first", "long", "last"]);
        let text = std::fs::read_to_string(&audit.path).expect("the log");
        let broken: Vec<_> = text.lines().filter(|line| serde_json::from_str::<Value>(line).is_err()).collect();
        assert_eq!(broken, [torn]);
        assert!(text.lines().all(|line| line.len() < MOST_BYTES));
    }
}
