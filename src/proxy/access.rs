//! One request from its head to its log line.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use pingora::protocols::l4::socket::SocketAddr as BackendAddress;
use pingora::proxy::Session;
use tracing::info;

use super::headers::{Origin, RequestId};
use super::refusal::Refusal;
use super::request::Kind;
use super::survey::Survey;
use super::{Gate, Regime};
use crate::clock::Moment;
use crate::config::Limits;
use crate::decision::{KeptHead, Passage, Refused};
use crate::entry::Principal;
use crate::logging::{ACCESS, millis};
use crate::net::{BodyWatch, Connection, Extent, STOPPING};
use crate::policy::{Route, RouteTimeouts};
use crate::verifier::Permit;

/// How a request ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum Outcome {
    /// With the upstream's answer.
    Forwarded,
    /// With the gate's, before anything was forwarded.
    Refused(Refusal),
    /// With the gate's, or broken off, after that.
    Failed(Refusal),
    /// The client left.
    ClientGone,
}

/// What the governing route asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    /// `public`, `protected` or `none`: for metrics.
    pub(super) kind: &'static str,
    pub(super) upstream: usize,
    pub(super) timeouts: RouteTimeouts,
}

impl Rule {
    pub(super) fn of(route: Option<&Route>) -> Self {
        let Some(route) = route else {
            return Self { kind: "none", upstream: 0, timeouts: RouteTimeouts::default() };
        };
        Self {
            kind: if route.is_public() { "public" } else { "protected" },
            upstream: route.upstream.unwrap_or(0),
            timeouts: route.timeouts,
        }
    }
}

/// Everything that is kept of one request.
pub struct Exchange {
    pub(super) regime: Arc<Regime>,
    pub(super) started: Moment,
    pub(super) listener: &'static str,
    pub(super) connection: Option<Arc<Connection>>,
    /// Over HTTP/2, while the body is awaited.
    pub(super) watch: Option<Arc<BodyWatch>>,
    pub(super) limits: Limits,
    pub(super) origin: Origin,
    /// Where it comes from, behind trusted proxies; `None`: a Unix socket.
    pub(super) client: Option<IpAddr>,
    pub(super) request_id: RequestId,
    pub(super) survey: Survey,
    pub(super) head: Option<KeptHead>,
    pub(super) rule: Rule,
    /// `None`: nothing was decided, so it must not pass.
    pub(super) decided: Option<Result<Passage, Refused>>,
    pub(super) outcome: Outcome,
    /// Backends that could not be connected to.
    pub(super) tried: Vec<BackendAddress>,
    pub(super) upstream_address: Option<BackendAddress>,
    pub(super) upstream_status: Option<u16>,
    /// When there was first a connection to an upstream.
    pub(super) sent_at: Option<Instant>,
    /// Bytes of the request's body so far.
    pub(super) body_bytes: u64,
}

impl Exchange {
    pub(super) fn new(regime: Arc<Regime>, started: Moment) -> Self {
        Self {
            regime,
            started,
            listener: "proxy",
            connection: None,
            watch: None,
            limits: Limits::default(),
            origin: Origin { peer: None, peer_text: None, trusted: false, tls: false },
            client: None,
            request_id: RequestId::NONE,
            survey: Survey::NONE,
            head: None,
            rule: Rule::of(None),
            decided: None,
            outcome: Outcome::Forwarded,
            tried: Vec::new(),
            upstream_address: None,
            upstream_status: None,
            sent_at: None,
            body_bytes: 0,
        }
    }

    /// So many bytes of the request's body came, and whether they were the last.
    pub(super) fn body_moved(&mut self, bytes: usize, end: bool) {
        if let Some(watch) = &self.watch {
            watch.moved(bytes);
        }
        if end {
            self.watch.take().inspect(|watch| watch.end());
            self.connection.as_ref().inspect(|connection| connection.body_done());
        }
    }

    /// Tells what looks after the connection that the exchange may last for hours.
    pub(super) fn note_extent(&self, is_http2: bool) {
        match self.survey.kind {
            Kind::Plain => {}
            _ if is_http2 => {
                BodyWatch::current().inspect(|watch| watch.note_stream(self.request_id.as_str()));
            }
            // What switches is a tunnel from then on.
            _ => {
                self.connection
                    .as_ref()
                    .inspect(|connection| connection.set_extent(Extent::Stream));
            }
        }
    }

    fn was_cut(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| connection.was_cut())
    }

    fn proven(&self) -> Option<&Principal> {
        match self.decided.as_ref()? {
            Ok(Passage::Proven(permit)) => Some(permit.principal()),
            Ok(Passage::Public | Passage::Reported(_)) => None,
            Err(refused) => refused.permit.as_ref().map(Permit::principal),
        }
    }

    fn is_of_previous_seed(&self) -> bool {
        matches!(&self.decided, Some(Ok(Passage::Proven(permit))) if permit.is_of_previous_seed())
    }

    /// A word for metrics and a finer one for logs.
    fn verdict(&self) -> (&'static str, &'static str) {
        match (&self.outcome, &self.decided) {
            (Outcome::Forwarded | Outcome::ClientGone, _) if self.was_cut() => ("failed", STOPPING),
            (Outcome::Refused(refusal), _) => (refusal.class(), refusal.reason()),
            (Outcome::Failed(refusal), _) => ("failed", refusal.reason()),
            (Outcome::ClientGone, _) => ("client_gone", "client_gone"),
            (Outcome::Forwarded, Some(Ok(Passage::Reported(refusal)))) => {
                ("reported", refusal.reason())
            }
            (Outcome::Forwarded, Some(Ok(Passage::Public))) => ("public", "public"),
            (Outcome::Forwarded, _) => ("allowed", "proven"),
        }
    }
}

impl Gate {
    /// Counts a finished request and writes its access line.
    pub(super) fn finish(&self, session: &Session, exchange: &Exchange) {
        let now = self.clock.monotonic();
        let (outcome, reason) = exchange.verdict();
        self.metrics.request(exchange.listener, exchange.rule.kind, outcome);
        let upstream_took = exchange.sent_at.map(|sent| now.duration_since(sent));
        if let (Some(status), Some(took)) = (exchange.upstream_status, upstream_took) {
            self.metrics.upstream(status, took);
        }
        if !exchange.regime.access_log {
            return;
        }
        let request = session.req_header();
        let who = exchange.proven();
        // The path without its query, and only in its one reading: queries carry secrets, other
        // readings carry what was refused. Names stand here only when they are proven.
        info!(
            target: ACCESS,
            request_id = exchange.request_id.as_str(),
            listener = exchange.listener,
            client = exchange.client.map(tracing::field::display),
            method = request.method.as_str(),
            host = exchange.head.as_ref().map(KeptHead::host),
            path = exchange.head.as_ref().map(KeptHead::shown_path).as_deref(),
            status = session.response_written().map(|response| response.status.as_u16()),
            outcome,
            reason,
            realm = who.map(|who| who.realm.as_str()),
            name = who.map(|who| who.name.as_str()),
            seed = exchange.is_of_previous_seed().then_some("previous"),
            duration_ms = millis(now.duration_since(exchange.started.monotonic)),
            upstream = exchange.upstream_address.as_ref().map(tracing::field::display),
            upstream_ms = upstream_took.map(millis),
            bytes_in = exchange.body_bytes,
            bytes_out = session.body_bytes_sent() as u64,
        );
    }
}
