//! Every way in which the answer to a create can go wrong, with two callers racing for the same pod: never more than one
//! pod a name and one POST an intent, and the money is set aside all the while.

use std::time::Duration;

use autopod_mcp::fleet::{Phase, PodRecord, committed};
use futures_util::future::join_all;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::keeper_support::{Answer, GPU, House, answer, tell, until};

const NAME: &str = "raced";
/// USD an hour of [`GPU`].
const PRICE: f64 = 0.25;
const ADOPTED_WITHIN: SignedDuration = SignedDuration::from_secs(60);
/// How many worlds work at the same time.
const AT_ONCE: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wrong {
    TimeOutBefore,
    TimeOutAfter,
    ServerErrorBefore,
    ServerErrorAfter,
    ResetAfter,
    Garbage,
    TooManyRequests,
    LaggingList,
}

const ALL: [Wrong; 8] = [
    Wrong::TimeOutBefore,
    Wrong::TimeOutAfter,
    Wrong::ServerErrorBefore,
    Wrong::ServerErrorAfter,
    Wrong::ResetAfter,
    Wrong::Garbage,
    Wrong::TooManyRequests,
    Wrong::LaggingList,
];

/// What a seed varies.
#[derive(Debug, Clone, Copy)]
struct Seed {
    second_caller_after: Duration,
    /// The world's clock leaps by so much, so late.
    leap: (Duration, u64),
    /// In the world's seconds.
    lag: u64,
    refusals: u64,
}

impl Seed {
    fn new(number: u64) -> Self {
        let mut state = number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut below = |most: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % most
        };
        Self {
            second_caller_after: Duration::from_millis(below(1200)),
            leap: (Duration::from_millis(below(1500)), below(8)),
            lag: 5 + below(25),
            refusals: 1 + below(3),
        }
    }
}

/// What one run came to.
#[derive(Debug, Clone, Copy)]
enum CameTo {
    /// After so long by the world's clock.
    Adopted(SignedDuration),
    /// Nothing was made; a later create made it.
    MadeLater,
}

impl Wrong {
    fn faults(self, seed: Seed) -> Vec<Value> {
        let at_the_create = |kind: &str| json!({ "operation": "createPod", "kind": kind, "status": 500 });
        match self {
            Self::TimeOutBefore => vec![at_the_create("hang_before")],
            Self::TimeOutAfter => vec![at_the_create("hang_after")],
            Self::ServerErrorBefore => vec![at_the_create("status_before")],
            Self::ServerErrorAfter => vec![at_the_create("status_after")],
            Self::ResetAfter => vec![at_the_create("reset_after")],
            Self::Garbage => vec![at_the_create("garbage")],
            Self::TooManyRequests => {
                let (kind, times) = ("status_before", seed.refusals);
                vec![json!({ "operation": "createPod", "kind": kind, "status": 429, "times": times })]
            }
            Self::LaggingList => {
                let lag =
                    json!({ "operation": "listPods", "kind": "lagging_list", "seconds": seed.lag, "times": 9999 });
                vec![at_the_create("status_after"), lag]
            }
        }
    }

    /// Whether the request whose answer went wrong made a pod.
    fn commits(self) -> bool {
        !matches!(self, Self::TimeOutBefore | Self::ServerErrorBefore | Self::TooManyRequests)
    }
}

struct Race {
    house: House,
    wrong: Wrong,
    seed: Seed,
}

impl Race {
    fn label(&self) -> String {
        format!("{:?}, {:?}", self.wrong, self.seed)
    }

    fn record(&self) -> Option<PodRecord> {
        self.house.fleet().get(NAME).expect("records")
    }

    /// The money that each pod that may exist could cost is set aside, from the first intent on.
    fn assert_reserved(&self, pods: usize) {
        let records = self.house.fleet().read().expect("records");
        if records.is_empty() {
            return;
        }
        let now = Timestamp::now();
        let (there, want) = (committed(&records, None, now), PRICE * pods as f64);
        assert!(there.per_hour > want - 0.001, "{}: {there:?}", self.label());
        let usd: f64 = there.by_day.values().sum();
        assert!(usd > want * 3.5, "{}: {there:?}", self.label());
    }

    /// Two callers at once, and an eye on the money until `is_over`.
    async fn callers(&self, arguments: Value, pods: usize, is_over: impl Fn(&PodRecord) -> bool) -> [Answer; 2] {
        let call = || answer(self.house.command("create_pod_with_volume", &arguments));
        let second = async {
            tokio::time::sleep(self.seed.second_caller_after).await;
            call().await
        };
        let watch = until("the create's outcome", async || {
            self.assert_reserved(pods);
            self.record().filter(|record| is_over(record))
        });
        let (first, second, _) = tokio::join!(call(), second, watch);
        [first, second]
    }

    /// One of the answers made the intent, and both speak of it.
    fn assert_one_intent(&self, answers: &[Answer; 2]) -> String {
        let label = self.label();
        assert!(answers.iter().all(|answer| answer.code == 0), "{label}: {answers:?}");
        let created = answers.iter().filter(|answer| answer.value["created"] == true).count();
        assert_eq!(created, 1, "{label}: {answers:?}");
        let [first, second] = answers.each_ref().map(|answer| answer.value["intent"].as_str());
        assert!(first.is_some() && first == second, "{label}: {answers:?}");
        first.unwrap_or_default().to_owned()
    }

