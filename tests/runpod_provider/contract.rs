//! The client against RunPod's own OpenAPI document, where `AUTOPOD_RUNPOD_OPENAPI` names it.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Once;

use autopod_mcp::provider::{Cloud, GpuProvider, LogLimits, LogQuery, LogSource, PodAction, PodSpec};
use autopod_mcp::runpod::OPERATIONS;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::script::{Request, Script, answer, json as json_step};
use super::{POD, VOLUME, full_spec, spec, volume_spec};

/// The document; `None` skips the test, which is said, or is a failure where the document is required.
fn openapi() -> Option<Value> {
    let Some(path) = std::env::var_os("AUTOPOD_RUNPOD_OPENAPI") else {
        let required = std::env::var("AUTOPOD_TEST_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|name| name == "openapi"), "AUTOPOD_RUNPOD_OPENAPI is not set");
        static SAID: Once = Once::new();
        SAID.call_once(|| {
            let _ = writeln!(std::io::stderr(), "skipped: AUTOPOD_RUNPOD_OPENAPI is not set");
        });
        return None;
    };
    let text = std::fs::read_to_string(&path).expect("the file that AUTOPOD_RUNPOD_OPENAPI names");
    Some(serde_json::from_str(&text).expect("JSON"))
}

#[tokio::test]
async fn every_operation_is_called_as_the_document_says() {
    let Some(document) = openapi() else { return };
    let requests = call_everything().await;
    let mut called = BTreeSet::new();
    for request in &requests {
        let (id, operation) = operation(&document, request);
        called.insert(id.to_owned());
        let query = request.target.split_once('?').map_or("", |(_, query)| query);
        for (name, _) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            assert!(parameters(&document, operation).contains(name), "{id} has no parameter {name}");
        }
        match operation.pointer("/requestBody/content/application~1json/schema") {
            Some(schema) => assert_valid(&document, schema, &request.json(), id),
            None => assert_eq!(request.body, "", "{id} takes no body"),
        }
    }
    assert_eq!(called, OPERATIONS.iter().map(|id| (*id).to_owned()).collect());
}

#[tokio::test]
async fn every_example_of_the_document_is_read() {
    let Some(document) = openapi() else { return };
    let examples = |schema: &str| examples(&document, schema);

    let mut pods = examples("Pod");
    pods.extend(examples("ListPodsResponse").iter().flat_map(|list| list["pods"].as_array().unwrap().clone()));
    assert!(pods.len() >= 4, "the document has lost its examples");
    for example in &pods {
        let list = json!({ "pods": [example] }).to_string();
        let server = Script::start([json_step(200, &example.to_string()), json_step(200, &list)]).await;
        let client = server.client();
        let pod = client.pod("p1").await.unwrap().value;
        assert_eq!(pod.id, example["id"].as_str().unwrap());
        assert_eq!(serde_json::to_value(pod.status).unwrap(), example["status"]);
        assert_eq!(serde_json::to_value(&pod.actions).unwrap(), example["actions"]);
        assert_eq!(pod.cost_per_hour, example["cost"].as_f64().unwrap());
        assert_eq!(pod.gpu.as_deref(), example["gpu"]["id"].as_str());
        assert_eq!(pod.created_at.is_some(), example["createdAt"].is_string());
        assert_eq!(pod.ssh.is_some(), example["ssh"]["direct"].is_object());
        assert_eq!(client.pods().await.unwrap().value.len(), 1);
    }

    let books = examples("ListPodBillingResponse");
    assert!(!books.is_empty());
    for example in &books {
        let server = Script::start([json_step(200, &example.to_string())]).await;
        let bills = server.client().billing(Timestamp::UNIX_EPOCH, None).await.unwrap().value;
        let total: f64 = bills.iter().map(|bill| bill.total_usd).sum();
        assert_eq!(Some(total), example["metadata"]["totals"]["totalAmount"].as_f64());
    }
    let log = &document["paths"]["/v2/pods/{id}/logs"]["get"]["responses"]["200"]["content"]["text/event-stream"];
    let stream = format!("{}\n", log["examples"]["logLine"]["value"].as_str().expect("an example of a log"));
    let server = Script::start([answer(200, "Content-Type: text/event-stream\r\n", &stream)]).await;
    let page = server.client().pod_logs("p1", &LogQuery::default(), &LogLimits::default()).await.unwrap();
    assert_eq!((page.lines[0].text.as_str(), page.lines[0].source), ("Model loaded.", Some(LogSource::Container)));
    assert_eq!(page.lines[0].at, "2026-06-01T12:02:03Z".parse().ok());

    let volumes = examples("ListNetworkVolumesResponse");
    let gpus = examples("ListGpuTypesResponse");
    let keys = examples("SshKeys");
    assert!(!volumes.is_empty() && !gpus.is_empty() && !keys.is_empty());
    let steps = [&volumes[0], &gpus[0], &keys[0]].map(|example| json_step(200, &example.to_string()));
    let server = Script::start(steps).await;
    let client = server.client();
    let told = volumes[0]["networkVolumes"].as_array().unwrap();
    assert_eq!(client.volumes().await.unwrap().value.len(), told.len());
    let read = client.gpus(1, Cloud::Secure).await.unwrap().value;
    let told = gpus[0]["gpus"].as_array().unwrap();
    assert_eq!(read.len(), told.len());
    assert_eq!(Some(read[0].id.as_str()), told[0]["id"].as_str());
    assert_eq!(json!(client.ssh_keys().await.unwrap().value), keys[0]["keys"]);
}

