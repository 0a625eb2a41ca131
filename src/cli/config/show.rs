//! `config show`: what counts, and where it comes from.

use clap::Args;
use serde_json::{Map, Value, json};

use super::{home, read, redacted};
use crate::app::{self, AppOptions};
use crate::cli::output;
use crate::cli::render::{self, column};
use crate::config::{API_KEY, Config, Field, all_fields, read_object, unknown_fields};
use crate::tools::ToolError;

/// Show every setting and where it comes from; of the key, only that it is set
#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: ShowArgs, options: &AppOptions) -> Result<(), ToolError> {
    let home = home(options)?;
    let config = read(&home, options)?;
    let file = read_object(&home.config_file())?.unwrap_or_default();
    let fields: Vec<_> = all_fields()
        .map(|field| {
            let (value, source) = setting(field, &file, &config, options);
            json!({ "field": field.name, "value": value, "source": source })
        })
        .collect();
    let path = home.config_file().display().to_string();
    if args.json {
        return output::say_json(&json!({ "path": path, "fields": fields, "unknown": unknown_fields(&file) }));
    }
    let columns = [
        column("FIELD", |row| render::text(&row["field"])),
        column("VALUE", |row| render::text(&row["value"])),
        column("FROM", |row| render::text(&row["source"])),
    ];
    output::say(&render::table(&Value::Array(fields), &columns, ""));
    output::say(&format!("\nThe file is {path}."));
    Ok(())
}

/// The value that counts, and whether the environment, the file or nobody set it.
fn setting(field: &Field, file: &Map<String, Value>, config: &Config, options: &AppOptions) -> (Value, &'static str) {
    let environment = &options.environment;
    let by_sandbox = options.sandbox && matches!(field.name, API_KEY | "api_base_url");
    let source = match field.name {
        _ if by_sandbox => "sandbox",
        API_KEY if environment.api_key.is_some() => "environment",
        "api_base_url" if environment.api_base_url.is_some() => "environment",
        _ if field.value_in(file).is_some() => "file",
        _ => "default",
    };
    let value = match field.name {
        _ if by_sandbox => json!("its own"),
        API_KEY => json!(environment.api_key.as_ref().or(config.api_key.as_ref()).map(redacted)),
        "api_base_url" => json!(app::origin(environment, config)),
        "default_volume_id" => json!(config.default_volume_id),
        "default_volume_mount" => json!(config.default_volume_mount),
        limit => json!(config.limits)[limit.trim_start_matches("limits.")].take(),
    };
    (value, source)
}
