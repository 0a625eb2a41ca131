//! The table of commands for people, and how each shows its answer.

use serde_json::Value;

use super::Row;
use crate::cli::render::{clean, column, table, text, usd};

/// What a row says when it says nothing.
const ROW: Row = Row {
    path: "",
    tool: "",
    positional: None,
    fixed: "{}",
    aliases: &[],
    without: &[],
    about: "",
    render: |answer| answer.to_string(),
    succeeded: |_| true,
};

pub static ROWS: &[Row] = &[
    Row {
        path: "pod list",
        tool: "list_pods",
        fixed: r#"{"format": "detailed"}"#,
        aliases: &["pod ls", "ls", "ps"],
        render: pods,
        ..ROW
    },
    Row { path: "pod info", tool: "get_pod", positional: Some("pod"), aliases: &["info"], render: pod, ..ROW },
    Row { path: "pod create", tool: "create_pod_with_volume", positional: Some("name"), render: created_pod, ..ROW },
    Row {
        path: "pod start",
        tool: "control_pod",
        positional: Some("pod"),
        fixed: r#"{"action": "start"}"#,
        aliases: &["start"],
        without: &["minutes"],
        about: "Start a stopped pod",
        render: controlled_pod,
        ..ROW
    },
    Row {
        path: "pod stop",
        tool: "control_pod",
        positional: Some("pod"),
        fixed: r#"{"action": "stop"}"#,
        aliases: &["stop"],
        without: &["minutes", "confirm_price"],
        about: "Stop a pod: its GPU costs nothing then, and its disk is wiped",
        render: controlled_pod,
        ..ROW
    },
    Row {
        path: "pod restart",
        tool: "control_pod",
        positional: Some("pod"),
        fixed: r#"{"action": "restart"}"#,
        without: &["minutes", "confirm_price"],
        about: "Restart a pod's container",
        render: controlled_pod,
        ..ROW
    },
    Row {
        path: "pod extend",
        tool: "control_pod",
        positional: Some("pod"),
        fixed: r#"{"action": "extend"}"#,
        about: "Give a pod more time",
        render: controlled_pod,
        ..ROW
    },
    Row {
        path: "pod kill",
        tool: "terminate_pod",
        positional: Some("pod"),
        aliases: &["pod rm", "kill", "rm"],
        render: ended_pod,
        ..ROW
    },
    Row {
        path: "tunnel start",
        tool: "start_tunnel",
        positional: Some("pod"),
        aliases: &["connect"],
        render: tunnel,
        ..ROW
    },
    Row { path: "tunnel list", tool: "list_tunnels", aliases: &["tunnel ls"], render: tunnels, ..ROW },
    Row { path: "tunnel stop", tool: "stop_tunnel", positional: Some("pod"), render: stopped_tunnels, ..ROW },
    Row {
        path: "comfy status",
        tool: "comfy_status",
        positional: Some("pod"),
        render: comfy_status,
        succeeded: |answer| answer["ready"] == true,
        ..ROW
    },
    Row { path: "comfy queue", tool: "comfy_queue", positional: Some("pod"), render: comfy_queue, ..ROW },
    Row {
        path: "comfy run",
        tool: "comfy_run",
        positional: Some("workflow_path"),
        render: comfy_run,
        succeeded: |answer| answer["state"] == "done",
        ..ROW
    },
    Row {
        path: "comfy job",
        tool: "comfy_job",
        positional: Some("prompt_id"),
        render: comfy_run,
        succeeded: |answer| answer["state"] == "done",
        ..ROW
    },
    Row { path: "volume list", tool: "list_volumes", aliases: &["volume ls"], render: volumes, ..ROW },
    Row { path: "gpu list", tool: "list_gpus", aliases: &["gpu ls"], render: gpus, ..ROW },
    Row { path: "volume create", tool: "create_volume", positional: Some("name"), render: made_volume, ..ROW },
    Row { path: "spending", tool: "spending", render: spending, ..ROW },
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

fn pods(answer: &Value) -> String {
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
    let rows = table(&answer["pods"], &columns, "No pods; nothing is billed for any.");
    let mut lines = vec![rows];
    if answer["pods"].as_array().is_some_and(|pods| !pods.is_empty()) {
        lines.push(format!("In all {} an hour.", usd(&answer["burn_rate_per_hour"])));
    }
    if !answer["next"].is_null() {
        lines.push(format!("These are not all of {} pods; see --page.", text(&answer["total"])));
    }
    lines.extend(answer["warning"].as_str().map(clean));
    lines.join("\n")
}

fn pod(answer: &Value) -> String {
    let mut lines = vec![facts(&[
        ("Pod", text(&answer["pod"])),
        ("Id", text(&answer["pod_id"])),
        ("Status", text(&answer["status"])),
        ("GPU", text(&answer["gpu"])),
        ("Where", text(&answer["data_center"])),
        ("An hour", usd(&answer["price_per_hour"])),
        ("Cost so far", usd(&answer["cost_usd"])),
        ("Billed for", billed(&answer["billed_seconds"])),
        ("Can cost", usd(&answer["reserved_usd"])),
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
    lines.extend(answer["waiting_for"].as_str().map(|what| format!("Waiting for {}", clean(what))));
    lines.extend(answer["next"].as_str().map(|_| next(answer)));
    lines.join("\n")
}

fn controlled_pod(answer: &Value) -> String {
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
        ("An hour", usd(&answer["price_per_hour"])),
        ("Can cost", usd(&answer["reserved_usd"])),
        ("Ends at", ends_at),
        ("Own switch", text(&answer["switch"])),
    ]));
    lines.extend(answer["waiting_for"].as_str().map(|what| format!("Waiting for {}", clean(what))));
    lines.push(next(answer));
    lines.join("\n")
}

fn created_pod(answer: &Value) -> String {
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
        ("Can cost", usd(&answer["reserved_usd"])),
        ("Ends at", moment(&answer["expires_at"])),
        ("Volume", volume(&answer["volume"])),
        ("Public address", text(&answer["proxy_url"])),
    ]));
    lines.extend(answer["warning"].as_str().map(|warning| format!("Warning: {}", clean(warning))));
    lines.push(next(answer));
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

