//! One module a subcommand.

use std::future::Future;
use std::process::ExitCode;

use crate::cli::Failure;

pub mod check;
pub mod client;
pub mod demo;
pub mod import;
pub mod serve;
pub mod store;
pub mod token;

/// Runs a short command's future on a runtime of its own.
pub(crate) fn block_on<F>(future: F) -> Result<ExitCode, Failure>
where
    F: Future<Output = Result<ExitCode, Failure>>,
{
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future)
}
