//! One home with the background sandbox that `--sandbox` starts, worked by real processes only, and ended at the end.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::process::Command;

use crate::faces_support::TestHome;
use crate::support::program::until;

pub struct Story {
    pub home: TestHome,
}

/// What one process said.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Said {
    pub fn json(&self) -> Value {
        assert_eq!(self.code, 0, "{self:?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("no JSON ({error}): {self:?}"))
    }

    pub fn assert_words(&self, words: &[&str]) {
        for word in words {
            assert!(self.stdout.contains(word) || self.stderr.contains(word), "`{word}` is missing: {self:?}");
        }
    }
}

impl Story {
    pub fn begin() -> Self {
        Self { home: TestHome::new() }
    }

    /// The home inside the home that `--sandbox` uses.
    pub fn world(&self) -> PathBuf {
        self.home.path().join("sandbox")
    }

    /// The program with these arguments, on the sandbox.
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.home.command(&[&["--sandbox"], arguments].concat())
    }

    pub async fn run(&self, arguments: &[&str]) -> Said {
        said(self.command(arguments)).await
    }

    pub async fn call(&self, tool: &str, arguments: Value) -> Said {
        self.run(&["call", tool, &arguments.to_string()]).await
    }

    /// `sandbox.json`, as the living sandbox wrote it.
    pub fn sandbox_file(&self) -> Value {
        let bytes = std::fs::read(self.world().join("sandbox.json")).expect("the sandbox tells where it is");
        serde_json::from_slice(&bytes).expect("sandbox.json is JSON")
    }

    pub fn key(&self) -> String {
        std::fs::read_to_string(self.world().join("world.key")).expect("the world's key").trim().to_owned()
    }

    /// Nothing lives, nothing is billed, and no record wants anything.
    pub async fn assert_nothing_is_up(&self) {
        let pods = self.call("list_pods", json!({})).await.json();
        assert_eq!(pods["pods"], json!([]), "{pods}");
        let tunnels = self.call("list_tunnels", json!({})).await.json();
        assert_eq!(tunnels["tunnels"], json!([]), "{tunnels}");
    }

    /// Ends the sandbox as a person does; then no process of this home may be left.
    pub async fn end(self) {
        let said = self.run(&["sandbox", "--stop"]).await;
        assert_eq!(said.code, 0, "{said:?}");
        until("every process of this home to end", async || self.processes().is_empty().then_some(())).await;
        assert!(!self.world().join("sandbox.json").exists());
    }

    /// Processes that carry this home's folder in their command line.
    pub fn processes(&self) -> Vec<(i32, String)> {
        let mark = self.home.folder().to_str().expect("a folder of plain letters").to_owned();
        let folders = std::fs::read_dir("/proc").expect("/proc").flatten();
        folders
            .filter_map(|folder| {
                let pid = folder.file_name().to_str()?.parse().ok()?;
                let line = std::fs::read(folder.path().join("cmdline")).ok()?;
                Some((pid, String::from_utf8_lossy(&line).replace('\0', " ")))
            })
            .filter(|(_, line)| line.contains(&mark))
            .collect()
    }
}

/// A test that failed leaves nothing behind either.
impl Drop for Story {
    fn drop(&mut self) {
        let started = Instant::now();
        // A guard that is killed first can't start its worker again.
        while started.elapsed() < Duration::from_secs(5) {
            let mut left = self.processes();
            if left.is_empty() {
                return;
            }
            left.sort_by_key(|(_, line)| line.contains("--worker"));
            for (pid, _) in left {
                if let Some(pid) = Pid::from_raw(pid) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

pub async fn said(command: Command) -> Said {
    let (code, stdout, stderr) = crate::faces_support::finish(command).await;
    Said { code, stdout, stderr }
}

/// 24 steps of the sandbox's own painter, saved as a PNG.
pub fn painting(step_ms: u64) -> Value {
    json!({
        "1": {"class_type": "SandboxSampler",
              "inputs": {"width": 256, "height": 256, "steps": 24, "seed": 42, "step_ms": step_ms}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "story"}}
    })
}

/// A picture of some size that a loading node can be given.
pub fn write_picture(path: &Path) {
    let file = std::fs::File::create(path).expect("a file");
    let mut encoder = png::Encoder::new(file, 32, 32);
    encoder.set_color(png::ColorType::Rgb);
    let mut writer = encoder.write_header().expect("a header");
    let pixels: Vec<u8> = (0..32 * 32).flat_map(|at| [(at % 32) as u8 * 8, (at / 32) as u8 * 8, 128]).collect();
    writer.write_image_data(&pixels).expect("pixels");
}

/// The number of different colours in a picture that decodes.
pub fn colours(path: &Path) -> usize {
    let file = std::fs::File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut reader = png::Decoder::new(std::io::BufReader::new(file)).read_info().expect("a PNG");
    let mut pixels = vec![0; reader.output_buffer_size().expect("a size")];
    let info = reader.next_frame(&mut pixels).expect("pixels");
    let samples = info.color_type.samples();
    pixels[..info.buffer_size()].chunks_exact(samples).collect::<HashSet<_>>().len()
}

/// The answer has the shape that the tool promises.
pub fn assert_as_promised(schema: &Value, tool: &str, answer: &Value) {
    let validator = jsonschema::validator_for(schema).unwrap_or_else(|error| panic!("{tool}: {error}"));
    let problems: Vec<_> =
        validator.iter_errors(answer).map(|error| format!("{}: {error}", error.instance_path())).collect();
    assert!(problems.is_empty(), "{tool} answers otherwise than its schema says: {problems:?}\n{answer}");
}
