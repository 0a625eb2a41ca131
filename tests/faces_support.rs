//! The real program, started in a home of its own and with no environment but what a test gives it.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::support::program::{self, PATIENCE};

/// A folder for state, removed at the end of the test.
pub struct TestHome(tempfile::TempDir);

impl TestHome {
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    pub fn path(&self) -> PathBuf {
        self.0.path().join("home")
    }

    pub fn folder(&self) -> &Path {
        self.0.path()
    }

    /// The program with these arguments, without a key.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = program::command(arguments);
        command.env("AUTOPOD_HOME", self.path()).current_dir(self.folder());
        command
    }

    /// Runs it to its end: exit code, stdout, stderr.
    pub async fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        finish(self.command(arguments)).await
    }
}

pub async fn finish(mut command: Command) -> (i32, String, String) {
    let output = tokio::time::timeout(PATIENCE, command.output()).await.expect("it ends").expect("it starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("its output is text");
    (output.status.code().expect("it ends by itself"), text(output.stdout), text(output.stderr))
}

/// The process of a server, and its pipes as a client of the protocol wants them.
pub fn start(mut command: Command) -> (Child, (ChildStdout, ChildStdin)) {
    let mut child = command.stdin(Stdio::piped()).stderr(Stdio::null()).spawn().expect("it starts");
    let stdout = child.stdout.take().expect("stdout is a pipe");
    let stdin = child.stdin.take().expect("stdin is a pipe");
    (child, (stdout, stdin))
}

/// A running server and its pipes.
pub struct Server {
    pub child: Child,
    pub stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Server {
    pub fn start(command: Command) -> Self {
        let (child, (stdout, stdin)) = start(command);
        Self { child, stdin: Some(stdin), lines: BufReader::new(stdout).lines() }
    }

    pub async fn send_text(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().expect("stdin is open");
        let send = async {
            stdin.write_all(text.as_bytes()).await?;
            stdin.flush().await
        };
        tokio::time::timeout(PATIENCE, send).await.expect("it reads").expect("its pipe is open");
    }

    pub async fn send(&mut self, message: Value) {
        self.send_text(&format!("{message}\n")).await;
    }

    pub async fn line(&mut self) -> String {
        let line = tokio::time::timeout(PATIENCE, self.lines.next_line()).await.expect("it answers");
        line.expect("its pipe is open").expect("it answers before it ends")
    }

    /// The next message; a line that is none fails the test.
    pub async fn receive(&mut self) -> Value {
        let line = self.line().await;
        let message: Value =
            serde_json::from_str(&line).unwrap_or_else(|error| panic!("not JSON on stdout ({error}): {line}"));
        assert_eq!(message["jsonrpc"], "2.0", "{line}");
        message
    }

    pub async fn ask(&mut self, id: u64, method: &str, params: Value) -> Value {
        self.send(json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params})).await;
        let answer = self.receive().await;
        assert_eq!(answer["id"], id, "{answer}");
        answer
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = self.child.id().and_then(|pid| rustix::process::Pid::from_raw(pid as i32)).expect("it runs");
        rustix::process::kill_process(pid, signal).expect("the signal is sent");
    }

    /// Its exit code, once it has ended and its output is read to the end.
    pub async fn ended(mut self) -> i32 {
        let end = async {
            while let Some(line) = self.lines.next_line().await.expect("its pipe can be read") {
                assert!(serde_json::from_str::<Value>(&line).is_ok(), "not JSON on stdout: {line}");
            }
            self.child.wait().await.expect("its end can be waited for").code()
        };
        tokio::time::timeout(PATIENCE, end).await.expect("it ends").expect("no signal killed it")
    }
}
