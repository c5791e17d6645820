//! A table of fixed size that forgets what matters least.

use std::sync::{Mutex, PoisonError};
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
    shards: Box<[Mutex<Vec<Slot>>]>,
}

impl Table {
    pub(super) fn new() -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::new(vec![[0; 2]; SLOTS])).collect() }
    }

    /// The time under `key`; zero if there is none.
    pub(super) fn get(&self, key: u64) -> Duration {
        self.with(key, |ways| {
            let found = ways.iter().find(|[other, value]| *other == key && *value > 0);
            found.map_or(Duration::ZERO, |[_, value]| Duration::from_millis(*value))
        })
    }

    /// Replaces the time under `key` by what `change` makes of it, and returns that.
    pub(super) fn update(&self, key: u64, change: impl FnOnce(Duration) -> Duration) -> Duration {
        self.with(key, |ways| {
            let found = ways.iter_mut().find(|[other, value]| *other == key && *value > 0);
            let old = found.as_ref().map_or(0, |[_, value]| *value);
            let new = change(Duration::from_millis(old));
            // Rounded up: what is closed stays closed to the end.
            let millis = u64::try_from(new.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX);
            let place = match found {
                Some(slot) => Some(slot),
                None => ways.iter_mut().min_by_key(|[_, value]| *value),
            };
            if let Some(slot) = place {
                *slot = [key, millis];
            }
            new
        })
    }

    /// Sets the time under `key`.
    pub(super) fn set(&self, key: u64, time: Duration) {
        self.update(key, |_| time);
    }

    /// How many of the times fulfil `is`.
    pub(super) fn count(&self, is: impl Fn(Duration) -> bool) -> usize {
        let fits = |[_, value]: &&Slot| *value > 0 && is(Duration::from_millis(*value));
        let count = |shard: &Mutex<Vec<Slot>>| lock(shard).iter().filter(fits).count();
        self.shards.iter().map(count).sum()
    }

    fn with<R>(&self, key: u64, work: impl FnOnce(&mut [Slot]) -> R) -> R {
        #[allow(clippy::cast_possible_truncation, reason = "any bits will do")]
        let (shard, set) = (key as usize % SHARDS, (key >> 32) as usize % (SLOTS / WAYS));
        let mut slots = lock(&self.shards[shard]);
        work(&mut slots[set * WAYS..][..WAYS])
    }
}

/// Slots are valid whenever the lock is free, also after a panic.
fn lock(shard: &Mutex<Vec<Slot>>) -> std::sync::MutexGuard<'_, Vec<Slot>> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_is_set_is_found() {
        let table = Table::new();
        assert_eq!(table.get(7), Duration::ZERO);
        table.set(7, 3 * SECOND);
        assert_eq!(table.update(7, |old| old + SECOND), 4 * SECOND);
        assert_eq!(table.get(7), 4 * SECOND);
        assert_eq!(table.count(|time| time > 3 * SECOND), 1);
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
        assert_eq!(table.get(key(0)), 1000 * SECOND);
        assert!(table.count(|_| true) <= SHARDS * SLOTS);
    }
}
