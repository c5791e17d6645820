//! The database file: opening, creating, recognising it, and what SQLite's errors mean.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, TransactionBehavior, ffi};

use crate::store::{Nonce, Position, StoreError, Version, log, private_file};

/// Longest wait for another process's lock.
pub(super) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// `PRAGMA user_version`: the format of the tables.
const FORMAT: i32 = 1;
/// What stands there in a store of that format that an import fills; its tag is in the table `import`.
const IMPORTING: i32 = -FORMAT;

/// What a file is for.
struct Purpose {
    /// `PRAGMA application_id`. Says whose file it is, to us and to `file(1)`.
    application_id: i32,
    /// Makes the tables.
    create: fn(&Transaction<'_>) -> rusqlite::Result<()>,
    synchronous: &'static str,
    busy_timeout: Duration,
}

/// For whom a store works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Everybody.
    Open,
    /// The import with that tag.
    Importing(String),
}

impl Phase {
    /// Whether the store, as `conn` sees it now, works for us.
    pub(super) fn check(&self, conn: &Connection) -> Result<(), StoreError> {
        let found = phase(conn)?;
        match (self, found) {
            (own, found) if *own == found => Ok(()),
            (_, Self::Importing(_)) => Err(StoreError::Importing),
            (_, Self::Open) => Err(log::ended()),
        }
    }
}

fn phase(conn: &Connection) -> Result<Phase, StoreError> {
    let format = |conn: &Connection| {
        conn.prepare_cached("PRAGMA user_version")?.query_row([], |row| row.get::<_, i32>(0))
    };
    if format(conn).map_err(store_error)? != IMPORTING {
        return Ok(Phase::Open);
    }
    conn.query_row("SELECT tag FROM import", [], |row| row.get(0))
        .map(Phase::Importing)
        .map_err(store_error)
}

/// The store itself.
const ENTRIES: Purpose = Purpose {
    application_id: i32::from_be_bytes(*b"otpg"),
    create: |tx| {
        tx.execute_batch(ENTRIES_SCHEMA)?;
        tx.execute("INSERT INTO state VALUES (1, 0, ?1, 1)", [Nonce::ORIGIN]).map(drop)
    },
    // An acknowledged write must be on disk: NORMAL would lose the last ones in a power cut.
    synchronous: "FULL",
    busy_timeout: BUSY_TIMEOUT,
};

/// The ledger beside it: a file of its own, so that requests' marks neither wait for the fsync of
/// entries nor hold their writes up, nor wake followers.
const LEDGER: Purpose = Purpose {
    application_id: i32::from_be_bytes(*b"otpl"),
    create: |tx| tx.execute_batch(LEDGER_SCHEMA),
    // Survives the death of processes, not of the machine: an fsync a request would cost too much.
    synchronous: "NORMAL",
    // Shorter than callers wait, so that what they gave up is over soon.
    busy_timeout: Duration::from_millis(500),
};

