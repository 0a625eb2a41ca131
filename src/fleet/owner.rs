//! Who this home is in the cloud: pods carry the owner in their environment, so that two machines on one account
//! leave each other's pods alone.

use serde::{Deserialize, Serialize};

use crate::config::Home;
use crate::state::{self, Lock, StateError};
use crate::timing::Timing;

/// The pod's environment variable that names the home it belongs to.
pub const ENV_OWNER: &str = "AUTOPOD_OWNER";
/// The pod's environment variable that says when it is to end, RFC 3339.
pub const ENV_EXPIRES_AT: &str = "AUTOPOD_EXPIRES_AT";

/// `home.json`: written before the first create and never rewritten.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HomeIdentity {
    pub schema: u32,
    pub owner: String,
}

impl HomeIdentity {
    /// Reads it, or makes it on first use. Two first uses at once agree, for it is made under the lock.
    pub fn ensure(home: &Home, timing: &Timing) -> Result<Self, StateError> {
        if let Some(identity) = Self::read(home)? {
            return Ok(identity);
        }
        let _lock = Lock::take(&home.lock("state"), timing.state_lock)?;
        if let Some(identity) = Self::read(home)? {
            return Ok(identity);
        }
        let identity = Self { schema: 1, owner: uuid::Uuid::new_v4().simple().to_string() };
        state::write_json(&home.home_file(), &identity)?;
        Ok(identity)
    }

    pub fn read(home: &Home) -> Result<Option<Self>, StateError> {
        let path = home.home_file();
        let Some(bytes) = state::read_file(&path)? else { return Ok(None) };
        match serde_json::from_slice(&bytes) {
            Ok(identity) => Ok(Some(identity)),
            // A new owner would disown the pods of the old one, so a broken file is an error and not a fresh start.
            Err(source) => Err(StateError::Json { path, source }),
        }
    }
}
