//! `serve`: the server that AI assistants start.

use std::sync::{Arc, Mutex, PoisonError};

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::offer::OfferArgs;
use super::signals::Signals;
use crate::app::{self, AppOptions};
use crate::server::LazyServices;
use crate::server::mcp::{self, Surroundings};
use crate::timing::KEEPER_LOOKED_AFTER_EVERY;
use crate::tools::ToolError;

/// Serve the tools to an AI assistant: MCP over stdin and stdout
///
/// It ends when stdin does.
#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    #[command(flatten)]
    offer: OfferArgs,
}

pub(super) async fn run(options: AppOptions, args: ServeArgs) -> Result<u8, ToolError> {
    let offer = args.offer.chosen()?;
    let mut signals = Signals::listen()?;
    let stop = CancellationToken::new();
    let services = lazily(options.clone());
    let surroundings = if options.sandbox { Surroundings::Sandbox } else { Surroundings::RunPod };
    tokio::spawn(look_after_keeper(options, services.clone()));
    let serving = mcp::serve(tokio::io::stdin(), tokio::io::stdout(), services, surroundings, offer, stop.clone());
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

/// While a server runs, a keeper that died with its guard is started again within seconds. A sandbox isn't started for
/// that: its pods end with it.
pub(super) async fn look_after_keeper(options: AppOptions, services: LazyServices) {
    loop {
        tokio::time::sleep(KEEPER_LOOKED_AFTER_EVERY).await;
        let services = if options.sandbox { services.built().await } else { services.get().await.ok() };
        let Some(services) = services else { continue };
        if let Err(error) = services.revive_keeper().await {
            tracing::warn!(%error, "the keeper can't be started");
        }
    }
}

/// The services of these options, wired at the first call, and again when the config file has changed: a key or a limit
/// that the user sets counts from the next call on.
pub(super) fn lazily(options: AppOptions) -> LazyServices {
    let is_sandbox = options.sandbox;
    let last = Arc::new(Mutex::new(None));
    let built_from = Arc::new(Mutex::new(None));
    let is_stale = {
        let (options, built_from) = (options.clone(), built_from.clone());
        move || *built_from.lock().unwrap_or_else(PoisonError::into_inner) != app::config_stamp(&options)
    };
    let services = LazyServices::new(move || {
        let options = options.clone();
        // Before the file is read: a change in between is seen at the next call.
        *built_from.lock().unwrap_or_else(PoisonError::into_inner) = app::config_stamp(&options);
        let last = last.clone();
        Box::pin(async move {
            let before = last.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let services = app::services_after(&options, before).await?;
            *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(services.clone());
            Ok(services)
        })
    });
    let services = services.renewed_when(is_stale);
    if is_sandbox { services.checked(app::check_world) } else { services }
}
