//! A question to the person behind a call: ending a pod that nobody of us made asks first, through every face that can.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rmcp::model::{
    CallToolRequestParams, ClientCapabilities, ClientConfig, ElicitRequestParams, ElicitResult, ElicitationAction,
    ElicitationCapability, ErrorData,
};
use rmcp::service::RequestContext;
use rmcp::{ClientHandler, RoleClient, ServiceExt};
use serde_json::{Value, json};

use crate::faces_support::{Server, start};
use crate::story_support::Story;
use crate::support::http;
use crate::support::program::PATIENCE;

/// A pod that somebody else made in this account; its id.
pub async fn stranger(story: &Story) -> String {
    story.call("list_pods", json!({})).await.json();
    let url = format!("{}/v2/pods", story.sandbox_file()["url"].as_str().expect("its address"));
    let body = json!({
        "name": "stranger", "image": "runpod/comfyui:latest", "gpu": {"id": crate::keeper_support::GPU, "count": 1},
        "cloud": "SECURE", "disk": 40, "ports": ["22/tcp"], "env": {}
    });
    let client = http::client().build().expect("a client");
    let answer = client.post(url).bearer_auth(story.key()).json(&body).send().await.expect("an answer");
    let pod: Value = answer.error_for_status().expect("a pod").json().await.expect("JSON");
    pod["id"].as_str().expect("an id").to_owned()
}

pub async fn assert_alive(story: &Story, id: &str, alive: bool) {
    let pods = story.call("list_pods", json!({})).await.json();
    let listed = pods["pods"].as_array().expect("rows").iter().any(|pod| pod["pod_id"] == id);
    assert_eq!(listed, alive, "{pods}");
}

fn terminate(id: &str) -> Value {
    json!({"name": "terminate_pod", "arguments": {"pod": id, "allow_unmanaged": true}})
}

fn text(result: &Value) -> &str {
    result["content"][0]["text"].as_str().unwrap_or_default()
}

/// A refusal that says what was not done, that it costs, and how it is done without a question.
fn assert_refused(answer: &Value, id: &str, why: &str) {
    let result = &answer["result"];
    assert_eq!(result["_meta"]["autopod-mcp/error"]["kind"], "refused", "{answer}");
    assert_eq!(result["_meta"]["autopod-mcp/error"]["still_billing"], "yes", "{answer}");
    for word in [id, why, "nothing was done", "confirm_pod_id"] {
        assert!(text(result).contains(word), "`{word}` is missing: {answer}");
    }
}

/// The official client, with a person behind it who gives these answers.
#[derive(Clone)]
struct Person {
    answers: Arc<Mutex<Vec<ElicitResult>>>,
    asked: Arc<Mutex<Vec<ElicitRequestParams>>>,
}

impl ClientHandler for Person {
    fn get_info(&self) -> ClientConfig {
        let mut info = ClientConfig::default();
        info.capabilities = ClientCapabilities::default();
        info.capabilities.elicitation = Some(ElicitationCapability::new());
        info
    }

    async fn create_elicitation(
        &self,
        request: ElicitRequestParams,
        _: RequestContext<RoleClient>,
    ) -> Result<ElicitResult, ErrorData> {
        self.asked.lock().expect("nobody panicked").push(request);
        Ok(self.answers.lock().expect("nobody panicked").remove(0))
    }
}

