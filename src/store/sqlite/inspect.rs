//! Looks at all that is in the file, as one consistent picture.

use rusqlite::{Connection, TransactionBehavior};
use tokio::sync::mpsc;

use super::file::{Db, store_error, tail};
use super::rows;
use crate::entry::EntryId;
use crate::store::verify::LogWalk;
use crate::store::{Inspection, Problems, Row, StoreError, Version};

/// Records of the log that are read at once; each may name many entries.
const RECORDS: usize = 100;

pub(super) fn inspect(
    db: &mut Db,
    groups: &mpsc::Sender<Vec<Row>>,
) -> Result<Inspection, StoreError> {
    db.check_in_place()?;
    let tx =
        db.conn.transaction_with_behavior(TransactionBehavior::Deferred).map_err(store_error)?;
    let end = tail(&tx, &db.phase)?;
    let mut problems = Problems::default();
    check_file(&tx, &mut problems)?;
    let mut possible = 0;
    rows::all(&tx, true, |group| {
        possible += group.len() as u64;
        groups.blocking_send(group).is_ok()
    })?;
    let impossible = rows::count(&tx)?.saturating_sub(possible);
    if impossible > 0 {
        problems.add(format!("{impossible} entries have an impossible name or realm"));
    }
    let mut log = LogWalk::default();
    let mut after = Version(0);
    loop {
        let records = rows::records(&tx, after, RECORDS)?;
        let Some(last) = records.last() else { break };
        after = Version(last.version);
        for record in records {
            log.push(record, &mut problems);
        }
    }
    log.end(&end, &mut problems);
    let next_id: EntryId = rows::next_id(&tx)?;
    Ok(Inspection { before: end.clone(), after: end, next_id, problems, left_out: Vec::new() })
}

/// SQLite's own check: pages, indexes, constraints.
fn check_file(conn: &Connection, problems: &mut Problems) -> Result<(), StoreError> {
    let mut statement = conn.prepare("PRAGMA integrity_check").map_err(store_error)?;
    let lines = statement.query_map([], |row| row.get::<_, String>(0)).map_err(store_error)?;
    for line in lines {
        let line = line.map_err(store_error)?;
        if line != "ok" {
            problems.add(format!("the file is damaged: {line}"));
        }
    }
    Ok(())
}