const ENTRIES_SCHEMA: &str = "
    CREATE TABLE state (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        version INTEGER NOT NULL,
        nonce TEXT NOT NULL,
        next_id INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE entries (
        id INTEGER PRIMARY KEY,
        realm TEXT NOT NULL,
        name TEXT NOT NULL,
        revision INTEGER NOT NULL,
        blob BLOB NOT NULL,
        UNIQUE (realm, name)
    ) STRICT;
    CREATE TABLE log (
        version INTEGER PRIMARY KEY,
        nonce TEXT NOT NULL,
        previous TEXT NOT NULL,
        keys TEXT NOT NULL
    ) STRICT;";
/// `ends` in seconds since 1970, `level` in nanoseconds.
const LEDGER_SCHEMA: &str = "
    CREATE TABLE uses (
        id INTEGER NOT NULL,
        serial INTEGER NOT NULL,
        counter INTEGER NOT NULL,
        by TEXT NOT NULL,
        ends INTEGER NOT NULL,
        PRIMARY KEY (id, serial, counter, by)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX uses_end ON uses (ends);
    CREATE TABLE buckets (bucket TEXT PRIMARY KEY, level INTEGER NOT NULL) STRICT, WITHOUT ROWID;
    CREATE INDEX buckets_level ON buckets (level);
    CREATE TABLE remembered (key TEXT PRIMARY KEY, ends INTEGER NOT NULL) STRICT, WITHOUT ROWID;
    CREATE INDEX remembered_end ON remembered (ends);";

/// An open connection to a file of the store.
pub(super) struct Db {
    pub(super) conn: Connection,
    pub(super) phase: Phase,
    /// What must stay where it is while the connection is of use.
    files: Vec<(PathBuf, Identity)>,
}

/// Which file a path leads to.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
}

impl Db {
    /// Opens an initialised store in that phase.
    pub(super) fn open(path: &Path, phase: &Phase) -> Result<Self, StoreError> {
        Self::open_as(path, &ENTRIES, phase)
    }

    /// Opens the ledger beside an initialised store; makes it if it is not there.
    pub(super) fn open_ledger(store: &Path) -> Result<Self, StoreError> {
        // An emptied or foreign store must be an error, never "not used yet".
        let entries = Self::open(store, &Phase::Open)?;
        let mut path = store.as_os_str().to_owned();
        path.push(".ledger");
        let path = PathBuf::from(path);
        make(&path, &LEDGER)?;
        let mut ledger = Self::open_as(&path, &LEDGER, &Phase::Open)?;
        ledger.files.extend(entries.files);
        Ok(ledger)
    }

    fn open_as(path: &Path, purpose: &Purpose, phase: &Phase) -> Result<Self, StoreError> {
        let identity = identity(path)?.ok_or(StoreError::NotInitialised)?;
        let conn = connect(path, purpose)?;
        match contents(&conn, purpose)? {
            Contents::Ours => {}
            Contents::Nothing => return Err(StoreError::NotInitialised),
        }
        phase.check(&conn)?;
        use_wal(&conn)?;
        conn.pragma_update(None, "synchronous", purpose.synchronous).map_err(store_error)?;
        let db = Self { conn, phase: phase.clone(), files: vec![(path.to_owned(), identity)] };
        db.check_in_place()?;
        Ok(db)
    }

    /// Fails if a path leads to another file by now, or to none: what this connection reads is not
    /// the store any more, and what it writes would be lost.
    pub(super) fn check_in_place(&self) -> Result<(), StoreError> {
        for (path, expected) in &self.files {
            match identity(path)? {
                Some(found) if found == *expected => {}
                Some(_) => return Err(StoreError::Unreachable("its file was replaced".into())),
                None => return Err(StoreError::Unreachable("its file was removed".into())),
            }
        }
        Ok(())
    }
}

/// Makes an empty store, unless there is one. Tells whether it did.
pub(super) fn init(path: &Path) -> Result<bool, StoreError> {
    let made = make(path, &ENTRIES)?;
    Phase::Open.check(&connect(path, &ENTRIES)?)?;
    Ok(made)
}

/// Closes the store for the import of `tag`, if it has no entries; makes it if it is not there.
pub(super) fn begin_import(path: &Path, tag: &str) -> Result<bool, StoreError> {
    make(path, &ENTRIES)?;
    let mut conn = connect(path, &ENTRIES)?;
    conn.pragma_update(None, "synchronous", ENTRIES.synchronous).map_err(store_error)?;
    let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate).map_err(store_error)?;
    match phase(&tx)? {
        Phase::Importing(other) if other == tag => return Ok(true),
        Phase::Importing(_) => return Err(StoreError::Importing),
        Phase::Open => {}
    }
    let empty = "SELECT NOT EXISTS (SELECT 1 FROM entries)";
    if !tx.query_row(empty, [], |row| row.get::<_, bool>(0)).map_err(store_error)? {
        return Ok(false);
    }
    tx.execute_batch("CREATE TABLE import (tag TEXT NOT NULL) STRICT;")
        .and_then(|()| tx.execute("INSERT INTO import VALUES (?1)", [tag]).map(drop))
        .and_then(|()| tx.pragma_update(None, "user_version", IMPORTING))
        .map_err(store_error)?;
    tx.commit().map_err(commit_error)?;
    Ok(true)
}

