//! Durable entries and their ordered change log.
//!
//! [`Store`] is what the rest of the program sees: typed entries, sealed before they leave the
//! process. A [`Backend`] keeps opaque blobs; there is one for SQLite and one for Redis, and one
//! contract test suite for both (`tests/integration/store_contract.rs`).
//!
//! Every write is a compare-and-set on the entry's [`Version`] and appends one record to the change
//! log. A log record carries a random nonce and the nonce of the record before it, so a follower can
//! prove that it missed nothing, even where the whole server was emptied or restored in between.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use zeroize::Zeroizing;

use crate::clock::{Clock, SystemClock, UnixTime};
use crate::entry::{Entry, EntryId, Principal, PrincipalRef};
use crate::metrics::Metrics;
use crate::seal::{SealError, Sealer};

pub mod digest;
pub mod export;
pub mod import;
pub mod ledger;
mod log;
pub mod open;
mod payload;
pub(crate) mod private_file;
pub mod redis;
pub mod rekey;
mod scope;
pub mod sqlite;
pub mod url;
pub mod verify;

pub use ledger::{Failure, LEDGER_PATIENCE, Ledger, MAX_LEDGER_BATCH, Quota, Spending};
pub use log::{MAX_BATCH, key_of};
pub use scope::Scope;
pub use verify::{Inspection, Problems};

/// Number of a write; the first one is 1. An entry's revision is the version that last wrote it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u64);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Random name of one log record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nonce(pub String);

impl Nonce {
    /// The nonce before the first record: the log's origin.
    pub const ORIGIN: &'static str = "origin";

    /// 128 random bits as hexadecimal text.
    #[must_use]
    pub fn random() -> Self {
        let mut bytes = [0; 16];
        crate::secret::fill_random(&mut bytes);
        Self(data_encoding::HEXLOWER.encode(&bytes))
    }
}

/// A place in the change log: everything up to here is known. The default one is in no log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The last known record; 0 if the log is empty.
    pub version: Version,
    /// Its nonce; [`Nonce::ORIGIN`] if the log is empty.
    pub nonce: Nonce,
}

/// An entry as a backend keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Whose it is.
    pub principal: Principal,
    /// Its number.
    pub id: EntryId,
    /// Which write made it so; 0 if it was damaged so far that it does not say.
    pub revision: Version,
    /// What [`Sealer::seal`] made.
    pub blob: Blob,
}

/// A sealed payload, or, where sealing is off, a plain one. Cannot print itself.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Blob(pub Vec<u8>);

impl std::fmt::Debug for Blob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{} bytes]", self.0.len())
    }
}

/// What must be true of a principal's row for a write to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// There is none.
    Absent,
    /// It is at this revision.
    At(Version),
}

/// What a write does to a principal's row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Sets it.
    Put {
        /// Its number: reserved by [`Backend::reserve_id`], kept from before, or imported.
        id: EntryId,
        /// Its new blob.
        blob: Blob,
    },
    /// Removes it.
    Delete,
}

/// One change of one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mutation {
    /// Whose row.
    pub principal: Principal,
    /// What must be true before.
    pub expect: Expect,
    /// What to do.
    pub action: Action,
}

/// Why the store did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No connection, a time-out, a broken connection: trying again may help.
    #[error("the store cannot be reached: {0}")]
    Unreachable(String),
    /// The store refuses us: password, user, permissions.
    #[error("the store refuses access: {0}")]
    Denied(String),
    /// The store holds no otpgate data: never initialised, or emptied.
    #[error(
        "the store is not initialised, or was emptied: run `otpgate store init` for a new one, restore a backup of an old one"
    )]
    NotInitialised,
    /// The store is being filled: what it holds so far is not all, and must not be taken for it.
    #[error(
        "an import is under way, or was broken off: run `otpgate store import` of the same file again"
    )]
    Importing,
    /// The store is there but does not take writes: full disk, read-only, out of memory.
    #[error("the store takes no writes: {0}")]
    ReadOnly(String),
    /// What is stored makes no sense: another program's data, a newer format, damage.
    #[error("the store's contents are unusable: {0}")]
    Corrupt(String),
    /// One entry cannot be opened.
    #[error("the entry of {principal} cannot be opened: {cause}")]
    Sealed {
        /// Whose it is.
        principal: Principal,
        /// Why.
        cause: SealError,
    },
    /// The row is not as [`Mutation::expect`] says, or the id belongs to another one: nothing was
    /// written.
    #[error("the entry was changed by somebody else in the meantime")]
    Conflict,
    /// The write cannot be done by any store: nothing was written.
    #[error("the store cannot keep this: {0}")]
    Refused(String),
    /// The write may or may not have happened.
    #[error("the outcome of the write is unknown: {0}")]
    Unknown(String),
}

