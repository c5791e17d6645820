//! The stream around every connection: bounds what pingora leaves unbounded.
//!
//! - A head, from its first byte to its last, takes at most `head_timeout`, however its bytes are
//!   spread, and at most `max_head_bytes`. Beyond that the client gets 408 or 431 from here, since
//!   pingora would wait for ever or answer 400.
//! - A head that pingora cannot read gets our 400 in place of pingora's: an answer that is written
//!   while a head is still being read can be nothing else.
//! - Between requests a connection idles for at most `keepalive_timeout`, and hardly at all once
//!   the process is stopping, unless it hands over to another.
//! - A stream without end is ended once the process has been stopping for a while.
//! - Where the application asks for it, the wait for its answer to begin is bounded.
//! - A client that takes no bytes for `write_timeout`, or later takes them at less than
//!   `min_body_rate`, is cut.
//! - Where the application asks for it, a body that comes no faster is broken off; so is one that
//!   stalls for `body_timeout`.
//! - A closed connection is read from for a moment longer, so that the last answer is not destroyed by
//!   a reset when the client was still sending.
//!
//! The guard does not parse: a head is being read as long as the application, which reads through the
//! guard, has not called [`Connection::head_done`]. HTTP/2 frames its heads among other streams'
//! data, so there only the connection preface counts as a head; pingora's own options bound the
//! rest (header list size, idle time).

use std::fmt;
use std::future::Future;
use std::io::{self, ErrorKind};
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Buf, Bytes};
use http::StatusCode;
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::{ALPN, IO, Shutdown};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter, ReadBuf};
use tokio::sync::watch;
use tokio::time::Instant;

use super::connection::{Connection, Extent, new_request_id, refusal_body};
use super::pace::Pace;
use crate::metrics::Metrics;

mod frames;
mod passing;
mod timer;

use frames::Frames;
use timer::Timer;

/// RFC 9113 section 3.4.
const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Joins a response's head and a short body in one packet; longer writes pass by.
const WRITE_BUFFER: usize = 2048;
/// How long, and how many bytes, a closed connection is still read.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 1 << 20;
/// A WebSocket's end because the server goes away: a close frame with status 1001 (RFC 6455 section 7.4.1).
const GOING_AWAY: &[u8] = b"\x88\x02\x03\xe9";

type BoxFuture = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

/// What the read timer is running for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Awaited {
    Nothing,
    FirstByte,
    /// The first byte, if it is on its way while the process stops.
    LastChance,
    EndOfHead,
    /// The next bytes of a body.
    Body,
    /// The beginning of the application's answer.
    Answer,
}

/// How a connection comes to its end.
enum Ending {
    /// It has not begun.
    Open,
    /// This is being written before the end.
    Answering(Bytes),
    /// Our half is closed; so many bytes were read since.
    Lingering(usize),
    /// Over.
    Closed,
}

/// What is wrong with a head.
#[derive(Clone, Copy)]
enum Violation {
    TooSlow,
    TooLarge,
    Unreadable,
}

/// What reading a body fails with, inside an [`io::Error`], when the client is too slow.
#[derive(Debug, thiserror::Error)]
#[error("the body comes too slowly")]
pub struct BodyTooSlow;

/// See the module.
pub(super) struct Guard<S> {
    inner: BufWriter<S>,
    connection: Arc<Connection>,
    digest: Arc<ProxyDigest>,
    metrics: Arc<Metrics>,
    /// Bytes read while the protocol was found out.
    prefix: Bytes,
    /// HTTP/2 by prior knowledge.
    is_h2c: bool,
    awaited: Awaited,
    read_timer: Timer,
    /// For what is written, and then for the ending.
    write_timer: Timer,
    write_pace: Pace,
    /// For bodies: which one, and how it comes.
    body: u32,
    body_pace: Pace,
    /// Completes when the process is to stop; gone afterwards.
    stopping: Option<BoxFuture>,
    /// Runs out when a stream has lasted long enough after that.
    stream_timer: Timer,
    /// What was written of a tunnel.
    frames: Option<Frames>,
    ending: Ending,
}

