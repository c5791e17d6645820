//! The change log's records and the rules that every backend shares: how keys are written, how
//! records chain, which batches make sense.

use std::collections::HashSet;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::{Action, Mutation, Nonce, Position, StoreError, Version};
use crate::entry::{EntryId, Principal, PrincipalRef};

/// About how many records the log keeps; who is further behind loads everything.
pub(super) const RETENTION: u64 = 100_000;
/// The most changes of one batch: a batch holds all others up, and one record of the log names all of
/// its rows.
pub const MAX_BATCH: usize = 1_000;

const PLAIN: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'@');

/// `realm/name`, percent-encoded: distinct for distinct principals, and free of blanks and braces.
#[must_use]
pub fn key_of(who: PrincipalRef<'_>) -> String {
    let part = |text| utf8_percent_encode(text, PLAIN);
    format!("{}/{}", part(who.realm()), part(who.name()))
}

/// A realm or name as it stands in [`key_of`].
pub(super) fn encode(text: &str) -> String {
    utf8_percent_encode(text, PLAIN).to_string()
}

/// The principal that [`key_of`] made `key` from.
pub(super) fn principal_of(key: &str) -> Option<Principal> {
    let (realm, name) = key.split_once('/')?;
    let part = |text| percent_decode_str(text).decode_utf8().ok();
    let principal = Principal::parse(&part(name)?, &part(realm)?).ok()?;
    (key_of((&principal).into()) == key).then_some(principal)
}

/// What a record says about the rows that a batch changes.
pub(super) fn keys_text(batch: &[Mutation]) -> String {
    let keys: Vec<_> = batch.iter().map(|m| key_of((&m.principal).into())).collect();
    keys.join(" ")
}

/// Refuses batches that no backend can do.
pub(super) fn check(batch: &[Mutation]) -> Result<(), StoreError> {
    if batch.len() > MAX_BATCH {
        let refusal = format!("{} changes at once, at most {MAX_BATCH} are possible", batch.len());
        return Err(StoreError::Refused(refusal));
    }
    let mut principals = HashSet::with_capacity(batch.len());
    let mut ids = HashSet::with_capacity(batch.len());
    for mutation in batch {
        if !principals.insert(&mutation.principal) {
            return Err(StoreError::Refused(format!("{} twice at once", mutation.principal)));
        }
        let Action::Put { id, .. } = mutation.action else { continue };
        if id.0 == 0 || id > EntryId::MAX {
            return Err(StoreError::Refused(format!(
                "the number {id} is not between 1 and {}",
                EntryId::MAX
            )));
        }
        if !ids.insert(id) {
            return Err(StoreError::Refused(format!("the number {id} twice at once")));
        }
    }
    Ok(())
}

/// Somebody else ended the import that this process works on.
pub(super) fn ended() -> StoreError {
    StoreError::Refused("another process ended this import".into())
}

/// Reserving found no number left.
pub(super) fn no_numbers_left() -> StoreError {
    StoreError::Refused("no numbers are left for new entries".into())
}

/// One record of the log as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) version: u64,
    pub(super) nonce: String,
    pub(super) previous: String,
    pub(super) keys: String,
}

/// Follows records from a position on, as long as each one continues the one before.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) position: Position,
    pub(super) keys: HashSet<String>,
}

impl Chain {
    pub(super) fn from(position: &Position) -> Self {
        Self { position: position.clone(), keys: HashSet::new() }
    }

    /// Takes the next record in, or says why the place is lost.
    pub(super) fn push(&mut self, record: Record) -> Result<(), &'static str> {
        if record.version != self.position.version.0 + 1 {
            return Err("records are missing from the change log");
        }
        if record.previous != self.position.nonce.0 {
            return Err("the change log is not the one that was followed so far");
        }
        self.keys.extend(record.keys.split(' ').filter(|k| !k.is_empty()).map(str::to_owned));
        self.position = Position { version: Version(record.version), nonce: Nonce(record.nonce) };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Blob, Expect};
    use proptest::prelude::*;

    fn put(name: &str, id: u64) -> Mutation {
        Mutation {
            principal: Principal::parse(name, "r").unwrap(),
            expect: Expect::Absent,
            action: Action::Put { id: EntryId(id), blob: Blob::default() },
        }
    }

    fn record(version: u64, nonce: &str, previous: &str, keys: &str) -> Record {
        Record { version, nonce: nonce.into(), previous: previous.into(), keys: keys.into() }
    }

    #[test]
    fn a_chain_follows_only_what_continues_it() {
        let start = Position { version: Version(4), nonce: Nonce("d".into()) };
        let mut chain = Chain::from(&start);
        chain.push(record(5, "e", "d", "r/a r/b")).unwrap();
        chain.push(record(6, "f", "e", "r/a")).unwrap();
        assert_eq!(chain.position, Position { version: Version(6), nonce: Nonce("f".into()) });
        assert_eq!(chain.keys.len(), 2);
        for (broken, why) in [
            (record(6, "g", "f", ""), "a version that was already there"),
            (record(8, "g", "f", ""), "a gap"),
            (record(7, "g", "x", ""), "another log's record"),
        ] {
            assert!(chain.push(broken).is_err(), "{why}");
        }
        assert_eq!(chain.position.version, Version(6));
    }

    #[test]
    fn batches_that_contradict_themselves_are_refused() {
        assert_eq!(check(&[put("a", 1), put("b", 2)]), Ok(()));
        let refused = |batch: &[Mutation], why: &str| match check(batch) {
            Err(StoreError::Refused(text)) => assert!(text.contains(why), "{text}"),
            other => panic!("{other:?}"),
        };
        refused(&[put("a", 1), put("a", 2)], "a@r twice");
        refused(&[put("a", 1), put("b", 1)], "number 1 twice");
        let long: Vec<_> = (1..=1001).map(|i| put(&i.to_string(), i)).collect();
        refused(&long, "1001 changes");
        assert_eq!(check(&long[1..]), Ok(()));
        for id in [0, EntryId::MAX.0 + 1, u64::MAX] {
            assert!(matches!(check(&[put("a", id)]), Err(StoreError::Refused(_))), "{id}");
        }
        assert_eq!(check(&[put("a", EntryId::MAX.0)]), Ok(()));
    }

    #[test]
    fn keys_tell_principals_apart() {
        let key = |name, realm| key_of((&Principal::parse(name, realm).unwrap()).into());
        assert_ne!(key("a/b", "c"), key("b", "c/a"));
        assert_ne!(key("a%2Fb", "c"), key("a/b", "c"));
        assert_eq!(principal_of("c/a/b"), None);
        assert_eq!(principal_of("c/%61"), None, "not as key_of writes it");
        assert_eq!(principal_of("c/"), None);
        assert_eq!(principal_of("c/%ff"), None);
    }

    proptest! {
        #[test]
        fn every_key_leads_back(name in "\\PC{1,60}", realm in "\\PC{1,60}") {
            if let Ok(principal) = Principal::parse(&name, &realm) {
                let key = key_of((&principal).into());
                let safe = key.is_ascii() && !key.contains([' ', '{', '}', '*']);
                prop_assert!(safe, "{}", key);
                prop_assert_eq!(principal_of(&key), Some(principal));
            }
        }
    }
}
