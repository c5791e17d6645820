//! What gates must agree on for a while: uses of tokens, failed attempts, recent successes.
//!
//! None of it is part of the change log. All of it ends by itself: a mark with the token's window, a
//! bucket when it has drained, a success after its time.

use std::time::Duration;

use async_trait::async_trait;

use super::StoreError;
use crate::clock::UnixTime;
use crate::entry::EntryId;

/// The most failures, or successes, of one call.
pub const MAX_LEDGER_BATCH: usize = 256;
/// Longest wait for a ledger's answer: requests wait for it.
pub const LEDGER_PATIENCE: Duration = Duration::from_secs(1);
/// The longest [`Failure::bucket`].
const MAX_KEY_BYTES: usize = 100;

/// How often something may fail: `failures` times at once, and once more whenever
/// [`Self::interval`] has passed. A GCRA (ITU-T I.371) whose burst is `failures`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// At least 1.
    pub failures: u32,
    /// In which as many failures are forgotten again; at least 1 ms for each.
    pub per: Duration,
}

impl Quota {
    /// After which one failure is forgotten.
    #[must_use]
    pub fn interval(&self) -> Duration {
        (self.per / self.failures.max(1)).max(Duration::from_millis(1))
    }

    /// Where the bucket stands after one more failure at `now`, if it stood at `level`: the time at
    /// which all failures will be forgotten. All three are since the same origin.
    ///
    /// Levels are bounded, so that a lock ends by itself however many failures came at once.
    #[must_use]
    pub fn after_failure(&self, level: Duration, now: Duration) -> Duration {
        (level.max(now) + self.interval()).min(now + self.horizon())
    }

    /// How far above now a level may be. Far enough to count what several gates let through before they
    /// hear of each other, or who comes in bursts would be let through more often than the quota says.
    #[must_use]
    pub fn horizon(&self) -> Duration {
        10 * self.per
    }

    /// How long a bucket at `level` stays closed from `now` on; zero: it is open.
    #[must_use]
    pub fn closed_for(&self, level: Duration, now: Duration) -> Duration {
        if level <= now {
            // Almost always so, and dividing takes time.
            return Duration::ZERO;
        }
        level.saturating_sub(now + self.room())
    }

    /// The level of a bucket that is closed for `wait` from `now` on; zero for an open one.
    #[must_use]
    pub fn level_closed_for(&self, wait: Duration, now: Duration) -> Duration {
        if wait.is_zero() { Duration::ZERO } else { now + self.room() + wait }
    }

    /// How far above now an open bucket's level may be.
    fn room(&self) -> Duration {
        self.interval() * self.failures.saturating_sub(1)
    }
}

/// One use of one token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spending {
    /// Whose token.
    pub id: EntryId,
    /// Which of the entry's seeds made it, [`crate::entry::Entry::serial`].
    pub serial: u32,
    /// The time step it belongs to.
    pub counter: u64,
    /// Which request uses it: the same request may ask again, and gets the same answer.
    pub by: String,
    /// How many requests may use it; at least 1.
    pub budget: u32,
    /// How long to keep the mark; beyond the time in which the token is accepted.
    pub keep: Duration,
}

/// One failed attempt in one bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Which bucket: visible ASCII, at most 100 bytes.
    pub bucket: String,
    /// Its size; the same each time.
    pub quota: Quota,
}

/// Kept by every backend. Calls are atomic against those of other processes.
///
/// `now` is this machine's wall clock; a server has its own and may use that instead.
#[async_trait]
pub trait Ledger: Send + Sync {
    /// Records a use of a token, if its budget allows. Tells whether it does.
    async fn spend(&self, spending: &Spending, now: UnixTime) -> Result<bool, StoreError>;

    /// Counts failures, at most [`MAX_LEDGER_BATCH`], in order. Tells for each how long its bucket is
    /// closed now; zero: it is open.
    async fn count_failures(
        &self,
        failures: &[Failure],
        now: UnixTime,
    ) -> Result<Vec<Duration>, StoreError>;

    /// Remembers `keys` (form as [`Failure::bucket`], at most [`MAX_LEDGER_BATCH`]) for `keep` from
    /// now on.
    async fn remember(
        &self,
        keys: &[String],
        keep: Duration,
        now: UnixTime,
    ) -> Result<(), StoreError>;

    /// Whether a key is remembered.
    async fn remembers(&self, key: &str, now: UnixTime) -> Result<bool, StoreError>;
}

