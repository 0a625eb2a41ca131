//! What an idle server costs: time to its greeting, memory, and the bytes that its list puts into a client's context.
//! Prints figures and judges nothing: `cargo bench --bench serve`.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use autopod_mcp::server::catalog;
use autopod_mcp::tools::TOOLS;
use serde_json::{Value, json};

const ROUNDS: usize = 20;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

struct Server {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Server {
    fn start(home: &std::path::Path) -> Outcome<Self> {
        let mut child = Command::new(env!("CARGO_BIN_EXE_autopod-mcp"))
            .arg("serve")
            .env_clear()
            .env("AUTOPOD_HOME", home)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let stdin = child.stdin.take().ok_or("no stdin")?;
        let stdout = BufReader::new(child.stdout.take().ok_or("no stdout")?);
        Ok(Self { child, stdin, stdout })
    }

    /// The answer's line.
    fn ask(&mut self, method: &str, params: Value) -> Outcome<String> {
        writeln!(self.stdin, "{}", json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}))?;
        self.stdin.flush()?;
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        Ok(line)
    }

    fn greet(&mut self) -> Outcome<String> {
        let client = json!({"name": "bench", "version": "1"});
        self.ask("initialize", json!({"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": client}))
    }

    /// Resident memory as Linux tells it; `None` elsewhere.
    fn resident(&self) -> Option<String> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        Some(status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.trim().to_owned())
    }

    fn end(mut self) -> Outcome<()> {
        drop(self.stdin);
        self.child.wait()?;
        Ok(())
    }
}

fn main() -> Outcome<()> {
    let home = tempfile::tempdir()?;
    let mut greetings: Vec<Duration> = Vec::new();
    let mut endings: Vec<Duration> = Vec::new();
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let mut server = Server::start(home.path())?;
        server.greet()?;
        greetings.push(started.elapsed());
        let closed = Instant::now();
        server.end()?;
        endings.push(closed.elapsed());
    }
    greetings.sort();
    endings.sort();

    let mut server = Server::start(home.path())?;
    server.greet()?;
    let list = server.ask("tools/list", json!({}))?;
    std::thread::sleep(Duration::from_millis(500));
    let resident = server.resident().unwrap_or_else(|| "unknown".to_owned());
    server.end()?;
    let context: usize = TOOLS
        .iter()
        .map(|tool| tool.name.len() + tool.description.len() + catalog::input_schema(tool).to_string().len())
        .sum();

    let mut out = std::io::stdout().lock();
    writeln!(out, "start to `initialize` answered: median {:?} of {ROUNDS}", greetings[ROUNDS / 2])?;
    writeln!(out, "  fastest {:?}, slowest {:?}", greetings[0], greetings[ROUNDS - 1])?;
    writeln!(out, "stdin closed to exit: median {:?}, slowest {:?}", endings[ROUNDS / 2], endings[ROUNDS - 1])?;
    writeln!(out, "resident memory of the idle server: {resident}")?;
    writeln!(out, "{} tools: {context} bytes of names, descriptions and input schemas", TOOLS.len())?;
    writeln!(out, "whole answer to tools/list: {} bytes", list.len())?;
    Ok(())
}
