//! Every entry in memory.

use std::sync::atomic::{AtomicU32, Ordering};

use papaya::Guard as _;

use super::Slot;
use crate::entry::{Principal, PrincipalRef};
use crate::store::digest::{Digest, NamePrint};

/// A slot and the full load that set it, or that was the latest when a change set it.
type Kept = (Slot, u32);

/// What the follower writes it flushes: left to itself the map keeps replaced slots, with their seeds,
/// until there are dozens to free at once.
#[derive(Default)]
pub(super) struct All {
    slots: papaya::HashMap<Principal, Kept>,
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

    pub(super) fn set(&self, principal: Principal, slot: Slot) {
        let generation = self.generation.load(Ordering::Relaxed);
        let guard = self.slots.guard();
        self.slots.insert(principal, (slot, generation), &guard);
        guard.flush();
    }

    pub(super) fn remove(&self, principal: &Principal) {
        let guard = self.slots.guard();
        self.slots.remove(principal, &guard);
        guard.flush();
    }

    pub(super) fn digest(&self) -> Digest {
        let mut digest = Digest::default();
        for (principal, (slot, _)) in &self.slots.pin() {
            digest.add(NamePrint::of(principal.into()), slot.contents);
        }
        digest
    }
}
