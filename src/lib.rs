//! The tool server by which AI coding assistants drive GPU pods.
//!
//! One registry of tools, three faces over it, adapters below it. What is wanted is written to disk; one background
//! process of a home, the keeper, makes it true. A sandbox stands beside it.
//!
//! The map, from the top; imports lead downwards only (`tests/imports.rs`):
//! - [`cli`]: argv, environment and stdio in, an exit code out. One command a file; commands for people are rows over
//!   the tools.
//! - [`server`]: the faces for programs, MCP on stdio and JSON-RPC over HTTP and WebSocket.
//! - [`app`]: wiring; the only place that picks a provider.
//! - [`tools`]: the registry, and one file a family of tools.
//! - [`keeper`]: places and ends pods, keeps deadlines, holds every ssh child.
//! - [`fleet`], [`tunnel`]: our pods and our tunnels as records, wanted and known.
//! - [`comfy`]: the client of a ComfyUI, and the runs that outlive their caller.
//! - [`ssh`]: the only file that starts ssh.
//! - [`runpod`]: RunPod behind the trait of [`provider`], which names no provider.
//! - [`sandbox`]: a RunPod with SSH and ComfyUI on loopback.
//! - Leaves, which anyone may import: [`state`] (locks and JSON files), [`background`] (processes of ours, and the
//!   keeper's client), [`config`] (the home and its settings), [`environment`], [`timing`], [`errors`], [`steps`] (where a test kills us).
//!
//! Start reading at [`tools`], then [`keeper`].
//!
//! Invariants:
//! - Only the keeper creates, starts, stops and ends pods, makes and grows volumes, and starts ssh; the one exception is `terminate_pod`,
//!   which ends a pod itself when the keeper doesn't.
//! - A pod is POSTed once, after its intent is on disk; an unclear answer is never POSTed again.
//! - The lock over the records is never held across the network, a question or the start of a process.
//! - Only `cli` touches argv, HOME and stdio, and asks [`environment`] for the rest; below it values are passed in.
//! - `sandbox` imports nothing else of the crate, so it can't agree with the client by sharing its mistakes.

pub mod app;
pub mod background;
pub mod cli;
pub mod comfy;
pub mod config;
pub mod environment;
pub mod errors;
pub mod fleet;
pub mod keeper;
pub mod provider;
pub mod runpod;
pub mod sandbox;
pub mod server;
pub mod ssh;
pub mod state;
pub mod steps;
pub mod timing;
pub mod tools;
pub mod tunnel;
