//! spending: what is being spent, what is set aside, and what the caps leave.

use std::collections::{BTreeMap, BTreeSet};

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::context::Services;
use super::pods::{self, Found, Owner, cents, cost_now, owner_of};
use super::volumes::{self, OpenVolume};
use super::words::usd;
use super::{Context, Effect, Tool, ToolError};
use crate::config::Limits;
use crate::errors::chain;
use crate::fleet::{Committed, HomeIdentity, PodRecord, TURNS_UP_WITHIN, WantedState, committed, day, hours, name_of};
use crate::provider::{PodStatus, ProviderError};

/// Notes of the audit log in a detailed answer.
const MOST_NOTES: usize = 20;
/// An account may have thousands.
const MOST_PODS: usize = 50;
/// The one cap that isn't an amount of USD.
const MAX_PODS: &str = "max_pods";

pub struct Spending;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    #[default]
    Concise,
    Detailed,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SpendingInput {
    /// `detailed` also shows the last money actions and their causes; `concise` when left out.
    #[serde(default)]
    format: Option<Format>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct SpendingOutput {
    /// USD an hour now, for every pod of the account that is billed.
    burn_rate_per_hour: f64,
    /// The part of it for pods that this home did not make; the caps don't count these.
    #[serde(skip_serializing_if = "Option::is_none")]
    others_per_hour: Option<f64>,
    /// The day that the caps count by, UTC.
    day: String,
    /// USD spent today by our own count, and set aside for the rest of today.
    today_usd: f64,
    today_reserved_usd: f64,
    /// Ours first, then the dearest; at most 50.
    pods: Vec<PodMoney>,
    /// How many more there are; list_pods shows them.
    #[serde(skip_serializing_if = "Option::is_none")]
    more_pods: Option<usize>,
    caps: Vec<Cap>,
    /// Creates without a known outcome; their money stays set aside.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unknown: Vec<UnknownPod>,
    /// USD a month for all network volumes.
    #[serde(skip_serializing_if = "Option::is_none")]
    volumes_monthly_usd: Option<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    open_volumes: Vec<OpenVolume>,
    /// The provider's own books of today; they lag behind.
    #[serde(skip_serializing_if = "Option::is_none")]
    billed: Option<Billed>,
    /// The last money actions, the newest last.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    audit: Vec<AuditNote>,
    /// What of this isn't verified or known, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct PodMoney {
    pod: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod_id: Option<String>,
    owner: Owner,
    /// It has ended, and cost something today.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    gone: bool,
    /// USD an hour now; 0 when nothing is billed for it.
    price_per_hour: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost_usd: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    today_usd: Option<f64>,
    /// The most it can still cost until its deadline.
    #[serde(skip_serializing_if = "Option::is_none")]
    reserved_usd: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<Timestamp>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct Cap {
    /// Its field in config.json.
    limit: &'static str,
    cap: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    used: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    left: Option<f64>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct UnknownPod {
    pod: String,
    intent: String,
    reserved_usd: f64,
    reserved_until: Timestamp,
    next: String,
}

#[derive(Debug, Serialize, JsonSchema)]
struct Billed {
    today_usd: f64,
    /// The part of it for pods in our records.
    ours_usd: f64,
}

#[derive(Debug, Serialize, JsonSchema)]
struct AuditNote {
    at: String,
    actor: String,
    event: String,
    facts: BTreeMap<String, String>,
}

impl Tool for Spending {
    const NAME: &'static str = "spending";
    const TITLE: &'static str = "Show what is being spent";
    const DESCRIPTION: &'static str = "Burn rate now, today's cost and what is set aside, by pod; what each cap leaves; \
        creates without a known outcome; the volumes' monthly cost; the provider's bill of today.";
    const EFFECT: Effect = Effect::Reads;
    const EXAMPLE: &'static str = "{}";
    type Input = SpendingInput;
    type Output = SpendingOutput;

    async fn run(context: &Context, input: SpendingInput) -> Result<SpendingOutput, ToolError> {
        let services = &context.services;
        let limits = services.limits();
        let records = services.fleet.read()?;
        let now = Timestamp::now();
        let today = day(now);
        let (found, (volumes, open_volumes), billed) =
            tokio::join!(pods::all(services), volumes::monthly(services), billed(services, &records, today));
        let mut warnings = Vec::new();
        if let (Err(error), None) = (&limits, services.config_warning()) {
            warnings.push(format!("what the caps say is unknown: {}", error.message));
        }
        let found = found.map(|listed| listed.pods).unwrap_or_else(|error| {
            warnings.push(format!("the pods can't be listed, so this is from our records: {}", error.message));
            from_records(&records)
        });
        if services.provider.is_none() {
            warnings.push("no API key is set, so this is from our records, not verified".to_owned());
        } else {
            warnings.extend(volumes.as_ref().err().map(|why| format!("the volumes' cost is unknown: {why}")));
            warnings.extend(billed.as_ref().err().map(|why| format!("the provider's books can't be read: {why}")));
        }
        if let Err(error) = services.revive_keeper().await {
            tracing::warn!(%error, "the keeper can't be started");
        }
        let audit = match input.format.unwrap_or_default() {
            Format::Concise => Vec::new(),
            Format::Detailed => services.audit.last(MOST_NOTES).unwrap_or_else(|error| {
                warnings.push(format!("the audit log can't be read: {error}"));
                Vec::new()
            }),
        };
        let set_aside = committed(&records, None, now);
        let whole_today = set_aside.by_day.get(&today).copied().unwrap_or(0.0);
        let today_usd: f64 = records.values().map(|record| spent_on(record, today)).sum();
        let pods = pod_rows(&found, &records, HomeIdentity::read(&services.home)?.as_ref(), now);
        let (ours, others) = burn_rates(&pods);
        let more_pods = pods.len().checked_sub(MOST_PODS).filter(|more| *more > 0);
        let pods = pods.into_iter().take(MOST_PODS).collect();
        Ok(SpendingOutput {
            burn_rate_per_hour: cents(ours + others),
            others_per_hour: (others > 0.0).then_some(cents(others)),
            day: today.to_string(),
            today_usd: cents(today_usd),
            today_reserved_usd: cents((whole_today - today_usd).max(0.0)),
            caps: limits.map_or_else(
                |_| Vec::new(),
                |limits| caps(&limits, &set_aside, whole_today, volumes.as_ref().ok().copied()),
            ),
            unknown: records.iter().filter_map(|(key, record)| unknown(key, record, now)).collect(),
            pods,
            more_pods,
            volumes_monthly_usd: volumes.ok(),
            open_volumes,
            billed: billed.ok(),
            audit: audit.into_iter().map(audit_note).collect(),
            warnings,
        })
    }

    fn text(output: &SpendingOutput) -> String {
        let mut lines = vec![format!(
            "Burning ${:.2}/h now. Today ({}, UTC): {} spent, {} set aside.",
            output.burn_rate_per_hour,
            output.day,
            usd(output.today_usd),
            usd(output.today_reserved_usd)
        )];
        for row in &output.pods {
            let mut line = format!("{}: ${:.2}/h", row.pod, row.price_per_hour);
            match (row.cost_usd, row.reserved_usd) {
                (Some(cost), _) if row.gone => line = format!("{}: gone, it cost {}", row.pod, usd(cost)),
                (Some(cost), Some(reserved)) => {
                    line.push_str(&format!(", {} so far, at most {} more", usd(cost), usd(reserved)));
                }
                _ => {}
            }
            match row.owner {
                Owner::Ours => {}
                Owner::OtherMachine => line.push_str(", of another machine"),
                Owner::Unmanaged => line.push_str(", not made by this program"),
            }
            lines.push(line);
        }
        lines.extend(output.more_pods.map(|more| format!("And {more} more pods: see list_pods.")));
        for Cap { limit, cap, left, .. } in &output.caps {
            let amount = |value: f64| if *limit == MAX_PODS { format!("{value:.0}") } else { usd(value) };
            lines.extend(left.map(|left| format!("{limit}: {} left of {}", amount(left), amount(*cap))));
        }
        for UnknownPod { pod, intent, reserved_usd, next, .. } in &output.unknown {
            lines.push(format!("{pod} (intent {intent}): outcome unknown, ${reserved_usd:.2} set aside. Next: {next}"));
        }
        lines.extend(output.volumes_monthly_usd.map(|usd| format!("Network volumes: ${usd:.2} a month.")));
        for OpenVolume { name, waiting_for, next, .. } in &output.open_volumes {
            lines.push(format!("Volume {name}: waiting for {waiting_for}. Next: {next}"));
        }
        if let Some(Billed { today_usd, ours_usd }) = &output.billed {
            lines.push(format!(
                "Billed by the provider today: {}, of it {} for pods of this home.",
                usd(*today_usd),
                usd(*ours_usd)
            ));
        }
        for AuditNote { at, actor, event, facts } in &output.audit {
            let facts: Vec<_> = facts.iter().map(|(name, value)| format!("{name}={value}")).collect();
            lines.push(format!("{at} {actor} {event} {}", facts.join(" ")));
        }
        lines.extend(output.warnings.iter().map(|warning| format!("Note: {warning}")));
        lines.join("\n")
    }
}

/// USD an hour for pods of ours and for all others.
fn burn_rates(pods: &[PodMoney]) -> (f64, f64) {
    let burning = |ours: bool| {
        pods.iter().filter(|row| (row.owner == Owner::Ours) == ours).map(|row| row.price_per_hour).sum::<f64>()
    };
    (burning(true), burning(false))
}

/// What a record has cost on that day, by our own count, up to now.
fn spent_on(record: &PodRecord, today: Date) -> f64 {
    let counted = record.known.cost_by_day.get(&today).copied().unwrap_or(0.0);
    counted + (cost_now(record) - record.known.cost_usd).max(0.0)
}

fn from_records(records: &BTreeMap<String, PodRecord>) -> Vec<Found> {
    let open = records.iter().filter(|(_, record)| record.is_open());
    open.map(|(name, record)| Found { name: name.clone(), record: Some(record.clone()), pod: None }).collect()
}

/// What is there, and of our records those that cost something today.
fn pod_rows(
    found: &[Found],
    records: &BTreeMap<String, PodRecord>,
    identity: Option<&HomeIdentity>,
    now: Timestamp,
) -> Vec<PodMoney> {
    let today = day(now);
    let closed = records.iter().filter(|(_, record)| !record.is_open() && spent_on(record, today) > 0.0);
    let closed = closed.map(|(name, record)| Found { name: name.clone(), record: Some(record.clone()), pod: None });
    let row = |found: &Found| {
        let record = found.record.as_ref();
        let owner = match (record, &found.pod) {
            (None, Some(pod)) => owner_of(pod, identity),
            _ => Owner::Ours,
        };
        PodMoney {
            pod: name_of(&found.name).to_owned(),
            pod_id: found.pod_id().map(str::to_owned),
            owner,
            gone: record.is_some_and(|record| !record.is_open()),
            price_per_hour: cents(price_now(found)),
            cost_usd: record.map(|record| cents(cost_now(record))),
            today_usd: record.map(|record| cents(spent_on(record, today))),
            reserved_usd: record.map(|record| cents(record.reserved_usd(now))),
            expires_at: record.filter(|record| record.is_open()).map(PodRecord::expires_at),
        }
    };
    let mut rows: Vec<_> = found.iter().cloned().chain(closed).map(|found| row(&found)).collect();
    let place = |row: &PodMoney| (row.gone, row.owner != Owner::Ours);
    rows.sort_by(|a, b| place(a).cmp(&place(b)).then_with(|| b.price_per_hour.total_cmp(&a.price_per_hour)));
    rows
}

/// USD an hour that are billed now: by the provider's word, else by the record.
fn price_now(found: &Found) -> f64 {
    let is_billed = |status: PodStatus| !matches!(status, PodStatus::Exited | PodStatus::Terminated);
    match (&found.pod, &found.record) {
        (Some(pod), _) if is_billed(pod.status) => pod.cost_per_hour,
        (None, Some(record)) if record.is_open() && record.known.status.is_some_and(is_billed) => {
            record.known.cost_per_hour
        }
        _ => 0.0,
    }
}

fn caps(limits: &Limits, set_aside: &Committed, today_usd: f64, volumes: Option<f64>) -> Vec<Cap> {
    let of = |limit, cap: f64, used: Option<f64>| Cap {
        limit,
        cap,
        used: used.map(cents),
        left: used.map(|used| cents((cap - used).max(0.0))),
    };
    vec![
        of(MAX_PODS, limits.max_pods as f64, Some(set_aside.open.len() as f64)),
        of("max_total_per_hour", limits.max_total_per_hour, Some(set_aside.per_hour)),
        of("max_usd_per_day", limits.max_usd_per_day, Some(today_usd)),
        of("max_volumes_per_month", limits.max_volumes_per_month, volumes),
        of("max_price_per_hour", limits.max_price_per_hour, None),
        of("confirm_above_per_hour", limits.confirm_above_per_hour, None),
        of("max_lifetime_minutes", f64::from(limits.max_lifetime_minutes), None),
    ]
}

fn unknown(key: &str, record: &PodRecord, now: Timestamp) -> Option<UnknownPod> {
    if !record.is_unknown() {
        return None;
    }
    let (pod, intent) = (name_of(key), &record.intent);
    let next = if record.wanted.state == WantedState::Gone {
        format!("nothing: it is ended on sight until {:.0} (get_pod {{\"pod\": \"{key}\"}})", record.expires_at())
    } else if record.lacked_for() >= TURNS_UP_WITHIN {
        format!(
            "the same create_pod_with_volume with retry_unknown: \"{intent}\", or terminate_pod {{\"pod\": \"{pod}\"}}"
        )
    } else {
        format!("get_pod {{\"pod\": \"{pod}\"}}, or terminate_pod {{\"pod\": \"{pod}\"}} to end it on sight")
    };
    Some(UnknownPod {
        pod: pod.to_owned(),
        intent: intent.clone(),
        reserved_usd: cents(record.reserved_per_hour() * hours(now, record.reserved_until())),
        reserved_until: record.reserved_until(),
        next,
    })
}

/// What the provider has charged today for pods, if this key may read that; the error says why not.
async fn billed(services: &Services, records: &BTreeMap<String, PodRecord>, today: Date) -> Result<Billed, String> {
    let provider = services.provider.as_ref().ok_or("no API key is set")?;
    let midnight = today.to_zoned(TimeZone::UTC).map_err(|error| error.to_string())?;
    let bills = provider.billing(Zoned::timestamp(&midnight), None).await.map_err(|error| match error {
        ProviderError::Forbidden { .. } => "this key may not read them".to_owned(),
        ProviderError::NotFound { .. } => "the provider has none".to_owned(),
        error => chain(&error),
    })?;
    let ours: BTreeSet<_> = records.values().filter_map(|record| record.known.pod_id.as_deref()).collect();
    let sum = |ours_only: bool| {
        let counted = bills.value.iter().filter(|bill| !ours_only || ours.contains(bill.pod_id.as_str()));
        cents(counted.map(|bill| bill.total_usd).sum())
    };
    Ok(Billed { today_usd: sum(false), ours_usd: sum(true) })
}

fn audit_note(mut note: Map<String, Value>) -> AuditNote {
    let word = |value: Value| match value {
        Value::String(text) => text,
        other => other.to_string(),
    };
    let mut take = |name: &str| note.remove(name).map(word).unwrap_or_default();
    let (at, actor, event) = (take("at"), take("actor"), take("event"));
    AuditNote { at, actor, event, facts: note.into_iter().map(|(name, value)| (name, word(value))).collect() }
}
