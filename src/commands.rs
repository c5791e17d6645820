//! One module a subcommand.

use std::future::Future;
use std::io::Write as _;
use std::process::ExitCode;

use crate::cli::Failure;

pub mod check;
pub mod client;
pub mod demo;
pub mod import;
pub mod rekey;
pub mod serve;
pub mod store;
pub mod token;

/// Writes a command's result and the end of its line.
///
/// # Errors
/// If nothing takes it: a full disk, a closed pipe.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")
        .and_then(|()| out.flush())
        .map_err(|e| format!("cannot write the result: {e}").into())
}

/// Runs a short command's future on a runtime of its own.
pub(crate) fn block_on<F>(future: F) -> Result<ExitCode, Failure>
where
    F: Future<Output = Result<ExitCode, Failure>>,
{
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future)
}
