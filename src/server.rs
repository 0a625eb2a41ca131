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
type StillGood = dyn Fn(&Services) -> bool + Send + Sync;

/// The services, built at the first call that needs them: a client is greeted before config, TLS roots or the
/// provider are touched. A failed build is that call's error, and the next call tries again.
#[derive(Clone)]
pub struct LazyServices {
    build: Arc<Build>,
    still_good: Arc<StillGood>,
    built: Arc<Mutex<Option<Arc<Services>>>>,
}

impl LazyServices {
    pub fn new(
        build: impl Fn() -> BoxFuture<'static, Result<Arc<Services>, ToolError>> + Send + Sync + 'static,
    ) -> Self {
        Self { build: Arc::new(build), still_good: Arc::new(|_| true), built: Arc::default() }
    }

    /// They are built anew by the next call after this said no.
    pub fn as_long_as(self, still_good: impl Fn(&Services) -> bool + Send + Sync + 'static) -> Self {
        Self { still_good: Arc::new(still_good), ..self }
    }

    /// The services, if a call has needed them before.
    pub async fn built(&self) -> Option<Arc<Services>> {
        self.built.lock().await.clone()
    }

    /// A panic is an error too: rmcp would leave its caller without any answer.
    pub async fn get(&self) -> Result<Arc<Services>, ToolError> {
        let mut built = self.built.lock().await;
        if let Some(services) = built.as_ref().filter(|services| (self.still_good)(services)) {
            return Ok(services.clone());
        }
        let services = AssertUnwindSafe((self.build)()).catch_unwind().await.unwrap_or_else(|_| {
            Err(ToolError::new(ErrorKind::Internal, "a defect in this program keeps it from starting its work")
                .hint("look at the log on stderr, and please report this"))
        })?;
        *built = Some(services.clone());
        Ok(services)
    }
}
