//! From the intent to a pod: one POST a candidate, the next only after a definite refusal, never again after an
//! unclear answer.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use super::PodTask;
use crate::errors::chain;
use crate::fleet::{
    Attempt, ENV_EXPIRES_AT, ENV_OWNER, EnvValue, HomeIdentity, Phase, PodRecord, TURNS_UP_WITHIN, later,
};
use crate::keeper::clocks::Lifetime;
use crate::provider::{GpuProvider, Pod, PodSpec, ProviderError};
use crate::steps;

/// How long a provider that can't be reached, or that has no calls left for us, is tried: a pod that starts long after
/// it was asked for is a surprise.
const TRY_FOR: SignedDuration = SignedDuration::from_mins(3);

/// A wish that lay about for longer, its keeper dead or the machine asleep, is nobody's wish any more.
const ASKED_FOR_WITHIN: SignedDuration = SignedDuration::from_mins(15);

/// What a deadline may be wrong by.
const LEAST_CORRECTION: SignedDuration = SignedDuration::from_secs(60);

/// What looking for a pod by its name came to.
#[derive(PartialEq, Eq)]
pub(super) enum Search {
    Found,
    NotListed,
    Failed,
}

impl PodTask {
    pub(super) async fn place(&mut self, provider: &dyn GpuProvider, record: PodRecord) {
        let Some(candidate) = record.wanted.candidates.get(record.known.attempts.len()).cloned() else {
            let problem = refused_by_all(&record.known.attempts);
            self.refused(problem).await;
            return;
        };
        let asked_for = Timestamp::now().duration_since(record.wanted.requested_at);
        if asked_for > ASKED_FOR_WITHIN {
            self.refused(format!(
                "it was asked for {} minutes ago and not made in time; ask again",
                asked_for.as_mins()
            ))
            .await;
            return;
        }
        steps::reached("keeper: create taken");
        let spec = match self.spec(provider, &record, &candidate.gpu).await {
            Ok(spec) => spec,
            Err(problem) => {
                self.refused(problem).await;
                return;
            }
        };
        // A time that is far from ours is heard a second time before anything hangs on it.
        if self.keeper.clock.is_in_doubt() && !self.asked_for_time {
            self.asked_for_time = true;
            self.call_again_in(self.keeper.timing.backoff_first);
            return;
        }
        // Asking for the account's keys told the provider's time, as a rule; else the pod itself tells when it was made.
        let expires_at = self.keeper.clock.told().map(|now| later(now, record.lifetime()));
        let journaled = self
            .know(move |record| {
                record.known.phase = Phase::Posting;
                record.known.posted_at = Some(Timestamp::now());
                record.known.expires_at = expires_at;
                record.known.problem = None;
            })
            .await;
        // Without the journal on disk there is no POST; and asking for the account's keys took a moment, in which the
        // wish may have been taken back, or we were told to end.
        let still_wanted = matches!(self.record(), Ok(Some(record)) if self.reason_to_end(&record).is_none());
        if !journaled || !still_wanted || self.others_are_due() || self.keeper.stop.is_cancelled() {
            self.back_off();
            self.know(|record| record.known.phase = Phase::Journaled).await;
            return;
        }
        tracing::info!(pod = spec.name, gpu = spec.gpu, "creating");
        self.note("create_posted", json!({ "gpu": spec.gpu, "usd_per_hour": candidate.price_per_hour }));
        steps::reached("keeper: create journaled");
        // The pod is made now, if at all.
        self.lifetime = Lifetime::start();
        let posted_at = self.keeper.clock.told();
        match provider.create_pod(&spec).await {
            Ok(answer) => {
                steps::reached("keeper: create answered");
                let now = self.succeeded(&answer);
                let elapsed = self.lifetime.elapsed();
                self.found(answer.value, now).await;
                if let Some(posted_at) = posted_at {
                    self.correct_deadline(now.duration_since(later(posted_at, elapsed))).await;
                }
                steps::reached("keeper: create recorded");
            }
            Err(error) => self.not_created(error, candidate.gpu).await,
        }
    }

