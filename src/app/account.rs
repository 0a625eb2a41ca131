//! A first look at an account through a key that nobody has tried yet.

use secrecy::SecretString;

use super::connect;
use crate::provider::{Pod, ProviderError, Stamped, Volume};
use crate::tools::ToolError;

/// What a key opens.
pub struct Account {
    /// With the provider's own time.
    pub pods: Stamped<Vec<Pod>>,
    /// `None` when the key may not list them.
    pub volumes: Option<Vec<Volume>>,
}

/// Asks the provider with this key. Only an answer proves it: an error says that nothing was learned, or that the key
/// was refused.
pub async fn look_at_account(origin: &str, key: SecretString) -> Result<Account, ToolError> {
    let provider = connect(None, origin, "autopod-mcp")?(key);
    let pods = provider.pods().await?;
    let volumes = match provider.volumes().await {
        Ok(volumes) => Some(volumes.value),
        Err(ProviderError::Forbidden { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    Ok(Account { pods, volumes })
}
