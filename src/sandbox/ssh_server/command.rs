//! One command run over SSH: a real shell inside the pod, its three streams and its exit status.
//!
//! Where the pod can't be isolated from this machine, a command is refused with exit code 126 and the reason. Only a
//! session that does nothing but say a line and hold still, as tunnels have it, needs neither files nor processes, so
//! it is carried out there by the server itself; see [`held_line`].

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::process::{ExitStatus, Stdio};

use russh::server::{Handle, Msg};
use russh::{Channel, ChannelId, ChannelMsg, ChannelReadHalf, ChannelWriteHalf, Sig};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin};
use tokio_util::sync::CancellationToken;

use super::super::container::isolation::Isolation;
use super::super::container::log::EventLog;

/// The extended data type of standard error (RFC 4254, 5.2).
const STDERR: u32 = 1;
/// What a shell answers for a command that can't be started.
const NOT_STARTED: u32 = 126;

pub struct Run {
    pub command: Vec<u8>,
    pub isolation: Isolation,
    pub handle: Handle,
    /// Cancelled when the channel, its connection or the pod is gone.
    pub ended: CancellationToken,
    pub log: EventLog,
}

impl Run {
    /// Runs the command and closes the channel behind it. If the channel ends first, the command and all of its
    /// process group are killed.
    pub async fn carry_out(self, channel: Channel<Msg>) {
        let id = channel.id();
        let (from_client, to_client) = channel.split();
        // Nobody may be left to hear any of what is said on the way, so that failures to say it are ignored.
        let exit_code = match self.start().await {
            Ok((child, group)) => {
                let status = self.accompany(child, group, from_client, &to_client).await;
                let _ = to_client.eof().await;
                if let Some(status) = status {
                    self.report(id, status).await;
                }
                status.and_then(|status| status.code())
            }
            Err(reason) => match held_line(&self.command) {
                Some(line) => self.hold(line, from_client, &to_client).await,
                None => {
                    let _ = to_client.extended_data_bytes(STDERR, format!("sandbox: {reason}\n").into_bytes()).await;
                    let _ = to_client.exit_status(NOT_STARTED).await;
                    Some(NOT_STARTED as i32)
                }
            },
        };
        self.log.add("command", json!({ "exit_code": exit_code }));
        let _ = to_client.eof().await;
        let _ = to_client.close().await;
    }

    /// The reason it fails with is one line.
    async fn start(&self) -> Result<(Child, ProcessGroup), String> {
        let mut shell = self.isolation.shell(OsStr::from_bytes(&self.command)).await.map_err(|no| no.to_string())?;
        shell.current_dir("/").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let child = shell.spawn().map_err(|error| {
            tracing::warn!(%error, "a command could not be started");
            error.to_string()
        })?;
        let group = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        Ok((child, ProcessGroup(group)))
    }

    /// Carries its streams until it ends; `None` if it had to be ended.
    async fn accompany(
        &self,
        mut child: Child,
        group: ProcessGroup,
        from_client: ChannelReadHalf,
        to_client: &ChannelWriteHalf<Msg>,
    ) -> Option<ExitStatus> {
        let stdin = child.stdin.take();
        let mut out = (child.stdout.take(), to_client.make_writer());
        let mut err = (child.stderr.take(), to_client.make_writer_ext(Some(STDERR)));
        let status = tokio::select! {
            // Like sshd, first the streams' ends, then the exit status: a process left behind in the background that
            // still holds them keeps the channel open.
            status = async {
                let (status, _, _) =
                    tokio::join!(child.wait(), copy(&mut out.0, &mut out.1), copy(&mut err.0, &mut err.1));
                status.ok()
            } => status,
            () = feed(stdin, from_client) => None,
            () = self.ended.cancelled() => None,
        };
        match status {
            Some(_) => group.leave(),
            None => {
                drop(group);
                // Reaps it.
                let _ = child.wait().await;
            }
        }
        status
    }