/// Opens the store for everybody. The log of the import goes: who knows the store as it was before loads it
/// as a whole.
pub(super) fn end_import(conn: &mut Connection, phase: &Phase) -> Result<(), StoreError> {
    let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate).map_err(store_error)?;
    phase.check(&tx)?;
    tx.execute_batch("DROP TABLE import; DELETE FROM log;")
        .and_then(|()| tx.pragma_update(None, "user_version", FORMAT))
        .map_err(store_error)?;
    tx.commit().map_err(commit_error)
}

fn make(path: &Path, purpose: &Purpose) -> Result<bool, StoreError> {
    if identity(path)?.is_none() {
        private_file::create(path, b"").map_err(|e| cannot_create(path, &e))?;
    }
    let mut conn = connect(path, purpose)?;
    if matches!(contents(&conn, purpose)?, Contents::Ours) {
        return Ok(false);
    }
    use_wal(&conn)?;
    let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate).map_err(store_error)?;
    // Another process may have been faster.
    if matches!(contents(&tx, purpose)?, Contents::Ours) {
        return Ok(false);
    }
    (purpose.create)(&tx)
        .and_then(|()| tx.pragma_update(None, "application_id", purpose.application_id))
        .and_then(|()| tx.pragma_update(None, "user_version", FORMAT))
        .and_then(|()| tx.commit())
        .map_err(store_error)?;
    Ok(true)
}

/// The end of the log of a store in that phase.
pub(super) fn tail(conn: &Connection, phase: &Phase) -> Result<Position, StoreError> {
    phase.check(conn)?;
    end(conn)
}

/// The end of the log of a store whose phase was checked.
pub(super) fn end(conn: &Connection) -> Result<Position, StoreError> {
    conn.prepare_cached("SELECT version, nonce FROM state")
        .and_then(|mut statement| {
            statement.query_row([], |row| {
                Ok(Position { version: Version(row.get(0)?), nonce: Nonce(row.get(1)?) })
            })
        })
        .map_err(store_error)
}

fn identity(path: &Path) -> Result<Option<Identity>, StoreError> {
    match std::fs::metadata(path) {
        Ok(meta) => Ok(Some(Identity { device: meta.dev(), inode: meta.ino() })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(StoreError::Denied(format!("{}: {error}", path.display())))
        }
        Err(error) => Err(StoreError::Unreachable(format!("{}: {error}", path.display()))),
    }
}

fn cannot_create(path: &Path, error: &io::Error) -> StoreError {
    StoreError::ReadOnly(format!("cannot create {}: {error}", path.display()))
}

fn connect(path: &Path, purpose: &Purpose) -> Result<Connection, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = Connection::open_with_flags(path, flags).map_err(store_error)?;
    conn.busy_timeout(purpose.busy_timeout).map_err(store_error)?;
    Ok(conn)
}

enum Contents {
    Nothing,
    Ours,
}

/// Recognises the file, without changing it.
fn contents(conn: &Connection, purpose: &Purpose) -> Result<Contents, StoreError> {
    let (application, format, tables): (i32, i32, u32) = conn
        .query_row(
            "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_schema)
             FROM pragma_application_id, pragma_user_version",
            [],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
        )
        .map_err(store_error)?;
    match (application, format) {
        (ours, FORMAT | IMPORTING) if ours == purpose.application_id => Ok(Contents::Ours),
        (ours, newer) if ours == purpose.application_id => Err(StoreError::Corrupt(format!(
            "its format is number {newer}, this otpgate knows number {FORMAT}"
        ))),
        (0, 0) if tables == 0 => Ok(Contents::Nothing),
        _ => Err(StoreError::Corrupt("the file is another application's database".into())),
    }
}

