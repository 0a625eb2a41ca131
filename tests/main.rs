//! One binary for all tests, so that a newcomer links once.

mod sandbox_container;
mod sandbox_world;
mod support;
