//! All names, and the entries that are used most: what is not in memory is fetched when it is asked for.
//!
//! A name that is not in the index is unknown without asking the store. An entry that was fetched is kept
//! only if no change of it came in force here meanwhile, so that what is kept is as current as the log:
//! every change is noted in [`Part::changes`] of the entry's stripe, under its lock, before the fetched
//! entry could be kept. And what is fetched comes from a place whose history holds every change that was
//! in force here when it was asked ([`get_since`](crate::store::Store::get_since)): not from a primary that was replaced.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use quick_cache::sync::Cache;
use tokio::sync::Semaphore;
use tracing::warn;

use super::names::Names;
use super::{Opener, Slot, TokenRules};
use crate::entry::{Principal, PrincipalRef};
use crate::store::digest::{Digest, NamePrint};
use crate::store::{Position, StoreError};

/// Longest time to bring an entry: callers wait for it.
const PATIENCE: Duration = Duration::from_secs(1);
/// Entries that are fetched at the same time.
const FETCHES: usize = 256;
/// How often an entry is fetched again that changes meanwhile.
const ATTEMPTS: u32 = 4;
/// Locks; entries share them by their names.
const STRIPES: usize = 256;

pub(super) struct Indexed {
    /// What is in force.
    part: ArcSwap<Part>,
    /// What is being loaded, until it is in force.
    loading: ArcSwapOption<Part>,
    /// How many entries it keeps.
    capacity: usize,
    opener: Opener,
    fetches: Semaphore,
}

/// One full load and the changes since.
struct Part {
    names: Names,
    kept: Cache<Principal, Arc<Slot>>,
    /// How many changes were applied to entries of each stripe.
    changes: Vec<Mutex<u64>>,
    /// What is fetched must be as of here or later.
    floor: ArcSwap<Position>,
    count: AtomicU64,
}

/// What is in memory of a name.
pub(super) enum Held {
    /// There is no such entry.
    Nothing,
    /// The entry.
    Entry(Arc<Slot>),
    /// Its name alone.
    Name,
}

impl Part {
    fn new(capacity: usize) -> Self {
        Self {
            names: Names::default(),
            kept: Cache::new(capacity),
            changes: (0..STRIPES).map(|_| Mutex::default()).collect(),
            floor: ArcSwap::from_pointee(Position::default()),
            count: AtomicU64::new(0),
        }
    }

    fn stripe(&self, name: NamePrint) -> MutexGuard<'_, u64> {
        let stripe = usize::from(name.0[0]) % STRIPES;
        self.changes[stripe].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, name: NamePrint) {
        if self.names.insert(name) {
            self.count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Indexed {
    pub(super) fn new(capacity: usize, opener: Opener) -> Self {
        Self {
            part: ArcSwap::from_pointee(Part::new(capacity)),
            loading: ArcSwapOption::empty(),
            capacity,
            opener,
            fetches: Semaphore::new(FETCHES),
        }
    }

    pub(super) fn held(&self, who: PrincipalRef<'_>) -> Held {
        let part = self.part.load();
        match part.kept.get(&who) {
            Some(slot) => Held::Entry(slot),
            None if part.names.contains(NamePrint::of(who)) => Held::Name,
            None => Held::Nothing,
        }
    }

    /// The entry of `who` from the store, to be kept from now on; `None` if there is none. An error is
    /// told to the log.
    pub(super) async fn fetch(
        &self,
        who: PrincipalRef<'_>,
        rules: &ArcSwap<TokenRules>,
    ) -> Result<Option<Arc<Slot>>, StoreError> {
        let fetching = async {
            let permit = self.fetches.acquire().await;
            let _permit = permit.map_err(|_| StoreError::Unreachable("it is closed".into()))?;
            self.fetch_current(who, rules).await
        };
        let fetched = tokio::time::timeout(PATIENCE, fetching).await.unwrap_or_else(|_| {
            Err(StoreError::Unreachable("an entry was not fetched in time".into()))
        });
        let outcome = match &fetched {
            Ok(Some(_)) => "found",
            Ok(None) => "absent",
            Err(_) => "failed",
        };
        self.opener.metrics.directory_fetched(outcome);
        fetched.inspect_err(
            |error| warn!(%error, "an entry cannot be fetched, its principal gets 503"),
        )
    }

    async fn fetch_current(
        &self,
        who: PrincipalRef<'_>,
        rules: &ArcSwap<TokenRules>,
    ) -> Result<Option<Arc<Slot>>, StoreError> {
        let name = NamePrint::of(who);
        for _ in 0..ATTEMPTS {
            let part = self.part.load_full();
            let before = *part.stripe(name);
            // After that: a change that is applied from here on is counted, one that was is below it.
            let floor = part.floor.load_full();
            let Some(row) = self.opener.store.get_since(who, &floor).await? else {
                return Ok(None);
            };
            // The part is no older than these: whoever changes them has all loaded into another part then.
            let slot = Arc::new(self.opener.open(&row, &rules.load()));
            let changes = part.stripe(name);
            if *changes == before && Arc::ptr_eq(&part, &self.part.load()) {
                part.kept.insert(row.principal, slot.clone());
                return Ok(Some(slot));
            }
        }
        Err(StoreError::Unreachable("entries change faster than one can be fetched".into()))
    }

    /// How many names there are.
    pub(super) fn len(&self) -> usize {
        usize::try_from(self.part.load().count.load(Ordering::Relaxed)).unwrap_or(usize::MAX)
    }

    /// How many entries are in memory.
    pub(super) fn kept(&self) -> usize {
        self.part.load().kept.len()
    }

    /// Of the names alone.
    pub(super) fn digest(&self) -> Digest {
        self.part.load_full().names.digest()
    }

    // What follows is for the follower, the only one who changes names.

    pub(super) fn begin_load(&self) {
        self.loading.store(Some(Arc::new(Part::new(self.capacity))));
    }

    /// Notes a name of a full load.
    pub(super) fn note(&self, name: NamePrint) {
        if let Some(part) = &*self.loading.load() {
            part.note(name);
        }
    }

    pub(super) fn end_load(&self) {
        if let Some(part) = self.loading.swap(None) {
            self.part.store(part);
        }
    }

    /// Changes up to `position` are about to be applied, or entries up to there were loaded.
    pub(super) fn raise(&self, position: &Position) {
        self.changing().floor.store(Arc::new(position.clone()));
    }

    /// Applies a change; `None`: the entry was deleted.
    pub(super) fn change(&self, principal: &Principal, slot: Option<Slot>) {
        let part = self.changing();
        let name = NamePrint::of(principal.into());
        let mut changes = part.stripe(name);
        *changes += 1;
        let Some(slot) = slot else {
            if part.names.remove(name) {
                part.count.fetch_sub(1, Ordering::Relaxed);
            }
            part.kept.remove(principal);
            return;
        };
        part.note(name);
        // Only if it is in memory: most changed entries are not used here.
        let _ = part.kept.replace(principal.clone(), Arc::new(slot), false);
    }

    /// Whether the entry of `who` is in memory and its tokens are accepted; `None` if it is not in
    /// memory.
    pub(super) fn accepts(&self, who: &Principal) -> Option<bool> {
        let part = self.changing();
        match part.kept.peek(who) {
            Some(slot) => Some(slot.accepts()),
            None if part.names.contains(NamePrint::of(who.into())) => None,
            None => Some(false),
        }
    }

    fn changing(&self) -> Arc<Part> {
        self.loading.load_full().unwrap_or_else(|| self.part.load_full())
    }
}
