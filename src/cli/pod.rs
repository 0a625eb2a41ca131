//! `pod ssh`, `pod exec`, `pod cp`: what people do in a pod themselves. No tool stands behind them: an assistant has no
//! terminal, and what it does in a pod it does through ComfyUI. And `pod logs`, which beside its tool can follow.

mod cp;
mod exec;
mod logs;
mod shell;

use clap::{ArgMatches, Args, Command, FromArgMatches, Subcommand};

use super::human::for_people;
use super::unusable;
use crate::app::AppOptions;
use crate::tools::ToolError;

/// The group that they share with rows over the tools.
pub const GROUP: &str = "pod";
const SHELL: &str = "ssh";

/// Verbs of the group `pod`.
#[derive(Debug, Subcommand)]
pub enum PodCommand {
    #[command(name = SHELL, alias = "shell")]
    Ssh(shell::SshArgs),
    Exec(exec::ExecArgs),
    Cp(cp::CpArgs),
    Logs(logs::LogsArgs),
}

/// The ways to write them without the group; they work but are not listed.
pub fn aliases() -> [Command; 1] {
    [Command::new(SHELL).alias("shell").hide(true).defer(shell::SshArgs::augment_args)]
}

/// The one that was asked for.
pub fn find(matches: &ArgMatches) -> Result<Option<PodCommand>, ToolError> {
    match matches.subcommand() {
        Some((GROUP, matches)) if matches.subcommand_name().is_some_and(PodCommand::has_subcommand) => {
            PodCommand::from_arg_matches(matches).map(Some).map_err(unusable)
        }
        Some((SHELL, matches)) => {
            shell::SshArgs::from_arg_matches(matches).map(|args| Some(PodCommand::Ssh(args))).map_err(unusable)
        }
        _ => Ok(None),
    }
}

pub async fn run(options: &AppOptions, command: PodCommand) -> Result<u8, ToolError> {
    let ran = match command {
        PodCommand::Ssh(args) => shell::run(options, args).await,
        PodCommand::Exec(args) => exec::run(options, args).await,
        PodCommand::Cp(args) => cp::run(options, args).await,
        PodCommand::Logs(args) => logs::run(options, args).await,
    };
    ran.map_err(for_people)
}
