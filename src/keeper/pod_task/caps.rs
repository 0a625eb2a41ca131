//! A pod that costs more than was set aside for it takes money that the caps may have promised to others.

use jiff::Timestamp;

use super::PodTask;
use crate::config::{Config, Limits};
use crate::errors::chain;
use crate::fleet::{Claim, check};

/// USD an hour; less is rounding.
const LEAST_MORE: f64 = 0.005;

impl PodTask {
    /// Ends the pod when its price, which may just have been learnt, is above what was `reserved` an hour and the caps
    /// have no room for it. Where nothing was reserved nobody asked us for the pod to run.
    pub(super) async fn keep_within_caps(&mut self, reserved: f64) {
        let Some(record) = self.last.clone().filter(|record| record.is_open() && !record.is_ending()) else { return };
        let price_per_hour = record.reserved_per_hour();
        if reserved <= 0.0 || price_per_hour <= reserved + LEAST_MORE {
            return;
        }
        let limits = Config::read(&self.keeper.home).map(|config| config.limits).unwrap_or_else(|error| {
            tracing::warn!(error = %chain(&error), "the config can't be read, so its default caps count");
            Limits::default()
        });
        let Ok(entries) = self.keeper.fleet.read() else { return };
        let Some(key) = entries.iter().find_map(|(key, other)| (other.intent == self.intent).then_some(key)) else {
            return;
        };
        let claim = Claim { price_per_hour, from: Timestamp::now(), until: record.reserved_until() };
        if let Err(over) = check(&entries, key, claim, false, &limits) {
            let cause = format!("${reserved:.2}/h were set aside for it, and {over}");
            self.know(move |record| record.end_because(cause)).await;
        }
    }
}
