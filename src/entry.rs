//! Entries and their parts: parsed once at the edge, valid ever after.

use std::fmt;
use std::hash::{Hash, Hasher};

use data_encoding::{Encoding, Specification};
use icu_normalizer::ComposingNormalizerBorrowed;
#[cfg(feature = "server")]
use papaya::Equivalent;
use serde::{Deserialize, Serialize};
use std::sync::LazyLock;
use zeroize::Zeroizing;

use crate::clock::UnixTime;

/// The longest name or realm, in characters, as in ungleich-otp.
pub const MAX_CHARS: usize = 128;

/// Why a text is no name, realm, seed or comment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Nothing left after trimming.
    #[error("is empty")]
    Empty,
    /// More than so many characters.
    #[error("has more than {0} characters")]
    TooLong(usize),
    /// A NUL character.
    #[error("contains a null character")]
    Null,
    /// A control character.
    #[error("contains a control character")]
    Control,
    /// A seed that is not base32 (RFC 4648).
    #[error("is not base32")]
    NotBase32,
}

/// Trims `text` and checks the rules that names and realms share.
fn check_label(text: &str) -> Result<&str, Invalid> {
    let is_plain = |byte: u8| byte.is_ascii_graphic();
    if (1..=MAX_CHARS).contains(&text.len()) && text.bytes().all(is_plain) {
        return Ok(text);
    }
    check_characters(text)
}

fn check_characters(text: &str) -> Result<&str, Invalid> {
    let text = text.trim();
    if text.is_empty() {
        return Err(Invalid::Empty);
    }
    if text.chars().count() > MAX_CHARS {
        return Err(Invalid::TooLong(MAX_CHARS));
    }
    if text.contains('\0') {
        return Err(Invalid::Null);
    }
    if text.chars().any(is_unprintable) {
        return Err(Invalid::Control);
    }
    Ok(text)
}

/// Whether a character is a control or an invisible one. Those are format characters that make two texts
/// look alike: zero-width, bidirectional, line separators, soft hyphen, BOM.
#[must_use]
pub fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Whether a text is in Unicode normalisation form C. Names are compared byte by byte: a new one in another
/// form would look like one that is there, and be somebody else.
#[must_use]
pub fn is_nfc(text: &str) -> bool {
    ComposingNormalizerBorrowed::new_nfc().is_normalized(text)
}

macro_rules! label {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            /// Trims and checks `text`.
            ///
            /// # Errors
            /// What is wrong with it.
            pub fn parse(text: &str) -> Result<Self, Invalid> {
                check_label(text).map(|t| Self(t.into()))
            }

            /// The text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = Invalid;
            fn try_from(text: String) -> Result<Self, Invalid> {
                Self::parse(&text)
            }
        }

        impl From<$name> for String {
            fn from(label: $name) -> String {
                label.0.into()
            }
        }
    };
}

label!(
    /// The name of an entry, unique within its realm; byte-exact, case-sensitive.
    Name
);
label!(
    /// A namespace of principals.
    Realm
);

/// The identity that a request claims; proof is a [`crate::verifier::Permit`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Principal {
    /// Its realm.
    pub realm: Realm,
    /// Its name within the realm.
    pub name: Name,
}

impl Principal {
    /// Parses both halves.
    ///
    /// # Errors
    /// What is wrong with the first bad half.
    pub fn parse(name: &str, realm: &str) -> Result<Self, Invalid> {
        Ok(Self { realm: Realm::parse(realm)?, name: Name::parse(name)? })
    }
}

impl fmt::Display for Principal {
    /// `name@realm`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.realm)
    }
}

/// A principal that borrows its parts: what look-ups take, so that a request allocates nothing.
///
/// The parts must have passed [`PrincipalRef::parse`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrincipalRef<'a> {
    realm: &'a str,
    name: &'a str,
}

impl<'a> PrincipalRef<'a> {
    /// Trims and checks both halves.
    ///
    /// # Errors
    /// What is wrong with the first bad half.
    pub fn parse(name: &'a str, realm: &'a str) -> Result<Self, Invalid> {
        Ok(Self { realm: check_label(realm)?, name: check_label(name)? })
    }

    /// Of parts that were checked before.
    #[cfg(feature = "server")]
    pub(crate) fn of_checked(realm: &'a str, name: &'a str) -> Self {
        Self { realm, name }
    }

    /// The realm.
    #[must_use]
    pub fn realm(&self) -> &'a str {
        self.realm
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// An owned copy.
    #[must_use]
    pub fn to_owned(self) -> Principal {
        Principal { realm: Realm(self.realm.into()), name: Name(self.name.into()) }
    }
}

