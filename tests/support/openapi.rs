//! Checks a sandbox's log of requests and answers against RunPod's OpenAPI file (3.1, so its schemas are JSON Schema
//! 2020-12).

use std::collections::HashMap;
use std::io::Write;

use jsonschema::{Draft, Validator};
use serde_json::{Map, Value, json};

/// Parameters that RunPod's lists take but its OpenAPI file doesn't name yet.
const UNDOCUMENTED: &[&str] = &["limit", "cursor"];

/// The OpenAPI file named by `AUTOPOD_RUNPOD_OPENAPI`. Without it the check is skipped, which is said, unless
/// `AUTOPOD_TEST_REQUIRE` lists `openapi`.
pub fn spec() -> Option<Value> {
    let Some(path) = std::env::var_os("AUTOPOD_RUNPOD_OPENAPI") else {
        let required = std::env::var("AUTOPOD_TEST_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|item| item == "openapi"), "AUTOPOD_RUNPOD_OPENAPI is required but not set");
        static SAID: std::sync::Once = std::sync::Once::new();
        SAID.call_once(|| {
            // Past the test harness, which would swallow it; a closed stderr is no reason to fail.
            let _ = writeln!(
                std::io::stderr(),
                "skipped: AUTOPOD_RUNPOD_OPENAPI is not set, the wire is not compared with it"
            );
        });
        return None;
    };
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Some(serde_json::from_str(&text).expect("the OpenAPI file is JSON"))
}

/// Every violation in a log, as `GET /_sandbox/requests` gives it. Each begins with `request` or `answer`, for whose
/// fault it is. Answers that a fault had its hand in are left out, requests never.
pub fn check_log(spec: &Value, log: &[Value]) -> Vec<String> {
    let mut check = Check { spec, validators: HashMap::new(), violations: Vec::new() };
    for entry in log {
        check.entry(entry);
    }
    check.violations
}

struct Check<'a> {
    spec: &'a Value,
    /// By the text of the schema.
    validators: HashMap<String, Validator>,
    violations: Vec<String>,
}

impl Check<'_> {
    fn entry(&mut self, entry: &Value) {
        let method = entry["method"].as_str().unwrap_or_default();
        let path = entry["path"].as_str().unwrap_or_default();
        let label = format!("#{} {method} {path}", entry["number"]);
        let spec = self.spec;
        let Some((item, operation)) = find_operation(spec, method, path) else {
            self.violations.push(format!("request {label}: the API has no such operation"));
            return;
        };
        self.query(&label, item, operation, entry["query"].as_str().unwrap_or_default());
        self.request_body(&label, operation, &entry["request_body"]);
        if entry["injected"] != true && !entry["status"].is_null() {
            self.answer(&label, operation, entry);
        }
    }

    fn query(&mut self, label: &str, item: &Value, operation: &Value, query: &str) {
        let shared = item["parameters"].as_array().into_iter().flatten();
        let own = operation["parameters"].as_array().into_iter().flatten();
        let parameters: Vec<&Value> = shared.chain(own).map(|parameter| resolved(self.spec, parameter)).collect();
        let url = format!("http://sandbox/?{query}");
        let pairs = reqwest::Url::parse(&url).expect("a query from a log");
        for (name, value) in pairs.query_pairs() {
            let documented =
                parameters.iter().find(|parameter| parameter["in"] == "query" && parameter["name"] == *name);
            match documented {
                Some(parameter) => {
                    let schema = resolved(self.spec, &parameter["schema"]);
                    let value = typed(schema, &value);
                    self.validate(&format!("request {label}: query.{name}"), schema, &value);
                }
                None if UNDOCUMENTED.contains(&&*name) => {}
                None => self.violations.push(format!("request {label}: unknown parameter {name}")),
            }
        }
    }

    fn request_body(&mut self, label: &str, operation: &Value, body: &Value) {
        let documented = &operation["requestBody"];
        let schema = &documented["content"]["application/json"]["schema"];
        match (documented.is_null(), body.is_null()) {
            (true, true) => {}
            (true, false) => self.violations.push(format!("request {label}: this operation takes no body")),
            (false, true) if documented["required"] == true => {
                self.violations.push(format!("request {label}: the body is missing"));
            }
            (false, true) => {}
            (false, false) => self.validate(&format!("request {label}"), schema, body),
        }
    }

    fn answer(&mut self, label: &str, operation: &Value, entry: &Value) {
        let status = entry["status"].to_string();
        let responses = &operation["responses"];
        let response = [&responses[&status], &responses["default"]].into_iter().find(|response| !response.is_null());
        let Some(response) = response.map(|response| resolved(self.spec, response)) else {
            self.violations.push(format!("answer {label}: status {status} is not documented"));
            return;
        };
        let body = &entry["response_body"];
        let Some(content) = response["content"].as_object() else {
            if !body.is_null() {
                self.violations.push(format!("answer {label}: {status} has no body in the API"));
            }
            return;
        };
        let content_type = entry["content_type"].as_str().unwrap_or_default();
        match content.get(content_type) {
            None => self.violations.push(format!("answer {label}: {status} can't be {content_type:?}")),
            Some(_) if content_type == "text/event-stream" => {}
            Some(media) => self.validate(&format!("answer {label}: {status}"), &media["schema"], body),
        }
    }

    fn validate(&mut self, label: &str, schema: &Value, value: &Value) {
        let spec = self.spec;
        let validator = self.validators.entry(schema.to_string()).or_insert_with(|| {
            let mut root = Map::new();
            root.insert("allOf".to_owned(), json!([schema]));
            root.insert("components".to_owned(), spec["components"].clone());
            let options = jsonschema::options().with_draft(Draft::Draft202012).should_validate_formats(true);
            options.build(&Value::Object(root)).expect("the OpenAPI file's schemas compile")
        });
        for error in validator.iter_errors(value) {
            self.violations.push(format!("{label}: ${}: {error}", error.instance_path()));
        }
    }
}

/// The path's item and its operation. A path without parameters goes before one with.
fn find_operation<'a>(spec: &'a Value, method: &str, path: &str) -> Option<(&'a Value, &'a Value)> {
    let paths = spec["paths"].as_object()?;
    let item =
        paths.get(path).or_else(|| paths.iter().find(|(template, _)| fits(template, path)).map(|(_, item)| item));
    let item = item?;
    Some((item, item.get(method.to_lowercase())?))
}

fn fits(template: &str, path: &str) -> bool {
    let (template, path): (Vec<_>, Vec<_>) = (template.split('/').collect(), path.split('/').collect());
    template.len() == path.len()
        && template.iter().zip(&path).all(|(wanted, found)| wanted.starts_with('{') || wanted == found)
}

fn resolved<'a>(spec: &'a Value, value: &'a Value) -> &'a Value {
    match value["$ref"].as_str() {
        Some(reference) => resolved(spec, spec.pointer(&reference[1..]).expect("a reference that leads somewhere")),
        None => value,
    }
}

/// A parameter's text as the JSON that its schema is about.
fn typed(schema: &Value, text: &str) -> Value {
    match schema["type"].as_str() {
        Some("integer") => text.parse::<i64>().map_or(json!(text), |number| json!(number)),
        Some("boolean") => text.parse::<bool>().map_or(json!(text), |truth| json!(truth)),
        Some("array") => text.split(',').map(|item| json!(item)).collect(),
        _ => json!(text),
    }
}
