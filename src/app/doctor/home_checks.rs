//! What lies in the home: whether it may lie there, can be read, and is closed to others.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::{Finding, patience};
use crate::config::{Config, ConfigError, Home, network_file_system, read_object, refuse_open_file, unknown_fields};
use crate::errors::chain;
use crate::fleet::{HomeIdentity, PodRecord, VolumeRecord};
use crate::state::{self, RecordFile, StateError};
use crate::tunnel::TunnelRecord;

const MIB: u64 = 1024 * 1024;
/// Below this a record may not be written any more.
const LEAST_SPACE: u64 = 10 * MIB;
/// Below this a few pictures fill the disk.
const LITTLE_SPACE: u64 = 1024 * MIB;

pub(super) fn home(home: &Home) -> Vec<Finding> {
    let root = home.root();
    let shown = root.display();
    let Ok(metadata) = std::fs::metadata(root) else {
        return vec![Finding::ok("home", format!("{shown} is not there yet; the first pod or tunnel makes it"))];
    };
    let mode = metadata.permissions().mode() & 0o777;
    let mut findings = Vec::new();
    if !metadata.is_dir() {
        findings.push(Finding::fail("home", format!("{shown} is no folder"), "set AUTOPOD_HOME to a folder"));
    } else if let Some(kind) = network_file_system(root) {
        let found = format!("{shown} is on a network file system ({kind}), where locks can't be trusted");
        findings.push(Finding::fail("home", found, "set AUTOPOD_HOME to a local folder"));
    } else if let Err(error) = rustix::fs::access(root, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK) {
        let todo = format!("make it yours: chown \"$USER\" '{shown}' && chmod 700 '{shown}'");
        findings.push(Finding::fail("home", format!("{shown} can't be written ({error})"), todo));
    } else if mode & 0o077 != 0 {
        let found = format!("{shown} is open to others (mode {mode:o})");
        findings.push(Finding::warn("home", found, format!("chmod 700 '{shown}'; the next command does it too")));
    } else {
        findings.push(Finding::ok("home", format!("{shown}, mode {mode:o}")));
    }
    if let Ok(disk) = rustix::fs::statvfs(root) {
        findings.push(space(disk.f_bavail.saturating_mul(disk.f_frsize)));
    }
    findings
}

fn space(free: u64) -> Finding {
    let found = format!("{} MiB free where the home is", free / MIB);
    if free < LEAST_SPACE {
        Finding::fail("disk", found, "make room; until then nothing new is created, for it could not be recorded")
    } else if free < LITTLE_SPACE {
        Finding::warn("disk", found, "make room for results, or remove old ones from `outputs` in the home")
    } else {
        Finding::ok("disk", found)
    }
}

pub(super) fn config(home: &Home, config: &Result<Config, ConfigError>) -> Finding {
    let path = home.config_file();
    let file = match (config, &read_object(&path)) {
        (Err(error), _) | (_, Err(error)) => return unreadable_config(&path, error),
        (_, Ok(None)) => return Finding::ok("config", format!("{} is not there; defaults count", path.display())),
        (_, Ok(Some(file))) => file.clone(),
    };
    let unknown = unknown_fields(&file);
    if !unknown.is_empty() {
        let found = format!("{} has fields that mean nothing here: {}", path.display(), unknown.join(", "));
        return Finding::warn("config", found, "look for a misspelled name: `autopod-mcp config show` lists the known");
    }
    match refuse_open_file(&path) {
        Ok(()) => Finding::ok("config", format!("{} is read, closed to others", path.display())),
        Err(error) => Finding::warn("config", error.to_string(), format!("chmod 600 '{}'", path.display())),
    }
}

fn unreadable_config(path: &Path, error: &ConfigError) -> Finding {
    let todo = match error {
        ConfigError::Open { .. } => format!("chmod 600 '{}'", path.display()),
        _ => format!("mend {} by hand, or move it away and run `autopod-mcp config init`", path.display()),
    };
    Finding::fail("config", chain(error), todo)
}

