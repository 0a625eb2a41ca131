//! The signals that end this program.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::tools::{ErrorKind, ToolError};

/// What ended a server, and so its exit code: 0 for SIGTERM, 130 for SIGINT.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// From here on these signals no longer end the process by themselves.
    pub(super) fn listen() -> Result<Self, ToolError> {
        let listen = |kind| {
            signal(kind)
                .map_err(|error| ToolError::new(ErrorKind::Setup, format!("signals can't be listened to: {error}")))
        };
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    /// The exit code to end with.
    pub(super) async fn received(&mut self) -> u8 {
        tokio::select! {
            _ = self.terminate.recv() => 0,
            _ = self.interrupt.recv() => ErrorKind::Interrupted.exit_code(),
        }
    }
}

/// The outcome of a call, unless the user presses Ctrl-C first.
pub(super) async fn interruptible<T>(call: impl Future<Output = Result<T, ToolError>>) -> Result<T, ToolError> {
    let mut signals = Signals::listen()?;
    tokio::select! {
        result = call => result,
        _ = signals.received() => Err(ToolError::new(ErrorKind::Interrupted, "interrupted")
            .hint("what was begun goes on in the background; `autopod-mcp call list_pods` shows what runs and costs")),
    }
}

/// Waits for SIGTERM or SIGINT.
pub(super) async fn terminated() {
    match Signals::listen() {
        Ok(mut signals) => drop(signals.received().await),
        Err(_) => std::future::pending().await,
    }
}
