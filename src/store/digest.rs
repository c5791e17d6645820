//! Short prints of entries, and sums of them: whether two places hold the same is seen without sending it.
//!
//! Sums do not depend on an order, so a map and a walk by number can be compared. They show mistakes and
//! damage; they prove nothing against somebody who makes entries for that purpose.

use ring::digest::{SHA256, digest};

use super::{Row, log};
use crate::entry::PrincipalRef;

/// Bytes of a [`NamePrint`]: among ten million names, two have the same print with a probability of 10^-15.
pub const PRINT_BYTES: usize = 12;

/// The beginning of the SHA-256 of a principal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamePrint(pub [u8; PRINT_BYTES]);

impl NamePrint {
    /// That of `who`.
    #[must_use]
    pub fn of(who: PrincipalRef<'_>) -> Self {
        Self::of_key(&log::key_of(who))
    }

    /// That of the principal whose [`log::key_of`] is `key`.
    #[must_use]
    pub fn of_key(key: &str) -> Self {
        Self(beginning(key.as_bytes()))
    }
}

/// The print of all that is stored of an entry: whose it is, its number, revision and blob.
#[must_use]
pub fn contents_of(row: &Row) -> u64 {
    let Row { principal, id, revision, blob } = row;
    let mut text = format!("{} {id} {revision} ", log::key_of(principal.into())).into_bytes();
    text.extend_from_slice(&blob.0);
    u64::from_be_bytes(beginning(&text))
}

fn beginning<const N: usize>(text: &[u8]) -> [u8; N] {
    *digest(&SHA256, text).as_ref().first_chunk().expect("SHA-256 has 32 bytes")
}

/// What a place holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest {
    /// How many entries.
    pub entries: u64,
    /// Sum of the beginnings of their [`NamePrint`]s.
    pub names: u64,
    /// Sum of their [`contents_of`].
    pub contents: u64,
}

impl Digest {
    /// Counts an entry in.
    pub fn add(&mut self, name: NamePrint, contents: u64) {
        let start = name.0.first_chunk().expect("a print is longer");
        self.entries += 1;
        self.names = self.names.wrapping_add(u64::from_be_bytes(*start));
        self.contents = self.contents.wrapping_add(contents);
    }

    /// Counts a row in.
    pub fn add_row(&mut self, row: &Row) {
        self.add(NamePrint::of((&row.principal).into()), contents_of(row));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{EntryId, Principal};
    use crate::store::{Blob, Version};

    fn row(name: &str) -> Row {
        let principal = Principal::parse(name, "r").unwrap();
        Row { principal, id: EntryId(1), revision: Version(2), blob: Blob(b"x".into()) }
    }

    fn digest_of(rows: &[Row]) -> Digest {
        let mut digest = Digest::default();
        rows.iter().for_each(|row| digest.add_row(row));
        digest
    }

    #[test]
    fn everything_counts_but_the_order() {
        let (a, b) = (row("a"), row("b"));
        let both = digest_of(&[a.clone(), b.clone()]);
        assert_eq!(both, digest_of(&[b.clone(), a.clone()]));
        assert_ne!(both.names, digest_of(&[a.clone(), row("c")]).names);
        for other in [
            Row { id: EntryId(2), ..b.clone() },
            Row { revision: Version(3), ..b.clone() },
            Row { blob: Blob(b"y".into()), ..b },
        ] {
            let changed = digest_of(&[a.clone(), other]);
            assert_eq!((changed.entries, changed.names), (both.entries, both.names));
            assert_ne!(changed.contents, both.contents);
        }
    }
}
