//! What is done inside a pod, over SSH: arming the pod's own switch, and looking whether its volume is there.
//!
//! The switch ends the pod at its deadline when everything of ours outside is dead. It is a loop of the pod's own shell
//! (`inside/switch.sh`) with the pod's own key, and it dies with its container: it is armed again for each start.

mod queue;

use std::time::Duration;

use uuid::Uuid;

use crate::ssh::{Cause, Limits, Output, Ssh, Stdin, Target, quoted};

pub use queue::{QueueUnread, queue};

const SWITCH: &str = include_str!("inside/switch.sh");
/// What the container was started with. Sessions over SSH don't inherit it.
const CONTAINER_ENVIRONMENT: &str = "/proc/1/environ";
/// Neither takes more than moments in a pod that is well.
const LIMITS: Limits = Limits { timeout: Duration::from_secs(30), max_output: 64 * 1024 };
/// Words: the path, and the path as the kernel lists it.
const LOOK: &str = r#"
mounted=no
while read -r _ _ _ _ point _; do
	if [ "$point" = "$2" ]; then mounted=yes; fi
done </proc/self/mountinfo || exit 1
room=$(df -Pk -- "$1") || exit 1
printf 'AUTOPOD_MOUNT %s\n%s\n' "$mounted" "$room"
"#;
const KIB_PER_GIB: f64 = 1024.0 * 1024.0;

/// A switch that was seen running.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Armed {
    /// When it fires, in seconds since 1970 by the pod's own clock.
    pub fires_at: i64,
}

/// Why a pod has no switch, as far as we know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotArmed {
    /// The pod lacks something; trying again in the same container won't help.
    #[error("{0}")]
    Lacking(String),
    /// It may be armed all the same, when only its answer was lost.
    #[error(transparent)]
    NotReached(#[from] Cause),
    #[error("the pod's shell did not say whether it armed its switch ({0})")]
    Unclear(String),
}

/// A mount point in a pod, or the lack of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mount {
    /// Whether something is mounted at this very path. If not, what is written there is lost with the container.
    pub mounted: bool,
    /// In GiB, of the file system that the path lies on.
    pub free_gb: f64,
    pub total_gb: f64,
}

/// Why nothing can be said about a mount.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotVerified {
    #[error("not verified: {0}")]
    NotReached(#[from] Cause),
    #[error("not verified: the pod's shell answered {0}")]
    Unclear(String),
}

/// Arms the pod's switch to fire when `remaining` is over, in place of any that was armed before.
pub async fn arm(ssh: &Ssh, target: &Target, remaining: Duration, api_origin: &str) -> Result<Armed, NotArmed> {
    let output = ssh.run(target, &arming(remaining, api_origin), Stdin::Bytes(SWITCH.into()), LIMITS).await?;
    armed(&output)
}

/// The script comes over stdin, and goes on in a variable, for the loop that it starts is given it too.
fn arming(remaining: Duration, api_origin: &str) -> String {
    // A deadline never comes early.
    let seconds = remaining.as_secs() + u64::from(remaining.subsec_nanos() > 0);
    let (origin, token) = (quoted(api_origin.trim_end_matches('/')), Uuid::new_v4().simple());
    format!(
        "AUTOPOD_SWITCH=$(cat) && export AUTOPOD_SWITCH && \
         exec sh -c \"$AUTOPOD_SWITCH\" autopod-switch arm {seconds} {origin} {token} {CONTAINER_ENVIRONMENT}"
    )
}

fn armed(output: &Output) -> Result<Armed, NotArmed> {
    // A start file of the shell may have said something before.
    let text = String::from_utf8_lossy(&output.stdout);
    for line in text.lines() {
        if let Some(fires_at) = line.strip_prefix("AUTOPOD_ARMED ").and_then(|epoch| epoch.parse().ok()) {
            return Ok(Armed { fires_at });
        }
        if let Some(reason) = line.strip_prefix("AUTOPOD_NOT_ARMED ") {
            return Err(NotArmed::Lacking(reason.to_owned()));
        }
    }
    Err(NotArmed::Unclear(answered(output)))
}