    /// Takes a pod that is there into the record. If the disk doesn't take it, it is kept in memory and tried again with
    /// each step, and its deadline is kept all the same.
    pub(super) async fn found(&mut self, pod: Pod, now: Timestamp) {
        self.seen_by = self.keeper.account.borrow().clone();
        let learnt = pod.clone();
        let is_told = self.keeper.clock.told().is_some();
        let change = move |record: &mut PodRecord| {
            record.learn_and_judge(&learnt, now);
            if is_told {
                record.set_deadline(now);
            }
            record.known.problem = None;
        };
        let reserved = self.reserved_per_hour();
        match self.keeper.fleet.know(&self.intent, change).await {
            Ok(Some(record)) => {
                let facts = json!({
                    "pod_id": pod.id, "gpu": pod.gpu, "data_center": pod.data_center, "usd_per_hour": pod.cost_per_hour,
                    "expires_at": record.expires_at(),
                });
                self.last = Some(record);
                self.note("pod_found", facts);
                self.keep_within_caps(reserved).await;
            }
            Ok(None) => {
                tracing::error!(pod = pod.id, "a new pod's record has left the file");
                self.unrecorded = Some((pod, now));
            }
            Err(error) => {
                tracing::error!(pod = pod.id, error = %chain(&error), "a new pod can't be recorded; trying again");
                self.unrecorded = Some((pod, now));
            }
        }
    }

    /// The provider's answer told another time than the deadline was set by: it is as far away as before.
    async fn correct_deadline(&mut self, by: SignedDuration) {
        if by.abs() > LEAST_CORRECTION {
            self.know(move |record| {
                record.known.expires_at = record.known.expires_at.map(|expires_at| later(expires_at, by));
            })
            .await;
        }
    }

    async fn not_created(&mut self, error: ProviderError, gpu: String) {
        let problem = chain(&error);
        tracing::warn!(pod = self.name, gpu, error = problem, "not created");
        self.note("not_created", json!({ "gpu": gpu, "may_exist": error.may_have_happened(), "cause": problem }));
        if error.may_have_happened() {
            // The pod may appear in the list within moments.
            self.call_again_in(self.keeper.timing.backoff_first);
            self.know(|record| {
                record.known.phase = Phase::Unknown;
                record.known.problem = Some(problem);
            })
            .await;
            return;
        }
        match error {
            // Definitely no pod with this GPU; the next one may do.
            ProviderError::Refused { .. } | ProviderError::Forbidden { .. } => {
                self.know(|record| {
                    record.known.phase = Phase::Journaled;
                    record.known.attempts.push(Attempt { gpu, outcome: problem });
                })
                .await;
            }
            ProviderError::RateLimited { retry_after } if self.asked_recently() => {
                self.call_again_in(retry_after);
                self.know(|record| {
                    record.known.phase = Phase::Journaled;
                    record.known.problem = Some(problem);
                })
                .await;
            }
            ProviderError::Unreachable { .. } if self.asked_recently() => {
                self.back_off();
                self.know(|record| {
                    record.known.phase = Phase::Journaled;
                    record.known.problem = Some(problem);
                })
                .await;
            }
            error => {
                let by_account =
                    matches!(error, ProviderError::Unauthorized { .. } | ProviderError::PaymentRequired { .. });
                let outcome = problem.clone();
                self.know(move |record| {
                    record.known.refused_by_account = by_account;
                    record.known.attempts.push(Attempt { gpu, outcome });
                })
                .await;
                self.refused(problem).await;
            }
        }
    }

    fn asked_recently(&self) -> bool {
        let asked = self.record().ok().flatten().map(|record| record.wanted.requested_at);
        asked.is_some_and(|at| Timestamp::now().duration_since(at) < TRY_FOR)
    }

    async fn refused(&mut self, problem: String) {
        self.know(|record| {
            record.known.phase = Phase::Refused;
            record.known.problem = Some(problem);
        })
        .await;
    }