/// What happened to the log since a position.
#[derive(Clone, Debug)]
pub enum Step {
    /// These rows changed (`None`: deleted), and `position` is the new place.
    Changed {
        /// The changed rows as they are now.
        rows: Vec<(Principal, Option<Row>)>,
        /// Everything up to here is included.
        position: Position,
        /// When the question was sent: contents were current then or later.
        as_of: Instant,
    },
    /// Nothing happened: the position is the end of the log.
    Current {
        /// When the question was sent.
        as_of: Instant,
    },
    /// The position is no longer in the log, or the nonces do not chain: a full load is needed.
    Lost(&'static str),
}

/// A follower's own connection to the store.
#[async_trait]
pub trait Feed: Send {
    /// Hands every row to `take`, in no particular order, in bounded memory. Rows written meanwhile
    /// may or may not be included; following from the returned position makes it whole, and shows
    /// whether it was one history.
    async fn load(&mut self, take: &mut (dyn FnMut(Row) + Send)) -> Result<Position, StoreError>;

    /// As [`Self::load`], but hands over only the names, each as [`key_of`] writes it.
    async fn load_names(
        &mut self,
        take: &mut (dyn for<'k> FnMut(&'k str) + Send),
    ) -> Result<Position, StoreError>;

    /// Waits up to about half a second for records after `position`.
    async fn poll(&mut self, position: &Position) -> Result<Step, StoreError>;

    /// From now on passes over all entries that are not in `scope`.
    fn narrow(&mut self, scope: Scope);
}

/// Keeps rows and the change log. Implementations own connections, time-outs and retries; all
/// waiting is bounded.
#[async_trait]
pub trait Backend: Ledger + 'static {
    /// `sqlite` or `redis`: for logs and metrics.
    fn kind(&self) -> &'static str;

    /// Makes the store usable if it holds nothing yet. Tells whether it did.
    async fn init(&self) -> Result<bool, StoreError>;

    /// Connections to a server from now on are made with `access`; open ones stay.
    fn set_access(&self, _access: redis::Access) {}

    /// The row of a principal.
    async fn get(&self, principal: PrincipalRef<'_>) -> Result<Option<Row>, StoreError>;

    /// The row of a principal, from a place whose history holds `position`: as of then or later.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] if it cannot be shown that it does.
    async fn get_since(
        &self,
        principal: PrincipalRef<'_>,
        position: &Position,
    ) -> Result<Option<Row>, StoreError>;

    /// The row with that number.
    async fn get_by_id(&self, id: EntryId) -> Result<Option<Row>, StoreError>;

    /// Up to `limit` rows with a larger number than `after`, in order of number.
    async fn list(&self, after: Option<EntryId>, limit: usize) -> Result<Vec<Row>, StoreError>;

    /// A number below [`EntryId::MAX`] that no row has or will have otherwise.
    async fn reserve_id(&self) -> Result<EntryId, StoreError>;

    /// Does all of `batch` or nothing, as one record of the log. A put with a number not below the
    /// next free one moves that on.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if any expectation fails or an id belongs to another principal's row
    /// that the batch does not delete; [`StoreError::Refused`] if the batch is too long or contradicts
    /// itself.
    async fn commit(&self, batch: &[Mutation]) -> Result<Version, StoreError>;

    /// How many rows there are.
    async fn count(&self) -> Result<u64, StoreError>;

    /// The number that would be given next.
    async fn next_id(&self) -> Result<EntryId, StoreError>;

    /// Gives no number below `next` from now on.
    async fn raise_next_id(&self, next: EntryId) -> Result<(), StoreError>;

    /// Closes a new or empty store to everybody: until [`Self::end_import`] it answers
    /// [`StoreError::Importing`]. What is returned works on it meanwhile, also for who begins again with
    /// the same `tag`, a word that says what is imported. `None`, and nothing done, if it has entries.
    async fn begin_import(&self, tag: &str) -> Result<Option<Arc<dyn Backend>>, StoreError>;

    /// Opens the store to everybody, in one step. For what [`Self::begin_import`] returned.
    async fn end_import(&self) -> Result<(), StoreError>;

    /// Looks at all that is stored, and hands every row to `take`, those with a damaged or missing value
    /// included.
    async fn inspect(&self, take: &mut (dyn FnMut(Row) + Send)) -> Result<Inspection, StoreError>;

    /// What an operator should know about how the store is set up, as sentences for the log.
    async fn warnings(&self) -> Vec<String> {
        Vec::new()
    }

    /// A new connection for one follower.
    async fn feed(&self, clock: Arc<dyn Clock>) -> Result<Box<dyn Feed>, StoreError>;
}

