//! Asking on the terminal: a key is not shown while it is typed.

use std::io::{BufRead, IsTerminal, Read, Write};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use secrecy::SecretString;

use crate::cli::signals::Signals;
use crate::config::API_KEY;
use crate::tools::{ErrorKind, ToolError};

/// A key is some fifty characters.
const MOST_KEY_BYTES: u64 = 4096;

/// Whether somebody is there to ask.
pub(super) fn is_interactive() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// The key from stdin: typed unseen on a terminal, else its first line.
pub(super) async fn read_key() -> Result<SecretString, ToolError> {
    let line = if std::io::stdin().is_terminal() {
        let _hidden = HiddenInput::start()?;
        ask("RunPod API key (it is not shown): ").await?
    } else {
        read_line().await?
    };
    checked_key(&line)
}

/// One line, typed after `question`, which goes to stderr: stdout is for what is asked for.
pub(super) async fn ask(question: &str) -> Result<String, ToolError> {
    let _ = write!(std::io::stderr().lock(), "{question}");
    let _ = std::io::stderr().flush();
    let mut signals = Signals::listen()?;
    // Ctrl-C has to end this by way of here, or the terminal would stay as it was changed for the question.
    tokio::select! {
        line = read_line() => line,
        _ = signals.received() => Err(ToolError::new(ErrorKind::Interrupted, "interrupted; nothing was saved")),
    }
}

async fn read_line() -> Result<String, ToolError> {
    let read = || {
        let mut line = String::new();
        std::io::stdin().lock().take(MOST_KEY_BYTES).read_line(&mut line).map(|_| line)
    };
    let line =
        tokio::task::spawn_blocking(read).await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
    line.map_err(|error| ToolError::new(ErrorKind::InvalidInput, format!("stdin can't be read: {error}")))
}

fn checked_key(line: &str) -> Result<SecretString, ToolError> {
    let key = line.trim();
    if key.is_empty() {
        return Err(super::no_way_to_ask("no key was given; nothing was saved"));
    }
    if !key.chars().all(|c| c.is_ascii_graphic()) {
        return Err(ToolError::invalid(API_KEY, "a key is one word of letters, digits and signs; nothing was saved"));
    }
    Ok(SecretString::from(key.to_owned()))
}

/// The terminal without its echo, as long as this lives.
struct HiddenInput {
    before: Termios,
}

impl HiddenInput {
    fn start() -> Result<Self, ToolError> {
        let failed = |error: rustix::io::Errno| {
            ToolError::new(ErrorKind::Setup, format!("the terminal can't be kept from showing the key: {error}"))
                .hint("give it with --key-stdin instead")
        };
        let before = tcgetattr(std::io::stdin()).map_err(failed)?;
        let mut hidden = before.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        // The end of the line is still seen.
        hidden.local_modes.insert(LocalModes::ECHONL);
        tcsetattr(std::io::stdin(), OptionalActions::Flush, &hidden).map_err(failed)?;
        Ok(Self { before })
    }
}

impl Drop for HiddenInput {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.before);
    }
}
