//! The accept loop of one bound address.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use pingora::apps::HttpServerApp;
use prometheus::IntGauge;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

use super::client::is_trusted;
use super::connection::Connection;
use super::drain::Drain;
use super::guard::Guard;
use super::http::Driven;
use super::socket::{Accepted, Socket};
use super::sources::Sources;
use super::terms::Terms;
use super::workers::Workers;
use crate::metrics::Metrics;

/// Shortest and longest pause after the kernel could not give us a connection.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Time between two log lines about refused connections.
const LOG_EVERY: Duration = Duration::from_secs(10);

pub(super) struct AcceptLoop<A> {
    pub(super) listener: &'static str,
    /// May be replaced at any time.
    pub(super) terms: Arc<ArcSwap<Terms>>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) slots: Arc<Slots>,
    pub(super) sources: Arc<Sources>,
    pub(super) refusals: Occasional,
    pub(super) open: IntGauge,
    pub(super) drain: Arc<Drain>,
    pub(super) workers: Arc<Workers>,
    /// One for each worker.
    pub(super) apps: Arc<[Arc<A>]>,
    pub(super) stop: watch::Receiver<bool>,
}

impl<A: HttpServerApp + Send + Sync + 'static> AcceptLoop<A> {
    /// Accepts until told to stop, then waits for the connections to end.
    pub(super) async fn run(mut self, socket: Arc<Socket>) {
        let mut connections = JoinSet::new();
        let mut pause = PAUSE_MIN;
        let mut stop = self.stop.clone();
        // The watch's guard must not live across an await.
        let stopped = async move { drop(stop.wait_for(|stop| *stop).await) };
        tokio::pin!(stopped);
        loop {
            tokio::select! {
                biased;
                () = &mut stopped => break,
                Some(_) = connections.join_next() => {}
                accepted = socket.accept() => match accepted {
                    Ok(accepted) => {
                        pause = PAUSE_MIN;
                        self.start(&mut connections, accepted);
                    }
                    Err(error) if is_the_peers(&error) => {}
                    Err(error) => {
                        self.note_trouble(&error);
                        sleep(pause).await;
                        pause = (pause * 2).min(PAUSE_MAX);
                    }
                },
            }
        }
        drop(socket);
        while connections.join_next().await.is_some() {}
    }

    /// Serves `accepted` in a task of its own, or closes it.
    fn start(&mut self, connections: &mut JoinSet<()>, accepted: Accepted) {
        let peer = accepted.peer();
        let terms = self.terms.load_full();
        let held = match self.admit(&terms, peer) {
            Ok(held) => held,
            Err(cause) => {
                self.metrics.connection_refused(self.listener, cause);
                if let Some(hidden) = self.refusals.is_due() {
                    let client = peer.map(tracing::field::display);
                    warn!(listener = self.listener, client, cause, hidden, "connection refused");
                }
                return;
            }
        };
        let is_tls = terms.tls.is_some();
        let (of, stop, drain) = (self.terms.clone(), self.stop.clone(), self.drain.clone());
        let connection = Connection::new(self.listener, peer, is_tls, of, stop, drain);
        let assigned = self.workers.assign();
        let app = self.apps[assigned.index].clone();
        let app = Driven::new(app, terms.limits, self.metrics.clone());
        let metrics = self.metrics.clone();
        let stop = self.stop.clone();
        let runtime = assigned.runtime();
        let serving = async move {
            // A worker is known to be idle before its connection is known to be gone.
            let _held = (assigned, held);
            let Ok(stream) = accepted.open() else {
                return metrics.connection_refused(connection.listener(), "accept_error");
            };
            let Some(tls) = &terms.tls else {
                app.serve(Guard::new(stream, connection, metrics, &stop), terms.h2c, &stop).await;
                return;
            };
            let refused = match timeout(terms.limits.head_timeout, tls.accept(stream)).await {
                Ok(Ok(stream)) => {
                    // What it came in under may be large, and is not needed any more.
                    drop(terms);
                    app.serve(Guard::new(stream, connection, metrics, &stop), false, &stop).await;
                    return;
                }
                Ok(Err(_)) => "tls",
                Err(_) => "tls_timeout",
            };
            metrics.connection_refused(connection.listener(), refused);
        };
        connections.spawn_on(serving, &runtime);
    }

    /// What a new connection takes of the listener's capacity, or why it gets none. Beyond a cap it
    /// is closed at once: a client that is told may go elsewhere, one in the kernel's queue can only
    /// wait.
    fn admit(
        &self,
        terms: &Terms,
        peer: Option<IpAddr>,
    ) -> Result<impl Send + use<A>, &'static str> {
        let allowed = |peer| terms.allow_from.iter().any(|net| net.contains(&peer));
        if !terms.allow_from.is_empty() && !peer.is_none_or(allowed) {
            return Err("source");
        }
        let slot = self.slots.take(terms.limits.max_connections).ok_or("limit")?;
        let counted = peer.filter(|peer| !is_trusted(Some(*peer), &terms.trusted));
        let most = terms.limits.max_connections_per_source;
        let source = self.sources.admit(counted, most).ok_or("source_limit")?;
        Ok((slot, source, Open::new(self.open.clone())))
    }

    fn note_trouble(&self, error: &io::Error) {
        warn!(listener = self.listener, %error, "cannot accept connections, trying again");
        self.metrics.connection_refused(self.listener, "accept_error");
    }
}

/// Errors of one connection that ended before it was accepted, not of the socket.
fn is_the_peers(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

/// How many connections a listener holds, on all addresses.
#[derive(Default)]
pub(super) struct Slots(AtomicUsize);

impl Slots {
    /// Takes one of `max`, unless all are taken, as long as what is returned lives.
    fn take(self: &Arc<Self>, max: usize) -> Option<Slot> {
        let slot = Slot(self.clone());
        (self.0.fetch_add(1, Ordering::Relaxed) < max).then_some(slot)
    }
}

struct Slot(Arc<Slots>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Lets one line of many of a kind be logged every now and then: who connects decides how many there
/// are.
#[derive(Default)]
pub(super) struct Occasional {
    last: Option<Instant>,
    hidden: u64,
}

impl Occasional {
    /// Whether another line is due: how many were not, since the last that was.
    fn is_due(&mut self) -> Option<u64> {
        let now = Instant::now();
        if self.last.is_some_and(|last| now - last < LOG_EVERY) {
            self.hidden += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.hidden))
    }
}

/// Counts an open connection while it lives.
struct Open(IntGauge);

impl Open {
    fn new(gauge: IntGauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}
