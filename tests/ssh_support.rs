//! Debian's real sshd, for tests of our ssh against it.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use autopod_mcp::ssh::{Ssh, Target};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::keeper_support::{tell, until};

const SSHD: &str = "/usr/sbin/sshd";

/// One sshd on loopback, which ends with this value.
pub struct Sshd {
    folder: TempDir,
    pub port: u16,
    pub child: Option<Child>,
}

/// Whether there is an sshd to test with; without one the test is skipped, which is said.
pub fn there_is_an_sshd() -> bool {
    if Path::new(SSHD).exists() {
        return true;
    }
    let required = std::env::var("AUTOPOD_TEST_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|item| item == "sshd"), "sshd is required, but {SSHD} is not there");
    tell("skipped: there is no sshd, so ssh is not tried against a real one");
    false
}

pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    listener.local_addr().expect("an address").port()
}

impl Sshd {
    pub async fn start(authorized: &str) -> Self {
        // Where its privileged half locks itself up; a package that was never started has not made it.
        if rustix::process::getuid().is_root() {
            std::fs::create_dir_all("/run/sshd").expect("/run/sshd");
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let port = free_port();
        let path = |name: &str| folder.path().join(name).display().to_string();
        std::fs::write(folder.path().join("authorized_keys"), format!("{authorized}\n")).expect("a written file");
        let config = format!(
            "ListenAddress 127.0.0.1:{port}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nStrictModes no\n\
             UsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\nAllowTcpForwarding yes\n",
            path("host_key"),
            path("authorized_keys"),
        );
        std::fs::write(folder.path().join("config"), config).expect("a written file");
        let mut sshd = Self { folder, port, child: None };
        sshd.begin().await;
        sshd
    }

    pub async fn target(&self, host_key_alias: &str) -> Target {
        let (host, host_key_alias) = ("127.0.0.1".to_owned(), host_key_alias.to_owned());
        Target { user: user().await, host, port: self.port, host_key_alias }
    }

    /// Starts it with a host key of its own for this start, as a pod has.
    pub async fn begin(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().await.expect("its end");
        }
        let key = self.folder.path().join("host_key");
        let _ = std::fs::remove_file(&key);
        let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status().await;
        assert!(made.expect("ssh-keygen").success());
        let mut command = Command::new(SSHD);
        command.args(["-D", "-e", "-f"]).arg(self.folder.path().join("config"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        self.child = Some(command.spawn().expect("sshd"));
        until("sshd", async || tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await.ok()).await;
    }
}

pub fn ssh(folder: PathBuf) -> Ssh {
    let environment = ["PATH", "HOME"].iter().filter_map(|name| Some(((*name).to_owned(), std::env::var_os(name)?)));
    Ssh { folder, environment: environment.collect() }
}

async fn user() -> String {
    let output = Command::new("id").arg("-un").output().await.expect("id");
    String::from_utf8(output.stdout).expect("a name").trim().to_owned()
}
