//! Trying again for a while, with pauses that grow and differ from those of others.

use std::time::{Duration, Instant};

use crate::clock::{Clock, SystemClock};

/// The first pause, doubled each time, and the longest one.
const PAUSE: Duration = Duration::from_millis(1);
const MAX_PAUSE: Duration = Duration::from_millis(100);

/// Says whether to try once more.
pub(super) struct Retry {
    until: Instant,
    pause: Duration,
}

impl Retry {
    /// Tries begin until `patience` from now.
    pub(super) fn within(patience: Duration) -> Self {
        Self { until: SystemClock.now().monotonic + patience, pause: PAUSE }
    }

    /// Pauses before the next try; `false`, at once, if it is too late for one.
    pub(super) async fn again(&mut self) -> bool {
        let pause = self.pause.mul_f64(rand::random_range(0.5..=1.0));
        if SystemClock.now().monotonic + pause >= self.until {
            return false;
        }
        tokio::time::sleep(pause).await;
        self.pause = (2 * self.pause).min(MAX_PAUSE);
        true
    }
}
