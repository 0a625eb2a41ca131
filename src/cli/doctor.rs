//! `doctor`: what is wrong, and what to do about it.

use clap::Args;
use serde_json::json;

use super::output;
use super::render::clean;
use crate::app::{self, AppOptions, Finding, Health};
use crate::tools::ToolError;

/// Check key, home, ssh, records, keeper, pods and tunnels, and say what to do
///
/// It changes nothing. Exit code 0 when nothing failed, else 1.
#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(args: DoctorArgs, options: &AppOptions) -> Result<u8, ToolError> {
    let findings = app::examine(options).await?;
    let is_well = findings.iter().all(|finding| finding.health != Health::Fail);
    if args.json {
        output::say_json(&json!({ "ok": is_well, "checks": findings }))?;
    } else {
        for finding in &findings {
            output::say(&clean(&line(finding)));
        }
    }
    Ok(u8::from(!is_well))
}

fn line(finding: &Finding) -> String {
    let health = match finding.health {
        Health::Ok => "OK  ",
        Health::Warn => "WARN",
        Health::Fail => "FAIL",
    };
    // One line each, whatever the words from outside hold.
    let found = finding.found.replace('\n', " ");
    let todo = finding.todo.as_ref().map(|todo| format!(" -> {}", todo.replace('\n', " "))).unwrap_or_default();
    format!("{health}  {}: {found}{todo}", finding.check)
}
