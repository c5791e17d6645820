//! The watch over bodies of HTTP/2 requests, which pingora reads without any time-out.
//!
//! A stream that stalls must not take its connection with it, and pingora gives no other way to end
//! one than to drop its exchange. So every exchange runs beside a watch that it can find, and that
//! ends it when the client is too slow.

use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::pace::Pace;

tokio::task_local! {
    static WATCH: Arc<BodyWatch>;
}

/// The watch over one request's body.
#[derive(Debug, Default)]
pub struct BodyWatch {
    watched: Mutex<Option<Watched>>,
    changed: Notify,
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

    /// Runs `exchange` to its end, or until its body is too slow: then it is dropped, and its
    /// request's id returned.
    pub(super) async fn over<T>(exchange: impl Future<Output = T>) -> Result<T, String> {
        let watch = Arc::new(Self::default());
        tokio::select! {
            biased;
            done = WATCH.scope(watch.clone(), exchange) => Ok(done),
            request_id = watch.too_slow() => Err(request_id),
        }
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
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn begin() -> Arc<BodyWatch> {
        let watch = BodyWatch::current().unwrap();
        watch.begin(10 * SECOND, NonZeroU32::new(100), "it");
        watch
    }

    #[tokio::test(start_paused = true)]
    async fn an_exchange_whose_body_stalls_ends_and_others_do_not() {
        let start = Instant::now();
        let stalled = BodyWatch::over(async {
            let watch = begin();
            tokio::time::sleep(9 * SECOND).await;
            watch.moved(1_000);
            std::future::pending::<()>().await;
        });
        assert_eq!(stalled.await, Err("it".to_owned()));
        assert_eq!(start.elapsed().as_secs(), 19);
        let whole = BodyWatch::over(async {
            begin().end();
            tokio::time::sleep(100 * SECOND).await;
            5
        });
        assert_eq!(whole.await, Ok(5));
        let unwatched = BodyWatch::over(tokio::time::sleep(100 * SECOND));
        assert_eq!(unwatched.await, Ok(()));
        assert!(BodyWatch::current().is_none());
    }
}
