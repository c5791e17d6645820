//! The gate: pingora's phases, each thin.
//!
//! Decisions are made in `request_filter`, on a head that has one reading only; what was decided is
//! kept in the request's [`Exchange`]. Identity is set in `upstream_request_filter`, after pingora has
//! removed what `Connection` nominates. That phase runs once for every attempt, so it changes nothing
//! in the exchange, and a request about which nothing was decided goes nowhere.

use std::sync::Arc;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::Bytes;
use http::Uri;
use pingora::apps::HttpServerOptions;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora::prelude::HttpPeer;
use pingora::protocols::Digest;
use pingora::proxy::{FailToProxy, HttpProxy, ProxyHttp, ProxyWarnLogContext, Session, http_proxy};
use pingora::server::configuration::ServerConf;
use pingora::{Error, ErrorType};

use crate::clock::Clock;
use crate::config::{HeaderNames, ProxyConfig, UpstreamTimeouts};
use crate::decision::{Asked, Decider, Passage};
use crate::metrics::Metrics;
use crate::net::framing::check_bytes;
use crate::net::{BodyWatch, Connection, Extent};
use crate::policy::Policy;
use crate::verifier::Verifier;

mod access;
mod discovery;
mod failure;
mod headers;
mod refusal;
mod request;
mod response;
mod survey;
mod tunnel;
mod upstream;

pub use upstream::{UpstreamError, Upstreams};

use access::{Exchange, Outcome, Rule};
use headers::{HeaderRules, Origin, RequestId};
use refusal::Refusal;
use request::Kind;
use survey::Survey;
use upstream::{MAX_ATTEMPTS, Needs};

/// Idle upstream connections kept for reuse, of all groups and workers together.
const UPSTREAM_POOL: usize = 1024;
/// Each of many workers keeps so many all the same.
const MIN_POOL: usize = 64;

/// What a [`Regime`] is made of.
pub struct Parts {
    /// Checks claims.
    pub verifier: Arc<Verifier>,
    /// Says who may pass.
    pub policy: Arc<Policy>,
    /// Names of headers.
    pub headers: HeaderNames,
    /// `[proxy]`.
    pub config: ProxyConfig,
    /// Where requests go.
    pub upstreams: Arc<Upstreams>,
    /// Whether every request gets an access line.
    pub access_log: bool,
}

/// What requests are judged and forwarded by. It is replaced as a whole, and a request has the same one from
/// its head to its end: never one's policy with the other's upstreams.
pub struct Regime {
    decider: Decider,
    policy: Arc<Policy>,
    headers: HeaderRules,
    timeouts: UpstreamTimeouts,
    upstreams: Arc<Upstreams>,
    access_log: bool,
}

impl Regime {
    /// What settings say.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        Self {
            decider: Decider::new(parts.verifier, parts.headers.clone()),
            policy: parts.policy,
            headers: HeaderRules::new(parts.headers, parts.config.trusted_proxies),
            timeouts: parts.config.timeouts,
            upstreams: parts.upstreams,
            access_log: parts.access_log,
        }
    }
}

/// The application of one of `workers` for [`crate::net::Listener::run_on`], with connections to upstreams of its
/// own. `regime` may be replaced at any time.
#[must_use]
pub fn app(
    regime: Arc<ArcSwap<Regime>>,
    metrics: Arc<Metrics>,
    clock: Arc<dyn Clock>,
    workers: usize,
) -> Arc<HttpProxy<Gate>> {
    let conf = ServerConf {
        max_retries: MAX_ATTEMPTS,
        upstream_keepalive_pool_size: (UPSTREAM_POOL / workers).max(MIN_POOL),
        ..ServerConf::default()
    };
    let mut proxy = http_proxy(&Arc::new(conf), Gate { regime, metrics, clock });
    // CONNECT is refused by the gate, with an answer in the gate's form.
    let mut options = HttpServerOptions::default();
    options.allow_connect_method_proxying = true;
    proxy.server_options = Some(options);
    Arc::new(proxy)
}

