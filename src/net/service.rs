//! Drives a tower service, such as an axum `Router`, on pingora's HTTP sessions, so that every
//! listener shares one HTTP stack, one TLS set-up and one drain.
//!
//! Owns what HTTP leaves to whoever answers: framing, bodies on demand, unread remainders, trailers. It
//! never logs a request: it may hold a token.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http::header::{CONTENT_LENGTH, EXPECT, HOST, TRANSFER_ENCODING};
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, request};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use pingora::ErrorType;
use pingora::apps::{HttpPersistentSettings, HttpServerApp, ReusedHttpStream};
use pingora::http::ResponseHeader;
use pingora::protocols::http::ServerSession;
use pingora::server::ShutdownWatch;
use tokio::sync::{mpsc, oneshot};
use tower::ServiceExt as _;

use super::framing::{check_bytes, content_length};
use super::{Connection, new_request_id, refusal_body};
use crate::config::Limits;

/// Longest time, and most bytes, that an unread rest of a request's body is read for after the
/// response: closing at once would reset the connection, and the client might lose the response.
const DRAIN_TIME: Duration = Duration::from_secs(5);
const DRAIN_BYTES: usize = 8 << 20;
const UNCLEAR: &str = "The request can be read in more than one way.";

/// A service as a pingora application.
///
/// Every request carries its [`Connection`] as an extension.
pub struct TowerApp<S> {
    /// A request has the one that is there when its head has come.
    service: Arc<ArcSwap<S>>,
}

/// What has become of a request's body.
#[derive(Clone, Copy, Debug)]
enum Reading {
    /// Nobody has asked for it.
    Untouched,
    /// Some of it, or all, was read.
    Begun,
    /// It could not be read, or reading was broken off: where it ends is unknown.
    Failed,
}

/// A head that does not reach the service.
struct Refusal {
    status: StatusCode,
    detail: &'static str,
    /// A bounded word for the log.
    reason: &'static str,
}

type BodyResult = Result<Bytes, std::io::Error>;
/// A wish for the next part of the request's body; `None` is its end.
type Wish = oneshot::Sender<Option<BodyResult>>;

impl<S> TowerApp<S>
where
    S: tower_service::Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send,
{
    /// Serves `service`.
    #[must_use]
    pub fn new(service: S) -> Self {
        Self::replaceable(Arc::new(ArcSwap::from_pointee(service)))
    }

    /// Serves what is in `service`, which may be replaced at any time.
    #[must_use]
    pub fn replaceable(service: Arc<ArcSwap<S>>) -> Self {
        Self { service }
    }

    /// Answers one request. `None`: the connection must be dropped as it is.
    async fn exchange(&self, session: &mut ServerSession, limits: &Limits) -> Option<()> {
        let framed = check_bytes(session).map_err(|_| bad(UNCLEAR, "bad_framing")).and_then(|()| {
            // The URI would hold another path than the one that was asked for.
            let is_text = session.req_header().raw_path_is_utf8();
            if is_text { Ok(()) } else { Err(bad(UNCLEAR, "bad_target")) }
        });
        let head = match framed.and_then(|()| check(session.req_header(), limits)) {
            Ok(()) => head_of(session),
            Err(refusal) => return refuse(session, &refusal).await,
        };
        let is_head = head.method == Method::HEAD;
        let (response, request_body) = self.call(session, head, limits).await;
        let (mut head, body) = response.into_parts();
        let client_waits =
            matches!(request_body, Reading::Untouched) && session.get_header(EXPECT).is_some();
        let is_last = client_waits || matches!(request_body, Reading::Failed);
        if is_last {
            // It waits for "100 Continue" and will not send the body, or not at once; or where the
            // body ends is unknown, and its rest must not be taken for the next request.
            session.set_keepalive(None);
        }
        frame(&mut head.headers, head.status, body.size_hint().exact());
        let bodiless = is_head || head.status == StatusCode::NO_CONTENT;
        if bodiless || body.is_end_stream() {
            write_head_only(session, head.into()).await?;
        } else {
            session.write_response_header(Box::new(head.into())).await.ok()?;
            write_body(session, body).await?;
        }
        if is_last { Some(()) } else { drain(session).await }
    }

    /// Runs the service, and reads the request's body while, and only if, the service asks for it.
    async fn call(
        &self,
        session: &mut ServerSession,
        head: request::Parts,
        limits: &Limits,
    ) -> (Response<Body>, Reading) {
        let service = S::clone(&self.service.load());
        if session.is_body_empty() {
            let response = service.oneshot(Request::from_parts(head, Body::empty())).await;
            return (response.unwrap_or_else(|never| match never {}), Reading::Untouched);
        }
        let (wishes, mut wished) = mpsc::channel::<Wish>(1);
        let body = Body::from_stream(stream::unfold(wishes, |wishes| async {
            let (wish, granted) = oneshot::channel();
            wishes.send(wish).await.ok()?;
            Some((granted.await.ok()??, wishes))
        }));
        let mut reading = Reading::Untouched;
        let mut call = pin!(service.oneshot(Request::from_parts(head, body)));
        let response = loop {
            tokio::select! {
                biased;
                response = &mut call => break response,
                Some(wish) = wished.recv() => {
                    let so_far = std::mem::replace(&mut reading, Reading::Failed);
                    tokio::select! {
                        biased;
                        response = &mut call => break response,
                        part = read(session, so_far, limits) => {
                            if !matches!(part, Some(Err(_))) {
                                reading = Reading::Begun;
                            }
                            // An error means that the service has lost interest.
                            let _ = wish.send(part);
                        }
                    }
                }
            }
        };
        (response.unwrap_or_else(|never| match never {}), reading)
    }
}

