//! One module a subcommand.

use std::future::Future;
use std::io::Write as _;
use std::process::ExitCode;

use crate::audit::Event;
use crate::cli::Failure;
use crate::entry::Entry;

pub mod check;
pub mod client;
pub mod demo;
pub mod explain;
pub mod export;
pub mod healthcheck;
pub mod import;
mod look;
pub mod manual;
mod progress;
pub mod rekey;
pub mod serve;
pub mod store;
pub mod token;
pub mod verify;

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

/// Tells something on standard error. That nobody reads it is no reason to stop in the middle of work.
pub(crate) fn note(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Adds to the audit trail, if that is a file, that a user of this machine wrote to
/// the store. Gates that follow the store note in their own trails what that changes for them.
pub(crate) fn note_write(action: &'static str, subject: Option<&Entry>, entries: Option<usize>) {
    Event {
        action,
        outcome: "done",
        caller: Some(this_user()),
        id: subject.map(|entry| entry.id),
        subject: subject.map(|entry| &entry.principal),
        entries,
        ..Event::default()
    }
    .log();
}

/// Who runs this command, for audit events.
pub(crate) fn this_user() -> String {
    format!("uid {}", rustix::process::getuid().as_raw())
}

/// Runs a short command's future on a runtime of its own.
pub(crate) fn block_on<F>(future: F) -> Result<ExitCode, Failure>
where
    F: Future<Output = Result<ExitCode, Failure>>,
{
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future)
}
