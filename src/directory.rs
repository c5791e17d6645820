//! This process's replica of all entries: look-ups never touch the network, and a miss is a definite
//! answer. Where there are too many entries for that it holds all names and the entries that are used
//! most ([`indexed`]): then the first look-up of an entry asks the store, that of an unknown name never.
//!
//! The [`follower`] keeps it current. Once the contents were last proven current longer than
//! `max_stale` ago, every look-up answers [`Unavailable::Stale`] and the gate fails closed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tracing::error;

use crate::checker::Checker;
use crate::clock::{Moment, UnixTime};
use crate::entry::{Entry, EntryId, Principal, PrincipalRef};
use crate::metrics::Metrics;
use crate::otp::{Reuse, TokenParams};
use crate::store::digest::{Digest, NamePrint, contents_of};
use crate::store::{Position, Row, Scope, Store, Version};

mod all;
pub mod follower;
mod indexed;
mod names;

use all::All;
use indexed::{Held, Indexed};

/// Which entries a gate has in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    /// `None`: all entries. Else all names, and about so many of the entries.
    pub cached_entries: Option<usize>,
    /// Entries of other realms are left out, as if there were none.
    pub scope: Scope,
}

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
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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

    /// Whether every entry makes the same tokens under both.
    fn makes_tokens_as(&self, other: &Self) -> bool {
        let realms = self.realms.keys().chain(other.realms.keys());
        self.default.params == other.default.params
            && realms.into_iter().all(|realm| self.of(realm).params == other.of(realm).params)
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
    pub checker: Checker,
    /// Which of the entry's seeds that is.
    pub serial: u32,
    /// The seed before it, while it is accepted.
    pub previous: Option<Box<PreviousSeed>>,
    /// A disabled entry proves nobody.
    pub enabled: bool,
    /// From when on it proves nobody.
    pub expires_at: Option<UnixTime>,
}

/// A seed that is being rotated out, ready to check tokens.
#[derive(Debug)]
pub struct PreviousSeed {
    /// Checks its tokens.
    pub checker: Checker,
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
    /// The entry is there, but not in memory, and the store does not give it.
    NotHeld,
}

/// An entry as it is held.
#[derive(Debug)]
struct Slot {
    /// `None`: the stored entry cannot be opened.
    credential: Option<Credential>,
    /// [`contents_of`] the row.
    contents: u64,
}

impl Slot {
    fn accepts(&self) -> bool {
        self.credential.as_ref().is_some_and(|credential| credential.enabled)
    }

    fn credential(&self) -> Result<&Credential, Unavailable> {
        self.credential.as_ref().ok_or(Unavailable::Broken)
    }
}

/// Makes slots of rows.
#[derive(Clone)]
struct Opener {
    store: Store,
    metrics: Arc<Metrics>,
    /// Whether an entry could not be opened since the last full load began.
    failed: Arc<AtomicBool>,
}

impl Opener {
    fn open(&self, row: &Row, rules: &TokenRules) -> Slot {
        let credential = match self.store.unseal(row) {
            Ok(entry) => Some(Credential::new(&entry, rules)),
            Err(error) => {
                error!(%error, id = row.id.0, "an entry cannot be used, its principal gets 503");
                self.metrics.directory_broken_entries.inc();
                self.failed.store(true, Ordering::Release);
                None
            }
        };
        Slot { credential, contents: contents_of(row) }
    }
}

impl Credential {
    fn new(entry: &Entry, rules: &TokenRules) -> Self {
        let params = rules.params_of(entry);
        let previous = entry.previous.as_ref().map(|previous| {
            Box::new(PreviousSeed {
                checker: Checker::new(&previous.seed, params),
                serial: previous.serial,
                until: previous.until,
            })
        });
        Self {
            id: entry.id,
            checker: Checker::new(&entry.seed, params),
            serial: entry.serial,
            previous,
            enabled: entry.enabled,
            expires_at: entry.expires_at,
        }
    }
}

/// For health checks and logs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// A full load has succeeded.
    pub loaded: bool,
    /// What keeps the follower from the store right now, if anything.
    pub trouble: Option<String>,
}

/// What a directory says about itself, to be compared with its store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// The last change that is in force.
    pub position: Position,
    /// Sums over all entries; those of contents only where all are in memory.
    pub digest: Digest,
}

