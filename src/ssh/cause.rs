//! Why a connection is not there, told by what ssh says.

use std::time::Duration;

/// Why an ssh connection is not there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    #[error("no `ssh` was found on PATH; install an OpenSSH client (Debian: openssh-client)")]
    NoSsh,
    #[error(
        "the pod refused our SSH key; a pod takes it only if it was created with it (PUBLIC_KEY), and images that don't start sshd can't be reached"
    )]
    KeyRefused,
    #[error(
        "the pod's host key changed within one start of the pod; the connection was refused, for somebody may stand in between"
    )]
    HostKeyChanged,
    #[error("the local port is in use by another program")]
    PortInUse,
    #[error("the pod's sshd does not allow forwarding")]
    ForwardingRefused,
    #[error("sshd in the pod does not answer yet (connection refused)")]
    SshdNotUp,
    #[error("the pod can't be reached ({0})")]
    Unreachable(String),
    #[error("the connection was lost ({0})")]
    Lost(String),
    #[error("ssh did not get ready within {0:?}")]
    Slow(Duration),
    #[error("the command in the pod did not end within {0:?}; it may still run there")]
    TimedOut(Duration),
    #[error("ssh can't be started: {0}")]
    NotStarted(String),
}

impl Cause {
    pub(super) fn of_spawn(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::NotFound => Self::NoSsh,
            _ => Self::NotStarted(error.to_string()),
        }
    }

    /// Whether trying again can't help.
    pub fn is_terminal(&self) -> bool {
        matches!(
            self,
            Self::NoSsh | Self::KeyRefused | Self::HostKeyChanged | Self::PortInUse | Self::ForwardingRefused
        )
    }
}

/// ssh exits with 255 for network, authentication and bind alike; only its messages tell them apart.
pub(super) fn classify(lines: &[String], status: &str) -> Cause {
    // Lines about a channel speak of one forwarded connection, not of the session; the others of no failure at all.
    let beside = ["channel ", "debug1: ", "Warning: Permanently added"];
    let session: Vec<_> = lines.iter().filter(|line| !beside.iter().any(|start| line.starts_with(start))).collect();
    let says = |text: &str| session.iter().any(|line| line.contains(text));
    let last = || session.last().map_or_else(|| status.to_owned(), |line| line.trim().to_owned());
    if says("REMOTE HOST IDENTIFICATION HAS CHANGED") || says("Host key verification failed") {
        Cause::HostKeyChanged
    } else if says("Permission denied") || says("Too many authentication failures") {
        Cause::KeyRefused
    } else if says("Address already in use")
        || says("cannot listen to port")
        || says("Could not request local forwarding")
    {
        Cause::PortInUse
    } else if lines.iter().any(|line| line.contains("administratively prohibited")) && session.is_empty() {
        Cause::ForwardingRefused
    } else if says("Connection refused") {
        Cause::SshdNotUp
    } else if ["timed out", "No route to host", "Network is unreachable", "Could not resolve"]
        .iter()
        .any(|text| says(text))
        && !says("Timeout, server")
    {
        Cause::Unreachable(last())
    } else {
        Cause::Lost(last())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_apart_by_what_ssh_says() {
        let says = |text: &str| classify(&text.lines().map(str::to_owned).collect::<Vec<_>>(), "exit status: 255");
        assert_eq!(says("root@127.0.0.1: Permission denied (publickey)."), Cause::KeyRefused);
        assert_eq!(
            says(
                "bind [127.0.0.1]:8188: Address already in use\nchannel_setup_fwd_listener_tcpip: cannot listen to port: 8188"
            ),
            Cause::PortInUse
        );
        assert_eq!(says("@  WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!  @"), Cause::HostKeyChanged);
        assert_eq!(says("ssh: connect to host 127.0.0.1 port 1: Connection refused"), Cause::SshdNotUp);
        assert!(matches!(says("ssh: connect to host 10.0.0.1 port 22: Connection timed out"), Cause::Unreachable(_)));
        assert!(matches!(says("Timeout, server 127.0.0.1 not responding."), Cause::Lost(_)));
        assert!(matches!(
            says(
                "channel 2: open failed: connect failed: Connection refused\nConnection to 127.0.0.1 closed by remote host."
            ),
            Cause::Lost(_)
        ));
    }
}
