//! The accept loop of one bound address.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use pingora::apps::HttpServerApp;
use pingora::listeners::tls::Acceptor;
use pingora::protocols::l4::stream::Stream;
use prometheus::IntGauge;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::connection::Connection;
use super::guard::Guard;
use super::http::Driven;
use super::socket::Socket;
use crate::config::Limits;
use crate::metrics::Metrics;

/// Shortest and longest pause after the kernel could not give us a connection.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_secs(1);

pub(super) struct AcceptLoop<A> {
    pub(super) listener: &'static str,
    pub(super) acceptor: Option<Arc<Acceptor>>,
    pub(super) h2c: bool,
    pub(super) limits: Limits,
    pub(super) metrics: Arc<Metrics>,
    pub(super) slots: Arc<Semaphore>,
    pub(super) open: IntGauge,
    pub(super) app: Arc<Driven<A>>,
    pub(super) stop: watch::Receiver<bool>,
}

impl<A: HttpServerApp + Send + Sync + 'static> AcceptLoop<A> {
    /// Accepts until told to stop, then waits for the connections to end.
    pub(super) async fn run(self, socket: Socket) {
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

    /// Serves `stream` in a task of its own. Beyond the cap it is closed at once: a client that is
    /// told may go elsewhere, one in the kernel's queue can only wait.
    fn start(&self, connections: &mut JoinSet<()>, stream: Stream, peer: Option<IpAddr>) {
        let Ok(slot) = self.slots.clone().try_acquire_owned() else {
            self.metrics.connection_refused(self.listener, "limit");
            return;
        };
        let tls = self.acceptor.is_some();
        let connection = Connection::new(self.listener, peer, tls, self.limits, self.stop.clone());
        let open = Open::new(self.open.clone());
        let app = self.app.clone();
        let metrics = self.metrics.clone();
        let acceptor = self.acceptor.clone();
        let stop = self.stop.clone();
        let h2c = self.h2c;
        connections.spawn(async move {
            let _held = (slot, open);
            let Some(acceptor) = acceptor else {
                app.serve(Guard::new(stream, connection, metrics, &stop), h2c, &stop).await;
                return;
            };
            let limit = connection.limits().head_timeout;
            let refused = match timeout(limit, acceptor.tls_handshake(stream)).await {
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
