//! `config`: what the user set, in `<home>/config.json`.

mod init;
mod prompt;
mod show;

use clap::{Args, Subcommand};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use self::prompt::read_key;
use super::output;
use crate::app::{self, AppOptions};
use crate::config::{self, API_KEY, Config, ConfigError, Field, Home, all_fields};
use crate::timing::Timing;
use crate::tools::{ErrorKind, ToolError};

/// Set the key, the defaults and what may be spent, and see what counts
#[derive(Debug, Args)]
pub(super) struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    Init(init::InitArgs),
    Show(show::ShowArgs),
    Set(SetArgs),
    Unset(UnsetArgs),
    /// Print where the config file is
    Path,
}

/// Set one field, like `limits.max_usd_per_day 10`
///
/// The key is never given here, for other processes see a command line: `config set api_key` asks for it, or reads it
/// from stdin.
#[derive(Debug, Args)]
struct SetArgs {
    /// Its name, as `config show` lists it
    field: String,
    /// What it becomes
    #[arg(allow_hyphen_values = true)]
    value: Option<String>,
}

/// Take one field out, so that its default counts again
#[derive(Debug, Args)]
struct UnsetArgs {
    /// Its name, as `config show` lists it
    field: String,
}

pub(super) async fn run(args: ConfigArgs, options: &AppOptions) -> Result<u8, ToolError> {
    match args.command {
        ConfigCommand::Init(args) => init::run(args, options).await?,
        ConfigCommand::Show(args) => show::run(args, options)?,
        ConfigCommand::Set(args) => set(args, options).await?,
        ConfigCommand::Unset(args) => unset(&args, options)?,
        ConfigCommand::Path => output::say(&home(options)?.config_file().display().to_string()),
    }
    Ok(0)
}

/// The home whose file is meant: with `--sandbox` that of the sandbox.
fn home(options: &AppOptions) -> Result<Home, ToolError> {
    let outer = app::home(&options.environment)?;
    if options.sandbox { Ok(Home::open(outer.sandbox())?) } else { Ok(outer) }
}

fn read(home: &Home, options: &AppOptions) -> Result<Config, ToolError> {
    if options.sandbox { Ok(Config::read_for_sandbox(home)?) } else { Ok(Config::read(home)?) }
}

async fn set(args: SetArgs, options: &AppOptions) -> Result<(), ToolError> {
    let field = known(&args.field)?;
    let home = home(options)?;
    if matches!(field.name, API_KEY | "api_base_url") {
        refuse_for_sandbox(options)?;
    }
    if field.name == API_KEY {
        refuse_key_in_arguments(args.value.as_deref())?;
        let key = read_key().await?;
        let origin = app::origin(&options.environment, &read(&home, options)?);
        init::check(&origin, &key).await?;
        write(&home, vec![(field, Some(Value::from(key.expose_secret())))])?;
        output::say(&format!("{API_KEY} is set; {origin} accepts it."));
        return Ok(());
    }
    let text = args.value.ok_or_else(|| ToolError::invalid(field.name, format!("expected {}", field.expected)))?;
    let value = field.parse(&text)?;
    if field.name == "api_base_url" {
        app::connect(None, &text, "autopod-mcp").map_err(|error| ToolError::invalid(field.name, error.message))?;
    }
    let done = format!("{} is {value}.", field.name);
    write(&home, vec![(field, Some(value))])?;
    output::say(&done);
    Ok(())
}

fn unset(args: &UnsetArgs, options: &AppOptions) -> Result<(), ToolError> {
    let field = known(&args.field)?;
    write(&home(options)?, vec![(field, None)])?;
    output::say(&format!("{} is no longer set in the file.", field.name));
    Ok(())
}

fn write(home: &Home, changes: Vec<config::Change>) -> Result<(), ToolError> {
    config::change(home, Timing::default().state_lock, changes).map_err(|error| {
        // One that contradicts another is as wrong as one that is no number.
        let is_input = matches!(error, ConfigError::Limits { .. });
        let told = ToolError::from(error);
        match is_input {
            true => {
                ToolError { kind: ErrorKind::InvalidInput, ..told }.hint("nothing was saved; set the other one first")
            }
            false => told,
        }
    })
}

fn known(name: &str) -> Result<&'static Field, ToolError> {
    all_fields().find(|field| field.name == name).ok_or_else(|| {
        let names = all_fields().map(|field| field.name).collect::<Vec<_>>().join(", ");
        ToolError::invalid("field", format!("there is none named `{name}`; there are {names}"))
    })
}

fn refuse_for_sandbox(options: &AppOptions) -> Result<(), ToolError> {
    if !options.sandbox {
        return Ok(());
    }
    Err(ToolError::refused("a sandbox has a key and an address of its own; those of a config file don't count there")
        .hint("leave out --sandbox to set up the real account"))
}

fn refuse_key_in_arguments(value: Option<&str>) -> Result<(), ToolError> {
    if value.is_none() {
        return Ok(());
    }
    let why =
        "a key given as an argument is seen by other processes and kept in the shell's history; nothing was saved";
    Err(ToolError::invalid(API_KEY, why).hint(
        "run `autopod-mcp config set api_key` and type it, or give it on stdin: `autopod-mcp config set api_key < FILE`. \
         If that was the real key, make a new one at https://console.runpod.io/user/settings",
    ))
}

/// Shown instead of the key: enough to tell two keys apart, and of a short one nothing.
fn redacted(key: &SecretString) -> String {
    let key = key.expose_secret();
    match key.char_indices().rev().nth(3) {
        Some((start, _)) if key.len() >= 16 => format!("set (…{})", &key[start..]),
        _ => "set".to_owned(),
    }
}

fn no_way_to_ask(what: &str) -> ToolError {
    ToolError::new(ErrorKind::InvalidInput, what).hint(
        "run `autopod-mcp config init` on a terminal, or with RUNPOD_API_KEY set, or as `autopod-mcp config init \
         --key-stdin < FILE`; keys are made at https://console.runpod.io/user/settings",
    )
}
