//! JSON Schemas as every client accepts them, and the checks that follow from them.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::ToolError;

/// Marks a field of an input schema that holds paths of local files: `#[schemars(extend("x-path" = true))]`. The command
/// line makes them absolute against its folder before the call; published schemas don't show the mark.
pub const PATH_MARK: &str = "x-path";

/// The schema of a tool's arguments. Some clients stumble over `$ref`, `format: uint32`, unions with null and
/// `$schema`, so none of these is in it.
pub(super) fn input<T: JsonSchema>() -> Value {
    let mut schema = generate::<T>(SchemaSettings::draft2020_12());
    if let Some(object) = schema.as_object_mut() {
        object.entry("properties").or_insert_with(|| json!({}));
        object.insert("additionalProperties".into(), Value::Bool(false));
    }
    schema
}

/// The schema of a tool's answer: always an object.
pub(super) fn output<T: JsonSchema>() -> Value {
    generate::<T>(SchemaSettings::draft2020_12().for_serialize())
}

fn generate<T: JsonSchema>(mut settings: SchemaSettings) -> Value {
    settings.inline_subschemas = true;
    settings.meta_schema = None;
    let mut schema = settings.into_generator().into_root_schema_for::<T>().to_value();
    clean(&mut schema);
    if let Some(object) = schema.as_object_mut() {
        object.shift_remove("title");
        object.shift_remove("description");
    }
    schema
}

fn clean(schema: &mut Value) {
    let Value::Object(object) = schema else { return };
    flatten_union(object);
    object.shift_remove("format");
    if object.get("default").is_some_and(Value::is_null) {
        object.shift_remove("default");
    }
    if let Some(Value::Array(types)) = object.get_mut("type") {
        types.retain(|name| name != "null");
        if let [only] = types.as_slice() {
            let only = only.clone();
            object.insert("type".into(), only);
        }
    }
    if let Some(Value::Array(values)) = object.get_mut("enum") {
        values.retain(|value| !value.is_null());
    }
    for key in ["items", "additionalProperties"] {
        if let Some(below) = object.get_mut(key) {
            clean(below);
        }
    }
    if let Some(Value::Object(properties)) = object.get_mut("properties") {
        properties.values_mut().for_each(clean);
    }
}

/// `anyOf: [X, null]`, as an optional field gives, becomes X; `oneOf` of constants, as an enum with described
/// variants gives, becomes one `enum`.
fn flatten_union(object: &mut Map<String, Value>) {
    if let Some(Value::Array(mut branches)) = object.shift_remove("anyOf") {
        branches.retain(|branch| branch.get("type").is_none_or(|name| name != "null"));
        if let [Value::Object(only)] = branches.as_slice() {
            for (key, value) in only.clone() {
                object.entry(key).or_insert(value);
            }
        } else {
            object.insert("anyOf".into(), Value::Array(branches));
        }
    }
    if let Some(Value::Array(branches)) = object.shift_remove("oneOf") {
        let constants: Option<Vec<Value>> = branches
            .iter()
            .map(|branch| {
                branch
                    .get("const")
                    .map(|value| vec![value.clone()])
                    .or_else(|| branch.get("enum").and_then(Value::as_array).cloned())
            })
            .collect::<Option<Vec<_>>>()
            .map(|lists| lists.concat());
        match constants {
            Some(values) => {
                object.insert("type".into(), json!("string"));
                object.insert("enum".into(), Value::Array(values));
            }
            None => {
                object.insert("oneOf".into(), Value::Array(branches));
            }
        }
    }
}

/// Refuses unknown fields and values out of range, in the words of the schema. Types are left to the decoder.
pub(super) fn check(schema: &Value, arguments: &Value) -> Result<(), ToolError> {
    let Value::Object(given) = arguments else {
        return Err(ToolError::invalid("arguments", "expected a JSON object of named arguments"));
    };
    let no_properties = Map::new();
    let known = schema.get("properties").and_then(Value::as_object).unwrap_or(&no_properties);
    for (name, value) in given {
        let Some(property) = known.get(name) else {
            let names: Vec<_> = known.keys().map(String::as_str).collect();
            let expected = match names.as_slice() {
                [] => "unknown field; this tool takes no arguments".to_owned(),
                names => format!("unknown field; expected one of: {}", names.join(", ")),
            };
            return Err(ToolError::invalid(name, expected));
        };
        check_type(name, property, value)?;
        check_bounds(name, property, value)?;
    }
    if let Some(Value::Array(required)) = schema.get("required") {
        for name in required.iter().filter_map(Value::as_str) {
            if given.get(name).is_none_or(Value::is_null) {
                return Err(ToolError::invalid(name, format!("is required{}", described(known.get(name)))));
            }
        }
    }
    Ok(())
}

/// The decoder would say the same in the words of its own language.
fn check_type(name: &str, schema: &Value, value: &Value) -> Result<(), ToolError> {
    let Some(expected) = schema.get("type").and_then(Value::as_str) else { return Ok(()) };
    let fits = match (expected, value) {
        // Left out in so many words.
        (_, Value::Null) => true,
        ("integer", Value::Number(number)) => number.is_u64() || number.is_i64(),
        ("number", Value::Number(_)) | ("string", Value::String(_)) | ("boolean", Value::Bool(_)) => true,
        ("array", Value::Array(_)) | ("object", Value::Object(_)) => true,
        ("integer" | "number" | "string" | "boolean" | "array" | "object", _) => false,
        _ => true,
    };
    if fits {
        return Ok(());
    }
    let article = if expected.starts_with(['a', 'i', 'o']) { "an" } else { "a" };
    let what = described(Some(schema));
    Err(ToolError::invalid(name, format!("expected {article} {expected}, not {}{what}", short(value))))
}

/// A value as an error quotes it.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn check_bounds(name: &str, schema: &Value, value: &Value) -> Result<(), ToolError> {
    let bound = |key: &str| schema.get(key).and_then(Value::as_f64);
    let outside = |expected: String| {
        Err(ToolError::invalid(
            name,
            format!("{value} is out of range; expected {expected}{}", described(Some(schema))),
        ))
    };
    if let Some(number) = value.as_f64() {
        if let Some(least) = bound("minimum").filter(|least| number < *least) {
            return outside(format!("at least {least}"));
        }
        if let Some(most) = bound("maximum").filter(|most| number > *most) {
            return outside(format!("at most {most}"));
        }
    }
    if let Some(text) = value.as_str() {
        let length = text.chars().count() as f64;
        if let Some(least) = bound("minLength").filter(|least| length < *least) {
            return outside(format!("at least {least} characters"));
        }
        if let Some(most) = bound("maxLength").filter(|most| length > *most) {
            return outside(format!("at most {most} characters"));
        }
    }
    if let Some(items) = value.as_array() {
        if let Some(most) = bound("maxItems").filter(|most| items.len() as f64 > *most) {
            return outside(format!("at most {most} items"));
        }
        if let Some(below) = schema.get("items") {
            for (index, item) in items.iter().enumerate() {
                check_bounds(&format!("{name}[{index}]"), below, item)?;
            }
        }
    }
    Ok(())
}

fn described(property: Option<&Value>) -> String {
    match property.and_then(|property| property.get("description")).and_then(Value::as_str) {
        Some(text) => format!(" ({})", text.trim_end_matches('.')),
        None => String::new(),
    }
}
