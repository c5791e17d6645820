//! The accept loop of one bound address.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use pingora::apps::HttpServerApp;
use pingora::protocols::l4::stream::Stream;
use prometheus::IntGauge;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

use super::connection::Connection;
use super::drain::Drain;
use super::guard::Guard;
use super::http::Driven;
use super::socket::Socket;
use super::sources::Sources;
use super::tls::Certificate;
use crate::config::Limits;
use crate::metrics::Metrics;

/// Shortest and longest pause after the kernel could not give us a connection.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Time between two log lines about refused connections.
const LOG_EVERY: Duration = Duration::from_secs(10);

pub(super) struct AcceptLoop<A> {
    pub(super) listener: &'static str,
    pub(super) tls: Option<Arc<Certificate>>,
    pub(super) h2c: bool,
    /// Peers that may connect; empty: any.
    pub(super) allow_from: Vec<IpNet>,
    pub(super) limits: Limits,
    pub(super) metrics: Arc<Metrics>,
    pub(super) slots: Arc<Semaphore>,
    pub(super) sources: Arc<Sources>,
    pub(super) refusals: Occasional,
    pub(super) open: IntGauge,
    pub(super) drain: Arc<Drain>,
    pub(super) app: Arc<Driven<A>>,
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
                    Ok((stream, peer)) => {
                        pause = PAUSE_MIN;
                        self.start(&mut connections, stream, peer);
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

    /// Serves `stream` in a task of its own, or closes it.
    fn start(&mut self, connections: &mut JoinSet<()>, stream: Stream, peer: Option<IpAddr>) {
        let held = match self.admit(peer) {
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
        let is_tls = self.tls.is_some();
        let (stop, drain) = (self.stop.clone(), self.drain.clone());
        let connection = Connection::new(self.listener, peer, is_tls, self.limits, stop, drain);
        let app = self.app.clone();
        let metrics = self.metrics.clone();
        let tls = self.tls.clone();
        let stop = self.stop.clone();
        let h2c = self.h2c;
        connections.spawn(async move {
            let _held = held;
            let Some(tls) = tls else {
                app.serve(Guard::new(stream, connection, metrics, &stop), h2c, &stop).await;
                return;
            };
            let limit = connection.limits().head_timeout;
            let refused = match timeout(limit, tls.accept(stream)).await {
                Ok(Ok(stream)) => {
                    app.serve(Guard::new(stream, connection, metrics, &stop), h2c, &stop).await;
                    return;
                }
                Ok(Err(_)) => "tls",
                Err(_) => "tls_timeout",
            };
            metrics.connection_refused(connection.listener(), refused);
        });
    }

    /// What a new connection takes of the listener's capacity, or why it gets none. Beyond a cap it
    /// is closed at once: a client that is told may go elsewhere, one in the kernel's queue can only
    /// wait.
    fn admit(&self, peer: Option<IpAddr>) -> Result<impl Send + use<A>, &'static str> {
        let allowed = |peer| self.allow_from.iter().any(|net| net.contains(&peer));
        if !self.allow_from.is_empty() && !peer.is_none_or(allowed) {
            return Err("source");
        }
        let slot = self.slots.clone().try_acquire_owned().map_err(|_| "limit")?;
        let source = self.sources.admit(peer).ok_or("source_limit")?;
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
