//! One command in a pod: its streams, its exit code, a bound for its time and its output.

use std::io::Read;
use std::process::Stdio;
use std::time::Duration;

use tempfile::NamedTempFile;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin};

use super::cause::classify;
use super::{Cause, Log, Ssh, Target, Terminal};
use crate::errors::chain;
use crate::state;

/// What ssh exits with when it failed itself; a command may do so too.
const FAILED: i32 = 255;
/// By these ssh's log tells that the far end said how the command ended: with a code, or by a signal.
const ENDED: [&str; 2] = ["rtype exit-status", "rtype exit-signal"];
/// A log holds about a hundred lines; more is not read.
const MOST_LOG: u64 = 1 << 20;

/// What a command reads.
#[derive(Debug)]
pub enum Stdin {
    Nothing,
    Bytes(Vec<u8>),
    File(std::fs::File),
    /// What this program reads.
    Inherited,
}

#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// From the start of ssh to the command's end.
    pub timeout: Duration,
    /// How many bytes are kept of each output stream.
    pub max_output: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// 255 also for a command that was killed by a signal.
    pub exit_code: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    /// There was more output than was kept.
    pub truncated: bool,
}

impl Ssh {
    /// Runs one command line of the pod's shell to its end. Cancel-safe: ssh ends with the returned future. A command
    /// whose ssh ended early may go on in the pod, with its streams closed.
    pub async fn run(&self, target: &Target, command: &str, stdin: Stdin, limits: Limits) -> Result<Output, Cause> {
        let (stdin, bytes) = match stdin {
            Stdin::Nothing => (Stdio::null(), Vec::new()),
            Stdin::Bytes(bytes) => (Stdio::piped(), bytes),
            Stdin::File(file) => (Stdio::from(file), Vec::new()),
            Stdin::Inherited => (Stdio::inherit(), Vec::new()),
        };
        let mut session = self.session(target, command, stdin, Stdio::piped(), Stdio::piped())?;
        let feeding = feed(session.child.stdin.take(), bytes);
        let reading = keep_head(session.child.stdout.take(), limits.max_output);
        let reading_errors = keep_head(session.child.stderr.take(), limits.max_output);
        let work = async { tokio::join!(feeding, reading, reading_errors, session.ended()) };
        match tokio::time::timeout(limits.timeout, work).await {
            Ok(((), (stdout, more_stdout), (stderr, more_stderr), ended)) => {
                Ok(Output { exit_code: ended?, stdout, stderr, truncated: more_stdout || more_stderr })
            }
            Err(_) => {
                session.stop().await;
                Err(Cause::TimedOut(limits.timeout))
            }
        }
    }

    /// Starts one command line of the pod's shell, its streams joined to these.
    pub fn session(
        &self,
        target: &Target,
        command: &str,
        stdin: Stdio,
        stdout: Stdio,
        stderr: Stdio,
    ) -> Result<Session, Cause> {
        let log = state::temporary_file(&self.folder).map_err(|error| Cause::NotStarted(chain(&error)))?;
        // Relative, for ssh runs in that folder.
        let name = log.path().file_name().unwrap_or_default().as_ref();
        let mut ssh = self.client(target, Terminal::None, Log::File(name))?;
        ssh.args(["--", &target.host, command]).stdin(stdin).stdout(stdout).stderr(stderr).kill_on_drop(true);
        Ok(Session { child: ssh.spawn().map_err(Cause::of_spawn)?, log })
    }
}

/// A running command. Its ssh ends with this value.
#[derive(Debug)]
pub struct Session {
    pub child: Child,
    /// ssh's own words, kept apart from the command's: what a pod says must not pass for what ssh says, and 255 is the
    /// exit code of both.
    log: NamedTempFile,
}

impl Session {
    /// Waits for the command's exit code. The cause is ssh's own failure, never the command's.
    pub async fn ended(&mut self) -> Result<i32, Cause> {
        let status = self.child.wait().await.map_err(|error| Cause::Lost(error.to_string()))?;
        if let Some(code) = status.code().filter(|code| *code != FAILED) {
            return Ok(code);
        }
        let mut log = Vec::new();
        // One that can't be read leaves the exit status to tell.
        let _ = self.log.as_file_mut().take(MOST_LOG).read_to_end(&mut log);
        let lines: Vec<_> = String::from_utf8_lossy(&log).lines().map(|line| line.trim_end().to_owned()).collect();
        let far_end_told = lines.iter().any(|line| ENDED.iter().any(|ended| line.contains(ended)));
        match status.code() {
            Some(code) if far_end_told => Ok(code),
            _ => Err(classify(&lines, &status.to_string())),
        }
    }

    /// Ends ssh and proves it.
    pub async fn stop(mut self) {
        let _ = self.child.kill().await;
    }
}

async fn feed(stdin: Option<ChildStdin>, bytes: Vec<u8>) {
    if let Some(mut stdin) = stdin {
        // A command need not read what it is given.
        let _ = stdin.write_all(&bytes).await;
    }
}

/// The first bytes of a stream and whether there were more. It is read to its end, for a far end that can't get rid of
/// its output would never end.
pub(super) async fn keep_head(stream: Option<impl AsyncRead + Unpin>, most: usize) -> (Vec<u8>, bool) {
    let mut head = Vec::new();
    let Some(mut stream) = stream else { return (head, false) };
    let mut more = false;
    let mut chunk = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = stream.read(&mut chunk).await {
        let kept = read.min(most - head.len());
        head.extend_from_slice(&chunk[..kept]);
        more |= kept < read;
    }
    (head, more)
}
