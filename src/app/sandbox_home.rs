//! The background sandbox of a home: found when it lives, started when it doesn't.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use secrecy::SecretString;
use serde::Deserialize;

use crate::background::{KeeperClient, Launcher, account_of};
use crate::config::{self, Home};
use crate::fleet::{Fleet, HomeIdentity, Phase, VolumePhase, VolumeRecord, Volumes};
use crate::runpod::ApiOrigin;
use crate::state::{self, Lock};
use crate::timing::Timing;
use crate::tools::context::Services;
use crate::tools::{ErrorKind, StillBilling, ToolError};
use crate::tunnel::Tunnels;

const STARTS_WITHIN: Duration = Duration::from_secs(15);
/// A keeper whose provider is gone has nothing to wait for but an attempt to reach it.
const KEEPER_ENDS_WITHIN: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(20);

/// `sandbox.json`, as the sandbox writes it when it listens.
#[derive(Debug, Deserialize)]
pub struct SandboxFile {
    pub url: String,
    pub pid: u32,
    pub key_file: PathBuf,
}

/// A living sandbox and the key to it.
pub(super) struct World {
    pub url: String,
    pub key: SecretString,
}

pub(super) async fn ensure(home: &Home, launcher: &Launcher) -> Result<World, ToolError> {
    if let Some(world) = living(home)? {
        return Ok(world);
    }
    let path = home.lock("sandbox-start");
    let starting = tokio::task::spawn_blocking(move || Lock::take(&path, STARTS_WITHIN))
        .await
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
    // One that is ending holds its lock until its records are closed.
    let started = Instant::now();
    while state::is_held(&home.lock("sandbox")) && started.elapsed() < STARTS_WITHIN {
        if let Some(world) = living(home)? {
            return Ok(world);
        }
        tokio::time::sleep(PAUSE).await;
    }
    close_world(home).await?;
    let _ = std::fs::remove_file(home.root().join("sandbox.json"));
    let log = home.logs().join("sandbox.log");
    launcher
        .start("sandbox", &["--background".into(), "--folder".into(), home.root().into()], "", &log)
        .await
        .map_err(|error| ToolError::new(ErrorKind::Setup, crate::errors::chain(&error)))?;
    let started = Instant::now();
    let world = loop {
        if let Some(world) = living(home)? {
            break world;
        }
        if started.elapsed() >= STARTS_WITHIN {
            return Err(ToolError::new(ErrorKind::Setup, "the sandbox did not start")
                .hint(format!("its log is {}", log.display())));
        }
        tokio::time::sleep(PAUSE).await;
    };
    drop(starting);
    Ok(world)
}

/// `None` when no sandbox holds this home's lock, or it doesn't listen yet.
pub(super) fn living(home: &Home) -> Result<Option<World>, ToolError> {
    if !state::is_held(&home.lock("sandbox")) {
        return Ok(None);
    }
    let Some(file) = read_sandbox_file(home.root()) else { return Ok(None) };
    config::refuse_open_file(&file.key_file)?;
    let key = state::read_file(&file.key_file)?.unwrap_or_default();
    let key = String::from_utf8_lossy(&key).trim().to_owned();
    Ok(Some(World { url: file.url, key: SecretString::from(key) }))
}

pub fn read_sandbox_file(folder: &Path) -> Option<SandboxFile> {
    let bytes = state::read_file(&folder.join("sandbox.json")).ok()??;
    serde_json::from_slice(&bytes).ok()
}

/// Whether services that were wired for a sandbox can still be used: its world, with its pods, may have ended, and
/// another one begun.
pub fn check_world(services: &Services) -> Result<(), ToolError> {
    if let Some(world) = living(&services.home)? {
        let origin: ApiOrigin = world.url.parse()?;
        if services.keeper.account() == Some(account_of(&origin.to_string(), &world.key)) {
            return Ok(());
        }
    }
    Err(ToolError::new(ErrorKind::Network, "the sandbox that this server used has ended, and its pods with it")
        .hint("call again: that is answered by a fresh sandbox, with no pods")
        .billing(StillBilling::No))
}

/// A sandbox takes every pod recorded in its home for its own, and for gone when it ends. In a home with pods at a real
/// provider that would leave them running with nobody to end them.
pub fn refuse_real_home(home: &Home) -> Result<(), ToolError> {
    let account = HomeIdentity::read(home)?.and_then(|identity| identity.account);
    let origin = account.as_deref().and_then(|account| account.split(' ').next()).map(str::parse::<ApiOrigin>);
    if origin.is_none_or(|origin| origin.is_ok_and(|origin| origin.is_loopback())) {
        return Ok(());
    }
    let whose = format!("{} is the home of a real account, so no sandbox runs in it", home.root().display());
    Err(ToolError::refused(whose).hint("give another --folder, or set AUTOPOD_HOME to another folder"))
}

/// What is left of a world that has ended: its keeper, which has nothing to keep any more, and its records.
pub async fn close_world(home: &Home) -> Result<(), ToolError> {
    refuse_real_home(home)?;
    let keeper = KeeperClient::new(home, &Timing::quick(), None, None, "", false);
    let started = Instant::now();
    while keeper.is_alive() && started.elapsed() < KEEPER_ENDS_WITHIN {
        keeper.retire().await;
        tokio::time::sleep(PAUSE).await;
    }
    close_records_of_the_last_world(home).await
}

/// The pods of a sandbox end with it, which is true of no other provider.
async fn close_records_of_the_last_world(home: &Home) -> Result<(), ToolError> {
    let timing = Timing::quick();
    let fleet = Fleet::new(home, &timing);
    for record in fleet.read()?.into_values() {
        if record.is_open() {
            let close = |record: &mut crate::fleet::PodRecord| {
                record.known.phase = Phase::Gone;
                record.known.gone_at = Some(Timestamp::now());
                record.known.ending_cause = Some("world_ended".to_owned());
                record.known.ssh = None;
            };
            fleet.know(&record.intent, close).await?;
        }
    }
    let volumes = Volumes::new(home, &timing);
    for record in volumes.read()?.into_values().filter(VolumeRecord::is_open) {
        let close = |record: &mut VolumeRecord| {
            record.known.phase = VolumePhase::Refused;
            record.known.problem = Some("world_ended".to_owned());
        };
        volumes.know(&record.intent, close).await?;
    }
    let tunnels = Tunnels::new(home, &timing);
    for (name, record) in tunnels.read()? {
        tunnels.remove(&name, &record.intent).await?;
    }
    Ok(())
}
