//! A look at everything that a pod's way to the user depends on. It changes nothing, makes no folder, starts no
//! process that stays, and ends in bounded time with no key and no network too.

mod fleet_checks;
mod home_checks;

use std::time::Duration;

use jiff::Timestamp;
use secrecy::SecretString;
use serde::Serialize;

use super::{Account, AppOptions, look_at_account, origin_as_set, sandbox_home, timing_for};
use crate::background::account_of;
use crate::config::{self, Config, ConfigError, Home};
use crate::errors::chain;
use crate::fleet::HomeIdentity;
use crate::ssh::Ssh;
use crate::timing::Timing;
use crate::tools::{ErrorKind, ToolError};

const MOST_SKEW_SECONDS: i64 = 60;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    Ok,
    /// It works, but not as it should, or not for long.
    Warn,
    /// Something can't work, or money is being spent that nobody looks after.
    Fail,
}

/// What one check came to.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    pub check: &'static str,
    pub health: Health,
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub todo: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, health: Health::Ok, found: found.into(), todo: None }
    }

    fn warn(check: &'static str, found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self { check, health: Health::Warn, found: found.into(), todo: Some(todo.into()) }
    }

    fn fail(check: &'static str, found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self { check, health: Health::Fail, found: found.into(), todo: Some(todo.into()) }
    }
}

/// Who the provider is and how we come in.
struct Access {
    origin: String,
    key: Option<SecretString>,
    key_from: &'static str,
}

/// Every check in turn, the home first, for all else lies in it.
pub async fn examine(options: &AppOptions) -> Result<Vec<Finding>, ToolError> {
    let root = super::home_folder(&options.environment)?;
    let outer = Home::unopened(root.canonicalize().unwrap_or(root));
    let home = if options.sandbox { Home::unopened(outer.sandbox()) } else { outer };
    let mut findings = home_checks::home(&home);
    let config = if options.sandbox { Config::read_for_sandbox(&home) } else { Config::read(&home) };
    findings.push(home_checks::config(&home, &config));
    let access = access(options, &home, &config);
    let (account, ssh) = tokio::join!(account(&access, options.sandbox), ssh(options));
    let now = findings_of_account(&mut findings, &home, &access, &config, account);
    findings.push(ssh);
    findings.push(home_checks::key_pair(&home));
    findings.extend(home_checks::records(&home));
    findings.extend(fleet_checks::fleet(&home, now).await);
    Ok(findings)
}

fn access(options: &AppOptions, home: &Home, config: &Result<Config, ConfigError>) -> Access {
    if options.sandbox {
        let world = sandbox_home::living(home).ok().flatten();
        let (origin, key) = world.map_or_else(|| (String::new(), None), |world| (world.url, Some(world.key)));
        return Access { origin, key, key_from: "the sandbox" };
    }
    // As the services are wired: a mistyped limit takes no key away.
    let set = match config {
        Ok(config) => config::Access::of(config),
        Err(_) => config::Access::read(home).unwrap_or_default(),
    };
    let (key, key_from) = match &options.environment.api_key {
        Some(key) => (Some(key.clone()), "RUNPOD_API_KEY"),
        None => (set.api_key.clone(), "config.json"),
    };
    Access { origin: origin_as_set(&options.environment, &set), key, key_from }
}

/// What the provider says, asked with our key.
async fn account(access: &Access, is_sandbox: bool) -> Result<Account, Finding> {
    let Some(key) = &access.key else {
        return Err(if is_sandbox {
            Finding::warn("key", "no sandbox runs", "any command with --sandbox starts one")
        } else {
            Finding::fail(
                "key",
                "no RunPod API key is set: nothing can be created, and nobody can end a pod that runs",
                "run `autopod-mcp config init`, or set RUNPOD_API_KEY where this program is started",
            )
        });
    };
    // As long for all that is asked as for one request otherwise: somebody looks at an empty line meanwhile.
    let patience = timing_for(&access.origin).http_request;
    let asked = tokio::time::timeout(patience, look_at_account(&access.origin, key.clone())).await;
    let error = match asked {
        Ok(Ok(account)) => return Ok(account),
        Ok(Err(error)) => error,
        Err(_) => ToolError::new(ErrorKind::Network, format!("it did not answer within {patience:?}")),
    };
    let found = format!("the key of {} could not be tried at {}: {}", access.key_from, access.origin, error.message);
    let todo = match error.kind {
        ErrorKind::Network => "look at the network, a proxy, or https://uptime.runpod.io, and try again".to_owned(),
        _ => error.hint.unwrap_or_else(|| "run `autopod-mcp config init` with another key".to_owned()),
    };
    Err(Finding::fail("key", found, todo))
}