/// The gate itself; see the module.
pub struct Gate {
    regime: Arc<ArcSwap<Regime>>,
    metrics: Arc<Metrics>,
    clock: Arc<dyn Clock>,
}

impl Gate {
    /// Decides about a request, and notes in `exchange` what is needed to forward it.
    async fn decide(request: &RequestHeader, exchange: &mut Exchange) -> Result<(), Refusal> {
        let regime = &exchange.regime;
        let seen = &exchange.survey;
        let (method, head) = request::read(request, seen, &exchange.limits, &regime.policy)?;
        exchange.head = Some(head.keep());
        let length = seen.length?;
        if exchange.limits.max_body_bytes.is_some_and(|max| length.is_some_and(|n| n > max)) {
            return Err(Refusal::BodyTooLarge);
        }
        let asked = Asked {
            method,
            head: &head,
            headers: &request.headers,
            client: exchange.client,
            request_id: exchange.request_id.as_str(),
            at: exchange.started,
        };
        let decision = regime.decider.decide(&regime.policy, asked).await;
        exchange.rule = Rule::of(decision.route);
        let decided = exchange.decided.insert(decision.outcome);
        decided.as_ref().map(drop).map_err(|refused| refused.why.into())
    }

    /// Makes the head that goes upstream out of pingora's copy of the client's. It is changed as a plain map of
    /// headers, and has no spellings of names then, whatever the client's has.
    fn prepare(request: &mut RequestHeader, exchange: &Exchange) -> pingora::Result<()> {
        let undecided = || Error::explain(ErrorType::InternalError, "nothing was decided");
        let head = exchange.head.as_ref().ok_or_else(undecided)?;
        let rules = &exchange.regime.headers;
        let who = match &exchange.decided {
            Some(Ok(Passage::Proven(permit))) => Some(permit.principal()),
            Some(Ok(Passage::Public | Passage::Reported(_))) => None,
            None | Some(Err(_)) => return Err(undecided()),
        };
        let bad = |_| Error::explain(ErrorType::InternalError, "a value cannot stand in a header");
        let mut parts = http::request::Parts::from(std::mem::replace(request, request::nothing()));
        rules.vouch(&mut parts.headers, &exchange.origin, who).map_err(bad)?;
        let authority = head.authority();
        rules
            .forward(&mut parts.headers, &exchange.origin, authority, &exchange.request_id)
            .map_err(bad)?;
        if exchange.survey.cookies > 1 {
            headers::join_cookies(&mut parts.headers);
        }
        // Nothing but the path: over HTTP/2 there is an authority, too, one that may be spelled otherwise.
        let path = std::mem::take(&mut parts.uri).into_parts().path_and_query;
        parts.uri = path.map(Uri::from).unwrap_or_default();
        *request = RequestHeader::from(parts);
        let target = head.target().as_bytes();
        if request.raw_path() == target { Ok(()) } else { request.set_raw_path(target) }
    }

    /// Tells the client that no further request will be read here.
    fn close_if_stopping(session: &mut Session, exchange: &Exchange) {
        if exchange.connection.as_ref().is_some_and(|connection| connection.is_stopping()) {
            session.set_keepalive(None);
        }
    }

    /// From here on the request's body must come, and at a pace; not so the messages of a gRPC stream,
    /// nor what goes through a tunnel.
    fn await_body(session: &mut Session, exchange: &mut Exchange) {
        if !session.is_http2() {
            if exchange.survey.has_body
                && let Some(connection) = &exchange.connection
            {
                connection.await_body();
            }
        } else if exchange.survey.kind != Kind::Grpc && !session.as_downstream_mut().is_body_done()
        {
            exchange.watch = BodyWatch::current();
            if let Some(watch) = &exchange.watch {
                let limits = &exchange.limits;
                watch.begin(
                    limits.body_timeout,
                    limits.min_body_rate,
                    exchange.request_id.as_str(),
                );
            }
        }
    }

