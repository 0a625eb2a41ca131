//! `doctor`: it finds what was broken on purpose, says what to do, changes nothing, and ends without a network too.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use autopod_mcp::config::Limits;
use autopod_mcp::fleet::Phase;
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use tokio::process::Command;

use crate::faces_support::{TestHome, finish};
use crate::keeper_support::House;

/// The exit code, and what was found.
struct Report {
    code: i32,
    checks: Vec<Value>,
}

impl Report {
    async fn of(mut command: Command) -> Self {
        command.arg("--json");
        let (code, stdout, stderr) = finish(command).await;
        let value: Value = serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}{stderr}"));
        let checks = value["checks"].as_array().expect("checks").clone();
        assert_eq!(value["ok"], code == 0, "{value}");
        Self { code, checks }
    }

    /// There must be such a finding that speaks of all this.
    #[track_caller]
    fn assert_has(&self, check: &str, health: &str, words: &[&str]) {
        let fits = |finding: &&Value| {
            let said = format!("{} {}", finding["found"], finding["todo"]);
            finding["check"] == check && finding["health"] == health && words.iter().all(|word| said.contains(word))
        };
        assert!(self.checks.iter().any(|finding| fits(&finding)), "{check} {health} {words:?}: {:#?}", self.checks);
    }

    #[track_caller]
    fn assert_no(&self, check: &str) {
        assert!(self.checks.iter().all(|finding| finding["check"] != check), "{:#?}", self.checks);
    }
}

/// Every file below with its content, and every mode.
fn snapshot(folder: &Path) -> BTreeMap<String, (u32, Vec<u8>)> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        // What a process that was just killed had begun to write.
        if entry.file_name().to_string_lossy().starts_with(".writing-") {
            continue;
        }
        let metadata = entry.metadata().expect("its metadata");
        let content = if metadata.is_dir() {
            files.extend(snapshot(&entry.path()));
            Vec::new()
        } else {
            std::fs::read(entry.path()).unwrap_or_default()
        };
        files.insert(entry.path().display().to_string(), (metadata.permissions().mode(), content));
    }
    files
}

#[tokio::test]
async fn without_key_network_and_home_it_ends_with_what_to_do_and_makes_nothing() {
    let home = TestHome::new();
    let report = Report::of(home.command(&["doctor"])).await;
    assert_eq!(report.code, 1);
    report.assert_has("key", "fail", &["no RunPod API key", "config init"]);
    report.assert_has("ssh", "ok", &["OpenSSH"]);
    report.assert_has("home", "ok", &["not there yet"]);
    let mut unreachable = home.command(&["doctor"]);
    unreachable.env("RUNPOD_API_KEY", "rpa_0123456789").env("RUNPOD_API_BASE_URL", "http://127.0.0.1:1");
    let report = Report::of(unreachable).await;
    assert_eq!(report.code, 1);
    report.assert_has("key", "fail", &["RUNPOD_API_KEY", "127.0.0.1:1", "network"]);
    assert!(!home.path().exists(), "it made a home");
    let (code, lines, _) = home.run(&["doctor"]).await;
    assert_eq!(code, 1);
    for line in lines.lines() {
        assert!(["OK  ", "WARN", "FAIL"].iter().any(|health| line.starts_with(health)), "{line}");
    }
    assert!(lines.lines().filter(|line| line.starts_with("FAIL")).all(|line| line.contains(" -> ")), "{lines}");
}

