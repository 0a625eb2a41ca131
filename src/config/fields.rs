//! What may stand in `config.json`: one table that reading, setting and showing go by.

use std::path::Path;

use serde_json::{Map, Value};

use super::{ConfigError, limits};

/// One thing that can be set. A dot in its name leads into `limits`.
pub struct Field {
    pub name: &'static str,
    /// What its value must be, in words.
    pub expected: &'static str,
    pub(super) is_valid: fn(&Value) -> bool,
}

const GENERAL: [Field; 4] = [
    Field { name: API_KEY, expected: "a text, RunPod's API key", is_valid: Value::is_string },
    Field { name: API_BASE_URL, expected: "a text, a URL like https://api.runpod.io", is_valid: Value::is_string },
    Field { name: "default_volume_id", expected: "a text, a volume's id or name", is_valid: Value::is_string },
    Field {
        name: "default_volume_mount",
        expected: "a text, a folder in the pod that begins with `/`, like /workspace",
        is_valid: is_pod_folder,
    },
];

/// The one field whose value is never shown.
pub const API_KEY: &str = "api_key";
pub(super) const API_BASE_URL: &str = "api_base_url";
pub(super) const LIMITS: &str = "limits";

/// Every field, in the order in which they are shown.
pub fn all() -> impl Iterator<Item = &'static Field> {
    GENERAL.iter().chain(&limits::FIELDS)
}

/// The names in a config file that mean nothing to us.
pub fn unknown(file: &Map<String, Value>) -> Vec<String> {
    let limits = file.get(LIMITS).and_then(Value::as_object);
    let outer = file.keys().filter(|name| *name != LIMITS).cloned();
    let inner = limits.into_iter().flat_map(Map::keys).map(|name| format!("{LIMITS}.{name}"));
    outer.chain(inner).filter(|name| !all().any(|field| field.name == name)).collect()
}

impl Field {
    /// What a config file says of it. Outside of the limits, which guard money, nothing and an empty text are the same
    /// as a field that is left out.
    pub fn value_in<'f>(&self, file: &'f Map<String, Value>) -> Option<&'f Value> {
        match self.name.split_once('.') {
            Some((group, name)) => file.get(group)?.get(name),
            None => file
                .get(self.name)
                .filter(|value| !value.is_null() && value.as_str().is_none_or(|text| !text.trim().is_empty())),
        }
    }

    pub(super) fn check_in(&self, file: &Map<String, Value>, path: &Path) -> Result<(), ConfigError> {
        match self.value_in(file) {
            Some(value) if !(self.is_valid)(value) => Err(ConfigError::Field {
                path: path.to_owned(),
                field: self.name,
                // It may be the key, in another type than a text.
                found: if self.name == API_KEY { "(hidden)".to_owned() } else { value.to_string() },
                expected: self.expected,
            }),
            _ => Ok(()),
        }
    }
}

fn is_pod_folder(value: &Value) -> bool {
    value.as_str().is_some_and(|path| path.starts_with('/') && path != "/" && !path.contains(".."))
}
