//! What a program is told that asks for what can't be: the place, the way out, the exit code; and nothing is left half
//! done.

use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use crate::keeper_support::http;
use crate::story_support::{Said, Story, painting, said};

struct Case {
    tool: &'static str,
    arguments: Value,
    code: i32,
    /// The field first, then the way out.
    words: &'static [&'static str],
}

fn case(tool: &'static str, arguments: Value, code: i32, words: &'static [&'static str]) -> Case {
    Case { tool, arguments, code, words }
}

fn assert_refused(said: &Said, code: i32, words: &[&str], what: &str) {
    assert_eq!((said.code, said.stdout.as_str()), (code, ""), "{what}: {said:?}");
    for word in words {
        assert!(said.stderr.contains(word), "{what} doesn't say `{word}`: {}", said.stderr);
    }
    assert!(!said.stderr.contains("panicked") && said.stderr.lines().count() <= 6, "{what}: {}", said.stderr);
}

#[tokio::test]
async fn every_refusal_names_the_field_and_the_way_out() {
    let story = Story::begin();
    let folder = story.home.folder();
    let path = |name: &str| folder.join(name).to_str().expect("plain letters").to_owned();
    std::fs::write(path("no.json"), "{\"1\": {\"class_type\":").expect("a file");
    std::fs::write(path("list.json"), "[1, 2]").expect("a file");
    let named = |name: &str| json!({"name": "three", "volume": name});

    story.call("list_volumes", json!({})).await.json();
    let url = story.sandbox_file()["url"].as_str().expect("its address").to_owned();
    let second = json!({"name": "comfy-models", "size": 20, "dataCenter": "US-KS-2"});
    let made = http().post(format!("{url}/v2/network-volumes")).bearer_auth(story.key()).json(&second).send().await;
    assert_eq!(made.expect("an answer").status(), 201);

    let cases = [
        case("no_such_tool", json!({}), 2, &["`no_such_tool`", "list_pods", "comfy_run"]),
        case("list_tunnels", json!({"all": true}), 2, &["`all`", "no arguments"]),
        case("create_pod_with_volume", json!({"volum": "x"}), 2, &["`volum`", "volume, mount_path"]),
        case("create_pod_with_volume", json!({"name": "Not/A Name"}), 2, &["`name`", "lower-case letters"]),
        case("create_pod_with_volume", json!({"gpu_count": 17}), 2, &["`gpu_count`", "at most 16"]),
        case("create_pod_with_volume", json!({"gpus": "L4"}), 2, &["`gpus`", "an array"]),
        case("create_pod_with_volume", json!({"lifetime_minutes": 0}), 2, &["`lifetime_minutes`", "at least 1"]),
        case("create_pod_with_volume", json!({"mount_path": "here"}), 2, &["`mount_path`", "absolute path"]),
        case("create_pod_with_volume", json!({"mount_path": "/etc/x"}), 2, &["`mount_path`", "system's folders"]),
        case("create_pod_with_volume", json!({"mount_path": "/a\nb"}), 2, &["`mount_path`", "absolute path"]),
        case("create_pod_with_volume", json!({"min_cuda": "new"}), 2, &["`min_cuda`", "12.4"]),
        case("create_pod_with_volume", json!({"gpus": ["RTX 9"]}), 2, &["`gpus`", "`RTX 9`", "list_gpus", "RTX 4090"]),
        case("create_pod_with_volume", named("nope"), 3, &["`volume`", "`nope`", "c0mfym0d3l", "datasets"]),
        case("create_pod_with_volume", named("comfy-models"), 2, &["`volume`", "ambiguous", "c0mfym0d3l", "US-KS-2"]),
        case("create_pod_with_volume", json!({"max_price_per_hour": 0.01}), 4, &["$0.01/h", "max_price_per_hour"]),
        case("create_pod_with_volume", json!({"min_vram_gb": 90}), 4, &["90 GB", "list_gpus"]),
        case(
            "create_pod_with_volume",
            json!({"volume": "c0mfym0d3l", "cloud": "community"}),
            2,
            &["`cloud`", "secure cloud only"],
        ),
        case("get_pod", json!({"pod": "nope"}), 3, &["`pod`", "`nope`", "create_pod_with_volume"]),
        case("terminate_pod", json!({"pod": "nope"}), 3, &["`pod`", "`nope`", "create_pod_with_volume"]),
        case("terminate_pod", json!({}), 2, &["`pod`", "required"]),
        case("start_tunnel", json!({"pod": "nope"}), 3, &["`pod`", "`nope`", "create_pod_with_volume"]),
        case("start_tunnel", json!({"local_port": 65536}), 2, &["`local_port`", "at most 65535"]),
        case("stop_tunnel", json!({}), 2, &["`pod`", "list_tunnels"]),
        case("stop_tunnel", json!({"pod": "nope"}), 3, &["`pod`", "`nope`"]),
        case("comfy_status", json!({"pod": "nope"}), 3, &["`pod`", "`nope`"]),
        case("comfy_status", json!({"pod": "a", "url": "http://127.0.0.1:1"}), 2, &["`url`", "not both"]),
        case("comfy_queue", json!({"url": "file:///etc"}), 2, &["`url`"]),
        case("comfy_run", json!({"workflow": painting(1), "pod": "nope"}), 3, &["`pod`", "`nope`"]),
        case("comfy_run", json!({}), 2, &["`workflow`", "workflow_path"]),
        case("comfy_run", json!({"workflow": "{}"}), 2, &["`workflow`", "an object"]),
        case("comfy_run", json!({"workflow": {"nodes": [], "links": []}}), 2, &["`workflow`", "Export (API)"]),
        case("comfy_run", json!({"workflow_path": path("no.json")}), 2, &["`workflow_path`", "no.json", "not JSON"]),
        case("comfy_run", json!({"workflow_path": path("list.json")}), 2, &["`workflow_path`"]),
        case("comfy_run", json!({"workflow_path": path("none.json")}), 2, &["`workflow_path`", "none.json"]),
        case(
            "comfy_run",
            json!({"workflow": painting(1), "inputs": [{"path": path("none.png")}]}),
            2,
            &["`inputs[0].path`", "none.png"],
        ),
        case("comfy_run", json!({"workflow": painting(1), "wait_seconds": 46}), 2, &["`wait_seconds`", "at most 45"]),
        case("comfy_job", json!({"prompt_id": "nope"}), 2, &["`prompt_id`", "comfy_run"]),
        case("comfy_job", json!({"prompt_id": "0b5e7bd4-9d0c-4c4e-8f6e-0d6a3c1f2a10"}), 3, &["0b5e7bd4", "comfy_run"]),
    ];
    for Case { tool, arguments, code, words } in cases {
        let said = story.call(tool, arguments.clone()).await;
        assert_refused(&said, code, words, &format!("{tool} {arguments}"));
    }
    assert!(!story.world().join("pods.json").exists(), "no pod was ever wished for");
    assert!(!story.world().join("tunnels.json").exists(), "no tunnel was ever wished for");
    assert!(!story.world().join("jobs").exists(), "no run was begun");
    story.assert_nothing_is_up().await;
    story.end().await;
}

#[tokio::test]
async fn a_port_in_use_is_told_and_another_one_works() {
    let story = Story::begin();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("its address").port();
    story.call("create_pod_with_volume", json!({})).await.json();
    let said = story.call("start_tunnel", json!({"local_port": port})).await;
    assert_eq!((said.code, said.stdout.as_str()), (2, ""), "{said:?}");
    said.assert_words(&[&format!("port {port}"), "in use by another program", "`local_port`"]);
    let opened = story.call("start_tunnel", json!({"local_port": 0})).await.json();
    assert_eq!(opened["done"], true, "{opened}");
    assert_ne!(opened["local_port"], port, "{opened}");
    story.call("terminate_pod", json!({"pod": "comfy"})).await.json();
    story.assert_nothing_is_up().await;
    story.end().await;
}

#[tokio::test]
async fn a_machine_without_ssh_is_told_what_to_install() {
    let story = Story::begin();
    let programs = story.home.folder().join("programs");
    std::fs::create_dir(&programs).expect("a folder");
    let without_ssh = |arguments: &[&str]| {
        let mut command = story.command(arguments);
        command.env("PATH", &programs);
        said(command)
    };
    // Without `ssh-keygen` no pod is made that nobody could reach.
    let refused = without_ssh(&["call", "create_pod_with_volume"]).await;
    assert_eq!(refused.code, 1, "{refused:?}");
    refused.assert_words(&["no pod was created", "ssh-keygen", "PATH", "openssh-client", "billed: no"]);
    assert_eq!(without_ssh(&["call", "list_pods"]).await.json()["pods"], json!([]));

    let path = std::env::var_os("PATH").expect("a PATH");
    let keygen = std::env::split_paths(&path).map(|folder| folder.join("ssh-keygen")).find(|path| path.exists());
    std::os::unix::fs::symlink(keygen.expect("ssh-keygen is here"), programs.join("ssh-keygen")).expect("a link");
    without_ssh(&["call", "create_pod_with_volume"]).await.json();
    let refused = without_ssh(&["call", "start_tunnel"]).await;
    assert_refused(&refused, 1, &["`ssh`", "PATH", "openssh-client", "billed: yes"], "start_tunnel");
    without_ssh(&["call", "terminate_pod", "{\"pod\": \"comfy\"}"]).await.json();
    story.assert_nothing_is_up().await;
    story.end().await;
}

#[tokio::test]
async fn a_missing_or_open_key_is_told_with_its_remedy() {
    let story = Story::begin();
    let plain = |arguments: &[&str]| said(story.home.command(arguments));
    for tool in ["list_gpus", "list_volumes", "create_pod_with_volume"] {
        let said = plain(&["call", tool]).await;
        assert_refused(&said, 1, &["RUNPOD_API_KEY", "config.json", "--sandbox"], tool);
    }
    let config = story.home.path().join("config.json");
    std::fs::write(&config, "{\"api_key\": \"rpa_SECRET\"}").expect("a file");
    std::fs::set_permissions(&config, PermissionsExt::from_mode(0o640)).expect("its mode");
    let said = plain(&["call", "list_gpus"]).await;
    assert_refused(&said, 1, &["config.json", "640", "chmod 600"], "an open config");
    assert!(!said.stderr.contains("rpa_SECRET"), "{said:?}");
    std::fs::write(&config, "{\"api_key\": ").expect("a file");
    assert_refused(&plain(&["call", "list_gpus"]).await, 1, &["config.json"], "a broken config");
    assert!(!story.home.path().join("pods.json").exists());
    assert!(story.processes().is_empty(), "no keeper is needed for that: {:?}", story.processes());
}

#[tokio::test]
async fn a_dead_world_is_one_plain_error_and_the_next_world_begins_clean() {
    let story = Story::begin();
    story.call("create_pod_with_volume", json!({"name": "old", "wait_seconds": 0})).await.json();
    let (url, key) = (story.sandbox_file()["url"].as_str().expect("its address").to_owned(), story.key());
    assert_eq!(story.run(&["sandbox", "--stop"]).await.code, 0);

    let mut knocking = story.home.command(&["call", "list_pods"]);
    knocking.env("RUNPOD_API_BASE_URL", &url).env("RUNPOD_API_KEY", &key);
    let refused = said(knocking).await;
    assert_refused(&refused, 5, &["list_pods", "try again"], "a dead address");
    assert!(!refused.stderr.contains(&key), "{refused:?}");
    let mut creating = story.home.command(&["call", "create_pod_with_volume"]);
    creating.env("RUNPOD_API_BASE_URL", &url).env("RUNPOD_API_KEY", &key);
    assert_refused(&said(creating).await, 5, &["create_pod_with_volume"], "a dead address");
    assert!(!story.home.path().join("pods.json").exists(), "nothing was wished for");

    let records = std::fs::read(story.world().join("pods.json")).expect("the records");
    let records: Value = serde_json::from_slice(&records).expect("they are JSON");
    assert_eq!(records["entries"]["old"]["known"]["ending_cause"], "world_ended", "{records}");
    story.assert_nothing_is_up().await;
    let gone = story.call("get_pod", json!({"pod": "old"})).await;
    assert_refused(&gone, 3, &["`old`", "gone"], "a pod of the last world");
    let anew = story.call("create_pod_with_volume", json!({"name": "old"})).await.json();
    assert_eq!((&anew["created"], &anew["done"]), (&json!(true), &json!(true)), "{anew}");
    story.call("terminate_pod", json!({"pod": "old"})).await.json();
    story.end().await;
}