/// What a store has under a principal, and at which revision that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its number.
    pub id: EntryId,
    /// Whose it is.
    pub principal: Principal,
    /// Compare-and-set against this.
    pub revision: Version,
    /// The entry; or why it cannot be opened: then all that can be done with it is to delete it.
    pub entry: Result<Entry, StoreError>,
}

/// Typed, sealed access to a [`Backend`].
#[derive(Clone)]
pub struct Store {
    backend: Arc<dyn Backend>,
    /// Shared by all copies.
    sealer: Arc<ArcSwap<Sealer>>,
    metrics: Option<Arc<Metrics>>,
}

impl Store {
    /// Joins a backend and a sealer.
    #[must_use]
    pub fn new(backend: Arc<dyn Backend>, sealer: Sealer) -> Self {
        Self { backend, sealer: Arc::new(ArcSwap::from_pointee(sealer)), metrics: None }
    }

    /// Counts and times its operations there.
    #[must_use]
    pub fn with_metrics(self, metrics: Arc<Metrics>) -> Self {
        Self { metrics: Some(metrics), ..self }
    }

    /// What an operator should know about how the server is set up, as sentences for the log.
    pub async fn warnings(&self) -> Vec<String> {
        self.backend.warnings().await
    }

    /// `sqlite` or `redis`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        self.backend.kind()
    }

    /// Whether it is a file of this machine, not a server that others may have filled.
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.kind() == "sqlite"
    }

    /// See [`Backend::init`].
    ///
    /// # Errors
    /// As the backend.
    pub async fn init(&self) -> Result<bool, StoreError> {
        self.timed("init", self.backend.init()).await
    }

    /// What is stored for a principal.
    ///
    /// # Errors
    /// As the backend.
    pub async fn get(&self, principal: PrincipalRef<'_>) -> Result<Option<Stored>, StoreError> {
        let row = self.timed("get", self.backend.get(principal)).await?;
        Ok(row.map(|row| self.stored(row)))
    }

    /// See [`Backend::get_since`]; the row is opened with [`Store::unseal`].
    ///
    /// # Errors
    /// As the backend.
    pub async fn get_since(
        &self,
        principal: PrincipalRef<'_>,
        position: &Position,
    ) -> Result<Option<Row>, StoreError> {
        self.timed("fetch", self.backend.get_since(principal, position)).await
    }

    /// What is stored under that number.
    ///
    /// # Errors
    /// As the backend.
    pub async fn get_by_id(&self, id: EntryId) -> Result<Option<Stored>, StoreError> {
        let row = self.timed("get", self.backend.get_by_id(id)).await?;
        Ok(row.map(|row| self.stored(row)))
    }

    /// Up to `limit` entries with a larger number than `after`, in order of number, those that cannot
    /// be opened included.
    ///
    /// # Errors
    /// As the backend.
    pub async fn list(
        &self,
        after: Option<EntryId>,
        limit: usize,
    ) -> Result<Vec<Stored>, StoreError> {
        let rows = self.timed("list", self.backend.list(after, limit)).await?;
        Ok(rows.into_iter().map(|row| self.stored(row)).collect())
    }

    /// Creates an entry with a fresh number; `make` gets that number.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if the principal has an entry; else as the backend.
    pub async fn create(
        &self,
        make: impl FnOnce(EntryId) -> Entry + Send,
    ) -> Result<(Entry, Version), StoreError> {
        let entry = make(self.timed("reserve_id", self.backend.reserve_id()).await?);
        let version = self.insert(std::slice::from_ref(&entry)).await?;
        Ok((entry, version))
    }

    /// Inserts entries with the numbers that they have, all or none.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if a principal or a number is taken; [`StoreError::Refused`] if the
    /// entries are more than [`MAX_BATCH`] or clash with each other; else as the backend.
    pub async fn insert(&self, entries: &[Entry]) -> Result<Version, StoreError> {
        let batch: Vec<_> = entries.iter().map(|e| self.put(e, Expect::Absent)).collect();
        self.timed("commit", self.backend.commit(&batch)).await
    }

    /// Replaces `old` by `new`, also under another principal; the number stays.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if `old` is no longer what is stored or the new principal has an
    /// entry; else as the backend.
    pub async fn update(&self, old: &Stored, new: &Entry) -> Result<Version, StoreError> {
        debug_assert_eq!(old.id, new.id);
        let at = Expect::At(old.revision);
        let batch = if old.principal == new.principal {
            vec![self.put(new, at)]
        } else {
            vec![Self::removal(old), self.put(new, Expect::Absent)]
        };
        self.timed("commit", self.backend.commit(&batch)).await
    }

    /// Deletes an entry, whether it can be opened or not.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] if `old` is no longer what is stored; else as the backend.
    pub async fn delete(&self, old: &Stored) -> Result<Version, StoreError> {
        self.timed("commit", self.backend.commit(&[Self::removal(old)])).await
    }

    /// How many entries there are.
    ///
    /// # Errors
    /// As the backend.
    pub async fn count(&self) -> Result<u64, StoreError> {
        self.timed("count", self.backend.count()).await
    }

    /// A follower's connection; its rows are opened with [`Store::unseal`].
    ///
    /// # Errors
    /// As the backend.
    pub async fn feed(&self, clock: Arc<dyn Clock>) -> Result<Box<dyn Feed>, StoreError> {
        self.backend.feed(clock).await
    }

    /// See [`Ledger::spend`].
    ///
    /// # Errors
    /// As the backend.
    pub async fn spend(&self, spending: &Spending, now: UnixTime) -> Result<bool, StoreError> {
        self.timed("spend", self.backend.spend(spending, now)).await
    }

    /// See [`Ledger::count_failures`].
    ///
    /// # Errors
    /// As the backend.
    pub async fn count_failures(
        &self,
        failures: &[Failure],
        now: UnixTime,
    ) -> Result<Vec<Duration>, StoreError> {
        self.timed("count_failures", self.backend.count_failures(failures, now)).await
    }

    /// See [`Ledger::remember`].
    ///
    /// # Errors
    /// As the backend.
    pub async fn remember(
        &self,
        keys: &[String],
        keep: Duration,
        now: UnixTime,
    ) -> Result<(), StoreError> {
        self.timed("remember", self.backend.remember(keys, keep, now)).await
    }

    /// See [`Ledger::remembers`].
    ///
    /// # Errors
    /// As the backend.
    pub async fn remembers(&self, key: &str, now: UnixTime) -> Result<bool, StoreError> {
        self.timed("remembers", self.backend.remembers(key, now)).await
    }

    /// Opens a row.
    ///
    /// # Errors
    /// [`StoreError::Sealed`] or [`StoreError::Corrupt`].
    pub fn unseal(&self, row: &Row) -> Result<Entry, StoreError> {
        let payload = open_with(&self.sealer.load(), row)?;
        payload::read(row.id, &row.principal, &payload)
            .map_err(|what| StoreError::Corrupt(format!("entry of {}: {what}", row.principal)))
    }

    fn stored(&self, row: Row) -> Stored {
        let entry = self.unseal(&row);
        Stored { id: row.id, principal: row.principal, revision: row.revision, entry }
    }

    async fn timed<T>(
        &self,
        operation: &'static str,
        work: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let Some(metrics) = &self.metrics else { return work.await };
        let before = SystemClock.monotonic();
        let result = work.await;
        let took = SystemClock.monotonic().saturating_duration_since(before);
        metrics.store_operation(self.kind(), operation, took);
        if let Err(error) = &result {
            metrics.store_error(self.kind(), operation, error);
        }
        result
    }

    fn put(&self, entry: &Entry, expect: Expect) -> Mutation {
        let payload = payload::write(entry);
        Mutation {
            principal: entry.principal.clone(),
            expect,
            action: Action::Put {
                id: entry.id,
                blob: Blob(self.sealer.load().seal(&entry.principal, entry.id, &payload)),
            },
        }
    }

    fn removal(old: &Stored) -> Mutation {
        Mutation {
            principal: old.principal.clone(),
            expect: Expect::At(old.revision),
            action: Action::Delete,
        }
    }
}

