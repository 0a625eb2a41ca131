//! The records: never lost, never half written, never overwritten when a newer version wrote them; and the idle end of
//! the keeper, which must not lose a wish.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use autopod_mcp::app;
use autopod_mcp::background::KeeperClient;
use autopod_mcp::config::Limits;
use autopod_mcp::fleet::{Ensured, Fleet, HomeIdentity, Phase};
use autopod_mcp::keeper::{self, Ended, KeeperOptions};
use autopod_mcp::ssh::Ssh;
use autopod_mcp::state::{self, Lock};
use autopod_mcp::timing::Timing;
use jiff::SignedDuration;
use secrecy::SecretString;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::keeper_support::{House, answer, kill, until};

fn beside(house: &House, prefix: &str) -> Vec<String> {
    let files = std::fs::read_dir(&house.home).expect("the home").flatten();
    files.map(|file| file.file_name().to_string_lossy().into_owned()).filter(|name| name.starts_with(prefix)).collect()
}

/// The file breaks while a keeper lives: nothing is lost, and the pod keeps its deadline and its keeper.
#[tokio::test(flavor = "multi_thread")]
async fn broken_records_are_set_aside_and_made_anew_from_the_provider() {
    let house = House::hurried().await;
    let id = house.create("broken").await;
    let expires_at = house.fleet().get("broken").expect("records").expect("a record").expires_at();
    for round in ["while the keeper lives", "while none lives"] {
        if round == "while none lives" {
            house.end_processes();
        }
        std::fs::write(house.home.join("pods.json"), b"{\"schema\": 1, \"entries\": {\"broken\": ").expect("written");
        house.ok("list_pods", json!({})).await;
        let record = until(&format!("the pod in the records {round}"), async || {
            house.fleet().read().ok()?.into_values().find(|record| record.known.pod_id.as_ref() == Some(&id))
        })
        .await;
        // It went into the pod's environment before the provider told its own time of creation.
        let difference = record.expires_at().duration_since(expires_at).abs();
        assert!(difference < SignedDuration::from_mins(2), "{round}: {difference:?}");
        assert!(!beside(&house, "pods.json.corrupt-").is_empty(), "{round}");
    }
    assert_eq!(house.ok("terminate_pod", json!({ "pod": "broken" })).await["done"], true);
    assert_eq!(house.alive().await.len(), 0);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn records_of_a_newer_version_are_left_alone() {
    let house = House::new().await;
    let text = r#"{"schema": 2, "revision": 7, "entries": {"new": {"of": "the future"}}}"#;
    std::fs::create_dir_all(&house.home).expect("a home");
    std::fs::write(house.home.join("pods.json"), text).expect("written");
    for (tool, arguments) in [
        ("list_pods", json!({})),
        ("create_pod_with_volume", json!({ "name": "old" })),
        ("terminate_pod", json!({ "pod": "new" })),
    ] {
        let refused = house.call(tool, arguments).await;
        assert_eq!(refused.code, 1, "{tool}: {refused:?}");
        refused.assert_says("newer version");
    }
    assert_eq!(std::fs::read_to_string(house.home.join("pods.json")).expect("the file"), text);
    assert_eq!((beside(&house, "pods.json").len(), house.asked("createPod")), (1, 0));
    house.end().await;
}

/// No file may be written any more: `ulimit -f 0` for the caller and for the keeper that it starts.
fn without_disk(house: &House, tool: &str, arguments: &Value) -> tokio::process::Command {
    by_shell(house, tool, arguments, "trap '' XFSZ; ulimit -f 0; exec \"$@\"")
}

fn by_shell(house: &House, tool: &str, arguments: &Value, script: &str) -> tokio::process::Command {
    let mut command = tokio::process::Command::new("/bin/sh");
    let call = house.command(tool, arguments);
    command.args(["-c", script, "sh"]).arg(call.as_std().get_program());
    command.args(call.as_std().get_args()).env_clear();
    for (name, value) in call.as_std().get_envs() {
        command.env(name, value.unwrap_or_default());
    }
    command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped());
    command.stderr(std::process::Stdio::piped()).kill_on_drop(true);
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_keeps_a_pod_from_being_made_and_not_from_being_ended() {
    let house = House::hurried().await;
    let refused = answer(without_disk(&house, "create_pod_with_volume", &json!({ "name": "none" }))).await;
    assert_eq!(refused.code, 1, "{refused:?}");
    assert_eq!(house.asked("createPod"), 0);

    house.create("full").await;
    house.end_processes();
    let done = answer(without_disk(&house, "terminate_pod", &json!({ "pod": "full" }))).await;
    assert_eq!((done.code, &done.value["done"]), (0, &json!(true)), "{done:?}");
    assert!(done.value["warning"].as_str().is_some_and(|text| text.contains("could not be written")), "{done:?}");
    assert_eq!(house.alive().await.len(), 0);
    house.end().await;
}

/// The wish is on disk, then the disk fills up: the keeper doesn't POST what it can't journal.
#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_that_cannot_journal_does_not_post() {
    let house = House::hurried().await;
    // What a home has had since its first create.
    house.keeper().account().map(|account| HomeIdentity::bind(&house.home(), &Timing::quick(), &account, || Ok(false)));
    Ssh { folder: house.home.join("ssh"), environment: house.environment() }.public_key().await.expect("a key");
    house.fleet().ensure("wish", house.wish(SignedDuration::from_mins(5)), &Limits::default()).await.expect("a record");
    // This call writes nothing, but starts a keeper that can't write either.
    let listed = answer(without_disk(&house, "list_pods", &json!({}))).await;
    assert_eq!(listed.code, 0, "{listed:?}");
    // It asks for the account's keys before it journals.
    until("a keeper that tries", async || (house.asked("getSshKeys") >= 2).then_some(())).await;
    assert_eq!(house.asked("createPod"), 0);
    // With a keeper that can write it is carried out.
    house.end_processes();
    house.ok("create_pod_with_volume", json!({ "name": "other" })).await;
    until("the pod of the wish", async || house.fleet().get("wish").ok()??.known.pod_id).await;
    assert_eq!((house.asked("createPod"), house.alive().await.len()), (2, 2));
    house.end().await;
}