impl<'a> From<&'a Principal> for PrincipalRef<'a> {
    fn from(p: &'a Principal) -> Self {
        Self { realm: p.realm.as_str(), name: p.name.as_str() }
    }
}

impl Hash for PrincipalRef<'_> {
    /// Exactly as the derived `Hash` of [`Principal`].
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.realm.hash(state);
        self.name.hash(state);
    }
}

#[cfg(feature = "server")]
impl Equivalent<Principal> for PrincipalRef<'_> {
    fn equivalent(&self, key: &Principal) -> bool {
        self.realm == key.realm.as_str() && self.name == key.name.as_str()
    }
}

/// The number of an entry in the API; given in order of creation, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EntryId(pub u64);

impl EntryId {
    /// The largest id that every store keeps exactly (Redis scores are doubles).
    pub const MAX: Self = Self(1 << 53);
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// RFC 4648 base32 without padding. Spare bits of the last character are ignored: ungleich-otp's
/// 26-character seeds carry two of them, and every TOTP client ignores them too.
static BASE32: LazyLock<Encoding> = LazyLock::new(|| {
    let mut spec = Specification::new();
    spec.symbols.push_str("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567");
    spec.check_trailing_bits = false;
    spec.encoding().expect("the alphabet is complete")
});

/// The secret shared by a service and the gate (K of RFC 4226), as upper-case base32 text.
///
/// Cannot print itself; wiped when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Seed(Zeroizing<String>);

impl Seed {
    /// How many random bytes a new seed has: 160 bits, as RFC 4226 section 4 recommends.
    pub const BYTES: usize = 20;
    /// The longest seed text taken.
    pub const MAX_CHARS: usize = 256;

    /// Parses base32 in any case, with or without padding, blanks and hyphens between groups.
    ///
    /// # Errors
    /// If nothing is left, it is too long, or it is not base32.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        if text.len() > Self::MAX_CHARS {
            return Err(Invalid::TooLong(Self::MAX_CHARS));
        }
        let mut clean = Zeroizing::new(String::with_capacity(text.len()));
        clean.extend(
            text.trim()
                .trim_end_matches('=')
                .chars()
                .filter(|c| !matches!(c, ' ' | '-'))
                .map(|c| c.to_ascii_uppercase()),
        );
        if clean.is_empty() {
            return Err(Invalid::Empty);
        }
        let seed = Self(clean);
        match BASE32.decode(seed.0.as_bytes()) {
            Ok(bytes) => drop(Zeroizing::new(bytes)),
            Err(_) => return Err(Invalid::NotBase32),
        }
        Ok(seed)
    }

    /// A new random seed of 160 bits from the operating system's generator.
    #[must_use]
    pub fn random() -> Self {
        let mut bytes = Zeroizing::new([0_u8; Self::BYTES]);
        crate::secret::fill_random(bytes.as_mut_slice());
        Self(Zeroizing::new(BASE32.encode(bytes.as_slice())))
    }

    /// The base32 text; the name says that care is due.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// The decoded bytes.
    #[must_use]
    pub fn bytes(&self) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(BASE32.decode(self.0.as_bytes()).expect("checked by parse"))
    }
}

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[seed]")
    }
}

/// The HMAC of RFC 6238 section 1.2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
#[cfg_attr(feature = "server", derive(clap::ValueEnum), value(rename_all = "UPPER"))]
pub enum Algorithm {
    /// HMAC-SHA-1: what every client knows.
    #[default]
    Sha1,
    /// HMAC-SHA-256.
    Sha256,
    /// HMAC-SHA-512.
    Sha512,
}

impl Algorithm {
    /// As in `otpauth://` URIs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sha1 => "SHA1",
            Self::Sha256 => "SHA256",
            Self::Sha512 => "SHA512",
        }
    }
}

/// Numbers of digits that a token may have (RFC 4226 section 5.3).
pub const DIGITS: std::ops::RangeInclusive<u8> = 6..=8;
/// Lengths of a time step that an entry may have, in seconds.
pub const PERIOD_SECONDS: std::ops::RangeInclusive<u32> = 5..=3600;
/// The longest comment, in characters.
pub const MAX_COMMENT_CHARS: usize = 1024;

