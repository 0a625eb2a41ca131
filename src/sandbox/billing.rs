//! What a pod has cost so far, kept as stretches of time at one rate.

use jiff::Timestamp;

/// USD per GB and hour of container disk, from RunPod's price of 0.10 a month.
pub const DISK_GB_HOUR: f64 = 0.10 / (30.0 * 24.0);

/// A pod's own volume disk costs this while the pod runs, and twice as much while it is stopped.
pub const VOLUME_GB_HOUR: f64 = 0.10 / (30.0 * 24.0);

/// The running total of one pod.
#[derive(Debug, Default, Clone)]
pub struct Meter {
    stretches: Vec<Stretch>,
}

#[derive(Debug, Clone)]
struct Stretch {
    from: Timestamp,
    /// `None` while it is still being charged.
    to: Option<Timestamp>,
    gpu_rate: f64,
    disk_rate: f64,
}

/// USD by kind.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct Amounts {
    pub gpu: f64,
    pub disk: f64,
}

impl Amounts {
    pub fn total(self) -> f64 {
        self.gpu + self.disk
    }
}

impl std::ops::AddAssign for Amounts {
    fn add_assign(&mut self, more: Self) {
        self.gpu += more.gpu;
        self.disk += more.disk;
    }
}

impl Meter {
    /// Charges from `at` on, in USD an hour; ends what was charged before.
    pub fn charge(&mut self, at: Timestamp, gpu_rate: f64, disk_rate: f64) {
        self.stop(at);
        self.stretches.push(Stretch { from: at, to: None, gpu_rate, disk_rate });
    }

    pub fn stop(&mut self, at: Timestamp) {
        if let Some(last) = self.stretches.last_mut()
            && last.to.is_none()
        {
            last.to = Some(at.max(last.from));
        }
    }

    /// What was charged in `[from, to)`, seen at `now`.
    pub fn between(&self, from: Timestamp, to: Timestamp, now: Timestamp) -> Amounts {
        let mut sum = Amounts::default();
        for stretch in &self.stretches {
            let start = stretch.from.max(from);
            let end = stretch.to.unwrap_or(now).min(to);
            if end > start {
                let hours = end.duration_since(start).as_secs_f64() / 3600.0;
                sum += Amounts { gpu: hours * stretch.gpu_rate, disk: hours * stretch.disk_rate };
            }
        }
        sum
    }

    pub fn total(&self, now: Timestamp) -> Amounts {
        self.between(Timestamp::MIN, Timestamp::MAX, now)
    }
}
