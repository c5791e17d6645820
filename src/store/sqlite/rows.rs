//! Statements on the tables.

use std::collections::HashSet;

use rusqlite::{Connection, OptionalExtension, Params, Transaction, TransactionBehavior, params};
use tracing::error;

use super::file::{Phase, commit_error, end, store_error, tail};
use crate::entry::{EntryId, Principal};
use crate::store::log::{self, RETENTION, Record};
use crate::store::{Action, Blob, Expect, Mutation, Nonce, Position, Row, StoreError, Version};

/// A row of `entries` as SQLite gives it.
type Raw = (u64, String, String, u64, Vec<u8>);

fn raw(row: &rusqlite::Row<'_>) -> rusqlite::Result<Raw> {
    Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?))
}

/// `None`: no request can claim such a principal, so the row is of no use to anybody.
fn parse((id, realm, name, revision, blob): Raw) -> Option<Row> {
    match Principal::parse(&name, &realm) {
        Ok(principal) if principal.name.as_str() == name && principal.realm.as_str() == realm => {
            Some(Row { principal, id: EntryId(id), revision: Version(revision), blob: Blob(blob) })
        }
        _ => {
            error!(id, "a stored entry has an impossible name or realm, it is passed over");
            None
        }
    }
}

fn one(conn: &Connection, sql: &str, params: impl Params) -> Result<Option<Row>, StoreError> {
    conn.prepare_cached(sql)
        .and_then(|mut statement| statement.query_row(params, raw).optional())
        .map(|found| found.and_then(parse))
        .map_err(store_error)
}

pub(super) fn of_principal(conn: &Connection, who: &Principal) -> Result<Option<Row>, StoreError> {
    let sql = "SELECT id, realm, name, revision, blob FROM entries WHERE realm = ?1 AND name = ?2";
    one(conn, sql, [who.realm.as_str(), who.name.as_str()])
}

/// The row of a principal, if the file's history holds `position`.
pub(super) fn since(
    conn: &Connection,
    who: &Principal,
    position: &Position,
) -> Result<Option<Row>, StoreError> {
    let is_known = end(conn)? == *position
        || records(conn, Version(position.version.0.saturating_sub(1)), 1)?
            .first()
            .is_some_and(|r| r.version == position.version.0 && r.nonce == position.nonce.0);
    if !is_known {
        return Err(StoreError::Unreachable("its history is not the one that is followed".into()));
    }
    of_principal(conn, who)
}

pub(super) fn of_id(conn: &Connection, id: EntryId) -> Result<Option<Row>, StoreError> {
    if id > EntryId::MAX {
        return Ok(None);
    }
    one(conn, "SELECT id, realm, name, revision, blob FROM entries WHERE id = ?1", [id.0])
}

pub(super) fn after(
    conn: &Connection,
    after: Option<EntryId>,
    limit: usize,
) -> Result<Vec<Row>, StoreError> {
    let after = after.map_or(0, |id| id.min(EntryId::MAX).0);
    let sql = "SELECT id, realm, name, revision, blob FROM entries WHERE id > ?1 ORDER BY id";
    conn.prepare_cached(sql)
        .and_then(|mut statement| {
            let rows = statement.query_map([after], raw)?;
            rows.filter_map(|row| row.map(parse).transpose()).take(limit).collect()
        })
        .map_err(store_error)
}

/// Hands all rows to `take`, in groups; it says whether to go on. Without blobs these are empty.
pub(super) fn all(
    conn: &Connection,
    blobs: bool,
    mut take: impl FnMut(Vec<Row>) -> bool,
) -> Result<(), StoreError> {
    const GROUP: usize = 500;
    let sql = match blobs {
        true => "SELECT id, realm, name, revision, blob FROM entries",
        false => "SELECT id, realm, name, revision, x'' FROM entries",
    };
    let mut statement = conn.prepare_cached(sql).map_err(store_error)?;
    let mut found = statement.query_map([], raw).map_err(store_error)?;
    loop {
        let group: Vec<_> =
            found.by_ref().take(GROUP).collect::<Result<_, _>>().map_err(store_error)?;
        let end = group.len() < GROUP;
        if !take(group.into_iter().filter_map(parse).collect()) || end {
            return Ok(());
        }
    }
}