impl<S: IO> Guard<S> {
    pub(super) fn new(
        stream: S,
        connection: Arc<Connection>,
        metrics: Arc<Metrics>,
        stop: &watch::Receiver<bool>,
    ) -> Self {
        let mut stop = stop.clone();
        let limits = connection.limits();
        Self {
            inner: BufWriter::with_capacity(WRITE_BUFFER, stream),
            digest: connection.digest(),
            connection,
            metrics,
            prefix: Bytes::new(),
            is_h2c: false,
            awaited: Awaited::Nothing,
            read_timer: Timer::default(),
            write_timer: Timer::default(),
            write_pace: Pace::new(limits.write_timeout, limits.min_body_rate),
            body: 0,
            body_pace: Pace::new(limits.body_timeout, limits.min_body_rate),
            stopping: Some(Box::pin(async move {
                drop(stop.wait_for(|stop| *stop).await);
            })),
            stream_timer: Timer::default(),
            frames: None,
            ending: Ending::Open,
        }
    }

    pub(super) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// Finds out what the client speaks: by ALPN under TLS, otherwise, if `h2c`, by the first bytes.
    /// An HTTP/2 preface is waited for here, since pingora would wait without end. `None`: closed.
    pub(super) async fn find_protocol(&mut self, h2c: bool) -> io::Result<Option<ALPN>> {
        let by_alpn = matches!(self.inner.get_ref().selected_alpn_proto(), Some(ALPN::H2));
        if !by_alpn && !h2c {
            return Ok(Some(ALPN::H1));
        }
        let mut buffer = [0; H2_PREFACE.len()];
        let mut len = 0;
        while len < buffer.len() && H2_PREFACE.starts_with(&buffer[..len]) {
            match self.read(&mut buffer[len..]).await? {
                0 => return Ok(None),
                n => len += n,
            }
        }
        self.prefix = Bytes::copy_from_slice(&buffer[..len]);
        if by_alpn || buffer == *H2_PREFACE {
            self.connection.head_done();
            self.is_h2c = !by_alpn;
            return Ok(Some(ALPN::H2));
        }
        Ok(Some(ALPN::H1))
    }

    fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
        so_far: usize,
    ) -> Poll<io::Result<()>> {
        if so_far == 0 {
            return self.poll_first_bytes(cx, buf);
        }
        let limits = self.connection.limits();
        if so_far >= limits.max_head_bytes {
            return self.refuse(cx, Violation::TooLarge);
        }
        self.await_for(Awaited::EndOfHead, limits.head_timeout);
        if self.read_timer.poll(cx).is_ready() {
            return self.refuse(cx, Violation::TooSlow);
        }
        self.poll_counted(cx, buf, limits.max_head_bytes - so_far)
    }

    fn poll_first_bytes(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let limits = self.connection.limits();
        if self.awaited == Awaited::EndOfHead {
            self.awaited = Awaited::Nothing;
        }
        if let Poll::Ready(done) = self.poll_counted(cx, buf, limits.max_head_bytes) {
            self.awaited = Awaited::Nothing;
            self.write_pace.bound(limits.write_timeout, limits.min_body_rate);
            return Poll::Ready(done);
        }
        if self.poll_stopping(cx).is_ready() {
            self.await_for(Awaited::LastChance, self.connection.drain().idle());
        } else {
            self.await_for(Awaited::FirstByte, limits.keepalive_timeout);
        }
        if self.read_timer.poll(cx).is_ready() {
            // Nothing was asked, so nothing is answered.
            self.ending = Ending::Answering(Bytes::new());
            self.write_timer.start(LINGER);
            return self.poll_ending(cx).map(Ok);
        }
        Poll::Pending
    }

    /// Ready once the process is to stop.
    fn poll_stopping(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(stopping) = &mut self.stopping {
            ready!(stopping.as_mut().poll(cx));
            self.stopping = None;
        }
        Poll::Ready(())
    }

    /// Ready once a stream has lasted long enough: the process stops. Its client is told then, if a place
    /// between two frames allows it.
    fn poll_end_of_stream(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let extent = self.connection.extent();
        if extent == Extent::Request {
            return Poll::Pending;
        }
        ready!(self.poll_stopping(cx));
        if let (Some(limit), false) =
            (self.connection.drain().streams(), self.stream_timer.is_started())
        {
            self.stream_timer.start(limit);
        }
        ready!(self.stream_timer.poll(cx));
        self.connection.note_cut();
        let is_between = self.frames.is_some_and(Frames::is_at_boundary);
        let farewell = if is_between { GOING_AWAY } else { b"" };
        self.ending = Ending::Answering(Bytes::from_static(farewell));
        self.write_timer.start(LINGER);
        Poll::Ready(())
    }

    /// Reads what is no head, or, when the client has sent all, waits for it to leave.
    fn poll_body(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.inner).poll_read(cx, buf);
        if let Some(body) = self.connection.awaited_body() {
            if body != self.body {
                self.body = body;
                let limits = self.connection.limits();
                self.body_pace = Pace::new(limits.body_timeout, limits.min_body_rate);
                self.awaited = Awaited::Nothing;
            }
            if read.is_ready() {
                self.body_pace.moved(buf.filled().len() - before);
                return read;
            }
            if let Some(until) = self.body_pace.wait(Instant::now()) {
                self.awaited = Awaited::Body;
                self.read_timer.start_until(until);
            }
            ready!(self.read_timer.poll(cx));
            return Poll::Ready(Err(io::Error::new(ErrorKind::TimedOut, BodyTooSlow)));
        }
        let limit = self.connection.answer_within().filter(|_| read.is_pending());
        let Some(limit) = limit else {
            self.awaited = Awaited::Nothing;
            return read;
        };
        self.await_for(Awaited::Answer, limit);
        ready!(self.read_timer.poll(cx));
        Poll::Ready(Err(io::Error::new(ErrorKind::TimedOut, "the answer does not begin")))
    }

    /// Reads at most `limit` bytes and counts them as the head's.
    fn poll_counted(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
        limit: usize,
    ) -> Poll<io::Result<()>> {
        let inner = Pin::new(&mut self.inner);
        let read = if buf.remaining() <= limit {
            let before = buf.filled().len();
            ready!(inner.poll_read(cx, buf))?;
            buf.filled().len() - before
        } else {
            let mut part = ReadBuf::new(buf.initialize_unfilled_to(limit));
            ready!(inner.poll_read(cx, &mut part))?;
            let read = part.filled().len();
            buf.advance(read);
            read
        };
        self.connection.head_grows(read);
        Poll::Ready(Ok(()))
    }

    fn await_for(&mut self, what: Awaited, limit: Duration) {
        if self.awaited != what {
            self.awaited = what;
            self.read_timer.start(limit);
        }
    }

    /// Answers in pingora's place, then ends the connection.
    fn refuse(&mut self, cx: &mut Context<'_>, why: Violation) -> Poll<io::Result<()>> {
        let (status, detail, cause) = match why {
            Violation::TooSlow => {
                (StatusCode::REQUEST_TIMEOUT, "The request's head took too long.", "head_too_slow")
            }
            Violation::TooLarge => (
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "The request's head is too large.",
                "head_too_large",
            ),
            Violation::Unreadable => {
                (StatusCode::BAD_REQUEST, "The request cannot be read.", "head_unreadable")
            }
        };
        let request_id = new_request_id();
        self.metrics.connection_refused(self.connection.listener(), cause);
        self.connection.log_refused(&request_id, status.as_u16(), cause);
        let body = refusal_body(detail, &request_id);
        let date = pingora::protocols::http::date::get_cached_date();
        let answer = format!(
            "HTTP/1.1 {status}\r\nDate: {}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n{body}",
            date.to_str().unwrap_or_default(),
            body.len(),
        );
        self.ending = Ending::Answering(answer.into());
        self.write_timer.start(LINGER);
        self.poll_ending(cx).map(Ok)
    }

    /// Writes what is to be written, closes our half, reads on for a moment.
    fn poll_ending(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            // The timer was started when the ending began, and covers all of it.
            if self.write_timer.poll(cx).is_ready() {
                self.ending = Ending::Closed;
            }
            let mut inner = Pin::new(&mut self.inner);
            match &mut self.ending {
                Ending::Open | Ending::Closed => return Poll::Ready(()),
                Ending::Answering(rest) if rest.is_empty() => {
                    let _ = ready!(inner.poll_shutdown(cx));
                    self.ending = Ending::Lingering(0);
                }
                Ending::Answering(rest) => match ready!(inner.as_mut().poll_write(cx, rest)) {
                    Ok(n) if n > 0 => rest.advance(n),
                    _ => self.ending = Ending::Closed,
                },
                Ending::Lingering(read) => {
                    let mut sink = [0; 4096];
                    let mut sink = ReadBuf::new(&mut sink);
                    let result = ready!(inner.poll_read(cx, &mut sink));
                    *read += sink.filled().len();
                    if result.is_err() || sink.filled().is_empty() || *read > LINGER_BYTES {
                        self.ending = Ending::Closed;
                    }
                }
            }
        }
    }

    /// Passes `result` on, which moved so many bytes, unless the client is too slow to take any.
    fn unless_stalled<T>(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<T>>,
        bytes: impl FnOnce(&T) -> usize,
    ) -> Poll<io::Result<T>> {
        if let Poll::Ready(moved) = &result {
            self.write_pace.moved(moved.as_ref().map_or(0, bytes));
            return result;
        }
        if let Some(until) = self.write_pace.wait(Instant::now()) {
            self.write_timer.start_until(until);
        }
        ready!(self.write_timer.poll(cx));
        self.reset();
        Poll::Ready(Err(io::Error::new(ErrorKind::TimedOut, "the client takes no bytes")))
    }

    /// Ends the connection at once. What the kernel holds for the client is thrown away: a client that
    /// sips could make it last.
    fn reset(&mut self) {
        self.ending = Ending::Closed;
        // SAFETY: a stream's id is its descriptor, and it is alive.
        let socket = unsafe { BorrowedFd::borrow_raw(self.inner.get_ref().id()) };
        // On failure the kernel keeps its own time.
        let _ = SockRef::from(&socket).set_linger(Some(Duration::ZERO));
    }

    /// Whether what is written goes to the client. Afterwards it goes nowhere: the client has its
    /// answer, and pingora would log an error.
    fn takes_writes(&self) -> bool {
        matches!(self.ending, Ending::Open)
    }
}

