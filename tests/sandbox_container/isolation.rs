//! Commands in a pod: the namespaces they run in, what they see there, and that nothing of them is left behind.

use super::ssh::{eventually, text};
use super::*;
use crate::support::program::{self, PROGRAM};

/// The process namespace that the pod's commands share.
async fn namespace_of(pod: &Pod) -> String {
    let output = pod.run("readlink /proc/self/ns/pid").await;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    text(&output.stdout).trim().to_owned()
}

/// The command lines of all processes in it.
fn processes_in(namespace: &str) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").expect("a /proc").flatten();
    let inside = processes.filter(|process| {
        std::fs::read_link(process.path().join("ns/pid")).is_ok_and(|link| link.as_os_str() == namespace)
    });
    inside.map(|process| text(&std::fs::read(process.path().join("cmdline")).unwrap_or_default())).collect()
}

fn with_env(spec: ContainerSpec) -> ContainerSpec {
    let env = [("RUNPOD_POD_ID", "pod123"), ("RUNPOD_API_KEY", "rpa_scoped"), ("MINE", "two words")];
    ContainerSpec { env: env.map(|(name, value)| (name.to_owned(), value.to_owned())).into(), ..spec }
}

#[tokio::test]
async fn commands_see_the_pod_and_not_the_machine() {
    if !userns::are_allowed() {
        return;
    }
    let pod = Pod::open_with(with_env).await;
    let output = pod.run("ls -A / | sort; id -u; ls /root /tmp; readlink /proc/1/exe").await;
    let seen = text(&output.stdout);
    assert!(!seen.contains("fstab") && seen.contains("ComfyUI\n") && seen.contains("workspace\n"), "{seen}");
    assert!(seen.ends_with("0\n/root:\n\n/tmp:\n/usr/bin/cat\n") || seen.ends_with("/bin/cat\n"), "{seen}");
    let home = pod.home.path().display();
    let output =
        pod.run(&format!("ls -d {home} /home/* 2>/dev/null; ps -e -o pid= | wc -l; echo $MINE $RUNPOD_API_KEY")).await;
    let (shell, count, list) = (1, 1, 1);
    let processes: usize = text(&output.stdout).trim().parse().expect("only a number");
    assert!(processes <= 1 + shell + count + list, "{processes} processes");

    let output = pod.run("tr '\\0' '\\n' < /proc/1/environ").await;
    let environ = text(&output.stdout);
    for line in ["RUNPOD_POD_ID=pod123", "RUNPOD_API_KEY=rpa_scoped", "MINE=two words"] {
        assert!(environ.lines().any(|given| given == line), "{environ}");
    }
    for lent in ["/usr", "/etc", "/bin", "/lib"] {
        let output = pod.run(&format!("touch {lent}/autopod-was-here")).await;
        assert!(text(&output.stderr).contains("Read-only file system"), "{lent}: {}", text(&output.stderr));
    }
    assert_eq!(
        pod.run("echo x >/tmp/a && echo y >~/b && echo z >/dev/null && cat /tmp/a /root/b").await.stdout,
        b"x\ny\n"
    );
    assert_eq!(std::fs::read(pod.disk().join("root/b")).expect("on the container's disk"), b"y\n");
}

#[tokio::test]
async fn what_is_mounted_below_a_lent_folder_is_read_only_too() {
    if !userns::are_allowed() {
        return;
    }
    // Namespaces within namespaces: there something can be mounted in /usr without harm to this machine.
    let script = r#"set -e; mount -t tmpfs -o noexec none /usr/games; touch /usr/games/before; exec "$0" sandbox --manual-clock"#;
    let mut world = Process::start(&["unshare", "-Urm", "sh", "-c", script, PROGRAM]).await;
    let ssh = world.pod().await;
    let output = finish(ssh.command().arg("ls /usr/games; touch /usr/games/after").stdin(Stdio::null())).await;
    assert_eq!(text(&output.stdout), "before\n", "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("Read-only file system"), "{}", text(&output.stderr));
    world.child.kill().await.expect("killed");
}

#[tokio::test]
async fn the_volume_is_at_its_path() {
    if !userns::are_allowed() {
        return;
    }
    let volumes = TempDir::new().expect("a temporary folder");
    let host = volumes.path().join("my volume");
    std::fs::create_dir(&host).expect("a folder");
    std::fs::write(host.join("there"), "before").expect("a file");
    let pod =
        Pod::open_with(|spec| ContainerSpec { volume: Some((host.clone(), "/data/all models".into())), ..spec }).await;
    let output =
        pod.run("cd '/data/all models' && cat there && echo after >here && stat -f -c %T . && mountpoint -q .").await;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stdout).starts_with("before"), "{}", text(&output.stdout));
    assert_eq!(std::fs::read(host.join("here")).expect("on the volume"), b"after\n");
    pod.container.stop().await;
    assert!(!pod.home.path().join("disk").exists());
    assert_eq!(std::fs::read(host.join("here")).expect("outlives the pod"), b"after\n");

    let out =
        Pod::open_with(|spec| ContainerSpec { volume: Some((host.clone(), "/../../escape".into())), ..spec }).await;
    let output = out.run("true").await;
    assert_eq!(output.status.code(), Some(126));
    assert!(text(&output.stderr).contains("nothing can be mounted at"), "{}", text(&output.stderr));
}

