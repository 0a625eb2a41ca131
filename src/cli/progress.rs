//! How far a call has come, on stderr: lines for `call`, a bar for people at a terminal.

use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::{output, render};
use crate::tools::context::Progress;

/// A line for every new message.
pub(super) fn lines() -> Progress {
    let last = Mutex::new(String::new());
    Progress::to(move |update| {
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if *last != update.message {
            output::complain(&render::clean(&update.message));
            *last = update.message;
        }
    })
}

/// One moving line that is gone when the call is over; nothing where stderr is no terminal.
pub(super) struct Bar(Option<ProgressBar>);

impl Bar {
    pub(super) fn start() -> Self {
        if !std::io::stderr().is_terminal() {
            return Self(None);
        }
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} [{elapsed}]") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        Self(Some(bar))
    }

    /// For whoever needs its line for a while.
    pub(super) fn drawn(&self) -> Option<ProgressBar> {
        self.0.clone()
    }

    pub(super) fn progress(&self) -> Progress {
        let Some(bar) = self.0.clone() else { return Progress::none() };
        Progress::to(move |update| {
            let message = render::clean(&update.message);
            bar.set_message(match update.total {
                Some(total) if total > 0.0 => format!("{message} ({:.0} %)", 100.0 * update.value / total),
                _ => message,
            });
        })
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
