//! ssh that other processes hold to a pod: people's shells, commands and copies, which may go on for hours.

use super::{HOST_KEY_ALIAS, host_key_alias};

/// Whether a process other than this one has an ssh to this pod that is no tunnel. Looks at the machine's processes, so
/// it blocks for a moment.
pub fn is_used_elsewhere(pod_id: &str) -> bool {
    let mark = format!("{HOST_KEY_ALIAS}={}", host_key_alias(pod_id, ""));
    let us = std::process::id();
    processes().into_iter().any(|(parent, line)| {
        parent != us && line.starts_with("ssh ") && line.contains(&mark) && !line.contains(" -L ")
    })
}

/// The parent and the command line of each process that we may see.
#[cfg(target_os = "linux")]
fn processes() -> Vec<(u32, String)> {
    let Ok(folders) = std::fs::read_dir("/proc") else { return Vec::new() };
    let process = |folder: std::fs::DirEntry| {
        folder.file_name().to_str()?.parse::<u32>().ok()?;
        let line = std::fs::read(folder.path().join("cmdline")).ok()?;
        let status = std::fs::read_to_string(folder.path().join("status")).ok()?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()?;
        Some((parent, String::from_utf8_lossy(&line).replace('\0', " ")))
    };
    folders.flatten().filter_map(process).collect()
}

#[cfg(not(target_os = "linux"))]
fn processes() -> Vec<(u32, String)> {
    let listed = std::process::Command::new("ps").args(["-A", "-ww", "-o", "ppid=,args="]).output();
    let text = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let process = |line: &str| {
        let (parent, line) = line.trim_start().split_once(' ')?;
        Some((parent.parse().ok()?, line.trim_start().to_owned()))
    };
    text.lines().filter_map(process).collect()
}
