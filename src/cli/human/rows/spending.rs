//! How the money is shown.

use serde_json::Value;

use super::volumes::open_volumes;
use super::words::moment;
use crate::cli::human::next;
use crate::cli::render::{clean, column, table, text, usd};

pub(super) fn spending(answer: &Value) -> String {
    let mut lines = vec![format!(
        "{} an hour now. Today ({}, UTC): {} spent, {} set aside.",
        usd(&answer["burn_rate_per_hour"]),
        clean(&text(&answer["day"])),
        usd(&answer["today_usd"]),
        usd(&answer["today_reserved_usd"])
    )];
    let columns = [
        column("POD", |row| text(&row["pod"])),
        column("AN HOUR", |row| usd(&row["price_per_hour"])),
        column("COST", |row| usd(&row["cost_usd"])),
        column("TODAY", |row| usd(&row["today_usd"])),
        column("SET ASIDE", |row| usd(&row["reserved_usd"])),
        column("ENDS AT", |row| moment(&row["expires_at"])),
        column("NOTE", |row| match row["owner"].as_str() {
            Some("other_machine") => "of another machine".to_owned(),
            Some("unmanaged") => "not made by this program".to_owned(),
            _ if row["gone"] == true => "gone".to_owned(),
            _ => String::new(),
        }),
    ];
    lines.push(table(&answer["pods"], &columns, "No pods."));
    lines.extend(answer["more_pods"].as_u64().map(|more| format!("And {more} more pods: see `pod list`.")));
    let columns = [
        column("LIMIT", |row| text(&row["limit"])),
        column("CAP", |row| amount(row, "cap")),
        column("USED", |row| amount(row, "used")),
        column("LEFT", |row| amount(row, "left")),
    ];
    lines.push(table(&answer["caps"], &columns, "No caps."));
    lines.extend(answer["unknown"].as_array().into_iter().flatten().map(|row| {
        let (pod, set_aside) = (text(&row["pod"]), usd(&row["reserved_usd"]));
        clean(&format!(
            "{pod}: outcome unknown, {set_aside} set aside. Next: {}",
            next::as_commands(&text(&row["next"]))
        ))
    }));
    if !answer["volumes_monthly_usd"].is_null() {
        lines.push(format!("Network volumes: {} a month.", usd(&answer["volumes_monthly_usd"])));
    }
    lines.extend(open_volumes(&answer["open_volumes"]));
    if let Some(billed) = answer["billed"].as_object() {
        let [all, ours] = ["today_usd", "ours_usd"].map(|field| usd(&billed[field]));
        lines.push(format!("Billed by RunPod today: {all}, of it {ours} for pods of this home."));
    }
    for note in answer["audit"].as_array().into_iter().flatten() {
        let facts = note["facts"].as_object().into_iter().flatten();
        let facts: Vec<_> = facts.map(|(name, value)| format!("{name}={}", text(value))).collect();
        let (at, actor, event) = (moment(&note["at"]), text(&note["actor"]), text(&note["event"]));
        lines.push(clean(&format!("{at} {actor}: {event} {}", facts.join(" "))));
    }
    let warnings = answer["warnings"].as_array().into_iter().flatten();
    lines.extend(warnings.map(|warning| format!("Note: {}", clean(&text(warning)))));
    lines.join("\n")
}

/// Of a cap: pods and minutes are counted, all others are USD.
fn amount(row: &Value, field: &str) -> String {
    let is_count = row["limit"].as_str().is_some_and(|limit| limit.ends_with("_pods") || limit.ends_with("_minutes"));
    match row[field].as_f64() {
        Some(count) if is_count => format!("{count:.0}"),
        _ => usd(&row[field]),
    }
}
