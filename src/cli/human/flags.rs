//! Flags from an input schema, and arguments from flags.

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, ArgMatches, value_parser};
use serde_json::{Map, Value, json};

use super::{Row, WAIT_FIELD, in_commands};
use crate::tools::{PATH_MARK, ToolDef, ToolError};

/// How a field is written on the command line.
enum Kind {
    Text,
    Integer,
    Number,
    /// `--flag`, or `--flag=false` to say so.
    Switch,
    /// The flag may be repeated.
    List(Box<Kind>),
    /// An object with one text that is required: that text alone, or the whole object as JSON.
    TextOf(String),
    /// Anything deeper, as JSON.
    Json,
}

impl Kind {
    fn of(schema: &Value) -> Self {
        match schema.get("type").and_then(Value::as_str) {
            Some("string") => Self::Text,
            Some("integer") => Self::Integer,
            Some("number") => Self::Number,
            Some("boolean") => Self::Switch,
            Some("array") => match schema.get("items").map(Self::of) {
                Some(item @ (Self::Text | Self::Integer | Self::Number | Self::TextOf(_))) => {
                    Self::List(Box::new(item))
                }
                _ => Self::Json,
            },
            Some("object") => match schema.get("required").and_then(Value::as_array).map(Vec::as_slice) {
                Some([Value::String(only)]) if schema["properties"][only]["type"] == "string" => {
                    Self::TextOf(only.clone())
                }
                _ => Self::Json,
            },
            _ => Self::Json,
        }
    }
}

struct Field {
    name: String,
    schema: Value,
    required: bool,
}

/// The fields that are left to the user, in the schema's order.
fn fields(row: &Row, tool: &ToolDef) -> Vec<Field> {
    let schema = (tool.input_schema)();
    let required: Vec<String> = schema
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|name| name.as_str().map(str::to_owned))
        .collect();
    let fixed = row.fixed();
    let properties = schema.get("properties").and_then(Value::as_object).cloned().unwrap_or_default();
    properties
        .into_iter()
        .filter(|(name, _)| name != WAIT_FIELD && !fixed.contains_key(name) && !row.without.contains(&name.as_str()))
        .map(|(name, schema)| Field { required: required.contains(&name), name, schema })
        .collect()
}

pub(super) fn of(row: &Row, tool: &ToolDef) -> Vec<Arg> {
    fields(row, tool).into_iter().map(|field| flag(row, field)).collect()
}

fn flag(row: &Row, field: Field) -> Arg {
    let kind = Kind::of(&field.schema);
    let help = field.schema.get("description").and_then(Value::as_str).unwrap_or_default().trim_end_matches('.');
    let help = in_commands(help);
    // Tools want absolute paths; a person's are completed before the call.
    let help = match field.schema.get(PATH_MARK) {
        Some(_) => help.replacen("Absolute path", "Path", 1),
        None => help,
    };
    let mut arg =
        Arg::new(field.name.clone()).help(help).required(field.required).value_name(field.name.to_uppercase());
    if row.positional != Some(field.name.as_str()) {
        arg = arg.long(field.name.replace('_', "-"));
    }
    match &kind {
        Kind::Switch => arg
            .action(ArgAction::Set)
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
            .value_parser(value_parser!(bool))
            .hide_possible_values(true)
            .value_name("BOOL"),
        Kind::List(item) => {
            // One at a time reads better in the singular.
            if let Some(one) = field.name.strip_suffix('s') {
                arg = arg.visible_alias(one.replace('_', "-")).value_name(one.to_uppercase());
            }
            parsed(arg.action(ArgAction::Append), item, field.schema.get("items"))
        }
        kind => parsed(arg, kind, Some(&field.schema)),
    }
}

fn parsed(arg: Arg, kind: &Kind, schema: Option<&Value>) -> Arg {
    match kind {
        Kind::Integer => arg.value_parser(value_parser!(i64)).allow_negative_numbers(true),
        Kind::Number => arg.value_parser(value_parser!(f64)).allow_negative_numbers(true),
        Kind::Text => match schema.and_then(|schema| schema.get("enum")).and_then(Value::as_array) {
            Some(words) => {
                let words: Vec<String> = words.iter().filter_map(|word| word.as_str().map(str::to_owned)).collect();
                arg.value_parser(PossibleValuesParser::new(words))
            }
            None => arg,
        },
        Kind::Json => arg.value_name("JSON"),
        Kind::Switch | Kind::List(_) | Kind::TextOf(_) => arg,
    }
}

/// What was given, and what the row fixes. Fields that were not given are left out.
pub(super) fn arguments(row: &Row, tool: &ToolDef, matches: &ArgMatches) -> Result<Map<String, Value>, ToolError> {
    let mut arguments = row.fixed();
    for field in fields(row, tool) {
        let kind = Kind::of(&field.schema);
        let mut values = match &kind {
            Kind::List(item) => given(item, &field.name, matches)?,
            kind => given(kind, &field.name, matches)?,
        };
        let value = match kind {
            Kind::List(_) if !values.is_empty() => Value::Array(values),
            Kind::List(_) => continue,
            _ => match values.pop() {
                Some(value) => value,
                None => continue,
            },
        };
        arguments.insert(field.name, value);
    }
    Ok(arguments)
}

fn given(kind: &Kind, name: &str, matches: &ArgMatches) -> Result<Vec<Value>, ToolError> {
    Ok(match kind {
        Kind::Integer => all::<i64>(name, matches).map(Value::from).collect(),
        Kind::Number => all::<f64>(name, matches).map(Value::from).collect(),
        Kind::Switch => all::<bool>(name, matches).map(Value::from).collect(),
        Kind::Text => all::<String>(name, matches).map(Value::from).collect(),
        Kind::TextOf(only) => all::<String>(name, matches)
            .map(|text| match serde_json::from_str(&text) {
                Ok(object @ Value::Object(_)) => object,
                _ => json!({ only: text }),
            })
            .collect(),
        Kind::Json | Kind::List(_) => all::<String>(name, matches)
            .map(|text| {
                serde_json::from_str(&text).map_err(|error| ToolError::invalid(name, format!("not JSON: {error}")))
            })
            .collect::<Result<_, _>>()?,
    })
}

fn all<'a, T: Clone + Send + Sync + 'static>(name: &str, matches: &'a ArgMatches) -> impl Iterator<Item = T> + 'a {
    matches.get_many::<T>(name).into_iter().flatten().cloned()
}
