//! This process's replica of all entries: look-ups never touch the network, and a miss is a definite
//! answer.
//!
//! The [`follower`] keeps it current. Once the contents were last proven current longer than
//! `max_stale` ago, every look-up answers [`Unavailable::Stale`] and the gate fails closed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use papaya::Guard as _;
use tokio::sync::watch;

use crate::clock::{Moment, UnixTime};
use crate::entry::{Entry, EntryId, Principal, PrincipalRef};
use crate::otp::{Generator, Reuse, TokenParams};
use crate::store::Version;

pub mod follower;

/// How tokens of one realm are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RealmRules {
    /// How its entries make tokens, unless they say otherwise themselves.
    pub params: TokenParams,
    /// Time steps accepted on either side of the current one.
    pub skew_steps: u8,
    /// How often a token may be used.
    pub reuse: Reuse,
}

impl Default for RealmRules {
    fn default() -> Self {
        Self { params: TokenParams::default(), skew_steps: 1, reuse: Reuse::Window }
    }
}

/// The rules of every realm.
#[derive(Clone, Debug, Default)]
pub struct TokenRules {
    /// For realms that are not listed.
    pub default: RealmRules,
    /// For listed realms, by name.
    pub realms: std::collections::HashMap<String, RealmRules>,
}

impl TokenRules {
    /// The rules of `realm`.
    #[must_use]
    pub fn of(&self, realm: &str) -> &RealmRules {
        self.realms.get(realm).unwrap_or(&self.default)
    }

    /// How an entry's tokens are made, its own settings included.
    #[must_use]
    pub fn params_of(&self, entry: &Entry) -> TokenParams {
        let realm = self.of(entry.principal.realm.as_str()).params;
        TokenParams {
            algorithm: entry.overrides.algorithm.unwrap_or(realm.algorithm),
            digits: entry.overrides.digits.unwrap_or(realm.digits),
            step_seconds: entry.overrides.period.unwrap_or(realm.step_seconds),
        }
    }
}

/// What a look-up gives: all that checking a token needs, nothing that it does not.
#[derive(Debug)]
pub struct Credential {
    /// The entry's number.
    pub id: EntryId,
    /// Its seed, ready to check tokens.
    pub generator: Generator,
    /// Which of the entry's seeds that is.
    pub serial: u32,
    /// The seed before it, while it is accepted.
    pub previous: Option<PreviousSeed>,
    /// Time steps accepted on either side.
    pub skew_steps: u8,
    /// How often a token may be used.
    pub reuse: Reuse,
    /// A disabled entry proves nobody.
    pub enabled: bool,
    /// From when on it proves nobody.
    pub expires_at: Option<UnixTime>,
}

/// A seed that is being rotated out, ready to check tokens.
#[derive(Debug)]
pub struct PreviousSeed {
    /// Checks its tokens.
    pub generator: Generator,
    /// Which of the entry's seeds that is.
    pub serial: u32,
    /// From when on it proves nobody.
    pub until: UnixTime,
}

/// Why a look-up has no answer. Callers must fail closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// The contents are not known to be current.
    Stale,
    /// The entry is there, but cannot be opened.
    Broken,
}

#[derive(Debug)]
struct Slot {
    /// `None`: the stored entry cannot be opened.
    credential: Option<Credential>,
    /// The full load that set it, or that was the latest when a change set it.
    generation: u32,
}

/// For health checks and logs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// A full load has succeeded.
    pub loaded: bool,
    /// What keeps the follower from the store right now, if anything.
    pub trouble: Option<String>,
}

/// The replica.
pub struct Directory {
    slots: papaya::HashMap<Principal, Slot>,
    rules: TokenRules,
    max_stale: Duration,
    origin: Instant,
    /// Microseconds from `origin` to when contents were last proven current, plus one; 0: never.
    synced_at: AtomicU64,
    generation: AtomicU32,
    applied: watch::Sender<Version>,
    status: ArcSwap<Status>,
}

impl Directory {
    /// An empty replica that answers *stale* until it is synced.
    #[must_use]
    pub fn new(rules: TokenRules, max_stale: Duration, now: Moment) -> Self {
        Self {
            slots: papaya::HashMap::new(),
            rules,
            max_stale,
            origin: now.monotonic,
            synced_at: AtomicU64::new(0),
            generation: AtomicU32::new(0),
            applied: watch::Sender::new(Version::default()),
            status: ArcSwap::default(),
        }
    }

