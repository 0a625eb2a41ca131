//! One binary for all tests, so that a newcomer links once.

mod bad_input;
mod comfy_client;
mod comfy_tools;
mod demo;
mod faces_answers;
mod faces_cli;
mod faces_json_rpc;
mod faces_mcp;
mod faces_registry;
mod faces_support;
mod hostile;
mod imports;
mod keeper_create;
mod keeper_support;
mod readme;
mod runpod_provider;
mod sandbox_container;
mod sandbox_world;
mod secrets;
mod story_mcp;
mod story_rpc;
mod story_shell;
mod story_support;
mod support;