#[tokio::test]
async fn only_a_ticked_box_is_a_yes() {
    let story = Story::begin();
    let id = stranger(&story).await;
    let accept = || ElicitResult::new(ElicitationAction::Accept);
    let answers = vec![
        ElicitResult::new(ElicitationAction::Decline),
        ElicitResult::new(ElicitationAction::Cancel),
        accept(),
        accept().with_content(json!({"confirm": false})),
        accept().with_content(json!({"confirm": "true"})),
        accept().with_content(json!({"confirm": true})),
    ];
    let refusals = answers.len() - 1;
    let person = Person { answers: Arc::new(Mutex::new(answers)), asked: Arc::default() };
    let (_server, pipes) = start(story.command(&["serve"]));
    let client =
        tokio::time::timeout(PATIENCE, person.clone().serve(pipes)).await.expect("in time").expect("a session");
    let call = async || {
        let Value::Object(arguments) = terminate(&id)["arguments"].clone() else { panic!("an object") };
        let call = client.call_tool(CallToolRequestParams::new("terminate_pod").with_arguments(arguments));
        let result = tokio::time::timeout(PATIENCE, call).await.expect("in time").expect("an answer");
        json!({ "result": result })
    };
    for _ in 0..refusals {
        assert_refused(&call().await, &id, "declined");
    }
    assert_alive(&story, &id, true).await;
    let done = call().await;
    assert_eq!(done["result"]["structuredContent"]["done"], true, "{done}");
    let asked = person.asked.lock().expect("nobody panicked").clone();
    assert_eq!(asked.len(), refusals + 1, "each call asked once: {asked:?}");
    let asked = serde_json::to_value(&asked[0]).expect("JSON");
    assert!(asked["message"].as_str().is_some_and(|text| text.contains(&id) && text.contains("`stranger`")), "{asked}");
    let schema = json!({
        "type": "object", "properties": {"confirm": {"type": "boolean", "title": "Yes, do it"}}, "required": ["confirm"]
    });
    assert_eq!(asked["requestedSchema"], schema, "{asked}");
    client.cancel().await.expect("the session ends");
    story.end().await;
}

/// A server that a client of the older era has greeted, with these capabilities.
async fn greeted(story: &Story, capabilities: Value) -> Server {
    let mut server = Server::start(story.command(&["serve"]));
    let who = json!({"name": "test", "version": "1"});
    let greeting = json!({"protocolVersion": "2025-06-18", "capabilities": capabilities, "clientInfo": who});
    server.ask(1, "initialize", greeting).await;
    server.send(json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await;
    server
}

/// Calls, and gives the id of the question that comes back.
async fn question(server: &mut Server, id: u64, params: Value) -> Value {
    server.send(json!({"jsonrpc": "2.0", "id": id, "method": "tools/call", "params": params})).await;
    let question = server.receive().await;
    assert_eq!(question["method"], "elicitation/create", "{question}");
    question["id"].clone()
}

#[tokio::test]
async fn an_open_question_holds_up_nothing_and_is_taken_back() {
    let story = Story::begin();
    let id = stranger(&story).await;
    let mut server = greeted(&story, json!({"elicitation": {}})).await;

    let asked = question(&mut server, 2, terminate(&id)).await;
    let listed = server.ask(3, "tools/call", json!({"name": "list_pods", "arguments": {}})).await;
    assert_eq!(listed["result"]["structuredContent"]["pods"][0]["pod_id"], json!(id), "{listed}");
    server.send(json!({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 2}})).await;
    let cancelled = Instant::now();
    let withdrawn = server.receive().await;
    assert!(cancelled.elapsed() < Duration::from_secs(20), "it was taken back only when its time was up");
    assert_eq!((&withdrawn["method"], &withdrawn["params"]["requestId"]), (&json!("notifications/cancelled"), &asked));
    // A yes that comes too late is one to nothing.
    let yes = json!({"action": "accept", "content": {"confirm": true}});
    server.send(json!({"jsonrpc": "2.0", "id": asked, "result": yes})).await;
    assert!(server.ask(4, "ping", json!({})).await.get("result").is_some());

    // Nobody answers within the call's time.
    let mut short = terminate(&id);
    short["arguments"]["wait_seconds"] = json!(1);
    let asked = question(&mut server, 5, short).await;
    let mut last = [server.receive().await, server.receive().await];
    last.sort_by_key(|message| message["method"].is_string());
    assert_refused(&last[0], &id, "not answered in time");
    assert_eq!((&last[1]["method"], &last[1]["params"]["requestId"]), (&json!("notifications/cancelled"), &asked));

    // The client had promised too much.
    let asked = question(&mut server, 6, terminate(&id)).await;
    let error = json!({"code": -32601, "message": "no such method"});
    server.send(json!({"jsonrpc": "2.0", "id": asked, "error": error})).await;
    assert_refused(&server.receive().await, &id, "nobody can be asked");

    question(&mut server, 7, terminate(&id)).await;
    drop(server.stdin.take());
    assert_eq!(server.ended().await, 0, "a client that goes away with a question open has not said yes");
    assert_alive(&story, &id, true).await;
    story.end().await;
}

