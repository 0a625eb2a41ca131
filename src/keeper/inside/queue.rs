//! ComfyUI's queue, read from inside its pod, for pods that have no tunnel.

use super::{LIMITS, answered};
use crate::comfy::Queue;
use crate::ssh::{Cause, Limits, Ssh, Stdin, Target, quoted};

/// Word: the port. A pod may be told of a proxy, which doesn't lead to the pod itself.
const READ: &str = r#"
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
url=http://127.0.0.1:$1/queue
printf '\nAUTOPOD_QUEUE\n'
if curl --version >/dev/null 2>&1; then
	exec curl -q -fsS --max-time 10 "$url"
elif command -v wget >/dev/null 2>&1; then
	exec wget -q -T 10 -O - "$url"
elif command -v python3 >/dev/null 2>&1; then
	exec python3 -c 'import sys, urllib.request
sys.stdout.buffer.write(urllib.request.urlopen(sys.argv[1], timeout=10).read())' "$url"
fi
echo "it has none of curl, wget and python3" >&2
exit 127
"#;
const MARK: &str = "\nAUTOPOD_QUEUE\n";
/// Each prompt of a queue brings its whole workflow along.
const MOST_BYTES: usize = 16 << 20;

/// Why nothing can be said about a queue.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueUnread {
    #[error(transparent)]
    NotReached(#[from] Cause),
    #[error("the pod's shell answered {0}")]
    Unclear(String),
}

/// Asks the ComfyUI on this port of the pod.
pub async fn queue(ssh: &Ssh, target: &Target, port: u16) -> Result<Queue, QueueUnread> {
    let command = format!("exec sh -c {} autopod-queue {port}", quoted(READ));
    let output = ssh.run(target, &command, Stdin::Nothing, Limits { max_output: MOST_BYTES, ..LIMITS }).await?;
    // A start file of the shell may have said something before.
    let stdout = &output.stdout;
    let mark = stdout.windows(MARK.len()).position(|window| window == MARK.as_bytes());
    let queue = mark.filter(|_| output.exit_code == 0).and_then(|at| Queue::parse(&stdout[at + MARK.len()..]));
    queue.ok_or_else(|| QueueUnread::Unclear(answered(&output)))
}
