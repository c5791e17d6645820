//! Authenticated encryption of stored entries: AES-256-GCM over the whole payload.
//!
//! A blob is `format (1 byte) ‖ key id (4) ‖ nonce (12) ‖ ciphertext and tag`, or, where sealing is
//! off, `format (1) ‖ payload`. The associated data are the length-prefixed format, key id, realm,
//! name and entry id, so a blob that is moved to another name does not open.

use std::fmt;

use data_encoding::BASE64;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::digest;
use zeroize::Zeroizing;

use crate::entry::{EntryId, Principal};
use crate::secret::fill_random;

const PLAIN: u8 = 0;
const AES_GCM: u8 = 1;
const KEY_ID_LEN: usize = 4;
const NONCE_LEN: usize = 12;
/// Bytes of a sealing key.
pub const KEY_LEN: usize = 32;

/// Why a blob does not open or a key cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// Sealed with a key that is not configured.
    #[error(
        "sealed with the unknown key `{0}`: add it to `store.key_file` or `store.old_key_files`"
    )]
    UnknownKey(String),
    /// Changed, cut or moved to another name.
    #[error("the stored blob does not open: it was changed, or moved to another name")]
    Broken,
    /// Not sealed, though sealing is on.
    #[error("the stored entry is not sealed, though `store.sealing` is on")]
    NotSealed,
    /// Key text that is not 32 bytes in base64.
    #[error("is not a sealing key: 32 bytes in base64 are needed (`openssl rand -base64 32`)")]
    BadKey,
}

/// Says which key it is without saying anything about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyId([u8; KEY_ID_LEN]);

impl KeyId {
    /// Which key sealed a blob; `None` if it is not sealed.
    #[must_use]
    pub fn of(blob: &[u8]) -> Option<Self> {
        let sealed = blob.strip_prefix(&[AES_GCM])?;
        sealed.first_chunk().map(|id| Self(*id))
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
    }
}

/// Whether a blob is one of a store without sealing: whoever reads it has the seed.
#[must_use]
pub fn is_plain(blob: &[u8]) -> bool {
    blob.first() == Some(&PLAIN)
}

struct SealingKey {
    id: [u8; KEY_ID_LEN],
    key: LessSafeKey,
}

impl SealingKey {
    fn parse(text: &str) -> Result<Self, SealError> {
        let bytes =
            Zeroizing::new(BASE64.decode(text.trim().as_bytes()).map_err(|_| SealError::BadKey)?);
        if bytes.len() != KEY_LEN {
            return Err(SealError::BadKey);
        }
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(b"otpgate sealing key id");
        context.update(&bytes);
        let mut id = [0; KEY_ID_LEN];
        id.copy_from_slice(&context.finish().as_ref()[..KEY_ID_LEN]);
        let unbound = UnboundKey::new(&AES_256_GCM, &bytes).map_err(|_| SealError::BadKey)?;
        Ok(Self { id, key: LessSafeKey::new(unbound) })
    }
}

/// Seals and opens payloads. Without a key it stores them plainly.
pub struct Sealer {
    /// The first one writes; all of them open.
    keys: Vec<SealingKey>,
}

impl Sealer {
    /// No sealing: payloads are stored as they are.
    #[must_use]
    pub fn off() -> Self {
        Self { keys: Vec::new() }
    }

    /// Seals with `key`, opens also with `old_keys`; each is 32 bytes in base64.
    ///
    /// # Errors
    /// [`SealError::BadKey`] if a text is no key.
    pub fn new(key: &str, old_keys: &[&str]) -> Result<Self, SealError> {
        let keys = std::iter::once(&key)
            .chain(old_keys)
            .map(|text| SealingKey::parse(text))
            .collect::<Result<_, _>>()?;
        Ok(Self { keys })
    }

    /// A new random key, as base64 text.
    #[must_use]
    pub fn random_key() -> Zeroizing<String> {
        let mut bytes = Zeroizing::new([0_u8; KEY_LEN]);
        fill_random(bytes.as_mut_slice());
        Zeroizing::new(BASE64.encode(bytes.as_slice()))
    }

    /// Whether payloads are encrypted.
    #[must_use]
    pub fn is_on(&self) -> bool {
        !self.keys.is_empty()
    }

    /// Its keys, the one that seals first.
    #[must_use]
    pub fn key_ids(&self) -> Vec<KeyId> {
        self.keys.iter().map(|key| KeyId(key.id)).collect()
    }

