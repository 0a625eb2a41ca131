//! argv, environment and stdio in; an exit code out. The only module that touches them.
//!
//! Each command is one file here: its arguments, their help and its `run`. Commands for people that do what a tool
//! does (`pod list`, `volume list`) are no files but rows of the table in [`human`]; what no tool does stands beside them
//! in their groups ([`pod`]).

mod ask;
mod call;
mod config;
mod demo;
mod doctor;
pub mod human;
mod keeper;
mod offer;
mod output;
mod paths;
pub mod pod;
mod progress;
pub mod render;
mod rpc;
mod sandbox;
mod serve;
mod signals;
mod tools;
mod volume_delete;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::app::AppOptions;
use crate::environment::Environment;
use crate::tools::{ErrorKind, ToolError};

const AFTER_HELP: &str = "\
Exit codes: 0 done; 1 failed, or ComfyUI not ready; 2 invalid input; 3 not found; 4 refused by a cap or a confirmation; \
5 provider or network; 6 unknown outcome (money may be spent); 130 interrupted.";

/// GPU pods at RunPod, driven by AI assistants (`serve`, `rpc`) and by hand.
#[derive(Debug, Parser)]
#[command(name = "autopod-mcp", version, after_help = AFTER_HELP)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Global {
    /// Use a sandbox on this machine instead of RunPod: no account, no key, no money. One is started if there is none.
    #[arg(long, global = true, help_heading = "Global options")]
    sandbox: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::ServeArgs),
    Rpc(rpc::RpcArgs),
    Call(call::CallArgs),
    Tools(tools::ToolsArgs),
    Demo(demo::DemoArgs),
    Sandbox(sandbox::SandboxArgs),
    Config(config::ConfigArgs),
    Doctor(doctor::DoctorArgs),
    #[command(hide = true)]
    Keeper(keeper::KeeperArgs),
}

pub fn main() -> ExitCode {
    // It fails only where a provider is installed already, and then there is one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let environment = Environment::read();
    start_log(environment.log_filter.as_deref());
    if let Some(order) = &environment.die_at {
        crate::steps::arm(order);
    }
    let matches = match human::add_commands(Cli::command()).try_get_matches() {
        Ok(matches) => matches,
        Err(error) => {
            // Help and version are "errors" with exit code 0. Nobody is left to tell when printing fails.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match run(environment, &matches) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            output::complain(&render::clean(&format!("error: {error}")));
            ExitCode::from(error.kind.exit_code())
        }
    }
}

fn run(environment: Environment, matches: &ArgMatches) -> Result<u8, ToolError> {
    let global = Global::from_arg_matches(matches).map_err(unusable)?;
    let options = AppOptions { environment, program: own_program()?, sandbox: global.sandbox, tethered: false };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| ToolError::new(ErrorKind::Setup, format!("no threads can be started: {error}")))?;
    let result = runtime.block_on(async {
        if let Some(command) = pod::find(matches)? {
            return pod::run(&options, command).await;
        }
        if let Some((row, matches)) = human::find(matches) {
            return human::run(&options, row, matches).await;
        }
        if let Some(args) = volume_delete::find(matches) {
            return volume_delete::run(&options, args.map_err(unusable)?).await;
        }
        match Cli::from_arg_matches(matches).map_err(unusable)?.command {
            Command::Serve(args) => serve::run(options, args).await,
            Command::Rpc(args) => rpc::run(options, args).await,
            Command::Call(args) => call::run(&options, args).await,
            Command::Tools(args) => tools::run(args),
            Command::Demo(args) => demo::run(args, options.environment, options.program).await,
            Command::Sandbox(args) => sandbox::run(args, &options.environment).await,
            Command::Config(args) => config::run(args, &options).await,
            Command::Doctor(args) => doctor::run(args, &options).await,
            Command::Keeper(args) => keeper::run(args, &options.environment, options.program).await,
        }
    });
    // A read from stdin can't be interrupted; waiting for its thread would hang until the next line.
    runtime.shutdown_background();
    result
}

/// What to start background processes with. On Linux this names the running program even after its file was replaced
/// by a newer build.
fn own_program() -> Result<PathBuf, ToolError> {
    if cfg!(target_os = "linux") {
        return Ok(PathBuf::from("/proc/self/exe"));
    }
    std::env::current_exe()
        .map_err(|error| ToolError::new(ErrorKind::Setup, format!("this program's own path is unknown: {error}")))
}

fn unusable(error: clap::Error) -> ToolError {
    ToolError::new(ErrorKind::InvalidInput, error.to_string())
}

/// The log goes to stderr: stdout belongs to the protocol and to answers.
fn start_log(filter: Option<&str>) {
    let filter = EnvFilter::builder().parse_lossy(filter.unwrap_or("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        // It would tell them on stderr by a macro that panics when that can't be written, as on a full disk: then each
        // line of the log would end the task that wrote it, and no pod would be ended any more.
        .log_internal_errors(false)
        .init();
}
