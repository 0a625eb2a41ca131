//! Wiring: what the user set becomes the services that tools work with. The only place that picks a provider.

mod account;
mod doctor;
mod sandbox_home;

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use secrecy::SecretString;

use crate::background::{KeeperClient, Launcher};
use crate::config::{Config, ConfigError, Home};
use crate::environment::Environment;
use crate::errors::chain;
use crate::fleet::{Audit, Fleet, Volumes};
use crate::keeper::Connect;
use crate::provider::GpuProvider;
use crate::runpod::{ApiOrigin, OriginError, RunPod, RunPodOptions, RunPodTimeouts, SharedBudget};
use crate::ssh::Ssh;
use crate::timing::Timing;
use crate::tools::context::Services;
use crate::tools::{ErrorKind, ToolError};
use crate::tunnel::Tunnels;

pub use account::{Account, look_at_account};
pub use doctor::{Finding, Health, examine};
pub use sandbox_home::{SandboxFile, check_world, close_world, read_sandbox_file, refuse_real_home};

/// What `main` and the flags decide about the wiring.
#[derive(Debug, Clone)]
pub struct AppOptions {
    pub environment: Environment,
    /// This program, to start the keeper and the sandbox with.
    pub program: PathBuf,
    /// Use the background sandbox of this home instead of RunPod, starting it if there is none.
    pub sandbox: bool,
    /// The keeper ends with this process.
    pub tethered: bool,
}

/// The home that the environment names, before any sandbox.
pub fn home(environment: &Environment) -> Result<Home, ToolError> {
    Ok(Home::open(home_folder(environment)?)?)
}

fn home_folder(environment: &Environment) -> Result<PathBuf, ConfigError> {
    environment
        .autopod_home
        .clone()
        .or_else(|| environment.user_home.as_ref().map(|home| home.join(".autopod")))
        .ok_or(ConfigError::NoHome)
}

/// Opens the home, reads the config and puts the services together. Nothing is asked of the network here; with
/// `sandbox` a background sandbox is started if there is none.
pub async fn services(options: &AppOptions) -> Result<Arc<Services>, ToolError> {
    let outer = home(&options.environment)?;
    let launcher = Launcher { program: options.program.clone(), environment: options.environment.for_children.clone() };
    if options.sandbox {
        let home = Home::open(outer.sandbox())?;
        let config = Config::read_for_sandbox(&home)?;
        let world = sandbox_home::ensure(&home, &launcher).await?;
        return wire(home, config, Some(world.key), &world.url, launcher, options.tethered);
    }
    let config = Config::read(&outer)?;
    let key = options.environment.api_key.clone().or_else(|| config.api_key.clone());
    let origin = origin(&options.environment, &config);
    wire(outer, config, key, &origin, launcher, options.tethered)
}

/// What tells one state of the config file from another; `None` while there is no file.
pub fn config_stamp(options: &AppOptions) -> Option<(u64, i64, i64)> {
    let outer = Home::unopened(home_folder(&options.environment).ok()?);
    let home = if options.sandbox { Home::unopened(outer.sandbox()) } else { outer };
    let metadata = std::fs::metadata(home.config_file()).ok()?;
    Some((metadata.ino(), metadata.mtime(), metadata.mtime_nsec()))
}

/// Where the provider is: what the environment says, then the config file.
pub fn origin(environment: &Environment, config: &Config) -> String {
    let set = environment.api_base_url.clone().or_else(|| config.api_base_url.clone());
    set.unwrap_or_else(|| ApiOrigin::default().to_string())
}

/// The services of a home whose provider and key are known.
pub fn wire(
    home: Home,
    config: Config,
    key: Option<SecretString>,
    origin: &str,
    launcher: Launcher,
    tethered: bool,
) -> Result<Arc<Services>, ToolError> {
    let origin: ApiOrigin = origin.parse()?;
    let origin = origin.to_string();
    let timing = timing_for(&origin);
    let connect = connect(Some(&home), &origin, "autopod-mcp")?;
    Ok(Arc::new(Services {
        fleet: Fleet::new(&home, &timing),
        volumes: Volumes::new(&home, &timing),
        audit: Audit::new(&home),
        tunnels: Tunnels::new(&home, &timing),
        ssh: Ssh { folder: home.ssh(), environment: launcher.environment.clone() },
        keeper: KeeperClient::new(&home, &timing, Some(launcher), key.clone(), &origin, tethered),
        provider: key.map(|key| connect(key)),
        home,
        config,
        timing,
    }))
}

/// How a key becomes a provider whose rate budget all processes of the home share; without a home one of its own. `program` names who asks, in the
/// User-Agent.
pub fn connect(home: Option<&Home>, origin: &str, program: &'static str) -> Result<Connect, ToolError> {
    let origin: ApiOrigin = origin.parse()?;
    let timing = timing_for(&origin.to_string());
    let budget = home.map(|home| SharedBudget { file: home.rate_limit_file(), lock: home.lock("rate-limit") });
    Ok(Arc::new(move |key| {
        let timeouts = RunPodTimeouts {
            connect: timing.http_connect,
            request: timing.http_request,
            create: timing.http_create,
            ..RunPodTimeouts::default()
        };
        let user_agent = format!("{program}/{}", env!("CARGO_PKG_VERSION"));
        let options = RunPodOptions { origin: origin.clone(), key, user_agent, timeouts, budget: budget.clone() };
        Arc::new(RunPod::new(options)) as Arc<dyn GpuProvider>
    }))
}

/// A provider on loopback is a sandbox: it has no rate limit to spare, and its pods start within seconds.
pub fn timing_for(origin: &str) -> Timing {
    match origin.parse::<ApiOrigin>() {
        Ok(origin) if origin.is_loopback() => Timing::quick(),
        _ => Timing::default(),
    }
}

impl From<ConfigError> for ToolError {
    fn from(error: ConfigError) -> Self {
        let is_input = matches!(error, ConfigError::Value { .. });
        Self::new(if is_input { ErrorKind::InvalidInput } else { ErrorKind::Setup }, chain(&error))
    }
}

impl From<OriginError> for ToolError {
    fn from(error: OriginError) -> Self {
        Self::new(ErrorKind::Setup, chain(&error))
    }
}
