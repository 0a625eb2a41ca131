//! Named steps at which a test can kill this process: what survives a crash is shown by crashing there.
//!
//! Nothing happens unless a step was named in the environment; then the process that reaches it first kills itself as
//! `kill -9` would, once, so that what starts in its place goes on.

use std::path::PathBuf;
use std::sync::OnceLock;

use rustix::process::{Signal, getpid, kill_process};

static ARMED: OnceLock<Armed> = OnceLock::new();

struct Armed {
    step: String,
    /// Made by the process that dies; who finds it lives on.
    mark: PathBuf,
}

/// `order` is `STEP=MARK`: the step, and a file that tells that it was reached.
pub fn arm(order: &str) {
    if let Some((step, mark)) = order.split_once('=') {
        // A second order in one process has no meaning.
        let _ = ARMED.set(Armed { step: step.to_owned(), mark: PathBuf::from(mark) });
    }
}

/// Every step there is, in their order; a test goes through all of them. The last is the tool's own way, when no keeper
/// takes the ending up.
pub const ALL: &[&str] = &[
    "caller: create resolved",
    "caller: create wanted",
    "caller: keeper woken",
    "keeper: create taken",
    "keeper: create journaled",
    "keeper: create answered",
    "keeper: create recorded",
    "caller: action wanted",
    "keeper: action journaled",
    "keeper: action answered",
    "keeper: action recorded",
    "caller: extend wanted",
    "keeper: switch moved",
    "keeper: extend recorded",
    "caller: terminate wanted",
    "keeper: ending decided",
    "keeper: deleted",
    "keeper: gone recorded",
    "caller: deleted without keeper",
];

/// The process has come to this step.
pub fn reached(step: &'static str) {
    debug_assert!(ALL.contains(&step), "{step} is not listed");
    let Some(armed) = ARMED.get().filter(|armed| armed.step == step) else { return };
    if std::fs::OpenOptions::new().write(true).create_new(true).open(&armed.mark).is_ok() {
        let _ = kill_process(getpid(), Signal::KILL);
    }
}
