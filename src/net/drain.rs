//! How connections come to their end when the process stops.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// How long an idle connection outlives the order to stop unless somebody says more: a request that was sent
/// before that may not have been noticed yet.
pub const LAST_CHANCE: Duration = Duration::from_millis(100);

/// What open connections may still do once the process is to stop; shared by all of its listeners.
#[derive(Debug, Default)]
pub struct Drain {
    announced: AtomicBool,
    bounds: Mutex<Bounds>,
    cut: AtomicUsize,
}

#[derive(Clone, Copy, Debug)]
struct Bounds {
    idle: Duration,
    streams: Option<Duration>,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { idle: LAST_CHANCE, streams: None }
    }
}

impl Drain {
    /// From now on clients are told, with each answer, to come back over another connection.
    pub fn announce(&self) {
        self.announced.store(true, Ordering::Relaxed);
    }

    /// Whether it was announced.
    pub(super) fn is_announced(&self) -> bool {
        self.announced.load(Ordering::Relaxed)
    }

    /// Sets what holds once listeners are told to stop, and must be called before: idle HTTP/1.1 connections wait
    /// for `idle` for a last request, tunnels and streams live on for `streams`.
    pub fn set_bounds(&self, idle: Duration, streams: Duration) {
        *self.bounds() = Bounds { idle, streams: Some(streams) };
    }

    /// How long idle connections wait for a last request.
    pub(super) fn idle(&self) -> Duration {
        self.bounds().idle
    }

    /// How long streams live on; `None`: as long as requests.
    pub(super) fn streams(&self) -> Option<Duration> {
        self.bounds().streams
    }

    /// A stream was ended for its bound.
    pub(super) fn note_cut(&self) {
        self.cut.fetch_add(1, Ordering::Relaxed);
    }

    /// How many streams were ended for their bound.
    pub fn streams_cut(&self) -> usize {
        self.cut.load(Ordering::Relaxed)
    }

    fn bounds(&self) -> std::sync::MutexGuard<'_, Bounds> {
        // Nothing panics while it is held.
        self.bounds.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
