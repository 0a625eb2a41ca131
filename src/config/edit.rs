//! Changing `config.json` by name of field, leaving everything else in it as it is.

use std::time::Duration;

use serde_json::{Map, Value};

use super::fields::{Field, LIMITS};
use super::settings::read_object;
use super::{Config, ConfigError, Home};
use crate::state::{self, Lock};

/// What becomes of one field; `None` takes it out, so that its default counts.
pub type Change = (&'static Field, Option<Value>);

/// Makes the changes in one go: all or none. Two of these at once lose nothing, for the file is read under the lock; a
/// file that can't be read, or that the changes would break, stays as it is.
pub fn change(home: &Home, patience: Duration, changes: Vec<Change>) -> Result<(), ConfigError> {
    let path = home.config_file();
    let _lock = Lock::take(&home.lock("state"), patience)?;
    let mut file = read_object(&path)?.unwrap_or_default();
    for (field, value) in changes {
        field.put_in(&mut file, value);
    }
    Config::of(&file, &path)?;
    Ok(state::write_json(&path, &file)?)
}

impl Field {
    /// A value as it is typed in a shell.
    pub fn parse(&self, text: &str) -> Result<Value, ConfigError> {
        let as_text = Value::from(text.trim());
        let typed = || serde_json::from_str(text).ok().filter(|value| (self.is_valid)(value));
        let parsed = if (self.is_valid)(&as_text) { Some(as_text) } else { typed() };
        parsed.filter(|value| value.as_str().is_none_or(|text| !text.is_empty())).ok_or_else(|| ConfigError::Value {
            field: self.name,
            found: text.to_owned(),
            expected: self.expected,
        })
    }

    fn put_in(&self, file: &mut Map<String, Value>, value: Option<Value>) {
        let (fields, name) = match self.name.split_once('.') {
            None => (file, self.name),
            Some(_) if value.is_none() && !file.contains_key(LIMITS) => return,
            Some((_, name)) => {
                let limits = file.entry(LIMITS).or_insert_with(|| Value::Object(Map::new()));
                // What is no object is told by the check that follows.
                let Some(limits) = limits.as_object_mut() else { return };
                (limits, name)
            }
        };
        match value {
            Some(value) => drop(fields.insert(name.to_owned(), value)),
            None => drop(fields.shift_remove(name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::all_fields;
    use super::*;

    fn field(name: &str) -> &'static Field {
        all_fields().find(|field| field.name == name).unwrap()
    }

    #[test]
    fn values_are_parsed_by_what_the_field_must_be() {
        assert_eq!(field("limits.max_pods").parse("3").unwrap(), 3);
        assert_eq!(field("limits.max_usd_per_day").parse("2.5").unwrap(), 2.5);
        assert_eq!(field("default_volume_id").parse("12").unwrap(), "12");
        for (name, text) in [
            ("limits.max_pods", "2.5"),
            ("limits.max_pods", "-1"),
            ("limits.max_usd_per_day", "NaN"),
            ("limits.max_usd_per_day", "inf"),
            ("limits.max_usd_per_day", "$5"),
            ("limits.max_lifetime_minutes", "0"),
            ("default_volume_id", " "),
            ("default_volume_mount", "~/data"),
        ] {
            let error = field(name).parse(text).expect_err(text).to_string();
            assert!(error.contains(name) && error.contains(text), "{error}");
        }
    }

    #[test]
    fn a_change_keeps_what_it_does_not_name_and_leaves_a_broken_file_alone() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(folder.path().join("home")).unwrap();
        let patience = Duration::from_secs(5);
        let text = r#"{"gpu": "any", "limits": {"max_pods": 1, "colour": "red"}}"#;
        state::write_file(&home.config_file(), text.as_bytes()).unwrap();
        let mount = field("default_volume_mount");
        change(&home, patience, vec![(mount, Some("/data".into())), (field("limits.max_pods"), None)]).unwrap();
        let file = read_object(&home.config_file()).unwrap().unwrap();
        let wanted = serde_json::json!({"gpu": "any", "limits": {"colour": "red"}, "default_volume_mount": "/data"});
        assert_eq!(Value::Object(file), wanted);
        for broken in ["{\"api_key\": ", "[]", "{\"limits\": 7}", "{\"limits\": {\"max_lifetime_minutes\": 9}}"] {
            state::write_file(&home.config_file(), broken.as_bytes()).unwrap();
            let value = Some(100.into());
            change(&home, patience, vec![(field("limits.default_lifetime_minutes"), value)]).expect_err(broken);
            assert_eq!(std::fs::read_to_string(home.config_file()).unwrap(), broken);
        }
    }
}
