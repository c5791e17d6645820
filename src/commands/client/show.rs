//! Results of `otpgate client`, for people and machines.

use std::io::{self, Write};

use crate::client::{ShownEntry, printable};
use crate::commands::look::Look;

/// Lines of a table that are written at once.
const PAGE: usize = 500;

pub(super) fn to_json(value: &impl serde::Serialize) -> String {
    let mut text = serde_json::to_string(value).expect("plain data serialises");
    text.push('\n');
    text
}

/// An entry, a line a field.
pub(super) fn one(entry: &ShownEntry, json: bool, look: Look) -> String {
    if json {
        return to_json(entry);
    }
    let id = entry.id.map(|id| id.to_string());
    let seed = entry.seed.as_ref().map(|seed| seed.expose().to_owned());
    let known = [
        ("id", id),
        ("name", Some(entry.name.clone())),
        ("realm", Some(entry.realm.clone())),
        ("seed", seed),
    ];
    let more = entry.more.iter().filter(|(_, value)| !value.is_null()).map(|(field, value)| {
        (field.as_str(), Some(value.as_str().map_or_else(|| value.to_string(), str::to_owned)))
    });
    let rows = known.into_iter().chain(more).filter_map(|(field, value)| Some((field, value?)));
    let heading = look.heading;
    rows.map(|(field, value)| {
        format!("{heading}{:<20}{heading:#}{}\n", printable(field), printable(&value))
    })
    .collect()
}

/// Prints entries one after the other.
pub(super) enum Lines {
    /// In columns.
    Table(Table),
    /// As an array; whether it was begun.
    Json(bool),
}

impl Lines {
    pub(super) fn table(seeds: bool, look: Look) -> Self {
        Self::Table(Table { seeds, look, widths: None, page: Vec::new() })
    }

    pub(super) fn json() -> Self {
        Self::Json(false)
    }

    pub(super) fn add(&mut self, entry: ShownEntry, out: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Table(table) => table.add(entry, out),
            Self::Json(begun) => {
                let text = serde_json::to_string(&entry).expect("plain data serialises");
                let before = if std::mem::replace(begun, true) { "," } else { "[" };
                write!(out, "{before}{text}")
            }
        }
    }

    pub(super) fn end(self, out: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Table(mut table) => table.flush(out),
            Self::Json(begun) => writeln!(out, "{}", if begun { "]" } else { "[]" }),
        }
    }
}

/// Entries in columns, which are as wide as the first page needs.
pub(super) struct Table {
    seeds: bool,
    look: Look,
    /// Known once the first page is written.
    widths: Option<[usize; 4]>,
    /// Not written yet.
    page: Vec<ShownEntry>,
}

impl Table {
    fn add(&mut self, entry: ShownEntry, out: &mut impl Write) -> io::Result<()> {
        self.page.push(entry);
        if self.page.len() < PAGE { Ok(()) } else { self.flush(out) }
    }

    fn flush(&mut self, out: &mut impl Write) -> io::Result<()> {
        let mut rows: Vec<_> = self.page.iter().map(cells).collect();
        let begins = self.widths.is_none();
        if begins {
            rows.insert(0, ["ID", "REALM", "NAME", "SEED"].map(str::to_owned));
        }
        let width = |column: usize| {
            rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default()
        };
        let widths = *self.widths.get_or_insert_with(|| [0, 1, 2, 3].map(width));
        let columns = if self.seeds { 4 } else { 3 };
        let Look { heading, bad, .. } = self.look;
        for (number, row) in rows.iter().enumerate() {
            let cells = row.iter().zip(widths).take(columns);
            let line: String = cells.map(|(cell, width)| format!("{cell:<width$}  ")).collect();
            match line.trim_end() {
                head if begins && number == 0 => writeln!(out, "{heading}{head}{heading:#}")?,
                line => writeln!(out, "{line}")?,
            }
        }
        for fault in self.page.drain(..).filter_map(|entry| fault(&entry)) {
            writeln!(out, "{bad}{fault}{bad:#}")?;
        }
        Ok(())
    }
}

fn cells(entry: &ShownEntry) -> [String; 4] {
    [
        entry.id.map_or_else(|| "-".to_owned(), |id| id.to_string()),
        printable(&entry.realm),
        printable(&entry.name),
        entry.seed.as_ref().map_or_else(|| "-".to_owned(), |seed| printable(seed.expose())),
    ]
}

/// What the server says is wrong with an entry.
fn fault(entry: &ShownEntry) -> Option<String> {
    let error = entry.more.get("error")?.as_str()?;
    Some(format!("{}: {}", entry.id?, printable(error)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn printed(mut lines: Lines, entries: &[ShownEntry]) -> String {
        let mut out = Vec::new();
        for entry in entries {
            lines.add(entry.clone(), &mut out).unwrap();
        }
        lines.end(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn long_lists_are_written_page_by_page() {
        let entry = |id: usize| {
            let json = json!({"id": id, "name": format!("n{id}"), "realm": "r"});
            serde_json::from_value::<ShownEntry>(json).unwrap()
        };
        let entries: Vec<_> = (1..=2 * PAGE + 1).map(entry).collect();
        let table = printed(Lines::table(false, Look::default()), &entries);
        assert_eq!(table.lines().count(), 1 + entries.len());
        assert_eq!(table.lines().next(), Some("ID   REALM  NAME"));
        assert_eq!(table.lines().last(), Some("1001  r      n1001"));
        let read = |entries: &[ShownEntry]| {
            serde_json::from_str::<Vec<ShownEntry>>(&printed(Lines::json(), entries)).unwrap()
        };
        assert_eq!(read(&entries), entries);
        assert_eq!(read(&[]), []);
        assert_eq!(printed(Lines::json(), &[]), "[]\n");
    }

    #[test]
    fn entries_are_printed_in_columns() {
        let entry = |json: Value| serde_json::from_value::<ShownEntry>(json).unwrap();
        let table =
            |entries: &[ShownEntry], seeds| printed(Lines::table(seeds, Look::default()), entries);
        let entries = [
            entry(json!({"id": 1, "name": "ü", "realm": "users", "seed": "AAAA"})),
            entry(json!({"name": "\u{1b}[2J", "realm": "r"})),
        ];
        assert_eq!(
            table(&entries, false),
            "ID  REALM  NAME\n1   users  ü\n-   r      \\u{1b}[2J\n"
        );
        assert!(table(&entries, true).contains("1   users  ü          AAAA\n"));
        let broken =
            entry(json!({"id": 5, "name": "a", "realm": "r", "seed": null, "error": "E."}));
        assert_eq!(table(&[broken], true), "ID  REALM  NAME  SEED\n5   r      a     -\n5: E.\n");
        let full =
            entry(json!({"id": 1, "name": "a", "realm": "b", "digits": 6, "expires_at": null}));
        assert_eq!(
            one(&full, false, Look::default()),
            "id                  1\nname                a\nrealm               b\ndigits              6\n"
        );
    }
}