/// The stored record of one principal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its number in the API.
    pub id: EntryId,
    /// Whom it proves.
    pub principal: Principal,
    /// The shared secret.
    pub seed: Seed,
    /// Which of the entry's seeds that is: 0 for the first, one more with every rotation.
    pub serial: u32,
    /// The seed before the last rotation, while it is still accepted.
    pub previous: Option<Retiring>,
    /// Settings of its own; unset ones follow its realm's.
    pub overrides: Overrides,
    /// A disabled entry is refused like an unknown one.
    pub enabled: bool,
    /// When it was made.
    pub created_at: UnixTime,
    /// When it was last changed.
    pub updated_at: UnixTime,
    /// From when on it is refused.
    pub expires_at: Option<UnixTime>,
    /// For people.
    pub comment: String,
}

/// A seed that was replaced, but is accepted for a while, so that its holders can change over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retiring {
    /// The shared secret.
    pub seed: Seed,
    /// As [`Entry::serial`].
    pub serial: u32,
    /// From when on it is refused.
    pub until: UnixTime,
}

/// Which seed is accepted beside a new one, where a rotation comes before the last one's overlap is
/// over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "server", derive(clap::ValueEnum))]
pub enum Keep {
    /// The newest one so far: callers have changed over to it.
    Current,
    /// The one before it: nobody uses the newest one yet.
    Previous,
}

/// A rotation would drop a seed that callers may use; see [`Entry::rotate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an earlier rotation overlaps until {until}")]
pub struct Overlapping {
    /// When the earlier overlap ends.
    pub until: UnixTime,
}

/// The longest time for which two seeds of an entry are accepted, in seconds: 90 days.
pub const MAX_OVERLAP_SECONDS: u64 = 90 * 24 * 3600;

/// Token settings that an entry may have for itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Overrides {
    /// HMAC algorithm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<Algorithm>,
    /// Digits of a token, in [`DIGITS`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digits: Option<u8>,
    /// Seconds of a time step, in [`PERIOD_SECONDS`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub period: Option<u32>,
}

impl Entry {
    /// A new enabled entry with nothing but the essentials.
    #[must_use]
    pub fn new(id: EntryId, principal: Principal, seed: Seed, now: UnixTime) -> Self {
        Self {
            id,
            principal,
            seed,
            serial: 0,
            previous: None,
            overrides: Overrides::default(),
            enabled: true,
            created_at: now,
            updated_at: now,
            expires_at: None,
            comment: String::new(),
        }
    }

