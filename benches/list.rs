//! What a list of 1,000 pods costs, through the client and its rate budget, beside a bare read of the same body as JSON.
//! Fails above the bounds it prints: `cargo bench --bench list`.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use autopod_mcp::provider::GpuProvider;
use autopod_mcp::runpod::{RunPod, RunPodOptions, RunPodTimeouts, SharedBudget};
use serde_json::{Value, json};

const PODS: usize = 1000;
const ROUNDS: usize = 20;
const MOST_TIME: Duration = Duration::from_millis(50);
const MOST_KIB: u64 = 40 * 1024;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn body() -> String {
    let pod = |number: usize| {
        json!({
            "id": format!("pod{number:05}"), "name": format!("autopod-comfy-{number}"), "status": "RUNNING",
            "actions": ["stop", "restart", "terminate"], "image": "runpod/comfyui:latest", "args": "", "disk": 40,
            "gpu": { "id": "NVIDIA GeForce RTX 4090", "count": 1 }, "cloud": "SECURE", "dataCenterId": "EU-RO-1",
            "mounts": { "network": [{ "volumeId": "vol1", "path": "/workspace" }] }, "ports": ["22/tcp", "8188/http"],
            "env": { "PUBLIC_KEY": "ssh-ed25519 AAAA me@here", "AUTOPOD_OWNER": "0123456789abcdef0123456789abcdef" },
            "registry": null, "template": null, "cost": 0.69, "locked": false, "cudaVersion": "12.8",
            "createdAt": "2026-11-06T08:00:00Z", "startedAt": "2026-11-06T08:01:00Z", "globalNetworking": null,
            "ssh": {
                "proxy": { "host": "ssh.runpod.io", "port": 22, "username": "p1-x", "command": "ssh p1-x@ssh.runpod.io" },
                "direct": { "host": "203.0.113.7", "port": 40022, "username": "root", "command": "ssh root@203.0.113.7" },
            },
            "runtime": {
                "uptime": 61, "gpus": [{ "util": 5, "memoryUtil": 7 }], "cpu": { "util": 1 }, "memory": { "util": 2 },
                "ports": [{ "private": 22, "public": 40022, "type": "tcp", "ip": "203.0.113.7" }],
            },
        })
    };
    json!({ "pods": (0..PODS).map(pod).collect::<Vec<_>>() }).to_string()
}

/// Answers every request with the same bytes, on connections that are kept.
fn serve(listener: TcpListener, answer: &'static [u8]) {
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || answer_all(stream, answer));
        }
    });
}

fn answer_all(mut stream: TcpStream, answer: &[u8]) {
    let mut request = Vec::new();
    let mut bytes = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut bytes) {
        request.extend_from_slice(&bytes[..count]);
        if request.ends_with(b"\r\n\r\n") {
            request.clear();
            if stream.write_all(answer).is_err() {
                return;
            }
        }
    }
}

/// The most memory that was resident since the last call of [`forget_peak`], in KiB; `None` off Linux.
fn resident(line: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let told = status.lines().find_map(|text| text.strip_prefix(line))?;
    told.trim().trim_end_matches("kB").trim().parse().ok()
}

fn forget_peak() {
    // A kernel that forbids it makes the figure larger, never smaller.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// The median time of a round, and how far the peak of memory rose above its start, in KiB.
async fn measure<F: Future<Output = Outcome<usize>>>(round: impl Fn() -> F) -> Outcome<(Duration, Option<u64>)> {
    let before = resident("VmRSS:");
    forget_peak();
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let count = round().await?;
        times.push(started.elapsed());
        if count != PODS {
            return Err(format!("{count} pods were read").into());
        }
    }
    times.sort();
    let growth = resident("VmHWM:").zip(before).map(|(peak, before)| peak.saturating_sub(before));
    Ok((times[ROUNDS / 2], growth))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome<()> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let body = body();
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nRateLimit: \"minute\";r=5000;t=60\r\n";
    let answer = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
    let bytes = body.len();
    drop(body);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let origin = format!("http://{}", listener.local_addr()?);
    serve(listener, answer.leak().as_bytes());

    let home = tempfile::tempdir()?;
    let budget = SharedBudget { file: home.path().join("rate-limit.json"), lock: home.path().join("locks/rate-limit") };
    let client = RunPod::new(RunPodOptions {
        origin: origin.parse()?,
        key: "rpa_BENCH0123456789".to_owned().into(),
        user_agent: "autopod-bench".to_owned(),
        timeouts: RunPodTimeouts::default(),
        budget: Some(budget),
    });
    let (time, growth) = measure(|| async { Ok(client.pods().await?.value.len()) }).await?;

    let bare = reqwest::Client::builder().no_proxy().tls_certs_only([]).build()?;
    let url = format!("{origin}/v2/pods");
    let read = || async {
        let value: Value = serde_json::from_slice(&bare.get(&url).send().await?.bytes().await?)?;
        Ok(value["pods"].as_array().map_or(0, Vec::len))
    };
    let (bare_time, bare_growth) = measure(read).await?;

    let mut out = std::io::stdout().lock();
    let mib =
        |growth: Option<u64>| growth.map_or("unknown".to_owned(), |kib| format!("{:.1} MiB", kib as f64 / 1024.0));
    let ratio = time.as_secs_f64() / bare_time.as_secs_f64();
    writeln!(out, "{PODS} pods, {bytes} bytes, median of {ROUNDS}")?;
    writeln!(out, "through the client: {time:?}, memory at its peak +{}", mib(growth))?;
    writeln!(
        out,
        "bare request and JSON value: {bare_time:?}, +{} on top; the client takes {ratio:.2} times that",
        mib(bare_growth)
    )?;
    if time > MOST_TIME || growth.is_some_and(|kib| kib > MOST_KIB) {
        return Err(format!("more than {MOST_TIME:?} or {} MiB", MOST_KIB / 1024).into());
    }
    Ok(())
}