    /// Bounds the wait for the beginning of a stream's answer, since pingora's own time-out must allow
    /// for the silences later on. gRPC and HTTP/2 are left out: there the answer's head may come late,
    /// or its connection carries other requests.
    fn bound_wait(session: &Session, exchange: &Exchange) {
        if let (Kind::WebSocket | Kind::Events, Some(connection), false) =
            (exchange.survey.kind, &exchange.connection, session.is_http2())
        {
            let limit = exchange.rule.timeouts.read.unwrap_or(exchange.regime.timeouts.read);
            connection.await_answer(limit);
        }
    }
}

#[async_trait]
impl ProxyHttp for Gate {
    /// Boxed, since pingora moves it from one future into the next.
    type CTX = Box<Exchange>;

    fn new_ctx(&self) -> Self::CTX {
        Box::new(Exchange::new(self.regime.load_full(), self.clock.now()))
    }

    /// No modules: nothing is compressed or changed.
    fn init_downstream_modules(&self, _: &mut HttpModules) {}

    async fn early_request_filter(
        &self,
        session: &mut Session,
        exchange: &mut Self::CTX,
    ) -> pingora::Result<()> {
        let connection = Connection::of(session.as_downstream()).cloned();
        if let Some(connection) = connection {
            connection.head_done();
            exchange.listener = connection.listener();
            exchange.limits = connection.limits();
            exchange.origin = Origin {
                peer: connection.peer(),
                peer_text: connection.peer_text().cloned(),
                trusted: exchange.regime.headers.trusts(connection.peer()),
                tls: connection.is_tls(),
            };
            exchange.connection = Some(connection);
        }
        let (rules, headers) = (&exchange.regime.headers, &session.req_header().headers);
        exchange.client = rules.client(headers, &exchange.origin);
        exchange.request_id =
            rules.request_id(headers, &exchange.origin).unwrap_or_else(RequestId::random);
        request::forget_spellings(session.req_header_mut());
        exchange.survey = Survey::of(session.req_header());
        exchange.note_extent(session.is_http2());
        session.set_read_timeout(Some(exchange.limits.body_timeout));
        if session.is_http2() {
            // The connection goes on when a stream's client takes nothing; over HTTP/1.1 the guard
            // sees to it, and does not ask a slow client to take a large part at once.
            session.set_write_timeout(Some(exchange.limits.write_timeout));
        }
        session.set_total_drain_timeout(Some(exchange.limits.body_timeout));
        // Without this a request that arrives early spoils the answer of the one before it.
        session.set_pipelining_enabled(true);
        // A client that has sent all may close its half and still wait for the answer; nobody waits
        // so for a stream, whose answer may never end.
        session.set_abort_on_close(matches!(exchange.survey.kind, Kind::WebSocket | Kind::Events));
        Ok(())
    }

    async fn request_filter(
        &self,
        session: &mut Session,
        exchange: &mut Self::CTX,
    ) -> pingora::Result<bool> {
        let decision = match check_bytes(session.as_downstream()) {
            Err(unclear) => Err(unclear.into()),
            Ok(()) => Self::decide(session.req_header(), exchange).await,
        };
        let took = self.clock.monotonic().duration_since(exchange.started.monotonic);
        self.metrics.gate_duration.observe(took.as_secs_f64());
        let Err(refusal) = decision else { return Ok(false) };
        exchange.outcome = Outcome::Refused(refusal);
        Self::close_if_stopping(session, exchange);
        if refusal.is_of_head() {
            // Where such a request ends is not sure either.
            session.set_keepalive(None);
        }
        refusal.answer(session, &exchange.request_id).await?;
        Ok(true)
    }

