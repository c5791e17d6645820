//! Uses of tokens, failed attempts and recent successes, in a file of their own beside the entries.
//!
//! Times are whole seconds, so a mark lasts up to a second longer than asked for, never shorter.

use std::time::Duration;

use async_trait::async_trait;
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};

use super::file::store_error;
use super::{Db, Sqlite, check_written, with_db};
use crate::clock::UnixTime;
use crate::store::ledger::{check, in_time};
use crate::store::{Failure, Ledger, Spending, StoreError};

/// Ended marks that are removed for each new one: more than one, so that tables shrink again.
const SWEPT: usize = 4;

#[async_trait]
impl Ledger for Sqlite {
    async fn spend(&self, spending: &Spending, now: UnixTime) -> Result<bool, StoreError> {
        let spending = spending.clone();
        self.mark(move |tx| spend(tx, &spending, now)).await
    }

    async fn count_failures(
        &self,
        failures: &[Failure],
        now: UnixTime,
    ) -> Result<Vec<Duration>, StoreError> {
        check(failures.iter().map(|failure| &failure.bucket))?;
        let failures = failures.to_vec();
        self.mark(move |tx| count(tx, &failures, Duration::from_secs(now))).await
    }

    async fn remember(
        &self,
        keys: &[String],
        keep: Duration,
        now: UnixTime,
    ) -> Result<(), StoreError> {
        check(keys.iter())?;
        let keys = keys.to_vec();
        self.mark(move |tx| remember(tx, &keys, end(now, keep), now)).await
    }

    async fn remembers(&self, key: &str, now: UnixTime) -> Result<bool, StoreError> {
        let key = key.to_owned();
        self.on_ledger(move |conn| {
            conn.prepare_cached("SELECT 1 FROM remembered WHERE key = ?1 AND ends >= ?2")?
                .exists(params![key, now])
        })
        .await
    }
}

impl Sqlite {
    /// Does all of `work` or nothing.
    async fn mark<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.on_ledger(move |conn| {
            let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let done = work(&tx)?;
            tx.commit()?;
            Ok(done)
        })
        .await
    }

    async fn on_ledger<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let path = self.path.clone();
        let turn = self.ledger.clone().take_turn(move |slot| {
            let open = || Db::open_ledger(&path);
            let done = with_db(slot, open, |conn| work(conn).map_err(store_error))?;
            check_written(slot)?;
            Ok(done)
        });
        in_time(turn).await
    }
}

/// The last second of a mark made at `now`.
fn end(now: UnixTime, keep: Duration) -> UnixTime {
    now + keep.as_secs() + u64::from(keep.subsec_nanos() > 0)
}

fn spend(tx: &Transaction<'_>, spending: &Spending, now: UnixTime) -> rusqlite::Result<bool> {
    let Spending { id, serial, counter, by, budget, keep } = spending;
    let (used, by_us): (u32, bool) = tx
        .prepare_cached(
            "SELECT count(*), coalesce(max(by = ?4), 0) FROM uses
             WHERE id = ?1 AND serial = ?2 AND counter = ?3 AND ends >= ?5",
        )?
        .query_row(params![id.0, serial, counter, by, now], |row| Ok((row.get(0)?, row.get(1)?)))?;
    if by_us || used >= *budget {
        return Ok(by_us);
    }
    tx.prepare_cached("INSERT OR REPLACE INTO uses VALUES (?1, ?2, ?3, ?4, ?5)")?
        .execute(params![id.0, serial, counter, by, end(now, *keep)])?;
    tx.prepare_cached(
        "DELETE FROM uses WHERE (id, serial, counter, by) IN
             (SELECT id, serial, counter, by FROM uses WHERE ends < ?1 ORDER BY ends LIMIT ?2)",
    )?
    .execute(params![now, SWEPT])?;
    Ok(true)
}

fn count(
    tx: &Transaction<'_>,
    failures: &[Failure],
    now: Duration,
) -> rusqlite::Result<Vec<Duration>> {
    let mut read = tx.prepare_cached("SELECT level FROM buckets WHERE bucket = ?1")?;
    let mut write = tx.prepare_cached(
        "INSERT INTO buckets VALUES (?1, ?2) ON CONFLICT (bucket) DO UPDATE SET level = ?2",
    )?;
    let mut closed = Vec::with_capacity(failures.len());
    for Failure { bucket, quota } in failures {
        let level = read.query_row([bucket], |row| row.get(0)).optional()?.unwrap_or(0);
        let level = quota.after_failure(Duration::from_nanos(level), now);
        write.execute(params![bucket, nanos(level)])?;
        closed.push(quota.closed_for(level, now));
    }
    // A drained bucket is as good as none.
    tx.prepare_cached(
        "DELETE FROM buckets WHERE bucket IN
             (SELECT bucket FROM buckets WHERE level < ?1 ORDER BY level LIMIT ?2)",
    )?
    .execute(params![nanos(now), SWEPT * failures.len()])?;
    Ok(closed)
}

fn remember(
    tx: &Transaction<'_>,
    keys: &[String],
    end: UnixTime,
    now: UnixTime,
) -> rusqlite::Result<()> {
    let mut write = tx.prepare_cached(
        "INSERT INTO remembered VALUES (?1, ?2) ON CONFLICT (key) DO UPDATE SET ends = ?2",
    )?;
    for key in keys {
        write.execute(params![key, end])?;
    }
    tx.prepare_cached(
        "DELETE FROM remembered WHERE key IN
             (SELECT key FROM remembered WHERE ends < ?1 ORDER BY ends LIMIT ?2)",
    )?
    .execute(params![now, SWEPT * keys.len()])?;
    Ok(())
}

/// Nanoseconds since 1970, which SQLite's integers hold until the year 2262.
fn nanos(since_1970: Duration) -> i64 {
    i64::try_from(since_1970.as_nanos()).unwrap_or(i64::MAX)
}