    /// Looks for the pod by its unique name.
    pub(super) async fn search(&mut self, provider: &dyn GpuProvider, record: &PodRecord) -> Search {
        let cloud_name = record.cloud_name(&self.name);
        match self.list(provider).await {
            Ok(listed) => {
                let now = self.calm_down();
                let mut ours = listed.value.iter().filter(|pod| pod.name == cloud_name);
                if let Some(pod) = ours.next().cloned() {
                    if ours.next().is_some() {
                        // Something between us and the provider sent the request twice.
                        self.keeper.pods_may_be_lost.send_replace(true);
                    }
                    tracing::info!(pod = pod.id, "a pod whose create had no clear answer was found");
                    self.found(pod, now).await;
                    return Search::Found;
                }
                let timing = &self.keeper.timing;
                let is_young = record.lacked_for() < TURNS_UP_WITHIN;
                self.call_again_in(if is_young { timing.pod_poll_waiting } else { timing.pod_poll_settled });
                if !self.may_prove_absence() {
                    return Search::Failed;
                }
                self.know(move |record| {
                    let from = record.known.lacked.map_or(now, |(from, _)| from.min(now));
                    record.known.lacked = Some((from, now));
                })
                .await;
                Search::NotListed
            }
            Err(error) => {
                self.back_off();
                tracing::warn!(pod = self.name, error = %chain(&error), "the pod can't be looked for");
                Search::Failed
            }
        }
    }

    async fn spec(&mut self, provider: &dyn GpuProvider, record: &PodRecord, gpu: &str) -> Result<PodSpec, String> {
        let request = &record.wanted.request;
        let (home, timing) = (self.keeper.home.clone(), self.keeper.timing.clone());
        // It may wait for a lock.
        let identity = tokio::task::spawn_blocking(move || HomeIdentity::ensure(&home, &timing))
            .await
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
            .map_err(|error| chain(&error))?;
        let ours = self.keeper.ssh.public_key().await.map_err(|error| chain(&error))?;
        // Naming PUBLIC_KEY replaces what the provider would put there, so the account's keys go in beside ours. A key
        // that may not read them is no reason to fail.
        let mut keys = match provider.ssh_keys().await {
            Ok(keys) => {
                self.succeeded(&keys);
                keys.value
            }
            Err(error) => {
                tracing::warn!(error = %chain(&error), "the account's SSH keys can't be read; the pod gets only ours");
                Vec::new()
            }
        };
        keys.push(ours);
        let mut env = BTreeMap::from([
            ("PUBLIC_KEY".to_owned(), keys.join("\n")),
            (ENV_OWNER.to_owned(), identity.owner),
            (ENV_EXPIRES_AT.to_owned(), later(self.keeper.clock.now(), record.lifetime()).to_string()),
        ]);
        for (name, value) in &request.env {
            let EnvValue::Clear(value) = value else { return Err("its environment was sent once already".to_owned()) };
            env.insert(name.clone(), value.clone());
        }
        Ok(PodSpec {
            name: record.cloud_name(&self.name),
            image: Some(request.image.clone()).filter(|image| !image.is_empty()),
            template: request.template.clone(),
            registry: request.registry.clone(),
            gpu: gpu.to_owned(),
            gpu_count: request.gpu_count,
            min_cuda: request.min_cuda.clone(),
            cloud: request.cloud,
            data_centers: request.data_centers.clone(),
            disk_gb: request.disk_gb,
            volume: request.volume.clone(),
            ports: request.ports.clone(),
            env,
        })
    }
}

/// When all refuse alike it is not the stock but the request.
fn refused_by_all(attempts: &[Attempt]) -> String {
    match attempts {
        [] => "there was nothing to try".to_owned(),
        [first, rest @ ..] if !rest.is_empty() && rest.iter().all(|other| other.outcome == first.outcome) => {
            format!("all {} GPUs were refused alike, so it may be the request: {}", attempts.len(), first.outcome)
        }
        _ => {
            let all: Vec<_> = attempts.iter().map(|attempt| format!("{}: {}", attempt.gpu, attempt.outcome)).collect();
            format!("every GPU was refused ({})", all.join("; "))
        }
    }
}
