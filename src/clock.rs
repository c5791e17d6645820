//! The only reader of the system clock. Everything else takes time as an argument.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Whole seconds since the Unix epoch.
pub type UnixTime = u64;

/// One reading of both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Wall clock, for time steps and expiry.
    pub unix: UnixTime,
    /// Monotonic clock, for ages and deadlines.
    pub monotonic: Instant,
}

/// A source of time; tests inject [`ManualClock`].
pub trait Clock: Send + Sync + 'static {
    /// Reads both clocks.
    fn now(&self) -> Moment;

    /// Reads the monotonic one alone.
    fn monotonic(&self) -> Instant {
        self.now().monotonic
    }
}

/// The machine's clocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[allow(clippy::disallowed_methods, reason = "the one place that may")]
    fn now(&self) -> Moment {
        Moment {
            unix: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            monotonic: self.monotonic(),
        }
    }

    #[allow(clippy::disallowed_methods, reason = "the one place that may")]
    fn monotonic(&self) -> Instant {
        Instant::now()
    }
}

/// A clock that stands still until it is moved.
#[derive(Debug)]
pub struct ManualClock {
    start: Moment,
    advanced_millis: AtomicU64,
}

impl ManualClock {
    /// A clock that shows `unix`.
    #[must_use]
    pub fn at(unix: UnixTime) -> Self {
        let monotonic = SystemClock.monotonic();
        Self { start: Moment { unix, monotonic }, advanced_millis: AtomicU64::new(0) }
    }

    /// Moves both clocks forward.
    pub fn advance(&self, by: Duration) {
        let millis = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        self.advanced_millis.fetch_add(millis, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Moment {
        let by = Duration::from_millis(self.advanced_millis.load(Ordering::SeqCst));
        Moment { unix: self.start.unix + by.as_secs(), monotonic: self.start.monotonic + by }
    }
}
