//! What a person or a script reads. A reader that went away (`| head`) is no error.

use std::io::Write;

use serde_json::Value;

use crate::tools::ToolError;

/// Text to stdout, with a newline.
pub(super) fn say(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// Text to stderr, with a newline.
pub(super) fn complain(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// One JSON value to stdout, for people and programs alike.
pub(super) fn say_json(value: &Value) -> Result<(), ToolError> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| ToolError::failed(format!("the answer can't be written as JSON: {error}")))?;
    say(&text);
    Ok(())
}
