//! The MCP server as clients start it: the real program behind pipes, with the official client and with raw lines.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use rmcp::ServiceExt;
use rmcp::model::CallToolRequestParams;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream, Lines};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::faces_support::{Server, TestHome, start};
use crate::support::program::{PATIENCE, PROGRAM};
use autopod_mcp::server::mcp::{self, Surroundings};
use autopod_mcp::server::{LazyServices, catalog};
use autopod_mcp::tools::context::Services;
use autopod_mcp::tools::{Offer, TOOLS, ToolError};

fn greeting() -> Value {
    json!({"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}})
}

/// A server that a client of the older era has greeted.
async fn greeted(home: &TestHome) -> Server {
    let mut server = Server::start(home.command(&["serve"]));
    let answer = server.ask(1, "initialize", greeting()).await;
    assert_eq!(answer["result"]["protocolVersion"], "2025-06-18", "{answer}");
    server.send(json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await;
    server
}

fn text(result: &Value) -> &str {
    result["content"][0]["text"].as_str().unwrap_or_default()
}

#[tokio::test]
async fn a_client_of_the_older_era_is_served() {
    let home = TestHome::new();
    let mut server = Server::start(home.command(&["serve"]));
    let greeted = server.ask(1, "initialize", greeting()).await;
    assert_eq!(greeted["result"]["serverInfo"]["name"], "autopod-mcp");
    assert!(greeted["result"]["instructions"].as_str().is_some_and(|text| text.contains("terminate_pod")));
    let listed = server.ask(2, "tools/list", json!({})).await;
    let entries: Vec<_> = TOOLS.iter().map(catalog::entry).collect();
    assert_eq!(listed["result"]["tools"], json!(entries), "every field of the catalog reaches the client");
    assert!(!home.path().exists(), "greeting and listing need no home");
    drop(server.stdin.take());
    assert_eq!(server.ended().await, 0);
}

#[tokio::test]
async fn a_client_of_the_newer_era_is_served_without_a_handshake() {
    let home = TestHome::new();
    let mut server = Server::start(home.command(&["serve"]));
    let meta = json!({
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
        "io.modelcontextprotocol/clientCapabilities": {},
    });
    let discovered = server.ask(1, "server/discover", json!({"_meta": meta})).await;
    let versions = discovered["result"]["supportedVersions"].as_array().cloned().unwrap_or_default();
    assert!(versions.contains(&json!("2026-07-28")) && versions.contains(&json!("2025-06-18")), "{discovered}");
    // A slip between the probe and the first real request does no harm either.
    server.send(json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await;
    let listed = server.ask(2, "tools/list", json!({"_meta": meta})).await;
    assert_eq!(listed["result"]["tools"].as_array().map(Vec::len), Some(TOOLS.len()), "{listed}");
    assert_eq!(listed["result"]["resultType"], "complete", "{listed}");
    let called = server.ask(3, "tools/call", json!({"_meta": meta, "name": "list_gpus", "arguments": {}})).await;
    assert!(text(&called["result"]).contains("RUNPOD_API_KEY"), "{called}");
}

#[tokio::test]
async fn the_official_client_lists_and_calls() {
    let home = TestHome::new();
    let (mut server, pipes) = start(home.command(&["serve"]));
    let client = tokio::time::timeout(PATIENCE, ().serve(pipes)).await.expect("in time").expect("a session");
    let tools = client.list_all_tools().await.expect("a list");
    assert_eq!(tools.len(), TOOLS.len());
    let result = client.call_tool(CallToolRequestParams::new("list_volumes")).await.expect("an answer");
    assert_eq!(result.is_error, Some(true));
    let error = client.call_tool(CallToolRequestParams::new("no_such_tool")).await.expect_err("there is no such tool");
    assert!(error.to_string().contains("no_such_tool") && error.to_string().contains("list_volumes"), "{error}");
    client.cancel().await.expect("the session ends");
    let ended = tokio::time::timeout(PATIENCE, server.wait()).await.expect("it ends with its stdin");
    assert!(ended.expect("its end can be waited for").success());
}

#[tokio::test]
async fn an_error_is_text_with_the_way_out_and_data_in_meta() {
    let home = TestHome::new();
    let mut server = greeted(&home).await;
    let answer = server.ask(2, "tools/call", json!({"name": "list_gpus", "arguments": {}})).await;
    let result = &answer["result"];
    assert_eq!(result["isError"], true);
    assert!(result.get("structuredContent").is_none(), "clients check it against the schema of success: {result}");
    assert!(text(result).contains("list_gpus") && text(result).contains("RUNPOD_API_KEY"), "{result}");
    assert_eq!(result["_meta"]["autopod-mcp/error"]["kind"], "setup", "{result}");
}

#[tokio::test]
async fn bad_arguments_name_the_tool_and_the_field() {
    let home = TestHome::new();
    let mut server = greeted(&home).await;
    let arguments_of_the_tool = [
        (json!({"min_vram": 24}), ["`min_vram`", "min_vram_gb"]),
        (json!({"min_vram_gb": "24"}), ["`min_vram_gb`", "expected an integer"]),
        (json!({"min_vram_gb": -1}), ["`min_vram_gb`", "at least 1"]),
        (json!({"gpu_count": 17}), ["`gpu_count`", "at most 16"]),
        (json!({"gpu_count": 1e99}), ["`gpu_count`", "expected an integer"]),
    ];
    for (arguments, words) in arguments_of_the_tool {
        let answer = server.ask(2, "tools/call", json!({"name": "list_gpus", "arguments": arguments})).await;
        assert_eq!(answer["result"]["isError"], true, "{answer}");
        assert_eq!(answer["result"]["_meta"]["autopod-mcp/error"]["kind"], "invalid_input", "{answer}");
        let text = text(&answer["result"]);
        assert!(text.contains("list_gpus") && words.iter().all(|word| text.contains(word)), "{words:?} in: {text}");
    }
    // What isn't even the shape of a call is an error of the protocol.
    let shapes = [
        (json!({"name": "list_gpus", "arguments": [1]}), ["list_gpus", "`arguments`"]),
        (json!({"name": "list_gpus", "arguments": "{}"}), ["list_gpus", "`arguments`"]),
        (json!({"name": 7}), ["tools/call", "`name`"]),
        (json!({"arguments": {}}), ["tools/call", "`name`"]),
        (json!({"name": "no_such_tool"}), ["no_such_tool", "list_gpus"]),
    ];
    for (params, words) in shapes {
        let answer = server.ask(3, "tools/call", params).await;
        assert_eq!(answer["error"]["code"], -32602, "{answer}");
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert!(words.iter().all(|word| message.contains(word)), "{words:?} in: {message}");
    }
    let answer = server.ask(4, "tools/run", json!({})).await;
    assert_eq!(answer["error"]["code"], -32601, "{answer}");
    let answer = server.ask(5, "tools/call", json!({"name": "list_gpus", "arguments": null})).await;
    assert!(text(&answer["result"]).contains("RUNPOD_API_KEY"), "null stands for no arguments: {answer}");
}

#[tokio::test]
async fn no_line_stops_the_server() {
    let home = TestHome::new();
    let mut server = greeted(&home).await;
    server.send_text("hello\n\n\u{0}\u{1}\n{\"jsonrpc\": \n").await;
    for (line, id) in [
        (r#"[{"jsonrpc":"2.0","id":1,"method":"ping"}]"#, json!(null)),
        (r#"{"jsonrpc":"2.0","id":"x","method":"ping","params":[1]}"#, json!("x")),
        (r#"{"jsonrpc":"1.0","id":3,"method":"ping"}"#, json!(3)),
        (r#"{"jsonrpc":"2.0","id":4}"#, json!(4)),
        ("17", json!(null)),
    ] {
        server.send_text(&format!("{line}\n")).await;
        let answer = server.receive().await;
        assert_eq!((&answer["id"], &answer["error"]["code"]), (&id, &json!(-32600)), "{line}: {answer}");
    }
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    server.send_text(&format!("{{\"jsonrpc\":\"2.0\",\"id\":5,\"params\":{{\"a\":{deep}}}}}\n")).await;
    assert_eq!(server.receive().await["id"], 5);
    // 50 MB in one line, its id behind them.
    server.send_text("{\"jsonrpc\":\"2.0\",\"method\":\"tools/call\",\"params\":{\"name\":\"").await;
    let megabyte = "x".repeat(1 << 20);
    for _ in 0..50 {
        server.send_text(&megabyte).await;
    }
    server.send_text("\"},\"id\":6}\n").await;
    let answer = server.receive().await;
    assert_eq!((&answer["id"], &answer["error"]["code"]), (&json!(6), &json!(-32600)), "{answer}");
    assert!(server.ask(7, "ping", json!({})).await.get("result").is_some());
}

#[tokio::test]
async fn slips_before_the_session_opens_do_not_end_it() {
    let home = TestHome::new();
    let mut server = Server::start(home.command(&["serve"]));
    server.send(json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await;
    server.send(json!({"jsonrpc": "2.0", "id": 1, "result": {}})).await;
    let early = server.ask(2, "tools/list", json!({})).await;
    assert!(early.get("error").is_some(), "{early}");
    let misspelt = server.ask(3, "initialize", json!({"protocolVersion": "2025-06-18"})).await;
    assert_eq!(misspelt["error"]["code"], -32602, "{misspelt}");
    assert!(misspelt["error"]["message"].as_str().is_some_and(|text| text.contains("capabilities")), "{misspelt}");
    server.send(json!({"jsonrpc": "2.0", "method": "notifications/whatever"})).await;
    assert_eq!(server.ask(4, "initialize", greeting()).await["result"]["serverInfo"]["name"], "autopod-mcp");
    assert!(server.ask(5, "tools/list", json!({})).await.get("result").is_some());
}

#[tokio::test]
async fn it_ends_with_its_input_and_answers_what_was_asked_before() {
    let home = TestHome::new();
    let mut server = Server::start(home.command(&["serve"]));
    let lines = [
        json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": greeting()}),
        json!({"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "list_volumes"}}),
    ];
    server.send_text(&lines.map(|line| format!("{line}\n")).concat()).await;
    drop(server.stdin.take());
    assert_eq!(server.receive().await["id"], 1);
    assert_eq!(server.receive().await["id"], 2);
    assert_eq!(server.ended().await, 0);
}

#[tokio::test]
async fn signals_end_it_while_its_input_stays_open() {
    let home = TestHome::new();
    for (signal, code) in [(Signal::TERM, 0), (Signal::INT, 130)] {
        let mut server = greeted(&home).await;
        let stdin = server.stdin.take();
        server.signal(signal);
        assert_eq!(server.ended().await, code, "{signal:?}");
        drop(stdin);
    }
    // Before anybody has said a word, too.
    let mut server = Server::start(home.command(&["serve"]));
    server.send_text("\n").await;
    assert_eq!(server.ask(1, "ping", json!({})).await["id"], 1);
    server.signal(Signal::TERM);
    assert_eq!(server.ended().await, 0);
}

#[tokio::test]
async fn nothing_but_the_protocol_is_on_stdout_however_much_is_logged() {
    let home = TestHome::new();
    let mut command = home.command(&["serve"]);
    command.env("AUTOPOD_LOG", "trace");
    let mut server = Server::start(command);
    server.ask(1, "initialize", greeting()).await;
    server.send_text("not JSON\n").await;
    server.ask(2, "tools/call", json!({"name": "list_gpus", "arguments": {}})).await;
    drop(server.stdin.take());
    assert_eq!(server.ended().await, 0, "every line up to the end was JSON");
}

#[tokio::test]
async fn a_home_that_can_not_be_used_is_told_by_the_call_and_tried_again() {
    let home = TestHome::new();
    std::fs::write(home.path(), "in the way").expect("a file in the home's place");
    let mut server = greeted(&home).await;
    let ask = json!({"name": "list_gpus", "arguments": {}});
    for id in [2, 3] {
        let answer = server.ask(id, "tools/call", ask.clone()).await;
        let told = text(&answer["result"]);
        assert!(told.contains(home.path().to_str().expect("a path of letters")), "{answer}");
    }
    std::fs::remove_file(home.path()).expect("the file goes away");
    let answer = server.ask(4, "tools/call", ask).await;
    assert!(text(&answer["result"]).contains("RUNPOD_API_KEY"), "{answer}");
}

/// A server in this process whose services are built by `build`: what to write to it, and what it writes.
fn in_process(
    build: impl Fn() -> BoxFuture<'static, Result<Arc<Services>, ToolError>> + Send + Sync + 'static,
) -> (DuplexStream, Lines<BufReader<DuplexStream>>, JoinHandle<()>) {
    let (input, served_input) = tokio::io::duplex(1 << 16);
    let (output, served_output) = tokio::io::duplex(1 << 16);
    let services = LazyServices::new(build);
    let serving = tokio::spawn(mcp::serve(
        served_input,
        served_output,
        services,
        Surroundings::RunPod,
        Offer::everything(),
        CancellationToken::new(),
    ));
    (input, BufReader::new(output).lines(), serving)
}

async fn converse(input: &mut DuplexStream, output: &mut Lines<BufReader<DuplexStream>>, messages: &[Value]) -> Value {
    let lines: String = messages.iter().map(|message| format!("{message}\n")).collect();
    input.write_all(lines.as_bytes()).await.expect("it reads");
    let line = tokio::time::timeout(PATIENCE, output.next_line()).await.expect("it answers").expect("its output");
    serde_json::from_str(&line.expect("an answer")).expect("JSON")
}

#[tokio::test]
async fn a_call_that_hangs_can_be_cancelled_and_holds_up_nobody() {
    let (mut input, mut output, serving) = in_process(|| Box::pin(std::future::pending()));
    let initialize = json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": greeting()});
    assert_eq!(converse(&mut input, &mut output, &[initialize]).await["id"], 1);
    let answer = converse(
        &mut input,
        &mut output,
        &[
            json!({"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": "list_gpus"}}),
            json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 2}}),
            json!({"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": {"name": "list_gpus"}}),
            json!({"jsonrpc": "2.0", "id": 4, "method": "ping"}),
        ],
    )
    .await;
    assert_eq!(answer["id"], 4, "{answer}");
    // Call 3 still hangs; the server ends with its input all the same.
    drop(input);
    tokio::time::timeout(PATIENCE, serving).await.expect("it ends").expect("without a panic");
}

#[tokio::test]
async fn a_defect_while_starting_is_an_answer() {
    let (mut input, mut output, _serving) = in_process(|| Box::pin(async { panic!("on purpose") }));
    let initialize = json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": greeting()});
    converse(&mut input, &mut output, &[initialize]).await;
    for id in [2, 3] {
        let call = json!({"jsonrpc": "2.0", "id": id, "method": "tools/call", "params": {"name": "list_gpus"}});
        let answer = converse(&mut input, &mut output, &[call]).await;
        assert_eq!(answer["result"]["_meta"]["autopod-mcp/error"]["kind"], "internal", "{answer}");
    }
}

#[tokio::test]
async fn mcp_json_starts_a_server_without_a_key() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("mcp.json");
    let config: Value = serde_json::from_slice(&std::fs::read(file).expect("mcp.json is there")).expect("it is JSON");
    let servers = config["mcpServers"].as_object().expect("it names servers");
    assert_eq!(servers.len(), 1);
    for (name, server) in servers {
        assert_eq!(
            server["command"],
            Path::new(PROGRAM).file_name().and_then(OsStr::to_str).expect("a name"),
            "{name}"
        );
        let arguments: Vec<&str> = server["args"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let home = TestHome::new();
        let mut command = home.command(&arguments);
        for (variable, value) in server["env"].as_object().into_iter().flatten() {
            command.env(variable, value.as_str().expect("a variable is a string"));
        }
        let mut server = Server::start(command);
        assert_eq!(server.ask(1, "initialize", greeting()).await["result"]["serverInfo"]["name"], "autopod-mcp");
        let listed = server.ask(2, "tools/list", json!({})).await;
        assert_eq!(listed["result"]["tools"].as_array().map(Vec::len), Some(TOOLS.len()), "{listed}");
    }
}
