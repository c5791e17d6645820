//! A follower's connection: notices every process's commits by `PRAGMA data_version`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rusqlite::TransactionBehavior;
use tokio::sync::mpsc;

use super::file::{Db, store_error, tail};
use super::{Wake, blocking, rows};
use crate::clock::Clock;
use crate::store::log::{self, Chain, RETENTION};
use crate::store::{Feed, Position, Row, Scope, Step, StoreError};

/// Time between two looks at `data_version`; a look takes a few microseconds.
const TICK: Duration = Duration::from_millis(20);
/// Looks before a poll answers that nothing happened.
const TICKS: u32 = 25;
/// Groups of rows that may wait for the follower during a full load.
pub(super) const QUEUED_GROUPS: usize = 2;

pub(super) struct SqliteFeed {
    /// Away while a worker uses it; gone for good if a question was abandoned.
    watcher: Option<Watcher>,
    /// What is followed.
    scope: Scope,
}

impl SqliteFeed {
    pub(super) fn new(db: Db, wake: Arc<Wake>, clock: Arc<dyn Clock>) -> Self {
        let watcher = Watcher { db, wake, clock, proven: None };
        Self { watcher: Some(watcher), scope: Scope::default() }
    }

    fn take(&mut self) -> Result<Watcher, StoreError> {
        self.watcher
            .take()
            .ok_or_else(|| StoreError::Unreachable("its connection is in use elsewhere".into()))
    }

    async fn read_all(
        &mut self,
        blobs: bool,
        take: &mut (dyn FnMut(Row) + Send),
    ) -> Result<Position, StoreError> {
        let mut watcher = self.take()?;
        let (groups, mut arriving) = mpsc::channel(QUEUED_GROUPS);
        let reading = blocking(move || {
            let position = watcher.read_all(blobs, &groups)?;
            Ok((watcher, position))
        });
        let taking = async {
            while let Some(group) = arriving.recv().await {
                let kept = |row: &Row| self.scope.has(row.principal.realm.as_str());
                group.into_iter().filter(kept).for_each(&mut *take);
            }
        };
        let (read, ()) = tokio::join!(reading, taking);
        let (watcher, position) = read?;
        self.watcher = Some(watcher);
        Ok(position)
    }
}

#[async_trait]
impl Feed for SqliteFeed {
    async fn load(&mut self, take: &mut (dyn FnMut(Row) + Send)) -> Result<Position, StoreError> {
        self.read_all(true, take).await
    }

    async fn load_names(
        &mut self,
        take: &mut (dyn for<'k> FnMut(&'k str) + Send),
    ) -> Result<Position, StoreError> {
        self.read_all(false, &mut |row| take(&log::key_of((&row.principal).into()))).await
    }

    async fn poll(&mut self, position: &Position) -> Result<Step, StoreError> {
        let mut watcher = self.take()?;
        let (position, scope) = (position.clone(), self.scope.clone());
        let (watcher, step) = blocking(move || {
            let step = watcher.poll(&position, &scope)?;
            Ok((watcher, step))
        })
        .await?;
        self.watcher = Some(watcher);
        Ok(step)
    }

    fn narrow(&mut self, scope: Scope) {
        self.scope = scope;
    }
}

/// What works on a blocking thread.
struct Watcher {
    db: Db,
    wake: Arc<Wake>,
    clock: Arc<dyn Clock>,
    /// At this `data_version` the log ended at this position.
    proven: Option<(i64, Position)>,
}

impl Watcher {
    fn poll(&mut self, position: &Position, scope: &Scope) -> Result<Step, StoreError> {
        let mut as_of = self.clock.monotonic();
        for _ in 0..TICKS {
            let commits = self.wake.commits();
            as_of = self.clock.monotonic();
            self.db.check_in_place()?;
            let data_version = self.data_version()?;
            let still = (data_version, position.clone());
            if self.proven.as_ref() != Some(&still) {
                let step = self.step(position, scope, as_of)?;
                if let Step::Current { .. } = step {
                    self.proven = Some(still);
                }
                return Ok(step);
            }
            self.wake.wait(commits, TICK);
        }
        Ok(Step::Current { as_of })
    }

    fn data_version(&self) -> Result<i64, StoreError> {
        self.db
            .conn
            .prepare_cached("PRAGMA data_version")
            .and_then(|mut statement| statement.query_row([], |row| row.get(0)))
            .map_err(store_error)
    }

    /// What happened since `position`, as one consistent picture.
    fn step(
        &mut self,
        position: &Position,
        scope: &Scope,
        as_of: Instant,
    ) -> Result<Step, StoreError> {
        let tx = self
            .db
            .conn
            .transaction_with_behavior(TransactionBehavior::Deferred)
            .map_err(store_error)?;
        let end = tail(&tx, &self.db.phase)?;
        if end == *position {
            return Ok(Step::Current { as_of });
        }
        if end.version.0.saturating_sub(position.version.0) > RETENTION {
            return Ok(Step::Lost("too far behind the change log"));
        }
        let mut chain = Chain::from(position);
        for record in rows::records(&tx, position.version, RETENTION as usize)? {
            if let Err(why) = chain.push(record) {
                return Ok(Step::Lost(why));
            }
        }
        if chain.position != end {
            return Ok(Step::Lost("the change log is not the one that was followed so far"));
        }
        let mut changed = Vec::with_capacity(chain.keys.len());
        for key in chain.keys.iter().filter(|key| scope.has_key(key)) {
            let principal = log::principal_of(key)
                .ok_or_else(|| StoreError::Corrupt("the change log names no entry".into()))?;
            let row = rows::of_principal(&tx, &principal)?;
            changed.push((principal, row));
        }
        Ok(Step::Changed { rows: changed, position: chain.position, as_of })
    }

    fn read_all(
        &mut self,
        blobs: bool,
        groups: &mpsc::Sender<Vec<Row>>,
    ) -> Result<Position, StoreError> {
        self.db.check_in_place()?;
        let tx = self
            .db
            .conn
            .transaction_with_behavior(TransactionBehavior::Deferred)
            .map_err(store_error)?;
        let position = tail(&tx, &self.db.phase)?;
        rows::all(&tx, blobs, |group| groups.blocking_send(group).is_ok())?;
        drop(tx);
        // It would keep the pages that it has read, which nobody reads again.
        self.db.conn.execute_batch("PRAGMA shrink_memory").map_err(store_error)?;
        Ok(position)
    }
}
