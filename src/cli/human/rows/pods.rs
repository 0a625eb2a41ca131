//! How pods are shown: listed, created, changed, ended.

use serde_json::Value;

use super::words::{billed, facts, moment, next_line, volume};
use crate::cli::human::next;
use crate::cli::render::{clean, column, table, text, usd};

pub(super) fn pods(answer: &Value) -> String {
    let columns = [
        column("POD", |row| text(&row["pod"])),
        column("STATUS", |row| text(&row["status"])),
        column("GPU", |row| text(&row["gpu"])),
        column("WHERE", |row| text(&row["data_center"])),
        column("AN HOUR", |row| usd(&row["price_per_hour"])),
        column("COST", |row| usd(&row["cost_usd"])),
        column("BILLED", |row| billed(&row["billed_seconds"])),
        column("ENDS AT", |row| moment(&row["expires_at"])),
        column("VOLUME", |row| volume(&row["volume"])),
        column("TUNNEL", |row| text(&row["tunnels"])),
        column("NOTE", |row| match row["owner"].as_str() {
            Some("other_machine") => "of another machine".to_owned(),
            Some("unmanaged") => "not made by this program".to_owned(),
            _ => row["problem"].as_str().unwrap_or_default().to_owned(),
        }),
    ];
    let empty = match (answer["total"].as_u64(), answer["source"].as_str()) {
        (Some(1..), _) => "No pods on this page.",
        (_, Some("records")) => "No pods in our records.",
        _ => "No pods; nothing is billed for any.",
    };
    let mut lines = vec![table(&answer["pods"], &columns, empty)];
    if answer["total"] != 0 {
        lines.push(format!("In all {} an hour.", usd(&answer["burn_rate_per_hour"])));
    }
    if !answer["next"].is_null() {
        lines.push(format!("These are not all of {} pods. {}", text(&answer["total"]), next_line(answer)));
    }
    lines.extend(answer["warning"].as_str().map(clean));
    lines.join("\n")
}

pub(super) fn pod(answer: &Value) -> String {
    let mut lines = vec![facts(&[
        ("Pod", text(&answer["pod"])),
        ("Id", text(&answer["pod_id"])),
        ("Status", text(&answer["status"])),
        ("GPU", text(&answer["gpu"])),
        ("Where", text(&answer["data_center"])),
        ("An hour", usd(&answer["price_per_hour"])),
        ("Cost so far", usd(&answer["cost_usd"])),
        ("Billed for", billed(&answer["billed_seconds"])),
        ("Can still cost", usd(&answer["reserved_usd"])),
        ("Ends at", moment(&answer["expires_at"])),
        ("Own switch", text(&answer["switch"])),
        ("Ends when idle", moment(&answer["idle_ends_at"])),
        ("Volume", volume(&answer["volume"])),
        ("Mount", text(&answer["mount"])),
        ("Last action", text(&answer["action"])),
        ("Intent", text(&answer["intent"])),
        ("SSH", text(&answer["ssh"])),
        ("Tunnel", text(&answer["tunnels"])),
        ("Problem", text(&answer["problem"])),
    ])];
    let steps = answer["readiness"].as_array().into_iter().flatten();
    let steps = steps.map(|step| {
        let sign = if step["done"] == true { "+" } else { "-" };
        let took = step["elapsed_seconds"].as_f64().map(|seconds| format!(" ({seconds} s)")).unwrap_or_default();
        format!("{sign} {}{took}", text(&step["step"]))
    });
    lines.push(format!("Ready: {}", steps.collect::<Vec<_>>().join(", ")));
    lines.extend(waiting_for(answer));
    lines.extend(answer["next"].as_str().map(|_| next_line(answer)));
    lines.join("\n")
}

pub(super) fn controlled_pod(answer: &Value) -> String {
    let already = if answer["changed"] == false { " already" } else { "" };
    let mut lines = vec![clean(&format!("The pod {} is{already} {}.", text(&answer["pod"]), text(&answer["state"])))];
    let changed = |now: &Value, before: &Value| match before {
        Value::Null => text(now),
        before => format!("{} instead of {}", text(now), text(before)),
    };
    let ends_at = match &answer["expires_at_before"] {
        Value::Null => moment(&answer["expires_at"]),
        before => format!("{} instead of {}", moment(&answer["expires_at"]), moment(before)),
    };
    lines.push(facts(&[
        ("GPU", changed(&answer["gpu"], &answer["gpu_before"])),
        ("SSH", changed(&answer["ssh"], &answer["ssh_before"])),
        ("An hour running", usd(&answer["price_per_hour"])),
        ("Can still cost", usd(&answer["reserved_usd"])),
        ("Ends at", ends_at),
        ("Own switch", text(&answer["switch"])),
    ]));
    lines.extend(waiting_for(answer));
    lines.push(next_line(answer));
    lines.join("\n")
}

pub(super) fn created_pod(answer: &Value) -> String {
    if answer["state"] == "dry_run" {
        return planned_pod(answer);
    }
    let what = if answer["created"] == true { "Created" } else { "There is already" };
    let mut lines = vec![format!("{what} the pod {}.", text(&answer["pod"]))];
    lines.push(facts(&[
        ("State", text(&answer["state"])),
        ("GPU", text(&answer["gpu"])),
        ("Where", text(&answer["data_center"])),
        ("An hour", usd(&answer["price_per_hour"])),
        ("Can still cost", usd(&answer["reserved_usd"])),
        ("Ends at", moment(&answer["expires_at"])),
        ("Volume", volume(&answer["volume"])),
        ("Public address", text(&answer["proxy_url"])),
    ]));
    lines.extend(answer["warning"].as_str().map(|warning| format!("Warning: {}", clean(warning))));
    lines.push(next_line(answer));
    lines.join("\n")
}

fn planned_pod(answer: &Value) -> String {
    let columns = [
        column("GPU", |row| text(&row["gpu"])),
        column("AN HOUR", |row| usd(&row["price_per_hour"])),
        column("UNTIL ITS DEADLINE", |row| usd(&row["total_usd"])),
    ];
    let candidates = table(&answer["candidates"], &columns, "Nothing fits.");
    let about = facts(&[
        ("Volume", volume(&answer["volume"])),
        ("Would end at", moment(&answer["expires_at"])),
        ("Sets aside", usd(&answer["reserved_usd"])),
        ("Caps", text(&answer["caps"])),
    ]);
    format!(
        "Nothing was created. For the pod {} would be tried, in this order:\n{candidates}\n{about}",
        clean(&text(&answer["pod"]))
    )
}

pub(super) fn ended_pod(answer: &Value) -> String {
    let (pod, cost) = (text(&answer["pod"]), usd(&answer["cost_usd"]));
    let mut lines = vec![match answer["done"].as_bool() {
        _ if !answer["cancelled"].is_null() => {
            clean(&format!("The pod {pod} is cancelled: {}.", text(&answer["cancelled"])))
        }
        Some(true) => clean(&format!(
            "The pod {pod} is gone. It cost {cost} by our count, and nothing is billed for it any more."
        )),
        _ => clean(&format!(
            "The pod {pod} is being ended and may still be billed; waiting for {}.",
            text(&answer["waiting_for"])
        )),
    }];
    lines.extend(answer["warning"].as_str().map(|warning| format!("Warning: {}", clean(warning))));
    lines.join("\n")
}

fn waiting_for(answer: &Value) -> Option<String> {
    answer["waiting_for"].as_str().map(|what| format!("Waiting for {}", clean(&next::as_commands(what))))
}
