//! The audit trail of management: one event for every request that would manage entries, whatever became
//! of it.

use std::net::IpAddr;

use http::Method;

use super::edge::{Note, RequestId};
use super::{Resource, action};
use crate::audit::Event;
use crate::entry::{EntryId, Principal};

/// What a handler learnt about the entry that a request manages.
#[derive(Clone, Debug, Default)]
pub(super) struct Subject {
    /// Its number.
    pub(super) id: Option<EntryId>,
    /// Whose it is, or was before the request.
    pub(super) principal: Option<Principal>,
    /// Whose it becomes, if that changes.
    pub(super) renamed: Option<Principal>,
    /// Names of the fields that change.
    pub(super) changed: Option<String>,
    /// Whether the answer shows seeds.
    pub(super) seeds: Option<bool>,
}

/// The word for what a request would do, if that is management.
pub(super) fn management(resource: Resource, method: &Method) -> Option<&'static str> {
    let manages =
        !matches!(resource, Resource::Root | Resource::Verify) && method != Method::OPTIONS;
    manages.then(|| action(resource, method))
}

/// Writes the event of a request. `answered` is the answer's word for metrics.
pub(super) fn log(
    action: &'static str,
    note: &Note,
    answered: &'static str,
    id: &RequestId,
    client: Option<IpAddr>,
) {
    let (outcome, reason) = match answered {
        "ok" => ("done", None),
        "unknown_outcome" => ("unknown", None),
        "unavailable" | "panic" => ("failed", note.reason.or(Some(answered))),
        refused => ("refused", note.reason.or(Some(refused))),
    };
    let Subject { id: entry, principal, renamed, changed, seeds } = &note.subject;
    Event {
        action,
        outcome,
        reason,
        caller: note.caller.as_ref().map(ToString::to_string),
        client,
        request_id: Some(id.as_str()),
        id: *entry,
        subject: principal.as_ref(),
        renamed: renamed.as_ref(),
        changed: changed.clone(),
        seeds: seeds.filter(|_| outcome == "done"),
        entries: None,
    }
    .log();
}
