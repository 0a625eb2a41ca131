//! Reads bodies and parameters, collecting every violation with the JSON path where it is.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{Call, Problem};

/// The violations found so far.
#[derive(Debug, Default)]
pub struct Violations(Vec<String>);

/// A JSON object that is being read, with its path, such as `$.gpu`.
pub struct Fields<'a> {
    path: String,
    map: &'a Map<String, Value>,
}

impl Violations {
    pub fn add(&mut self, path: &str, what: impl std::fmt::Display) {
        self.0.push(format!("{path}: {what}"));
    }

    /// A 422 naming each violation, if there is one.
    pub fn check(self) -> Result<(), Problem> {
        if self.0.is_empty() { Ok(()) } else { Err(Problem::invalid(self.0)) }
    }

    /// The value as an object with no other keys than `known` and all of `required`.
    pub fn object<'a>(
        &mut self,
        path: &str,
        value: &'a Value,
        known: &[&str],
        required: &[&str],
    ) -> Option<Fields<'a>> {
        let Some(map) = value.as_object() else {
            self.add(path, format_args!("got {}, want object", kind(value)));
            return None;
        };
        for key in map.keys().filter(|key| !known.contains(&key.as_str())) {
            self.add(path, format_args!("additional properties '{key}' not allowed"));
        }
        for key in required.iter().filter(|key| !map.contains_key(**key)) {
            self.add(path, format_args!("missing property '{key}'"));
        }
        Some(Fields { path: path.to_owned(), map })
    }
}

impl<'a> Fields<'a> {
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key)
    }

    pub fn path(&self, key: &str) -> String {
        format!("{}.{key}", self.path)
    }

    pub fn string(&self, violations: &mut Violations, key: &str) -> Option<String> {
        let value = self.get(key)?;
        if value.as_str().is_none() {
            violations.add(&self.path(key), format_args!("got {}, want string", kind(value)));
        }
        value.as_str().map(str::to_owned)
    }

    /// A string with at least one character.
    pub fn text(&self, violations: &mut Violations, key: &str) -> Option<String> {
        let text = self.string(violations, key)?;
        if text.is_empty() {
            violations.add(&self.path(key), "minLength: got 0, want 1");
        }
        Some(text)
    }

    pub fn boolean(&self, violations: &mut Violations, key: &str) -> Option<bool> {
        let value = self.get(key)?;
        if value.as_bool().is_none() {
            violations.add(&self.path(key), format_args!("got {}, want boolean", kind(value)));
        }
        value.as_bool()
    }

    pub fn integer(&self, violations: &mut Violations, key: &str, least: u32, most: u32) -> Option<u32> {
        let value = self.get(key)?;
        // JSON Schema counts 5.0 as an integer.
        let whole = value.as_i64().or_else(|| value.as_f64().filter(|number| number.fract() == 0.0).map(|n| n as i64));
        let Some(whole) = whole else {
            violations.add(&self.path(key), format_args!("got {}, want integer", kind(value)));
            return None;
        };
        if whole < i64::from(least) {
            violations.add(&self.path(key), format_args!("minimum: got {whole}, want {least}"));
        } else if whole > i64::from(most) {
            violations.add(&self.path(key), format_args!("maximum: got {whole}, want {most}"));
        }
        u32::try_from(whole).ok()
    }

    pub fn choice(&self, violations: &mut Violations, key: &str, choices: &[&'static str]) -> Option<&'static str> {
        let text = self.string(violations, key)?;
        let chosen = choices.iter().find(|choice| **choice == text).copied();
        if chosen.is_none() {
            violations.add(&self.path(key), format_args!("value must be one of {}", choices.join(", ")));
        }
        chosen
    }

    pub fn array(&self, violations: &mut Violations, key: &str) -> Option<&'a Vec<Value>> {
        let value = self.get(key)?;
        if value.as_array().is_none() {
            violations.add(&self.path(key), format_args!("got {}, want array", kind(value)));
        }
        value.as_array()
    }

    pub fn strings(&self, violations: &mut Violations, key: &str) -> Option<Vec<String>> {
        let items = self.array(violations, key)?;
        let mut texts = Vec::new();
        for (index, item) in items.iter().enumerate() {
            match item.as_str() {
                Some(text) => texts.push(text.to_owned()),
                None => violations
                    .add(&format!("{}[{index}]", self.path(key)), format_args!("got {}, want string", kind(item))),
            }
        }
        Some(texts)
    }

    /// An object whose values are all strings.
    pub fn string_map(&self, violations: &mut Violations, key: &str) -> Option<BTreeMap<String, String>> {
        let value = self.get(key)?;
        let Some(map) = value.as_object() else {
            violations.add(&self.path(key), format_args!("got {}, want object", kind(value)));
            return None;
        };
        let mut texts = BTreeMap::new();
        for (name, value) in map {
            match value.as_str() {
                Some(text) => {
                    texts.insert(name.clone(), text.to_owned());
                }
                None => violations
                    .add(&format!("{}.{name}", self.path(key)), format_args!("got {}, want string", kind(value))),
            }
        }
        Some(texts)
    }
}

