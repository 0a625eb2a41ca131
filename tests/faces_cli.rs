//! The command line: `call`, `tools`, commands as rows over the tools, exit codes.

use std::process::Stdio;

use serde_json::Value;
use tokio::io::AsyncWriteExt;

use crate::faces_support::TestHome;
use crate::support::program::PATIENCE;
use autopod_mcp::cli::human;
use autopod_mcp::tools::{self, TOOLS};

#[tokio::test]
async fn a_call_without_a_key_says_how_to_set_one() {
    let home = TestHome::new();
    for arguments in [&["call", "list_gpus"][..], &["gpu", "list"], &["gpu", "ls", "--json"]] {
        let (code, stdout, stderr) = home.run(arguments).await;
        assert_eq!((code, stdout.as_str()), (1, ""), "{arguments:?}: {stderr}");
        assert!(stderr.contains("list_gpus") && stderr.contains("RUNPOD_API_KEY"), "{arguments:?}: {stderr}");
    }
}

#[tokio::test]
async fn invalid_input_is_exit_code_2_and_names_the_place() {
    let home = TestHome::new();
    let cases: [(&[&str], &[&str]); 9] = [
        (&["call", "no_such_tool"], &["no_such_tool", "list_gpus"]),
        (&["call", "list_gpus", "{\"min_vram_gb\": "], &["arguments", "line 1 column 16"]),
        (&["call", "list_gpus", "[]"], &["list_gpus", "object"]),
        (&["call", "list_gpus", "{\"min_vram\": 1}"], &["list_gpus", "`min_vram`", "min_vram_gb"]),
        (&["call", "list_gpus", "{\"min_vram_gb\": \"24\"}"], &["list_gpus", "`min_vram_gb`"]),
        (&["call", "list_gpus", "{\"gpu_count\": 99}"], &["list_gpus", "`gpu_count`", "99", "16"]),
        (&["gpu", "list", "--gpu-count", "99"], &["list_gpus", "`gpu_count`"]),
        (&["gpu", "list", "--gpu-count", "many"], &["--gpu-count"]),
        (&["gpu", "list", "--colour", "red"], &["--colour"]),
    ];
    for (arguments, words) in cases {
        let (code, stdout, stderr) = home.run(arguments).await;
        assert_eq!((code, stdout.as_str()), (2, ""), "{arguments:?}: {stderr}");
        for word in words {
            assert!(stderr.contains(word), "{arguments:?} doesn't say `{word}`: {stderr}");
        }
    }
}

#[tokio::test]
async fn arguments_come_from_stdin_up_to_a_bound() {
    let home = TestHome::new();
    let too_much = format!("{{\"a\": \"{}\"}}", "x".repeat(9 << 20));
    for (input, word) in [("{\"min_vram\": 1}", "`min_vram`"), (too_much.as_str(), "bytes")] {
        let mut child =
            home.command(&["call", "list_gpus", "-"]).stdin(Stdio::piped()).spawn().expect("the program starts");
        let mut stdin = child.stdin.take().expect("stdin is a pipe");
        // It may end before it has read everything.
        let _ = stdin.write_all(input.as_bytes()).await;
        drop(stdin);
        let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.expect("it ends").expect("it ran");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(word), "{stderr}");
    }
}

#[tokio::test]
async fn tools_are_listed_for_people_and_for_programs() {
    let home = TestHome::new();
    let (code, table, _) = home.run(&["tools"]).await;
    assert_eq!(code, 0);
    let (code, list, _) = home.run(&["tools", "--json"]).await;
    assert_eq!(code, 0);
    let list: Value = serde_json::from_str(&list).expect("it is JSON");
    let names: Vec<_> = list["tools"].as_array().into_iter().flatten().map(|tool| tool["name"].clone()).collect();
    assert_eq!(names, TOOLS.iter().map(|tool| tool.name).collect::<Vec<_>>());
    for tool in TOOLS {
        assert!(table.contains(tool.name), "{table}");
    }
    assert!(!home.path().exists(), "listing the tools needs no home");
}

#[tokio::test]
async fn help_shows_the_fields_of_the_schema_as_flags() {
    let home = TestHome::new();
    let (code, help, _) = home.run(&["gpu", "list", "--help"]).await;
    assert_eq!(code, 0);
    for words in
        ["--min-vram-gb", "Least video memory in GB", "--max-price-per-hour", "--include-unavailable", "--json"]
    {
        assert!(help.contains(words), "{words} is missing: {help}");
    }
}

#[tokio::test]
async fn help_for_people_names_commands_and_no_tools() {
    let home = TestHome::new();
    for row in human::ROWS {
        let path: Vec<_> = row.path.split(' ').chain(["--help"]).collect();
        let (code, help, _) = home.run(&path).await;
        assert_eq!(code, 0, "{help}");
        for tool in TOOLS.iter().filter(|tool| tool.name != row.path) {
            assert!(!help.contains(tool.name), "`{}` speaks of {}: {help}", row.path, tool.name);
        }
    }
    let (_, help, _) = home.run(&["pod", "create", "--help"]).await;
    assert!(help.contains("until `pod kill`"), "{help}");
}

#[test]
fn every_row_names_a_tool_and_fields_that_exist() {
    let mut paths = Vec::new();
    for row in human::ROWS {
        let tool = tools::find(row.tool).unwrap_or_else(|| panic!("`{}` names no tool", row.path));
        let schema = (tool.input_schema)();
        let fields = schema["properties"].as_object().expect("an input schema has properties");
        assert!(row.path.split(' ').count() <= 2, "{}", row.path);
        if let Some(positional) = row.positional {
            assert!(fields.contains_key(positional), "`{}`: no field {positional}", row.path);
        }
        let fixed: Value = serde_json::from_str(row.fixed).expect("fixed fields are JSON");
        for field in fixed.as_object().expect("fixed fields are an object").keys() {
            assert!(fields.contains_key(field), "`{}`: no field {field}", row.path);
        }
        for path in std::iter::once(&row.path).chain(row.aliases) {
            assert!(!paths.contains(path), "`{path}` is there twice");
            paths.push(path);
        }
    }
    // clap's own checks: no flag twice, no required argument behind an optional one, and the like.
    human::add_commands(clap::Command::new("autopod-mcp")).debug_assert();
}
