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

/// `home.json`: written before the first create; the owner is never rewritten.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HomeIdentity {
    pub schema: u32,
    pub owner: String,
    /// The account whose pods are recorded here: the provider's origin and a fingerprint of the key.
    #[serde(default)]
    pub account: Option<String>,
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
        let identity = Self { schema: 1, owner: uuid::Uuid::new_v4().simple().to_string(), account: None };
        state::write_json(&home.home_file(), &identity)?;
        Ok(identity)
    }

    /// Writes it anew after it was lost, with the owner that the home's pods carry.
    pub fn restore(home: &Home, timing: &Timing, owner: &str) -> Result<(), StateError> {
        let _lock = Lock::take(&home.lock("state"), timing.state_lock)?;
        if Self::read(home)?.is_some() {
            return Ok(());
        }
        state::write_json(&home.home_file(), &Self { schema: 1, owner: owner.to_owned(), account: None })
    }

    /// Binds the home to this account when it is bound to none, or when nothing of the other account is open. False
    /// when it stays another's. Whether something is open is asked under the lock, under which alone pods are asked
    /// for; it must not take that lock itself.
    pub fn bind(
        home: &Home,
        timing: &Timing,
        account: &str,
        something_is_open: impl FnOnce() -> Result<bool, StateError>,
    ) -> Result<bool, StateError> {
        let is_bound = |identity: &Self| identity.account.as_deref() == Some(account);
        let identity = Self::ensure(home, timing)?;
        if is_bound(&identity) {
            return Ok(true);
        }
        let _lock = Lock::take(&home.lock("state"), timing.state_lock)?;
        let identity = Self::read(home)?.unwrap_or(identity);
        if is_bound(&identity) {
            return Ok(true);
        }
        if identity.account.is_some() && something_is_open()? {
            return Ok(false);
        }
        state::write_json(&home.home_file(), &Self { account: Some(account.to_owned()), ..identity })?;
        Ok(true)
    }

    /// Makes it this account's home, whosever it was.
    pub fn rebind(home: &Home, timing: &Timing, account: &str) -> Result<(), StateError> {
        let identity = Self::ensure(home, timing)?;
        let _lock = Lock::take(&home.lock("state"), timing.state_lock)?;
        let identity = Self { account: Some(account.to_owned()), ..Self::read(home)?.unwrap_or(identity) };
        state::write_json(&home.home_file(), &identity)
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
