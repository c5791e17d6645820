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
//! - [`checker`] checks one token of one seed, for the verifier.
//! - [`throttle`] says who has failed too often to be looked at, for the verifier.
//! - [`policy`] says which principals may pass which route.
//! - [`decision`] asks both about a request.
//! - [`proxy`] forwards what holds a permit; [`api`] answers management and verify calls.
//! - [`enrolment`] is what authenticator apps take over: `otpauth://` URIs and QR codes.
//! - [`credentials`] finds the headers that carry a claim, for both.
//! - [`net`] owns sockets: one accept loop for every listener, bounded in all directions.
//! - [`audit`] is the form of the audit trail; [`logging`] says where lines go.
//! - [`ops`] answers health checks and metrics scrapes.
//!
//! `proxy` and `api` never import each other.
//!
//! # For services
//!
//! [`client`] makes the headers of calls through a gate, verifies tokens and manages entries. With
//! `default-features = false` it is all there is, and pulls in nothing of the gate.

#[cfg(feature = "server")]
pub mod api;
#[cfg(feature = "server")]
pub mod audit;
#[cfg(feature = "server")]
pub mod checker;
#[cfg(feature = "server")]
pub mod cli;
pub mod client;
pub mod clock;
#[cfg(feature = "server")]
pub mod commands;
#[cfg(feature = "server")]
pub mod config;
#[cfg(feature = "server")]
pub mod credentials;
#[cfg(feature = "server")]
pub mod decision;
#[cfg(feature = "server")]
pub mod directory;
#[cfg(feature = "server")]
pub mod enrolment;
pub mod entry;
#[cfg(all(feature = "server", any(test, fuzzing)))]
pub mod fuzzing;
#[cfg(feature = "server")]
pub mod hardening;
#[cfg(feature = "server")]
pub mod logging;
#[cfg(feature = "server")]
pub mod metrics;
#[cfg(feature = "server")]
pub mod net;
#[cfg(feature = "server")]
pub mod ops;
pub mod otp;
#[cfg(feature = "server")]
pub mod policy;
#[cfg(feature = "server")]
pub mod proxy;
#[cfg(feature = "server")]
pub mod remote;
#[cfg(feature = "server")]
pub mod seal;
pub mod secret;
#[cfg(feature = "server")]
pub mod store;
#[cfg(feature = "server")]
pub mod throttle;
#[cfg(feature = "server")]
pub mod verifier;
