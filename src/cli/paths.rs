//! Paths that a person types are relative to their folder. Tools take absolute paths only, because a server's folder
//! is arbitrary, so the command line completes them before the call. Which fields hold paths is marked in the input
//! schema with [`PATH_MARK`].

use std::path::Path;

use serde_json::Value;

use crate::tools::{ErrorKind, PATH_MARK, ToolDef, ToolError};

/// Makes every path in a tool's arguments absolute.
pub(super) fn complete(tool: &ToolDef, arguments: &mut Value) -> Result<(), ToolError> {
    let folder = std::env::current_dir().map_err(|error| {
        ToolError::new(ErrorKind::Setup, format!("the current folder can't be used: {error}"))
            .hint("change to a folder that exists")
    })?;
    complete_against(&folder, &(tool.input_schema)(), arguments);
    Ok(())
}

fn complete_against(folder: &Path, schema: &Value, value: &mut Value) {
    if schema.get(PATH_MARK) == Some(&Value::Bool(true)) {
        return complete_all(folder, value);
    }
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let below = schema.get("properties").and_then(|properties| properties.get(name));
                if let Some(below) = below.or_else(|| schema.get("additionalProperties")) {
                    complete_against(folder, below, value);
                }
            }
        }
        Value::Array(items) => {
            if let Some(below) = schema.get("items") {
                items.iter_mut().for_each(|item| complete_against(folder, below, item));
            }
        }
        _ => {}
    }
}

fn complete_all(folder: &Path, value: &mut Value) {
    match value {
        Value::String(path) if !path.is_empty() => {
            if let Some(absolute) = folder.join(&path).to_str() {
                *path = absolute.to_owned();
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| complete_all(folder, item)),
        Value::Object(fields) => fields.values_mut().for_each(|value| complete_all(folder, value)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn completes_marked_fields_only() {
        let schema = json!({"properties": {
            "workflow_path": {"type": "string", "x-path": true},
            "inputs": {"type": "array", "x-path": true, "items": {"type": "string"}},
            "files": {"type": "object", "additionalProperties": {"type": "string", "x-path": true}},
            "name": {"type": "string"},
        }});
        let mut arguments = json!({
            "workflow_path": "a.json", "inputs": ["b.png", "/c.png"], "files": {"mask": "../d.png"}, "name": "comfy",
        });
        complete_against(Path::new("/home/me"), &schema, &mut arguments);
        assert_eq!(
            arguments,
            json!({
                "workflow_path": "/home/me/a.json",
                "inputs": ["/home/me/b.png", "/c.png"],
                "files": {"mask": "/home/me/../d.png"},
                "name": "comfy",
            })
        );
    }
}
