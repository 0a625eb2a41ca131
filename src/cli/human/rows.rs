//! The table of commands for people, and how each shows its answer.

use serde_json::Value;

use super::Row;
use crate::cli::render::{column, table, text, usd};

/// What a row says when it says nothing.
const ROW: Row = Row {
    path: "",
    tool: "",
    positional: None,
    fixed: "{}",
    aliases: &[],
    render: |answer| answer.to_string(),
    succeeded: |_| true,
};

pub static ROWS: &[Row] = &[
    Row { path: "volume list", tool: "list_volumes", aliases: &["volume ls"], render: volumes, ..ROW },
    Row { path: "gpu list", tool: "list_gpus", aliases: &["gpu ls"], render: gpus, ..ROW },
];

pub(super) fn about_group(group: &str) -> &'static str {
    match group {
        "pod" => "Pods: GPU machines that run ComfyUI",
        "tunnel" => "Tunnels: a port of this machine that leads into a pod",
        "comfy" => "ComfyUI in a pod",
        "volume" => "Network volumes: what a pod keeps",
        "gpu" => "GPU types, prices and stock",
        _ => "",
    }
}

fn volumes(answer: &Value) -> String {
    let columns = [
        column("NAME", |row| text(&row["name"])),
        column("ID", |row| text(&row["id"])),
        column("GB", |row| text(&row["size_gb"])),
        column("DATA CENTER", |row| text(&row["data_center"])),
        column("A MONTH", |row| usd(&row["monthly_usd"])),
    ];
    let rows = table(&answer["volumes"], &columns, "The account has no network volumes.");
    format!("{rows}\nIn all {} a month.", usd(&answer["total_monthly_usd"]))
}

fn gpus(answer: &Value) -> String {
    let columns = [
        column("GPU", |row| text(&row["name"])),
        column("VRAM GB", |row| text(&row["vram_gb"])),
        column("AN HOUR", |row| usd(&row["price_per_hour"])),
        column("CLOUD", |row| text(&row["cloud"])),
        column("STOCK", |row| text(&row["stock"])),
        column("DATA CENTERS", |row| text(&row["data_centers"])),
    ];
    table(&answer["gpus"], &columns, "No GPU fits; ask for less memory, a higher price or --include-unavailable.")
}
