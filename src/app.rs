//! Wiring: what the user set becomes the services that tools work with. The only place that picks a provider.

use std::path::PathBuf;
use std::sync::Arc;

use crate::background::{KeeperClient, Launcher};
use crate::config::{Config, ConfigError, Home};
use crate::environment::Environment;
use crate::fleet::Fleet;
use crate::provider::chain;
use crate::timing::Timing;
use crate::tools::context::Services;
use crate::tools::{ErrorKind, ToolError};
use crate::tunnel::Tunnels;

/// What `main` and the flags decide about the wiring.
#[derive(Debug, Clone)]
pub struct AppOptions {
    pub environment: Environment,
    /// This program, to start the keeper and the sandbox with.
    pub program: PathBuf,
    /// Use the background sandbox of this home instead of RunPod, starting it if there is none.
    pub sandbox: bool,
    /// Background processes end with this one.
    pub tethered: bool,
}

/// The home that the environment names, before any sandbox.
pub fn home(environment: &Environment) -> Result<Home, ToolError> {
    let root = environment
        .autopod_home
        .clone()
        .or_else(|| environment.user_home.as_ref().map(|home| home.join(".autopod")))
        .ok_or(ConfigError::NoHome)?;
    Ok(Home::open(root)?)
}

pub async fn services(options: &AppOptions) -> Result<Arc<Services>, ToolError> {
    let home = home(&options.environment)?;
    let config = Config::read(&home)?;
    let timing = Timing::default();
    let origin = "";
    let launcher = Launcher { program: options.program.clone(), environment: options.environment.for_children.clone() };
    Ok(Arc::new(Services {
        fleet: Fleet::new(&home, &timing),
        tunnels: Tunnels::new(&home, &timing),
        keeper: KeeperClient::new(&home, &timing, Some(launcher), None, origin, options.tethered),
        provider: None,
        home,
        config,
        timing,
    }))
}

impl From<ConfigError> for ToolError {
    fn from(error: ConfigError) -> Self {
        Self::new(ErrorKind::Setup, chain(&error))
    }
}
