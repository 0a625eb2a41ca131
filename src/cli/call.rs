//! `call`: the debug door, and the door for scripts.

use std::io::Read;

use clap::Args;
use serde_json::Value;

use super::signals::interruptible;
use super::{output, paths, progress};
use crate::app::{self, AppOptions};
use crate::tools::{self, Context, ErrorKind, ToolError};

/// Arguments from stdin may have as many bytes as a message to the server.
const MOST_INPUT: u64 = 8 * 1024 * 1024;

/// Call one tool with JSON arguments
///
/// The answer is one JSON value on stdout; progress and errors are on stderr.
#[derive(Debug, Args)]
pub(super) struct CallArgs {
    /// The tool's name, as `autopod-mcp tools` lists it.
    tool: String,
    /// A JSON object of named arguments, `-` to read it from stdin; none when left out. Paths in it may be relative.
    #[arg(value_name = "JSON")]
    arguments: Option<String>,
}

pub(super) async fn run(options: &AppOptions, args: CallArgs) -> Result<u8, ToolError> {
    let tool = tools::known(&args.tool)?;
    let mut arguments = match args.arguments.as_deref() {
        None => Value::Null,
        Some("-") => parse(&read_stdin()?)?,
        Some(text) => parse(text)?,
    };
    paths::complete(tool, &mut arguments)?;
    let answer = interruptible(async {
        let context = Context { progress: progress::lines(), ..Context::new(app::services(options).await?) };
        tools::call(&context, tool.name, arguments).await
    })
    .await?;
    output::say_json(&answer.value)?;
    Ok(0)
}

fn parse(text: &str) -> Result<Value, ToolError> {
    serde_json::from_str(text).map_err(|error| {
        ToolError::invalid("arguments", format!("not JSON: {error}"))
            .hint("quote the whole object for the shell, like '{\"pod\": \"comfy\"}'")
    })
}

fn read_stdin() -> Result<String, ToolError> {
    let unreadable = |reason: String| ToolError::new(ErrorKind::InvalidInput, format!("stdin can't be read: {reason}"));
    let mut text = String::new();
    std::io::stdin()
        .lock()
        .take(MOST_INPUT + 1)
        .read_to_string(&mut text)
        .map_err(|error| unreadable(error.to_string()))?;
    if text.len() as u64 > MOST_INPUT {
        return Err(unreadable(format!("it has more than {MOST_INPUT} bytes")));
    }
    Ok(text)
}
