//! Health checks and metrics: what kubelet and Prometheus ask. Nothing else is served here.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Router, routing};
use http::{StatusCode, header};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};

use crate::clock::{Clock, Moment};
use crate::directory::{Account, Directory};
use crate::metrics::Metrics;
use crate::verifier::{Basis, Verifier};

/// What health depends on.
#[derive(Clone)]
pub struct Ops {
    /// What it checks claims against decides readiness.
    pub verifier: Arc<Verifier>,
    /// What is scraped.
    pub metrics: Arc<Metrics>,
    /// For staleness.
    pub clock: Arc<dyn Clock>,
    /// True once the process is stopping: not ready any more.
    pub draining: watch::Receiver<bool>,
    /// Whose turn it is to look through the whole directory.
    accounting: Arc<Semaphore>,
}

impl Ops {
    /// What the ops listener serves.
    #[must_use]
    pub fn new(
        verifier: Arc<Verifier>,
        metrics: Arc<Metrics>,
        clock: Arc<dyn Clock>,
        draining: watch::Receiver<bool>,
    ) -> Self {
        Self { verifier, metrics, clock, draining, accounting: Arc::new(Semaphore::new(1)) }
    }

    /// The routes of the ops listener.
    pub fn router(self) -> Router {
        let health = || routing::get(async || answer(StatusCode::OK, None));
        Router::new()
            .route("/metrics", routing::get(metrics))
            .route("/livez", health())
            .route("/healthz", health())
            .route("/readyz", routing::get(ready))
            .route("/startupz", routing::get(started))
            .route("/directory", routing::get(directory))
            .fallback(async || refuse(StatusCode::NOT_FOUND, "Not found."))
            .method_not_allowed_fallback(async || {
                refuse(StatusCode::METHOD_NOT_ALLOWED, "Only GET and HEAD are allowed here.")
            })
            .with_state(self)
    }

    /// Why the gate cannot answer requests now, if it cannot.
    fn trouble(&self) -> Option<String> {
        if *self.draining.borrow() {
            return Some("the gate is stopping".to_owned());
        }
        let now = self.clock.now();
        match self.verifier.basis() {
            Basis::Entries(entries) => trouble_of(&entries.directory, now),
            Basis::Remote(remote) => remote.trouble(now),
        }
    }
}

/// Why entries are not known to be current, if they are not.
fn trouble_of(directory: &Directory, now: Moment) -> Option<String> {
    if directory.is_current(now) {
        return None;
    }
    let status = directory.status();
    let cause = status.trouble.as_deref().unwrap_or("the store has not answered yet");
    Some(match directory.staleness(now) {
        Some(age) => format!("entries are {} seconds old: {cause}", age.as_secs()),
        None => format!("entries are not loaded: {cause}"),
    })
}

async fn ready(State(ops): State<Ops>) -> Response {
    match ops.trouble() {
        None => answer(StatusCode::OK, None),
        Some(reason) => answer(StatusCode::SERVICE_UNAVAILABLE, Some(&reason)),
    }
}

async fn started(State(ops): State<Ops>) -> Response {
    let reason = match ops.verifier.basis() {
        Basis::Entries(entries) => {
            let status = entries.directory.status();
            let reason = status.trouble.clone().unwrap_or("entries are being loaded".to_owned());
            (!status.loaded).then_some(reason)
        }
        Basis::Remote(remote) => {
            let now = ops.clock.now();
            remote.accepted_for(now).is_none().then(|| remote.trouble(now).unwrap_or_default())
        }
    };
    match reason {
        None => answer(StatusCode::OK, None),
        Some(reason) => answer(StatusCode::SERVICE_UNAVAILABLE, Some(&reason)),
    }
}

async fn metrics(State(ops): State<Ops>) -> Response {
    let (metrics, now) = (&ops.metrics, ops.clock.now());
    let gauge = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    let seconds = |age: Option<Duration>| age.map_or(f64::INFINITY, |age| age.as_secs_f64());
    match ops.verifier.basis() {
        Basis::Entries(entries) => {
            let directory = &entries.directory;
            metrics.directory_staleness.set(seconds(directory.staleness(now)));
            metrics.directory_entries.set(gauge(directory.len()));
            metrics.directory_held_entries.set(gauge(directory.held()));
        }
        Basis::Remote(remote) => {
            metrics.directory_staleness.set(0.0);
            metrics.remote_staleness.set(seconds(remote.accepted_for(now)));
        }
    }
    let kind = [(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)];
    (kind, metrics.render()).into_response()
}

/// What `otpgate store verify` compares with the store: sums that show no entry.
async fn directory(State(ops): State<Ops>) -> Response {
    let Some(entries) = ops.verifier.entries() else {
        return refuse(StatusCode::NOT_FOUND, "A remote server has the entries.");
    };
    // It looks at every entry: one at a time.
    let Ok(turn) = ops.accounting.clone().try_acquire_owned() else {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "Somebody else is asking: try again.");
    };
    let directory = entries.directory.clone();
    let account = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        directory.account()
    });
    let Ok(Account { position, digest }) = account.await else {
        return refuse(StatusCode::INTERNAL_SERVER_ERROR, "The directory cannot be summed up.");
    };
    let directory = &entries.directory;
    let all = directory.holds_all();
    json_response(
        StatusCode::OK,
        &json!({
            "version": position.version.0,
            "nonce": position.nonce.0,
            "entries": digest.entries,
            "names": format!("{:016x}", digest.names),
            "contents": all.then(|| format!("{:016x}", digest.contents)),
            "holds": if all { "all" } else { "index" },
            "realms": directory.scope().realms(),
            "current": directory.is_current(ops.clock.now()),
        }),
    )
}

fn answer(status: StatusCode, reason: Option<&str>) -> Response {
    json_response(
        status,
        &match reason {
            None => json!({ "status": "ok" }),
            Some(reason) => json!({ "status": "unavailable", "reason": reason }),
        },
    )
}

/// A request that is no question about health.
fn refuse(status: StatusCode, detail: &str) -> Response {
    json_response(status, &json!({ "detail": detail }))
}

fn json_response(status: StatusCode, body: &Value) -> Response {
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")];
    (status, headers, body.to_string()).into_response()
}
