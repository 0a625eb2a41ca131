//! The demo as a newcomer runs it, and ended in every way.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::support::program::{PATIENCE, PROGRAM};

/// A newcomer's machine: an empty HOME, a folder to work in, a folder for temporary files.
struct Newcomer {
    root: TempDir,
}

impl Newcomer {
    fn new(home: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        for folder in [home, "work", "tmp"] {
            std::fs::create_dir(root.path().join(folder)).unwrap();
        }
        std::fs::write(root.path().join("home-name"), home).unwrap();
        Self { root }
    }

    fn home(&self) -> PathBuf {
        self.root.path().join(std::fs::read_to_string(self.root.path().join("home-name")).unwrap())
    }

    fn temporary(&self) -> PathBuf {
        self.root.path().join("tmp")
    }

    fn demo(&self) -> Command {
        let mut command = Command::new(PROGRAM);
        command
            .arg("demo")
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("HOME", self.home())
            .env("TMPDIR", self.temporary())
            .current_dir(self.root.path().join("work"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Processes that carry this newcomer's folder in their command line.
    fn processes(&self) -> Vec<String> {
        let mark = self.root.path().to_str().unwrap().to_owned();
        let folders = std::fs::read_dir("/proc").unwrap().flatten();
        let lines = folders.filter_map(|folder| std::fs::read(folder.path().join("cmdline")).ok());
        lines
            .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
            .filter(|line| line.contains(&mark))
            .collect()
    }

    fn assert_nothing_is_left(&self) {
        let started = Instant::now();
        loop {
            let processes = self.processes();
            let files = [everything_in(&self.home()), everything_in(&self.temporary())].concat();
            if processes.is_empty() && files.is_empty() {
                return;
            }
            assert!(started.elapsed() < PATIENCE, "left behind: {processes:?} {files:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn everything_in(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path()).collect()
}

fn told(output: &Output) -> String {
    format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The number of different colours in a picture.
fn colours(path: &Path) -> usize {
    let mut reader =
        png::Decoder::new(std::io::BufReader::new(std::fs::File::open(path).unwrap())).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    let samples = info.color_type.samples();
    pixels[..info.buffer_size()].chunks_exact(samples).collect::<HashSet<_>>().len()
}

fn pictures(newcomer: &Newcomer) -> Vec<PathBuf> {
    let folder = newcomer.root.path().join("work/autopod-demo");
    everything_in(&folder).into_iter().filter(|path| path.extension().is_some_and(|name| name == "png")).collect()
}

#[test]
fn the_demo_ends_with_a_picture_and_leaves_nothing_behind() {
    let newcomer = Newcomer::new("home");
    let output = newcomer.demo().output().unwrap();
    let told = told(&output);
    assert!(output.status.success(), "{told}");
    let pictures = pictures(&newcomer);
    assert_eq!(pictures.len(), 1, "{told}");
    assert!(colours(&pictures[0]) > 1000, "the picture has {} colours", colours(&pictures[0]));
    assert!(told.contains(pictures[0].file_name().unwrap().to_str().unwrap()), "{told}");
    let steps = (1..=24).filter(|step| told.contains(&format!("step {step} of 24"))).count();
    assert!(steps >= 5, "only {steps} steps of the sampler were shown: {told}");
    assert!(told.contains("no pod, nothing is billed"), "{told}");
    newcomer.assert_nothing_is_left();
}

#[test]
fn the_demo_needs_no_certificates_and_an_odd_home_does_no_harm() {
    let newcomer = Newcomer::new("a b%c");
    let output = newcomer
        .demo()
        .env("SSL_CERT_FILE", "/nowhere")
        .env("SSL_CERT_DIR", "/nowhere")
        .env("TMPDIR", newcomer.home())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", told(&output));
    assert_eq!(pictures(&newcomer).len(), 1);
    newcomer.assert_nothing_is_left();
}

/// Starts the demo and waits until its sandbox and keeper are up.
fn in_the_middle(newcomer: &Newcomer) -> Child {
    let child = newcomer.demo().spawn().unwrap();
    let started = Instant::now();
    while !newcomer.processes().iter().any(|line| line.contains("--worker")) {
        assert!(started.elapsed() < PATIENCE, "the demo did not get going");
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}

#[test]
fn the_demo_cleans_up_after_ctrl_c_sigterm_and_kill() {
    for (signal, code) in [(Signal::INT, Some(130)), (Signal::TERM, Some(143)), (Signal::KILL, None)] {
        let newcomer = Newcomer::new("home");
        let mut child = in_the_middle(&newcomer);
        kill_process(Pid::from_child(&child), signal).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.code(), code, "{signal:?}");
        newcomer.assert_nothing_is_left();
    }
}

/// The printed lines are to be copied into a shell by somebody whose PATH doesn't have the program.
#[test]
fn what_keep_prints_works_as_it_stands() {
    let newcomer = Newcomer::new("home");
    let output = newcomer.demo().arg("--keep").output().unwrap();
    let shown = told(&output);
    assert!(output.status.success(), "{shown}");
    let lines: Vec<_> = shown.lines().filter_map(|line| line.strip_prefix("  ")).collect();
    let lines: Vec<_> =
        lines.into_iter().filter(|line| line.starts_with("AUTOPOD_HOME=") || line.starts_with("rm ")).collect();
    assert_eq!(lines.len(), 5, "{shown}");
    for line in lines {
        let mut shell = Command::new("sh");
        shell.args(["-c", line]).env_clear().env("PATH", std::env::var_os("PATH").unwrap());
        let output = shell.env("HOME", newcomer.home()).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{line}: {}", told(&output));
    }
    assert!(newcomer.processes().is_empty(), "{:?}", newcomer.processes());
    newcomer.assert_nothing_is_left();
}
