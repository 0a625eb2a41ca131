//! `keeper`: the background process of a home. Started by the program itself, not by people.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use secrecy::{ExposeSecret, SecretString};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::output;
use crate::app;
use crate::background::{KeeperSeed, Launcher, launch_keeper};
use crate::config::Home;
use crate::environment::Environment;
use crate::errors::chain;
use crate::keeper::{self, Ended, KeeperOptions, guard};
use crate::tools::{ErrorKind, ToolError};

/// Keep a home: the background process that holds its pods and tunnels
#[derive(Debug, Args)]
pub struct KeeperArgs {
    /// The home that it keeps.
    home: PathBuf,
    /// Be the worker that does everything, not the guard that restarts it.
    #[arg(long)]
    worker: bool,
}

pub async fn run(args: KeeperArgs, environment: &Environment, program: PathBuf) -> Result<u8, ToolError> {
    // Whoever started us may be killed with its whole process group; a session of our own takes us out of it. The
    // worker is in its guard's session already, and this fails harmlessly for a group's leader.
    let _ = rustix::process::setsid();
    if !args.home.is_dir() {
        // It was removed between our start and now, as a demo's home is; making it anew would leave it behind.
        return Err(ToolError::new(ErrorKind::Setup, format!("the home {} is gone", args.home.display())));
    }
    let home = Home::open(args.home)?;
    let launcher = Launcher { program, environment: environment.for_children.clone() };
    let mut stdin = BufReader::new(tokio::io::stdin());
    let seed = read_seed(&mut stdin).await?;
    let stop = CancellationToken::new();
    stop_on_signals(&stop)?;
    if args.worker {
        work(home, launcher, seed, stdin, stop).await
    } else {
        if seed.tethered {
            tokio::spawn(stop_at_end(stdin, stop.clone()));
        }
        guard::run(&launcher, &home, seed, stop).await;
        Ok(0)
    }
}

async fn work(
    home: Home,
    launcher: Launcher,
    seed: KeeperSeed,
    stdin: BufReader<tokio::io::Stdin>,
    stop: CancellationToken,
) -> Result<u8, ToolError> {
    let guard_died = CancellationToken::new();
    tokio::spawn({
        let (stop, guard_died) = (stop.clone(), guard_died.clone());
        async move {
            stop_at_end(stdin, guard_died).await;
            stop.cancel();
        }
    });
    let newest = Arc::new(std::sync::Mutex::new(seed.clone()));
    let options = KeeperOptions {
        timing: app::timing_for(&seed.origin),
        key: seed.key.clone().map(SecretString::from),
        connect: app::connect(Some(&home), &seed.origin, "autopod-keeper")?,
        origin: seed.origin.clone(),
        on_key: Arc::new({
            let newest = newest.clone();
            move |key| {
                // The guard reads it from our stdout, a pipe that nobody else sees.
                output::say(key.expose_secret());
                newest.lock().unwrap_or_else(std::sync::PoisonError::into_inner).key =
                    Some(key.expose_secret().to_owned());
            }
        }),
        ssh_environment: launcher.environment.clone(),
        home: home.clone(),
        stop,
    };
    let ended = keeper::run(options).await.map_err(|error| ToolError::new(ErrorKind::Internal, chain(&error)))?;
    if ended == Ended::Stopped && guard_died.is_cancelled() && !seed.tethered {
        // Without a guard nobody would start us again, so a new guard takes over, with a new worker.
        let seed = newest.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        launch_keeper(&launcher, &home, &seed).await?;
        return Ok(0);
    }
    // A guard that told us to end doesn't look at this; told by anybody else, it starts the next one.
    Ok(u8::from(ended == Ended::Stopped))
}

async fn read_seed(stdin: &mut BufReader<tokio::io::Stdin>) -> Result<KeeperSeed, ToolError> {
    let mut line = String::new();
    let unreadable = |reason: String| {
        ToolError::new(ErrorKind::InvalidInput, format!("keeper: its first line on stdin can't be read ({reason})"))
            .hint("the program starts it by itself; nobody has to call it")
    };
    stdin.take(64 * 1024).read_line(&mut line).await.map_err(|error| unreadable(error.to_string()))?;
    // The text of the line may hold a key, so only the kind of the error is told.
    serde_json::from_str(&line).map_err(|error| unreadable(format!("{:?}", error.classify())))
}

async fn stop_at_end(mut stdin: BufReader<tokio::io::Stdin>, ended: CancellationToken) {
    let mut rest = [0; 256];
    while !matches!(stdin.read(&mut rest).await, Ok(0) | Err(_)) {}
    ended.cancel();
}

fn stop_on_signals(stop: &CancellationToken) -> Result<(), ToolError> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind)
            .map_err(|error| ToolError::new(ErrorKind::Internal, format!("signals can't be received: {error}")))?;
        let stop = stop.clone();
        tokio::spawn(async move {
            signals.recv().await;
            stop.cancel();
        });
    }
    // A terminal that closes is no reason to leave pods without their keeper.
    if let Ok(mut hangups) = signal(SignalKind::hangup()) {
        tokio::spawn(async move { while hangups.recv().await.is_some() {} });
    }
    Ok(())
}
