//! The tool server by which AI coding assistants drive GPU pods.
//!
//! One registry of tools ([`tools`]), three faces over it ([`cli`], `server::mcp`, `server::json_rpc`), adapters
//! below it ([`runpod`], [`comfy`], [`ssh`]). What is wanted is written to disk ([`fleet`], [`tunnel`]); one
//! background process of a home, the [`keeper`], makes it true. A [`sandbox`] stands beside it.
//!
//! Start reading at [`tools`], then [`keeper`].
//!
//! Invariants:
//! - Only the keeper creates, starts, stops and ends pods and starts ssh; the one exception is `terminate_pod`,
//!   which ends a pod itself when the keeper doesn't.
//! - A pod is POSTed once, after its intent is on disk; an unclear answer is never POSTed again.
//! - The lock over the records is never held across the network, a question or the start of a process.
//! - Only `cli` touches argv, the environment, HOME and stdio; below it values are passed in.
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
pub mod timing;
pub mod tools;
pub mod tunnel;