#[tokio::test]
async fn who_can_not_be_asked_gives_the_id() {
    let story = Story::begin();
    let id = stranger(&story).await;
    for capabilities in [json!({}), json!({"elicitation": {"url": {}}})] {
        let mut server = greeted(&story, capabilities).await;
        assert_refused(&server.ask(2, "tools/call", terminate(&id)).await, &id, "nobody can be asked");
    }
    let arguments = |confirmed: &str| json!({"pod": id, "allow_unmanaged": true, "confirm_pod_id": confirmed});
    let refused = story.call("terminate_pod", json!({"pod": id, "allow_unmanaged": true})).await;
    assert_eq!(refused.code, 4, "{refused:?}");
    refused.assert_words(&["nobody can be asked", "confirm_pod_id", "Still being billed: yes"]);
    let refused = story.call("terminate_pod", arguments("stranger")).await;
    assert_eq!(refused.code, 4, "{refused:?}");
    // No terminal here, so a person's command can't ask either.
    let refused = story.run(&["pod", "kill", &id, "--allow-unmanaged"]).await;
    assert_eq!(refused.code, 4, "{refused:?}");
    assert_alive(&story, &id, true).await;
    assert_eq!(story.call("terminate_pod", arguments(&id)).await.json()["done"], true);
    story.end().await;
}

fn newer(mut params: Value) -> Value {
    params["_meta"] = json!({
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
        "io.modelcontextprotocol/clientCapabilities": {"elicitation": {"form": {}}},
    });
    params
}

fn answered(id: &str, state: &Value, result: Value) -> Value {
    let mut params = newer(terminate(id));
    params["requestState"] = state.clone();
    params["inputResponses"] = json!({ "confirm": result });
    params
}

#[tokio::test]
async fn a_newer_client_is_asked_by_the_answer_and_brings_its_own_with_the_same_call() {
    let story = Story::begin();
    let (id, other) = (stranger(&story).await, stranger(&story).await);
    let mut server = Server::start(story.command(&["serve"]));
    let yes = json!({"action": "accept", "content": {"confirm": true}});
    let mut last = 0;
    let mut call = async |params: Value| {
        last += 1;
        server.ask(last, "tools/call", params).await["result"].clone()
    };
    let state = |result: &Value| {
        assert_eq!(result["resultType"], "input_required", "{result}");
        let question = &result["inputRequests"]["confirm"];
        assert_eq!((&question["method"], &question["params"]["mode"]), (&json!("elicitation/create"), &json!("form")));
        result["requestState"].clone()
    };
    let asked = call(newer(terminate(&id))).await;
    assert!(asked["inputRequests"]["confirm"]["params"]["message"].as_str().is_some_and(|text| text.contains(&id)));
    let declined = call(answered(&id, &state(&asked), json!({"action": "decline"}))).await;
    assert_refused(&json!({ "result": declined }), &id, "declined");
    // An answer is good once, for its own call, and not without its question.
    let asked = state(&call(newer(terminate(&id))).await);
    state(&call(answered(&other, &asked, yes.clone())).await);
    state(&call(answered(&id, &json!("made up"), yes.clone())).await);
    assert_alive(&story, &id, true).await;
    let done = call(answered(&id, &asked, yes.clone())).await;
    assert_eq!((&done["resultType"], &done["structuredContent"]["done"]), (&json!("complete"), &json!(true)), "{done}");
    let again = call(answered(&other, &asked, yes.clone())).await;
    let asked = state(&again);
    assert_alive(&story, &other, true).await;
    let done = call(answered(&other, &asked, yes)).await;
    assert_eq!(done["structuredContent"]["done"], true, "{done}");
    story.end().await;
}
