//! The whole story in short through JSON-RPC, over HTTP and WebSocket in turn.

use std::path::Path;

use jsonrpsee::core::client::{ClientT, Error};
use jsonrpsee::core::params::ObjectParams;
use jsonrpsee_http_client::{HeaderMap, HeaderValue, HttpClient};
use jsonrpsee_ws_client::WsClientBuilder;
use serde_json::{Value, json};

use crate::faces_json_rpc::Rpc;
use crate::story_support::{Story, assert_as_promised, colours, painting};
use crate::support::program::PATIENCE;
use autopod_mcp::server::catalog;
use autopod_mcp::tools;

fn named(arguments: Value) -> ObjectParams {
    let mut params = ObjectParams::new();
    for (name, value) in arguments.as_object().expect("named parameters") {
        params.insert(name, value).expect("JSON");
    }
    params
}

/// One method; its answer, which has the promised shape.
async fn ask(client: &impl ClientT, method: &'static str, arguments: Value) -> Value {
    let answer = client.request::<Value, _>(method, named(arguments)).await;
    let answer = answer.unwrap_or_else(|error| panic!("{method}: {error}"));
    let tool = tools::find(method).expect("a method is a tool");
    assert_as_promised(&catalog::entry(tool)["outputSchema"], method, &answer);
    answer
}

#[tokio::test]
async fn the_whole_story_through_json_rpc() {
    let story = Story::begin();
    let rpc = Rpc::start_with(story.home.command(&["rpc", "--sandbox", "--listen", "127.0.0.1:0"])).await;
    assert!(rpc.token_file().starts_with(story.world()), "{}", rpc.token_file().display());
    let url = format!("http://{}", rpc.address());
    let http =
        HttpClient::builder().set_headers(rpc.headers()).request_timeout(PATIENCE).build(&url).expect("a client");
    let socket = WsClientBuilder::default()
        .set_headers(rpc.headers())
        .request_timeout(PATIENCE)
        .build(format!("ws://{}", rpc.address()))
        .await
        .expect("a connection");

    let mut headers = HeaderMap::new();
    headers.insert("authorization", HeaderValue::from_static("Bearer wrong"));
    let stranger = HttpClient::builder().set_headers(headers).build(&url).expect("a client");
    let refused = stranger.request::<Value, _>("list_pods", named(json!({}))).await.expect_err("a wrong token");
    assert!(matches!(&refused, Error::Transport(error) if error.to_string().contains("401")), "{refused:?}");
    let refused = socket.request::<Value, _>("create_pod_with_volume", named(json!({"volum": "comfy-models"}))).await;
    match refused.expect_err("an unknown field") {
        Error::Call(error) => {
            assert_eq!(error.code(), -32602, "{error}");
            assert!(error.message().contains("`volum`") && error.message().contains("volume, "), "{error}");
        }
        other => panic!("not an error of a call: {other:?}"),
    }

    let pod = ask(&http, "create_pod_with_volume", json!({"volume": "comfy-models", "lifetime_minutes": 10})).await;
    assert_eq!((&pod["pod"], &pod["done"]), (&json!("comfy"), &json!(true)), "{pod}");
    let tunnel = ask(&socket, "start_tunnel", json!({"pod": "comfy", "local_port": 0})).await;
    assert_eq!(tunnel["done"], true, "{tunnel}");
    let status = ask(&http, "comfy_status", json!({"pod": "comfy"})).await;
    assert_eq!((&status["ready"], &status["url"]), (&json!(true), &tunnel["url"]), "{status}");
    let folder = story.home.folder().join("pictures");
    let ran = ask(&socket, "comfy_run", json!({"workflow": painting(20), "output_dir": folder})).await;
    let picture = Path::new(ran["files"][0]["path"].as_str().expect("a picture"));
    assert!(picture.starts_with(&folder) && colours(picture) > 1000, "{ran}");
    let ended = ask(&http, "terminate_pod", json!({"pod": "comfy"})).await;
    assert_eq!((&ended["state"], &ended["still_billing"]), (&json!("gone"), &json!("no")), "{ended}");
    let pods = ask(&socket, "list_pods", json!({})).await;
    assert_eq!(pods["pods"], json!([]), "{pods}");

    rpc.end().await;
    story.end().await;
}