    /// Makes the blob to store for an entry.
    #[must_use]
    pub fn seal(&self, principal: &Principal, id: EntryId, payload: &[u8]) -> Vec<u8> {
        let Some(SealingKey { id: key_id, key }) = self.keys.first() else {
            return [&[PLAIN], payload].concat();
        };
        let mut nonce = [0; NONCE_LEN];
        fill_random(&mut nonce);
        let head = [&[AES_GCM][..], key_id, &nonce].concat();
        let mut blob = Vec::with_capacity(head.len() + payload.len() + AES_256_GCM.tag_len());
        blob.extend_from_slice(&head);
        blob.extend_from_slice(payload);
        let tag = key
            .seal_in_place_separate_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(associated_data(AES_GCM, key_id, principal, id)),
                &mut blob[head.len()..],
            )
            .expect("an entry is far shorter than what AES-GCM can seal");
        blob.extend_from_slice(tag.as_ref());
        blob
    }

    /// Opens a stored blob.
    ///
    /// # Errors
    /// If the key is unknown, the blob is damaged or belongs to another entry, or it is not sealed
    /// though it should be.
    pub fn open(
        &self,
        principal: &Principal,
        id: EntryId,
        blob: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, SealError> {
        match blob.split_first() {
            Some((&PLAIN, payload)) if !self.is_on() => Ok(Zeroizing::new(payload.to_vec())),
            Some((&PLAIN, _)) => Err(SealError::NotSealed),
            Some((&AES_GCM, sealed)) => self.open_sealed(principal, id, sealed),
            _ => Err(SealError::Broken),
        }
    }

    fn open_sealed(
        &self,
        principal: &Principal,
        id: EntryId,
        sealed: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let (key_id, rest) = sealed.split_first_chunk::<KEY_ID_LEN>().ok_or(SealError::Broken)?;
        let (nonce, ciphertext) = rest.split_first_chunk::<NONCE_LEN>().ok_or(SealError::Broken)?;
        let key = self
            .keys
            .iter()
            .find(|k| k.id == *key_id)
            .ok_or_else(|| SealError::UnknownKey(data_encoding::HEXLOWER.encode(key_id)))?;
        let mut buffer = Zeroizing::new(ciphertext.to_vec());
        let opened = key
            .key
            .open_in_place(
                Nonce::assume_unique_for_key(*nonce),
                Aad::from(associated_data(AES_GCM, key_id, principal, id)),
                &mut buffer,
            )
            .map_err(|_| SealError::Broken)?
            .len();
        buffer.truncate(opened);
        Ok(buffer)
    }
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sealer({} keys)", self.keys.len())
    }
}

fn associated_data(format: u8, key_id: &[u8], principal: &Principal, id: EntryId) -> Vec<u8> {
    let parts: [&[u8]; 5] = [
        &[format],
        key_id,
        principal.realm.as_str().as_bytes(),
        principal.name.as_str().as_bytes(),
        &id.0.to_be_bytes(),
    ];
    let mut data = Vec::with_capacity(64);
    for part in parts {
        data.extend_from_slice(&(part.len() as u64).to_be_bytes());
        data.extend_from_slice(part);
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(name: &str, realm: &str) -> Principal {
        Principal::parse(name, realm).unwrap()
    }

    #[test]
    fn what_is_sealed_opens_only_as_itself() {
        let sealer = Sealer::new(&Sealer::random_key(), &[]).unwrap();
        let blob = sealer.seal(&who("ab", "c"), EntryId(7), b"payload");
        assert!(!blob.windows(7).any(|w| w == b"payload"));
        assert_eq!(&**sealer.open(&who("ab", "c"), EntryId(7), &blob).unwrap(), b"payload");
        for (principal, id) in
            [(who("a", "bc"), 7), (who("c", "ab"), 7), (who("ab", "d"), 7), (who("ab", "c"), 8)]
        {
            assert_eq!(sealer.open(&principal, EntryId(id), &blob), Err(SealError::Broken));
        }
        for i in 0..blob.len() {
            let mut changed = blob.clone();
            changed[i] ^= 1;
            assert!(sealer.open(&who("ab", "c"), EntryId(7), &changed).is_err(), "byte {i}");
            assert!(sealer.open(&who("ab", "c"), EntryId(7), &blob[..i]).is_err(), "cut at {i}");
        }
    }

    #[test]
    fn old_keys_open_and_unknown_ones_are_named() {
        let (old, new) = (Sealer::random_key(), Sealer::random_key());
        let blob = Sealer::new(&old, &[]).unwrap().seal(&who("a", "b"), EntryId(1), b"x");
        let both = Sealer::new(&new, &[old.as_str()]).unwrap();
        assert_eq!(&**both.open(&who("a", "b"), EntryId(1), &blob).unwrap(), b"x");
        let [new_id, old_id] = both.key_ids()[..] else { panic!("two keys") };
        assert_eq!(KeyId::of(&blob), Some(old_id));
        assert_eq!(KeyId::of(&both.seal(&who("a", "b"), EntryId(1), b"x")), Some(new_id));
        assert_eq!(KeyId::of(&Sealer::off().seal(&who("a", "b"), EntryId(1), b"xxxxx")), None);
        assert_eq!(KeyId::of(&blob[..4]), None);
        let only_new = Sealer::new(&new, &[]).unwrap();
        assert!(matches!(
            only_new.open(&who("a", "b"), EntryId(1), &blob),
            Err(SealError::UnknownKey(_))
        ));
    }

    #[test]
    fn a_plain_blob_is_refused_where_sealing_is_on() {
        let off = Sealer::off();
        let blob = off.seal(&who("a", "b"), EntryId(1), b"x");
        assert_eq!(&**off.open(&who("a", "b"), EntryId(1), &blob).unwrap(), b"x");
        let on = Sealer::new(&Sealer::random_key(), &[]).unwrap();
        assert_eq!(on.open(&who("a", "b"), EntryId(1), &blob), Err(SealError::NotSealed));
    }

    #[test]
    fn only_32_bytes_in_base64_are_a_key() {
        for bad in ["", "AAAA", "not base64", &BASE64.encode(&[0; 31]), &BASE64.encode(&[0; 33])] {
            assert!(matches!(Sealer::new(bad, &[]), Err(SealError::BadKey)), "{bad}");
        }
        assert!(Sealer::new(&format!("{}\n", *Sealer::random_key()), &[]).is_ok());
    }
}
