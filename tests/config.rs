//! The config file by the program itself: nothing is saved that was not tried, nothing lost, and the key is shown to
//! nobody.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use rustix::pty::OpenptFlags;
use rustix::termios::{LocalModes, tcgetattr};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::faces_support::{Server, TestHome, finish};
use crate::keeper_support::{House, signal, until};
use crate::support::program::PATIENCE;

fn file(house: &House) -> PathBuf {
    house.home.join("config.json")
}

fn write(house: &House, text: &str) {
    std::fs::create_dir_all(&house.home).expect("a home");
    std::fs::write(file(house), text).expect("written");
    std::fs::set_permissions(file(house), std::fs::Permissions::from_mode(0o600)).expect("closed");
}

fn read(house: &House) -> Value {
    serde_json::from_slice(&std::fs::read(file(house)).expect("a file")).expect("JSON")
}

/// The program, without a key in its environment.
fn keyless(house: &House, arguments: &[&str]) -> Command {
    let mut command = house.program(arguments);
    command.env_remove("RUNPOD_API_KEY");
    command
}

async fn with_stdin(mut command: Command, input: &str) -> (i32, String, String) {
    let mut child = command.stdin(Stdio::piped()).spawn().expect("it starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    let _ = stdin.write_all(input.as_bytes()).await;
    drop(stdin);
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.expect("it ends").expect("it ran");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (output.status.code().expect("a code"), text(output.stdout), text(output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn init_tries_the_key_before_it_saves_it() {
    let house = House::new().await;
    let before = r#"{"default_volume_mount": "/data", "theirs": [1], "api_key": "rpa_an_older_key_0000"}"#;
    write(&house, before);
    let init = || keyless(&house, &["config", "init", "--key-stdin"]);
    let unchanged = || assert_eq!(std::fs::read_to_string(file(&house)).expect("a file"), before);

    let (code, _, stderr) = with_stdin(init(), "rpa_wrong_wrong_wrong\n").await;
    assert!(code == 5 && stderr.contains("not saved") && !stderr.contains("rpa_wrong"), "{code}: {stderr}");
    unchanged();
    for (input, said) in [("", "no key"), ("two words\n", "one word")] {
        let (code, _, stderr) = with_stdin(init(), input).await;
        assert!(code == 2 && stderr.contains(said), "{input:?}: {code}: {stderr}");
    }
    unchanged();
    let mut nowhere = init();
    nowhere.env("RUNPOD_API_BASE_URL", "http://127.0.0.1:1");
    let (code, _, stderr) = with_stdin(nowhere, house.sandbox.key()).await;
    assert!(code == 5 && stderr.contains("not saved"), "{code}: {stderr}");
    unchanged();
    let (code, _, stderr) = finish(keyless(&house, &["config", "init"])).await;
    assert!(code == 2 && stderr.contains("RUNPOD_API_KEY") && stderr.contains("--key-stdin"), "{code}: {stderr}");
    unchanged();

    let (code, stdout, stderr) = with_stdin(init(), &format!("{}\n", house.sandbox.key())).await;
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("0 pods") && stdout.contains("network volume"), "{stdout}");
    assert!(!(stdout + &stderr).contains(house.sandbox.key()), "the key was shown");
    let saved = json!({
        "default_volume_mount": "/data",
        "theirs": [1],
        "api_key": house.sandbox.key(),
        "api_base_url": house.sandbox.url(),
    });
    assert_eq!(read(&house), saved);
    assert_eq!(std::fs::metadata(file(&house)).expect("a file").permissions().mode() & 0o777, 0o600);
    // It is what later calls go by.
    let mut list = keyless(&house, &["pod", "list"]);
    list.env_remove("RUNPOD_API_BASE_URL");
    let (code, _, stderr) = finish(list).await;
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(stderr.matches("`theirs`").count(), 1, "an unknown field is named once: {stderr}");
    house.end().await;
}

/// A terminal with the program on it.
struct OnTerminal {
    child: tokio::process::Child,
    terminal: File,
    /// The program's side, by which its modes are seen.
    theirs: OwnedFd,
    shown: Arc<Mutex<String>>,
}

impl OnTerminal {
    fn start(mut command: Command) -> Self {
        let ours = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        rustix::pty::grantpt(&ours).expect("granted");
        rustix::pty::unlockpt(&ours).expect("unlocked");
        let name = rustix::pty::ptsname(&ours, Vec::new()).expect("a name").into_string().expect("text");
        let theirs = File::options().read(true).write(true).open(name).expect("its other side");
        let side = || Stdio::from(theirs.try_clone().expect("a copy"));
        let child = command.stdin(side()).stdout(side()).stderr(side()).spawn().expect("it starts");
        let terminal = File::from(ours);
        let shown = Arc::new(Mutex::new(String::new()));
        let (mut reader, kept) = (terminal.try_clone().expect("a copy"), shown.clone());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                kept.lock().expect("not poisoned").push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        Self { child, terminal, theirs: theirs.into(), shown }
    }

    async fn until_shown(&self, text: &str) {
        let shown = || self.shown.lock().expect("not poisoned").clone();
        until(&format!("`{text}` in the terminal"), async || shown().contains(text).then_some(())).await;
    }

    fn type_line(&mut self, line: &str) {
        self.terminal.write_all(format!("{line}\n").as_bytes()).expect("it is typed");
    }

    fn shows_what_is_typed(&self) -> bool {
        tcgetattr(&self.theirs).expect("its modes").local_modes.contains(LocalModes::ECHO)
    }

    async fn code(&mut self) -> i32 {
        let status = tokio::time::timeout(PATIENCE, self.child.wait()).await.expect("it ends").expect("it ran");
        status.code().expect("a code")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_terminal_the_key_is_typed_unseen_and_a_volume_is_chosen() {
    let house = House::new().await;
    let (_, body) = house.raw(reqwest::Method::GET, "/v2/network-volumes", None).await;
    let volume = body["networkVolumes"][0]["id"].as_str().unwrap_or_else(|| panic!("no volume: {body}")).to_owned();
    let mut screen = OnTerminal::start(keyless(&house, &["config", "init"]));
    screen.until_shown("API key").await;
    assert!(!screen.shows_what_is_typed());
    screen.type_line(house.sandbox.key());
    screen.until_shown("Enter: none").await;
    assert!(screen.shows_what_is_typed(), "only the key is hidden");
    screen.type_line("99");
    screen.until_shown("none of them").await;
    screen.type_line("1");
    assert_eq!(screen.code().await, 0);
    screen.until_shown("Saved in").await;
    assert!(!screen.shown.lock().expect("not poisoned").contains(house.sandbox.key()), "the key was shown");
    let saved = read(&house);
    assert_eq!((&saved["api_key"], &saved["default_volume_id"]), (&json!(house.sandbox.key()), &json!(volume)));
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_at_the_key_saves_nothing_and_leaves_the_terminal_as_it_was() {
    let house = House::new().await;
    let mut screen = OnTerminal::start(keyless(&house, &["config", "set", "api_key"]));
    screen.until_shown("API key").await;
    assert!(!screen.shows_what_is_typed());
    signal(screen.child.id().expect("it lives"), rustix::process::Signal::INT);
    assert_eq!(screen.code().await, 130);
    assert!(screen.shows_what_is_typed());
    assert!(!file(&house).exists());
    house.end().await;
}

#[tokio::test]
async fn a_key_in_the_arguments_is_refused_and_not_repeated() {
    let home = TestHome::new();
    let (code, stdout, stderr) = home.run(&["config", "set", "api_key", "rpa_in_the_arguments"]).await;
    assert_eq!((code, stdout.as_str()), (2, ""));
    assert!(stderr.contains("nothing was saved") && stderr.contains("config set api_key < FILE"), "{stderr}");
    assert!(!stderr.contains("rpa_in"), "{stderr}");
    assert!(!home.path().join("config.json").exists());
}

#[tokio::test]
async fn show_tells_what_counts_and_where_it_comes_from_and_no_key() {
    let home = TestHome::new();
    std::fs::create_dir(home.path()).expect("a home");
    let text =
        r#"{"api_key": "rpa_0123456789_last", "default_volume_id": "vol1", "limits": {"max_pods": 3}, "old": 1}"#;
    autopod_mcp::state::write_file(&home.path().join("config.json"), text.as_bytes()).expect("written");
    let shown = async |key: Option<&str>| {
        let mut command = home.command(&["config", "show", "--json"]);
        command.envs(key.map(|key| ("RUNPOD_API_KEY", key)));
        let (code, stdout, stderr) = finish(command).await;
        assert_eq!(code, 0, "{stderr}");
        assert!(!(stdout.clone() + &stderr).contains("rpa_"), "{stdout}{stderr}");
        serde_json::from_str::<Value>(&stdout).expect("JSON")
    };
    let field = |shown: &Value, name: &str| {
        let fields = shown["fields"].as_array().expect("fields");
        let found = fields.iter().find(|field| field["field"] == name).expect("the field");
        (found["value"].clone(), found["source"].clone())
    };
    let now = shown(None).await;
    for (name, value, source) in [
        ("api_key", json!("set (…last)"), "file"),
        ("api_base_url", json!("https://api.runpod.io"), "default"),
        ("default_volume_id", json!("vol1"), "file"),
        ("default_volume_mount", json!(null), "default"),
        ("limits.max_pods", json!(3), "file"),
        ("limits.max_usd_per_day", json!(15.0), "default"),
    ] {
        assert_eq!(field(&now, name), (value, json!(source)), "{name}");
    }
    assert_eq!(now["unknown"], json!(["old"]));
    assert_eq!(field(&shown(Some("rpa_short")).await, "api_key"), (json!("set"), json!("environment")));
    let (_, table, _) = home.run(&["config", "show"]).await;
    assert!(table.contains("limits.max_pods") && table.contains("…last") && !table.contains("rpa_"), "{table}");
}

#[tokio::test]
async fn set_and_unset_hold_values_to_their_rules_and_spare_a_broken_file() {
    let home = TestHome::new();
    let path = home.path().join("config.json");
    let content = || std::fs::read_to_string(&path).expect("a file");
    let cases: [(&[&str], i32, &str); 9] = [
        (&["set", "limits.max_usd_per_day", "10"], 0, "is 10"),
        (&["set", "limits.max_usd_per_day", "-1"], 2, "0 or more"),
        (&["set", "limits.max_usd_per_day", "inf"], 2, "0 or more"),
        (&["set", "limits.default_lifetime_minutes", "2000"], 2, "limits.max_lifetime_minutes"),
        (&["set", "limits.max_pod", "1"], 2, "limits.max_pods"),
        (&["set", "default_volume_mount", "~/models"], 2, "begins with `/`"),
        (&["set", "default_volume_mount", "/models"], 0, "/models"),
        (&["set", "api_base_url", "http://example.com"], 2, "unencrypted"),
        (&["unset", "default_volume_mount"], 0, "no longer set"),
    ];
    for (arguments, wanted, said) in cases {
        let (code, stdout, stderr) = home.run(&[&["config"], arguments].concat()).await;
        assert!(code == wanted && (stdout.clone() + &stderr).contains(said), "{arguments:?}: {code} {stdout}{stderr}");
    }
    assert_eq!(serde_json::from_str::<Value>(&content()).expect("JSON"), json!({"limits": {"max_usd_per_day": 10}}));
    let broken = r#"{"api_key": "rpa_half"#;
    std::fs::write(&path, broken).expect("written");
    for arguments in [&["set", "limits.max_pods", "1"][..], &["unset", "limits.max_pods"], &["show"], &["init"]] {
        let (code, _, stderr) = home.run(&[&["config"], arguments].concat()).await;
        assert!(code == 1 && stderr.contains("config.json") && !stderr.contains("rpa_half"), "{arguments:?}: {stderr}");
    }
    assert_eq!(content(), broken);
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_at_the_same_time_lose_nothing() {
    let home = TestHome::new();
    let wanted = [
        ("limits.max_pods", "7"),
        ("limits.max_price_per_hour", "1.25"),
        ("limits.max_total_per_hour", "2.5"),
        ("limits.max_usd_per_day", "9"),
        ("limits.confirm_above_per_hour", "0.5"),
        ("limits.max_volumes_per_month", "20"),
        ("default_volume_id", "vol1"),
        ("default_volume_mount", "/data"),
    ];
    let runs = wanted.map(|(field, value)| finish(home.command(&["config", "set", field, value])));
    for (code, _, stderr) in futures_util::future::join_all(runs).await {
        assert_eq!(code, 0, "{stderr}");
    }
    let (_, shown, _) = home.run(&["config", "show", "--json"]).await;
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    let from_file = shown["fields"].as_array().expect("fields").iter().filter(|field| field["source"] == "file");
    assert_eq!(from_file.count(), wanted.len(), "{shown}");
}

#[tokio::test]
async fn a_full_disk_leaves_the_old_file() {
    let home = TestHome::new();
    assert_eq!(home.run(&["config", "set", "limits.max_pods", "1"]).await.0, 0);
    let path = home.path().join("config.json");
    let before = std::fs::read(&path).expect("a file");
    let full = "trap '' XFSZ; ulimit -f 0; exec \"$@\"";
    let mut command = Command::new("/bin/sh");
    command.args(["-c", full, "sh", crate::support::program::PROGRAM, "config", "set", "limits.max_pods", "5"]);
    command.env_clear().env("AUTOPOD_HOME", home.path()).stdin(Stdio::null());
    let (code, stdout, stderr) = finish({
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    })
    .await;
    assert_eq!((code, stdout.as_str()), (1, ""), "{stderr}");
    assert!(stderr.contains("config.json can't be written"), "{stderr}");
    assert_eq!(std::fs::read(&path).expect("a file"), before);
    let left: Vec<_> =
        std::fs::read_dir(home.path()).expect("the home").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left.len(), 2, "only the file and the locks: {left:?}");
}

#[tokio::test]
async fn a_sandbox_goes_by_its_own_file_and_not_by_the_real_one() {
    let home = TestHome::new();
    let sandbox = home.path().join("sandbox");
    std::fs::create_dir_all(&sandbox).expect("a home");
    std::fs::write(home.path().join("config.json"), "broken").expect("written");
    let config = r#"{"api_key": "rpa_0123456789", "limits": {"max_pods": 9}}"#;
    autopod_mcp::state::write_file(&sandbox.join("config.json"), config.as_bytes()).expect("written");
    let (code, shown, stderr) = home.run(&["config", "show", "--sandbox", "--json"]).await;
    assert_eq!(code, 0, "{stderr}");
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!(
        (&shown["fields"][0]["source"], &shown["fields"][4]["value"]),
        (&json!("sandbox"), &json!(9)),
        "{shown}"
    );
    // A bad limit counts before any sandbox is started.
    let (code, _, stderr) = home.run(&["config", "set", "limits.max_pods", "4", "--sandbox"]).await;
    assert_eq!(code, 0, "{stderr}");
    std::fs::write(sandbox.join("config.json"), r#"{"limits": {"max_pods": "many"}}"#).expect("written");
    let (code, _, stderr) = home.run(&["gpu", "list", "--sandbox"]).await;
    assert!(code == 1 && stderr.contains("sandbox/config.json") && stderr.contains("limits.max_pods"), "{stderr}");
    assert!(!sandbox.join("locks/sandbox").exists(), "a sandbox was started");
    for arguments in [&["config", "init", "--sandbox"][..], &["config", "set", "api_key", "--sandbox"]] {
        let (code, _, stderr) = home.run(arguments).await;
        assert!(code == 4 && stderr.contains("of its own"), "{arguments:?}: {code} {stderr}");
    }
}

/// The predecessor wrote its files under the names that ours have.
#[tokio::test(flavor = "multi_thread")]
async fn files_of_the_predecessor_are_kept_and_told_of() {
    let house = House::new().await;
    write(&house, r#"{"default_volume_id": "theirs", "default_volume_mount": "/data", "gpu_preferences": ["A4000"]}"#);
    let theirs = [r#"{"abc123": {"ports": [8188], "pid": 7}}"#, r#"[{"pod_id": "abc123"}]"#];
    for (round, suffix) in ["autopod-v1", "autopod-v1-2"].into_iter().enumerate() {
        for (name, text) in ["pods.json", "tunnels.json"].into_iter().zip(theirs) {
            std::fs::write(house.home.join(name), text.replace("abc123", &format!("pod{round}"))).expect("written");
        }
        for tool in ["list_pods", "list_tunnels"] {
            let (code, _, stderr) = finish(house.command(tool, &json!({}))).await;
            assert_eq!(code, 0, "{stderr}");
            assert!(stderr.contains("`gpu_preferences`"), "{stderr}");
            assert!(tool != "list_pods" || stderr.contains("predecessor") && stderr.contains(suffix), "{stderr}");
        }
        for (name, text) in ["pods.json", "tunnels.json"].into_iter().zip(theirs) {
            let kept = std::fs::read_to_string(house.home.join(format!("{name}.{suffix}"))).expect("it is kept");
            assert_eq!(kept, text.replace("abc123", &format!("pod{round}")));
        }
    }
    let kept = std::fs::read_to_string(house.home.join("pods.json.autopod-v1")).expect("the first is kept too");
    assert!(kept.contains("pod0"), "{kept}");
    let (_, shown, _) = finish(house.program(&["config", "show"])).await;
    assert!(shown.contains("theirs") && shown.contains("/data"), "{shown}");
    house.end().await;
}

/// A client starts its server before there is a key, and shouldn't have to be restarted for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_running_server_takes_up_a_key_and_refuses_a_bad_limit() {
    let house = House::new().await;
    let mut server = Server::start(keyless(&house, &["serve"]));
    let client =
        json!({"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}});
    server.ask(1, "initialize", client).await;
    server.send(json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await;
    let call = json!({"name": "list_volumes", "arguments": {}});
    let answer = server.ask(2, "tools/call", call.clone()).await;
    assert!(answer.to_string().contains("config init") && answer["result"]["isError"] == true, "{answer}");
    let init = keyless(&house, &["config", "init", "--key-stdin"]);
    let (code, _, stderr) = with_stdin(init, house.sandbox.key()).await;
    assert_eq!(code, 0, "{stderr}");
    let answer = server.ask(3, "tools/call", call.clone()).await;
    assert!(answer.to_string().contains("comfy-models") && answer["result"]["isError"] != true, "{answer}");
    write(&house, r#"{"limits": {"max_pods": "many"}}"#);
    let answer = server.ask(4, "tools/call", call).await;
    assert!(answer.to_string().contains("limits.max_pods") && answer["result"]["isError"] == true, "{answer}");
    drop(server.stdin.take());
    assert_eq!(server.ended().await, 0);
    house.end().await;
}