/// The answer to the POST can't be recorded any more: the keeper keeps it in memory, and ends the pod in time.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_cannot_be_recorded_still_ends_at_its_deadline() {
    let house = House::new().await;
    house.fault(json!({ "operation": "createPod", "kind": "delay_ms", "delay_ms": 1500 })).await;
    house
        .fleet()
        .ensure("memory", house.wish(SignedDuration::from_secs(6)), &Limits::default())
        .await
        .expect("a record");
    // A full disk is an error, where the limit that stands for it here would be a signal.
    let listed = answer(by_shell(&house, "list_pods", &json!({}), "trap '' XFSZ; exec \"$@\"")).await;
    assert_eq!(listed.code, 0, "{listed:?}");
    until("the POST", async || (house.asked("createPod") == 1).then_some(())).await;
    let worker = house.until_worker().await;
    limit_file_size(worker, "0");
    until("the pod", async || house.alive().await.pop()).await;
    house.until_none_alive("the deadline without a disk").await;
    let record = house.fleet().get("memory").expect("records").expect("a record");
    assert!(record.is_open() && record.known.pod_id.is_none(), "the disk took something: {record:?}");
    limit_file_size(worker, "unlimited");
    until("a closed record", async || house.fleet().get("memory").ok()?.filter(|record| !record.is_open())).await;
    assert_eq!((house.asked("createPod"), house.worker()), (1, Some(worker)));
    house.end().await;
}

/// As before, but somebody ends it by the tool, which finds no id in the record and asks the provider by the name.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_was_never_recorded_is_ended_by_its_name() {
    let house = House::new().await;
    house.fault(json!({ "operation": "createPod", "kind": "hang_after" })).await;
    house
        .fleet()
        .ensure("nameless", house.wish(SignedDuration::from_mins(5)), &Limits::default())
        .await
        .expect("a record");
    house.keeper().ensure_and_wake().await.expect("a keeper");
    until("the pod", async || house.alive().await.pop()).await;
    house.end_processes();
    assert_eq!(house.fleet().get("nameless").expect("records").expect("a record").known.pod_id, None);
    let done = answer(without_disk(&house, "terminate_pod", &json!({ "pod": "nameless" }))).await;
    assert_eq!((done.code, &done.value["done"]), (0, &json!(true)), "{done:?}");
    assert_eq!((house.alive().await.len(), house.asked("createPod")), (0, 1));
    house.end().await;
}

