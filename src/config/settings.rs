//! What the user set in `config.json`.

use std::path::Path;

use secrecy::SecretString;
use serde_json::{Map, Value};

use super::fields::{self, API_BASE_URL, API_KEY, LIMITS};
use super::limits::Limits;
use super::{ConfigError, Home, refuse_open_file};
use crate::state;

/// What the user set in `config.json`. Flags and arguments override it.
#[derive(Debug, Clone, Default)]
pub struct Config {
    pub api_key: Option<SecretString>,
    pub api_base_url: Option<String>,
    /// The volume that a create mounts when it names none: id or name.
    pub default_volume_id: Option<String>,
    pub default_volume_mount: Option<String>,
    pub limits: Limits,
}

/// How the provider is reached, as the file says it. It can be read from a file that breaks a rule elsewhere, for a
/// mistyped limit must keep nobody from ending a pod.
#[derive(Debug, Clone, Default)]
pub struct Access {
    pub api_key: Option<SecretString>,
    pub api_base_url: Option<String>,
}

impl Access {
    pub fn of(config: &Config) -> Self {
        Self { api_key: config.api_key.clone(), api_base_url: config.api_base_url.clone() }
    }

    /// From a file that is JSON and closed to others, whatever else stands in it.
    pub fn read(home: &Home) -> Result<Self, ConfigError> {
        let path = home.config_file();
        let Some(file) = read_object(&path)? else { return Ok(Self::default()) };
        let access =
            Self { api_key: text(&file, API_KEY).map(SecretString::from), api_base_url: text(&file, API_BASE_URL) };
        if access.api_key.is_some() {
            refuse_open_file(&path)?;
        }
        Ok(access)
    }
}

impl Config {
    /// What the file of this home says, and the defaults for what it doesn't. A value that breaks its rule is an error
    /// and never silently the default: a cap that was mistyped would be no cap.
    pub fn read(home: &Home) -> Result<Self, ConfigError> {
        let path = home.config_file();
        let Some(file) = read_object(&path)? else { return Ok(Self::default()) };
        for unknown in fields::unknown(&file) {
            tracing::warn!(
                "{}: the field `{unknown}` is not known and has no effect; known are {}",
                path.display(),
                fields::all().map(|field| field.name).collect::<Vec<_>>().join(", ")
            );
        }
        let config = Self::of(&file, &path)?;
        if config.api_key.is_some() {
            refuse_open_file(&path)?;
        }
        Ok(config)
    }

    /// What the file of a sandbox's home says: limits and defaults count there, a key and an address don't, for both
    /// are the sandbox's own.
    pub fn read_for_sandbox(home: &Home) -> Result<Self, ConfigError> {
        Ok(Self { api_key: None, api_base_url: None, ..Self::read(home)? })
    }

