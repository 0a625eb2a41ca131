//! Whether pods and tunnels are looked after: by a keeper that lives, answers and has the key.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;

use super::{Finding, patience};
use crate::background::{Hello, KeeperClient, version};
use crate::config::Home;
use crate::fleet::{Phase, PodRecord, TURNS_UP_WITHIN};
use crate::state::RecordFile;
use crate::timing::Timing;
use crate::tunnel::{TunnelRecord, TunnelState};

/// A keeper's loop turns each second; after this it hangs.
const LONGEST_TURN: Duration = Duration::from_secs(30);
/// The keeper ends a pod within seconds of its deadline.
const OVERDUE_AFTER_SECONDS: i64 = 30;

pub(super) async fn fleet(home: &Home, now: Timestamp) -> Vec<Finding> {
    let lock = home.lock("state");
    // What can't be read was told of already.
    let pods = RecordFile::<PodRecord>::new(home.pods_file(), lock.clone(), patience()).look();
    let pods = open(pods.unwrap_or_default().entries, PodRecord::is_open);
    let tunnels = RecordFile::<TunnelRecord>::new(home.tunnels_file(), lock, patience()).look();
    let tunnels = open(tunnels.unwrap_or_default().entries, |record| record.wanted.open);
    let client = KeeperClient::new(home, &Timing::quick(), None, None, "", false);
    let (is_alive, hello) = (client.is_alive(), client.hello().await);
    let mut findings = vec![keeper(is_alive, hello.as_ref(), pods.len(), tunnels.len())];
    findings.extend(pods.iter().flat_map(|(name, record)| pod(name, record, now)));
    findings.extend(tunnels.iter().filter_map(|(name, record)| tunnel(name, record, is_alive)));
    findings
}

fn open<R>(records: BTreeMap<String, R>, is_open: fn(&R) -> bool) -> BTreeMap<String, R> {
    records.into_iter().filter(|(_, record)| is_open(record)).collect()
}

fn keeper(is_alive: bool, hello: Option<&Hello>, pods: usize, tunnels: usize) -> Finding {
    let kept = format!("pods: {pods}, tunnels: {tunnels}");
    let starts = "run `autopod-mcp pod list`, which starts it; it needs the key";
    match hello {
        None if !is_alive && pods + tunnels == 0 => Finding::ok("keeper", "none runs, for there is nothing to keep"),
        None if !is_alive => {
            Finding::fail("keeper", format!("none runs, so nobody keeps deadlines and tunnels ({kept})"), starts)
        }
        None => Finding::fail(
            "keeper",
            format!("it runs but doesn't answer ({kept})"),
            "run `autopod-mcp pod list`, which replaces it; its log is `logs/keeper.log` in the home",
        ),
        Some(hello) if !hello.has_key && pods > 0 => Finding::fail(
            "keeper",
            format!("it has no key, so it can't end a pod ({kept})"),
            "set the key, then run `autopod-mcp pod list`",
        ),
        Some(hello) if Duration::from_millis(hello.loop_age_ms) > LONGEST_TURN => Finding::fail(
            "keeper",
            format!("its loop has not turned for {} s ({kept})", hello.loop_age_ms / 1000),
            format!("end process {}; another one takes over", hello.pid),
        ),
        Some(hello) if hello.version != version::OURS => Finding::warn(
            "keeper",
            format!("it is of version {}, and this is {} ({kept})", hello.version, version::OURS),
            "restart the programs that use the older one",
        ),
        Some(hello) => Finding::ok(
            "keeper",
            format!("process {}, has {}key; {kept}", hello.pid, if hello.has_key { "a " } else { "no " }),
        ),
    }
}

fn pod(name: &str, record: &PodRecord, now: Timestamp) -> Vec<Finding> {
    let kill = format!("run `autopod-mcp pod kill {name}`");
    let mut findings = Vec::new();
    if record.known.phase == Phase::Unknown {
        let found = format!(
            "whether a pod was made for `{name}` (intent {}, {}) is not known; up to ${:.2} are reserved for it until {}",
            record.intent,
            record.cloud_name(name),
            record.reserved_usd(Timestamp::now()),
            record.expires_at(),
        );
        let ends = format!("{kill}, which ends it on sight");
        let todo = if record.lacked_for() >= TURNS_UP_WITHIN {
            let minutes = record.lacked_for().as_mins();
            let intent = &record.intent;
            format!(
                "the provider has not shown it for {minutes} minutes, so it may be made anew: create it again with \
                 retry_unknown `{intent}` (`pod create --retry-unknown {intent}`); or {ends}"
            )
        } else {
            format!("{ends}; the keeper goes on looking for it")
        };
        findings.push(Finding::fail("intent", found, todo));
    }
    let late = now.as_second() - record.expires_at().as_second();
    if late > OVERDUE_AFTER_SECONDS {
        let id = record.known.pod_id.as_deref().unwrap_or("no id yet");
        let found = format!("`{name}` ({id}) should have ended at {} and is not proven gone", record.expires_at());
        findings.push(Finding::fail("deadline", found, kill));
    }
    findings
}

fn tunnel(name: &str, record: &TunnelRecord, is_held: bool) -> Option<Finding> {
    let why = match record.known.state {
        _ if !is_held => "nobody holds it".to_owned(),
        TunnelState::Healthy => return None,
        state => {
            let state = serde_json::to_value(state).ok().and_then(|state| state.as_str().map(str::to_owned));
            let cause = record.known.cause.as_deref().map(|cause| format!(": {cause}")).unwrap_or_default();
            format!("it is {}{cause}", state.unwrap_or_default())
        }
    };
    let todo = format!("run `autopod-mcp tunnel start {}`, which says what it waits for", record.wanted.pod);
    Some(Finding::warn("tunnel", format!("{name} is not healthy: {why}"), todo))
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;
    use crate::fleet::PodRequest;

    fn unknown(lacked: SignedDuration) -> PodRecord {
        let request = PodRequest::for_tests();
        let mut record = PodRecord::new("intent1".to_owned(), request, Vec::new(), SignedDuration::from_hours(1));
        record.known.phase = Phase::Unknown;
        let now = Timestamp::now();
        record.known.lacked = Some((now - lacked, now));
        record
    }

    #[test]
    fn a_create_that_was_lacked_for_long_enough_may_be_made_anew() {
        let todo = |lacked| pod("comfy", &unknown(lacked), Timestamp::now()).remove(0).todo.unwrap();
        let early = todo(TURNS_UP_WITHIN - SignedDuration::from_secs(1));
        assert!(early.contains("pod kill comfy") && !early.contains("retry"), "{early}");
        let late = todo(TURNS_UP_WITHIN);
        assert!(late.contains("retry_unknown `intent1`") && late.contains("pod kill comfy"), "{late}");
    }
}
