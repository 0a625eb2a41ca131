//! Ending a pod and proving it, the same way for whoever has to do it.

use super::{GpuProvider, PodStatus, ProviderError, Stamped};

/// One DELETE and the look for proof: true when both the pod's own page and the list lack it. With `may_lag` the pod is
/// so young that a 404 may only mean that it isn't shown yet; then nothing was ended and nothing is proven.
pub async fn delete_and_prove(
    provider: &dyn GpuProvider,
    id: &str,
    may_lag: bool,
) -> Result<Stamped<bool>, ProviderError> {
    match provider.delete_pod(id).await {
        Ok(_) => {}
        Err(ProviderError::NotFound { .. }) if may_lag => return Ok(Stamped { value: false, date: None }),
        Err(ProviderError::NotFound { .. }) => {}
        Err(error) => return Err(error),
    }
    match provider.pod(id).await {
        Ok(answer) if answer.value.status != PodStatus::Terminated => {
            return Ok(Stamped { value: false, date: answer.date });
        }
        Ok(_) | Err(ProviderError::NotFound { .. }) => {}
        Err(error) => return Err(error),
    }
    let listed = provider.pods().await?;
    let there = listed.value.iter().any(|pod| pod.id == id && pod.status != PodStatus::Terminated);
    Ok(Stamped { value: !there, date: listed.date })
}
