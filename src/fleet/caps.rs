//! What no call may exceed, whatever an assistant asks for.

/// Pods of this home that may exist at once.
pub const MOST_PODS: usize = 2;
/// USD an hour that one pod may cost.
pub const MOST_PRICE_PER_HOUR: f64 = 1.50;
/// How long a pod lives when its create names no lifetime.
pub const DEFAULT_LIFETIME_MINUTES: u32 = 4 * 60;
/// The longest lifetime a create can ask for.
pub const MOST_LIFETIME_MINUTES: u32 = 24 * 60;
