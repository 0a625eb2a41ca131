//! What the demo shows: a line a step, live while it runs, a closing table, and the same as a log file.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use comfy_table::{Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use serde_json::Value;

use super::{LIFETIME_MINUTES, Story, output, seconds};
use crate::cli::render;
use crate::tools::ToolError;
use crate::tools::context::Progress;

pub(super) struct Screen {
    log: Arc<Mutex<File>>,
    log_path: PathBuf,
    /// Live lines need a terminal; elsewhere every step of progress is a line of its own.
    live: bool,
}

/// The line of the step that runs.
pub(super) struct Line {
    bar: Option<ProgressBar>,
    title: &'static str,
    log: Arc<Mutex<File>>,
}

impl Screen {
    pub(super) fn new(output_dir: &Path) -> Result<Self, ToolError> {
        let log_path = output_dir.join("demo.log");
        let log = File::create(&log_path).map_err(|error| {
            ToolError::invalid("--output-dir", format!("`{}` can't be written: {error}", log_path.display()))
        })?;
        Ok(Self { log: Arc::new(Mutex::new(log)), log_path, live: std::io::stdout().is_terminal() })
    }

    pub(super) fn say(&self, text: &str) {
        output::say(text);
        write_log(&self.log, text);
    }

    pub(super) fn begin(&self, title: &'static str) -> Line {
        let bar = self.live.then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix:20} {msg}") {
                bar.set_style(style);
            }
            bar.set_prefix(title);
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Line { bar, title, log: self.log.clone() }
    }

    /// Each call with its arguments and answer, as an assistant sees them.
    pub(super) fn log(&self, tool: &str, arguments: &Value, answer: &Value) {
        write_log(&self.log, &format!("{tool} {arguments} -> {answer}"));
    }

    pub(super) fn interrupted(&self) {
        self.say("Interrupted; ending the pod and the sandbox.");
    }

    pub(super) fn close(&self, story: &Story) {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED).set_header(["What ran", "What came of it", "Took"]);
        for (title, told, took) in &story.steps {
            table.add_row([(*title).to_owned(), told.clone(), seconds(*took)]);
        }
        let cost = format!("${:.4} (of the sandbox's play money)", story.cost_usd);
        table.add_row(["In all".to_owned(), cost, seconds(story.took)]);
        table.add_row([
            "Left behind".to_owned(),
            "nothing: no pod, no tunnel, no process, no state".to_owned(),
            String::new(),
        ]);
        self.say(&format!("\n{table}"));
        self.point_to_files(story);
    }

    fn point_to_files(&self, story: &Story) {
        for picture in &story.pictures {
            self.say(&format!("Picture: {}", from_here(Path::new(picture))));
        }
        self.say(&format!("Log:     {}", from_here(&self.log_path)));
    }

    pub(super) fn kept(&self, home: &Path, story: &Story) {
        self.say("");
        self.point_to_files(story);
        let home = shell_quoted(home);
        // Started by `cargo run` it is on no PATH, and these lines are to be copied.
        let program = std::env::current_exe().map_or_else(|_| "autopod-mcp".to_owned(), |path| shell_quoted(&path));
        self.say(&format!(
            "\nThe pod and its tunnel stay up, the pod for {LIFETIME_MINUTES} minutes. Use them:\n  \
             AUTOPOD_HOME={home} {program} --sandbox pod list\n  \
             AUTOPOD_HOME={home} {program} --sandbox comfy status\n\
             End and remove them:\n  \
             AUTOPOD_HOME={home} {program} --sandbox pod kill demo\n  \
             AUTOPOD_HOME={home} {program} sandbox --stop\n  \
             rm -r {home}"
        ));
    }
}

impl Line {
    pub(super) fn progress(&self) -> Progress {
        let (bar, title, log) = (self.bar.clone(), self.title, self.log.clone());
        Progress::to(move |update| {
            let message = render::clean(&update.message);
            match &bar {
                Some(bar) => bar.set_message(message.clone()),
                None => output::say(&format!("  {title}: {message}")),
            }
            write_log(&log, &format!("  {title}: {message}"));
        })
    }

    pub(super) fn done(self, told: &str, took: Duration) {
        let text = format!("✓ {:20} {} ({})", self.title, render::clean(told), seconds(took));
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        output::say(&text);
        write_log(&self.log, &text);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A log that can't be written is no reason to stop the story.
fn write_log(log: &Mutex<File>, text: &str) {
    let mut file = log.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = writeln!(file, "{:.3} {text}", Timestamp::now());
}

/// Short where it can be.
fn from_here(path: &Path) -> String {
    let here = std::env::current_dir().ok().and_then(|here| here.canonicalize().ok());
    let short = here.as_deref().and_then(|here| path.strip_prefix(here).ok());
    short.unwrap_or(path).display().to_string()
}

fn shell_quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}
