//! `pod ssh`: the user's own shell in a pod.

use std::os::unix::process::CommandExt;

use clap::Args;

use crate::app::{self, AppOptions};
use crate::cli::signals::interruptible;
use crate::tools::{ErrorKind, ToolError, reach_pod};

/// Open a shell in a pod
///
/// It is ssh with our own key, on your terminal; its exit code is passed on. The pod goes on running after it.
#[derive(Debug, Args)]
pub struct SshArgs {
    /// The pod's name or id; may be left out when there is only one.
    pod: Option<String>,
}

pub(super) async fn run(options: &AppOptions, args: SshArgs) -> Result<u8, ToolError> {
    let mut ssh = interruptible(async {
        let services = app::services(options).await?;
        let (_, target) = reach_pod(&services, args.pod.as_deref()).await?;
        Ok(services.ssh.shell(&target)?)
    })
    .await?;
    // It returns only when it fails.
    let error = ssh.exec();
    Err(ToolError::new(ErrorKind::Setup, format!("ssh can't be started: {error}"))
        .hint("install an OpenSSH client (Debian: openssh-client)"))
}
