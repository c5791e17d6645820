//! What applications may know of the connection that a request came on.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use http::HeaderValue;
use pingora::http::ResponseHeader;
use pingora::protocols::http::ServerSession;
use pingora::protocols::raw_connect::ProxyDigest;
use tokio::sync::watch;

use super::drain::Drain;
use super::terms::Terms;
use crate::config::Limits;
use crate::logging::ACCESS;

/// [`Connection::head`] while no head is being read.
const NO_HEAD: usize = usize::MAX;
/// [`Connection::answer_within`] while there is no bound.
const NO_WAIT: u64 = u64::MAX;
/// The reason in access lines of streams that end because the process stops.
pub const STOPPING: &str = "stopping";

/// One client connection, shared by its guard and the application.
#[derive(Debug)]
pub struct Connection {
    listener: &'static str,
    peer: Option<IpAddr>,
    /// The same as text, which many requests need.
    peer_text: Option<HeaderValue>,
    tls: bool,
    terms: Arc<ArcSwap<Terms>>,
    stop: watch::Receiver<bool>,
    drain: Arc<Drain>,
    /// What the HTTP/1.1 exchange on it is: an [`Extent`].
    extent: AtomicU8,
    /// Whether it was ended because the process stops.
    cut: AtomicBool,
    /// Bytes read of the head that is being read, or [`NO_HEAD`].
    head: AtomicUsize,
    /// Milliseconds that an answer may take to begin, or [`NO_WAIT`].
    answer_within: AtomicU64,
    /// Beginnings and ends of the HTTP/1.1 bodies that must come at a pace: odd while one is awaited.
    bodies: AtomicU32,
    /// HTTP/2 requests that are being worked on.
    streams: AtomicUsize,
}

impl Connection {
    pub(super) fn new(
        listener: &'static str,
        peer: Option<IpAddr>,
        tls: bool,
        terms: Arc<ArcSwap<Terms>>,
        stop: watch::Receiver<bool>,
        drain: Arc<Drain>,
    ) -> Arc<Self> {
        Arc::new(Self {
            listener,
            peer,
            peer_text: peer.and_then(|peer| HeaderValue::try_from(peer.to_string()).ok()),
            tls,
            terms,
            stop,
            drain,
            extent: AtomicU8::new(Extent::Request as u8),
            cut: AtomicBool::new(false),
            head: AtomicUsize::new(0),
            answer_within: AtomicU64::new(NO_WAIT),
            bodies: AtomicU32::new(0),
            streams: AtomicUsize::new(0),
        })
    }

    /// The connection that `session`'s request came on; `None` outside a [`super::Listener`].
    #[must_use]
    pub fn of(session: &ServerSession) -> Option<&Arc<Self>> {
        let digest = session.digest()?.proxy_digest.as_ref()?;
        digest.user_data.as_ref()?.downcast_ref()
    }

    /// Puts the connection where [`Self::of`] finds it: pingora carries this digest from the stream
    /// to every session, and nothing else uses it on the listening side.
    pub(super) fn digest(self: &Arc<Self>) -> Arc<ProxyDigest> {
        let unused = ResponseHeader::build(200, Some(0)).expect("200 is a status");
        Arc::new(ProxyDigest::new(Box::new(unused), Some(Box::new(self.clone()))))
    }

