//! The subcommands.

pub mod client;