    /// The settings that these fields make, which `path` holds or is to hold.
    pub(super) fn of(file: &Map<String, Value>, path: &Path) -> Result<Self, ConfigError> {
        let limits = match file.get(LIMITS) {
            None => Map::new(),
            Some(Value::Object(limits)) => limits.clone(),
            Some(found) => {
                let (found, expected) = (found.to_string(), "an object, like {\"max_usd_per_day\": 10}");
                return Err(ConfigError::Field { path: path.to_owned(), field: LIMITS, found, expected });
            }
        };
        for field in fields::all() {
            field.check_in(file, path)?;
        }
        let wrong = |error: super::limits::LimitsError| ConfigError::Limits {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        Ok(Self {
            api_key: text(file, API_KEY).map(SecretString::from),
            api_base_url: text(file, API_BASE_URL),
            default_volume_id: text(file, "default_volume_id"),
            default_volume_mount: text(file, "default_volume_mount"),
            limits: Limits::of(&limits).map_err(wrong)?,
        })
    }
}

fn text(file: &Map<String, Value>, name: &str) -> Option<String> {
    fields::all().find(|field| field.name == name)?.value_in(file)?.as_str().map(|text| text.trim().to_owned())
}

/// The fields of a config file as they stand there; `None` when there is no file. An error never repeats the content,
/// which may be a key.
pub fn read_object(path: &Path) -> Result<Option<Map<String, Value>>, ConfigError> {
    let Some(bytes) = state::read_file(path)? else { return Ok(None) };
    let unreadable = |reason: String| ConfigError::Unreadable { path: path.to_owned(), reason };
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(fields)) => Ok(Some(fields)),
        Ok(_) => Err(unreadable("it is JSON, but no object like {\"api_key\": \"...\"}".to_owned())),
        Err(error) => Err(unreadable(format!("it is not JSON ({error}); mend it, or move it away"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(folder.path().join("home")).unwrap();
        state::write_file(&home.config_file(), text.as_bytes()).unwrap();
        Config::read(&home)
    }

    #[test]
    fn no_file_and_an_empty_object_are_the_defaults() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(folder.path().join("home")).unwrap();
        assert_eq!(Config::read(&home).unwrap().limits, Limits::default());
        assert_eq!(read("{}").unwrap().limits, Limits::default());
        let blank = read(r#"{"api_key": " ", "default_volume_id": "", "default_volume_mount": null}"#).unwrap();
        assert!(blank.api_key.is_none() && blank.default_volume_id.is_none() && blank.default_volume_mount.is_none());
    }

    #[test]
    fn what_is_set_is_read_and_the_rest_keeps_its_default() {
        let config = read(r#"{"default_volume_mount": "/data", "limits": {"max_pods": 5}, "gpu": "any"}"#).unwrap();
        assert_eq!(config.default_volume_mount.as_deref(), Some("/data"));
        assert_eq!(config.limits, Limits { max_pods: 5, ..Limits::default() });
    }

    #[test]
    fn a_bad_limit_is_an_error_that_names_file_field_and_rule() {
        for (text, said) in [
            (r#"{"limits": {"max_pods": "2"}}"#, ["limits.max_pods", "\"2\"", "whole number"]),
            (r#"{"limits": {"max_pods": 2.5}}"#, ["limits.max_pods", "2.5", "whole number"]),
            (r#"{"limits": {"max_usd_per_day": -1}}"#, ["limits.max_usd_per_day", "-1", "0 or more"]),
            (r#"{"limits": {"max_usd_per_day": null}}"#, ["limits.max_usd_per_day", "null", "0 or more"]),
            (r#"{"limits": {"max_lifetime_minutes": 0}}"#, ["limits.max_lifetime_minutes", "0", "from 1"]),
            (r#"{"limits": null}"#, ["limits", "null", "an object"]),
            (r#"{"limits": 3}"#, ["limits", "3", "an object"]),
            (r#"{"limits": {"default_lifetime_minutes": 2000}}"#, ["default_lifetime_minutes", "2000", "1440"]),
            (r#"{"limits": {"max_usd_per_day": 1e999}}"#, ["not JSON", "out of range", "line 1"]),
            (r#"{"default_volume_mount": "~/data"}"#, ["default_volume_mount", "~/data", "begins with `/`"]),
        ] {
            let error = read(text).expect_err(text).to_string();
            assert!(error.contains("config.json"), "{text}: {error}");
            assert!(said.iter().all(|part| error.contains(part)), "{text}: {error}");
        }
    }

    #[test]
    fn an_error_never_repeats_the_key() {
        for text in
            ["\"rpa_secret\"", "[\"rpa_secret\"]", "{\"api_key\": rpa_secret}", "{\"api_key\": [\"rpa_secret\"]}"]
        {
            let error = read(text).expect_err(text).to_string();
            assert!(error.contains("config.json") && !error.contains("rpa_secret"), "{error}");
        }
    }

    #[test]
    fn the_way_to_the_provider_is_read_from_a_file_that_breaks_another_rule() {
        use secrecy::ExposeSecret;
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(folder.path().join("home")).unwrap();
        let access = |text: &str| {
            state::write_file(&home.config_file(), text.as_bytes()).unwrap();
            assert!(Config::read(&home).is_err(), "{text}");
            Access::read(&home)
        };
        for rest in [r#""limits": {"max_pods": "2"}"#, r#""limits": 3"#, r#""default_volume_mount": "data""#] {
            let read =
                access(&format!(r#"{{"api_key": " k ", "api_base_url": "https://x.example", {rest}}}"#)).unwrap();
            assert_eq!(read.api_key.map(|key| key.expose_secret().to_owned()).as_deref(), Some("k"));
            assert_eq!(read.api_base_url.as_deref(), Some("https://x.example"));
        }
        assert!(access(r#"{"api_key": 7, "api_base_url": []}"#).unwrap().api_key.is_none());
        assert!(access(r#"{"api_key": "k""#).is_err(), "half a file");
        std::fs::write(home.config_file(), r#"{"api_key": "k", "limits": 3}"#).unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        std::fs::set_permissions(home.config_file(), open).unwrap();
        assert!(matches!(Access::read(&home), Err(ConfigError::Open { .. })), "others can read the key");
    }

    #[test]
    fn unknown_fields_are_found_in_the_limits_too() {
        let Value::Object(file) =
            serde_json::json!({"api_key": "k", "gpu": 1, "limits": {"max_pods": 1, "max_pod": 1}})
        else {
            panic!("an object")
        };
        assert_eq!(fields::unknown(&file), ["gpu", "limits.max_pod"]);
    }

    #[test]
    fn a_sandbox_takes_no_key_and_no_address_from_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(folder.path().join("home")).unwrap();
        let text = r#"{"api_key": "k", "api_base_url": "https://x.example", "limits": {"max_pods": 1}}"#;
        state::write_file(&home.config_file(), text.as_bytes()).unwrap();
        let config = Config::read_for_sandbox(&home).unwrap();
        assert!(config.api_key.is_none() && config.api_base_url.is_none());
        assert_eq!(config.limits.max_pods, 1);
    }
}
