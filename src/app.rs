//! Wiring: what the user set becomes the services that tools work with. The only place that picks a provider.

mod account;
mod doctor;
mod sandbox_home;

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use secrecy::SecretString;

use crate::background::{KeeperClient, Launcher};
use crate::config::{Access, Config, ConfigError, Home};
use crate::environment::{Environment, RUNPOD_API_BASE_URL};
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
///
/// A config that breaks a rule keeps nobody from listing and ending pods: what can be read of it is used, and its error
/// goes to whoever needs the rest.
pub async fn services(options: &AppOptions) -> Result<Arc<Services>, ToolError> {
    services_after(options, None).await
}

/// The services anew after the config has changed. One that can't be read, in the middle of an edit say, doesn't take
/// the key away that was there `before`.
pub async fn services_after(options: &AppOptions, before: Option<Arc<Services>>) -> Result<Arc<Services>, ToolError> {
    let outer = home(&options.environment)?;
    let launcher = Launcher { program: options.program.clone(), environment: options.environment.for_children.clone() };
    if options.sandbox {
        let home = Home::open(outer.sandbox())?;
        let config = Config::read_for_sandbox(&home).map_err(ToolError::from);
        let world = match &config {
            Ok(_) => sandbox_home::ensure(&home, &launcher).await?,
            Err(problem) => sandbox_home::living(&home)?.ok_or_else(|| problem.clone())?,
        };
        return wire(home, config, Some(world.key), &world.url, launcher, options.tethered);
    }
    let from_environment = match &options.environment.api_base_url {
        Some(set) => Some(checked_origin(set, RUNPOD_API_BASE_URL)?),
        None => None,
    };
    let config = Config::read(&outer);
    let access = match &config {
        Ok(config) => Ok(Access::of(config)),
        Err(_) => Access::read(&outer),
    };
    let reached = match access {
        Err(unread) if before.is_some() => Err(unread.into()),
        access => {
            let access = access.unwrap_or_default();
            let key = options.environment.api_key.clone().or_else(|| access.api_key.clone());
            from_environment.map_or_else(|| origin_in_file(&access, &outer), Ok).map(|origin| (key, origin))
        }
    };
    let config = config.map_err(ToolError::from);
    match (reached, before) {
        (Ok((key, origin)), _) => wire(outer, config, key, &origin, launcher, options.tethered),
        (Err(problem), Some(before)) => {
            let (key, origin) = before.keeper.access();
            wire(outer, Err(problem), key, origin, launcher, options.tethered)
        }
        // A key isn't sent anywhere when it isn't known where to.
        (Err(problem), None) => {
            let origin = ApiOrigin::default().to_string();
            wire(outer, Err(problem), None, &origin, launcher, options.tethered)
        }
    }
}

fn origin_in_file(access: &Access, home: &Home) -> Result<String, ToolError> {
    let place = format!("`api_base_url` in {}", home.config_file().display());
    access.api_base_url.as_ref().map_or_else(|| Ok(ApiOrigin::default().to_string()), |set| checked_origin(set, &place))
}

/// The error says where the address stands.
fn checked_origin(set: &str, place: &str) -> Result<String, ToolError> {
    let wrong = |error: OriginError| ToolError::new(ErrorKind::Setup, format!("{place}: {}", chain(&error)));
    set.parse::<ApiOrigin>().map(|origin| origin.to_string()).map_err(wrong)
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
    origin_as_set(environment, &Access::of(config))
}

fn origin_as_set(environment: &Environment, access: &Access) -> String {
    let set = environment.api_base_url.clone().or_else(|| access.api_base_url.clone());
    set.unwrap_or_else(|| ApiOrigin::default().to_string())
}

/// The services of a home whose provider and key are known.
pub fn wire(
    home: Home,
    config: Result<Config, ToolError>,
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
