//! Processes that outlived the command that started them: `nohup`, `setsid`, `&`. A real container's end takes them
//! with it.

use std::path::Path;

/// Kills every process whose environment names the container's folder as HOME: only commands run in this pod have
/// that.
#[cfg(target_os = "linux")]
pub async fn kill(folder: &Path) {
    let folder = folder.to_owned();
    // A stray can start another one while the list is read, so it is read until it is empty.
    let sweep = move || (0..20).any(|_| kill_once(&folder) == 0);
    if !tokio::task::spawn_blocking(sweep).await.unwrap_or(false) {
        tracing::error!("processes of a container keep coming back");
    }
}

/// Without `/proc` there is no way to find them; commands that still run were ended with their process group.
#[cfg(not(target_os = "linux"))]
pub async fn kill(_folder: &Path) {}

#[cfg(target_os = "linux")]
fn kill_once(folder: &Path) -> usize {
    use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
    use std::os::unix::ffi::OsStrExt;

    let mark = [b"HOME=", folder.as_os_str().as_bytes()].concat();
    let Ok(processes) = std::fs::read_dir("/proc") else { return 0 };
    let mut killed = 0;
    for process in processes.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw) else {
            continue;
        };
        // Opened before the environment is read: the signal can't hit another process that got the number since.
        let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        let Ok(environment) = std::fs::read(process.path().join("environ")) else { continue };
        if environment.split(|byte| *byte == 0).any(|variable| variable == mark)
            && pidfd_send_signal(handle, Signal::KILL).is_ok()
        {
            killed += 1;
        }
    }
    if killed > 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    killed
}