    async fn upstream_peer(
        &self,
        session: &mut Session,
        exchange: &mut Self::CTX,
    ) -> pingora::Result<Box<HttpPeer>> {
        let needs = Needs::of(exchange.rule.timeouts, &exchange.survey);
        let upstreams = &exchange.regime.upstreams;
        match upstreams.peer(exchange.rule.upstream, &exchange.tried, needs) {
            Some(peer) => {
                Self::await_body(session, exchange);
                Self::bound_wait(session, exchange);
                Ok(peer)
            }
            None => {
                self.metrics.upstream_failure("no_address");
                let error =
                    Error::explain(ErrorType::ConnectNoRoute, "no upstream address is known");
                Err(error.into_up())
            }
        }
    }

    /// Nothing was sent, so the next backend may be tried.
    fn fail_to_connect(
        &self,
        _: &mut Session,
        peer: &HttpPeer,
        exchange: &mut Self::CTX,
        mut error: Box<Error>,
    ) -> Box<Error> {
        self.metrics.upstream_failure(failure::cause(&error));
        tracing::warn!(upstream = %peer._address, %error, "cannot connect to an upstream server");
        exchange.tried.push(peer._address.clone());
        let known = exchange.regime.upstreams.size(exchange.rule.upstream);
        error.set_retry(exchange.tried.len() < known.min(MAX_ATTEMPTS));
        error
    }

    async fn connected_to_upstream(
        &self,
        _: &mut Session,
        _reused: bool,
        peer: &HttpPeer,
        _fd: std::os::fd::RawFd,
        _: Option<&Digest>,
        exchange: &mut Self::CTX,
    ) -> pingora::Result<()> {
        exchange.upstream_address = Some(peer._address.clone());
        // Another attempt sends the body from its beginning.
        exchange.body_bytes = 0;
        exchange.sent_at.get_or_insert_with(|| self.clock.monotonic());
        Ok(())
    }

    async fn upstream_request_filter(
        &self,
        _: &mut Session,
        request: &mut RequestHeader,
        exchange: &mut Self::CTX,
    ) -> pingora::Result<()> {
        Self::prepare(request, exchange)
    }

    async fn request_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        end: bool,
        exchange: &mut Self::CTX,
    ) -> pingora::Result<()> {
        let bytes = body.as_ref().map_or(0, Bytes::len);
        exchange.body_bytes += bytes as u64;
        exchange.body_moved(bytes, end);
        if end && bytes == 0 {
            // An HTTP/2 body may end with empty data. pingora would write that as a chunk, which ends a
            // chunked body, and then end the body once more: that second end would be the beginning of
            // whatever request is next on the upstream's connection.
            *body = None;
        }
        match exchange.limits.max_body_bytes {
            // What goes through a tunnel is no body.
            Some(max) if exchange.body_bytes > max && !session.was_upgraded() => {
                Error::e_explain(ErrorType::HTTPStatus(413), "the body is larger than allowed")
            }
            _ => Ok(()),
        }
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        exchange: &mut Self::CTX,
    ) -> pingora::Result<()> {
        if response.status.is_informational() && response.status != 101 {
            return Ok(());
        }
        if response.status == 101 {
            // What comes now is no body.
            exchange.body_moved(0, true);
            exchange
                .connection
                .as_ref()
                .inspect(|connection| connection.set_extent(Extent::Tunnel));
        }
        Self::adapt(session, response, exchange)
    }

    async fn fail_to_proxy(
        &self,
        session: &mut Session,
        error: &Error,
        exchange: &mut Self::CTX,
    ) -> FailToProxy {
        self.answer_failure(session, error, exchange).await
    }

    async fn logging(
        &self,
        session: &mut Session,
        _error: Option<&Error>,
        exchange: &mut Self::CTX,
    ) {
        self.finish(session, exchange);
    }

    /// pingora's own lines would bear path and query.
    fn suppress_error_log(&self, _: &Session, _: &Self::CTX, _: &Error) -> bool {
        true
    }

    fn suppress_proxy_warn_log(
        &self,
        _: &Session,
        _: &Self::CTX,
        _: &Error,
        _: ProxyWarnLogContext,
    ) -> bool {
        true
    }

    fn request_summary(&self, _: &Session, exchange: &Self::CTX) -> String {
        format!("request {}", exchange.request_id.as_str())
    }
}
