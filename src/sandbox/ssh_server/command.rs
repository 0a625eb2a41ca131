//! One command run over SSH: a real shell with an empty environment, its three streams and its exit status.

use std::io;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};

use russh::server::{Handle, Msg};
use russh::{Channel, ChannelId, ChannelMsg, ChannelReadHalf, Sig};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin, Command};
use tokio_util::sync::CancellationToken;

use super::super::container::log::EventLog;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The extended data type of standard error (RFC 4254, 5.2).
const STDERR: u32 = 1;
/// What a shell answers for a command that can't be started.
const NOT_STARTED: u32 = 126;

pub struct Run {
    pub command: Vec<u8>,
    /// HOME and current folder of the command.
    pub folder: PathBuf,
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
        // Nobody may be left to hear any of these, so that failures to say them are ignored.
        let status = match self.start() {
            Ok((mut child, group)) => {
                let stdin = child.stdin.take();
                let mut out = (child.stdout.take(), to_client.make_writer());
                let mut err = (child.stderr.take(), to_client.make_writer_ext(Some(STDERR)));
                let status = tokio::select! {
                    // Like sshd, first the streams' ends, then the exit status: a process left behind in the
                    // background that still holds them keeps the channel open.
                    status = async {
                        let (status, _, _) = tokio::join!(
                            child.wait(),
                            copy(&mut out.0, &mut out.1),
                            copy(&mut err.0, &mut err.1),
                        );
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
            Err(error) => {
                tracing::warn!(%error, "a command could not be started");
                let _ = to_client.extended_data_bytes(STDERR, format!("sandbox: {error}\n").into_bytes()).await;
                let _ = to_client.exit_status(NOT_STARTED).await;
                None
            }
        };
        self.log.add("command", json!({ "exit_code": status.and_then(|status| status.code()) }));
        let _ = to_client.eof().await;
        if let Some(status) = status {
            self.report(id, status).await;
        }
        let _ = to_client.close().await;
    }

    fn start(&self) -> io::Result<(Child, ProcessGroup)> {
        use std::os::unix::ffi::OsStrExt;
        let child = Command::new("/bin/sh")
            .arg("-c")
            .arg(std::ffi::OsStr::from_bytes(&self.command))
            .env_clear()
            .env("PATH", PATH)
            .env("HOME", &self.folder)
            .current_dir(&self.folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let group = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        Ok((child, ProcessGroup(group)))
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
