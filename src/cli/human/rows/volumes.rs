//! How network volumes are shown.

use serde_json::Value;

use super::words::{facts, next_line};
use crate::cli::human::next;
use crate::cli::render::{clean, column, table, text, usd};

pub(super) fn volumes(answer: &Value) -> String {
    let columns = [
        column("NAME", |row| text(&row["name"])),
        column("ID", |row| text(&row["id"])),
        column("GB", |row| text(&row["size_gb"])),
        column("DATA CENTER", |row| text(&row["data_center"])),
        column("TIER", |row| text(&row["tier"])),
        column("A MONTH", |row| usd(&row["monthly_usd"])),
        column("PODS", |row| text(&row["pods"])),
    ];
    let empty = if answer["total"] == 0 { "The account has no network volumes." } else { "No volumes on this page." };
    let mut lines = vec![table(&answer["volumes"], &columns, empty)];
    lines.extend(open_volumes(&answer["open"]));
    lines.push(format!("In all {} a month.", usd(&answer["total_monthly_usd"])));
    if !answer["next"].is_null() {
        lines.push(format!("These are not all of {} volumes. {}", text(&answer["total"]), next_line(answer)));
    }
    lines.extend(answer["warning"].as_str().map(clean));
    lines.join("\n")
}

pub(super) fn made_volume(answer: &Value) -> String {
    let what = if answer["created"] == true { "Created" } else { "There is already" };
    let what = if answer["done"] == true { what } else { "Waiting for" };
    let mut lines = vec![clean(&format!("{what} the volume {}.", text(&answer["volume"])))];
    lines.push(facts(&[
        ("Id", text(&answer["volume_id"])),
        ("GB", text(&answer["size_gb"])),
        ("Where", text(&answer["data_center"])),
        ("A month", usd(&answer["monthly_usd"])),
        ("All volumes", usd(&answer["total_monthly_usd"])),
        ("Note", text(&answer["note"])),
    ]));
    lines.push(next_line(answer));
    lines.join("\n")
}

pub(super) fn open_volumes(open: &Value) -> impl Iterator<Item = String> {
    open.as_array().into_iter().flatten().map(|row| {
        let (name, size, waiting_for) = (text(&row["name"]), text(&row["size_gb"]), text(&row["waiting_for"]));
        clean(&format!(
            "{name}: {size} GB, waiting for {waiting_for}. Next: {}",
            next::as_commands(&text(&row["next"]))
        ))
    })
}
