//! The watch over HTTP/2 requests: their bodies, which pingora reads without any time-out, and streams without
//! end, which outlive the order to stop only for a while.
//!
//! A stream that stalls must not take its connection with it, and pingora gives no other way to end
//! one than to drop its exchange. So every exchange runs beside a watch that it can find, and that
//! ends it when the client is too slow, or the time is over.

use std::future::poll_fn;
use std::num::NonZeroU32;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};

use super::connection::Connection;
use super::pace::Pace;

tokio::task_local! {
    static WATCH: Arc<BodyWatch>;
}

/// The watch over one request's body.
#[derive(Debug, Default)]
pub struct BodyWatch {
    watched: Mutex<Option<Watched>>,
    /// The request's id, if its answer need not end.
    stream: OnceLock<String>,
    /// Wakes what bounds it; for other requests nothing is watched.
    is_stream: Notify,
    changed: Notify,
}

/// Why an exchange was ended, with its request's id.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// Its body is too slow.
    TooSlow(String),
    /// The process stops.
    Stopping(String),
}

#[derive(Debug)]
struct Watched {
    pace: Pace,
    until: Instant,
    request_id: String,
}

impl BodyWatch {
    /// That of the exchange around the caller, if it has one.
    #[must_use]
    pub fn current() -> Option<Arc<Self>> {
        WATCH.try_with(Arc::clone).ok()
    }

    /// The body is awaited: the exchange ends if nothing of it comes for `limit`, or, on average beyond
    /// that, less than `rate` bytes a second. Once begun, it goes on.
    pub fn begin(&self, limit: Duration, rate: Option<NonZeroU32>, request_id: &str) {
        let mut watched = self.watched();
        if watched.is_none() {
            let mut pace = Pace::new(limit, rate);
            let now = Instant::now();
            let until = pace.wait(now).unwrap_or(now);
            *watched = Some(Watched { pace, until, request_id: request_id.to_owned() });
            self.changed.notify_one();
        }
    }

    /// So many bytes came.
    pub fn moved(&self, bytes: usize) {
        if let Some(Watched { pace, until, .. }) = &mut *self.watched() {
            pace.moved(bytes);
            *until = pace.wait(Instant::now()).unwrap_or(*until);
        }
    }

    /// The body is over: its client may now wait for the answer as long as that takes.
    pub fn end(&self) {
        *self.watched() = None;
    }

    /// The exchange may last for hours: once the process stops, it is ended after a while.
    pub fn note_stream(&self, request_id: &str) {
        let _ = self.stream.set(request_id.to_owned());
        self.is_stream.notify_one();
    }

    /// Runs `exchange` to its end, or until its body is too slow or it has outlived the order to stop for long
    /// enough: then it is dropped.
    pub(super) async fn over<T>(
        connection: &Connection,
        exchange: impl Future<Output = T>,
    ) -> Result<T, Broken> {
        let watch = Arc::new(Self::default());
        let mut exchange = pin!(WATCH.scope(watch.clone(), exchange));
        // Only the exchange itself has anything watched: until then it runs alone, as most do to their end.
        let alone = poll_fn(|cx| match exchange.as_mut().poll(cx) {
            Poll::Ready(done) => Poll::Ready(Some(done)),
            Poll::Pending if watch.is_watching() => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        });
        if let Some(done) = alone.await {
            return Ok(done);
        }
        tokio::select! {
            biased;
            done = exchange => Ok(done),
            request_id = watch.too_slow() => Err(Broken::TooSlow(request_id)),
            request_id = watch.outlived(connection) => Err(Broken::Stopping(request_id)),
        }
    }

    fn is_watching(&self) -> bool {
        self.stream.get().is_some() || self.watched().is_some()
    }

    /// Ends when a stream must, at a stop; never for others.
    async fn outlived(&self, connection: &Connection) -> String {
        self.is_stream.notified().await;
        connection.stopped().await;
        if let (Some(limit), Some(request_id)) = (connection.drain().streams(), self.stream.get()) {
            sleep(limit).await;
            return request_id.clone();
        }
        std::future::pending().await
    }

    async fn too_slow(&self) -> String {
        loop {
            let until = self.watched().as_ref().map(|watched| watched.until);
            let Some(until) = until else {
                self.changed.notified().await;
                continue;
            };
            sleep_until(until).await;
            // It may have moved on meanwhile, or be over.
            let watched = self.watched().take_if(|watched| watched.until <= Instant::now());
            if let Some(watched) = watched {
                return watched.request_id;
            }
        }
    }

    fn watched(&self) -> MutexGuard<'_, Option<Watched>> {
        // Nothing panics while it is held.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use arc_swap::ArcSwap;
    use tokio::sync::watch;

    use super::*;
    use crate::config::{Address, Limits, Listen};
    use crate::net::Drain;
    use crate::net::terms::Terms;

    const SECOND: Duration = Duration::from_secs(1);

    /// A connection, and what stops its listener; streams live on for a minute.
    fn connection() -> (watch::Sender<bool>, Arc<Connection>) {
        let (stop, stopping) = watch::channel(false);
        let drain = Arc::<Drain>::default();
        drain.set_bounds(SECOND, 60 * SECOND);
        let anywhere = Listen::at(Address::Unix("/nowhere".into()));
        let terms = Terms::read(&anywhere, Limits::default(), &[]).unwrap();
        let terms = Arc::new(ArcSwap::from_pointee(terms));
        (stop, Connection::new("proxy", None, false, terms, stopping, drain))
    }

    fn begin() -> Arc<BodyWatch> {
        let watch = BodyWatch::current().unwrap();
        watch.begin(10 * SECOND, NonZeroU32::new(100), "it");
        watch
    }

    #[tokio::test(start_paused = true)]
    async fn an_exchange_whose_body_stalls_ends_and_others_do_not() {
        let start = Instant::now();
        let (_stop, connection) = connection();
        let stalled = BodyWatch::over(&connection, async {
            let watch = begin();
            tokio::time::sleep(9 * SECOND).await;
            watch.moved(1_000);
            std::future::pending::<()>().await;
        });
        assert_eq!(stalled.await, Err(Broken::TooSlow("it".to_owned())));
        assert_eq!(start.elapsed().as_secs(), 19);
        let whole = BodyWatch::over(&connection, async {
            begin().end();
            tokio::time::sleep(100 * SECOND).await;
            5
        });
        assert_eq!(whole.await, Ok(5));
        let unwatched = BodyWatch::over(&connection, tokio::time::sleep(100 * SECOND));
        assert_eq!(unwatched.await, Ok(()));
        assert!(BodyWatch::current().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_outlives_the_order_to_stop_for_a_while_and_a_request_to_its_end() {
        let (stop, connection) = connection();
        let start = Instant::now();
        let exchange = async |is_stream: bool| {
            if is_stream {
                BodyWatch::current().unwrap().note_stream("it");
            }
            tokio::time::sleep(10 * SECOND).await;
            stop.send_replace(true);
            tokio::time::sleep(100 * SECOND).await;
        };
        let stream = BodyWatch::over(&connection, exchange(true)).await;
        assert_eq!(stream, Err(Broken::Stopping("it".to_owned())));
        assert_eq!(start.elapsed().as_secs(), 70);
        assert_eq!(BodyWatch::over(&connection, exchange(false)).await, Ok(()));
        // One that begins when the order is there already.
        let late = BodyWatch::over(&connection, exchange(true)).await;
        assert_eq!(late, Err(Broken::Stopping("it".to_owned())));
    }
}