/// Looks whether a volume is really mounted at a path of the pod, and how much room it has.
pub async fn check_mount(ssh: &Ssh, target: &Target, path: &str) -> Result<Mount, NotVerified> {
    let output = ssh.run(target, &looking_at(path), Stdin::Nothing, LIMITS).await?;
    mount(&output).ok_or_else(|| NotVerified::Unclear(answered(&output)))
}

/// A mount of a folder of the same file system has no device of its own, so the kernel's list is asked.
fn looking_at(path: &str) -> String {
    let path = match path.trim_end_matches('/') {
        "" => "/",
        path => path,
    };
    let (path, listed) = (quoted(path), quoted(&as_listed(path)));
    format!("exec sh -c {} autopod-mount {path} {listed}", quoted(LOOK))
}

/// As the kernel writes a path into its list of mounts.
fn as_listed(path: &str) -> String {
    let escape = |c: char| match c {
        ' ' => "\\040".to_owned(),
        '\t' => "\\011".to_owned(),
        '\n' => "\\012".to_owned(),
        '\\' => "\\134".to_owned(),
        c => c.to_string(),
    };
    path.chars().map(escape).collect()
}

fn mount(output: &Output) -> Option<Mount> {
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines().skip_while(|line| !line.starts_with("AUTOPOD_MOUNT "));
    let mounted = lines.next()? == "AUTOPOD_MOUNT yes";
    // The file system's name comes first and the mount point last, and both may hold blanks.
    let words: Vec<_> = lines.last()?.split_whitespace().collect();
    let numbers = words.windows(4).find_map(|window| match window {
        [total, used, free, share] if *share == "-" || share.ends_with('%') => {
            let kib = |word: &str| word.parse::<f64>().ok();
            Some((kib(total)?, kib(used)?, kib(free)?))
        }
        _ => None,
    });
    let (total, _, free) = numbers?;
    Some(Mount { mounted, free_gb: free / KIB_PER_GIB, total_gb: total / KIB_PER_GIB })
}

/// What a command said, short enough for a message.
fn answered(output: &Output) -> String {
    let said = [output.stderr.as_slice(), output.stdout.as_slice()].concat();
    let said: String = String::from_utf8_lossy(&said).trim().chars().take(300).collect();
    format!("exit code {}: {said}", output.exit_code)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(stdout: &str) -> Output {
        Output { exit_code: 0, stdout: stdout.into(), stderr: b"sh: broken".to_vec(), truncated: false }
    }

    #[test]
    fn only_a_definite_line_counts_as_armed() {
        assert_eq!(armed(&said("Welcome!\nAUTOPOD_ARMED 1700000000\n")), Ok(Armed { fires_at: 1_700_000_000 }));
        assert_eq!(armed(&said("AUTOPOD_NOT_ARMED no key\n")), Err(NotArmed::Lacking("no key".to_owned())));
        for text in ["", "AUTOPOD_ARMED\n", "AUTOPOD_ARMED soon\n", "echo AUTOPOD_ARMED 1\n"] {
            let error = armed(&said(text)).expect_err(text);
            assert!(matches!(&error, NotArmed::Unclear(said) if said.contains("sh: broken")), "{error}");
        }
    }

    #[test]
    fn a_deadline_never_comes_early() {
        assert!(arming(Duration::from_millis(2100), "http://127.0.0.1:1/").contains("arm 3 'http://127.0.0.1:1' "));
    }

    #[test]
    fn room_is_read_from_names_with_blanks() {
        let df = "Filesystem 1024-blocks Used Available Capacity Mounted on\n\
                  a b:/v 7 100 10485760 2097152 8388608 20% /my volume 3\n";
        let seen = mount(&said(&format!("AUTOPOD_MOUNT yes\n{df}"))).expect("numbers");
        assert_eq!(seen, Mount { mounted: true, free_gb: 8.0, total_gb: 10.0 });
        assert_eq!(mount(&said(df)), None);
        assert_eq!(mount(&said("AUTOPOD_MOUNT no\n")), None);
    }
}
