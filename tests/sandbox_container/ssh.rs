use std::io::{Read, Write};

use super::*;

#[tokio::test]
async fn nothing_listens_before_sshd_is_open() {
    let pod = Pod::closed().await;
    let refused = TcpStream::connect((Ipv4Addr::LOCALHOST, pod.container.ssh_port())).await;
    assert_eq!(refused.expect_err("refused").kind(), std::io::ErrorKind::ConnectionRefused);

    let output = pod.run(LOGIN).await;
    assert_eq!(output.status.code(), Some(255));
    assert!(text(&output.stderr).contains("Connection refused"), "{}", text(&output.stderr));

    // The port stays the pod's own meanwhile.
    TcpListener::bind((Ipv4Addr::LOCALHOST, pod.container.ssh_port())).expect_err("taken");

    pod.container.open_ssh().await.expect("sshd");
    assert_eq!(pod.run(LOGIN).await.status.code(), Some(0));
}

#[tokio::test]
async fn only_the_authorized_key_of_root_gets_in() {
    let pod = Pod::open().await;
    make_key(&pod.home.path().join("ssh/stranger"));
    for (user, key) in [("root", "stranger"), ("admin", "id_ed25519")] {
        let output = finish(pod.ssh_as(user, key).arg(LOGIN).stdin(Stdio::null())).await;
        assert_eq!(output.status.code(), Some(255), "{user} with {key}");
        assert!(text(&output.stderr).contains("Permission denied (publickey)"), "{}", text(&output.stderr));
    }
    assert!(pod.events("ssh_login").is_empty());
    assert_eq!(pod.run(LOGIN).await.status.code(), Some(0));
    assert_eq!(pod.events("ssh_login").len(), 1);
}

#[tokio::test]
async fn each_start_has_its_own_host_key() {
    let pod = Pod::open().await;
    assert_eq!(pod.run(LOGIN).await.status.code(), Some(0));
    let first = std::fs::read_to_string(pod.home.path().join("ssh/known_hosts")).expect("known hosts");

    let keys = std::fs::read_to_string(pod.home.path().join("ssh/id_ed25519.pub")).expect("the key");
    pod.container.stop().await;
    let again = Pod { container: start(Pod::spec(&pod.home, keys)).await, home: pod.home };
    let output = again.run(LOGIN).await;
    assert_eq!(output.status.code(), Some(255));
    assert!(text(&output.stderr).contains("HOST IDENTIFICATION HAS CHANGED"), "{}", text(&output.stderr));

    std::fs::remove_file(again.home.path().join("ssh/known_hosts")).expect("removed");
    assert_eq!(again.run(LOGIN).await.status.code(), Some(0));
    let second = std::fs::read_to_string(again.home.path().join("ssh/known_hosts")).expect("known hosts");
    assert_ne!(first, second);
}

async fn start(spec: ContainerSpec) -> Arc<Container> {
    let container = Container::start(spec).await.expect("started");
    container.open_ssh().await.expect("sshd");
    Arc::new(container)
}

#[tokio::test]
async fn commands_run_in_a_real_shell_with_an_empty_environment() {
    if !userns::are_allowed() {
        return;
    }
    let pod = Pod::open().await;
    let output = pod.run("echo out; echo err >&2; exit 42").await;
    assert_eq!(output.status.code(), Some(42));
    assert_eq!(text(&output.stdout), "out\n");
    assert_eq!(text(&output.stderr).lines().last(), Some("err"));

    let output =
        pod.run("pwd; env | grep -v -e ^PWD= -e ^_= -e ^OLDPWD= -e ^SHLVL= | cut -d= -f1 | sort; echo $HOME").await;
    assert_eq!(text(&output.stdout), "/root\nHOME\nPATH\n/root\n");

    // Ended by a signal, which ssh reports as 255.
    assert_eq!(pod.run("kill -TERM $$").await.status.code(), Some(255));
    assert_eq!(pod.run("/no/such/command").await.status.code(), Some(127));
}

#[tokio::test]
async fn stdin_reaches_the_command_and_its_end_too() {
    if !userns::are_allowed() {
        return;
    }
    let pod = Pod::open().await;
    let mut ssh = pod.ssh().arg("wc -c; echo done").spawn().expect("ssh");
    let mut stdin = ssh.stdin.take().expect("a pipe");
    // More than the window, so that it has to be opened again on the way.
    let much = vec![b'x'; 20_000_000];
    tokio::io::AsyncWriteExt::write_all(&mut stdin, &much).await.expect("written");
    drop(stdin);
    let output = tokio::time::timeout(PATIENCE, ssh.wait_with_output()).await.expect("in time").expect("output");
    assert_eq!(text(&output.stdout).split_whitespace().collect::<Vec<_>>(), ["20000000", "done"]);
    assert_eq!(output.status.code(), Some(0));

    // A command that does not listen does not keep ssh from ending.
    let mut ssh = pod.ssh().arg("exit 3").spawn().expect("ssh");
    let _held_open = ssh.stdin.take();
    let status = tokio::time::timeout(PATIENCE, ssh.wait()).await.expect("in time").expect("a status");
    assert_eq!(status.code(), Some(3));

    // And what it says in great amounts arrives whole.
    let output = pod.run("head -c 20000000 /dev/zero").await;
    assert_eq!(output.stdout.len(), 20_000_000);
}