    /// The entry with `seed` as its newest one. The one before is accepted for `overlap` seconds
    /// more; with 0, every older seed is refused at once.
    ///
    /// # Errors
    /// If an earlier rotation still overlaps, `overlap` is not 0, and nothing is said about which
    /// seed to keep.
    pub fn rotate(
        &self,
        seed: Seed,
        overlap: u64,
        keep: Option<Keep>,
        now: UnixTime,
    ) -> Result<Self, Overlapping> {
        let until = now.saturating_add(overlap);
        let running = self.previous.as_ref().filter(|previous| previous.until > now);
        let kept = match (running, keep) {
            _ if overlap == 0 => None,
            (Some(previous), None) => return Err(Overlapping { until: previous.until }),
            (Some(previous), Some(Keep::Previous)) => Some((&previous.seed, previous.serial)),
            _ => Some((&self.seed, self.serial)),
        };
        let previous = kept.map(|(seed, serial)| Retiring { seed: seed.clone(), serial, until });
        let serial = self.serial.wrapping_add(1);
        Ok(Self { seed, serial, previous, updated_at: now, ..self.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::hash_map::RandomState;
    use std::hash::BuildHasher;

    #[test]
    fn labels_are_trimmed_and_bounded() {
        assert_eq!(Name::parse("  alice \t\n").unwrap().as_str(), "alice");
        assert_eq!(Name::parse(&"ü".repeat(128)).unwrap().as_str().chars().count(), 128);
        assert_eq!(Name::parse(&"ü".repeat(129)), Err(Invalid::TooLong(128)));
        assert_eq!(Name::parse("  "), Err(Invalid::Empty));
        assert_eq!(Name::parse("a\0b"), Err(Invalid::Null));
        assert_eq!(Name::parse("a\x1bb"), Err(Invalid::Control));
        assert_eq!(Name::parse("a\u{200b}b"), Err(Invalid::Control));
        assert_eq!(Name::parse("a\u{202e}b"), Err(Invalid::Control));
        assert!(Name::parse("a/b.c@d\"<b>'&\\").is_ok());
    }

    #[test]
    fn a_borrowed_principal_finds_the_owned_one() {
        let owned = Principal::parse("alice", "staff").unwrap();
        let borrowed = PrincipalRef::parse(" alice", "staff ").unwrap();
        let hasher = RandomState::new();
        assert_eq!(hasher.hash_one(&owned), hasher.hash_one(borrowed));
        assert!(borrowed.equivalent(&owned));
        assert_eq!(borrowed.to_owned(), owned);
        let swapped = PrincipalRef::parse("staff", "alice").unwrap();
        assert!(!swapped.equivalent(&owned));
    }

    #[test]
    fn seeds_of_every_age_are_taken() {
        for (text, bytes) in [
            ("JBSWY3DPEHPK3PXP", 10),
            ("GEZDGNBVGY3TQOJQGEZDGNBVGY", 16),
            ("GEZDGNBVGY3TQOJQGEZDGNBVGY======", 16),
            ("gezdgnbvgy3tqojqgezdgnbvgy3tqojq", 20),
            ("GEZD GNBV GY3T QOJQ GEZD GNBV GY3T QOJQ", 20),
            // spare bits of the last character are set: still the same 16 bytes
            ("GEZDGNBVGY3TQOJQGEZDGNBVGZ", 16),
        ] {
            assert_eq!(Seed::parse(text).unwrap().bytes().len(), bytes, "{text}");
        }
        assert_eq!(
            Seed::parse("gezd gnbv").unwrap().expose(),
            Seed::parse("GEZDGNBV").unwrap().expose()
        );
        for bad in ["0189018901890189018901890189018!", "not base32 at all!", "A", "ABC", "ABCDEF="]
        {
            assert_eq!(Seed::parse(bad), Err(Invalid::NotBase32), "{bad}");
        }
        assert_eq!(Seed::parse(""), Err(Invalid::Empty));
        assert_eq!(Seed::parse("===="), Err(Invalid::Empty));
        assert_eq!(Seed::parse(&"A".repeat(257)), Err(Invalid::TooLong(256)));
    }

    #[test]
    fn new_seeds_have_160_bits_and_differ() {
        let (a, b) = (Seed::random(), Seed::random());
        assert_eq!(a.expose().len(), 32);
        assert_eq!(a.bytes().len(), 20);
        assert_ne!(a, b);
    }

    #[test]
    fn seeds_do_not_print() {
        let entry = Entry::new(
            EntryId(1),
            Principal::parse("a", "b").unwrap(),
            Seed::parse("JBSWY3DPEHPK3PXP").unwrap(),
            0,
        );
        assert!(!format!("{entry:?}").contains("JBSWY3DPEHPK3PXP"));
    }

    /// The serials of the seeds that are accepted at `at`, newest first.
    fn accepted(entry: &Entry, at: UnixTime) -> Vec<u32> {
        let previous = entry.previous.as_ref().filter(|previous| previous.until > at);
        std::iter::once(entry.serial).chain(previous.map(|previous| previous.serial)).collect()
    }

    proptest! {
        #[test]
        fn plain_labels_are_taken_as_all_others_are(
            text in "([ -~]|[!-~]{1,60}|\u{fc}|\0|\x7f|\u{200b}){0,4}",
        ) {
            prop_assert_eq!(check_label(&text), check_characters(&text));
        }

        /// Whatever is rotated when: the newest seed is accepted, at most one other is, no two seeds
        /// share a number, and none that was accepted ends without being asked for.
        #[test]
        fn rotations_drop_no_seed_unasked(
            steps in proptest::collection::vec((0_u64..200, 0_u64..100, 0_u8..3), 1..30),
        ) {
            let who = Principal::parse("a", "b").unwrap();
            let mut entry = Entry::new(EntryId(1), who, Seed::random(), 1000);
            let mut now = 1000;
            for (pause, overlap, keep) in steps {
                now += pause;
                let keep = [None, Some(Keep::Current), Some(Keep::Previous)][usize::from(keep)];
                let before = accepted(&entry, now);
                let seed = Seed::random();
                let Ok(next) = entry.rotate(seed.clone(), overlap, keep, now) else {
                    prop_assert!(before.len() == 2 && keep.is_none() && overlap > 0);
                    continue;
                };
                let after = accepted(&next, now);
                prop_assert_eq!(&next.seed, &seed);
                prop_assert!(!before.contains(&next.serial));
                prop_assert_eq!(after[0], next.serial);
                let kept = match (overlap, keep) {
                    (0, _) => None,
                    (_, Some(Keep::Previous)) => before.last(),
                    _ => before.first(),
                };
                prop_assert_eq!(after.get(1), kept);
                prop_assert_eq!(accepted(&next, now + overlap), vec![next.serial]);
                entry = next;
            }
        }
    }
}
