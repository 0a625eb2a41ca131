//! To come.

mod comfy_api;
pub mod container;
mod ssh_server;
