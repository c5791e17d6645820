//! Trying again for a while, with pauses that grow and differ from those of others.

use std::time::{Duration, Instant};

use crate::clock::{Clock, SystemClock};

/// The first pause, doubled each time, and the longest one.
const PAUSE: Duration = Duration::from_millis(1);
const MAX_PAUSE: Duration = Duration::from_millis(100);
/// The longest one in a race: who paused for longer would lose to those who just came.
const MAX_PAUSE_IN_RACE: Duration = Duration::from_millis(4);

/// Says whether to try once more.
pub(super) struct Retry {
    until: Instant,
    pause: Duration,
    longest: Duration,
}

impl Retry {
    /// Tries begin until `patience` from now.
    pub(super) fn within(patience: Duration) -> Self {
        Self { until: SystemClock.monotonic() + patience, pause: PAUSE, longest: MAX_PAUSE }
    }

    /// The same where the server is well, but others were quicker.
    pub(super) fn racing(patience: Duration) -> Self {
        Self { longest: MAX_PAUSE_IN_RACE, ..Self::within(patience) }
    }

    /// Pauses before the next try; `false`, at once, if it is too late for one.
    pub(super) async fn again(&mut self) -> bool {
        let pause = self.pause.mul_f64(rand::random_range(0.5..=1.0));
        let now = SystemClock.monotonic();
        if now + pause >= self.until {
            // Nor later: another pause may be shorter, by chance.
            self.until = now;
            return false;
        }
        tokio::time::sleep(pause).await;
        self.pause = (2 * self.pause).min(self.longest);
        true
    }
}
