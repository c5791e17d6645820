//! The audit trail: one event for everything that is done, or tried, with entries, and for every change of
//! whom the gate lets pass. Where the events go is for [`crate::logging`] to say.
//!
//! Events hold names, numbers and words of ours; never a seed, a token or a password.

use std::net::IpAddr;

use crate::entry::{EntryId, Principal};

/// The `tracing` target of the events.
pub const TARGET: &str = "otpgate::audit";

/// One event. What is `None` is left out.
#[derive(Clone, Debug, Default)]
pub struct Event<'a> {
    /// What was done or tried, or what has changed: a word of ours.
    pub action: &'static str,
    /// How it ended: a word of ours.
    pub outcome: &'static str,
    /// Why it ended so: a word of ours.
    pub reason: Option<&'static str>,
    /// Who did it: a proven principal, or a user of this machine.
    pub caller: Option<String>,
    /// The address that it came from.
    pub client: Option<IpAddr>,
    /// The request's id, also in its access line and its answer.
    pub request_id: Option<&'a str>,
    /// The entry's number.
    pub id: Option<EntryId>,
    /// The entry's principal.
    pub subject: Option<&'a Principal>,
    /// Its principal from now on, if that changes.
    pub renamed: Option<&'a Principal>,
    /// Names of the fields that change.
    pub changed: Option<String>,
    /// Whether the answer shows seeds.
    pub seeds: Option<bool>,
    /// How many entries it is about, if not one.
    pub entries: Option<usize>,
}

impl Event<'_> {
    /// Adds the event to the trail. The log quotes texts: a name may hold spaces and `=`.
    pub fn log(self) {
        tracing::info!(
            target: TARGET,
            action = self.action,
            outcome = self.outcome,
            reason = self.reason,
            caller = self.caller,
            client = self.client.map(tracing::field::display),
            request_id = self.request_id,
            id = self.id.map(|id| id.0),
            name = self.subject.map(|of| of.name.as_str()),
            realm = self.subject.map(|of| of.realm.as_str()),
            new_name = self.renamed.map(|of| of.name.as_str()),
            new_realm = self.renamed.map(|of| of.realm.as_str()),
            changed = self.changed,
            seeds = self.seeds,
            entries = self.entries.map(|n| n as u64),
        );
    }
}
