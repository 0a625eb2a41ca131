//! The demo's private world: a sandbox and a home of its own that end with the demo, however it ends.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::app;
use crate::background::{Launcher, Started};
use crate::config::{Config, Home};
use crate::environment::Environment;
use crate::errors::chain;
use crate::state;
use crate::tools::context::Services;
use crate::tools::{ErrorKind, ToolError};

const STARTS_WITHIN: Duration = Duration::from_secs(20);
const ENDS_WITHIN: Duration = Duration::from_secs(20);

pub(super) struct Stage {
    home: Home,
    url: String,
    services: Option<Arc<Services>>,
    /// The sandbox lives while we hold it; when we die, even by kill -9, it ends and removes the home.
    tether: Option<Started>,
}

impl Stage {
    pub(super) async fn set_up(environment: Environment, program: PathBuf, keep: bool) -> Result<Self, ToolError> {
        let setup = |what: String| ToolError::new(ErrorKind::Setup, what);
        let folder = tempfile::Builder::new()
            .prefix("autopod-demo-")
            .tempdir()
            .map_err(|error| setup(format!("no temporary folder can be made: {error}")))?
            // From here on the sandbox removes it, for it outlives us by a moment.
            .keep();
        let home = Home::open(folder)?;
        let launcher = Launcher { program, environment: environment.for_children.clone() };
        let how = if keep { "--background" } else { "--tethered" };
        let log = home.logs().join("sandbox.log");
        let arguments = [how.into(), "--folder".into(), home.root().into()];
        let sandbox = launcher.start("sandbox", &arguments, "", &log).await.map_err(|error| setup(chain(&error)))?;
        let started = Instant::now();
        let file = loop {
            if let Some(file) = app::read_sandbox_file(home.root()) {
                break file;
            }
            if started.elapsed() > STARTS_WITHIN {
                return Err(setup(format!("the sandbox did not start; its log is {}", log.display())));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        let key = state::read_file(&file.key_file)?.unwrap_or_default();
        let key = String::from_utf8_lossy(&key).trim().to_owned();
        let services = app::wire(home.clone(), Ok(Config::default()), Some(key.into()), &file.url, launcher, !keep)?;
        Ok(Self { home, url: file.url, services: Some(services), tether: (!keep).then_some(sandbox) })
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    pub(super) fn home(&self) -> &Path {
        self.home.root()
    }

    pub(super) fn services(&self) -> Result<Arc<Services>, ToolError> {
        self.services.clone().ok_or_else(|| ToolError::new(ErrorKind::Internal, "the demo has ended"))
    }

    /// Lets go of both tethers, the keeper's first, and proves that the processes and the home are gone.
    pub(super) async fn tear_down(mut self) -> Result<(), ToolError> {
        if let Some(services) = self.services.take() {
            services.keeper.let_go().await;
        }
        let ended = match self.tether.take() {
            Some(sandbox) => sandbox.let_go(ENDS_WITHIN).await,
            None => true,
        };
        if ended && !self.home.root().exists() {
            return Ok(());
        }
        Err(ToolError::failed(format!(
            "the demo's background processes did not end; what is left lies in {}",
            self.home.root().display()
        )))
    }

    pub(super) fn leave_standing(self) {}
}