/// The parameters of a request, checked against those that the operation knows.
pub struct Parameters<'a> {
    pairs: &'a [(String, String)],
    pub violations: Violations,
}

impl<'a> Parameters<'a> {
    pub fn new(call: &'a Call, known: &[&str]) -> Self {
        let mut violations = Violations::default();
        for (index, (name, _)) in call.query.iter().enumerate() {
            if !known.contains(&name.as_str()) {
                violations.add("query", format_args!("unknown parameter '{name}'"));
            }
            if call.query[..index].iter().any(|(earlier, _)| earlier == name) {
                violations.add(&format!("query.{name}"), "given twice");
            }
        }
        Self { pairs: &call.query, violations }
    }

    /// The 422 of an operation that has no parameters but was given some.
    pub fn none(call: &Call) -> Result<(), Problem> {
        Parameters::new(call, &[]).violations.check()
    }

    pub fn text(&self, name: &str) -> Option<&'a str> {
        self.pairs.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub fn integer(&mut self, name: &str, least: u32, most: u32) -> Option<u32> {
        let text = self.text(name)?;
        match text.parse::<u32>() {
            Ok(number) if (least..=most).contains(&number) => Some(number),
            _ => {
                self.violations.add(&format!("query.{name}"), format_args!("want an integer from {least} to {most}"));
                None
            }
        }
    }

    pub fn boolean(&mut self, name: &str) -> Option<bool> {
        match self.text(name)? {
            "true" => Some(true),
            "false" => Some(false),
            _ => {
                self.violations.add(&format!("query.{name}"), "want true or false");
                None
            }
        }
    }

    pub fn time(&mut self, name: &str) -> Option<jiff::Timestamp> {
        let parsed = self.text(name)?.parse().ok();
        if parsed.is_none() {
            self.violations.add(&format!("query.{name}"), "want an RFC 3339 time");
        }
        parsed
    }

    pub fn choice(&mut self, name: &str, choices: &[&'static str]) -> Option<&'static str> {
        let text = self.text(name)?;
        let chosen = choices.iter().find(|choice| **choice == text).copied();
        if chosen.is_none() {
            self.violations.add(&format!("query.{name}"), format_args!("want one of {}", choices.join(", ")));
        }
        chosen
    }

    /// A comma-separated list; empty if not given.
    pub fn list(&mut self, name: &str, fits: impl Fn(&str) -> bool) -> Vec<&'a str> {
        let Some(text) = self.text(name) else { return Vec::new() };
        let items: Vec<&str> = text.split(',').collect();
        for item in items.iter().filter(|item| !fits(item)) {
            self.violations.add(&format!("query.{name}"), format_args!("'{item}' is not a value of it"));
        }
        items
    }

    pub fn has(&self, name: &str) -> bool {
        self.text(name).is_some()
    }
}

/// `12.8`, as CUDA versions are written.
pub fn is_cuda_version(text: &str) -> bool {
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    text.split_once('.').is_some_and(|(major, minor)| digits(major) && digits(minor))
}

/// A version as numbers, so that 12.11 is above 12.2; a bare major counts as its first release.
pub fn cuda_number(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.').unwrap_or((text, "0"));
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}