#[async_trait]
impl<S> HttpServerApp for TowerApp<S>
where
    S: tower_service::Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send,
{
    async fn process_new_http(
        self: &Arc<Self>,
        mut session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        match session.read_request().await {
            Ok(true) => {}
            Ok(false) => return None,
            // The error may quote the request.
            Err(_) => {
                refuse(&mut session, &bad("Malformed request.", "head_unreadable")).await;
                return None;
            }
        }
        let (limits, is_stopping) = match Connection::of(&session) {
            Some(connection) => {
                connection.head_done();
                (connection.limits(), connection.is_stopping())
            }
            None => (Limits::default(), *shutdown.borrow()),
        };
        if is_stopping {
            session.set_keepalive(None);
        }
        session.set_pipelining_enabled(true);
        // What the service leaves unread is read by `drain`, so the connection can live on.
        session.set_close_on_response_before_downstream_finish(false);
        session.set_read_timeout(Some(limits.body_timeout));
        session.set_write_timeout(Some(limits.write_timeout));
        self.exchange(&mut session, &limits).await?;
        let settings = HttpPersistentSettings::for_session(&session);
        let reusable = session.finish().await.ok()??;
        Some(ReusedHttpStream::from_reusable_stream(reusable, settings))
    }
}

fn head_of(session: &ServerSession) -> request::Parts {
    // Without pingora's record of how names were spelled.
    let mut head = request::Parts::clone(session.req_header());
    if let Some(connection) = Connection::of(session) {
        head.extensions.insert(connection.clone());
    }
    head
}

