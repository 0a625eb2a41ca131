//! One binary for all tests, so that a newcomer links once.

mod comfy_client;
mod keeper_create;
mod keeper_ending;
mod keeper_kills;
mod keeper_records;
mod keeper_sshd;
mod keeper_support;
mod keeper_tunnels;
mod runpod_provider;
mod sandbox_container;
mod sandbox_world;
mod support;
