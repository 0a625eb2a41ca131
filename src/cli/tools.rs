//! `tools`: what there is.

use clap::Args;
use serde_json::{Value, json};

use super::output;
use super::render::{self, column};
use crate::server::catalog;
use crate::tools::{TOOLS, ToolError};

/// List the tools that assistants and `call` can use.
#[derive(Debug, Args)]
pub(super) struct ToolsArgs {
    /// Everything about them, as MCP's `tools/list` gives it.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: ToolsArgs) -> Result<u8, ToolError> {
    if args.json {
        let tools: Vec<_> = TOOLS.iter().map(catalog::entry).collect();
        output::say_json(&json!({ "tools": tools }))?;
        return Ok(0);
    }
    let rows: Vec<_> = TOOLS
        .iter()
        .map(|tool| json!({"name": tool.name, "toolset": tool.toolset.name(), "effect": tool.effect, "about": first_sentence(tool.description)}))
        .collect();
    let columns = [
        column("NAME", |row| render::text(&row["name"])),
        column("TOOLSET", |row| render::text(&row["toolset"])),
        column("EFFECT", |row| render::text(&row["effect"])),
        column("WHAT IT DOES", |row| render::text(&row["about"])),
    ];
    output::say(&render::table(&Value::Array(rows), &columns, "There are no tools."));
    Ok(0)
}

fn first_sentence(description: &str) -> &str {
    description.split_once(". ").map_or(description, |(first, _)| first).trim_end_matches('.')
}
