//! otpgate: a reverse-proxy auth sidecar.
//!
//! Every service holds a long-term triple (name, realm, seed) and makes RFC 6238 tokens from the
//! seed. otpgate stands in front of a service and lets through only requests whose token proves
//! the principal that they claim.
//!
//! # How data flows
//!
//! One way: **[`config`] → [`store`] → [`directory`] → [`verifier`] → [`decision`] → {[`proxy`], [`api`]}**.
//! `commands::serve` wires it.
//!
//! - [`store`] keeps entries durably, with an ordered change log, in SQLite or Redis.
//! - [`directory`] is this process's replica of all entries, kept current by following that log.
//!   Look-ups never touch the network.
//! - [`remote`] asks another server, where this process has no store and no seeds.
//! - [`verifier`] turns (claim, time) into a [`verifier::Permit`] or a [`verifier::Denied`].
//! - [`throttle`] says who has failed too often to be looked at, for the verifier.
//! - [`policy`] says which principals may pass which route.
//! - [`decision`] asks both about a request.
//! - [`proxy`] forwards what holds a permit; [`api`] answers management and verify calls.
//! - [`credentials`] finds the headers that carry a claim, for both.
//! - [`net`] owns sockets: one accept loop for every listener, bounded in all directions.
//! - [`audit`] is the form of the audit trail; [`logging`] says where lines go.
//! - [`ops`] answers health checks and metrics scrapes.
//!
//! `proxy` and `api` never import each other.

pub mod api;
pub mod audit;
pub mod cli;
pub mod client;
pub mod clock;
pub mod commands;
pub mod config;
pub mod credentials;
pub mod decision;
pub mod directory;
pub mod entry;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod hardening;
pub mod logging;
pub mod metrics;
pub mod net;
pub mod ops;
pub mod otp;
pub mod policy;
pub mod proxy;
pub mod remote;
pub mod seal;
pub mod secret;
pub mod store;
pub mod throttle;
pub mod verifier;
