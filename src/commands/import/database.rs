//! The database of ungleich-otp, as Django keeps it in SQLite (`db.sqlite3`). Only read; the server may
//! run meanwhile.

use std::path::Path;

use rusqlite::config::DbConfig;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags, Row};
use zeroize::Zeroizing;

use super::dump::{Fields, Record};
use crate::cli::Failure;
use crate::entry::EntryId;

/// How the name of the table ends: before it stands the app's, which may have been renamed.
const TABLE: &str = "%\\_otpseed";
/// A longer text is no name, realm or seed.
const MAX_BYTES: usize = 4096;

/// What the database holds.
pub(super) struct Database {
    /// Its entries, in order of pk.
    pub(super) records: Vec<Record>,
    /// No pk from here on was ever given; `None`: it does not say.
    pub(super) next_id: Option<EntryId>,
}

/// Reads all of it.
///
/// # Errors
/// If it is no database of ungleich-otp.
pub(super) fn read(path: &Path) -> Result<Database, Failure> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = Connection::open_with_flags(path, flags)?;
    // The file may be anybody's: nothing that it defines is run.
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    let table = table(&conn)?;
    let mut statement =
        conn.prepare(&format!("SELECT id, name, realm, seed FROM \"{table}\" ORDER BY id"))?;
    let mut rows = statement.query([])?;
    let mut records = Vec::new();
    while let Some(row) = rows.next()? {
        records.push(Record { number: records.len() + 1, said: said(row) });
    }
    Ok(Database { records, next_id: next_id(&conn, &table) })
}

/// SQLite remembers the largest number of a table whose numbers are never used twice, as Django asks for.
fn next_id(conn: &Connection, table: &str) -> Option<EntryId> {
    let sql = "SELECT seq FROM sqlite_sequence WHERE name = ?1";
    let largest: u64 = conn.query_row(sql, [table], |row| row.get(0)).ok()?;
    Some(EntryId(largest.saturating_add(1))).filter(|id| *id <= EntryId::MAX)
}

/// The one table of entries; its name needs no escapes.
fn table(conn: &Connection) -> Result<String, Failure> {
    let sql = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name LIKE ?1 ESCAPE '\\' \
               AND sql NOT LIKE 'CREATE VIRTUAL%' AND name NOT LIKE '%\"%'";
    let mut statement = conn.prepare(sql)?;
    let names: Vec<String> =
        statement.query_map([TABLE], |row| row.get(0))?.collect::<Result<_, _>>()?;
    match <[String; 1]>::try_from(names) {
        Ok([name]) => Ok(name),
        Err(names) if names.is_empty() => {
            Err("not of ungleich-otp, it has no table `..._otpseed`".into())
        }
        Err(names) => Err(format!(
            "it has several tables of entries ({}): give what `manage.py dumpdata` writes of one",
            names.join(", ")
        )
        .into()),
    }
}

fn said(row: &Row<'_>) -> Option<(Option<u64>, Fields)> {
    let text = |column| match row.get_ref(column) {
        Ok(ValueRef::Text(text)) if text.len() <= MAX_BYTES => {
            std::str::from_utf8(text).ok().map(str::to_owned)
        }
        _ => None,
    };
    let id = match row.get_ref(0) {
        Ok(ValueRef::Integer(id)) => u64::try_from(id).ok(),
        _ => None,
    };
    let (name, realm, seed) = (text(1)?, text(2)?, text(3)?);
    Some((id, Fields { name, realm, seed: Zeroizing::new(seed) }))
}
