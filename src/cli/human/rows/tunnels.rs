//! How tunnels are shown.

use serde_json::Value;

use super::words::moment;
use crate::cli::render::{clean, column, table, text};

pub(super) fn tunnel(answer: &Value) -> String {
    let (url, pod, port) = (text(&answer["url"]), text(&answer["pod"]), text(&answer["remote_port"]));
    clean(&match answer["done"].as_bool() {
        Some(true) => format!("{url} is port {port} of the pod {pod}."),
        _ => format!("The tunnel to {pod} is not up yet: {}.", text(&answer["waiting_for"])),
    })
}

pub(super) fn tunnels(answer: &Value) -> String {
    let columns = [
        column("POD", |row| text(&row["pod"])),
        column("PORT", |row| text(&row["remote_port"])),
        column("HERE", |row| text(&row["url"])),
        column("STATE", |row| text(&row["state"])),
        column("SINCE", |row| moment(&row["since"])),
        column("MS", |row| text(&row["latency_ms"])),
        column("RECONNECTS", |row| text(&row["reconnects"])),
        column("CAUSE", |row| row["cause"].as_str().unwrap_or_default().to_owned()),
    ];
    table(&answer["tunnels"], &columns, "No tunnels.")
}

pub(super) fn stopped_tunnels(answer: &Value) -> String {
    clean(&match (&answer["waiting_for"], &answer["stopped"]) {
        (Value::String(what), _) => format!("Waiting for {what}."),
        (_, Value::Array(stopped)) if stopped.is_empty() => "There was nothing to stop.".to_owned(),
        (_, stopped) => format!("Stopped: {}.", text(stopped)),
    })
}