fn open_with(sealer: &Sealer, row: &Row) -> Result<Zeroizing<Vec<u8>>, StoreError> {
    let opened = sealer.open(&row.principal, row.id, &row.blob.0);
    opened.map_err(|cause| StoreError::Sealed { principal: row.principal.clone(), cause })
}

/// A stored blob: nothing opens but what was sealed for that very entry, and what a payload says is
/// written as it was read.
///
/// # Panics
/// If that does not hold.
#[cfg(any(test, fuzzing))]
pub fn fuzz_blob(data: &[u8]) {
    let sealer = Sealer::new(&data_encoding::BASE64.encode(&[7; 32]), &[]).expect("a key");
    let who = Principal::parse("alice", "staff").expect("a principal");
    assert!(sealer.open(&who, EntryId(1), data).is_err(), "a blob that nobody sealed opens");
    if let Ok(entry) = payload::read(EntryId(1), &who, data) {
        let written = payload::write(&entry);
        assert_eq!(payload::read(EntryId(1), &who, &written), Ok(entry));
    }
    let mut blob = sealer.seal(&who, EntryId(1), data);
    assert_eq!(sealer.open(&who, EntryId(1), &blob).as_deref(), Ok(&data.to_vec()));
    assert!(sealer.open(&who, EntryId(2), &blob).is_err());
    let at = data.first().map_or(0, |first| usize::from(*first)) % blob.len();
    blob[at] ^= 1 << (data.len() % 8);
    assert!(sealer.open(&who, EntryId(1), &blob).is_err(), "a changed blob opens");
}

