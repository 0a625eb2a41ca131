//! More time for a pod: a later deadline, set aside before it is given.

use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use super::{Call, ControlOutput, ControlPod, ControlState};
use crate::fleet::{Actor, PodRecord, later};
use crate::steps;
use crate::tools::pods::cents;
use crate::tools::pods::row::switch;
use crate::tools::{Tool, ToolError};

pub(super) const DEFAULT_MINUTES: u32 = 60;

impl Call<'_> {
    pub(super) async fn extend(&self, record: PodRecord, minutes: u32) -> Result<ControlOutput, ToolError> {
        let services = &self.context.services;
        let before = record.expires_at();
        // One that is under way is waited for, not added to: whoever missed an answer asks again.
        let under_way = record.wanted.extended_until.filter(|until| *until > before);
        let until = under_way.unwrap_or_else(|| later(before, SignedDuration::from_mins(i64::from(minutes))));
        let mut record = record;
        if under_way.is_none() {
            let what = format!("extend the pod {} by {minutes} minutes", self.name);
            self.agree(&what, record.reserved_per_hour(), until).await?;
            record = self.written(services.fleet.want_extended(&record.intent, until, &self.limits()?).await?)?;
            let facts = json!({
                "pod": self.name, "intent": record.intent, "minutes": minutes, "expires_at": until,
                "usd_per_hour": cents(record.price()), "reserved_usd": cents(record.reserved_usd(Timestamp::now())),
            });
            services.audit.note(Actor::Tool(ControlPod::NAME), "extension_wanted", facts);
            steps::reached("caller: extend wanted");
        }
        self.wake_keeper().await?;
        self.waiting.tell(format!("moving the deadline to {until:.0}"));
        loop {
            let record = self.watched(&record.intent)?;
            let done = record.expires_at() >= until;
            if done || !self.waiting.again().await {
                return Ok(self.extended(&record, before, until, done));
            }
            if !services.keeper.is_alive() {
                self.wake_keeper().await?;
            }
        }
    }

    fn extended(&self, record: &PodRecord, before: Timestamp, until: Timestamp, done: bool) -> ControlOutput {
        let name = &self.name;
        let state = if done { ControlState::Extended } else { ControlState::Extending };
        let mut output = self.output(record, state);
        output.done = done;
        output.expires_at_before = done.then_some(before);
        output.switch = Some(switch(record));
        output.waiting_for = (!done).then(|| {
            let problem = record.known.inside.switch_problem.as_ref().or(record.known.problem.as_ref());
            let problem = problem.map(|problem| format!(" ({problem})")).unwrap_or_default();
            format!("the keeper to move the deadline to {until:.0}{problem}")
        });
        output.next = match done {
            true => format!("get_pod {{\"pod\": \"{name}\"}}"),
            // The same call again would add to what is done by then.
            false => format!("get_pod {{\"pod\": \"{name}\", \"wait_for\": \"change\"}}"),
        };
        output
    }
}
