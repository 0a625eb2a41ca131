//! What a person or a script reads. A reader that went away (`| head`) is no error.

use std::io::Write;

use serde_json::Value;

use crate::tools::ToolError;

/// Text to stdout, with a newline.
pub(super) fn say(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// Text to stdout, with a newline; false when nobody reads it any more.
pub(super) fn try_say(text: &str) -> bool {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{text}").and_then(|()| stdout.flush()).is_ok()
}

/// Text to stderr, with a newline.
pub(super) fn complain(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// One JSON value to stdout, for people and programs alike.
pub(super) fn say_json(value: &Value) -> Result<(), ToolError> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| ToolError::failed(format!("the answer can't be written as JSON: {error}")))?;
    say(&escaped(&text));
    Ok(())
}

/// JSON lets some control characters stand as they are, which a terminal would obey. They can only be inside strings.
fn escaped(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            c if c.is_control() && c != '\n' => text.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => text.push(c),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_stays_what_it_is_without_steering_a_terminal() {
        let value = json!({"name": "a\u{9b}2J\u{7f}\u{1b}", "line": "b\nc"});
        let text = escaped(&serde_json::to_string_pretty(&value).unwrap());
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
    }
}