/// Records of the change log and rows, one a line as `version nonce previous keys`: a chain only ever
/// takes what continues it, and no two keys are of one principal.
///
/// # Panics
/// If that does not hold.
#[cfg(any(test, fuzzing))]
pub fn fuzz_log(data: &[u8]) {
    let origin = Position { version: Version(0), nonce: Nonce(Nonce::ORIGIN.to_owned()) };
    let mut chain = log::Chain::from(&origin);
    for line in String::from_utf8_lossy(data).lines() {
        let mut parts = line.splitn(4, ' ').map(str::to_owned);
        let mut next = || parts.next().unwrap_or_default();
        let record = log::Record {
            version: next().parse().unwrap_or_default(),
            nonce: next(),
            previous: next(),
            keys: next(),
        };
        let before = chain.position.clone();
        if chain.push(record.clone()).is_ok() {
            assert_eq!((record.version, record.previous), (before.version.0 + 1, before.nonce.0));
        } else {
            assert_eq!(chain.position, before);
        }
    }
    for key in &chain.keys {
        if let Some(principal) = log::principal_of(key) {
            assert_eq!(log::key_of((&principal).into()), *key);
        }
    }
    redis::fuzz(data);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blobs_do_not_print() {
        let row = Row {
            principal: Principal::parse("a", "r").unwrap(),
            id: EntryId(1),
            revision: Version(1),
            blob: Blob(b"JBSWY3DPEHPK3PXP".to_vec()),
        };
        let shown = format!("{row:?}");
        assert!(shown.contains("[16 bytes]") && !shown.contains("74, 66"), "{shown}");
    }
}
