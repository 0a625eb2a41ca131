//! What comes next, for people: answers and errors name tools and their arguments, a person types commands.

use std::sync::LazyLock;

use serde_json::{Map, Value};

use super::{ROWS, WAIT_FIELD, commands_of};
use crate::cli::render::text;
use crate::ssh::quoted;
use crate::tools::{self, TOOLS, ToolDef};

/// Arguments that a sentence can't mean otherwise: their names are two words at least.
static ARGUMENTS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let names = TOOLS.iter().filter_map(|tool| {
        let schema = (tool.input_schema)();
        Some(schema.get("properties")?.as_object()?.keys().cloned().collect::<Vec<_>>())
    });
    names.flatten().filter(|name| name.contains('_') && name != WAIT_FIELD).collect()
});

/// A text in which each `TOOL {json}` is a command, each tool alone the commands over it, and each argument its flag.
pub(super) fn as_commands(words: &str) -> String {
    let mut said = String::new();
    let mut rest = words;
    while let Some(start) = rest.find(in_name) {
        let end = rest[start..].find(|c| !in_name(c)).map_or(rest.len(), |length| start + length);
        said.push_str(&rest[..start]);
        let name = &rest[start..end];
        // `limits.max_price_per_hour` is no argument, and what stands in quotes may be anything.
        let is_part = said.ends_with(['.', '`', '"', '\'', '/', '-']);
        rest = &rest[end..];
        match tools::find(name).filter(|_| !is_part) {
            Some(tool) => said.push_str(&of_tool(tool, &mut rest)),
            None if !is_part && ARGUMENTS.iter().any(|argument| argument == name) => {
                rest = rest.strip_prefix(':').unwrap_or(rest);
                said.push_str(&flag(name));
            }
            None => said.push_str(name),
        }
    }
    said + rest
}

fn in_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The tool's name was read; its arguments, if they follow, are taken from what is left.
fn of_tool(tool: &ToolDef, rest: &mut &str) -> String {
    let json = rest.strip_prefix(' ').filter(|json| json.starts_with('{'));
    if let Some(json) = json {
        let mut values = serde_json::Deserializer::from_str(json).into_iter::<Map<String, Value>>();
        if let Some(Ok(arguments)) = values.next()
            && let Some(command) = command(tool, &arguments)
        {
            *rest = &json[values.byte_offset()..];
            return format!("`{command}`");
        }
    }
    commands_of(tool.name)
}

/// A call as a person types it.
pub(super) fn command(tool: &ToolDef, arguments: &Map<String, Value>) -> Option<String> {
    let of_tool = || ROWS.iter().filter(|row| row.tool == tool.name);
    // Of several rows over one tool the one that sets what the call sets.
    let same = |row: &&super::Row| row.fixed().iter().all(|(name, value)| arguments.get(name) == Some(value));
    let only = || of_tool().next().filter(|_| of_tool().count() == 1);
    let row = of_tool().find(same).or_else(only)?;
    let fixed = row.fixed();
    let mut words = vec![row.path.to_owned()];
    words.extend(row.positional.and_then(|field| arguments.get(field)).map(word));
    for (name, value) in arguments {
        if Some(name.as_str()) != row.positional && name != WAIT_FIELD && !fixed.contains_key(name) {
            words.push(format!("{} {}", flag(name), word(value)));
        }
    }
    Some(words.join(" "))
}

fn flag(argument: &str) -> String {
    format!("--{}", argument.replace('_', "-"))
}

/// As a shell takes it.
fn word(value: &Value) -> String {
    let word = text(value);
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:".contains(c);
    if word.chars().all(is_plain) { word } else { quoted(&word) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_become_commands() {
        let cases = [
            (r#"start_tunnel {"pod": "comfy"}"#, "`tunnel start comfy`"),
            (r#"get_pod {"pod": "comfy", "wait_for": "ssh"}: soon"#, "`pod info comfy --wait-for ssh`: soon"),
            (
                r#"control_pod {"pod": "a", "action": "start"}, or terminate_pod {"pod": "a"}"#,
                "`pod start a`, or `pod kill a`",
            ),
            (r#"list_pods {"page": 2}"#, "`pod list --page 2`"),
            (r#"create_pod_with_volume {"volume": "it's"}"#, r"`pod create --volume 'it'\''s'`"),
            ("see list_gpus", "see `gpu list`"),
            ("call again with confirm_price: 1.19", "call again with --confirm-price 1.19"),
            (
                "leave data_centers out (limits.max_price_per_hour)",
                "leave --data-centers out (limits.max_price_per_hour)",
            ),
            ("get_pod {not json", "`pod info` {not json"),
            ("see pod_logs", "see `pod logs`"),
        ];
        for (said, typed) in cases {
            assert_eq!(as_commands(said), typed);
        }
    }

    #[test]
    fn words_of_other_kinds_stay() {
        for words in ["use one of: comfy, list_podsy", "`get_pod`", "ünï_cödé", ""] {
            assert_eq!(as_commands(words), words);
        }
    }
}