/// Says how the body ends; pingora leaves it to us.
fn frame(headers: &mut HeaderMap, status: StatusCode, length: Option<u64>) {
    if status == StatusCode::NO_CONTENT {
        headers.remove(CONTENT_LENGTH);
    } else if let Some(length) = length {
        headers.entry(CONTENT_LENGTH).or_insert_with(|| length.into());
    } else if !headers.contains_key(CONTENT_LENGTH) {
        // HTTP/2 drops it.
        headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
}

/// Writes an answer without a body. Over HTTP/2 its head is also its end: a gRPC status that comes alone
/// is taken for one only so.
async fn write_head_only(session: &mut ServerSession, head: ResponseHeader) -> Option<()> {
    if let ServerSession::H2(stream) = session {
        return stream.write_response_header(Box::new(head), true).ok();
    }
    session.write_response_header(Box::new(head)).await.ok()?;
    session.write_response_body(Bytes::new(), true).await.ok()
}

/// Writes a body and its trailers; HTTP/1.1 clients, which must ask for trailers, do without. A body that
/// fails is cut off, so that the client sees that it is not whole.
async fn write_body(session: &mut ServerSession, mut body: Body) -> Option<()> {
    while let Some(frame) = body.frame().await {
        match frame.ok()?.into_data() {
            Ok(data) => session.write_response_body(data, false).await.ok()?,
            Err(frame) => {
                if let (Ok(trailers), true) = (frame.into_trailers(), session.is_http2()) {
                    return session.write_response_trailers(trailers).await.ok();
                }
            }
        }
    }
    session.write_response_body(Bytes::new(), true).await.ok()
}

/// Answers what does not reach the service, and closes the connection.
async fn refuse(session: &mut ServerSession, refusal: &Refusal) -> Option<()> {
    let request_id = new_request_id();
    if let Some(connection) = Connection::of(session) {
        connection.log_refused(&request_id, refusal.status.as_u16(), refusal.reason);
    }
    let body = refusal_body(refusal.detail, &request_id);
    let mut head = ResponseHeader::build(refusal.status, Some(4)).ok()?;
    head.insert_header(http::header::CONTENT_TYPE, "application/json").ok()?;
    head.insert_header(http::header::CACHE_CONTROL, "no-store").ok()?;
    head.insert_header("x-request-id", request_id).ok()?;
    head.insert_header(CONTENT_LENGTH, body.len()).ok()?;
    session.write_error_response(head, body.into()).await.ok()
}

fn bad(detail: &'static str, reason: &'static str) -> Refusal {
    Refusal { status: StatusCode::BAD_REQUEST, detail, reason }
}

fn check(head: &request::Parts, limits: &Limits) -> Result<(), Refusal> {
    let bytes: usize = head.headers.iter().map(|(k, v)| k.as_str().len() + v.len() + 4).sum();
    let target = head.uri.path_and_query().map_or(0, |p| p.as_str().len());
    if head.headers.len() > limits.max_headers || bytes + target > limits.max_head_bytes {
        return Err(Refusal {
            status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            detail: "The request's head is too large.",
            reason: "head_too_large",
        });
    }
    if head.method == Method::CONNECT {
        return Err(Refusal {
            status: StatusCode::METHOD_NOT_ALLOWED,
            detail: "Method \"CONNECT\" not allowed.",
            reason: "method",
        });
    }
    content_length(&head.headers).map_err(|_| bad(UNCLEAR, "bad_framing"))?;
    match head.headers.get(HOST) {
        // pingora has refused a second one.
        Some(host) if host.to_str().is_ok_and(|host| host.parse::<Authority>().is_ok()) => Ok(()),
        None if head.version != Version::HTTP_11 => Ok(()),
        _ => Err(bad("A valid Host header is required.", "bad_host")),
    }
}

async fn read(session: &mut ServerSession, so_far: Reading, limits: &Limits) -> Option<BodyResult> {
    let read = async {
        if matches!(so_far, Reading::Untouched) && session.get_header(EXPECT).is_some() {
            session.write_continue_response().await?;
        }
        session.read_request_body().await
    };
    // pingora's own time-out does not cover HTTP/2.
    match tokio::time::timeout(limits.body_timeout, read).await {
        Ok(Ok(part)) => part.map(Ok),
        Ok(Err(e)) if *e.etype() != ErrorType::ReadTimedout => {
            Some(Err(std::io::Error::other("the body cannot be read")))
        }
        Ok(Err(_)) | Err(_) => Some(Err(std::io::ErrorKind::TimedOut.into())),
    }
}

/// Reads away what the service did not, within bounds.
async fn drain(session: &mut ServerSession) -> Option<()> {
    if session.is_http2() || session.get_keepalive().is_none() && session.is_body_done() {
        return Some(());
    }
    let mut left = DRAIN_BYTES;
    let drained = async {
        while let Some(part) = session.read_request_body().await.ok()? {
            left = left.checked_sub(part.len())?;
        }
        Some(())
    };
    tokio::time::timeout(DRAIN_TIME, drained).await.ok()?
}