/// A provider that takes the connection and never answers.
#[tokio::test]
async fn a_provider_that_hangs_does_not_hang_it() {
    let home = TestHome::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let mut hung = home.command(&["doctor"]);
    hung.env("RUNPOD_API_KEY", "rpa_0123456789");
    hung.env("RUNPOD_API_BASE_URL", format!("http://{}", listener.local_addr().expect("its address")));
    let report = Report::of(hung).await;
    report.assert_has("key", "fail", &["answer within"]);
    report.assert_has("keeper", "ok", &["none runs"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_pod_is_well_and_one_whose_keeper_died_is_not() {
    let house = House::hurried().await;
    house.create("kept").await;
    house.tunnel("kept").await;
    let report = Report::of(house.program(&["doctor"])).await;
    assert_eq!(report.code, 0, "{:#?}", report.checks);
    report.assert_has("key", "ok", &["pods in the account: 1"]);
    report.assert_has("keeper", "ok", &["has a key", "pods: 1, tunnels: 1"]);
    report.assert_has("records", "ok", &["1 pods", "1 tunnels"]);
    report.assert_has("key pair", "ok", &["id_ed25519"]);
    report.assert_no("tunnel");
    house.end_processes();
    let before = snapshot(&house.home);
    let report = Report::of(house.program(&["doctor"])).await;
    assert_eq!(report.code, 1);
    report.assert_has("keeper", "fail", &["nobody keeps deadlines", "pod list"]);
    report.assert_has("tunnel", "warn", &["kept:8188", "nobody holds it", "tunnel start kept"]);
    let after = snapshot(&house.home);
    let changed = |name: &&String| before.get(*name) != after.get(*name);
    let changed: BTreeSet<_> = before.keys().chain(after.keys()).filter(changed).collect();
    assert!(changed.is_empty(), "it changed {changed:?}");
    assert!(house.worker().is_none(), "it started a keeper");
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_key_is_a_failure_and_is_not_shown() {
    let house = House::new().await;
    let mut wrong = house.program(&["doctor"]);
    wrong.env("RUNPOD_API_KEY", "rpa_wrong_wrong_wrong");
    let report = Report::of(wrong).await;
    report.assert_has("key", "fail", &["refused", "RUNPOD_API_KEY"]);
    assert!(!format!("{:?}", report.checks).contains("rpa_wrong"));
    assert_eq!(report.code, 1);
    house.advance(3600.0).await;
    let report = Report::of(house.program(&["doctor"])).await;
    report.assert_has("clock", "warn", &["behind the provider"]);
    assert_eq!(report.code, 0, "{:#?}", report.checks);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn money_that_nobody_looks_after_is_named_with_the_call_that_ends_it() {
    let house = House::new().await;
    for (name, phase) in [("lost", Phase::Unknown), ("late", Phase::Placed)] {
        let record = house.wish(SignedDuration::from_mins(30));
        let intent = record.intent.clone();
        house.fleet().ensure(name, record, &Limits::default()).await.expect("a record");
        house
            .fleet()
            .know(&intent, move |record| {
                record.known.phase = phase;
                if phase == Phase::Placed {
                    record.known.pod_id = Some("p0d".to_owned());
                    record.known.expires_at = Some(Timestamp::now() - SignedDuration::from_mins(5));
                }
            })
            .await
            .expect("written");
    }
    let intent = house.fleet().get("lost").expect("records").expect("a record").intent;
    let report = Report::of(house.program(&["doctor"])).await;
    assert_eq!(report.code, 1);
    report.assert_has("intent", "fail", &["lost", &intent, "$0.1", "autopod-mcp pod kill lost"]);
    report.assert_has("deadline", "fail", &["late", "p0d", "autopod-mcp pod kill late"]);
    report.assert_has("keeper", "fail", &["pods: 2"]);
    house.end().await;
}

#[tokio::test]
async fn files_that_are_open_or_broken_are_found_and_left_alone() {
    let home = TestHome::new();
    let root = home.path();
    std::fs::create_dir_all(root.join("ssh")).expect("a home");
    let write = |name: &str, text: &str, mode: u32| {
        std::fs::write(root.join(name), text).expect("written");
        std::fs::set_permissions(root.join(name), std::fs::Permissions::from_mode(mode)).expect("its mode");
    };
    write("config.json", r#"{"api_key": "rpa_0123456789"}"#, 0o644);
    write("pods.json", r#"{"schema": 1, "entries": {"half"#, 0o600);
    write("tunnels.json", r#"{"schema": 9, "entries": {}}"#, 0o600);
    write("home.json", "{}", 0o600);
    write("pods.json.corrupt-1", "x", 0o600);
    write("tunnels.json.autopod-v1", "{}", 0o600);
    write("ssh/id_ed25519", "x", 0o644);
    write("ssh/id_ed25519.pub", "x", 0o644);
    std::fs::set_permissions(&root, std::fs::Permissions::from_mode(0o755)).expect("its mode");
    let before = snapshot(home.folder());
    let report = Report::of(home.command(&["doctor"])).await;
    assert_eq!(report.code, 1);
    report.assert_has("home", "warn", &["755", "chmod 700"]);
    report.assert_has("config", "fail", &["644", "chmod 600"]);
    report.assert_has("records", "fail", &["pods.json is no JSON of ours", "pod list"]);
    report.assert_has("records", "fail", &["tunnels.json", "newer version"]);
    report.assert_has("records", "fail", &["home.json", "disown"]);
    report.assert_has("set aside", "warn", &["pods.json.corrupt-1"]);
    report.assert_has("set aside", "warn", &["tunnels.json.autopod-v1", "predecessor"]);
    report.assert_has("key pair", "fail", &["open to others", "chmod 600"]);
    write("config.json", r#"{"limits": {"max_pods": "many"}}"#, 0o600);
    let report = Report::of(home.command(&["doctor"])).await;
    report.assert_has("config", "fail", &["limits.max_pods", "whole number"]);
    write("config.json", r#"{"limits": {"max_pod": 1}}"#, 0o600);
    let report = Report::of(home.command(&["doctor"])).await;
    report.assert_has("config", "warn", &["limits.max_pod"]);
    write("config.json", r#"{"api_key": "rpa_0123456789"}"#, 0o644);
    assert!(snapshot(home.folder()) == before, "it changed something");
}

#[tokio::test]
async fn a_missing_ssh_is_a_failure() {
    let home = TestHome::new();
    let mut bare = home.command(&["doctor"]);
    bare.env("PATH", home.folder());
    Report::of(bare).await.assert_has("ssh", "fail", &["no `ssh` was found", "install"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_default_volume_that_is_not_there_is_told() {
    let house = House::new().await;
    for (volume, wanted) in [("datasets", 0), ("gone", 1)] {
        finish(house.program(&["config", "set", "default_volume_id", volume])).await;
        let report = Report::of(house.program(&["doctor"])).await;
        let told = report.checks.iter().filter(|finding| finding["check"] == "default volume").count();
        assert_eq!(told, wanted, "{volume}: {:#?}", report.checks);
    }
    house.end().await;
}
