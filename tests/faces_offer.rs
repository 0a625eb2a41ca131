//! What a server offers is chosen at launch: listed, described and callable is the choice, and nothing else.

use autopod_mcp::tools::{Effect, TOOLS, Toolset};
use jsonrpsee::core::client::{ClientT, Error};
use jsonrpsee::core::params::ObjectParams;
use jsonrpsee_http_client::HttpClient;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::faces_json_rpc::Rpc;
use crate::faces_support::{Server, TestHome};
use crate::story_support::Story;

async fn greeted(command: Command) -> (Server, String) {
    let mut server = Server::start(command);
    let who = json!({"name": "test", "version": "1"});
    let greeting = json!({"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": who});
    let answer = server.ask(1, "initialize", greeting).await;
    server.send(json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await;
    (server, answer["result"]["instructions"].as_str().expect("instructions").to_owned())
}

fn names(list: &Value) -> Vec<&str> {
    list.as_array().expect("a list").iter().map(|tool| tool["name"].as_str().expect("a name")).collect()
}

fn of(offered: impl Fn(Toolset, Effect) -> bool) -> Vec<&'static str> {
    TOOLS.iter().filter(|tool| offered(tool.toolset, tool.effect)).map(|tool| tool.name).collect()
}

#[tokio::test]
async fn mcp_lists_and_calls_what_was_chosen() {
    let home = TestHome::new();
    let cases: [(&[&str], Vec<&str>, &str); 3] = [
        (&["--read-only"], of(|_, effect| effect == Effect::Reads), "--read-only"),
        (&["--tools", "tunnels,volumes"], of(|set, _| matches!(set, Toolset::Tunnels | Toolset::Volumes)), "--tools"),
        (&["--exclude-tools=pods"], of(|set, _| set != Toolset::Pods), "--exclude-tools"),
    ];
    for (flags, offered, flag) in cases {
        let (mut server, instructions) = greeted(home.command(&[&["serve"], flags].concat())).await;
        let listed = server.ask(2, "tools/list", json!({})).await;
        assert_eq!(names(&listed["result"]["tools"]), offered, "{flags:?}");
        assert!(instructions.contains(&offered.join(", ")), "{instructions}");
        let call = json!({"name": "terminate_pod", "arguments": {"pod": "comfy"}});
        let refused = server.ask(3, "tools/call", call).await;
        let message = refused["error"]["message"].as_str().unwrap_or_default();
        for word in ["`terminate_pod` is not offered", flag, offered[0]] {
            assert!(message.contains(word), "`{word}` is missing: {refused}");
        }
        let called = server.ask(4, "tools/call", json!({"name": offered[0], "arguments": {}})).await;
        assert!(called.get("error").is_none(), "what is offered can be called: {called}");
    }
    let (mut server, instructions) = greeted(home.command(&["serve"])).await;
    assert_eq!(names(&server.ask(2, "tools/list", json!({})).await["result"]["tools"]).len(), TOOLS.len());
    assert!(!instructions.contains("choice of its tools"), "{instructions}");
}

#[tokio::test]
async fn json_rpc_describes_and_calls_what_was_chosen() {
    let home = TestHome::new();
    let rpc =
        Rpc::start_with(home.command(&["rpc", "--tools", "pods", "--exclude-tools", "get_pod", "--read-only"])).await;
    let url = format!("http://{}", rpc.address());
    let http = HttpClient::builder().set_headers(rpc.headers()).build(url).expect("a client");
    let described: Value = http.request("rpc.discover", ObjectParams::new()).await.expect("a description");
    let mut wanted = of(|set, effect| set == Toolset::Pods && effect == Effect::Reads);
    wanted.retain(|name| *name != "get_pod");
    assert_eq!(names(&described["methods"]), wanted);
    for (method, flag) in
        [("terminate_pod", "--read-only"), ("get_pod", "--exclude-tools"), ("list_volumes", "--tools")]
    {
        let Err(Error::Call(error)) = http.request::<Value, _>(method, ObjectParams::new()).await else {
            panic!("{method} was called")
        };
        assert_eq!(error.code(), -32002, "{error}");
        assert!(error.message().contains("not offered") && error.message().contains(flag), "{error}");
    }
    let pods: Value = http.request("list_pods", ObjectParams::new()).await.expect("an answer");
    assert_eq!(pods["pods"], json!([]), "{pods}");
    rpc.end().await;
}

#[tokio::test]
async fn what_can_not_be_offered_ends_the_launch() {
    let home = TestHome::new();
    for (arguments, words) in [
        (&["serve", "--tools", "pods,tunels"][..], ["`tunels`", "tunnels (start_tunnel"]),
        (&["rpc", "--exclude-tools", "kill"], ["`kill`", "list_pods"]),
        (&["serve", "--tools", "stop_tunnel", "--read-only"], ["no tool to offer", "comfy ("]),
    ] {
        let (code, stdout, stderr) = home.run(arguments).await;
        assert_eq!((code, stdout.as_str()), (2, ""), "{arguments:?}: {stderr}");
        assert!(words.iter().all(|word| stderr.contains(word)), "{arguments:?}: {stderr}");
    }
    assert!(!home.path().exists());
}

/// What reads may use a tunnel on its way to ComfyUI, but a server that reads only opens none.
#[tokio::test]
async fn a_server_that_only_reads_opens_no_tunnel() {
    let story = Story::begin();
    story.call("create_pod_with_volume", json!({})).await.json();
    let (mut server, _) = greeted(story.command(&["serve", "--read-only"])).await;
    let status = json!({"name": "comfy_status", "arguments": {"pod": "comfy"}});
    let told = server.ask(2, "tools/call", status.clone()).await["result"]["structuredContent"].clone();
    assert_eq!((&told["ready"], &told["still_billing"]), (&json!(false), &json!("yes")), "{told}");
    assert!(told["cause"].as_str().is_some_and(|cause| cause.contains("--read-only")), "{told}");
    let queue = server.ask(3, "tools/call", json!({"name": "comfy_queue", "arguments": {}})).await;
    assert_eq!(queue["result"]["isError"], true, "{queue}");
    let tunnels = story.call("list_tunnels", json!({})).await.json();
    assert_eq!(tunnels["tunnels"], json!([]), "{tunnels}");
    // The one that somebody else opened serves.
    story.call("start_tunnel", json!({"pod": "comfy"})).await.json();
    let told = server.ask(4, "tools/call", status).await["result"]["structuredContent"].clone();
    assert_eq!(told["ready"], true, "{told}");
    story.call("terminate_pod", json!({"pod": "comfy"})).await.json();
    story.end().await;
}
