//! `serve`: the server that AI assistants start.

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::signals::Signals;
use crate::app::{self, AppOptions};
use crate::server::{LazyServices, mcp};
use crate::tools::ToolError;

/// Serve the tools to an AI assistant: MCP over stdin and stdout. It ends when stdin does.
#[derive(Debug, Args)]
pub(super) struct ServeArgs {}

pub(super) async fn run(options: AppOptions, _args: ServeArgs) -> Result<u8, ToolError> {
    let mut signals = Signals::listen()?;
    let stop = CancellationToken::new();
    let serving = mcp::serve(tokio::io::stdin(), tokio::io::stdout(), lazily(options), stop.clone());
    tokio::pin!(serving);
    tokio::select! {
        () = &mut serving => Ok(0),
        code = signals.received() => {
            stop.cancel();
            serving.await;
            Ok(code)
        }
    }
}

/// The services of these options, wired at the first call.
pub(super) fn lazily(options: AppOptions) -> LazyServices {
    LazyServices::new(move || {
        let options = options.clone();
        Box::pin(async move { app::services(&options).await })
    })
}