#[tokio::test]
async fn what_a_command_leaves_in_the_background_goes_on() {
    if !userns::are_allowed() {
        return;
    }
    let pod = Pod::open().await;
    let looping = "nohup setsid sh -c 'while :; do echo tick >>/tmp/ticks; sleep 0.02; done' >/dev/null 2>&1 & echo $!";
    let first = text(&pod.run(looping).await.stdout).trim().to_owned();
    let ticks = pod.disk().join("tmp/ticks");
    let length = || std::fs::metadata(&ticks).map_or(0, |file| file.len());
    eventually("it ticks", || length() > 0).await;
    let before = length();
    eventually("it goes on after its channel", || length() > before + 20).await;
    // The next command sees it, can end it, and no zombie is left of it.
    assert_eq!(pod.run(&format!("kill {first}")).await.status.code(), Some(0));
    let wait = format!("while kill -0 {first} 2>/dev/null; do sleep 0.01; done; ls /proc | grep -c '^{first}$'");
    assert_eq!(text(&pod.run(&wait).await.stdout), "0\n");
    // Process 1 does not listen to anybody inside.
    pod.run("kill -9 1; kill 1; kill -HUP 1").await;
    assert_eq!(pod.run("echo still here").await.stdout, b"still here\n");
}

#[tokio::test]
async fn many_commands_at_once_have_their_own_streams_and_codes() {
    if !userns::are_allowed() {
        return;
    }
    let pod = Arc::new(Pod::open().await);
    let mut running = tokio::task::JoinSet::new();
    for number in 0..12 {
        let pod = pod.clone();
        running.spawn(async move { (number, pod.run(&format!("echo {number}; exit {number}")).await) });
    }
    for (number, output) in running.join_all().await {
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(number), format!("{number}\n")));
    }
}

