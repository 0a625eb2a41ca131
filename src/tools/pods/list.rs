//! list_pods: the provider's truth joined with our records.

use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::row::{PodRow, Surroundings};
use super::{Found, Owner, all, cents, owner_of};
use crate::fleet::HomeIdentity;
use crate::tools::context::Services;
use crate::tools::{Context, Effect, StillBilling, Tool, ToolError};

const ROWS_A_PAGE: usize = 25;

/// Deadlines are kept by the provider's clock as well, so a difference is told before somebody wonders.
const MOST_SKEW: SignedDuration = SignedDuration::from_secs(60);

/// Where an answer comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Source {
    Provider,
    /// Not verified: no key is set.
    Records,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Format {
    #[default]
    Concise,
    Detailed,
}

pub struct ListPods;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListPodsInput {
    /// `detailed` adds volumes and their mount, data center, the pod's own switch, billed time and reservation.
    #[serde(default)]
    format: Option<Format>,
    /// Which page of 25 pods; the first when left out.
    #[schemars(range(min = 1, max = 1000))]
    #[serde(default)]
    page: Option<usize>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct ListPodsOutput {
    /// Ours first.
    pods: Vec<PodRow>,
    /// On all pages.
    total: usize,
    /// USD an hour for all that run, whoever made them.
    burn_rate_per_hour: f64,
    source: Source,
    #[serde(skip_serializing_if = "Option::is_none")]
    warning: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

impl Tool for ListPods {
    const NAME: &'static str = "list_pods";
    const TITLE: &'static str = "List pods";
    const DESCRIPTION: &'static str =
        "All pods of the account as the provider tells them, with owner, price, deadline, cost and tunnels.";
    const EFFECT: Effect = Effect::Reads;
    const EXAMPLE: &'static str = "{}";
    type Input = ListPodsInput;
    type Output = ListPodsOutput;

    async fn run(context: &Context, input: ListPodsInput) -> Result<ListPodsOutput, ToolError> {
        let services = &context.services;
        let listed = all(services).await.map_err(|mut error| {
            error.still_billing.get_or_insert(StillBilling::Possible);
            error
        })?;
        let surroundings = surroundings(services)?;
        heal(services, &listed.pods, surroundings.identity.as_ref()).await;
        let mut rows: Vec<_> = listed.pods.iter().map(|found| surroundings.row(found)).collect();
        rows.sort_by_key(|row| row.owner != Owner::Ours);
        let burning = rows.iter().filter(|row| row.status != "EXITED").map(|row| row.price_per_hour).sum();
        let total = rows.len();
        let page = input.page.unwrap_or(1).max(1);
        let on_page = rows.into_iter().skip((page - 1) * ROWS_A_PAGE).take(ROWS_A_PAGE);
        let pods = match input.format.unwrap_or_default() {
            Format::Concise => on_page.map(PodRow::concise).collect(),
            Format::Detailed => on_page.collect(),
        };
        let (source, warning) = match services.provider {
            Some(_) => (Source::Provider, listed.date.and_then(skew)),
            None => (Source::Records, Some(unverified(services))),
        };
        let next = (total > page * ROWS_A_PAGE).then(|| format!("list_pods {{\"page\": {}}}", page + 1));
        Ok(ListPodsOutput { pods, total, burn_rate_per_hour: cents(burning), source, warning, next })
    }

    fn text(output: &ListPodsOutput) -> String {
        let mut lines: Vec<_> = output.pods.iter().map(PodRow::line).collect();
        match output.total {
            0 if output.source == Source::Records => lines.push("No pods in our records.".to_owned()),
            0 => lines.push("No pods; nothing is billed for any.".to_owned()),
            total => lines.push(format!("{total} in all, burning ${:.2}/h.", output.burn_rate_per_hour)),
        }
        lines.extend(output.warning.clone());
        lines.extend(output.next.as_ref().map(|next| format!("Next: {next}")));
        lines.join("\n")
    }
}

pub(super) fn surroundings(services: &Services) -> Result<Surroundings, ToolError> {
    Ok(Surroundings {
        tunnels: services.tunnels.read()?.into_values().collect(),
        identity: HomeIdentity::read(&services.home)?,
        asked: services.provider.is_some(),
    })
}

fn skew(date: Timestamp) -> Option<String> {
    let ahead = Timestamp::now().duration_since(date);
    let seconds = ahead.as_secs().abs();
    (ahead.abs() > MOST_SKEW).then(|| {
        let which = if ahead.is_negative() { "behind" } else { "ahead of" };
        format!(
            "this machine's clock is {seconds} s {which} the provider's; a deadline is kept by whichever comes first"
        )
    })
}

fn unverified(services: &Services) -> String {
    let keeper =
        if services.keeper.is_alive() { "a keeper is alive" } else { "no keeper is alive, so no deadline is kept" };
    format!(
        "from our records, not verified, because no API key is set (RUNPOD_API_KEY, or api_key in {}); {keeper}",
        services.home.config_file().display()
    )
}

/// Whoever looks and sees a pod of ours without its keeper starts it again, for nobody else keeps the deadline.
pub(super) async fn heal(services: &Services, found: &[Found], identity: Option<&HomeIdentity>) {
    let unrecorded = |found: &Found| {
        found.record.is_none() && found.pod.as_ref().is_some_and(|pod| owner_of(pod, identity) == Owner::Ours)
    };
    let healed = if found.iter().any(unrecorded) {
        let healed = services.keeper_for_changes().await;
        services.keeper.look_for_pods().await;
        healed
    } else {
        services.revive_keeper().await
    };
    if let Err(error) = healed {
        tracing::warn!(%error, "the keeper can't be started");
    }
}