    /// Says the line and holds still until the client's end of file.
    async fn hold(&self, line: &str, from_client: ChannelReadHalf, to_client: &ChannelWriteHalf<Msg>) -> Option<i32> {
        let _ = to_client.data_bytes(format!("{line}\n").into_bytes()).await;
        tokio::select! {
            ended = end_of_stdin(from_client) => ended.then_some(())?,
            () = self.ended.cancelled() => return None,
        }
        let _ = to_client.exit_status(0).await;
        Some(0)
    }

    async fn report(&self, id: ChannelId, status: ExitStatus) {
        use std::os::unix::process::ExitStatusExt;
        let _ = match (status.code(), status.signal()) {
            (Some(code), _) => self.handle.exit_status_request(id, code.unsigned_abs()).await,
            (None, Some(signal)) => {
                let dumped = status.core_dumped();
                self.handle.exit_signal_request(id, signal_name(signal), dumped, String::new(), String::new()).await
            }
            (None, None) => Ok(()),
        };
    }
}

/// Kills a process group when it is dropped.
struct ProcessGroup(Option<Pid>);

impl ProcessGroup {
    /// Leaves the group alone: its leader ended by itself, so that its number may soon belong to another group.
    fn leave(mut self) {
        self.0 = None;
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // It fails when the group is already gone, which is what was wanted.
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

/// Copies a stream of the command to the client until it ends or the client is gone.
async fn copy<R, W>(from: &mut Option<R>, to: &mut W) -> io::Result<()>
where
    R: tokio::io::AsyncRead + Unpin,
    W: tokio::io::AsyncWrite + Unpin,
{
    let Some(from) = from else { return Ok(()) };
    let mut from = tokio::io::BufReader::with_capacity(64 * 1024, from);
    tokio::io::copy_buf(&mut from, to).await?;
    Ok(())
}

/// The words of a session that only says them and then holds still until its stdin ends.
fn held_line(command: &[u8]) -> Option<&str> {
    let line = std::str::from_utf8(command).ok()?.strip_prefix("echo ")?.strip_suffix("; exec cat >/dev/null")?;
    // Nothing that a shell would read as more than a word.
    line.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b' ')).then_some(line)
}

/// Gives the client's data to the command and its end of file as the end of stdin. Returns when the channel is closed.
async fn feed(mut stdin: Option<ChildStdin>, mut from_client: ChannelReadHalf) {
    while let Some(message) = from_client.wait().await {
        match message {
            ChannelMsg::Data { data } => {
                if let Some(pipe) = &mut stdin
                    && pipe.write_all(&data).await.is_err()
                {
                    // It no longer listens, but may still have something to say.
                    stdin = None;
                }
            }
            ChannelMsg::Eof => stdin = None,
            ChannelMsg::Close => return,
            _ => {}
        }
    }
}

/// Whether the client's end of file came, and not the channel's.
async fn end_of_stdin(mut from_client: ChannelReadHalf) -> bool {
    while let Some(message) = from_client.wait().await {
        match message {
            ChannelMsg::Eof => return true,
            ChannelMsg::Close => return false,
            _ => {}
        }
    }
    false
}

fn signal_name(signal: i32) -> Sig {
    match Signal::from_named_raw(signal) {
        Some(Signal::ABORT) => Sig::ABRT,
        Some(Signal::ALARM) => Sig::ALRM,
        Some(Signal::FPE) => Sig::FPE,
        Some(Signal::HUP) => Sig::HUP,
        Some(Signal::ILL) => Sig::ILL,
        Some(Signal::INT) => Sig::INT,
        Some(Signal::KILL) => Sig::KILL,
        Some(Signal::PIPE) => Sig::PIPE,
        Some(Signal::QUIT) => Sig::QUIT,
        Some(Signal::SEGV) => Sig::SEGV,
        Some(Signal::TERM) => Sig::TERM,
        Some(Signal::USR1) => Sig::USR1,
        _ => Sig::Custom(format!("{signal}@autopod")),
    }
}