#[tokio::test]
async fn what_nobody_needs_is_refused() {
    let pod = Pod::open().await;
    let shell = finish(pod.ssh().stdin(Stdio::null())).await;
    assert_eq!(shell.status.code(), Some(1));
    assert!(text(&shell.stderr).contains("runs commands"), "{}", text(&shell.stderr));

    let mut remote = pod.ssh();
    remote.args(["-R", &format!("127.0.0.1:0:127.0.0.1:{}", free_port()), "true"]).stdin(Stdio::null());
    let remote = finish(&mut remote).await;
    assert_eq!(remote.status.code(), Some(255));
    assert!(text(&remote.stderr).contains("remote port forwarding failed"), "{}", text(&remote.stderr));

    let terminal = finish(pod.ssh().args(["-tt", "echo still runs"]).stdin(Stdio::null())).await;
    assert!(text(&terminal.stderr).contains("PTY allocation request failed"), "{}", text(&terminal.stderr));
}

#[tokio::test]
async fn forwards_lead_to_this_pods_ports_only() {
    let pod = Pod::open().await;
    let foreign = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener on the host");
    foreign.set_nonblocking(true).expect("set");
    let port = foreign.local_addr().expect("its address").port();

    for (host, port) in [("127.0.0.1", port), ("127.0.0.1", 9999), ("example.invalid", 8188), ("127.0.0.2", 8188)] {
        let output = finish(pod.ssh().args(["-W", &format!("{host}:{port}")]).stdin(Stdio::null())).await;
        assert_eq!(output.status.code(), Some(255), "{host}:{port}");
        // The reason that OpenSSH's own server gives where nothing listens.
        assert!(text(&output.stderr).contains("open failed: connect failed"), "{}", text(&output.stderr));
    }
    assert_eq!(foreign.accept().expect_err("nobody came").kind(), std::io::ErrorKind::WouldBlock);
    let forwards = pod.events("forward");
    assert_eq!(forwards.len(), 4);
    assert!(forwards.iter().all(|forward| forward["accepted"] == false));

    // Through -L the connection is made and then lost, which is all that a client ever sees of it.
    let tunnel = pod.tunnel_to(port).await;
    tunnel.http.get(&tunnel.url).send().await.expect_err("nothing is there");
}

#[tokio::test]
async fn comfyui_is_refused_until_it_listens() {
    let pod = Pod::closed().await;
    pod.container.open_ssh().await.expect("sshd");
    assert!(pod.container.connect(8188).await.is_none());
    let tunnel = pod.tunnel().await;
    tunnel.http.get(format!("{}/system_stats", tunnel.url)).send().await.expect_err("not yet");
    pod.container.open_comfy().await.expect("ComfyUI");
    tunnel.json("/system_stats").await;

    // The same through the proxy's way in, which the log tells apart.
    let mut stream = pod.container.connect(8188).await.expect("it listens");
    let request = b"GET /api/queue HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n";
    tokio::io::AsyncWriteExt::write_all(&mut stream, request).await.expect("written");
    let mut answer = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut answer).await.expect("read");
    assert!(text(&answer).starts_with("HTTP/1.1 200"), "{}", text(&answer));
    let ways: Vec<Value> = pod.events("comfy").iter().map(|event| json!([event["via"], event["path"]])).collect();
    assert_eq!(ways, [json!(["direct-tcpip", "/system_stats"]), json!(["proxy", "/api/queue"])]);
}

#[tokio::test]
async fn many_channels_at_once_share_one_connection() {
    let pod = Pod::open().await;
    let tunnel = Arc::new(pod.tunnel().await);
    let mut asking = tokio::task::JoinSet::new();
    for _ in 0..40 {
        let tunnel = tunnel.clone();
        asking.spawn(async move {
            // A client of its own, so that each has a connection, and so a channel, of its own.
            let response = http_client().get(format!("{}/object_info", tunnel.url)).send().await.expect("an answer");
            response.json::<Value>().await.expect("JSON")
        });
    }
    for info in asking.join_all().await {
        assert!(info["SandboxSampler"]["input"]["required"]["seed"][1]["max"] == u64::MAX);
    }
    assert_eq!(pod.events("forward").len(), 40);
    assert_eq!(pod.events("ssh_login").len(), 1);
}

