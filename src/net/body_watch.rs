//! The watch over HTTP/2 requests: their bodies, which pingora reads without any time-out, and streams without
//! end, which outlive the order to stop only for a while.
//!
//! A stream that stalls must not take its connection with it, and pingora gives no other way to end
//! one than to drop its exchange. So every exchange runs beside a watch that it can find, and that
//! ends it when the client is too slow, or the time is over.

use std::future::poll_fn;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Poll;
use std::time::Duration;

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
    }

    /// Runs `exchange` to its end, or until its body is too slow or it has outlived the order to stop for long
    /// enough: then it is dropped.
    pub(super) async fn over<T>(
        connection: &Connection,
        exchange: impl Future<Output = T>,
    ) -> Result<T, Broken> {
        let watch = Arc::new(Self::default());
        tokio::select! {
            biased;
            done = WATCH.scope(watch.clone(), exchange) => Ok(done),
            request_id = watch.too_slow() => Err(Broken::TooSlow(request_id)),
            request_id = watch.outlived(connection) => Err(Broken::Stopping(request_id)),
        }
    }

    /// Ends when a stream must, at a stop; never for others.
    async fn outlived(&self, connection: &Connection) -> String {
        let request_id = noticed(|| self.stream.get()).await;
        connection.stopped().await;
        if let Some(limit) = connection.drain().streams() {
            sleep(limit).await;
            return request_id.clone();
        }
        std::future::pending().await
    }

    async fn too_slow(&self) -> String {
        loop {
            sleep_until(noticed(|| Some(self.watched().as_ref()?.until)).await).await;
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

/// Waits until `look` finds something. Nothing wakes who waits: only the exchange does what is looked for, in the
/// same task, and [`BodyWatch::over`] looks whenever it has run.
async fn noticed<T>(mut look: impl FnMut() -> Option<T>) -> T {
    poll_fn(|_| look().map_or(Poll::Pending, Poll::Ready)).await
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
        // Also one that is watched only after a while.
        let late = BodyWatch::over(&connection, async {
            tokio::time::sleep(100 * SECOND).await;
            begin();
            std::future::pending::<()>().await;
        });
        assert_eq!(late.await, Err(Broken::TooSlow("it".to_owned())));
        assert_eq!(start.elapsed().as_secs(), 19 + 110);
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
        // One that begins when the order is there already, and one that is a stream only after a while.
        let late = BodyWatch::over(&connection, exchange(true)).await;
        assert_eq!(late, Err(Broken::Stopping("it".to_owned())));
        let later = BodyWatch::over(&connection, async {
            tokio::time::sleep(SECOND).await;
            exchange(true).await;
        });
        assert_eq!(later.await, Err(Broken::Stopping("it".to_owned())));
    }
}
