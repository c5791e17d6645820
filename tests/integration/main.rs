//! Integration tests: real sockets, real servers, the real program. One binary, one module a feature.

mod api;
mod api_client;
mod api_harness;
mod api_schema;
mod api_wire;
mod cli;
mod conformance;
mod demo;
mod docs;
mod gate;
mod harness;
mod layering;
mod ops;
