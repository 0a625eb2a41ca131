//! Answers on their way through the faces: the same value from each, as the published schema says.

use std::sync::Arc;

use async_trait::async_trait;
use autopod_mcp::app::{self, AppOptions};
use autopod_mcp::cli::human;
use autopod_mcp::environment::Environment;
use autopod_mcp::provider::{
    Cloud, GpuProvider, GpuType, LogLimits, LogPage, LogQuery, LogStream, Pod, PodAction, PodBill, PodSpec,
    ProviderError, Stamped, Volume, VolumeSpec,
};
use autopod_mcp::server::mcp::{self, Surroundings};
use autopod_mcp::server::{LazyServices, catalog, json_rpc};
use autopod_mcp::tools::{self, Offer};
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream, Lines};
use tokio_util::sync::CancellationToken;

use crate::faces_support::TestHome;
use crate::support::program::{PATIENCE, PROGRAM};

/// An account with one volume; its catalog of GPUs is a defect.
#[derive(Debug)]
struct OneVolume;

#[async_trait]
impl GpuProvider for OneVolume {
    async fn volumes(&self) -> Result<Stamped<Vec<Volume>>, ProviderError> {
        let volume = Volume {
            id: "vol1".to_owned(),
            name: "models \u{1b}[2J".to_owned(),
            size_gb: 100,
            data_center: "EU-RO-1".to_owned(),
            tier: None,
        };
        Ok(Stamped { value: vec![volume], date: None })
    }

    async fn gpus(&self, count: u32, _: Cloud) -> Result<Stamped<Vec<GpuType>>, ProviderError> {
        panic!("no catalog for {count} GPUs")
    }

    async fn create_pod(&self, _: &PodSpec) -> Result<Stamped<Pod>, ProviderError> {
        Err(ProviderError::MissingKey)
    }
    async fn pod(&self, _: &str) -> Result<Stamped<Pod>, ProviderError> {
        Err(ProviderError::MissingKey)
    }
    async fn pods(&self) -> Result<Stamped<Vec<Pod>>, ProviderError> {
        Err(ProviderError::MissingKey)
    }
    async fn control_pod(&self, _: &str, _: PodAction) -> Result<Stamped<Pod>, ProviderError> {
        Err(ProviderError::MissingKey)
    }
    async fn delete_pod(&self, _: &str) -> Result<Stamped<()>, ProviderError> {
        Err(ProviderError::MissingKey)
    }
    async fn create_volume(&self, _: &VolumeSpec) -> Result<Stamped<Volume>, ProviderError> {
        Err(ProviderError::MissingKey)
    }
    async fn grow_volume(&self, _: &str, _: u32) -> Result<Stamped<Volume>, ProviderError> {
        Err(ProviderError::MissingKey)
    }
    async fn ssh_keys(&self) -> Result<Stamped<Vec<String>>, ProviderError> {
        Err(ProviderError::MissingKey)
    }
    async fn delete_volume(&self, _: &str) -> Result<Stamped<()>, ProviderError> {
        Err(ProviderError::MissingKey)
    }
    async fn pod_logs(&self, _: &str, _: &LogQuery, _: &LogLimits) -> Result<LogPage, ProviderError> {
        Err(ProviderError::MissingKey)
    }
    async fn follow_logs(&self, _: &str, _: &LogQuery) -> Result<LogStream, ProviderError> {
        Err(ProviderError::MissingKey)
    }
    async fn billing(&self, _: Timestamp, _: Option<Timestamp>) -> Result<Stamped<Vec<PodBill>>, ProviderError> {
        Err(ProviderError::MissingKey)
    }
}

fn services(home: &TestHome) -> LazyServices {
    let environment = Environment { autopod_home: Some(home.path()), ..Environment::default() };
    let options = AppOptions { environment, program: PROGRAM.into(), sandbox: false, tethered: false };
    LazyServices::new(move || {
        let options = options.clone();
        Box::pin(async move {
            let mut services = Arc::into_inner(app::services(&options).await?).expect("nobody else holds them yet");
            services.provider = Some(Arc::new(OneVolume));
            Ok(Arc::new(services))
        })
    })
}

struct Mcp {
    input: DuplexStream,
    output: Lines<BufReader<DuplexStream>>,
}

