//! The SQLite backend: one file, write-ahead log, readable and writable by several processes.
//!
//! SQLite blocks, so nothing here touches a connection outside [`tokio::task::spawn_blocking`]. Reads,
//! writes and the ledger have one connection each, used in turn; every follower has its own.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use rusqlite::Connection;
use tokio::sync::{Semaphore, mpsc};

use super::{Backend, Feed, Inspection, Mutation, Position, Row, StoreError, Version};
use crate::clock::Clock;
use crate::entry::{EntryId, PrincipalRef};

mod feed;
mod file;
mod inspect;
mod ledger;
mod rows;

use file::{Db, Phase};

/// Entries in an SQLite file.
pub struct Sqlite {
    path: PathBuf,
    /// For everybody, or what an import works with.
    phase: Phase,
    reads: Arc<Lane>,
    writes: Arc<Lane>,
    ledger: Arc<Lane>,
    wake: Arc<Wake>,
}

impl Sqlite {
    /// The store in the file `path`, which need not exist yet.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        // A later change of the working directory must not move the store.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Self::in_phase(path, Phase::Open)
    }

    fn in_phase(path: PathBuf, phase: Phase) -> Self {
        let (reads, writes, ledger) = Default::default();
        Self { path, phase, reads, writes, ledger, wake: Arc::default() }
    }

    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (path, phase) = (self.path.clone(), self.phase.clone());
        let open = move || Db::open(&path, &phase);
        let phase = self.phase.clone();
        let work = move |conn: &mut Connection| {
            let tx = conn.transaction().map_err(file::store_error)?;
            phase.check(&tx)?;
            work(&tx)
        };
        self.reads.clone().take_turn(move |slot| with_db(slot, open, work)).await
    }

    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (path, phase) = (self.path.clone(), self.phase.clone());
        let open = move || Db::open(&path, &phase);
        self.writes.clone().take_turn(move |slot| with_db(slot, open, work)).await
    }
}

#[async_trait]
impl Backend for Sqlite {
    fn kind(&self) -> &'static str {
        "sqlite"
    }

    async fn init(&self) -> Result<bool, StoreError> {
        let path = self.path.clone();
        self.writes.clone().take_turn(move |_| file::init(&path)).await
    }

    async fn get(&self, principal: PrincipalRef<'_>) -> Result<Option<Row>, StoreError> {
        let principal = principal.to_owned();
        self.read(move |conn| rows::of_principal(conn, &principal)).await
    }

    async fn get_since(
        &self,
        principal: PrincipalRef<'_>,
        position: &Position,
    ) -> Result<Option<Row>, StoreError> {
        let (principal, position) = (principal.to_owned(), position.clone());
        self.read(move |conn| rows::since(conn, &principal, &position)).await
    }

    async fn get_by_id(&self, id: EntryId) -> Result<Option<Row>, StoreError> {
        self.read(move |conn| rows::of_id(conn, id)).await
    }

    async fn list(&self, after: Option<EntryId>, limit: usize) -> Result<Vec<Row>, StoreError> {
        self.read(move |conn| rows::after(conn, after, limit)).await
    }

    async fn reserve_id(&self) -> Result<EntryId, StoreError> {
        let phase = self.phase.clone();
        self.write(move |conn| {
            phase.check(conn)?;
            rows::reserve_id(conn)
        })
        .await
    }

    async fn commit(&self, batch: &[Mutation]) -> Result<Version, StoreError> {
        super::log::check(batch)?;
        let (path, phase) = (self.path.clone(), self.phase.clone());
        let (batch, wake) = (batch.to_vec(), self.wake.clone());
        let work = move |slot: &mut Option<Db>| {
            let open = || Db::open(&path, &phase);
            let version = with_db(slot, open, |conn| rows::commit(conn, &phase, &batch))?;
            check_written(slot)?;
            wake.ring();
            Ok(version)
        };
        self.writes.clone().take_turn(work).await
    }

    async fn feed(&self, clock: Arc<dyn Clock>) -> Result<Box<dyn Feed>, StoreError> {
        let (path, phase) = (self.path.clone(), self.phase.clone());
        let db = blocking(move || Db::open(&path, &phase)).await?;
        Ok(Box::new(feed::SqliteFeed::new(db, self.wake.clone(), clock)))
    }

    async fn count(&self) -> Result<u64, StoreError> {
        self.read(rows::count).await
    }

    async fn next_id(&self) -> Result<EntryId, StoreError> {
        self.read(rows::next_id).await
    }

    async fn raise_next_id(&self, next: EntryId) -> Result<(), StoreError> {
        let phase = self.phase.clone();
        self.write(move |conn| {
            phase.check(conn)?;
            rows::raise_next_id(conn, next.min(EntryId::MAX))
        })
        .await
    }

    async fn begin_import(&self, tag: &str) -> Result<Option<Arc<dyn Backend>>, StoreError> {
        let (path, tag) = (self.path.clone(), tag.to_owned());
        let phase = Phase::Importing(tag.clone());
        let closed =
            self.writes.clone().take_turn(move |_| file::begin_import(&path, &tag)).await?;
        let importer = || Self::in_phase(self.path.clone(), phase);
        Ok(closed.then(|| Arc::new(importer()) as Arc<dyn Backend>))
    }

    async fn end_import(&self) -> Result<(), StoreError> {
        let phase = self.phase.clone();
        self.write(move |conn| file::end_import(conn, &phase)).await
    }

    async fn inspect(&self, take: &mut (dyn FnMut(Row) + Send)) -> Result<Inspection, StoreError> {
        let (path, phase) = (self.path.clone(), self.phase.clone());
        let (groups, mut arriving) = mpsc::channel(feed::QUEUED_GROUPS);
        let inspecting = blocking(move || inspect::inspect(&mut Db::open(&path, &phase)?, &groups));
        let taking = async {
            while let Some(group) = arriving.recv().await {
                for row in group {
                    take(row);
                }
            }
        };
        tokio::join!(inspecting, taking).0
    }
}

