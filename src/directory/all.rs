//! Every entry in memory.

use std::sync::atomic::{AtomicU32, Ordering};

use std::hash::{Hash, Hasher};

use papaya::{Equivalent, Guard as _};

use super::Slot;
use crate::entry::{Principal, PrincipalRef};
use crate::store::digest::{Digest, NamePrint};

/// A principal as a key: one text, since there are many and each look-up reads one.
#[derive(PartialEq, Eq)]
struct Key {
    /// The realm and behind it the name.
    text: Box<str>,
    realm_len: usize,
}

impl Key {
    fn of(who: PrincipalRef<'_>) -> Self {
        Self { text: [who.realm(), who.name()].concat().into(), realm_len: who.realm().len() }
    }

    fn principal(&self) -> PrincipalRef<'_> {
        let (realm, name) = self.text.split_at(self.realm_len);
        PrincipalRef::of_checked(realm, name)
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.principal().hash(state);
    }
}

impl Equivalent<Key> for PrincipalRef<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        *self == key.principal()
    }
}

/// A slot and the full load that set it, or that was the latest when a change set it.
type Kept = (Slot, u32);

/// What the follower writes it flushes: left to itself the map keeps replaced slots, with their seeds,
/// until there are dozens to free at once.
#[derive(Default)]
pub(super) struct All {
    slots: papaya::HashMap<Key, Kept>,
    generation: AtomicU32,
}

impl All {
    pub(super) fn read<R>(
        &self,
        who: PrincipalRef<'_>,
        read: impl FnOnce(Option<&Slot>) -> R,
    ) -> R {
        read(self.slots.pin().get(&who).map(|(slot, _)| slot))
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// From here on, entries not set again are dropped by [`Self::end_load`].
    pub(super) fn begin_load(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn end_load(&self) {
        let generation = self.generation.load(Ordering::Relaxed);
        let guard = self.slots.guard();
        self.slots.retain(|_, (_, set)| *set == generation, &guard);
        guard.flush();
    }

    pub(super) fn set(&self, principal: &Principal, slot: Slot) {
        let generation = self.generation.load(Ordering::Relaxed);
        let guard = self.slots.guard();
        self.slots.insert(Key::of(principal.into()), (slot, generation), &guard);
        guard.flush();
    }

    pub(super) fn remove(&self, principal: &Principal) {
        let guard = self.slots.guard();
        self.slots.remove(&PrincipalRef::from(principal), &guard);
        guard.flush();
    }

    pub(super) fn digest(&self) -> Digest {
        let mut digest = Digest::default();
        for (key, (slot, _)) in &self.slots.pin() {
            digest.add(NamePrint::of(key.principal()), slot.contents);
        }
        digest
    }
}

#[cfg(test)]
mod tests {
    use std::hash::{BuildHasher as _, RandomState};

    use super::*;

    #[test]
    fn keys_are_found_by_their_principals_alone() {
        let hasher = RandomState::new();
        let parts = [("ab", "c"), ("a", "bc"), ("c", "ab"), ("\u{fc}", "bc")];
        let all = parts.map(|(realm, name)| PrincipalRef::parse(name, realm).unwrap());
        for who in all {
            let key = Key::of(who);
            assert_eq!(key.principal(), who);
            assert_eq!(hasher.hash_one(&key), hasher.hash_one(who));
            assert_eq!(
                all.into_iter().filter(|other| Equivalent::equivalent(other, &key)).count(),
                1
            );
        }
    }
}
