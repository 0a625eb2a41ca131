//! The question to a person at a terminal: the real program behind a pseudo-terminal.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use tokio::process::{Child, Command};

use crate::faces_ask::{assert_alive, stranger};
use crate::story_support::Story;
use crate::support::program::{PATIENCE, until};

/// The program with a person's terminal as stdin, stdout and stderr.
pub struct Terminal {
    child: Child,
    keyboard: std::fs::File,
    screen: Arc<Mutex<String>>,
}

impl Terminal {
    fn start(story: &Story, arguments: &[&str]) -> Self {
        Self::of(story.command(arguments))
    }

    pub fn of(mut command: Command) -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pseudo-terminal");
        grantpt(&ours).and_then(|()| unlockpt(&ours)).expect("it is ours");
        let name = ptsname(&ours, Vec::new()).expect("its name");
        let path = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
        let theirs: OwnedFd =
            std::fs::OpenOptions::new().read(true).write(true).open(path).expect("its far end").into();
        let end = || Stdio::from(theirs.try_clone().expect("a file"));
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().expect("it starts");
        let keyboard = std::fs::File::from(ours);
        let mut output = keyboard.try_clone().expect("a file");
        let screen: Arc<Mutex<String>> = Arc::default();
        let seen = screen.clone();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // The last of the far ends to close makes it an error.
            while let Ok(count @ 1..) = output.read(&mut bytes) {
                seen.lock().expect("no panic").push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        Self { child, keyboard, screen }
    }

    pub fn types(&mut self, text: &str) {
        self.keyboard.write_all(text.as_bytes()).expect("it takes keys");
    }

    pub async fn shows(&self, words: &str) {
        until(words, async || self.screen.lock().expect("no panic").contains(words).then_some(())).await;
    }

    /// Its exit code.
    pub async fn ended(&mut self) -> Option<i32> {
        let ended = tokio::time::timeout(PATIENCE, self.child.wait()).await.expect("it ends");
        ended.expect("its end can be waited for").code()
    }
}

#[tokio::test]
async fn a_person_is_asked_and_only_a_y_is_a_yes() {
    let story = Story::begin();
    let id = stranger(&story).await;
    let command = ["pod", "kill", &id, "--allow-unmanaged"];
    let question = format!("(id {id})? It was not made by this program. What is on its disk is lost. [y/N] ");

    for (keys, code) in [("n\n", 4), ("\n", 4), ("\u{4}", 4), ("yesterday\n", 4)] {
        let mut terminal = Terminal::start(&story, &command);
        // Whoever types before the question is there has not read it.
        terminal.types("y\n");
        terminal.shows(&question).await;
        terminal.types(keys);
        assert_eq!(terminal.ended().await, Some(code), "{keys:?}");
        terminal.shows("--confirm-pod-id").await;
    }
    let mut terminal = Terminal::start(&story, &command);
    terminal.shows(&question).await;
    let pid = terminal.child.id().and_then(|pid| Pid::from_raw(pid as i32)).expect("it runs");
    kill_process(pid, Signal::INT).expect("the signal is sent");
    assert_eq!(terminal.ended().await, Some(130));
    assert_alive(&story, &id, true).await;

    let mut terminal = Terminal::start(&story, &command);
    terminal.shows(&question).await;
    terminal.types("Y\n");
    assert_eq!(terminal.ended().await, Some(0));
    assert_alive(&story, &id, false).await;
    story.end().await;
}

/// `call` is for programs, which would wait for an answer that nobody gives.
#[tokio::test]
async fn a_program_is_not_asked_at_a_terminal_either() {
    let story = Story::begin();
    let id = stranger(&story).await;
    let arguments = format!("{{\"pod\": \"{id}\", \"allow_unmanaged\": true}}");
    let mut terminal = Terminal::start(&story, &["call", "terminate_pod", &arguments]);
    assert_eq!(terminal.ended().await, Some(4));
    terminal.shows("nobody can be asked").await;
    story.end().await;
}
