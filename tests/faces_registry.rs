//! What every tool owes its clients, and the files in `tool-schemas/` that show each change of it in a review.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;

use autopod_mcp::server::catalog::{self, Annotations};
use autopod_mcp::tools::{Effect, ErrorKind, TOOLS, ToolDef};

/// Words of JSON Schema that some client or other refuses.
const UNWELCOME: [&str; 9] = ["$ref", "$defs", "$schema", "definitions", "format", "anyOf", "oneOf", "allOf", "x-path"];

#[test]
fn names_are_unique_and_fit_every_client() {
    let mut names = BTreeSet::new();
    for tool in TOOLS {
        let mut characters = tool.name.chars();
        assert!(characters.next().is_some_and(|first| first.is_ascii_lowercase()), "{}", tool.name);
        assert!(
            characters.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'),
            "{} is not snake_case",
            tool.name
        );
        assert!((2..=64).contains(&tool.name.len()), "{}", tool.name);
        assert!(names.insert(tool.name), "{} is there twice", tool.name);
    }
}

#[test]
fn every_tool_is_described_and_its_example_decodes() {
    for tool in TOOLS {
        assert!(!tool.title.is_empty() && !tool.description.is_empty(), "{}", tool.name);
        assert!(!tool.description.contains("  "), "{}: a line break left its indent in the text", tool.name);
        let example = serde_json::from_str(tool.example).unwrap_or_else(|error| panic!("{}: {error}", tool.name));
        tool.check(example).unwrap_or_else(|error| panic!("{}: {error}", tool.name));
    }
}

#[test]
fn every_input_field_is_described() {
    for tool in TOOLS {
        each_schema(tool.name, &catalog::input_schema(tool), &mut |path, schema| {
            let is_field = path.contains('.') && !path.ends_with("[]") && !path.ends_with(".*");
            let described = schema["description"].as_str().is_some_and(|text| !text.is_empty());
            assert!(!is_field || described, "{path} has no description");
        });
    }
}

#[test]
fn schemas_have_nothing_that_clients_stumble_over() {
    for tool in TOOLS {
        let entry = catalog::entry(tool);
        for root in ["inputSchema", "outputSchema"] {
            assert_eq!(entry[root]["type"], "object", "{}: the root of {root}", tool.name);
            each_schema(&format!("{} {root}", tool.name), &entry[root], &mut |path, schema| {
                for word in UNWELCOME {
                    assert!(schema.get(word).is_none(), "{path} has {word}: {schema}");
                }
                assert!(!schema["type"].is_array(), "{path} is a union: {schema}");
                assert!(schema.get("default").is_none_or(|default| !default.is_null()), "{path} has a default of null");
            });
        }
        assert_eq!(entry["inputSchema"]["additionalProperties"], false, "{}", tool.name);
    }
}

#[test]
fn an_unknown_field_is_refused_with_the_known_ones() {
    for tool in TOOLS {
        let mut arguments: Value = serde_json::from_str(tool.example).expect("the example is JSON");
        arguments["no_such_field"] = Value::from(1);
        let error = tool.check(arguments).expect_err("an unknown field is refused");
        assert_eq!(error.kind, ErrorKind::InvalidInput);
        assert!(error.message.contains(tool.name) && error.message.contains("`no_such_field`"), "{error}");
        for field in catalog::input_schema(tool)["properties"].as_object().into_iter().flat_map(|all| all.keys()) {
            assert!(error.message.contains(field), "{}: {field} is not named in: {error}", tool.name);
        }
    }
}

#[test]
fn annotations_follow_from_the_effect() {
    let hints = |effect| {
        let Annotations { read_only_hint, destructive_hint, idempotent_hint, .. } = Annotations::from(effect);
        (read_only_hint, destructive_hint, idempotent_hint)
    };
    assert_eq!(hints(Effect::Reads), (true, false, true));
    assert_eq!(hints(Effect::Creates), (false, false, false));
    assert_eq!(hints(Effect::Changes), (false, false, true));
    assert_eq!(hints(Effect::Destroys), (false, true, true));
    for tool in TOOLS {
        let published = &catalog::entry(tool)["annotations"];
        assert_eq!(published["readOnlyHint"], tool.effect == Effect::Reads, "{}", tool.name);
        assert_eq!(published["destructiveHint"], tool.effect == Effect::Destroys, "{}", tool.name);
    }
}

#[test]
fn tool_schemas_are_up_to_date() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tool-schemas");
    std::fs::create_dir_all(&folder).expect("the folder can be made");
    let file_of = |tool: &ToolDef| folder.join(format!("{}.json", tool.name));
    let mut stale = Vec::new();
    for tool in TOOLS {
        let wanted = format!("{:#}\n", catalog::contract(tool));
        let file = file_of(tool);
        if std::fs::read_to_string(&file).unwrap_or_default() != wanted {
            std::fs::write(&file, wanted).expect("the file can be written");
            stale.push(file);
        }
    }
    let wanted: BTreeSet<PathBuf> = TOOLS.iter().map(file_of).collect();
    let left_over: Vec<PathBuf> = std::fs::read_dir(&folder)
        .expect("the folder can be read")
        .map(|entry| entry.expect("its entries can be read").path())
        .filter(|path| !wanted.contains(path))
        .collect();
    assert!(stale.is_empty(), "these were out of date and are rewritten; review and commit them: {stale:#?}");
    assert!(left_over.is_empty(), "no tool has these; remove them: {left_over:#?}");
}

/// What a client puts into its model's context before the first call.
#[test]
fn the_size_of_the_list_is_told() {
    let size =
        |tool: &ToolDef| tool.name.len() + tool.description.len() + catalog::input_schema(tool).to_string().len();
    let total: usize = TOOLS.iter().map(size).sum();
    let mut report = format!("{} tools, {total} bytes of names, descriptions and input schemas\n", TOOLS.len());
    for tool in TOOLS {
        report.push_str(&format!("  {:>6}  {}\n", size(tool), tool.name));
    }
    std::io::stdout().write_all(report.as_bytes()).expect("stdout is open");
    assert!(total < 100_000, "25,000 tokens are what one client gives to all its tools together:\n{report}");
}

/// Calls `look` with every schema below this one and the path to it.
fn each_schema(path: &str, schema: &Value, look: &mut impl FnMut(&str, &Value)) {
    look(path, schema);
    for (name, below) in schema["properties"].as_object().into_iter().flatten() {
        each_schema(&format!("{path}.{name}"), below, look);
    }
    if schema["items"].is_object() {
        each_schema(&format!("{path}[]"), &schema["items"], look);
    }
    if schema["additionalProperties"].is_object() {
        each_schema(&format!("{path}.*"), &schema["additionalProperties"], look);
    }
}
