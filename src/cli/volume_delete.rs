//! `volume delete`: ends a network volume and everything on it. No tool can: it takes a person's word, the volume's name
//! typed at a terminal or given with `--confirm`.

use std::io::{BufRead, IsTerminal};

use clap::{ArgMatches, Args, Command, FromArgMatches};
use rustix::termios::{QueueSelector, tcflush};

use super::signals::interruptible;
use super::{output, render};
use crate::app::{self, AppOptions};
use crate::tools::volumes::delete::{self, Doomed};
use crate::tools::{ErrorKind, StillBilling, ToolError};

/// The group that it shares with rows over the tools.
pub(super) const GROUP: &str = "volume";

/// Delete a network volume and everything on it, for good
#[derive(Debug, Args)]
pub(super) struct VolumeDeleteArgs {
    /// The volume's id (see `volume list`); names aren't unique, so none is taken.
    id: String,
    /// The volume's name, as the confirmation where nobody can be asked.
    #[arg(long, value_name = "NAME")]
    confirm: Option<String>,
}

/// The command, for the group that it belongs to.
pub(super) fn command() -> Command {
    VolumeDeleteArgs::augment_args(Command::new("delete"))
}

/// Its arguments, when it was asked for.
pub(super) fn find(matches: &ArgMatches) -> Option<Result<VolumeDeleteArgs, clap::Error>> {
    let group = matches.subcommand_matches(GROUP)?;
    group.subcommand_matches("delete").map(VolumeDeleteArgs::from_arg_matches)
}

pub(super) async fn run(options: &AppOptions, args: VolumeDeleteArgs) -> Result<u8, ToolError> {
    let services = app::services(options).await?;
    let doomed = delete::doomed(&services, &args.id).await?;
    interruptible(confirm(&doomed, args.confirm)).await?;
    delete::delete(&services, &doomed).await?;
    let Doomed { id, name, monthly_usd, .. } = &doomed;
    output::say(&render::clean(&format!("The volume {name} ({id}) is gone; ${monthly_usd:.2} a month less.")));
    Ok(0)
}

async fn confirm(doomed: &Doomed, given: Option<String>) -> Result<(), ToolError> {
    let Doomed { id, name, size_gb, data_center, monthly_usd } = doomed;
    let what = format!("the volume {name} ({id}): {size_gb} GB in {data_center}, ${monthly_usd:.2} a month");
    let typed = match given {
        Some(given) => given,
        None if std::io::stdin().is_terminal() && std::io::stderr().is_terminal() => {
            // What was typed before the question was there doesn't answer it.
            tcflush(std::io::stdin(), QueueSelector::IFlush).map_err(|error| unreadable(error.into()))?;
            output::complain(&render::clean(&format!(
                "This deletes {what}, and everything on it, for good.\nType the volume's name to go on:"
            )));
            line().await?
        }
        None => {
            return Err(ToolError::refused(format!(
                "nobody can be asked whether to delete {what}; nothing was deleted"
            ))
            .hint("give the volume's name with --confirm NAME")
            .billing(StillBilling::Yes));
        }
    };
    if typed.trim() == name.trim() {
        return Ok(());
    }
    Err(ToolError::refused(format!("that is not the name of {what}; nothing was deleted")).billing(StillBilling::Yes))
}

/// One line of the terminal. It can't be interrupted, so it has a thread of its own, which nobody waits for.
async fn line() -> Result<String, ToolError> {
    let read = || {
        let mut line = String::new();
        std::io::stdin().lock().read_line(&mut line).map(|_| line)
    };
    let read = tokio::task::spawn_blocking(read).await.map_err(std::io::Error::other);
    read.and_then(|line| line).map_err(unreadable)
}

fn unreadable(error: std::io::Error) -> ToolError {
    ToolError::new(ErrorKind::Setup, format!("the terminal can't be read: {error}"))
}
