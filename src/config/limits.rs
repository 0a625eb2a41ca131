//! What no call may exceed, whatever an assistant asks for. Only the person whose money it is sets these; a tool's
//! arguments can but tighten them.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::fields::Field;

/// The longest lifetime that can be allowed: a year. Times far beyond it can't be written as dates any more.
const LONGEST_LIFETIME_MINUTES: u32 = 365 * 24 * 60;

const AMOUNT: &str = "an amount of USD, 0 or more";
const LIFETIME: &str = "a whole number of minutes, from 1 to 525600 (a year)";

/// The fields of [`Limits`], with what each must be. The names are those that a person types: `limits.max_pods`.
pub(super) const FIELDS: [Field; 8] = [
    Field { name: "limits.max_pods", expected: "a whole number, 0 or more", is_valid: is_count },
    Field { name: "limits.max_price_per_hour", expected: AMOUNT, is_valid: is_amount },
    Field { name: "limits.max_total_per_hour", expected: AMOUNT, is_valid: is_amount },
    Field { name: "limits.max_usd_per_day", expected: AMOUNT, is_valid: is_amount },
    Field { name: "limits.default_lifetime_minutes", expected: LIFETIME, is_valid: is_lifetime },
    Field { name: "limits.max_lifetime_minutes", expected: LIFETIME, is_valid: is_lifetime },
    Field { name: "limits.confirm_above_per_hour", expected: AMOUNT, is_valid: is_amount },
    Field { name: "limits.max_volumes_per_month", expected: AMOUNT, is_valid: is_amount },
];

/// The caps, as `limits` in `config.json` sets them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Pods of this home that may exist at once.
    pub max_pods: usize,
    /// USD an hour that one pod may cost.
    pub max_price_per_hour: f64,
    /// USD an hour that all pods of this home may cost together.
    pub max_total_per_hour: f64,
    /// USD that may be spent and reserved for one day, from midnight to midnight UTC.
    pub max_usd_per_day: f64,
    /// How long a pod lives when its create names no lifetime.
    pub default_lifetime_minutes: u32,
    /// The longest lifetime a create or an extend can ask for.
    pub max_lifetime_minutes: u32,
    /// Above this price, in USD an hour, somebody has to agree.
    pub confirm_above_per_hour: f64,
    /// USD a month that all network volumes may cost together after one is created or grows.
    pub max_volumes_per_month: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_pods: 2,
            max_price_per_hour: 1.50,
            max_total_per_hour: 3.0,
            max_usd_per_day: 15.0,
            default_lifetime_minutes: 4 * 60,
            max_lifetime_minutes: 24 * 60,
            confirm_above_per_hour: 1.00,
            max_volumes_per_month: 50.0,
        }
    }
}

impl Limits {
    /// The limits of fields that are valid each by itself. The error is that of a pair that doesn't fit together.
    pub(super) fn of(fields: &Map<String, Value>) -> Result<Self, LimitsError> {
        let mut limits = Self::deserialize(Value::Object(fields.clone())).map_err(LimitsError::Unreadable)?;
        if !fields.contains_key("default_lifetime_minutes") {
            // Who allows less than our default has said what the default is.
            limits.default_lifetime_minutes = limits.default_lifetime_minutes.min(limits.max_lifetime_minutes);
        }
        if limits.default_lifetime_minutes > limits.max_lifetime_minutes {
            return Err(LimitsError::DefaultOverMax {
                default: limits.default_lifetime_minutes,
                max: limits.max_lifetime_minutes,
            });
        }
        Ok(limits)
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum LimitsError {
    #[error("`limits` can't be read: {0}")]
    Unreadable(serde_json::Error),
    #[error("`limits.default_lifetime_minutes` is {default}, over `limits.max_lifetime_minutes`, which is {max}")]
    DefaultOverMax { default: u32, max: u32 },
}

fn is_count(value: &Value) -> bool {
    value.as_u64().is_some_and(|count| usize::try_from(count).is_ok())
}

fn is_amount(value: &Value) -> bool {
    value.as_f64().is_some_and(|amount| amount.is_finite() && amount >= 0.0)
}

fn is_lifetime(value: &Value) -> bool {
    value.as_u64().is_some_and(|minutes| (1..=u64::from(LONGEST_LIFETIME_MINUTES)).contains(&minutes))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_table_has_every_limit() {
        let limits = serde_json::to_value(Limits::default()).unwrap();
        let names: Vec<String> = limits.as_object().unwrap().keys().map(|name| format!("limits.{name}")).collect();
        assert_eq!(names, FIELDS.map(|field| field.name));
        for field in &FIELDS {
            let value = &limits[field.name.trim_start_matches("limits.")];
            assert!((field.is_valid)(value), "the default of {} breaks its own rule", field.name);
            for bad in [json!(-1), json!("2"), json!(null), json!(true), json!([2])] {
                assert!(!(field.is_valid)(&bad), "{} takes {bad}", field.name);
            }
        }
    }

    #[test]
    fn a_lower_maximum_lowers_the_default_lifetime_only_when_nobody_set_it() {
        let limits = Limits::of(json!({"max_lifetime_minutes": 60}).as_object().unwrap()).unwrap();
        assert_eq!(limits.default_lifetime_minutes, 60);
        let both = json!({"max_lifetime_minutes": 60, "default_lifetime_minutes": 61});
        let error = Limits::of(both.as_object().unwrap()).unwrap_err();
        assert!(error.to_string().contains("is 61") && error.to_string().contains("is 60"), "{error}");
    }
}
