//! The faces that other programs speak to: MCP over stdio and JSON-RPC over HTTP and WebSocket. Both read the tools
//! from [`crate::tools::TOOLS`] and go through [`crate::tools::call`]; nothing here knows a single tool.

pub mod catalog;
pub mod json_rpc;
pub mod lines;
pub mod mcp;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::Mutex;

use crate::tools::context::Services;
use crate::tools::{ErrorKind, ToolError};

type Build = dyn Fn() -> BoxFuture<'static, Result<Arc<Services>, ToolError>> + Send + Sync;
type Check = dyn Fn(&Services) -> Result<(), ToolError> + Send + Sync;
type IsStale = dyn Fn() -> bool + Send + Sync;

/// The services, built at the first call that needs them: a client is greeted before config, TLS roots or the
/// provider are touched. A failed build is that call's error, and the next call tries again.
#[derive(Clone)]
pub struct LazyServices {
    build: Arc<Build>,
    check: Arc<Check>,
    is_stale: Arc<IsStale>,
    built: Arc<Mutex<Option<Arc<Services>>>>,
}

impl LazyServices {
    pub fn new(
        build: impl Fn() -> BoxFuture<'static, Result<Arc<Services>, ToolError>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            build: Arc::new(build),
            check: Arc::new(|_| Ok(())),
            is_stale: Arc::new(|| false),
            built: Arc::default(),
        }
    }

    /// Asked before each use of services that were built before. Its error is that call's answer, and the next call
    /// builds them anew.
    pub fn checked(self, check: impl Fn(&Services) -> Result<(), ToolError> + Send + Sync + 'static) -> Self {
        Self { check: Arc::new(check), ..self }
    }

    /// Asked before each use too: services whose settings were changed meanwhile are built anew for that very call.
    pub fn renewed_when(self, is_stale: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self { is_stale: Arc::new(is_stale), ..self }
    }

    /// The services, if a call has needed them before and they are still good.
    pub async fn built(&self) -> Option<Arc<Services>> {
        self.built.lock().await.clone().filter(|services| (self.check)(services).is_ok())
    }

    /// A panic is an error too: rmcp would leave its caller without any answer.
    pub async fn get(&self) -> Result<Arc<Services>, ToolError> {
        let mut built = self.built.lock().await;
        if let Some(services) = built.take().filter(|_| !(self.is_stale)()) {
            (self.check)(&services)?;
            *built = Some(services.clone());
            return Ok(services);
        }
        let services = AssertUnwindSafe((self.build)()).catch_unwind().await.unwrap_or_else(|_| {
            Err(ToolError::new(ErrorKind::Internal, "a defect in this program keeps it from starting its work")
                .hint("look at the log on stderr, and please report this"))
        })?;
        *built = Some(services.clone());
        Ok(services)
    }
}