fn template_spec() -> PodSpec {
    PodSpec { image: None, template: Some("30zmvf89kd".into()), registry: Some("reg1".into()), ..spec() }
}

async fn call_everything() -> Vec<Request> {
    let steps = [
        json_step(200, r#"{"pods":[]}"#),
        json_step(201, POD),
        json_step(201, POD),
        json_step(200, POD),
        json_step(200, POD),
        json_step(200, POD),
        json_step(200, POD),
        answer(204, "", ""),
        json_step(200, r#"{"networkVolumes":[]}"#),
        json_step(201, VOLUME),
        json_step(200, VOLUME),
        json_step(200, r#"{"gpus":[]}"#),
        json_step(200, r#"{"keys":[]}"#),
        answer(204, "", ""),
        json_step(201, POD),
        json_step(200, r#"{"records":[],"metadata":{}}"#),
        answer(200, "Content-Type: text/event-stream\r\n", "data: {\"line\":\"a\"}\n\n"),
        answer(200, "Content-Type: text/event-stream\r\n", ""),
    ];
    let server = Script::start(steps).await;
    let client = server.client();
    client.pods().await.unwrap();
    client.create_pod(&spec()).await.unwrap();
    client.create_pod(&full_spec()).await.unwrap();
    client.pod("p1").await.unwrap();
    for action in [PodAction::Start, PodAction::Stop, PodAction::Restart] {
        client.control_pod("p1", action).await.unwrap();
    }
    client.delete_pod("p1").await.unwrap();
    client.volumes().await.unwrap();
    client.create_volume(&volume_spec()).await.unwrap();
    client.grow_volume("v1", 200).await.unwrap();
    client.gpus(2, Cloud::Community).await.unwrap();
    client.ssh_keys().await.unwrap();
    client.delete_volume("v1").await.unwrap();
    client.create_pod(&template_spec()).await.unwrap();
    let (from, until) = ("2026-11-06T00:00:00Z".parse().unwrap(), "2026-11-07T00:00:00Z".parse().ok());
    client.billing(from, until).await.unwrap();
    let tail = LogQuery { source: Some(LogSource::System), tail: Some(9), since: None };
    let since = LogQuery { source: Some(LogSource::Container), tail: None, since: until };
    client.pod_logs("p1", &tail, &LogLimits::default()).await.unwrap();
    client.pod_logs("p1", &since, &LogLimits::default()).await.unwrap();
    server.requests()
}

/// The operation that the document has for a request.
fn operation<'a>(document: &'a Value, request: &Request) -> (&'a str, &'a Value) {
    let path = request.target.split('?').next().unwrap();
    let matches = |template: &str| {
        let (template, path): (Vec<_>, Vec<_>) = (template.split('/').collect(), path.split('/').collect());
        template.len() == path.len() && template.iter().zip(&path).all(|(t, p)| t == p || t.starts_with('{'))
    };
    let paths = document["paths"].as_object().unwrap();
    // A literal path goes before a template.
    let template = paths.keys().find(|key| *key == path).or_else(|| paths.keys().find(|key| matches(key)));
    let template = template.unwrap_or_else(|| panic!("the document has no {path}"));
    let operation = &paths[template][&request.method.to_lowercase()];
    (operation["operationId"].as_str().unwrap_or_else(|| panic!("no {}", request.line())), operation)
}

fn parameters<'a>(document: &'a Value, operation: &'a Value) -> BTreeSet<&'a str> {
    let listed = operation["parameters"].as_array().map(Vec::as_slice).unwrap_or_default();
    let resolved = listed.iter().map(|parameter| match parameter["$ref"].as_str() {
        Some(reference) => document.pointer(reference.trim_start_matches('#')).unwrap(),
        None => parameter,
    });
    resolved.filter_map(|parameter| parameter["name"].as_str()).collect()
}

fn assert_valid(document: &Value, schema: &Value, body: &Value, id: &str) {
    let whole = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "allOf": [schema],
        "components": document["components"],
    });
    let validator = jsonschema::validator_for(&whole).expect("a schema");
    let errors: Vec<_> = validator.iter_errors(body).map(|error| error.to_string()).collect();
    assert!(errors.is_empty(), "{id}: {errors:?}");
    // The schema is closed: were it not, this test could not fail.
    let mut wrong = body.clone();
    wrong["unheardOf"] = json!(true);
    assert!(!validator.is_valid(&wrong), "{id}: the schema accepts anything");
}

/// All examples of answers that have the schema.
fn examples(document: &Value, schema: &str) -> Vec<Value> {
    let reference = format!("#/components/schemas/{schema}");
    let operations = document["paths"].as_object().unwrap().values().filter_map(Value::as_object);
    let answers = operations.flat_map(|path| path.values()).filter_map(|operation| operation["responses"].as_object());
    let media = answers.flat_map(|answers| answers.values()).map(|answer| &answer["content"]["application/json"]);
    media
        .filter(|media| media["schema"]["$ref"] == reference.as_str())
        .filter_map(|media| media["examples"].as_object())
        .flat_map(|examples| examples.values().map(|example| example["value"].clone()))
        .collect()
}
