//! Time-outs of streams.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

/// A timer that costs nothing until it is first used.
#[derive(Default)]
pub(super) struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    pub(super) fn start(&mut self, limit: Duration) {
        self.start_until(Instant::now() + limit);
    }

    pub(super) fn start_until(&mut self, end: Instant) {
        match &mut self.0 {
            Some(sleep) => sleep.as_mut().reset(end),
            None => self.0 = Some(Box::pin(tokio::time::sleep_until(end))),
        }
    }

    /// Whether it was ever started.
    pub(super) fn is_started(&self) -> bool {
        self.0.is_some()
    }

    /// Ready when the time is over; never if the timer was not started.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.0.as_mut().map_or(Poll::Pending, |sleep| sleep.as_mut().poll(cx))
    }
}
