//! How ComfyUI, its queue and its runs are shown.

use serde_json::Value;

use super::words::{facts, next_line};
use crate::cli::render::{clean, column, table, text};

pub(super) fn comfy_status(answer: &Value) -> String {
    let url = clean(&text(&answer["url"]));
    if answer["ready"] != true {
        return format!("ComfyUI is not ready ({url}): {}\n{}", clean(&text(&answer["cause"])), next_line(answer));
    }
    let columns = [
        column("DEVICE", |row| text(&row["name"])),
        column("VRAM FREE", |row| gib(&row["vram_free_gb"])),
        column("OF", |row| gib(&row["vram_total_gb"])),
    ];
    let about = facts(&[
        ("ComfyUI", text(&answer["comfyui_version"])),
        ("Python", text(&answer["python_version"])),
        ("PyTorch", text(&answer["pytorch_version"])),
        ("RAM", format!("{} of {} free", gib(&answer["ram_free_gb"]), gib(&answer["ram_total_gb"]))),
        ("Queue", format!("{} running, {} pending", text(&answer["running"]), text(&answer["pending"]))),
    ]);
    format!("ComfyUI is ready at {url}\n{about}\n{}", table(&answer["devices"], &columns, "No devices."))
}

pub(super) fn comfy_queue(answer: &Value) -> String {
    let columns = [
        column("POSITION", |row| match row["position"].as_u64() {
            Some(0) => "running".to_owned(),
            _ => text(&row["position"]),
        }),
        column("PROMPT", |row| text(&row["prompt_id"])),
        column("NODES", |row| text(&row["nodes"])),
        column("OURS", ours),
    ];
    let part = |name: &str| answer[name].as_array().cloned().unwrap_or_default();
    let queued = Value::Array([part("running"), part("pending")].concat());
    let mut lines = vec![table(&queued, &columns, "The queue is empty.")];
    let left_out = answer["pending_total"].as_u64().unwrap_or(0).saturating_sub(part("pending").len() as u64);
    if left_out > 0 {
        lines.push(format!("{left_out} more are pending."));
    }
    if !part("history").is_empty() {
        let columns = [
            column("ENDED", |row| text(&row["status"])),
            column("PROMPT", |row| text(&row["prompt_id"])),
            column("OURS", ours),
            column("OUTPUTS", |row| match row["error"].as_str() {
                Some(error) => error.to_owned(),
                None => text(&row["outputs"]),
            }),
        ];
        lines.push(format!("\n{}", table(&answer["history"], &columns, "")));
    }
    lines.join("\n")
}

pub(super) fn comfy_run(answer: &Value) -> String {
    let id = text(&answer["prompt_id"]);
    let mut lines = vec![match answer["state"].as_str() {
        Some("done") => match answer["elapsed_seconds"].as_f64() {
            Some(seconds) => format!("The run {id} is done, in {seconds} s."),
            None => format!("The run {id} is done."),
        },
        Some("not_submitted") => format!("The run {id} was never submitted."),
        Some("waiting") => format!("Nothing was submitted; waiting for {}.", clean(&text(&answer["waiting_for"]))),
        _ => clean(&format!(
            "The run {id} goes on ({}); waiting for {}.",
            text(&answer["progress"]["message"]),
            text(&answer["waiting_for"])
        )),
    }];
    let each = |name: &str| answer[name].as_array().cloned().unwrap_or_default();
    lines.extend(each("files").iter().map(|row| clean(&text(&row["path"]))));
    lines
        .extend(each("texts").iter().map(|row| clean(&format!("Node {}: {}", text(&row["node"]), text(&row["text"])))));
    lines.extend(
        each("skipped")
            .iter()
            .map(|row| clean(&format!("Not saved: {}: {}", text(&row["filename"]), text(&row["reason"])))),
    );
    lines.extend(each("node_errors").iter().map(|row| {
        clean(&format!(
            "Dropped: node {} ({}): {} {}",
            text(&row["node_id"]),
            text(&row["class_type"]),
            text(&row["message"]),
            text(&row["details"])
        ))
    }));
    if answer["state"] != "done" {
        lines.push(next_line(answer));
    }
    lines.join("\n")
}

fn ours(row: &Value) -> String {
    if row["job"].is_string() { "yes".to_owned() } else { "-".to_owned() }
}

fn gib(value: &Value) -> String {
    value.as_f64().map_or_else(|| "-".to_owned(), |amount| format!("{amount} GiB"))
}