    /// Hands the credential of `who` to `read`, or `None` if there is no such entry.
    ///
    /// # Errors
    /// If the contents are stale or the entry cannot be opened.
    pub fn look_up<R>(
        &self,
        who: PrincipalRef<'_>,
        now: Moment,
        read: impl FnOnce(Option<&Credential>) -> R,
    ) -> Result<R, Unavailable> {
        if !self.is_current(now) {
            return Err(Unavailable::Stale);
        }
        let slots = self.slots.pin();
        match slots.get(&who) {
            None => Ok(read(None)),
            Some(Slot { credential: Some(credential), .. }) => Ok(read(Some(credential))),
            Some(Slot { credential: None, .. }) => Err(Unavailable::Broken),
        }
    }

    /// The rules that entries are read under.
    #[must_use]
    pub fn rules(&self) -> &TokenRules {
        &self.rules
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there are no entries.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// How long ago the contents were last proven current; `None`: never.
    #[must_use]
    pub fn staleness(&self, now: Moment) -> Option<Duration> {
        let synced = self.synced_at.load(Ordering::Acquire).checked_sub(1)?;
        let age = now.monotonic.saturating_duration_since(self.origin);
        Some(age.saturating_sub(Duration::from_micros(synced)))
    }

    /// Whether look-ups are answered.
    #[must_use]
    pub fn is_current(&self, now: Moment) -> bool {
        self.staleness(now).is_some_and(|age| age <= self.max_stale)
    }

    /// What the follower last said.
    #[must_use]
    pub fn status(&self) -> Arc<Status> {
        self.status.load_full()
    }

    /// The last change that is in force here.
    #[must_use]
    pub fn version(&self) -> Version {
        *self.applied.borrow()
    }

    /// Waits until the change `version` is in force here; `false` if that takes longer than `limit`.
    ///
    /// Versions of a store that went back, as after a backup was restored, mean something again only
    /// once this directory has noticed.
    pub async fn wait_for(&self, version: Version, limit: Duration) -> bool {
        let mut applied = self.applied.subscribe();
        let reached = applied.wait_for(|at| *at >= version);
        matches!(tokio::time::timeout(limit, reached).await, Ok(Ok(_)))
    }

    // What follows is for the follower, the only writer. It flushes each change: left to itself the map keeps
    // replaced slots, with their seeds, until there are dozens to free at once.

    /// Starts a full load: entries not set from here on are dropped by [`Self::end_load`].
    fn begin_load(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
    }

    fn end_load(&self) {
        let generation = self.generation.load(Ordering::Relaxed);
        let guard = self.slots.guard();
        self.slots.retain(|_, slot| slot.generation == generation, &guard);
        guard.flush();
    }

    /// Sets an entry.
    fn set(&self, entry: &Entry) {
        let rules = self.rules.of(entry.principal.realm.as_str());
        let params = self.rules.params_of(entry);
        let previous = entry.previous.as_ref().map(|previous| PreviousSeed {
            generator: Generator::new(&previous.seed, params),
            serial: previous.serial,
            until: previous.until,
        });
        let credential = Credential {
            id: entry.id,
            generator: Generator::new(&entry.seed, params),
            serial: entry.serial,
            previous,
            skew_steps: rules.skew_steps,
            reuse: rules.reuse,
            enabled: entry.enabled,
            expires_at: entry.expires_at,
        };
        self.put(entry.principal.clone(), Some(credential));
    }

    /// Notes an entry that cannot be opened.
    fn set_broken(&self, principal: Principal) {
        self.put(principal, None);
    }

    fn put(&self, principal: Principal, credential: Option<Credential>) {
        let generation = self.generation.load(Ordering::Relaxed);
        let guard = self.slots.guard();
        self.slots.insert(principal, Slot { credential, generation }, &guard);
        guard.flush();
    }

    fn remove(&self, principal: &Principal) {
        let guard = self.slots.guard();
        self.slots.remove(principal, &guard);
        guard.flush();
    }

    /// Everything up to `version` is in force, and was current at `as_of`.
    fn proven(&self, version: Version, as_of: Instant) {
        let micros = as_of.saturating_duration_since(self.origin).as_micros();
        self.synced_at.store(u64::try_from(micros).unwrap_or(u64::MAX - 1) + 1, Ordering::Release);
        self.applied.send_if_modified(|at| std::mem::replace(at, version) != version);
        self.report(Status { loaded: true, trouble: None });
    }

    fn report(&self, status: Status) {
        if **self.status.load() != status {
            self.status.store(Arc::new(status));
        }
    }
}