/// Made when the first pod is, and put into each pod.
pub(super) fn key_pair(home: &Home) -> Finding {
    let (private, public) = (home.ssh().join("id_ed25519"), home.ssh().join("id_ed25519.pub"));
    match (std::fs::metadata(&private), public.exists()) {
        (Err(_), false) => Finding::ok("key pair", "none yet; it is made with the first pod"),
        (Ok(_), false) | (Err(_), true) => Finding::warn(
            "key pair",
            format!("only one half of it is in {}", home.ssh().display()),
            "nothing: a new pair is made with the next pod; pods that run now can't be reached by ssh any more",
        ),
        (Ok(metadata), true) if metadata.permissions().mode() & 0o077 != 0 => Finding::fail(
            "key pair",
            format!("{} is open to others, and ssh refuses such a key", private.display()),
            format!("chmod 600 '{}'", private.display()),
        ),
        (Ok(_), true) => Finding::ok("key pair", private.display().to_string()),
    }
}

/// Whether what we know of pods and tunnels can be read, and what was put aside because it couldn't.
pub(super) fn records(home: &Home) -> Vec<Finding> {
    let lock = home.lock("state");
    let pods = RecordFile::<PodRecord>::new(home.pods_file(), lock.clone(), patience()).look();
    let tunnels = RecordFile::<TunnelRecord>::new(home.tunnels_file(), lock.clone(), patience()).look();
    let volumes = RecordFile::<VolumeRecord>::new(home.volumes_file(), lock, patience()).look();
    let results = [
        (
            home.pods_file(),
            pods.map(|records| {
                let open = records.entries.values().filter(|record| record.is_open()).count();
                format!("{} pods, {open} of them open", records.entries.len())
            }),
        ),
        (home.tunnels_file(), tunnels.map(|records| format!("{} tunnels", records.entries.len()))),
        (home.volumes_file(), volumes.map(|records| format!("{} creates of volumes", records.entries.len()))),
        (
            home.home_file(),
            HomeIdentity::read(home).map(|identity| match identity {
                Some(identity) => format!("owner {}", identity.owner),
                None => "no owner yet".to_owned(),
            }),
        ),
    ];
    let mut findings = Vec::new();
    let mut readable = Vec::new();
    for (path, result) in results {
        match result {
            Ok(what) => readable.push(what),
            Err(error) => findings.push(unreadable_record(home, &path, &error)),
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok("records", format!("readable: {}", readable.join(", "))));
    }
    findings.extend(set_aside(home));
    findings
}

fn unreadable_record(home: &Home, path: &Path, error: &StateError) -> Finding {
    let todo = match error {
        StateError::Newer { .. } => "use the newer version of this program for this home".to_owned(),
        _ if path == home.home_file() => {
            format!("mend {} by hand: a new one would disown the pods that run", path.display())
        }
        _ => "run `autopod-mcp pod list`: it keeps the file under another name and takes back the pods that run"
            .to_owned(),
    };
    Finding::fail("records", chain(error), todo)
}

fn set_aside(home: &Home) -> Vec<Finding> {
    let names = |mark: &str| {
        let entries = std::fs::read_dir(home.root()).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut names: Vec<_> = names.filter(|name| name.contains(mark)).collect();
        names.sort();
        names.join(", ")
    };
    let (broken, old) = (names(&format!(".{}", state::CORRUPT)), names(&format!(".{}", state::PREDECESSOR)));
    let mut findings = Vec::new();
    if !broken.is_empty() {
        let todo = "compare with `autopod-mcp pod list`, then remove them";
        findings.push(Finding::warn("set aside", format!("broken files were kept as {broken}"), todo));
    }
    if !old.is_empty() {
        let todo = "pods that they name may still run: end those at https://console.runpod.io, then remove the files";
        findings.push(Finding::warn("set aside", format!("files of the predecessor were kept as {old}"), todo));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::app::Health;

    #[test]
    fn a_disk_is_judged_by_what_is_left() {
        assert_eq!(space(9 * MIB).health, Health::Fail);
        assert_eq!(space(500 * MIB).health, Health::Warn);
        assert_eq!(space(5000 * MIB).health, Health::Ok);
    }
}
