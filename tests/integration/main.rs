//! Integration tests: real sockets, real servers, the real program. One binary, one module a feature.

mod cli;
mod demo;
mod docs;
mod gate;
mod harness;
mod layering;
mod ops;
