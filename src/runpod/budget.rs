//! The rate budget.

use std::path::PathBuf;

/// Where the processes of a home share what they know of the rate limits.
#[derive(Debug, Clone)]
pub struct SharedBudget {
    pub file: PathBuf,
    pub lock: PathBuf,
}
