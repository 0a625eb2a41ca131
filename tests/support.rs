//! What tests of several parts share.

pub mod openapi;
pub mod world;
