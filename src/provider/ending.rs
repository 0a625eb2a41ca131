//! Ending a pod and proving it, the same way for whoever has to do it.

use super::{GpuProvider, PodStatus, ProviderError, Stamped};

/// What one DELETE came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Both the pod's own page and the list lack it.
    pub is_proven: bool,
    /// The provider took the DELETE; else the pod was gone already, as far as it says.
    pub was_there: bool,
}

/// One DELETE and the look for proof. With `may_lag` the pod is so young that a 404 may only mean that it isn't shown
/// yet; then nothing was ended and nothing is proven.
pub async fn delete_and_prove(
    provider: &dyn GpuProvider,
    id: &str,
    may_lag: bool,
) -> Result<Stamped<Ended>, ProviderError> {
    let was_there = match provider.delete_pod(id).await {
        Ok(_) => true,
        Err(ProviderError::NotFound { .. }) => false,
        Err(error) => return Err(error),
    };
    let so_far = |is_proven| Ended { is_proven, was_there };
    if may_lag && !was_there {
        return Ok(Stamped { value: so_far(false), date: None });
    }
    match provider.pod(id).await {
        Ok(answer) if answer.value.status != PodStatus::Terminated => {
            return Ok(Stamped { value: so_far(false), date: answer.date });
        }
        Ok(_) | Err(ProviderError::NotFound { .. }) => {}
        Err(error) => return Err(error),
    }
    let listed = provider.pods().await?;
    let there = listed.value.iter().any(|pod| pod.id == id && pod.status != PodStatus::Terminated);
    Ok(Stamped { value: so_far(!there), date: listed.date })
}