/// The replica.
pub struct Directory {
    entries: Entries,
    opener: Opener,
    rules: ArcSwap<TokenRules>,
    scope: Scope,
    /// In milliseconds.
    max_stale: AtomicU64,
    /// Whether all entries must be opened anew.
    reopen: AtomicBool,
    origin: Instant,
    /// Microseconds from `origin` to when contents were last proven current, plus one; 0: never.
    synced_at: AtomicU64,
    applied: watch::Sender<Position>,
    status: ArcSwap<Status>,
}

enum Entries {
    All(All),
    Indexed(Indexed),
}

impl Directory {
    /// An empty replica of `store` that answers *stale* until it is synced.
    #[must_use]
    pub fn new(
        store: Store,
        hold: &Hold,
        rules: TokenRules,
        max_stale: Duration,
        metrics: Arc<Metrics>,
        now: Moment,
    ) -> Self {
        let opener = Opener { store, metrics, failed: Arc::default() };
        let entries = match hold.cached_entries {
            None => Entries::All(All::default()),
            Some(capacity) => Entries::Indexed(Indexed::new(capacity, opener.clone())),
        };
        Self {
            entries,
            opener,
            rules: ArcSwap::from_pointee(rules),
            scope: hold.scope.clone(),
            max_stale: AtomicU64::new(millis(max_stale)),
            reopen: AtomicBool::new(false),
            origin: now.monotonic,
            synced_at: AtomicU64::new(0),
            applied: watch::Sender::new(Position::default()),
            status: ArcSwap::default(),
        }
    }

    /// Hands the credential of `who` to `read`, or `None` if there is no such entry.
    ///
    /// # Errors
    /// If the contents are stale, the entry cannot be opened, or, where not all entries are in memory,
    /// the store does not give it.
    pub async fn look_up<R>(
        &self,
        who: PrincipalRef<'_>,
        now: Moment,
        read: impl FnOnce(Option<&Credential>) -> R,
    ) -> Result<R, Unavailable> {
        if !self.is_current(now) {
            return Err(Unavailable::Stale);
        }
        let indexed = match &self.entries {
            Entries::All(all) => {
                return all.read(who, |slot| Ok(read(slot.map(Slot::credential).transpose()?)));
            }
            Entries::Indexed(indexed) => indexed,
        };
        let slot = match indexed.held(who) {
            Held::Nothing => None,
            Held::Entry(slot) => Some(slot),
            // Rare, and its future is large.
            Held::Name => {
                Box::pin(indexed.fetch(who, &self.rules)).await.map_err(|_| Unavailable::NotHeld)?
            }
        };
        Ok(read(slot.as_deref().map(Slot::credential).transpose()?))
    }

    /// The rules that entries are read under.
    #[must_use]
    pub fn rules(&self) -> Arc<TokenRules> {
        self.rules.load_full()
    }

    /// Changes the rules of tokens: at once, except that how an entry makes its tokens is taken over as it
    /// is loaded again, which begins now.
    pub fn set_rules(&self, rules: TokenRules) {
        let is_other = !rules.makes_tokens_as(&self.rules.load());
        self.rules.store(Arc::new(rules));
        if is_other {
            self.reopen.store(true, Ordering::Release);
        }
    }

    /// There are other keys: if an entry could not be opened, all are loaded again. Meanwhile those that are
    /// held stay in force.
    pub fn keys_changed(&self) {
        if self.opener.failed.load(Ordering::Acquire) {
            self.reopen.store(true, Ordering::Release);
        }
    }

    /// Changes for how long contents are good that were not proven current.
    pub fn set_max_stale(&self, max_stale: Duration) {
        self.max_stale.store(millis(max_stale), Ordering::Relaxed);
    }

    fn max_stale(&self) -> Duration {
        Duration::from_millis(self.max_stale.load(Ordering::Relaxed))
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        match &self.entries {
            Entries::All(all) => all.len(),
            Entries::Indexed(indexed) => indexed.len(),
        }
    }

    /// Whether there are no entries.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of entries that are in memory, not only their names.
    #[must_use]
    pub fn held(&self) -> usize {
        match &self.entries {
            Entries::All(all) => all.len(),
            Entries::Indexed(indexed) => indexed.kept(),
        }
    }

    /// Whether all entries are in memory.
    #[must_use]
    pub fn holds_all(&self) -> bool {
        matches!(self.entries, Entries::All(_))
    }

