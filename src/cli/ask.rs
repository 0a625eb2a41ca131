//! A question at the terminal, for a person who typed a command.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget};
use rustix::termios::{QueueSelector, tcflush};

use super::output;
use super::progress::Bar;
use super::render;
use crate::tools::context::{Answered, Ask, Question};

/// Takes the terminal's line back to its beginning and empties it, for a bar may have drawn there.
const CLEAR_LINE: &str = "\r\x1b[2K";

/// Asks on stderr and reads a line from stdin; only a y is a yes. Nobody can be asked unless both are terminals.
pub(super) fn at_terminal(bar: &Bar) -> Ask {
    if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
        return Ask::cannot();
    }
    let bar = bar.drawn();
    Ask::by(move |question| asked(bar.clone(), question))
}

async fn asked(bar: Option<ProgressBar>, question: Question) -> Answered {
    let mut shown = Shown::over(bar);
    // What was typed before the question was there doesn't answer it.
    if tcflush(std::io::stdin(), QueueSelector::IFlush).is_err() {
        return Answered::CannotAsk;
    }
    let mut stderr = std::io::stderr();
    let prompt = format!("{CLEAR_LINE}{} [y/N] ", render::clean(&question.message));
    if stderr.write_all(prompt.as_bytes()).and_then(|()| stderr.flush()).is_err() {
        return Answered::CannotAsk;
    }
    let read = || {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).map(|_| line)
    };
    // Nothing can interrupt this thread; who waits no longer leaves it behind, and it ends with the process.
    let Ok(Ok(line)) = tokio::task::spawn_blocking(read).await else { return Answered::Declined };
    shown.line_is_ended = line.ends_with('\n');
    match line.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Answered::Yes,
        _ => Answered::Declined,
    }
}

/// A question in the bar's place. When it goes, answered or not, the bar comes back on a line of its own.
struct Shown {
    bar: Option<ProgressBar>,
    line_is_ended: bool,
}

impl Shown {
    fn over(bar: Option<ProgressBar>) -> Self {
        if let Some(bar) = &bar {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        Self { bar, line_is_ended: false }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if !self.line_is_ended {
            output::complain("");
        }
        if let Some(bar) = &self.bar {
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }
}