impl Mcp {
    async fn start(home: &TestHome) -> Self {
        let (input, served_input) = tokio::io::duplex(1 << 16);
        let (output, served_output) = tokio::io::duplex(1 << 16);
        tokio::spawn(mcp::serve(
            served_input,
            served_output,
            services(home),
            Surroundings::RunPod,
            Offer::everything(),
            CancellationToken::new(),
        ));
        let mut server = Self { input, output: BufReader::new(output).lines() };
        let client = json!({"name": "test", "version": "1"});
        let greeting = json!({"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": client});
        server.ask("initialize", greeting).await;
        server
    }

    async fn ask(&mut self, method: &str, params: Value) -> Value {
        let message = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        self.input.write_all(format!("{message}\n").as_bytes()).await.expect("it reads");
        let line = tokio::time::timeout(PATIENCE, self.output.next_line()).await.expect("it answers");
        serde_json::from_str(&line.expect("its output is open").expect("an answer")).expect("JSON")
    }

    async fn call(&mut self, tool: &str) -> Value {
        self.ask("tools/call", json!({"name": tool, "arguments": {}})).await["result"].take()
    }
}

#[tokio::test]
async fn every_face_gives_the_same_value_and_it_fits_the_schema() {
    let home = TestHome::new();
    let by_mcp = Mcp::start(&home).await.call("list_volumes").await;
    let value = &by_mcp["structuredContent"];
    assert_eq!(by_mcp["isError"], false, "{by_mcp}");
    assert!(by_mcp["content"][0]["text"].as_str().is_some_and(|text| text.contains("100 GB")), "{by_mcp}");
    assert_eq!(value["volumes"][0]["id"], "vol1", "{value}");
    let tool = tools::find("list_volumes").expect("it is there");
    let schema = catalog::entry(tool)["outputSchema"].take();
    jsonschema::validate(&schema, value).unwrap_or_else(|error| panic!("{error}: {value}"));

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("its address");
    let token = json_rpc::token(&home.path().join("rpc-token")).expect("a token");
    let stop = CancellationToken::new();
    let serving = tokio::spawn(json_rpc::serve(listener, token, services(&home), Offer::everything(), stop.clone()));
    let token = std::fs::read_to_string(home.path().join("rpc-token")).expect("the token's file");
    let by_rpc: Value = {
        use jsonrpsee::core::client::ClientT;
        use jsonrpsee_http_client::{HeaderMap, HeaderValue, HttpClient};
        let mut headers = HeaderMap::new();
        headers.insert("authorization", HeaderValue::from_str(&format!("Bearer {token}")).expect("letters"));
        let client = HttpClient::builder().set_headers(headers).build(format!("http://{address}")).expect("a client");
        client.request("list_volumes", jsonrpsee::core::params::ObjectParams::new()).await.expect("an answer")
    };
    assert_eq!(&by_rpc, value);
    stop.cancel();
    serving.await.expect("no panic").expect("a clean end");
}

#[tokio::test]
async fn a_panic_in_a_tool_is_an_answer_and_the_next_call_works() {
    let home = TestHome::new();
    let mut server = Mcp::start(&home).await;
    let answer = server.call("list_gpus").await;
    assert_eq!(answer["_meta"]["autopod-mcp/error"]["kind"], "internal", "{answer}");
    assert!(answer["content"][0]["text"].as_str().is_some_and(|text| text.contains("list_gpus")), "{answer}");
    assert_eq!(server.call("list_volumes").await["isError"], false);
}

/// A field that was renamed in a tool but not in its row would show as `-`.
#[test]
fn rows_show_only_fields_that_answers_have() {
    for row in human::ROWS {
        let tool = tools::find(row.tool).expect("a row names a tool");
        let answer = sample(&(tool.output_schema)());
        let shown = (row.render)(&answer);
        assert!(!shown.split_whitespace().any(|word| word == "-"), "`{}`: {shown}\nof {answer}", row.path);
    }
}

/// Any value that fits a schema, with everything optional there.
fn sample(schema: &Value) -> Value {
    if let Some(values) = schema["enum"].as_array() {
        return values[0].clone();
    }
    match schema["type"].as_str() {
        Some("object") => match schema["properties"].as_object() {
            Some(fields) => Value::Object(fields.iter().map(|(name, below)| (name.clone(), sample(below))).collect()),
            None => Value::Object(Map::from_iter([("key".to_owned(), sample(&schema["additionalProperties"]))])),
        },
        Some("array") => json!([sample(&schema["items"])]),
        Some("integer" | "number") => json!(7),
        Some("boolean") => json!(true),
        _ => json!("word"),
    }
}