    /// Which realms' entries it has.
    #[must_use]
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// Looks at everything: takes a while.
    #[must_use]
    pub fn account(&self) -> Account {
        let position = self.applied.borrow().clone();
        let digest = match &self.entries {
            Entries::All(all) => all.digest(),
            Entries::Indexed(indexed) => indexed.digest(),
        };
        Account { position, digest }
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
        self.staleness(now).is_some_and(|age| age <= self.max_stale())
    }

    /// What the follower last said.
    #[must_use]
    pub fn status(&self) -> Arc<Status> {
        self.status.load_full()
    }

    /// The last change that is in force here.
    #[must_use]
    pub fn version(&self) -> Version {
        self.applied.borrow().version
    }

    /// Waits until the change `version` is in force here; `false` if that takes longer than `limit`.
    ///
    /// Versions of a store that went back, as after a backup was restored, mean something again only
    /// once this directory has noticed.
    pub async fn wait_for(&self, version: Version, limit: Duration) -> bool {
        let mut applied = self.applied.subscribe();
        let reached = applied.wait_for(|at| at.version >= version);
        matches!(tokio::time::timeout(limit, reached).await, Ok(Ok(_)))
    }

    // What follows is for the follower, the only writer.

    /// Whether all entries must be loaded again; asks only once.
    fn must_reopen(&self) -> bool {
        self.reopen.swap(false, Ordering::AcqRel)
    }

    /// Starts a full load: entries not set from here on are dropped by [`Self::end_load`].
    fn begin_load(&self) {
        self.opener.failed.store(false, Ordering::Release);
        match &self.entries {
            Entries::All(all) => all.begin_load(),
            Entries::Indexed(indexed) => indexed.begin_load(),
        }
    }

    fn end_load(&self) {
        match &self.entries {
            Entries::All(all) => all.end_load(),
            Entries::Indexed(indexed) => indexed.end_load(),
        }
    }

    /// Changes up to `position` are about to be applied, or entries up to there were loaded.
    fn raise(&self, position: &Position) {
        if let Entries::Indexed(indexed) = &self.entries {
            indexed.raise(position);
        }
    }

    /// Takes an entry of a full load in.
    fn load(&self, row: &Row) {
        if let Entries::All(all) = &self.entries {
            let slot = self.opener.open(row, &self.rules.load());
            all.set(&row.principal, slot);
        }
    }

    /// Takes a name of a full load in, as [`key_of`](crate::store::key_of) writes it.
    fn load_name(&self, key: &str) {
        if let Entries::Indexed(indexed) = &self.entries {
            indexed.note(NamePrint::of_key(key));
        }
    }

    /// Applies a change; `None`: the entry was deleted. Tells whether the right token of `principal` is
    /// accepted from now on, its end aside: that comes without a change.
    fn change(&self, principal: &Principal, row: Option<&Row>) -> bool {
        let slot = row.map(|row| self.opener.open(row, &self.rules.load()));
        let accepted = slot.as_ref().is_some_and(Slot::accepts);
        match (&self.entries, slot) {
            (Entries::All(all), Some(slot)) => all.set(principal, slot),
            (Entries::All(all), None) => all.remove(principal),
            (Entries::Indexed(indexed), slot) => indexed.change(principal, slot),
        }
        accepted
    }

    /// Whether that is so already; `None`: not known here.
    fn accepts(&self, who: &Principal) -> Option<bool> {
        match &self.entries {
            Entries::All(all) => Some(all.read(who.into(), |slot| slot.is_some_and(Slot::accepts))),
            Entries::Indexed(indexed) => indexed.accepts(who),
        }
    }

    /// Everything up to `position` is in force, and was current at `as_of`.
    fn proven(&self, position: &Position, as_of: Instant) {
        let micros = as_of.saturating_duration_since(self.origin).as_micros();
        self.synced_at.store(u64::try_from(micros).unwrap_or(u64::MAX - 1) + 1, Ordering::Release);
        self.applied.send_if_modified(|at| {
            let moved = at != position;
            if moved {
                at.clone_from(position);
            }
            moved
        });
        self.report(Status { loaded: true, trouble: None });
    }

    /// What is held is not known to be current any more.
    fn doubt(&self) {
        self.synced_at.store(0, Ordering::Release);
    }

    fn report(&self, status: Status) {
        if **self.status.load() != status {
            self.status.store(Arc::new(status));
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
