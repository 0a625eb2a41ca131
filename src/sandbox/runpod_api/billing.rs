//! listPodBilling: what each pod was charged, in buckets of time.

use std::collections::BTreeSet;

use jiff::civil::Weekday;
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, ToSpan, Zoned};
use serde_json::{Value, json};

use super::validation::Parameters;
use super::{Answer, Call, Problem};
use crate::sandbox::billing::Amounts;
use crate::sandbox::world::World;

/// More buckets than this in one question are refused.
const MOST_BUCKETS: usize = 10_000;

pub async fn list(world: &World, call: &Call) -> Result<Answer, Problem> {
    let mut parameters = Parameters::new(call, &["startTime", "endTime", "bucketSize", "lastN", "podId"]);
    let start = parameters.time("startTime");
    let end = parameters.time("endTime");
    let size = parameters.choice("bucketSize", &["hour", "day", "week", "month", "year"]).unwrap_or("day");
    let last = parameters.integer("lastN", 1, MOST_BUCKETS as u32);
    let only = parameters.text("podId");
    parameters.violations.check()?;
    if last.is_some() && (start.is_some() || end.is_some()) {
        return Err(Problem::new(400, "lastN and startTime/endTime are mutually exclusive"));
    }
    let state = world.state().await;
    let now = world.clock.now();
    let bucket = Bucket::new(size);
    let buckets = bucket.window(start, end, last, now)?;

    let mut records = Vec::new();
    let mut totals = Amounts::default();
    let mut pods = BTreeSet::new();
    for (from, to) in buckets.iter().copied() {
        for pod in state.pods.iter().filter(|pod| only.is_none_or(|only| only == pod.id)) {
            let amounts = pod.meter.between(from, to, now);
            if amounts.total() > 0.0 {
                let mut record = amounts_view(amounts);
                record["startTime"] = json!(from);
                record["endTime"] = json!(to);
                record["podId"] = json!(pod.id);
                records.push(record);
                totals += amounts;
                pods.insert(&pod.id);
            }
        }
    }
    let window = buckets.first().zip(buckets.last()).map_or((now, now), |(first, last)| (first.0, last.1));
    Ok(Answer::ok(json!({
        "metadata": {
            "query": { "startTime": window.0, "endTime": window.1, "bucketSize": size, "podId": only },
            "recordCount": records.len(),
            "uniquePodCount": pods.len(),
            "totals": amounts_view(totals),
        },
        "records": records,
    })))
}

fn amounts_view(amounts: Amounts) -> Value {
    json!({
        "totalAmount": amounts.total(), "gpuAmount": amounts.gpu, "cpuAmount": 0.0, "diskAmount": amounts.disk
    })
}

/// A size of bucket, aligned to UTC's hours, days, weeks from Monday, months and years.
struct Bucket {
    size: &'static str,
    length: Span,
}

impl Bucket {
    fn new(size: &'static str) -> Self {
        let length = match size {
            "hour" => 1.hour(),
            "week" => 1.week(),
            "month" => 1.month(),
            "year" => 1.year(),
            _ => 1.day(),
        };
        Self { size, length }
    }

    /// The buckets asked for, oldest first.
    fn window(
        &self,
        start: Option<Timestamp>,
        end: Option<Timestamp>,
        last: Option<u32>,
        now: Timestamp,
    ) -> Result<Vec<(Timestamp, Timestamp)>, Problem> {
        let out_of_range = |_| Problem::new(400, "the window is out of range");
        let end = end.unwrap_or(now).to_zoned(TimeZone::UTC);
        let mut from = match last {
            Some(last) => {
                let mut from = self.floor(&end).map_err(out_of_range)?;
                for _ in 1..last {
                    from = from.checked_sub(self.length).map_err(out_of_range)?;
                }
                from
            }
            None => {
                let month_ago = || end.checked_sub(30.days());
                let start = start.map_or_else(month_ago, |start| Ok(start.to_zoned(TimeZone::UTC)));
                self.floor(&start.map_err(out_of_range)?).map_err(out_of_range)?
            }
        };
        let mut buckets = Vec::new();
        while from < end {
            let to = from.checked_add(self.length).map_err(out_of_range)?;
            buckets.push((from.timestamp(), to.timestamp()));
            if buckets.len() > MOST_BUCKETS {
                return Err(Problem::new(400, format!("the window has more than {MOST_BUCKETS} buckets")));
            }
            from = to;
        }
        Ok(buckets)
    }

    /// The start of the bucket that the time is in.
    fn floor(&self, time: &Zoned) -> Result<Zoned, jiff::Error> {
        let day = time.start_of_day()?;
        match self.size {
            "hour" => day.checked_add(i64::from(time.hour()).hours()),
            "week" => day.checked_sub(i64::from(day.weekday().since(Weekday::Monday)).days()),
            "month" => day.first_of_month(),
            "year" => day.first_of_year(),
            _ => Ok(day),
        }
    }
}