#[tokio::test]
async fn a_real_server_elsewhere_can_stand_behind_the_pod() {
    let elsewhere = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
    let url = format!("http://{}", elsewhere.local_addr().expect("its address"));
    let serving = std::thread::spawn(move || {
        let (mut stream, _) = elsewhere.accept().expect("a connection");
        let mut request = [0; 4096];
        let length = stream.read(&mut request).expect("a request");
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}").expect("answered");
        text(&request[..length])
    });
    let closed = Pod::closed().await;
    let keys = std::fs::read_to_string(closed.home.path().join("ssh/id_ed25519.pub")).expect("the key");
    let spec = ContainerSpec { comfyui: Some(url), ..Pod::spec(&closed.home, keys) };
    let pod = Pod { container: start(spec).await, home: closed.home };
    pod.container.open_comfy().await.expect("ComfyUI");
    assert_eq!(pod.tunnel().await.json("/system_stats").await, json!({}));
    assert!(serving.join().expect("served").starts_with("GET /system_stats "));
    // Where nothing listens, the pod's port is refused. A socket that is bound and doesn't listen keeps the port from
    // everybody else meanwhile.
    let silent = tokio::net::TcpSocket::new_v4().expect("a socket");
    silent.bind((Ipv4Addr::LOCALHOST, 0).into()).expect("bound");
    let url = format!("http://{}", silent.local_addr().expect("its address"));
    let nowhere = ContainerSpec { comfyui: Some(url), ..Pod::spec(&pod.home, String::new()) };
    let nowhere = start(nowhere).await;
    nowhere.open_comfy().await.expect("ComfyUI");
    assert!(nowhere.connect(8188).await.is_none());
}

#[tokio::test]
async fn each_side_of_a_forward_can_end_first() {
    let elsewhere = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
    let url = format!("http://{}", elsewhere.local_addr().expect("its address"));
    let serving = std::thread::spawn(move || {
        let (mut stream, _) = elsewhere.accept().expect("a connection");
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).expect("all of it");
        stream.write_all(&heard).expect("all of it back");
        drop(stream);
        let (mut stream, _) = elsewhere.accept().expect("another connection");
        stream.write_all(b"not now").expect("said");
        stream.shutdown(std::net::Shutdown::Write).expect("no more to say");
        stream.read_to_end(&mut heard).expect("the rest");
    });
    let closed = Pod::closed().await;
    let keys = std::fs::read_to_string(closed.home.path().join("ssh/id_ed25519.pub")).expect("the key");
    let spec = ContainerSpec { comfyui: Some(url), ..Pod::spec(&closed.home, keys) };
    let pod = Pod { container: start(spec).await, home: closed.home };
    pod.container.open_comfy().await.expect("ComfyUI");
    let tunnel = pod.tunnel().await;
    let address = tunnel.url.trim_start_matches("http://").to_owned();
    let talk = async |send: Vec<u8>, finish: bool| {
        let (mut read, mut write) = TcpStream::connect(&address).await.expect("connected").into_split();
        let sending = async move {
            // The far side may be gone before it has all.
            let _ = tokio::io::AsyncWriteExt::write_all(&mut write, &send).await;
            if finish {
                tokio::io::AsyncWriteExt::shutdown(&mut write).await.expect("finished");
            }
            write
        };
        let mut answer = Vec::new();
        let reading = tokio::io::AsyncReadExt::read_to_end(&mut read, &mut answer);
        let both = async { tokio::join!(sending, reading) };
        let (_write, read) = tokio::time::timeout(PATIENCE, both).await.expect("in time");
        read.expect("read");
        answer
    };
    let question: Vec<u8> = (0..3_000_000u32).map(|number| number as u8).collect();
    assert_eq!(talk(question.clone(), true).await, question);
    assert_eq!(talk(b"hello".to_vec(), false).await, b"not now");
    // Not on this thread, which the pod lives on too.
    tokio::task::spawn_blocking(move || serving.join()).await.expect("joined").expect("served");
}

#[tokio::test]
async fn a_stalled_download_holds_up_nobody_and_arrives_whole() {
    const SIZE: u64 = 100_000_000;
    let pod = Pod::open().await;
    let file = std::fs::File::create(pod.disk().join("ComfyUI/output/large.bin")).expect("a file");
    file.set_len(SIZE).expect("its size");
    let tunnel = pod.tunnel().await;
    let mut socket = tunnel.socket("me").await;
    let mut response = tunnel.get("/view?filename=large.bin&type=output&subfolder=").await;
    // Not read yet: far more than all buffers on the way waits behind it.
    for _ in 0..5 {
        tunnel.json("/system_stats").await;
    }
    let id = tunnel.submit(sampler_workflow(1, 5, 1), "me").await;
    socket.until_end_of(&id).await;
    let mut length = 0;
    while let Some(chunk) = response.chunk().await.expect("more") {
        length += chunk.len() as u64;
    }
    assert_eq!(length, SIZE);
}

pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "{what}");
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
