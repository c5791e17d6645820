//! A table of fixed size that forgets what matters least.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Parts with a lock of their own.
const SHARDS: usize = 8;
/// Slots of a shard. One shard is large enough for the allocator to map it, so that memory which is
/// never written stays untouched.
const SLOTS: usize = 8192;
/// Neighbouring slots that a key may be in.
const WAYS: usize = 8;

/// Key and value, in milliseconds; a value of 0 is none.
type Slot = [u64; 2];

/// Times by key. When the places of a key are all taken, the earliest time gives way.
///
/// Keys must be hashes with a secret key, so that nobody can choose whom to push out.
pub(super) struct Table {
    shards: Box<[Shard]>,
}

struct Shard {
    /// No value is larger: where nothing lasts, which is usual, nobody has to lock.
    latest: AtomicU64,
    slots: Mutex<Vec<Slot>>,
}

impl Table {
    pub(super) fn new() -> Self {
        let shard = |_| Shard { latest: AtomicU64::new(0), slots: Mutex::new(vec![[0; 2]; SLOTS]) };
        Self { shards: (0..SHARDS).map(shard).collect() }
    }

    /// The time under `key`; zero if there is none, or if it is not later than `at`.
    pub(super) fn get(&self, key: u64, at: Duration) -> Duration {
        let (shard, set) = self.place_of(key);
        if Duration::from_millis(shard.latest.load(Ordering::Acquire)) <= at {
            return Duration::ZERO;
        }
        let slots = shard.lock();
        let found = slots[set..][..WAYS].iter().find(|[other, value]| *other == key && *value > 0);
        let time = found.map_or(Duration::ZERO, |[_, value]| Duration::from_millis(*value));
        if time > at { time } else { Duration::ZERO }
    }

    /// Replaces the time under `key` by what `change` makes of it, and returns that.
    pub(super) fn update(&self, key: u64, change: impl FnOnce(Duration) -> Duration) -> Duration {
        let (shard, set) = self.place_of(key);
        let mut slots = shard.lock();
        let ways = &mut slots[set..][..WAYS];
        let found = ways.iter_mut().find(|[other, value]| *other == key && *value > 0);
        let old = found.as_ref().map_or(0, |[_, value]| *value);
        let new = change(Duration::from_millis(old));
        // Rounded up: what is closed stays closed to the end.
        let millis = u64::try_from(new.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX);
        let place = match found {
            Some(slot) => Some(slot),
            // What is zero need not be kept, least of all in another's place.
            None if millis == 0 => None,
            None => ways.iter_mut().min_by_key(|[_, value]| *value),
        };
        if let Some(slot) = place {
            *slot = [key, millis];
        }
        shard.latest.fetch_max(millis, Ordering::Release);
        new
    }

    /// Sets the time under `key`.
    pub(super) fn set(&self, key: u64, time: Duration) {
        self.update(key, |_| time);
    }

    /// How many of the times fulfil `is`.
    pub(super) fn count(&self, is: impl Fn(Duration) -> bool) -> usize {
        let fits = |[_, value]: &&Slot| *value > 0 && is(Duration::from_millis(*value));
        let count = |shard: &Shard| shard.lock().iter().filter(fits).count();
        self.shards.iter().map(count).sum()
    }

    /// Where a key may be: its shard, and the first of its [`WAYS`] slots.
    fn place_of(&self, key: u64) -> (&Shard, usize) {
        #[allow(clippy::cast_possible_truncation, reason = "any bits will do")]
        let (shard, set) = (key as usize % SHARDS, (key >> 32) as usize % (SLOTS / WAYS));
        (&self.shards[shard], set * WAYS)
    }
}

impl Shard {
    /// Slots are valid whenever the lock is free, also after a panic.
    fn lock(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_is_set_is_found_while_it_lasts() {
        let (table, start) = (Table::new(), Duration::ZERO);
        assert_eq!(table.get(7, start), Duration::ZERO);
        table.set(7, 3 * SECOND);
        assert_eq!(table.update(7, |old| old + SECOND), 4 * SECOND);
        // In the same shard.
        table.set(7 + SHARDS as u64, 9 * SECOND);
        assert_eq!(table.get(7, start), 4 * SECOND);
        assert_eq!(table.get(7, 3 * SECOND), 4 * SECOND);
        assert_eq!(table.get(7, 4 * SECOND), Duration::ZERO);
        assert_eq!(table.get(7 + SHARDS as u64, 4 * SECOND), 9 * SECOND);
        assert_eq!(table.count(|time| time > 3 * SECOND), 2);
        table.set(7, Duration::ZERO);
        assert_eq!(table.get(7, start), Duration::ZERO);
    }

    #[test]
    fn nothing_pushes_nobody_out() {
        let table = Table::new();
        let key = |i: usize| (i * SHARDS) as u64;
        (1..=WAYS).for_each(|i| table.set(key(i), SECOND));
        assert_eq!(table.update(key(0), |old| old), Duration::ZERO);
        table.set(key(0), Duration::ZERO);
        assert!((1..=WAYS).all(|i| table.get(key(i), Duration::ZERO) == SECOND));
    }

    /// However many keys there are, the table does not grow, and what lasts longest stays.
    #[test]
    fn the_earliest_time_gives_way() {
        let table = Table::new();
        let key = |i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        table.set(key(0), 1000 * SECOND);
        for i in 1..=1_000_000 {
            table.set(key(i), SECOND);
        }
        assert_eq!(table.get(key(0), SECOND), 1000 * SECOND);
        assert!(table.count(|_| true) <= SHARDS * SLOTS);
    }
}
