//! One binary for all tests, so that a newcomer links once.

mod runpod_provider;
