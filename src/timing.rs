//! Every time-out, back-off and interval as one value, so that tests can run the same code in milliseconds.

use std::time::Duration;

#[derive(Debug, Clone)]
pub struct Timing {
    /// How often the keeper compares what is wanted with what is known, woken or not.
    pub keeper_turn: Duration,
    /// How long the keeper lives on with nothing wanted.
    pub keeper_idle: Duration,
    /// How long a keeper may take to say hello before it counts as wedged or failed.
    pub keeper_hello: Duration,
    /// How long a tool waits for the keeper to take up an ending before it ends the pod itself.
    pub keeper_takes_ending: Duration,
    /// How often somebody waiting for a record looks at it.
    pub record_poll: Duration,
    /// How often a pod that isn't ready yet is asked for at the provider, and one that runs.
    pub pod_poll_waiting: Duration,
    pub pod_poll_settled: Duration,
    /// The back-off between attempts at what the network refused: tunnels, lost creates, endings.
    pub backoff_first: Duration,
    pub backoff_most: Duration,
    /// How long ssh may take from its start to the READY line.
    pub ssh_ready: Duration,
    /// How often a tunnel's far end is asked for `/system_stats` before and after it was healthy.
    pub health_poll_waiting: Duration,
    pub health_poll_settled: Duration,
    /// How often it is looked whether a pod that is to end when nobody uses it is used.
    pub idle_poll: Duration,
    /// A minute of such a pod's `idle_minutes`.
    pub idle_minute: Duration,
    pub http_connect: Duration,
    pub http_request: Duration,
    /// How long the one POST of a create may take.
    pub http_create: Duration,
    /// For how long after its create a pod may be missing from the provider's answers all the same.
    pub provider_lag: Duration,
    /// How long a lock over the records may be waited for.
    pub state_lock: Duration,
    /// How long any call of a tool may take: the longest wait a caller can ask for, and a last look after it.
    pub call_limit: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            keeper_turn: Duration::from_secs(1),
            keeper_idle: Duration::from_secs(60),
            keeper_hello: Duration::from_secs(10),
            keeper_takes_ending: Duration::from_secs(5),
            record_poll: Duration::from_millis(100),
            pod_poll_waiting: Duration::from_secs(3),
            pod_poll_settled: Duration::from_secs(15),
            backoff_first: Duration::from_secs(1),
            backoff_most: Duration::from_secs(30),
            ssh_ready: Duration::from_secs(20),
            health_poll_waiting: Duration::from_millis(500),
            health_poll_settled: Duration::from_secs(15),
            idle_poll: Duration::from_secs(30),
            idle_minute: Duration::from_secs(60),
            http_connect: Duration::from_secs(5),
            http_request: Duration::from_secs(20),
            http_create: Duration::from_secs(40),
            provider_lag: Duration::from_secs(60),
            state_lock: Duration::from_secs(10),
            call_limit: Duration::from_secs(WAIT_MOST_SECONDS + 3),
        }
    }
}

impl Timing {
    /// For a provider on loopback, which has no rate limit to spare and whose pods start within seconds.
    pub fn quick() -> Self {
        Self {
            keeper_turn: Duration::from_millis(200),
            record_poll: Duration::from_millis(50),
            pod_poll_waiting: Duration::from_millis(300),
            pod_poll_settled: Duration::from_secs(1),
            backoff_first: Duration::from_millis(300),
            backoff_most: Duration::from_secs(3),
            health_poll_settled: Duration::from_secs(1),
            idle_poll: Duration::from_secs(2),
            http_create: Duration::from_secs(5),
            http_request: Duration::from_secs(5),
            provider_lag: Duration::from_secs(5),
            ..Self::default()
        }
    }
}

/// How often a server looks whether the keeper lives.
pub const KEEPER_LOOKED_AFTER_EVERY: Duration = Duration::from_secs(5);

/// The limits of waiting that callers see.
pub const WAIT_DEFAULT_SECONDS: u64 = 40;
pub const WAIT_MOST_SECONDS: u64 = 45;
