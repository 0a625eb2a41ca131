//! How what can be rented is shown.

use serde_json::Value;

use crate::cli::render::{column, table, text, usd};

pub(super) fn gpus(answer: &Value) -> String {
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