/// Returns the time that counts: the provider's where it told one.
fn findings_of_account(
    findings: &mut Vec<Finding>,
    home: &Home,
    access: &Access,
    config: &Result<Config, ConfigError>,
    account: Result<Account, Finding>,
) -> Timestamp {
    let here = Timestamp::now();
    let account = match account {
        Ok(account) => account,
        Err(finding) => {
            findings.push(finding);
            return here;
        }
    };
    let pods = account.pods.value.len();
    let accepted =
        format!("the key of {} is accepted by {}; pods in the account: {pods}", access.key_from, access.origin);
    findings.push(Finding::ok("key", accepted));
    findings.extend(whose_home(home, access));
    if let Ok(config) = config {
        findings.extend(default_volume(config, &account));
    }
    let there = account.pods.date;
    findings.push(clock(here, there));
    there.unwrap_or(here)
}

/// A home keeps the pods of one account only.
fn whose_home(home: &Home, access: &Access) -> Option<Finding> {
    let bound = HomeIdentity::read(home).ok()??.account?;
    let ours = account_of(&access.origin, access.key.as_ref()?);
    (bound != ours).then(|| {
        Finding::warn(
            "account",
            "this home was last used with another key",
            "if that key was of the same account, go on; else set AUTOPOD_HOME to another folder for this account",
        )
    })
}

fn default_volume(config: &Config, account: &Account) -> Option<Finding> {
    let (wanted, volumes) = (config.default_volume_id.as_ref()?, account.volumes.as_ref()?);
    if volumes.iter().any(|volume| volume.id == *wanted || volume.name == *wanted) {
        return None;
    }
    let known: Vec<_> = volumes.iter().map(|volume| format!("{} ({})", volume.name, volume.id)).collect();
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    Some(Finding::warn(
        "default volume",
        format!("the account has no volume `{wanted}`; it has {known}"),
        "run `autopod-mcp config set default_volume_id ID`, or `autopod-mcp config unset default_volume_id`",
    ))
}

fn clock(here: Timestamp, there: Option<Timestamp>) -> Finding {
    let Some(there) = there else {
        return Finding::warn("clock", "the provider told no time", "nothing; deadlines go by this machine's clock");
    };
    let skew = here.as_second() - there.as_second();
    let direction = if skew > 0 { "ahead of" } else { "behind" };
    if skew.abs() <= MOST_SKEW_SECONDS {
        return Finding::ok("clock", "it agrees with the provider's");
    }
    Finding::warn(
        "clock",
        format!("this machine's clock is {} s {direction} the provider's", skew.abs()),
        "set the clock, by NTP; until then a deadline may come too early by as much",
    )
}

async fn ssh(options: &AppOptions) -> Finding {
    match Ssh::version(&options.environment.for_children).await {
        Ok(version) => Finding::ok("ssh", version),
        Err(cause) => {
            Finding::fail("ssh", chain(&cause), "install OpenSSH's client; tunnels need `ssh` and `ssh-keygen`")
        }
    }
}

/// How long a lock may be waited for; nothing here takes one, but records are read through what could.
fn patience() -> Duration {
    Timing::quick().state_lock
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;

    #[test]
    fn a_clock_is_wrong_from_a_minute_on() {
        let now = Timestamp::now();
        assert_eq!(clock(now, Some(now + SignedDuration::from_secs(60))).health, Health::Ok);
        let behind = clock(now, Some(now + SignedDuration::from_secs(61)));
        assert!(behind.health == Health::Warn && behind.found.contains("61 s behind"), "{behind:?}");
        let ahead = clock(now, Some(now - SignedDuration::from_secs(3600)));
        assert!(ahead.health == Health::Warn && ahead.found.contains("3600 s ahead of"), "{ahead:?}");
        assert_eq!(clock(now, None).health, Health::Warn);
    }
}
