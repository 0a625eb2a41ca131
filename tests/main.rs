//! One binary for all tests, so that a newcomer links once.

mod comfy_client;
mod comfy_tools;
mod runpod_provider;
mod sandbox_container;
mod sandbox_world;
mod support;
