//! The JSON-RPC server with jsonrpsee's own clients and with raw HTTP.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use jsonrpsee::core::client::{ClientT, Error};
use jsonrpsee::core::params::{ArrayParams, ObjectParams};
use jsonrpsee_http_client::{HeaderMap, HeaderValue, HttpClient};
use jsonrpsee_ws_client::WsClientBuilder;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::faces_support::{Server, TestHome};
use crate::support::http;
use autopod_mcp::tools::TOOLS;

pub struct Rpc {
    server: Server,
    /// `127.0.0.1:PORT`
    address: String,
    token_file: PathBuf,
}

impl Rpc {
    async fn start(home: &TestHome) -> Self {
        Self::start_with(home.command(&["rpc", "--listen", "127.0.0.1:0"])).await
    }

    pub async fn start_with(command: Command) -> Self {
        let mut server = Server::start(command);
        let line = server.line().await;
        let address = line.split_once("http://").map(|(_, rest)| rest.split(' ').next().unwrap_or_default());
        let address = address.unwrap_or_else(|| panic!("no address in: {line}")).to_owned();
        let line = server.line().await;
        let token_file = line.split_once(": ").map(|(_, path)| PathBuf::from(path)).expect("the token's file is told");
        Self { server, address, token_file }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn token_file(&self) -> &Path {
        &self.token_file
    }

    /// Ends it as a service manager does.
    pub async fn end(mut self) {
        self.server.signal(Signal::TERM);
        assert_eq!(self.server.child.wait().await.expect("it ends").code(), Some(0));
    }

    fn token(&self) -> String {
        std::fs::read_to_string(&self.token_file).expect("the token can be read")
    }

    pub fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let value = HeaderValue::from_str(&format!("Bearer {}", self.token())).expect("a token of letters");
        headers.insert("authorization", value);
        headers
    }

    fn http(&self) -> HttpClient {
        let url = format!("http://{}", self.address);
        HttpClient::builder().set_headers(self.headers()).build(url).expect("a client")
    }

    /// Posts a body with these headers beside the token; status and body.
    async fn post(&self, headers: &[(&str, &str)], body: impl Into<reqwest::Body>) -> reqwest::Result<(u16, String)> {
        let client = http::client().build().expect("a client");
        let mut request = client.post(format!("http://{}", self.address)).header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.body(body).send().await?;
        Ok((response.status().as_u16(), response.text().await?))
    }
}

fn refusal(result: Result<Value, Error>) -> (i32, String, Value) {
    match result {
        Err(Error::Call(error)) => {
            let data = error.data().map(|data| serde_json::from_str(data.get()).expect("data is JSON"));
            (error.code(), error.message().to_owned(), data.unwrap_or_default())
        }
        other => panic!("not an error of a call: {other:?}"),
    }
}

fn list_gpus() -> String {
    json!({"jsonrpc": "2.0", "id": 1, "method": "list_gpus", "params": {}}).to_string()
}

#[tokio::test]
async fn tools_are_methods_over_http_and_websocket() {
    let home = TestHome::new();
    let rpc = Rpc::start(&home).await;
    let http = rpc.http();
    let websocket = WsClientBuilder::default()
        .set_headers(rpc.headers())
        .build(format!("ws://{}", rpc.address))
        .await
        .expect("a connection");
    for result in [
        http.request::<Value, _>("list_gpus", ObjectParams::new()).await,
        websocket.request::<Value, _>("list_gpus", ObjectParams::new()).await,
        http.request::<Value, _>("list_volumes", ArrayParams::new()).await,
    ] {
        let (code, message, data) = refusal(result);
        if code == -32003 {
            assert!(message.contains("key") && data["kind"] == "setup", "{message}: {data}");
            assert!(data["hint"].as_str().is_some_and(|hint| hint.contains("RUNPOD_API_KEY")), "{data}");
        } else {
            assert_eq!(code, -32602, "{message}: only the array is a wrong parameter");
            assert!(message.contains("named parameters"), "{message}");
        }
    }
    let mut unknown = ObjectParams::new();
    unknown.insert("min_vram", 24).expect("a number");
    let (code, message, data) = refusal(websocket.request::<Value, _>("list_gpus", unknown).await);
    assert_eq!((code, &data["kind"]), (-32602, &json!("invalid_input")), "{message}");
    assert!(message.contains("list_gpus") && message.contains("`min_vram`"), "{message}");
    let (code, _, _) = refusal(http.request::<Value, _>("no_such_tool", ObjectParams::new()).await);
    assert_eq!(code, -32601);
}

