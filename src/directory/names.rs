//! A set of names as short prints: ten million take about 120 MB.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::store::digest::{Digest, NamePrint, PRINT_BYTES};

/// The first two bytes of a print choose its bucket, the rest is kept there, in order.
const BUCKETS: usize = 1 << 16;
/// Buckets share locks.
const SHARDS: usize = 64;
const KEPT: usize = PRINT_BYTES - 2;

type Bucket = Vec<[u8; KEPT]>;

pub(super) struct Names(Vec<RwLock<Vec<Bucket>>>);

impl Default for Names {
    fn default() -> Self {
        let shard = || RwLock::new(vec![Bucket::new(); BUCKETS / SHARDS]);
        Self((0..SHARDS).map(|_| shard()).collect())
    }
}

impl Names {
    pub(super) fn contains(&self, name: NamePrint) -> bool {
        let (shard, bucket, rest) = split(name);
        self.read(shard)[bucket].binary_search(&rest).is_ok()
    }

    /// Tells whether it is new.
    pub(super) fn insert(&self, name: NamePrint) -> bool {
        let (shard, bucket, rest) = split(name);
        let bucket = &mut self.write(shard)[bucket];
        let Err(at) = bucket.binary_search(&rest) else { return false };
        if bucket.len() == bucket.capacity() {
            // Doubling would leave a quarter of the memory unused on average.
            bucket.reserve_exact((bucket.len() / 8).max(2));
        }
        bucket.insert(at, rest);
        true
    }

    /// Tells whether it was there.
    pub(super) fn remove(&self, name: NamePrint) -> bool {
        let (shard, bucket, rest) = split(name);
        let bucket = &mut self.write(shard)[bucket];
        let Ok(at) = bucket.binary_search(&rest) else { return false };
        bucket.remove(at);
        true
    }

    /// Those of all names; without contents.
    pub(super) fn digest(&self) -> Digest {
        let mut digest = Digest::default();
        for shard in 0..SHARDS {
            for (bucket, kept) in self.read(shard).iter().enumerate() {
                for rest in kept {
                    digest.add(join(shard, bucket, rest), 0);
                }
            }
        }
        digest
    }

    fn read(&self, shard: usize) -> RwLockReadGuard<'_, Vec<Bucket>> {
        self.0[shard].read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, shard: usize) -> RwLockWriteGuard<'_, Vec<Bucket>> {
        self.0[shard].write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Shard, bucket therein, and what is kept there.
fn split(name: NamePrint) -> (usize, usize, [u8; KEPT]) {
    let [a, b, rest @ ..] = name.0;
    let bucket = usize::from(u16::from_be_bytes([a, b]));
    (bucket % SHARDS, bucket / SHARDS, rest)
}

fn join(shard: usize, bucket: usize, rest: &[u8; KEPT]) -> NamePrint {
    let bucket = u16::try_from(bucket * SHARDS + shard).expect("there are 2^16 buckets");
    let mut name = [0; PRINT_BYTES];
    name[..2].copy_from_slice(&bucket.to_be_bytes());
    name[2..].copy_from_slice(rest);
    NamePrint(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// Few buckets, so that prints meet there.
    fn print() -> impl Strategy<Value = NamePrint> {
        (0..3_u8, 0..3_u8, 0..9_u8).prop_map(|(a, b, z)| {
            let mut name = [a; PRINT_BYTES];
            (name[1], name[PRINT_BYTES - 1]) = (b * 100, z);
            NamePrint(name)
        })
    }

    proptest! {
        #[test]
        fn it_is_a_set(steps in proptest::collection::vec((any::<bool>(), print()), 0..300)) {
            let (names, mut model) = (Names::default(), BTreeSet::new());
            for (insert, name) in steps {
                match insert {
                    true => prop_assert_eq!(names.insert(name), model.insert(name)),
                    false => prop_assert_eq!(names.remove(name), model.remove(&name)),
                }
                prop_assert_eq!(names.contains(name), insert);
            }
            let mut expected = Digest::default();
            model.iter().for_each(|name| expected.add(*name, 0));
            prop_assert_eq!(names.digest(), expected);
            prop_assert!(model.iter().all(|name| names.contains(*name)));
        }
    }
}
