//! Results of `otpgate client`, for people and machines.

use crate::client::{ShownEntry, printable};

pub(super) fn to_json(value: &impl serde::Serialize) -> String {
    let mut text = serde_json::to_string(value).expect("plain data serialises");
    text.push('\n');
    text
}

/// An entry, a line a field.
pub(super) fn one(entry: &ShownEntry, json: bool) -> String {
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
    rows.map(|(field, value)| format!("{field:<20}{}\n", printable(&value))).collect()
}

/// Entries in columns.
pub(super) fn table(entries: &[ShownEntry], seeds: bool) -> String {
    let mut rows = vec![["ID", "REALM", "NAME", "SEED"].map(str::to_owned)];
    rows.extend(entries.iter().map(|entry| {
        [
            entry.id.map_or_else(|| "-".to_owned(), |id| id.to_string()),
            printable(&entry.realm),
            printable(&entry.name),
            entry.seed.as_ref().map_or_else(|| "-".to_owned(), |seed| printable(seed.expose())),
        ]
    }));
    let columns = if seeds { 4 } else { 3 };
    let width = |column: usize| {
        rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default()
    };
    let widths = [0, 1, 2, 3].map(width);
    let lines = rows.iter().map(|row| {
        let cells = row.iter().zip(widths).take(columns);
        let line: String = cells.map(|(cell, width)| format!("{cell:<width$}  ")).collect();
        format!("{}\n", line.trim_end())
    });
    lines.chain(entries.iter().filter_map(fault)).collect()
}

/// What the server says is wrong with an entry.
fn fault(entry: &ShownEntry) -> Option<String> {
    let error = entry.more.get("error")?.as_str()?;
    Some(format!("{}: {}\n", entry.id?, printable(error)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn entries_are_printed_in_columns() {
        let entry = |json: Value| serde_json::from_value::<ShownEntry>(json).unwrap();
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
            one(&full, false),
            "id                  1\nname                a\nrealm               b\ndigits              6\n"
        );
    }
}
