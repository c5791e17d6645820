//! Drives an HTTP application on one connection: HTTP/2 through pingora's own loop, HTTP/1.1 through
//! ours, because only a loop knows where one request ends and the next head begins.

use std::sync::Arc;

use async_trait::async_trait;
use http::StatusCode;
use pingora::apps::{HttpServerApp, HttpServerOptions, ReusedHttpStream, ServerApp};
use pingora::protocols::http::ServerSession;
use pingora::protocols::http::v2::server::{H2Options, default_h2_options};
use pingora::protocols::{ALPN, IO};
use pingora::server::ShutdownWatch;

use super::body_watch::{BodyWatch, Broken};
use super::connection::Connection;
use super::guard::Guard;
use crate::config::Limits;
use crate::metrics::Metrics;

/// Requests that an HTTP/2 client may have open at once.
const MAX_STREAMS: u32 = 100;
/// Requests of one HTTP/2 connection that are worked on at once. A request that its client resets
/// no longer counts as open, but takes a moment to end here: without this bound, a client that opens
/// and resets (CVE-2023-44487) could have any number of them.
const MAX_RUNNING_STREAMS: usize = 2 * MAX_STREAMS as usize;
/// Bytes of bodies that a client may send before they are read: of one stream, and of all together, which
/// is what a connection can make us hold. Many times the one, so that an upload which an upstream is slow
/// to take does not stop all others of its connection.
const H2_STREAM_WINDOW: u32 = 65_535;
const H2_CONNECTION_WINDOW: u32 = 1 << 20;
/// Bytes of an answer that are held for a stream whose client does not take them.
const H2_SEND_BUFFER: usize = 64 << 10;
/// Streams that were reset by clients before we came to see them; one more ends the connection.
const H2_UNSEEN_RESETS: usize = 20;
/// Streams that we reset for what a client sent in them (CVE-2025-8671); one more ends the connection.
const H2_ERROR_RESETS: usize = 256;

/// pingora's word for "kept alive without a time-out of its own"; the [`Guard`] bounds idling.
const KEEP_ALIVE: Option<u64> = Some(0);

/// An application with our bounds around it.
pub(super) struct Driven<A> {
    app: Arc<A>,
    options: HttpServerOptions,
    h2: H2Options,
    metrics: Arc<Metrics>,
}

impl<A: HttpServerApp + Send + Sync + 'static> Driven<A> {
    pub(super) fn new(app: Arc<A>, limits: Limits, metrics: Arc<Metrics>) -> Arc<Self> {
        let mut options = HttpServerOptions::default();
        options.h2_idle_timeout = Some(limits.keepalive_timeout);
        Arc::new(Self { app, options, h2: h2_options(limits), metrics })
    }

    /// Serves a connection until it ends.
    pub(super) async fn serve<S: IO + 'static>(
        self: &Arc<Self>,
        mut stream: Guard<S>,
        h2c: bool,
        stop: &ShutdownWatch,
    ) {
        match stream.find_protocol(h2c).await {
            Ok(Some(ALPN::H2)) => {
                self.process_new(Box::new(stream), stop).await;
            }
            Ok(Some(_)) => self.serve_http1(stream, stop).await,
            // Closed, idle for too long, or refused: nothing was asked.
            Ok(None) | Err(_) => {}
        }
    }

    async fn serve_http1<S: IO + 'static>(
        self: &Arc<Self>,
        stream: Guard<S>,
        stop: &ShutdownWatch,
    ) {
        let connection = stream.connection().clone();
        let mut session = ServerSession::new_http1(Box::new(stream));
        session.set_keepalive(KEEP_ALIVE);
        while let Some(reused) = self.app.process_new_http(session, stop).await {
            connection.await_head();
            let (stream, settings) = reused.consume();
            session = ServerSession::new_http1(stream);
            if let Some(settings) = settings {
                settings.apply_to_session(&mut session);
            }
        }
    }

    /// Works on a request of an HTTP/2 connection, within bounds that pingora does not have. Ending it
    /// resets its stream.
    async fn process_stream<F>(
        &self,
        connection: &Arc<Connection>,
        mut session: ServerSession,
        exchange: impl FnOnce(ServerSession) -> F,
    ) -> Option<ReusedHttpStream>
    where
        F: Future<Output = Option<ReusedHttpStream>>,
    {
        let Some(_running) = connection.begin_stream(MAX_RUNNING_STREAMS) else {
            self.metrics.connection_refused(connection.listener(), "streams");
            if let ServerSession::H2(stream) = &mut session {
                stream.shutdown_with_reason(h2::Reason::REFUSED_STREAM);
            }
            return None;
        };
        let cause = "body_too_slow";
        match BodyWatch::over(connection, exchange(session)).await {
            Ok(done) => done,
            Err(Broken::Stopping(request_id)) => {
                connection.drain().note_cut();
                connection.log_cut(&request_id);
                None
            }
            Err(Broken::TooSlow(request_id)) => {
                self.metrics.connection_refused(connection.listener(), cause);
                let status = StatusCode::REQUEST_TIMEOUT.as_u16();
                connection.log_refused(&request_id, status, cause);
                None
            }
        }
    }
}

#[async_trait]
impl<A: HttpServerApp + Send + Sync + 'static> HttpServerApp for Driven<A> {
    async fn process_new_http(
        self: &Arc<Self>,
        session: ServerSession,
        stop: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        let exchange = |session| self.app.process_new_http(session, stop);
        match Connection::of(&session).cloned() {
            None => exchange(session).await,
            Some(connection) => self.process_stream(&connection, session, exchange).await,
        }
    }

    fn h2_options(&self) -> Option<H2Options> {
        Some(self.h2.clone())
    }

    fn server_options(&self) -> Option<&HttpServerOptions> {
        Some(&self.options)
    }
}

/// Bounds of an HTTP/2 connection beyond those of pingora. Floods of CONTINUATION frames end with the
/// header list; those of PING and SETTINGS take no memory, since each is answered before the next is
/// read, and end with `write_timeout` if the client does not take the answers.
fn h2_options(limits: Limits) -> H2Options {
    let mut h2 = default_h2_options();
    h2.max_header_list_size(u32::try_from(limits.max_head_bytes).unwrap_or(u32::MAX))
        .max_concurrent_streams(MAX_STREAMS)
        .initial_window_size(H2_STREAM_WINDOW)
        .initial_connection_window_size(H2_CONNECTION_WINDOW)
        .max_send_buffer_size(H2_SEND_BUFFER)
        .max_pending_accept_reset_streams(H2_UNSEEN_RESETS)
        .max_local_error_reset_streams(Some(H2_ERROR_RESETS));
    h2
}