#[tokio::test]
async fn files_can_be_copied_by_sftp() {
    if !userns::are_allowed() {
        return;
    }
    let pod = Pod::open().await;
    let folder = pod.home.path().join("ssh");
    let file: Vec<u8> = (0..3_000_000u32).map(|number| (number / 7) as u8).collect();
    std::fs::write(folder.join("up.bin"), &file).expect("a file");
    let batch = "put up.bin /tmp/there.bin\nget /tmp/there.bin down.bin\n";
    let mut sftp = Command::new("sftp");
    sftp.args(["-F", "none", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=accept-new", "-i", "id_ed25519"]);
    sftp.args(["-o", "UserKnownHostsFile=known_hosts", "-P", &pod.container.ssh_port().to_string(), "-b", "-"]);
    sftp.arg("root@127.0.0.1").current_dir(&folder).kill_on_drop(true);
    let mut sftp = sftp.stdin(Stdio::piped()).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("sftp");
    let mut stdin = sftp.stdin.take().expect("a pipe");
    tokio::io::AsyncWriteExt::write_all(&mut stdin, batch.as_bytes()).await.expect("written");
    drop(stdin);
    let output = tokio::time::timeout(PATIENCE, sftp.wait_with_output()).await.expect("in time").expect("output");
    let has_server = ["/usr/lib/openssh", "/usr/libexec/openssh", "/usr/lib/ssh", "/usr/libexec"]
        .iter()
        .any(|folder| Path::new(folder).join("sftp-server").exists());
    if has_server {
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(std::fs::read(folder.join("down.bin")).expect("a file") == file);
        assert!(std::fs::read(pod.disk().join("tmp/there.bin")).expect("in the pod") == file);
    } else {
        assert!(text(&output.stderr).contains("subsystem request failed"), "{}", text(&output.stderr));
    }
}

#[tokio::test]
async fn a_command_ends_with_its_channel() {
    if !userns::are_allowed() {
        return;
    }
    let pod = Pod::open().await;
    let namespace = namespace_of(&pod).await;
    let mut ssh = pod.ssh().arg("sleep 1000 & echo started; wait").spawn().expect("ssh");
    let mut lines = BufReader::new(ssh.stdout.take().expect("a pipe")).lines();
    assert_eq!(lines.next_line().await.expect("a line").as_deref(), Some("started"));
    assert_eq!(processes_in(&namespace).len(), 3, "process 1, a shell, a sleep");
    ssh.kill().await.expect("killed");
    eventually("they end", || processes_in(&namespace).len() == 1).await;
}

#[tokio::test]
async fn stop_leaves_nothing_behind() {
    let pod = Pod::open().await;
    let mut tunnel = pod.tunnel().await;
    let mut socket = tunnel.socket("watcher").await;
    assert_eq!(socket.next().await["type"], "status");
    tunnel.submit(sampler_workflow(1, 100, 1000), "watcher").await;
    let mut proxied = pod.container.connect(8188).await.expect("it listens");
    let mut namespace = None;
    if userns::are_allowed() {
        namespace = Some(namespace_of(&pod).await);
        let output = pod.run("nohup setsid sleep 1000 >/dev/null 2>&1 & echo started").await;
        assert_eq!(text(&output.stdout), "started\n");
    }
    let inside = || namespace.as_deref().map_or(0, |namespace| processes_in(namespace).len());
    // Process 1, the tunnel's cat, and the sleep that outlived its command.
    eventually("all run", || namespace.is_none() || inside() == 3).await;
    let disk = pod.disk();

    pod.container.stop().await;
    assert_eq!(inside(), 0);
    assert!(!disk.exists());
    let status = tokio::time::timeout(PATIENCE, tunnel.child.wait()).await.expect("ssh ends").expect("its status");
    assert_eq!(status.code(), Some(255));
    let mut rest = Vec::new();
    let ended = tokio::io::AsyncReadExt::read_to_end(&mut proxied, &mut rest);
    tokio::time::timeout(PATIENCE, ended).await.expect("the stream ends").expect("read");
    assert!(pod.container.connect(8188).await.is_none());
    let refused = TcpStream::connect((Ipv4Addr::LOCALHOST, pod.container.ssh_port())).await;
    assert_eq!(refused.expect_err("refused").kind(), std::io::ErrorKind::ConnectionRefused);
    // Once more does no harm.
    pod.container.stop().await;
}

#[tokio::test]
async fn a_dropped_container_ends_its_commands_too() {
    if !userns::are_allowed() {
        return;
    }
    let pod = Pod::open().await;
    let mut tunnel = pod.tunnel().await;
    let namespace = namespace_of(&pod).await;
    assert_eq!(processes_in(&namespace).len(), 2);
    let Pod { container, home } = pod;
    drop(container);
    tokio::time::timeout(PATIENCE, tunnel.child.wait()).await.expect("ssh ends").expect("its status");
    eventually("the command ends", || processes_in(&namespace).is_empty()).await;
    drop(home);
}

#[tokio::test]
async fn a_killed_sandbox_takes_its_pods_processes_along() {
    if !userns::are_allowed() {
        return;
    }
    let mut world = Process::start(&[PROGRAM, "sandbox", "--manual-clock"]).await;
    let ssh = world.pod().await;
    let command =
        "setsid sh -c 'trap \"\" HUP TERM; while :; do sleep 1; done' >/dev/null 2>&1 & readlink /proc/self/ns/pid";
    let output = finish(ssh.command().arg(command).stdin(Stdio::null())).await;
    let namespace = text(&output.stdout).trim().to_owned();
    assert!(processes_in(&namespace).len() >= 2, "{}", text(&output.stderr));
    world.child.kill().await.expect("killed");
    eventually("all end", || processes_in(&namespace).is_empty()).await;
}

#[tokio::test]
async fn without_namespaces_only_a_tunnels_session_works() {
    let pod = Pod::open_with(|spec| ContainerSpec { namespaces: false, ..spec }).await;
    pod.container.open_comfy().await.expect("ComfyUI");
    only_a_tunnels_session_works(&pod, "user namespaces are switched off").await;
    let stopping = pod.tunnel().await;
    pod.container.stop().await;
    let mut child = stopping.child;
    let status = tokio::time::timeout(PATIENCE, child.wait()).await.expect("ssh ends").expect("its status");
    assert_eq!(status.code(), Some(255));
}

/// Within namespaces of its own a process can be forbidden to make more of them, as a kernel's settings may.
const FORBIDDEN: &str = r#"set -e; echo 0 >/proc/sys/user/max_user_namespaces; exec "$0" "$@""#;

#[tokio::test]
async fn a_kernel_that_refuses_is_told_and_the_demo_still_passes() {
    if !userns::are_allowed() {
        return;
    }
    let mut world =
        Process::start(&["unshare", "-Ur", "sh", "-c", FORBIDDEN, PROGRAM, "sandbox", "--manual-clock"]).await;
    let ssh = world.pod().await;
    let output = finish(ssh.command().arg("true").stdin(Stdio::null())).await;
    assert_eq!(output.status.code(), Some(126));
    assert!(text(&output.stderr).contains("can't isolate commands here: unshare"), "{}", text(&output.stderr));
    assert_eq!(finish(ssh.command().arg(LOGIN).stdin(Stdio::null())).await.stdout, b"in\n");
    world.child.kill().await.expect("killed");

    let home = TempDir::new().expect("a temporary folder");
    let mut demo = Command::new("unshare");
    demo.args(["-Ur", "sh", "-c", FORBIDDEN, PROGRAM, "demo"]).env_clear().current_dir(&home).kill_on_drop(true);
    demo.env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", home.path()).env("TMPDIR", home.path());
    let output = finish(demo.stdin(Stdio::null())).await;
    assert!(output.status.success(), "{}", text(&output.stderr));
}

async fn only_a_tunnels_session_works(pod: &Pod, reason: &str) {
    for command in [
        "true",
        "echo READY; exec cat",
        "echo $(id); exec cat >/dev/null",
        "echo a; id; exec cat >/dev/null",
        "echo a'; exec cat >/dev/null",
    ] {
        let output = pod.run(command).await;
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(126), String::new()), "{command}");
        let stderr = text(&output.stderr);
        let said: Vec<&str> = stderr.lines().filter(|line| line.starts_with("sandbox: ")).collect();
        assert!(
            said.len() == 1 && said[0].contains("can't isolate commands here") && said[0].contains(reason),
            "{stderr}"
        );
    }
    let output = pod.run("echo AUTOPOD_READY; exec cat >/dev/null").await;
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "AUTOPOD_READY\n".to_owned()));
    let tunnel = pod.tunnel().await;
    tunnel.json("/system_stats").await;
}