    /// `proxy`, `api` or `ops`.
    #[must_use]
    pub fn listener(&self) -> &'static str {
        self.listener
    }

    /// The peer's IP address; `None` on a Unix socket.
    #[must_use]
    pub fn peer(&self) -> Option<IpAddr> {
        self.peer
    }

    /// The peer's IP address as it stands in headers; `None` on a Unix socket.
    #[must_use]
    pub fn peer_text(&self) -> Option<&HeaderValue> {
        self.peer_text.as_ref()
    }

    /// Whether it is encrypted.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.tls
    }

    /// Its bounds as of now; they may change from one request to the next.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.terms.load().limits
    }

    /// Whether the process is stopping: this request is the connection's last.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.drain.is_announced() || *self.stop.borrow()
    }

    /// Ends once the listener is to stop.
    pub(super) async fn stopped(&self) {
        // Without a sender nobody will ever stop it by order.
        if self.stop.clone().wait_for(|stop| *stop).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// How long what is open now may last once the process stops.
    pub(super) fn drain(&self) -> &Arc<Drain> {
        &self.drain
    }

    /// Says what the HTTP/1.1 exchange is: one that may last for hours is ended after a while once the process
    /// stops. Until the next request.
    pub fn set_extent(&self, extent: Extent) {
        self.extent.store(extent as u8, Ordering::Relaxed);
    }

    /// What the exchange is.
    pub(super) fn extent(&self) -> Extent {
        match self.extent.load(Ordering::Relaxed) {
            TUNNEL => Extent::Tunnel,
            STREAM => Extent::Stream,
            _ => Extent::Request,
        }
    }

    /// Notes that the stream on it was ended because the process stops.
    pub(super) fn note_cut(&self) {
        self.cut.store(true, Ordering::Relaxed);
        self.drain.note_cut();
    }

    /// Whether the HTTP/1.1 stream on it was ended because the process stops.
    #[must_use]
    pub fn was_cut(&self) -> bool {
        self.cut.load(Ordering::Relaxed)
    }

    /// The application has read a request's head: until the next request, the bounds of heads no
    /// longer apply. Without this call a long body would be taken for a long head.
    pub fn head_done(&self) {
        self.head.store(NO_HEAD, Ordering::Relaxed);
    }

    /// The body of an HTTP/1.1 request is being read: if it stalls for [`Limits::body_timeout`], or
    /// beyond that comes at less than [`Limits::min_body_rate`] on average, reading fails with
    /// [`super::BodyTooSlow`]. Only the time that is spent waiting for the client counts. Until
    /// [`Self::body_done`].
    pub fn await_body(&self) {
        if self.awaited_body().is_none() {
            self.bodies.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The body is over, or has ceased to be one.
    pub fn body_done(&self) {
        if self.awaited_body().is_some() {
            self.bodies.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A number for the body that is awaited, if one is.
    pub(super) fn awaited_body(&self) -> Option<u32> {
        Some(self.bodies.load(Ordering::Relaxed)).filter(|bodies| bodies % 2 == 1)
    }

    /// Counts an HTTP/2 request as being worked on while what is returned lives; `None`: there are
    /// `max` already.
    pub(super) fn begin_stream(self: &Arc<Self>, max: usize) -> Option<RunningStream> {
        let running = RunningStream(self.clone());
        (self.streams.fetch_add(1, Ordering::Relaxed) < max).then_some(running)
    }

    /// While the client, which has sent its HTTP/1.1 request, waits for the answer to begin: after
    /// `limit`, reading from it fails with [`std::io::ErrorKind::TimedOut`], which wakes the
    /// application. Until [`Self::answered`].
    pub fn await_answer(&self, limit: Duration) {
        let millis = u64::try_from(limit.as_millis()).unwrap_or(NO_WAIT);
        self.answer_within.store(millis, Ordering::Relaxed);
    }

    /// The answer has begun, or the wait is over for another reason.
    pub fn answered(&self) {
        self.answer_within.store(NO_WAIT, Ordering::Relaxed);
    }

    /// The bound on the wait for an answer, if one is awaited.
    pub(super) fn answer_within(&self) -> Option<Duration> {
        let millis = self.answer_within.load(Ordering::Relaxed);
        (millis != NO_WAIT).then(|| Duration::from_millis(millis))
    }

    /// The next request's head is awaited.
    pub(super) fn await_head(&self) {
        self.body_done();
        self.answered();
        self.set_extent(Extent::Request);
        self.head.store(0, Ordering::Relaxed);
    }

    /// Bytes read of the head that is being read, if one is.
    pub(super) fn head(&self) -> Option<usize> {
        let bytes = self.head.load(Ordering::Relaxed);
        (bytes != NO_HEAD).then_some(bytes)
    }

    /// Writes the access line of an HTTP/2 stream that was ended because the process stops.
    pub(super) fn log_cut(&self, request_id: &str) {
        tracing::info!(
            target: ACCESS,
            request_id,
            listener = self.listener,
            client = self.peer.map(tracing::field::display),
            outcome = "failed",
            reason = STOPPING,
        );
    }

    /// Writes the access line of a request that no application gets to see. Only words of ours: what
    /// cannot be read may hold anything.
    pub(super) fn log_refused(&self, request_id: &str, status: u16, reason: &'static str) {
        tracing::info!(
            target: ACCESS,
            request_id,
            listener = self.listener,
            client = self.peer.map(tracing::field::display),
            status,
            outcome = "malformed",
            reason,
        );
    }

    pub(super) fn head_grows(&self, bytes: usize) {
        self.head.fetch_add(bytes, Ordering::Relaxed);
    }
}

const TUNNEL: u8 = Extent::Tunnel as u8;
const STREAM: u8 = Extent::Stream as u8;

/// How long an exchange may last by its nature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Extent {
    /// A request and its answer.
    Request,
    /// An answer that need not end.
    Stream,
    /// A WebSocket, from the head of the answer that begins it.
    Tunnel,
}

/// An HTTP/2 request that is being worked on.
pub(super) struct RunningStream(Arc<Connection>);

impl Drop for RunningStream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The body of every refusal: little for the client, and the id that leads to the log.
#[must_use]
pub fn refusal_body(detail: &str, request_id: &str) -> String {
    serde_json::json!({ "detail": detail, "request_id": request_id }).to_string()
}

/// A fresh random id for a request: 128 bits in hexadecimal digits.
#[must_use]
pub fn new_request_id() -> String {
    data_encoding::HEXLOWER.encode(&rand::random::<[u8; 16]>())
}
