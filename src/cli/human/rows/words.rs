//! What the renderings share.

use serde_json::Value;

use crate::cli::human::next;
use crate::cli::render::{clean, text};

pub(super) fn facts(pairs: &[(&str, String)]) -> String {
    let there = pairs.iter().filter(|(_, value)| value != "-");
    let width = there.clone().map(|(name, _)| name.len()).max().unwrap_or(0);
    there.map(|(name, value)| format!("{name:width$}  {}", clean(value))).collect::<Vec<_>>().join("\n")
}

/// What comes next, as commands.
pub(super) fn next_line(answer: &Value) -> String {
    format!("Next: {}", clean(&next::as_commands(&text(&answer["next"]))))
}

pub(super) fn moment(value: &Value) -> String {
    let moment = value.as_str().and_then(|text| text.parse::<jiff::Timestamp>().ok());
    moment.map_or_else(|| text(value), |moment| format!("{moment:.0}"))
}

pub(super) fn billed(value: &Value) -> String {
    let seconds = value.as_u64().map(std::time::Duration::from_secs);
    seconds.map_or_else(|| "-".to_owned(), |seconds| humantime::format_duration(seconds).to_string())
}

pub(super) fn volume(value: &Value) -> String {
    if value.is_null() {
        return "-".to_owned();
    }
    let name = if value["name"].is_string() { &value["name"] } else { &value["id"] };
    format!("{} at {}", text(name), text(&value["mount_path"]))
}