impl<S: IO> AsyncRead for Guard<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !matches!(this.ending, Ending::Open) {
            return this.poll_ending(cx).map(Ok);
        }
        if !this.prefix.is_empty() {
            let part = this.prefix.split_to(this.prefix.len().min(buf.remaining()));
            buf.put_slice(&part);
            return Poll::Ready(Ok(()));
        }
        match this.connection.head() {
            Some(so_far) => this.poll_head(cx, buf, so_far),
            None if this.poll_end_of_stream(cx).is_ready() => this.poll_ending(cx).map(Ok),
            None => this.poll_body(cx, buf),
        }
    }
}

impl<S: IO> AsyncWrite for Guard<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.takes_writes() && self.connection.head().is_some() {
            let _ = self.refuse(cx, Violation::Unreadable);
        }
        if !self.takes_writes() {
            return Poll::Ready(Ok(buf.len()));
        }
        let result = Pin::new(&mut self.inner).poll_write(cx, buf);
        if let (Extent::Tunnel, Poll::Ready(Ok(written))) = (self.connection.extent(), &result) {
            self.frames.get_or_insert(Frames::START).pass(&buf[..*written]);
        }
        self.unless_stalled(cx, result, |written| *written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.takes_writes() {
            return Poll::Ready(Ok(()));
        }
        let result = Pin::new(&mut self.inner).poll_flush(cx);
        self.unless_stalled(cx, result, |()| 0)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if matches!(self.ending, Ending::Open) {
            // Long answers may still be in the kernel: the client has `write_timeout` for them.
            let result = Pin::new(&mut self.inner).poll_shutdown(cx);
            ready!(self.unless_stalled(cx, result, |()| 0))?;
            self.ending = Ending::Lingering(0);
            self.write_timer.start(LINGER);
        }
        self.poll_ending(cx).map(Ok)
    }
}

#[async_trait]
impl<S: IO> Shutdown for Guard<S> {
    async fn shutdown(&mut self) {
        // The client is gone either way.
        let _ = AsyncWriteExt::shutdown(self).await;
    }
}

impl<S> fmt::Debug for Guard<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard").field("connection", &self.connection).finish_non_exhaustive()
    }
}