/// Up to `limit` records of the log after `version`.
pub(super) fn records(
    conn: &Connection,
    version: Version,
    limit: usize,
) -> Result<Vec<Record>, StoreError> {
    let sql = "SELECT version, nonce, previous, keys FROM log WHERE version > ?1 ORDER BY version";
    conn.prepare_cached(sql)
        .and_then(|mut statement| {
            let record = |row: &rusqlite::Row<'_>| {
                Ok(Record {
                    version: row.get(0)?,
                    nonce: row.get(1)?,
                    previous: row.get(2)?,
                    keys: row.get(3)?,
                })
            };
            statement.query_map([version.0], record)?.take(limit).collect()
        })
        .map_err(store_error)
}

pub(super) fn count(conn: &Connection) -> Result<u64, StoreError> {
    conn.query_row("SELECT count(*) FROM entries", [], |row| row.get(0)).map_err(store_error)
}

pub(super) fn next_id(conn: &Connection) -> Result<EntryId, StoreError> {
    conn.query_row("SELECT next_id FROM state", [], |row| row.get(0).map(EntryId))
        .map_err(store_error)
}

pub(super) fn raise_next_id(conn: &Connection, next: EntryId) -> Result<(), StoreError> {
    conn.execute("UPDATE state SET next_id = max(next_id, ?1)", [next.0])
        .map(drop)
        .map_err(store_error)
}

pub(super) fn reserve_id(conn: &Connection) -> Result<EntryId, StoreError> {
    conn.prepare_cached(
        "UPDATE state SET next_id = next_id + 1 WHERE next_id < ?1 RETURNING next_id - 1",
    )
    .and_then(|mut statement| statement.query_row([EntryId::MAX.0], |row| row.get(0)).optional())
    .map_err(store_error)?
    .map(EntryId)
    .ok_or_else(log::no_numbers_left)
}

/// Does a batch that [`log::check`] has passed.
pub(super) fn commit(
    conn: &mut Connection,
    phase: &Phase,
    batch: &[Mutation],
) -> Result<Version, StoreError> {
    let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate).map_err(store_error)?;
    let before = tail(&tx, phase)?;
    check_expectations(&tx, batch)?;
    let version = Version(before.version.0 + 1);
    write(&tx, batch, version, &before.nonce).map_err(store_error)?;
    tx.commit().map_err(commit_error)?;
    Ok(version)
}

fn check_expectations(tx: &Transaction<'_>, batch: &[Mutation]) -> Result<(), StoreError> {
    let deleted: HashSet<_> =
        batch.iter().filter(|m| m.action == Action::Delete).map(|m| &m.principal).collect();
    for Mutation { principal, expect, action } in batch {
        let found = match of_principal(tx, principal)? {
            Some(row) => Expect::At(row.revision),
            None => Expect::Absent,
        };
        if found != *expect {
            return Err(StoreError::Conflict);
        }
        let Action::Put { id, .. } = action else { continue };
        let owner = of_id(tx, *id)?.map(|row| row.principal);
        if owner.is_some_and(|owner| owner != *principal && !deleted.contains(&owner)) {
            return Err(StoreError::Conflict);
        }
    }
    Ok(())
}

fn write(
    tx: &Transaction<'_>,
    batch: &[Mutation],
    version: Version,
    previous: &Nonce,
) -> rusqlite::Result<()> {
    let nonce = Nonce::random();
    tx.prepare_cached("INSERT INTO log VALUES (?1, ?2, ?3, ?4)")?.execute(params![
        version.0,
        nonce.0,
        previous.0,
        log::keys_text(batch)
    ])?;
    tx.prepare_cached("DELETE FROM log WHERE version <= ?1")?
        .execute([version.0.saturating_sub(RETENTION)])?;
    // All old rows go first: a new one may take the number of one that is deleted here.
    let mut remove = tx.prepare_cached("DELETE FROM entries WHERE realm = ?1 AND name = ?2")?;
    for Mutation { principal, expect, .. } in batch {
        if *expect != Expect::Absent {
            remove.execute([principal.realm.as_str(), principal.name.as_str()])?;
        }
    }
    let mut insert = tx.prepare_cached("INSERT INTO entries VALUES (?1, ?2, ?3, ?4, ?5)")?;
    let mut largest_id = 0;
    for Mutation { principal, action, .. } in batch {
        let Action::Put { id, blob } = action else { continue };
        let (realm, name) = (principal.realm.as_str(), principal.name.as_str());
        insert.execute(params![id.0, realm, name, version.0, blob.0])?;
        largest_id = largest_id.max(id.0);
    }
    tx.prepare_cached("UPDATE state SET version = ?1, nonce = ?2, next_id = max(next_id, ?3)")?
        .execute(params![version.0, nonce.0, largest_id + 1])?;
    Ok(())
}
