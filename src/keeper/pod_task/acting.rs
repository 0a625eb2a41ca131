//! Start, stop and restart: sent once, after the wish was journaled as sent.

use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use super::PodTask;
use crate::errors::chain;
use crate::fleet::{ActionKnown, ActionState, ActionWish, PodRecord};
use crate::provider::{GpuProvider, Pod, PodAction, ProviderError};
use crate::steps;

/// How long a provider that can't be reached is tried: a pod that starts long after it was asked for is a surprise.
const TRY_FOR: SignedDuration = SignedDuration::from_mins(3);

/// A start or restart that lay about for longer, its keeper dead or the machine asleep, is nobody's wish any more.
const ASKED_FOR_WITHIN: SignedDuration = SignedDuration::from_mins(15);

impl PodTask {
    pub(super) async fn act(&mut self, provider: &dyn GpuProvider, record: PodRecord, wish: ActionWish) {
        let Some(id) = record.known.pod_id.clone() else { return };
        if record.known.action.as_ref().is_some_and(|known| known.id == wish.id) {
            // It was sent by a keeper that died before the answer.
            self.settle(ActionState::Unclear, Some("the keeper died before the answer came".to_owned())).await;
            return;
        }
        let asked_for = Timestamp::now().duration_since(wish.requested_at);
        if wish.action != PodAction::Stop && asked_for > ASKED_FOR_WITHIN {
            let problem =
                format!("it was asked for {} minutes ago and not sent in time; ask again", asked_for.as_mins());
            self.journal_action(&wish).await;
            self.settle(ActionState::Refused, Some(problem)).await;
            return;
        }
        let action = wish.action;
        let journaled = self.journal_action(&wish).await;
        if !journaled || self.keeper.stop.is_cancelled() {
            self.back_off();
            self.forget_action().await;
            return;
        }
        self.note("action_sent", json!({ "action": action }));
        steps::reached("keeper: action journaled");
        let answer = tokio::select! {
            answer = provider.control_pod(&id, action) => answer,
            // A pod that is to end waits for no answer.
            () = self.until_ending() => return,
        };
        self.keeper.snapshot.forget();
        match answer {
            Ok(answer) => {
                steps::reached("keeper: action answered");
                let now = self.succeeded(&answer);
                self.acted(answer.value, now, action).await;
                steps::reached("keeper: action recorded");
            }
            Err(error) => self.not_acted(error, &wish).await,
        }
    }

    /// The wish is never sent again from here on, whatever comes of it.
    async fn journal_action(&mut self, wish: &ActionWish) -> bool {
        let (id, action) = (wish.id.clone(), wish.action);
        self.know(move |record| {
            // A stopped pod has no address; the one that its stop found is what a start changes.
            let earlier = record.known.action.take().and_then(|action| action.ssh_before);
            record.known.action = Some(ActionKnown {
                id,
                action,
                state: ActionState::Sent,
                problem: None,
                gpu_before: record.known.gpu.clone(),
                ssh_before: record.known.ssh.clone().or(earlier),
            });
        })
        .await
    }

    async fn acted(&mut self, pod: Pod, now: Timestamp, action: PodAction) {
        self.call_again_in(self.keeper.timing.pod_poll_waiting);
        let (price, reserved) = (pod.cost_per_hour, self.reserved_per_hour());
        self.know(move |record| {
            record.learn_and_judge(&pod, now);
            record.known.problem = None;
            if action != PodAction::Stop {
                // A restart in place may change host keys without moving `startedAt`.
                record.known.starts += 1;
                if let Some(most) = record.wanted.max_price_per_hour.filter(|most| price > most + 0.005) {
                    record.end_because(format!(
                        "after the start it costs ${price:.2}/h, more than the ${most:.2}/h that were allowed"
                    ));
                }
            }
        })
        .await;
        self.keep_within_caps(reserved).await;
        self.settle(ActionState::Done, None).await;
    }

    async fn not_acted(&mut self, error: ProviderError, wish: &ActionWish) {
        let problem = chain(&error);
        tracing::warn!(pod = self.name, action = ?wish.action, error = problem, "the action failed");
        let asked_recently = Timestamp::now().duration_since(wish.requested_at) < TRY_FOR;
        match error {
            // Certain to have had no effect, so it may be sent.
            ProviderError::RateLimited { retry_after } if asked_recently => {
                self.call_again_in(retry_after);
                self.forget_action().await;
            }
            ProviderError::Unreachable { .. } if asked_recently => {
                self.back_off();
                self.forget_action().await;
            }
            error if error.may_have_happened() => {
                self.call_again_in(self.keeper.timing.backoff_first);
                self.settle(ActionState::Unclear, Some(problem)).await;
            }
            _ => self.settle(ActionState::Refused, Some(problem)).await,
        }
    }

    async fn settle(&mut self, state: ActionState, problem: Option<String>) {
        self.note("action_settled", json!({ "state": state, "problem": problem }));
        self.know(move |record| {
            let Some(action) = &mut record.known.action else { return };
            if state == ActionState::Unclear && action.action != PodAction::Stop {
                // Where it did happen there are new host keys and no switch.
                record.known.starts += 1;
            }
            action.state = state;
            action.problem = problem;
        })
        .await;
    }

    async fn forget_action(&mut self) {
        self.know(|record| record.known.action = None).await;
    }
}