/// Of a process that lives, as a full disk would be felt by it.
fn limit_file_size(pid: u32, limit: &str) {
    let status = std::process::Command::new("prlimit")
        .args(["--pid", &pid.to_string(), &format!("--fsize={limit}:unlimited")])
        .status()
        .expect("prlimit");
    assert!(status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lies_in_the_home_is_closed_to_others() {
    let house = House::hurried().await;
    house.create("closed").await;
    house.tunnel("closed").await;
    let mut folders = vec![house.home.clone()];
    while let Some(folder) = folders.pop() {
        assert_eq!(mode(&folder), 0o700, "{}", folder.display());
        for entry in std::fs::read_dir(&folder).expect("a folder").flatten() {
            let path = entry.path();
            match entry.file_type().expect("a type").is_dir() {
                true => folders.push(path),
                false if path.extension().is_some_and(|extension| extension == "pub") => {}
                false => assert_eq!(mode(&path) & 0o077, 0, "{}", path.display()),
            }
        }
    }
    house.end().await;
}

fn mode(path: &std::path::Path) -> u32 {
    std::fs::symlink_metadata(path).expect("its metadata").permissions().mode() & 0o777
}

/// Processes that change the records at the same time, half of them killed in the act. Every one that was told "done"
/// finds its change in the file.
pub async fn changed_by_many_and_killed(rounds: usize) {
    let house = House::new().await;
    let mut acknowledged = 0;
    let mut killed = 0;
    for round in 0..rounds {
        let name = format!("r{round}");
        let calls: Vec<_> = (0..6)
            .map(|number| {
                let name = format!("{name}-{number}");
                let mut command = house.command("create_pod_with_volume", &json!({ "name": name, "wait_seconds": 0 }));
                let child = command.spawn().expect("the program");
                (name, number % 2 == 1, child)
            })
            .collect();
        let mut open = Vec::new();
        for (name, is_killed, mut child) in calls {
            if is_killed {
                // Somewhere between its start and its end, another moment each round.
                tokio::time::sleep(Duration::from_millis(u64::try_from(round * 7 % 40).expect("small"))).await;
                let _ = child.start_kill();
                killed += 1;
            }
            if child.wait().await.expect("its end").success() {
                open.push(name);
            }
        }
        let records = house.fleet().read().expect("readable records");
        assert!(beside(&house, "pods.json.corrupt-").is_empty());
        for name in &open {
            assert!(records.contains_key(name), "{name} was acknowledged and is not in the file");
        }
        acknowledged += open.len();
        // At most two pods may be open, so they are ended by their records for the next round.
        for record in records.values().filter(|record| record.is_open()) {
            house.fleet().want_gone(&record.intent).await.expect("a written wish");
        }
        house.keeper().ensure_and_wake().await.expect("a keeper");
        until("the end of this round's pods", async || {
            (!house.fleet().read().ok()?.values().any(|record| record.is_open())).then_some(())
        })
        .await;
        house.until_none_alive("this round's pods").await;
    }
    crate::keeper_support::tell(&format!(
        "records: {rounds} rounds, {killed} writers killed, {acknowledged} acknowledged, none lost"
    ));
    assert!(acknowledged > 0);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_acknowledged_record_is_lost() {
    changed_by_many_and_killed(4).await;
}

fn keeper_in_this_process(house: &House, timing: &Timing, stop: &CancellationToken) -> KeeperOptions {
    KeeperOptions {
        home: house.home(),
        timing: timing.clone(),
        origin: house.origin(),
        key: Some(SecretString::from(house.sandbox.key().to_owned())),
        connect: app::connect(Some(&house.home()), house.sandbox.url(), "autopod-keeper").expect("a connection"),
        on_key: Arc::new(|_| {}),
        ssh_environment: house.environment(),
        stop: stop.clone(),
    }
}

/// Wishes written at the very moment at which the keeper ends for idleness: each is carried out, with nobody but the
/// writer's own check of the lock to help it.
pub async fn wishes_at_an_idle_end(rounds: usize) {
    let house = House::hurried().await;
    let timing =
        Timing { keeper_turn: Duration::from_millis(5), keeper_idle: Duration::from_millis(20), ..Timing::quick() };
    let fleet = Fleet::new(&house.home(), &timing);
    let lock = house.home.join("locks/keeper");
    let (mut taken, mut left) = (0, 0);
    for round in 0..rounds {
        let stop = CancellationToken::new();
        let keeper = tokio::spawn(keeper::run(keeper_in_this_process(&house, &timing, &stop)));
        while !state::is_held(&lock) && !keeper.is_finished() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_millis(15 + u64::try_from(round % 12).expect("small"))).await;
        let name = format!("wish-{round}");
        // Refused before any POST, so that the world has no part in it.
        let mut wish = house.wish(SignedDuration::from_mins(5));
        wish.wanted.candidates.clear();
        let made = fleet.ensure(&name, wish, &Limits::default()).await.expect("a record");
        assert!(matches!(made, Ensured::New(_)), "{made:?}");
        // From here it is the keeper's: either it was alive under the lock over the records and goes on, or its own
        // lock is free by now, so that the writer sees that it has to start one.
        let held = state::is_held(&lock);
        if held {
            let ended = keeper.await.expect("a keeper").expect("an end");
            assert_eq!(ended, Ended::Idle);
            let record = fleet.get(&name).expect("records").expect("a record");
            assert_eq!(record.known.phase, Phase::Refused, "round {round}: a wish was lost");
            taken += 1;
        } else {
            assert_eq!(keeper.await.expect("a keeper").expect("an end"), Ended::Idle);
            let record = fleet.get(&name).expect("records").expect("a record");
            fleet.want_gone(&record.intent).await.expect("a written wish");
            fleet.know(&record.intent, |record| record.known.phase = Phase::Gone).await.expect("a closed record");
            left += 1;
        }
    }
    crate::keeper_support::tell(&format!(
        "idle end: {rounds} wishes, {taken} taken by the old keeper, {left} left to the next, none lost"
    ));
    assert_eq!(taken + left, rounds);
    house.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wish_at_the_moment_of_an_idle_end_is_not_lost() {
    wishes_at_an_idle_end(40).await;
}

/// A look at the lock must not pass for a keeper, or a new keeper would end at once and leave nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_starts_though_many_look_at_its_lock() {
    let house = House::new().await;
    let timing =
        Timing { keeper_turn: Duration::from_millis(5), keeper_idle: Duration::from_millis(10), ..Timing::quick() };
    let lock = house.home().lock("keeper");
    drop(Lock::try_take(&lock).expect("a lock").expect("a free lock"));
    let looking = CancellationToken::new();
    let lookers: Vec<_> = (0..3)
        .map(|_| {
            let (lock, looking) = (lock.clone(), looking.clone());
            std::thread::spawn(move || {
                while !looking.is_cancelled() {
                    state::is_held(&lock);
                }
            })
        })
        .collect();
    for round in 0..10 {
        let ended = keeper::run(keeper_in_this_process(&house, &timing, &CancellationToken::new())).await;
        assert_eq!(ended.expect("an end"), Ended::Idle, "round {round}");
    }
    looking.cancel();
    for looker in lookers {
        looker.join().expect("a looker");
    }
    house.end().await;
}

/// The keeper as a process ends by itself when nothing is wanted, and leaves no socket behind.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_keeper_leaves_nothing_behind() {
    let house = House::new().await;
    let timing = Timing { keeper_idle: Duration::from_millis(50), ..Timing::quick() };
    let ended = keeper::run(keeper_in_this_process(&house, &timing, &CancellationToken::new())).await;
    assert_eq!(ended.expect("an end"), Ended::Idle);
    assert!(!house.home.join("keeper.sock").exists());
    assert!(!state::is_held(&house.home.join("locks/keeper")));
    let client: KeeperClient = house.keeper();
    assert!(client.hello().await.is_none());
    // One that was killed is no hindrance either.
    client.ensure_and_wake().await.expect("a keeper");
    let worker = house.until_worker().await;
    kill(worker);
    client.ensure_and_wake().await.expect("another keeper");
    house.end().await;
}

/// A new owner would make strangers of the pods that carry the old one.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_owner_is_restored_from_a_pod() {
    let house = House::hurried().await;
    house.create("owned").await;
    let read = || HomeIdentity::read(&house.home()).expect("readable").expect("an identity");
    let before = read();
    std::fs::remove_file(house.home().home_file()).expect("removed");
    house.ok("list_pods", json!({})).await;
    house.create("next").await;
    assert_eq!(read(), before);
    house.end().await;
}
