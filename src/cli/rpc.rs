//! `rpc`: the server for programs that speak JSON-RPC.

use std::net::SocketAddr;

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::offer::OfferArgs;
use super::output;
use super::serve::{lazily, look_after_keeper};
use super::signals::Signals;
use crate::app::AppOptions;
use crate::server::json_rpc;
use crate::tools::{ErrorKind, ToolError};

/// Serve the tools to other programs: JSON-RPC 2.0 over HTTP and WebSocket
///
/// Each tool is a method with named parameters; `rpc.discover` describes them. HTTP and WebSocket share one port of this
/// machine, and ask for the bearer token from a file that is named at the start.
#[derive(Debug, Args)]
pub(super) struct RpcArgs {
    /// Where to listen; only loopback is allowed, port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    #[command(flatten)]
    offer: OfferArgs,
}

pub(super) async fn run(options: AppOptions, args: RpcArgs) -> Result<u8, ToolError> {
    let offer = args.offer.chosen()?;
    let mut signals = Signals::listen()?;
    if !args.listen.ip().is_loopback() {
        return Err(ToolError::invalid("listen", format!("{} is not a loopback address", args.listen.ip()))
            .hint("listen on 127.0.0.1, and reach it from elsewhere through ssh"));
    }
    let services = lazily(options.clone());
    let token_file = services.get().await?.home.root().join("rpc-token");
    let token = json_rpc::token(&token_file)?;
    let listener = tokio::net::TcpListener::bind(args.listen).await.map_err(|error| {
        ToolError::new(ErrorKind::Setup, format!("{} can't be listened on: {error}", args.listen))
            .hint("use --listen 127.0.0.1:0 for any free port")
    })?;
    let address = listener
        .local_addr()
        .map_err(|error| ToolError::new(ErrorKind::Setup, format!("the port has no address: {error}")))?;
    output::say(&format!("JSON-RPC: http://{address} and ws://{address}\nbearer token: {}", token_file.display()));
    tokio::spawn(look_after_keeper(options, services.clone()));
    let stop = CancellationToken::new();
    let serving = json_rpc::serve(listener, token, services, offer, stop.clone());
    tokio::pin!(serving);
    tokio::select! {
        result = &mut serving => result.map(|()| 0),
        code = signals.received() => {
            stop.cancel();
            serving.await.map(|()| code)
        }
    }
}
