//! Integration tests: real sockets, real servers, the real program. One binary, one module a feature.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod cli;
mod demo;
mod directory_follow;
mod docs;
mod gate;
mod harness;
mod layering;
mod ops;
mod redis_server;
mod store_contract;
mod store_histories;
mod store_rig;
