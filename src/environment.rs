//! Every environment variable the program reads, in one list. Only `cli` calls [`Environment::read`]; below it the
//! values are passed in.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use secrecy::SecretString;

/// Where state lives; `~/.autopod` when unset.
pub const AUTOPOD_HOME: &str = "AUTOPOD_HOME";
/// The RunPod API key; the config file's `api_key` when unset.
pub const RUNPOD_API_KEY: &str = "RUNPOD_API_KEY";
/// The origin of RunPod's REST API, with or without `/v2`; `https://api.runpod.io` when unset.
pub const RUNPOD_API_BASE_URL: &str = "RUNPOD_API_BASE_URL";
/// A filter for the log on stderr, in `tracing`'s syntax; `warn` when unset.
pub const AUTOPOD_LOG: &str = "AUTOPOD_LOG";
/// For tests: `STEP=FILE` kills the process that first comes to that step, see [`crate::steps`].
pub const AUTOPOD_DIE_AT: &str = "AUTOPOD_DIE_AT";
/// What background processes and ssh may see: where the user's agent listens, who the user is, what terminal a shell in
/// a pod is to be drawn on, how much to log.
const FOR_CHILDREN: [&str; 8] =
    ["PATH", "HOME", "USER", "LOGNAME", "SSH_AUTH_SOCK", "TERM", AUTOPOD_LOG, AUTOPOD_DIE_AT];

#[derive(Debug, Clone, Default)]
pub struct Environment {
    pub autopod_home: Option<PathBuf>,
    pub user_home: Option<PathBuf>,
    pub api_key: Option<SecretString>,
    pub api_base_url: Option<String>,
    pub log_filter: Option<String>,
    pub die_at: Option<String>,
    /// The cleared environment that ssh and the keeper get.
    pub for_children: Vec<(String, OsString)>,
}

impl Environment {
    pub fn read() -> Self {
        let text = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let path = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let user_home = path("HOME");
        Self {
            autopod_home: path(AUTOPOD_HOME).map(|home| expand(home, user_home.as_deref())),
            user_home,
            api_key: text(RUNPOD_API_KEY).map(|key| SecretString::from(key.trim().to_owned())),
            api_base_url: text(RUNPOD_API_BASE_URL),
            log_filter: text(AUTOPOD_LOG),
            die_at: text(AUTOPOD_DIE_AT),
            for_children: FOR_CHILDREN
                .iter()
                .filter_map(|name| std::env::var_os(name).map(|value| ((*name).to_owned(), value)))
                .collect(),
        }
    }
}

/// `~/` stands for the user's home also where no shell has read the value, as in a client's configuration file.
fn expand(path: PathBuf, user_home: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~"), user_home) {
        (Ok(below), Some(user_home)) => user_home.join(below),
        _ => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_users_own_home_is_expanded() {
        let expanded = |path: &str| expand(path.into(), Some(Path::new("/home/me")));
        assert_eq!(expanded("~/pods"), Path::new("/home/me/pods"));
        assert_eq!(expanded("~"), Path::new("/home/me"));
        assert_eq!(expanded("~you/pods"), Path::new("~you/pods"));
        assert_eq!(expanded("/a/~/b"), Path::new("/a/~/b"));
        assert_eq!(expand("~/pods".into(), None), Path::new("~/pods"));
    }
}