    /// POSTs but those that were refused for their number, by the name that they asked for.
    fn posts(&self, intent: &str) -> usize {
        let name = format!("autopod-{NAME}-{intent}");
        let requests = self.house.sandbox.requests();
        let of_intent = |entry: &&Value| entry["operation"] == "createPod" && entry["request_body"]["name"] == name;
        requests.iter().filter(of_intent).filter(|entry| entry["status"] != 429).count()
    }

    async fn run(self) -> CameTo {
        let label = self.label();
        let (leap_at, leap) = self.seed.leap;
        let is_over = |record: &PodRecord| match self.wrong {
            Wrong::TimeOutBefore | Wrong::ServerErrorBefore => record.known.phase == Phase::Unknown,
            _ => record.known.phase == Phase::Placed,
        };
        let clock = async {
            tokio::time::sleep(leap_at).await;
            self.house.advance(leap as f64).await;
            if self.wrong == Wrong::LaggingList {
                until("the pod", async || (!self.house.alive().await.is_empty()).then_some(())).await;
                self.house.advance(self.seed.lag as f64).await;
            }
        };
        let arguments = json!({ "name": NAME, "gpus": [GPU], "wait_seconds": 0 });
        let (answers, ()) = tokio::join!(self.callers(arguments, 1, is_over), clock);
        let intent = self.assert_one_intent(&answers);
        assert_eq!(self.posts(&intent), 1, "{label}");
        if !self.wrong.commits() && self.wrong != Wrong::TooManyRequests {
            self.made_later(&intent).await;
            self.house.end().await;
            return CameTo::MadeLater;
        }
        let adopted = self.house.world_now().await;
        let refused = if self.wrong == Wrong::TooManyRequests { self.seed.refusals as usize } else { 0 };
        assert_eq!(self.house.asked("createPod"), 1 + refused, "{label}");
        let alive = self.house.alive().await;
        assert_eq!(alive.len(), 1, "{label}");
        let record = self.record().expect("a record");
        assert_eq!(json!(record.known.pod_id), alive[0]["id"], "{label}");
        let made: Timestamp = alive[0]["created_at"].as_str().and_then(|at| at.parse().ok()).expect("a time");
        self.assert_reserved(1);
        self.house.end().await;
        CameTo::Adopted(adopted.duration_since(made))
    }

    /// The POST made nothing, which nobody can know: for ten minutes of the list nothing else is made, then one pod is.
    async fn made_later(&self, intent: &str) {
        let label = self.label();
        assert_eq!(self.house.alive().await.len(), 0, "{label}");
        let arguments = json!({ "name": NAME, "gpus": [GPU], "wait_seconds": 0, "retry_unknown": intent });
        let early = self.house.call("create_pod_with_volume", arguments.clone()).await;
        assert_eq!(early.code, 4, "{label}: {early:?}");
        early.assert_says("may still turn up");
        until("a look at the list", async || self.record()?.known.lacked).await;
        self.house.advance(601.0 + self.seed.leap.1 as f64).await;
        until("ten minutes of the list", async || {
            self.assert_reserved(1);
            self.record().filter(|record| record.lacked_for() >= SignedDuration::from_mins(10))
        })
        .await;
        let is_over = |record: &PodRecord| record.intent != intent && record.known.phase == Phase::Placed;
        let answers = self.callers(arguments, 1, is_over).await;
        let second = self.assert_one_intent(&answers);
        assert_ne!(second, intent, "{label}");
        assert_eq!((self.posts(intent), self.posts(&second)), (1, 1), "{label}");
        assert_eq!((self.house.asked("createPod"), self.house.alive().await.len()), (2, 1), "{label}");
        // Should the first one turn up after all, it costs until it was ended.
        self.assert_reserved(2);
    }
}

pub async fn matrix(seeds: std::ops::Range<u64>) {
    let mut races: Vec<_> =
        seeds.flat_map(|number| ALL.into_iter().map(move |wrong| (wrong, Seed::new(number)))).collect();
    // Those that wait for a time-out go first, beside each other.
    races.sort_by_key(|(wrong, _)| !matches!(wrong, Wrong::TimeOutBefore | Wrong::TimeOutAfter));
    let queue = std::sync::Mutex::new(races.clone().into_iter());
    let workers = join_all((0..AT_ONCE).map(async |_| {
        let mut came_to = Vec::new();
        loop {
            let next = queue.lock().expect("nobody panicked").next();
            let Some((wrong, seed)) = next else { return came_to };
            let house = House::new().await;
            for fault in wrong.faults(seed) {
                house.fault(fault).await;
            }
            came_to.push((wrong, Race { house, wrong, seed }.run().await));
        }
    }))
    .await;
    let came_to: Vec<_> = workers.into_iter().flatten().collect();
    assert_eq!(came_to.len(), races.len());
    let mut slowest = SignedDuration::ZERO;
    for wrong in ALL {
        let of_this = came_to.iter().filter(|(of, _)| *of == wrong);
        let adopted: Vec<_> = of_this
            .clone()
            .filter_map(|(_, came_to)| match came_to {
                CameTo::Adopted(after) => Some(*after),
                CameTo::MadeLater => None,
            })
            .collect();
        let longest = adopted.iter().max().copied().unwrap_or_default();
        slowest = slowest.max(longest);
        tell(&format!(
            "create, {wrong:?}: {} runs, {} in the record within {:.1} s of the world's time, {} made by a later create",
            of_this.clone().count(),
            adopted.len(),
            longest.as_secs_f64(),
            of_this.count() - adopted.len()
        ));
    }
    assert!(slowest <= ADOPTED_WITHIN, "a pod was adopted only after {slowest:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_callers_make_one_pod_whatever_goes_wrong() {
    matrix(0..5).await;
}
