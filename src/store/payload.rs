//! What is sealed of an entry, as JSON.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::clock::UnixTime;
use crate::entry::{Entry, EntryId, Overrides, Principal, Retiring, Seed};

/// Length of the JSON beside its texts: names of fields, numbers, settings.
const ROOM: usize = 512;

/// All of an entry but its principal and number, which its row says.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Payload<'a> {
    // Base32 needs no JSON escapes, so reading borrows from the wiped buffer and copies nothing.
    seed: &'a str,
    #[serde(default, skip_serializing_if = "is_first")]
    serial: u32,
    #[serde(default, skip_serializing_if = "Option::is_none", borrow)]
    previous: Option<PreviousSeed<'a>>,
    #[serde(default)]
    overrides: Overrides,
    enabled: bool,
    created_at: UnixTime,
    updated_at: UnixTime,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires_at: Option<UnixTime>,
    #[serde(default, skip_serializing_if = "str::is_empty", borrow)]
    comment: Cow<'a, str>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PreviousSeed<'a> {
    seed: &'a str,
    serial: u32,
    until: UnixTime,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_first(serial: &u32) -> bool {
    *serial == 0
}

/// The payload of an entry.
pub(super) fn write(entry: &Entry) -> Zeroizing<Vec<u8>> {
    let payload = Payload {
        seed: entry.seed.expose(),
        serial: entry.serial,
        previous: entry.previous.as_ref().map(|previous| PreviousSeed {
            seed: previous.seed.expose(),
            serial: previous.serial,
            until: previous.until,
        }),
        overrides: entry.overrides,
        enabled: entry.enabled,
        created_at: entry.created_at,
        updated_at: entry.updated_at,
        expires_at: entry.expires_at,
        comment: entry.comment.as_str().into(),
    };
    // Room for all of it, escapes included: growing would leave copies of the seed behind.
    let previous = payload.previous.as_ref().map_or(0, |previous| previous.seed.len());
    let room = ROOM + payload.seed.len() + previous + 6 * payload.comment.len();
    let mut json = Zeroizing::new(Vec::with_capacity(room));
    serde_json::to_writer(&mut *json, &payload).expect("plain data serialises");
    debug_assert!(json.len() <= room);
    json
}

/// The entry of a payload; or what is wrong, without quoting it.
pub(super) fn read(id: EntryId, principal: &Principal, json: &[u8]) -> Result<Entry, String> {
    // serde's message may quote the payload: say only where it stopped.
    let payload: Payload<'_> = serde_json::from_slice(json)
        .map_err(|e| format!("not an entry (column {})", e.column()))?;
    let parse = |seed: &str| Seed::parse(seed).map_err(|e| format!("its seed {e}"));
    let previous = payload.previous.map(|previous| {
        let PreviousSeed { seed, serial, until } = previous;
        parse(seed).map(|seed| Retiring { seed, serial, until })
    });
    Ok(Entry {
        id,
        principal: principal.clone(),
        seed: parse(payload.seed)?,
        serial: payload.serial,
        previous: previous.transpose()?,
        overrides: payload.overrides,
        enabled: payload.enabled,
        created_at: payload.created_at,
        updated_at: payload.updated_at,
        expires_at: payload.expires_at,
        comment: payload.comment.into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Algorithm;

    fn entry() -> Entry {
        let seed = Seed::parse("JBSWY3DPEHPK3PXP").unwrap();
        Entry::new(EntryId(7), Principal::parse("a", "b").unwrap(), seed, 60)
    }

    #[test]
    fn the_largest_entry_fits_and_is_read_back() {
        let overrides =
            Overrides { algorithm: Some(Algorithm::Sha512), digits: Some(8), period: Some(3600) };
        let largest = Entry {
            seed: Seed::parse(&"A".repeat(256)).unwrap(),
            serial: u32::MAX,
            previous: Some(Retiring {
                seed: Seed::parse(&"B".repeat(256)).unwrap(),
                serial: u32::MAX,
                until: u64::MAX,
            }),
            overrides,
            created_at: u64::MAX,
            updated_at: u64::MAX,
            expires_at: Some(u64::MAX),
            comment: "\u{1}".repeat(1024),
            ..entry()
        };
        for entry in [entry(), largest] {
            let json = write(&entry);
            assert_eq!(read(entry.id, &entry.principal, &json), Ok(entry));
        }
    }

    #[test]
    fn what_is_wrong_is_told_without_quoting_it() {
        let good = String::from_utf8(write(&entry()).to_vec()).unwrap();
        for bad in [
            "",
            "{}",
            "s3cr3t",
            "{\"seed\":\"s3cr3t!\"}",
            &good.replace("JBSWY3DPEHPK3PXP", "s3cr3t!"),
            &good.replace("\"enabled\":true", "\"enabled\":\"s3cr3t\""),
            &good.replace("{\"seed\"", "{\"s3cr3t\":1,\"seed\""),
        ] {
            let error = read(EntryId(7), &entry().principal, bad.as_bytes()).unwrap_err();
            assert!(!error.contains("s3cr3t"), "{bad}: {error}");
        }
    }
}
