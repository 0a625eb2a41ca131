//! Which version keeps a home: a newer program takes over from an older one, never the other way round.

use serde::{Deserialize, Serialize};

use crate::config::Home;
use crate::state::{self, StateError};

pub const OURS: &str = env!("CARGO_PKG_VERSION");

/// `keeper.json`, there from a keeper's start until it ends with nothing wanted.
#[derive(Debug, Serialize, Deserialize)]
struct KeeperFile {
    version: String,
}

/// Says that we keep this home from now on.
pub fn announce(home: &Home) -> Result<(), StateError> {
    state::write_json(&home.keeper_file(), &KeeperFile { version: OURS.to_owned() })
}

/// Nothing is wanted any more, so any version may keep the home next.
pub fn withdraw(home: &Home) {
    let _ = std::fs::remove_file(home.keeper_file());
}

/// The version that keeps the home, if it is a newer one than ours.
pub(super) fn newer_keeper(home: &Home) -> Option<String> {
    let bytes = state::read_file(&home.keeper_file()).ok()??;
    let file: KeeperFile = serde_json::from_slice(&bytes).ok()?;
    is_newer(&file.version, OURS).then_some(file.version)
}

/// By the three numbers of semantic versioning; what isn't made of them is not newer.
pub(super) fn is_newer(theirs: &str, ours: &str) -> bool {
    let numbers = |version: &str| -> Option<[u64; 3]> {
        let release = version.split(['-', '+']).next()?;
        let parts: Vec<u64> = release.split('.').map(|part| part.parse().ok()).collect::<Option<_>>()?;
        parts.try_into().ok()
    };
    matches!((numbers(theirs), numbers(ours)), (Some(theirs), Some(ours)) if theirs > ours)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_their_numbers() {
        assert!(is_newer("0.10.0", "0.9.9") && is_newer("1.0.0", "0.99.0") && is_newer("0.1.1-rc.1", "0.1.0"));
        assert!(!is_newer("0.1.0", "0.1.0") && !is_newer("0.0.9", "0.1.0") && !is_newer("soon", "0.1.0"));
    }

    #[test]
    fn a_newer_keeper_is_seen_until_it_withdraws() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(folder.path().join("home")).unwrap();
        assert_eq!(newer_keeper(&home), None);
        announce(&home).unwrap();
        assert_eq!(newer_keeper(&home), None, "our own version is no newer one");
        state::write_file(&home.keeper_file(), br#"{"version": "999.0.0"}"#).unwrap();
        assert_eq!(newer_keeper(&home).as_deref(), Some("999.0.0"));
        withdraw(&home);
        assert_eq!(newer_keeper(&home), None);
    }
}
