//! How long a client may let us wait: a limit, and no more of it than its bytes earn back.

use std::num::NonZeroU32;
use std::time::Duration;

use tokio::time::Instant;

/// The patience with one direction of a client's bytes.
///
/// Waiting uses it up, bytes restore it: each as much as it takes at the least rate, never beyond the
/// limit. So a silence of the limit's length ends it, and so does, later, a trickle.
#[derive(Clone, Debug)]
pub(super) struct Pace {
    limit: Duration,
    /// Bytes a second; `None`: any byte restores everything.
    rate: Option<NonZeroU32>,
    left: Duration,
    waiting_since: Option<Instant>,
}

impl Pace {
    pub(super) fn new(limit: Duration, rate: Option<NonZeroU32>) -> Self {
        Self { limit, rate, left: limit, waiting_since: None }
    }

    /// Goes on under another limit and rate; what was used up stays so.
    pub(super) fn bound(&mut self, limit: Duration, rate: Option<NonZeroU32>) {
        let used_up = self.limit - self.left;
        (self.limit, self.rate) = (limit, rate);
        self.left = limit.saturating_sub(used_up);
    }

    /// Nothing comes: until when that may last, if the wait begins now; `None`: it lasts already.
    pub(super) fn wait(&mut self, now: Instant) -> Option<Instant> {
        self.waiting_since.is_none().then(|| {
            self.waiting_since = Some(now);
            now + self.left
        })
    }

    /// So many bytes came, and ended the wait if there was one.
    pub(super) fn moved(&mut self, bytes: usize) {
        if let Some(since) = self.waiting_since.take() {
            self.left = self.left.saturating_sub(since.elapsed());
        }
        if self.left < self.limit {
            let earned = match self.rate {
                None => self.limit,
                #[allow(clippy::cast_precision_loss, reason = "bytes of one read")]
                Some(rate) => Duration::from_secs_f64(bytes as f64 / f64::from(rate.get())),
            };
            self.left = (self.left + earned).min(self.limit);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn pace(rate: u32) -> Pace {
        Pace::new(60 * SECOND, NonZeroU32::new(rate))
    }

    /// How long until the patience is over, one second at a time, with `bytes` every `every` seconds.
    async fn lasts(mut pace: Pace, bytes: usize, every: u64) -> Option<u64> {
        let mut until = pace.wait(Instant::now()).unwrap();
        for second in 1..100_000 {
            advance(SECOND).await;
            if Instant::now() >= until {
                return Some(second);
            }
            if second % every == 0 {
                pace.moved(bytes);
                until = pace.wait(Instant::now()).unwrap();
            }
        }
        None
    }

    #[tokio::test(start_paused = true)]
    async fn silence_and_trickles_end_and_the_least_rate_lasts() {
        assert_eq!(lasts(pace(100), 1, 1_000).await, Some(60));
        // A byte just before the end buys next to nothing.
        assert_eq!(lasts(pace(100), 1, 59).await, Some(61));
        assert_eq!(lasts(pace(100), 50, 1).await, Some(119));
        assert_eq!(lasts(pace(100), 100, 1).await, None);
        assert_eq!(lasts(pace(100), 5_000, 50).await, None);
        // Without a rate only silence counts.
        assert_eq!(lasts(pace(0), 1, 59).await, None);
        assert_eq!(lasts(pace(0), 1, 61).await, Some(60));
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_fast_client_earns_is_bounded() {
        let mut pace = pace(100);
        pace.wait(Instant::now());
        advance(59 * SECOND).await;
        pace.moved(100 << 20);
        assert_eq!(pace.wait(Instant::now()), Some(Instant::now() + 60 * SECOND));
        assert_eq!(pace.wait(Instant::now()), None);
    }

    #[tokio::test(start_paused = true)]
    async fn another_limit_counts_from_the_next_wait_on() {
        let mut pace = pace(0);
        pace.wait(Instant::now());
        advance(10 * SECOND).await;
        pace.moved(0);
        for (limit, left) in [(30, 30), (100, 100)] {
            pace.bound(limit * SECOND, None);
            assert_eq!(pace.wait(Instant::now()), Some(Instant::now() + left * SECOND));
            pace.moved(0);
        }
        pace.bound(100 * SECOND, NonZeroU32::new(1));
        pace.wait(Instant::now());
        advance(40 * SECOND).await;
        pace.moved(0);
        for (limit, left) in [(70, 30), (30, 0)] {
            pace.bound(limit * SECOND, NonZeroU32::new(1));
            assert_eq!(pace.wait(Instant::now()), Some(Instant::now() + left * SECOND));
            pace.moved(0);
        }
    }
}