/// The sandbox as a process of its own.
struct Process {
    child: Child,
    folder: TempDir,
    url: String,
    key: String,
}

/// How to get into one of its pods.
struct Ssh {
    folder: PathBuf,
    port: u16,
}

impl Process {
    /// `--folder` is added to the command.
    async fn start(command: &[&str]) -> Process {
        let folder = TempDir::new().expect("a temporary folder");
        let mut sandbox = Command::new(command[0]);
        sandbox.args(&command[1..]);
        // After `sh -c script name` it is an argument of the script's own.
        if command[0] == PROGRAM {
            sandbox.arg("--folder").arg(folder.path().join("sandbox"));
        }
        sandbox.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        sandbox.env("HOME", folder.path()).env("AUTOPOD_HOME", folder.path().join("home"));
        let child = sandbox.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true).spawn().expect("a sandbox");
        let places = [folder.path().join("sandbox"), folder.path().join("home/sandbox")];
        let about = program::until("a sandbox", async || {
            let text = places.iter().find_map(|place| std::fs::read(place.join("sandbox.json")).ok())?;
            serde_json::from_slice::<Value>(&text).ok()
        });
        let about = about.await;
        let key = std::fs::read_to_string(about["key_file"].as_str().expect("a path")).expect("a key");
        let url = about["url"].as_str().expect("a URL").to_owned();
        Process { child, folder, url, key: key.trim().to_owned() }
    }

    async fn ask(&self, method: reqwest::Method, path: &str, body: Option<Value>) -> Value {
        let mut request = http_client().request(method, format!("{}{path}", self.url)).bearer_auth(&self.key);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await.expect("an answer").error_for_status().expect("done");
        answer.json().await.expect("JSON")
    }

    /// A pod whose sshd answers.
    async fn pod(&mut self) -> Ssh {
        let folder = self.folder.path().to_owned();
        make_key(&folder.join("id_ed25519"));
        let key = std::fs::read_to_string(folder.join("id_ed25519.pub")).expect("the public key");
        let body = json!({
            "name": "pod", "image": "i", "gpu": { "id": "NVIDIA RTX A4000", "count": 1 }, "ports": ["22/tcp"],
            "env": { "PUBLIC_KEY": key },
        });
        let pod = self.ask(reqwest::Method::POST, "/v2/pods", Some(body)).await;
        self.ask(reqwest::Method::POST, "/_sandbox/clock", Some(json!({ "advance_seconds": 10 }))).await;
        let path = format!("/v2/pods/{}", pod["id"].as_str().expect("an id"));
        let pod = self.ask(reqwest::Method::GET, &path, None).await;
        let port = pod["ssh"]["direct"]["port"].as_u64().and_then(|port| port.try_into().ok()).expect("a port");
        Ssh { folder, port }
    }
}

impl Ssh {
    fn command(&self) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-T", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "LogLevel=ERROR"]);
        ssh.args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-i", "id_ed25519"]);
        ssh.args(["-p", &self.port.to_string(), "root@127.0.0.1"]).current_dir(&self.folder).kill_on_drop(true);
        ssh
    }
}