#[tokio::test]
async fn open_rpc_describes_every_tool() {
    let home = TestHome::new();
    let rpc = Rpc::start(&home).await;
    let described: Value = rpc.http().request("rpc.discover", ObjectParams::new()).await.expect("a description");
    let methods = described["methods"].as_array().expect("it lists methods");
    assert_eq!(methods.len(), TOOLS.len());
    for (method, tool) in methods.iter().zip(TOOLS) {
        assert_eq!((&method["name"], &method["paramStructure"]), (&json!(tool.name), &json!("by-name")));
        let names: Vec<_> = method["params"].as_array().into_iter().flatten().map(|p| p["name"].clone()).collect();
        let schema = (tool.input_schema)();
        let fields: Vec<_> =
            schema["properties"].as_object().into_iter().flatten().map(|(name, _)| json!(name)).collect();
        assert_eq!(names, fields, "{}", tool.name);
    }
}

#[tokio::test]
async fn only_this_users_programs_are_answered() {
    let home = TestHome::new();
    let rpc = Rpc::start(&home).await;
    let mode = std::fs::metadata(&rpc.token_file).expect("the token's file is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let bearer = format!("Bearer {}", rpc.token());
    let wrong = format!("Bearer {}", "0".repeat(rpc.token().len()));
    let ours = format!("http://{}", rpc.address);
    let authorized = ("authorization", bearer.as_str());
    let cases: [(&[(&str, &str)], u16); 8] = [
        (&[authorized], 200),
        (&[authorized, ("origin", &ours)], 200),
        (&[], 401),
        (&[("authorization", &wrong)], 401),
        (&[("authorization", "Bearer ")], 401),
        (&[authorized, ("origin", "https://evil.example")], 403),
        (&[authorized, ("origin", "null")], 403),
        (&[authorized, ("host", "evil.example")], 403),
    ];
    for (headers, status) in cases {
        let (got, body) = rpc.post(headers, list_gpus()).await.expect("an answer");
        assert_eq!(got, status, "{headers:?}: {body}");
        assert_eq!(body.contains("jsonrpc"), status == 200, "{headers:?}: {body}");
    }
    let unauthorized = WsClientBuilder::default().build(format!("ws://{}", rpc.address)).await;
    assert!(unauthorized.is_err(), "a WebSocket needs the token too");
    // The refusal may close the connection while the body is still on its way.
    let too_long = rpc.post(&[authorized], "x".repeat(9 << 20)).await.map(|(status, _)| status);
    assert!(matches!(too_long, Ok(413) | Err(_)), "{too_long:?}");
    let (_, body) = rpc.post(&[authorized], "{\"jsonrpc\": ").await.expect("an answer");
    assert!(body.contains("-32700"), "{body}");
    let (status, _) = rpc.post(&[authorized], list_gpus()).await.expect("an answer");
    assert_eq!(status, 200, "the next call works");
}

#[tokio::test]
async fn the_token_stays_and_signals_end_the_server() {
    let home = TestHome::new();
    let mut tokens = Vec::new();
    for (signal, code) in [(Signal::TERM, 0), (Signal::INT, 130)] {
        let rpc = Rpc::start(&home).await;
        tokens.push(rpc.token());
        rpc.server.signal(signal);
        let mut server = rpc.server;
        assert_eq!(server.child.wait().await.expect("it ends").code(), Some(code));
    }
    assert_eq!(tokens[0], tokens[1]);
    let file = home.path().join("rpc-token");
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).expect("the mode can be set");
    let (code, _, stderr) = home.run(&["rpc"]).await;
    assert!(code == 1 && stderr.contains("chmod 600"), "{code}: {stderr}");
}

#[tokio::test]
async fn only_loopback_is_listened_on() {
    let home = TestHome::new();
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:80"] {
        let (code, stdout, stderr) = home.run(&["rpc", "--listen", address]).await;
        assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
        assert!(stderr.contains("loopback"), "{stderr}");
    }
}
