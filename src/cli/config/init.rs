//! `config init`: from nothing to a key that is known to work.

use clap::Args;
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use super::prompt::{ask, is_interactive, read_key};
use super::{home, known, no_way_to_ask, read, refuse_for_sandbox, write};
use crate::app::{self, Account, AppOptions};
use crate::cli::output;
use crate::cli::render::clean;
use crate::config::API_KEY;
use crate::tools::ToolError;

/// Set up the key, and on a terminal a default volume
///
/// The key is taken from RUNPOD_API_KEY, or from stdin with --key-stdin, or asked for on the terminal. It is checked
/// with a real call before anything is saved. What else stands in the file stays.
#[derive(Debug, Args)]
pub(super) struct InitArgs {
    /// Read the key from the first line of stdin
    #[arg(long)]
    key_stdin: bool,
}

pub(super) async fn run(args: InitArgs, options: &AppOptions) -> Result<(), ToolError> {
    refuse_for_sandbox(options)?;
    let home = home(options)?;
    let config = read(&home, options)?;
    let key = match &options.environment.api_key {
        _ if args.key_stdin => read_key().await?,
        Some(key) => {
            output::complain("The key is taken from RUNPOD_API_KEY.");
            key.clone()
        }
        None if is_interactive() => read_key().await?,
        None => return Err(no_way_to_ask("there is no key to save, and no terminal to ask for one on")),
    };
    let origin = app::origin(&options.environment, &config);
    let account = check(&origin, &key).await?;
    output::say(&format!("{origin} accepts the key. {}", described(&account)));
    let mut changes = vec![(known(API_KEY)?, Some(Value::from(key.expose_secret())))];
    if let Some(origin) = &options.environment.api_base_url {
        // The key was tried there, and belongs nowhere else.
        changes.push((known("api_base_url")?, Some(Value::from(origin.trim()))));
    }
    if is_interactive()
        && let Some(volume) = choose_volume(&account, config.default_volume_id.as_deref()).await?
    {
        changes.push((known("default_volume_id")?, Some(Value::from(volume))));
    }
    write(&home, changes)?;
    output::say(&format!(
        "Saved in {} (mode 0600). `autopod-mcp config show` lists what counts, `autopod-mcp doctor` checks the rest.",
        home.config_file().display()
    ));
    Ok(())
}

/// The account that this key opens; an error says that nothing was saved.
pub(super) async fn check(origin: &str, key: &SecretString) -> Result<Account, ToolError> {
    app::look_at_account(origin, key.clone()).await.map_err(|mut error| {
        error.message.push_str("; the key was not saved");
        error.still_billing = None;
        error
    })
}

fn described(account: &Account) -> String {
    let pods = account.pods.value.len();
    let volumes = match &account.volumes {
        None => "its network volumes can't be listed with this key".to_owned(),
        Some(volumes) => format!("{} network volume{}", volumes.len(), if volumes.len() == 1 { "" } else { "s" }),
    };
    format!("The account has {pods} pod{} and {volumes}.", if pods == 1 { "" } else { "s" })
}

/// What the user picks from the account's volumes; `None` leaves the setting as it is.
async fn choose_volume(account: &Account, now: Option<&str>) -> Result<Option<String>, ToolError> {
    let volumes = account.volumes.as_deref().unwrap_or_default();
    if volumes.is_empty() {
        return Ok(None);
    }
    for (number, volume) in (1..).zip(volumes) {
        let line =
            format!("  {number}  {} ({}, {} GB, {})", volume.name, volume.id, volume.size_gb, volume.data_center);
        output::complain(&clean(&line));
    }
    let keep = now.map_or_else(|| "none".to_owned(), |now| format!("leave it at {}", clean(now)));
    loop {
        let answer = ask(&format!("Volume for pods that name none (1-{}, Enter: {keep}): ", volumes.len())).await?;
        let answer = answer.trim();
        if answer.is_empty() {
            return Ok(None);
        }
        let by_number = answer.parse::<usize>().ok().and_then(|number| volumes.get(number.checked_sub(1)?));
        let by_name = || volumes.iter().find(|volume| volume.id == answer || volume.name == answer);
        if let Some(volume) = by_number.or_else(by_name) {
            return Ok(Some(volume.id.clone()));
        }
        output::complain("That is none of them.");
    }
}