fn ended_pod(answer: &Value) -> String {
    let (pod, cost) = (text(&answer["pod"]), usd(&answer["cost_usd"]));
    let mut lines = vec![match answer["done"].as_bool() {
        _ if !answer["cancelled"].is_null() => {
            clean(&format!("The pod {pod} is cancelled: {}.", text(&answer["cancelled"])))
        }
        Some(true) => clean(&format!("The pod {pod} is gone. It cost {cost}.")),
        _ => clean(&format!("The pod {pod} is being ended; waiting for {}.", text(&answer["waiting_for"]))),
    }];
    lines.extend(answer["warning"].as_str().map(|warning| format!("Warning: {}", clean(warning))));
    lines.join("\n")
}

fn tunnel(answer: &Value) -> String {
    let (url, pod, port) = (text(&answer["url"]), text(&answer["pod"]), text(&answer["remote_port"]));
    clean(&match answer["done"].as_bool() {
        Some(true) => format!("{url} is port {port} of the pod {pod}."),
        _ => format!("The tunnel to {pod} is not up yet; waiting for {}.", text(&answer["waiting_for"])),
    })
}

fn tunnels(answer: &Value) -> String {
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

fn stopped_tunnels(answer: &Value) -> String {
    clean(&match (&answer["waiting_for"], &answer["stopped"]) {
        (Value::String(what), _) => format!("Waiting for {what}."),
        (_, Value::Array(stopped)) if stopped.is_empty() => "There was nothing to stop.".to_owned(),
        (_, stopped) => format!("Stopped: {}.", text(stopped)),
    })
}

fn comfy_status(answer: &Value) -> String {
    let url = clean(&text(&answer["url"]));
    if answer["ready"] != true {
        return format!("ComfyUI is not ready ({url}): {}\n{}", clean(&text(&answer["cause"])), next(answer));
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

fn comfy_queue(answer: &Value) -> String {
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

fn comfy_run(answer: &Value) -> String {
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
        lines.push(next(answer));
    }
    lines.join("\n")
}

fn ours(row: &Value) -> String {
    if row["job"].is_string() { "yes".to_owned() } else { "-".to_owned() }
}

/// Names and values in two columns; values that are missing are left out.
fn facts(pairs: &[(&str, String)]) -> String {
    let there = pairs.iter().filter(|(_, value)| value != "-");
    let width = there.clone().map(|(name, _)| name.len()).max().unwrap_or(0);
    there.map(|(name, value)| format!("{name:width$}  {}", clean(value))).collect::<Vec<_>>().join("\n")
}

fn next(answer: &Value) -> String {
    format!("Next: {}", clean(&text(&answer["next"])))
}

/// A time without its fraction of a second.
fn moment(value: &Value) -> String {
    let moment = value.as_str().and_then(|text| text.parse::<jiff::Timestamp>().ok());
    moment.map_or_else(|| text(value), |moment| format!("{moment:.0}"))
}

/// Seconds as people read them.
fn billed(value: &Value) -> String {
    let seconds = value.as_u64().map(std::time::Duration::from_secs);
    seconds.map_or_else(|| "-".to_owned(), |seconds| humantime::format_duration(seconds).to_string())
}

fn gib(value: &Value) -> String {
    value.as_f64().map_or_else(|| "-".to_owned(), |amount| format!("{amount} GiB"))
}

fn volume(value: &Value) -> String {
    if value.is_null() {
        return "-".to_owned();
    }
    let name = if value["name"].is_string() { &value["name"] } else { &value["id"] };
    format!("{} at {}", text(name), text(&value["mount_path"]))
}

fn volumes(answer: &Value) -> String {
    let columns = [
        column("NAME", |row| text(&row["name"])),
        column("ID", |row| text(&row["id"])),
        column("GB", |row| text(&row["size_gb"])),
        column("DATA CENTER", |row| text(&row["data_center"])),
        column("TIER", |row| text(&row["tier"])),
        column("A MONTH", |row| usd(&row["monthly_usd"])),
        column("PODS", |row| text(&row["pods"])),
    ];
    let mut lines = vec![table(&answer["volumes"], &columns, "The account has no network volumes.")];
    lines.extend(open_volumes(&answer["open"]));
    lines.push(format!("In all {} a month.", usd(&answer["total_monthly_usd"])));
    lines.extend(answer["warning"].as_str().map(clean));
    lines.join("\n")
}

fn open_volumes(open: &Value) -> impl Iterator<Item = String> {
    open.as_array().into_iter().flatten().map(|row| {
        let (name, size, waiting_for) = (text(&row["name"]), text(&row["size_gb"]), text(&row["waiting_for"]));
        clean(&format!("{name}: {size} GB, waiting for {waiting_for}. Next: {}", text(&row["next"])))
    })
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

fn made_volume(answer: &Value) -> String {
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
    lines.push(next(answer));
    lines.join("\n")
}

fn spending(answer: &Value) -> String {
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
    ];
    lines.push(table(&answer["pods"], &columns, "No pods."));
    let columns = [
        column("LIMIT", |row| text(&row["limit"])),
        column("CAP", |row| text(&row["cap"])),
        column("USED", |row| text(&row["used"])),
        column("LEFT", |row| text(&row["left"])),
    ];
    lines.push(table(&answer["caps"], &columns, "No caps."));
    lines.extend(answer["unknown"].as_array().into_iter().flatten().map(|row| {
        let (pod, set_aside) = (text(&row["pod"]), usd(&row["reserved_usd"]));
        clean(&format!("{pod}: outcome unknown, {set_aside} set aside. Next: {}", text(&row["next"])))
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
