//! A tool as it is published: the JSON that `tools/list`, `tools --json`, `tool-schemas/` and OpenRPC are made of.

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::tools::{Effect, Offer, PATH_MARK, ToolDef};

/// MCP's hints to a client that decides what to ask its user for. They follow from the tool's effect alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Annotations {
    pub read_only_hint: bool,
    pub destructive_hint: bool,
    pub idempotent_hint: bool,
    pub open_world_hint: bool,
}

impl From<Effect> for Annotations {
    /// `creates` promises no idempotence, because a second run of a workflow is a second job; what sets a state
    /// (`changes`, `destroys`) can be repeated safely. Every tool may speak to the provider, so every world is open.
    fn from(effect: Effect) -> Self {
        Self {
            read_only_hint: effect == Effect::Reads,
            destructive_hint: effect == Effect::Destroys,
            idempotent_hint: effect != Effect::Creates,
            open_world_hint: true,
        }
    }
}

/// One element of MCP's `tools/list`.
pub fn entry(tool: &ToolDef) -> Value {
    json!({
        "name": tool.name,
        "title": tool.title,
        "description": tool.description,
        "inputSchema": input_schema(tool),
        "outputSchema": published((tool.output_schema)()),
        "annotations": Annotations::from(tool.effect),
    })
}

/// The input schema without the marks that only our own command line reads.
pub fn input_schema(tool: &ToolDef) -> Value {
    published((tool.input_schema)())
}

/// The file of a tool in `tool-schemas/`, reviewed as the interface that clients rely on.
pub fn contract(tool: &ToolDef) -> Value {
    let mut contract = entry(tool);
    if let Value::Object(object) = &mut contract {
        object.insert("effect".into(), json!(tool.effect));
        let example = serde_json::from_str(tool.example).unwrap_or_else(|_| json!(tool.example));
        object.insert("example".into(), example);
    }
    contract
}

/// The OpenRPC description of the JSON-RPC face (<https://spec.open-rpc.org>).
pub fn open_rpc(offer: &Offer) -> Value {
    json!({
        "openrpc": "1.3.2",
        "info": { "title": env!("CARGO_PKG_NAME"), "version": env!("CARGO_PKG_VERSION") },
        "methods": offer.tools().map(method).collect::<Vec<_>>(),
    })
}

fn method(tool: &ToolDef) -> Value {
    let schema = input_schema(tool);
    let no_properties = Map::new();
    let properties = schema.get("properties").and_then(Value::as_object).unwrap_or(&no_properties);
    let required: Vec<_> =
        schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
    let parameter = |(name, property): (&String, &Value)| {
        json!({
            "name": name,
            "description": property.get("description").cloned().unwrap_or_default(),
            "required": required.contains(&name.as_str()),
            "schema": property,
        })
    };
    json!({
        "name": tool.name,
        "summary": tool.title,
        "description": tool.description,
        "paramStructure": "by-name",
        "params": properties.iter().map(parameter).collect::<Vec<_>>(),
        "result": { "name": "answer", "schema": published((tool.output_schema)()) },
    })
}

fn published(mut schema: Value) -> Value {
    remove_marks(&mut schema);
    schema
}

fn remove_marks(schema: &mut Value) {
    let Value::Object(object) = schema else { return };
    object.shift_remove(PATH_MARK);
    for key in ["items", "additionalProperties"] {
        if let Some(below) = object.get_mut(key) {
            remove_marks(below);
        }
    }
    if let Some(Value::Object(properties)) = object.get_mut("properties") {
        properties.values_mut().for_each(remove_marks);
    }
}