/// Sets write-ahead logging, which the file remembers: readers and the writer do not wait for each
/// other.
fn use_wal(conn: &Connection) -> Result<(), StoreError> {
    let pause = Duration::from_millis(20);
    // SQLite does not apply the busy time-out where two connections switch at once.
    let mut attempts = BUSY_TIMEOUT.as_millis() / pause.as_millis();
    loop {
        let mode = conn
            .pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get::<_, String>(0));
        match mode {
            Ok(mode) if mode == "wal" => return Ok(()),
            Ok(mode) => {
                return Err(StoreError::Unreachable(format!(
                    "its file system has no shared memory for SQLite (journal mode {mode})"
                )));
            }
            Err(error) if is_busy(&error) && attempts > 0 => attempts -= 1,
            Err(error) => return Err(store_error(error)),
        }
        std::thread::sleep(pause);
    }
}

fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
}

/// What an error of SQLite means for the store.
pub(super) fn store_error(error: rusqlite::Error) -> StoreError {
    let text = error.to_string();
    let Some(failure) = error.sqlite_error() else { return StoreError::Corrupt(text) };
    if is_busy(&error) {
        return StoreError::Unreachable("another process holds its lock for too long".into());
    }
    match failure.code {
        ErrorCode::ReadOnly if failure.extended_code == ffi::SQLITE_READONLY_DBMOVED => {
            StoreError::Unreachable("its file was moved".into())
        }
        ErrorCode::ReadOnly | ErrorCode::DiskFull => StoreError::ReadOnly(text),
        ErrorCode::SystemIoFailure if is_failed_write(failure.extended_code) => {
            StoreError::ReadOnly(text)
        }
        ErrorCode::PermissionDenied => StoreError::Denied(text),
        ErrorCode::CannotOpen => StoreError::Unreachable(format!(
            "{text} (this user must be able to read and write the file and its directory)"
        )),
        ErrorCode::SystemIoFailure
        | ErrorCode::OutOfMemory
        | ErrorCode::FileLockingProtocolFailed
        | ErrorCode::OperationInterrupted => StoreError::Unreachable(text),
        _ => StoreError::Corrupt(text),
    }
}

/// What an error of `COMMIT` means: after a failed fsync nobody knows what is on disk.
pub(super) fn commit_error(error: rusqlite::Error) -> StoreError {
    let sync = [ffi::SQLITE_IOERR_FSYNC, ffi::SQLITE_IOERR_DIR_FSYNC];
    match error.sqlite_extended_error_code() {
        Some(code) if sync.contains(&code) => StoreError::Unknown(error.to_string()),
        _ => store_error(error),
    }
}

fn is_failed_write(extended_code: i32) -> bool {
    [
        ffi::SQLITE_IOERR_WRITE,
        ffi::SQLITE_IOERR_FSYNC,
        ffi::SQLITE_IOERR_DIR_FSYNC,
        ffi::SQLITE_IOERR_TRUNCATE,
        ffi::SQLITE_IOERR_SHMSIZE,
    ]
    .contains(&extended_code)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No test that kills processes could tell: what was written is with the kernel then.
    #[test]
    fn acknowledged_writes_of_entries_wait_for_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.db");
        assert!(init(&path).unwrap());
        let level = |db: Db| {
            db.conn.query_row("PRAGMA synchronous", [], |row| row.get::<_, u8>(0)).unwrap()
        };
        let (normal, full) = (1, 2);
        assert_eq!(level(Db::open(&path, &Phase::Open).unwrap()), full);
        assert_eq!(level(Db::open_ledger(&path).unwrap()), normal);
    }
}
