//! What tests of several parts share.

pub mod http;
pub mod openapi;
pub mod program;
pub mod userns;
pub mod world;
