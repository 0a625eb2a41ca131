//! One binary for all tests, so that a newcomer links once.

mod faces_answers;
mod faces_cli;
mod faces_json_rpc;
mod faces_mcp;
mod faces_registry;
mod faces_support;
mod imports;