/// One connection and the turn to use it.
struct Lane {
    turn: Arc<Semaphore>,
    db: Mutex<Option<Db>>,
}

impl Default for Lane {
    fn default() -> Self {
        Self { turn: Arc::new(Semaphore::new(1)), db: Mutex::new(None) }
    }
}

impl Lane {
    /// Does `work` when the connection is free, even if the caller goes away meanwhile.
    async fn take_turn<T: Send + 'static>(
        self: Arc<Self>,
        work: impl FnOnce(&mut Option<Db>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        // Waiting takes a place in this queue, not a blocking thread.
        let turn = tokio::time::timeout(file::BUSY_TIMEOUT, self.turn.clone().acquire_owned());
        let Ok(Ok(turn)) = turn.await else {
            return Err(StoreError::Unreachable("too many operations wait for it".into()));
        };
        blocking(move || {
            let _turn = turn;
            work(&mut self.db.lock().unwrap_or_else(PoisonError::into_inner))
        })
        .await
    }
}

/// Does `work` on the slot's connection, opening it if there is none or the file was replaced.
fn with_db<T>(
    slot: &mut Option<Db>,
    open: impl FnOnce() -> Result<Db, StoreError>,
    work: impl FnOnce(&mut Connection) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let kept = slot.take().filter(|db| db.check_in_place().is_ok());
    let mut db = match kept {
        Some(db) => db,
        None => open()?,
    };
    let result = work(&mut db.conn);
    // After any real trouble the next operation starts afresh.
    if matches!(result, Ok(_) | Err(StoreError::Conflict | StoreError::Refused(_))) {
        *slot = Some(db);
    }
    result
}

/// Had the file been replaced since the check before, the write would be in the old one.
fn check_written(slot: &Option<Db>) -> Result<(), StoreError> {
    let in_place = slot.as_ref().map_or(Ok(()), Db::check_in_place);
    in_place.map_err(|error| StoreError::Unknown(error.to_string()))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(StoreError::Unknown(format!("its worker ended early ({error})")))
    })
}

/// Wakes this process's followers at its own commits, so that they need not wait for their next look.
#[derive(Default)]
struct Wake {
    commits: Mutex<u64>,
    rung: Condvar,
}

impl Wake {
    fn ring(&self) {
        *self.commits.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.rung.notify_all();
    }

    fn commits(&self) -> u64 {
        *self.commits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there are other than `seen` commits, at most `limit`.
    fn wait(&self, seen: u64, limit: Duration) {
        let commits = self.commits.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.rung.wait_timeout_while(commits, limit, |now| *now == seen);
    }
}
