//! The table of commands for people. How each shows its answer is in the files below, one a family.

mod catalog;
mod comfy;
mod pods;
mod spending;
mod tunnels;
mod volumes;
mod words;

use self::catalog::gpus;
use self::comfy::{comfy_queue, comfy_run, comfy_status};
use self::pods::{controlled_pod, created_pod, ended_pod, pod, pods};
use self::spending::spending;
use self::tunnels::{stopped_tunnels, tunnel, tunnels};
use self::volumes::{made_volume, volumes};
use super::Row;

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
