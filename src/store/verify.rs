//! Whether what is stored agrees with itself, and sums of it to compare gates with.

use super::digest::Digest;
use super::log::{self, Chain, Record};
use super::{Nonce, Position, Row, Scope, Store, StoreError, Version};
use crate::entry::EntryId;

/// The most problems that are told one by one.
const MAX_NAMED: usize = 1_000;

/// What is wrong, as sentences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems {
    /// How many.
    pub count: u64,
    /// The first of them.
    pub named: Vec<String>,
}

impl Problems {
    /// One more.
    pub fn add(&mut self, problem: String) {
        self.count += 1;
        if self.named.len() < MAX_NAMED {
            self.named.push(problem);
        }
    }
}

/// What a backend found beside its rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// The end of the log when it began.
    pub before: Position,
    /// The end of the log when it was done; the same if nothing was written meanwhile.
    pub after: Position,
    /// The number that would be given next when it was done.
    pub next_id: EntryId,
    /// What does not agree.
    pub problems: Problems,
    /// What could not be looked at, as sentences.
    pub left_out: Vec<String>,
}

/// What a store holds and what is wrong with it.
#[derive(Clone, Debug)]
pub struct Verified {
    /// The end of the log when the look was over.
    pub position: Position,
    /// Nothing was written during the look: the sums are those of `position`.
    pub still: bool,
    /// Sums of what is in each scope that was asked for.
    pub sums: Vec<Digest>,
    /// How many entries there are.
    pub entries: u64,
    /// What is wrong.
    pub problems: Problems,
    /// What could not be looked at, as sentences.
    pub left_out: Vec<String>,
}

impl Store {
    /// Looks at everything once, in bounded memory. `progress` hears how many entries were looked at.
    ///
    /// # Errors
    /// As the backend.
    pub async fn verify(
        &self,
        scopes: &[Scope],
        mut progress: impl FnMut(u64) + Send,
    ) -> Result<Verified, StoreError> {
        let mut sums = vec![Digest::default(); scopes.len()];
        let (mut entries, mut newest) = (0, Version(0));
        let (mut last_id, mut problems) = (EntryId(0), Problems::default());
        let mut take = |row: Row| {
            entries += 1;
            newest = newest.max(row.revision);
            last_id = last_id.max(row.id);
            for (scope, sum) in scopes.iter().zip(&mut sums) {
                if scope.has(row.principal.realm.as_str()) {
                    sum.add_row(&row);
                }
            }
            if let Err(error) = self.unseal(&row) {
                problems.add(error.to_string());
            }
            progress(entries);
        };
        let found = self.timed("inspect", self.backend.inspect(&mut take)).await?;
        // What is written during the look moves the end of the log, the next number too.
        if newest > found.after.version {
            problems.add(format!(
                "an entry has revision {newest}, the change log ends at {}",
                found.after.version
            ));
        }
        // The largest number of all has none after it.
        if last_id >= found.next_id && last_id < EntryId::MAX {
            problems.add(format!("the next id is {}, but {last_id} is in use", found.next_id));
        }
        for problem in &found.problems.named {
            problems.add(problem.clone());
        }
        problems.count += found.problems.count - found.problems.named.len() as u64;
        Ok(Verified {
            still: found.before == found.after,
            position: found.after,
            sums,
            entries,
            problems,
            left_out: found.left_out,
        })
    }
}

/// Goes through the change log from its first record that is left.
#[derive(Default)]
pub(super) struct LogWalk {
    /// The last record, if there was one.
    at: Option<Position>,
}

impl LogWalk {
    pub(super) fn push(&mut self, record: Record, problems: &mut Problems) {
        let version = record.version;
        let nonce = Nonce(record.nonce.clone());
        let start = self.at.take().unwrap_or_else(|| match version {
            // The first record of all must begin at the origin; any other follows what was cut off.
            0 | 1 => Position { version: Version(0), nonce: Nonce(Nonce::ORIGIN.to_owned()) },
            _ => {
                let version = Version(version - 1);
                Position { version, nonce: Nonce(record.previous.clone()) }
            }
        });
        let mut chain = Chain::from(&start);
        match chain.push(record) {
            Err(why) => problems.add(format!("at record {version} of the change log: {why}")),
            Ok(()) if chain.keys.iter().any(|key| log::principal_of(key).is_none()) => {
                problems.add(format!("record {version} of the change log names no entry"));
            }
            Ok(()) => {}
        }
        self.at = Some(Position { version: Version(version), nonce });
    }

    /// Whether the log ends at `end`. After an import, or where it was cut, it is empty.
    pub(super) fn end(self, end: &Position, problems: &mut Problems) {
        if self.at.is_some_and(|last| last != *end) {
            problems.add("the change log does not end where the last write is said to be".into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(version: u64, nonce: &str, previous: &str, keys: &str) -> Record {
        Record { version, nonce: nonce.into(), previous: previous.into(), keys: keys.into() }
    }

    fn walk(records: &[Record], end: (u64, &str)) -> Vec<String> {
        let (mut walk, mut problems) = (LogWalk::default(), Problems::default());
        for record in records {
            walk.push(record.clone(), &mut problems);
        }
        let end = Position { version: Version(end.0), nonce: Nonce(end.1.into()) };
        walk.end(&end, &mut problems);
        problems.named
    }

    #[test]
    fn a_log_must_chain_up_to_its_end() {
        let good = [record(1, "a", "origin", "r/x"), record(2, "b", "a", "r/x r/y")];
        assert_eq!(walk(&good, (2, "b")), [""; 0]);
        assert_eq!(walk(&good[1..], (2, "b")), [""; 0], "what is old is cut off");
        assert_eq!(walk(&[], (2, "b")), [""; 0]);
        for (records, end, what) in [
            (vec![record(1, "a", "x", "")], (1, "a"), "begins elsewhere"),
            (vec![good[0].clone(), record(3, "c", "b", "")], (3, "c"), "a gap"),
            (vec![good[0].clone(), record(2, "b", "z", "")], (2, "b"), "another log"),
            (good.to_vec(), (2, "c"), "another end"),
            (good.to_vec(), (3, "b"), "another end"),
            (vec![record(5, "e", "d", "no-key")], (5, "e"), "no entry"),
        ] {
            assert_eq!(walk(&records, end).len(), 1, "{what}");
        }
    }

    #[test]
    fn problems_are_counted_even_when_they_are_not_named() {
        let mut problems = Problems::default();
        (0..1_005).for_each(|n| problems.add(n.to_string()));
        assert_eq!((problems.count, problems.named.len()), (1_005, 1_000));
    }
}
