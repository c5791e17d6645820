//! Drives an HTTP application on one connection: HTTP/2 through pingora's own loop, HTTP/1.1 through
//! ours, because only a loop knows where one request ends and the next head begins.

use std::sync::Arc;

use async_trait::async_trait;
use pingora::apps::{HttpServerApp, HttpServerOptions, ReusedHttpStream, ServerApp};
use pingora::protocols::http::ServerSession;
use pingora::protocols::http::v2::server::{H2Options, default_h2_options};
use pingora::protocols::{ALPN, IO};
use pingora::server::ShutdownWatch;

use super::guard::Guard;
use crate::config::Limits;

/// pingora's word for "kept alive without a time-out of its own"; the [`Guard`] bounds idling.
const KEEP_ALIVE: Option<u64> = Some(0);

/// An application with our bounds around it.
pub(super) struct Driven<A> {
    app: Arc<A>,
    options: HttpServerOptions,
    h2: H2Options,
}

impl<A: HttpServerApp + Send + Sync + 'static> Driven<A> {
    pub(super) fn new(app: Arc<A>, limits: Limits) -> Arc<Self> {
        let mut options = HttpServerOptions::default();
        options.h2_idle_timeout = Some(limits.keepalive_timeout);
        let mut h2 = default_h2_options();
        h2.max_header_list_size(u32::try_from(limits.max_head_bytes).unwrap_or(u32::MAX));
        Arc::new(Self { app, options, h2 })
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
        while let Some(reused) = self.process_new_http(session, stop).await {
            connection.await_head();
            let (stream, settings) = reused.consume();
            session = ServerSession::new_http1(stream);
            if let Some(settings) = settings {
                settings.apply_to_session(&mut session);
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
        // A panic ends this task, or for HTTP/2 the stream's: tokio confines it, and the panic hook
        // counts it.
        self.app.process_new_http(session, stop).await
    }

    fn h2_options(&self) -> Option<H2Options> {
        Some(self.h2.clone())
    }

    fn server_options(&self) -> Option<&HttpServerOptions> {
        Some(&self.options)
    }
}