/// Refuses calls that no backend can do.
pub(super) fn check<'a>(keys: impl ExactSizeIterator<Item = &'a String>) -> Result<(), StoreError> {
    let count = keys.len();
    if count > MAX_LEDGER_BATCH {
        let refusal = format!("{count} marks at once, at most {MAX_LEDGER_BATCH} are possible");
        return Err(StoreError::Refused(refusal));
    }
    let fits = |key: &String| {
        (1..=MAX_KEY_BYTES).contains(&key.len()) && key.bytes().all(|b| b.is_ascii_graphic())
    };
    let mut keys = keys;
    if keys.all(fits) {
        return Ok(());
    }
    Err(StoreError::Refused(format!(
        "a mark's key must be 1 to {MAX_KEY_BYTES} visible ASCII characters"
    )))
}

/// Gives `work` up after [`LEDGER_PATIENCE`]; what it began may still be done.
pub(super) async fn in_time<T>(
    work: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    tokio::time::timeout(LEDGER_PATIENCE, work).await.unwrap_or_else(|_| {
        let seconds = LEDGER_PATIENCE.as_secs();
        Err(StoreError::Unreachable(format!("no answer about marks within {seconds} s")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_short_plain_keys_in_small_batches_are_taken() {
        let check = |keys: &[String]| check(keys.iter());
        let long = "k".repeat(MAX_KEY_BYTES);
        assert_eq!(check(&[]), Ok(()));
        assert_eq!(check(&["a:{b}!~".into(), long.clone()]), Ok(()));
        assert_eq!(check(&vec![long.clone(); MAX_LEDGER_BATCH]), Ok(()));
        for bad in [String::new(), long.clone() + "k", "a b".into(), "ü".into(), "a\n".into()] {
            assert!(matches!(check(&["a".into(), bad]), Err(StoreError::Refused(_))));
        }
        let many = check(&vec![long; MAX_LEDGER_BATCH + 1]);
        assert!(matches!(many, Err(StoreError::Refused(_))));
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_bucket_takes_its_quota_at_once_and_then_one_an_interval() {
        let quota = Quota { failures: 3, per: 30 * SECOND };
        let mut level = Duration::ZERO;
        let mut now = 1000 * SECOND;
        for _ in 0..3 {
            assert_eq!(quota.closed_for(level, now), Duration::ZERO);
            level = quota.after_failure(level, now);
        }
        assert_eq!(quota.closed_for(level, now), 10 * SECOND);
        now += 10 * SECOND;
        assert_eq!(quota.closed_for(level, now), Duration::ZERO);
        level = quota.after_failure(level, now);
        assert_eq!(quota.closed_for(level, now), 10 * SECOND);
        // Whatever comes at once, the lock ends.
        for _ in 0..1000 {
            level = quota.after_failure(level, now);
        }
        assert_eq!(quota.closed_for(level, now), 280 * SECOND);
    }

    proptest! {
        /// Who tries whenever the bucket is open fails at most `failures` times, and once more for
        /// each interval that passed.
        #[test]
        fn failures_are_bounded(
            failures in 1_u32..50,
            per_seconds in 1_u64..10_000,
            pauses in proptest::collection::vec(0_u64..5_000, 1..300),
        ) {
            let quota = Quota { failures, per: Duration::from_secs(per_seconds) };
            let start = Duration::from_secs(1_700_000_000);
            let (mut now, mut level, mut counted) = (start, Duration::ZERO, 0_u128);
            for pause in pauses {
                now += Duration::from_secs(pause);
                if quota.closed_for(level, now).is_zero() {
                    level = quota.after_failure(level, now);
                    counted += 1;
                }
                let passed = (now - start).as_nanos() / quota.interval().as_nanos();
                prop_assert!(counted <= u128::from(failures) + passed);
            }
        }

        /// After the wait that was told, the next attempt is taken.
        #[test]
        fn the_wait_is_true(failures in 1_u32..50, per_seconds in 1_u64..10_000, more in 0_u32..60) {
            let quota = Quota { failures, per: Duration::from_secs(per_seconds) };
            let now = Duration::from_secs(1_700_000_000);
            let mut level = Duration::ZERO;
            for _ in 0..failures + more {
                level = quota.after_failure(level, now);
            }
            let wait = quota.closed_for(level, now);
            prop_assert!(!wait.is_zero());
            prop_assert!(quota.closed_for(level, now + wait).is_zero());
            prop_assert!(!quota.closed_for(level, now + wait - Duration::from_nanos(1)).is_zero());
        }
    }
}
