//! One command in a pod, against Debian's real sshd: what it answers, and what is told when it can't.

use std::io::{Seek, Write};
use std::time::{Duration, Instant};

use autopod_mcp::keeper::inside::{self, NotArmed};
use autopod_mcp::ssh::{Cause, CopyError, Limits, Output, Ssh, Stdin, Target};
use tempfile::TempDir;

use crate::keeper_support::{kill, until};
use crate::ssh_support::{Sshd, ssh, there_is_an_sshd};
use crate::support::program::PATIENCE;

const LIMITS: Limits = Limits { timeout: PATIENCE, max_output: 64 * 1024 };

/// An sshd that takes our key, and a folder for what a test writes.
struct Pod {
    sshd: Sshd,
    ssh: Ssh,
    target: Target,
    folder: TempDir,
}

impl Pod {
    async fn start() -> Option<Self> {
        if !there_is_an_sshd() {
            return None;
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let ssh = ssh(folder.path().join("a b%c"));
        let sshd = Sshd::start(&ssh.public_key().await.expect("a key")).await;
        let target = sshd.target("autopod-real-1").await;
        Some(Self { sshd, ssh, target, folder })
    }

    async fn run(&self, command: &str, stdin: Stdin) -> Result<Output, Cause> {
        self.ssh.run(&self.target, command, stdin, LIMITS).await
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// Logs of ssh that were left behind.
    fn logs(&self) -> usize {
        let entries = std::fs::read_dir(&self.ssh.folder).expect("a folder").flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(".writing-")).count()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_tells_its_exit_code_and_both_streams() {
    let Some(pod) = Pod::start().await else { return };
    for code in [0, 1, 126, 255] {
        // What a pod says must not pass for what ssh says.
        let command = format!("echo out; echo 'Permission denied (publickey).' >&2; exit {code}");
        let output = pod.run(&command, Stdin::Nothing).await.expect("a command that ran");
        let wanted = Output {
            exit_code: code,
            stdout: b"out\n".to_vec(),
            stderr: b"Permission denied (publickey).\n".to_vec(),
            truncated: false,
        };
        assert_eq!(output, wanted);
    }
    let killed = pod.run("kill -9 $$", Stdin::Nothing).await.expect("a command that ran");
    assert_eq!(killed.exit_code, 255);
    let missing = pod.run("no-such-command", Stdin::Nothing).await.expect("a shell that ran");
    assert_eq!(missing.exit_code, 127);
    assert_eq!(pod.logs(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn stdin_is_nothing_or_bytes_or_a_file() {
    let Some(pod) = Pod::start().await else { return };
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|number| (number % 251) as u8).collect();
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(&bytes).expect("a written file");
    file.rewind().expect("a file");
    let sum = pod.run("cksum", Stdin::Bytes(bytes.clone())).await.expect("a sum").stdout;
    assert!(String::from_utf8_lossy(&sum).contains(" 3000000"), "{sum:?}");
    assert_eq!(pod.run("cksum", Stdin::File(file)).await.expect("a sum").stdout, sum);
    assert_eq!(pod.run("wc -c", Stdin::Nothing).await.expect("a count").stdout.trim_ascii(), b"0");
    // A command need not read what it is given.
    assert_eq!(pod.run("exit 3", Stdin::Bytes(bytes)).await.expect("a command that ran").exit_code, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_head_of_much_output_is_kept_and_the_command_ends() {
    let Some(pod) = Pod::start().await else { return };
    let command = "head -c 50000000 /dev/zero; head -c 70000 /dev/zero >&2; echo beyond; exit 7";
    let output = pod.run(command, Stdin::Nothing).await.expect("a command that ran");
    assert_eq!((output.exit_code, output.truncated), (7, true));
    assert_eq!((output.stdout.len(), output.stderr.len()), (LIMITS.max_output, LIMITS.max_output));
    let exact = pod.run(&format!("head -c {} /dev/zero", LIMITS.max_output), Stdin::Nothing).await;
    assert!(!exact.expect("a command that ran").truncated);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_out_and_a_dropped_call_end_ssh() {
    let Some(pod) = Pod::start().await else { return };
    let marked = |mark: &str| format!("echo {mark}; exec sleep 600");
    let timeout = Duration::from_millis(800);
    let limits = Limits { timeout, ..LIMITS };
    let started = Instant::now();
    let late = pod.ssh.run(&pod.target, &marked("late"), Stdin::Nothing, limits).await;
    assert_eq!(late, Err(Cause::TimedOut(timeout)));
    assert!(started.elapsed() < Duration::from_secs(20));
    assert!(pod.ssh_pids().is_empty(), "ssh goes on after its time");

    let dropped = tokio::time::timeout(timeout, pod.run(&marked("dropped"), Stdin::Nothing)).await;
    assert!(dropped.is_err());
    until("the end of the dropped ssh", async || pod.ssh_pids().is_empty().then_some(())).await;
    assert_eq!(pod.logs(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_is_no_exit_code() {
    let Some(mut pod) = Pod::start().await else { return };
    let command = "echo begun; exec sleep 600";
    let (outcome, ()) = tokio::join!(pod.run(command, Stdin::Nothing), async {
        let pid = until("an ssh", async || pod.ssh_pids().first().copied()).await;
        kill(pid);
    });
    assert!(matches!(&outcome, Err(Cause::Lost(why)) if why.contains("signal: 9")), "{outcome:?}");

    // The pod's end breaks under a command.
    let shell = "echo; kill -9 $PPID; exec sleep 600";
    let outcome = pod.run(shell, Stdin::Nothing).await;
    assert!(matches!(outcome, Err(Cause::Lost(_))), "{outcome:?}");

    let strange = ssh(pod.folder.path().join("strange"));
    strange.public_key().await.expect("a key");
    let refused = strange.run(&pod.target, "true", Stdin::Nothing, LIMITS).await;
    assert_eq!(refused, Err(Cause::KeyRefused));

    pod.sshd.begin().await;
    assert_eq!(pod.run("true", Stdin::Nothing).await, Err(Cause::HostKeyChanged));
    pod.target = pod.sshd.target("autopod-real-2").await;
    assert_eq!(pod.run("exit 4", Stdin::Nothing).await.expect("another start").exit_code, 4);

    pod.sshd.child.take().expect("sshd").kill().await.expect("its end");
    assert_eq!(pod.run("true", Stdin::Nothing).await, Err(Cause::SshdNotUp));
    let nowhere = ssh(pod.folder.path().join("strange"));
    let nowhere = Ssh { environment: vec![("PATH".to_owned(), pod.folder.path().into())], ..nowhere };
    assert_eq!(nowhere.run(&pod.target, "true", Stdin::Nothing, LIMITS).await, Err(Cause::NoSsh));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_pod_lacks_is_told() {
    let Some(pod) = Pod::start().await else { return };
    // This machine is no container of RunPod's.
    let armed = inside::arm(&pod.ssh, &pod.target, Duration::from_secs(60), "http://127.0.0.1:1").await;
    assert!(matches!(&armed, Err(NotArmed::Lacking(what)) if what.contains("RUNPOD_POD_ID")), "{armed:?}");

    let root = inside::check_mount(&pod.ssh, &pod.target, "/").await.expect("a mount");
    assert!(root.mounted && root.total_gb > root.free_gb && root.free_gb > 0.0, "{root:?}");
    let proc = inside::check_mount(&pod.ssh, &pod.target, "/proc/").await.expect("a mount");
    assert!(proc.mounted, "{proc:?}");
    let folder = pod.path("a folder");
    std::fs::create_dir(&folder).expect("a folder");
    let plain = inside::check_mount(&pod.ssh, &pod.target, &folder).await.expect("a folder");
    assert!(!plain.mounted && plain.total_gb > 0.0, "{plain:?}");
    let missing = inside::check_mount(&pod.ssh, &pod.target, "/no/such").await.expect_err("nothing there");
    assert!(missing.to_string().starts_with("not verified: ") && missing.to_string().contains("/no/such"), "{missing}");
}

#[tokio::test(flavor = "multi_thread")]
async fn files_and_folders_are_copied_whole_or_not_at_all() {
    let Some(pod) = Pod::start().await else { return };
    let (ssh, target) = (&pod.ssh, &pod.target);
    let here = pod.folder.path().join("here");
    let there = pod.folder.path().join("there it's $HOME");
    std::fs::create_dir_all(here.join("deep/er")).expect("folders");
    std::fs::create_dir(&there).expect("a folder");
    let there = there.to_str().expect("text");
    let big: Vec<u8> = (0..5_000_000_u32).map(|number| (number % 253) as u8).collect();
    std::fs::write(here.join("big 'one'"), &big).expect("a file");
    std::fs::write(here.join("deep/er/empty"), "").expect("a file");

    ssh.send(target, &here.join("big 'one'"), there).await.expect("a file in a folder");
    ssh.send(target, &here.join("big 'one'"), &format!("{there}/-other")).await.expect("a file by a name");
    ssh.send(target, &here, there).await.expect("a folder in a folder");
    for name in ["big 'one'", "-other", "here/big 'one'"] {
        assert_eq!(std::fs::read(format!("{there}/{name}")).expect(name), big, "{name}");
    }
    assert!(std::fs::metadata(format!("{there}/here/deep/er/empty")).is_ok());

    let back = pod.folder.path().join("back");
    std::fs::create_dir(&back).expect("a folder");
    let written = ssh.fetch(target, &format!("{there}/big 'one'"), &back).await.expect("a file");
    assert_eq!((written.clone(), std::fs::read(&written).expect("a file")), (back.join("big 'one'"), big.clone()));
    ssh.fetch(target, there, &back.join("all")).await.expect("a folder");
    assert_eq!(std::fs::read(back.join("all/here/big 'one'")).expect("a file"), big);

    let missing = ssh.fetch(target, "/no/such", &back).await.expect_err("nothing there");
    assert!(matches!(&missing, CopyError::NotFound(what) if what.contains("/no/such")), "{missing}");
    let closed = ssh.send(target, &here.join("big 'one'"), "/proc/no/such").await.expect_err("no such folder");
    assert!(matches!(closed, CopyError::Pod(_)), "{closed:?}");

    // The connection breaks under a file that was there before.
    let old = format!("{there}/old");
    std::fs::write(&old, "old").expect("a file");
    let endless = here.join("endless");
    std::fs::File::create(&endless).and_then(|file| file.set_len(1 << 40)).expect("a file of holes");
    let halves = || {
        let names = std::fs::read_dir(there).expect("a folder").flatten();
        names.filter(|name| name.file_name().to_string_lossy().contains(".autopod-")).count()
    };
    let (sent, ()) = tokio::join!(ssh.send(target, &endless, &old), async {
        until("half a file", async || (halves() > 0).then_some(())).await;
        pod.ssh_pids().into_iter().for_each(kill);
    });
    assert!(matches!(sent, Err(CopyError::Ssh(Cause::Lost(_)))), "{sent:?}");
    until("the half file's end", async || (halves() == 0).then_some(())).await;
    assert_eq!(std::fs::read_to_string(&old).expect("a file"), "old");

    let mine = back.join("mine");
    std::fs::write(&mine, "mine").expect("a file");
    let endless = endless.to_str().expect("text");
    let (fetched, ()) = tokio::join!(ssh.fetch(target, endless, &mine), async {
        let half = async || {
            std::fs::read_dir(&back)
                .expect("a folder")
                .flatten()
                .any(|entry| entry.file_name().to_string_lossy().starts_with(".autopod-"))
                .then_some(())
        };
        until("half a file", half).await;
        pod.ssh_pids().into_iter().for_each(kill);
    });
    assert!(matches!(fetched, Err(CopyError::Ssh(Cause::Lost(_)))), "{fetched:?}");
    assert_eq!(std::fs::read_to_string(&mine).expect("a file"), "mine");
    assert_eq!(std::fs::read_dir(&back).expect("a folder").count(), 3);
}

impl Pod {
    /// The ssh processes of this pod.
    fn ssh_pids(&self) -> Vec<u32> {
        let folders = std::fs::read_dir("/proc").expect("/proc").flatten();
        let pids = folders.filter_map(|folder| folder.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| {
            let cwd = std::fs::read_link(format!("/proc/{pid}/cwd"));
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            cwd.is_ok_and(|cwd| cwd == self.ssh.folder) && line.starts_with(b"ssh\0")
        })
        .collect()
    }
}
