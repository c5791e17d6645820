//! Entries as JSON, and the fields of a request that change them.

use std::sync::Arc;

use serde_json::{Map, Value as Json, json};

use super::body::Fields;
use super::error::{ApiError, FieldErrors};
use super::value::{LABEL, TextRules, Value, check_bool, check_integer, check_text};
use crate::clock::UnixTime;
use crate::directory::TokenRules;
use crate::entry::{
    Algorithm, DIGITS, Entry, MAX_COMMENT_CHARS, Name, PERIOD_SECONDS, Principal, Realm, is_nfc,
};
use crate::store::Stored;

const COMMENT: TextRules = TextRules { max_chars: MAX_COMMENT_CHARS, blank: true };
/// The last second of the year 9999, beyond which RFC 3339 has no texts.
const MAX_TIME: UnixTime = 253_402_300_799;
const NOT_NFC: &str = "Use Unicode normalization form C.";
const UNPRINTABLE: &str = "Control and invisible characters are not allowed.";

/// What of an entry is shown.
#[derive(Clone, Debug)]
pub(super) struct View {
    /// Whether to show the seed.
    pub(super) seed: bool,
    /// Whether to show all fields.
    pub(super) full: bool,
    /// For the effective token settings.
    pub(super) rules: Arc<TokenRules>,
}

impl View {
    /// What is stored as JSON. An entry that cannot be opened is marked by an `error`, so that it can
    /// be found and deleted; the log says why.
    pub(super) fn stored(&self, stored: &Stored) -> Json {
        let error = match &stored.entry {
            Ok(entry) => return self.of(entry),
            Err(error) => error,
        };
        tracing::error!(%error, id = stored.id.0, "an entry that cannot be opened is shown");
        let Principal { name, realm } = &stored.principal;
        let mut shown = json!({
            "id": stored.id.0,
            "name": name.as_str(),
            "realm": realm.as_str(),
            "error": "This entry cannot be opened, the gate's log says why.",
        });
        if self.seed {
            shown["seed"] = Json::Null;
        }
        shown
    }

    /// The entry as JSON.
    pub(super) fn of(&self, entry: &Entry) -> Json {
        let mut shown = Map::new();
        let mut put = |name: &str, value: Json| {
            shown.insert(name.to_owned(), value);
        };
        put("id", json!(entry.id.0));
        put("name", json!(entry.principal.name.as_str()));
        put("realm", json!(entry.principal.realm.as_str()));
        if self.seed {
            put("seed", json!(entry.seed.expose()));
        }
        if self.full {
            let params = self.rules.params_of(entry);
            put("algorithm", json!(params.algorithm.as_str()));
            put("digits", json!(params.digits));
            put("period", json!(params.step_seconds));
            put(
                "previous_seed_until",
                json!(entry.previous.as_ref().map(|previous| rfc3339(previous.until))),
            );
            put("enabled", json!(entry.enabled));
            put("created_at", json!(rfc3339(entry.created_at)));
            put("updated_at", json!(rfc3339(entry.updated_at)));
            put("expires_at", json!(entry.expires_at.map(rfc3339)));
            put("comment", json!(entry.comment));
        }
        Json::Object(shown)
    }
}

/// What a request changes of an entry; `None` leaves a field, `Some(None)` clears it.
#[derive(Clone, Debug, Default)]
pub(super) struct Change {
    name: Option<Name>,
    realm: Option<Realm>,
    algorithm: Option<Option<Algorithm>>,
    digits: Option<Option<u8>>,
    period: Option<Option<u32>>,
    enabled: Option<bool>,
    expires_at: Option<Option<UnixTime>>,
    comment: Option<String>,
}

impl Change {
    /// Reads all fields; `partial` if name and realm may be missing.
    ///
    /// # Errors
    /// The messages of all bad fields.
    pub(super) fn read(fields: &Fields, partial: bool) -> Result<Self, ApiError> {
        fields.require_object()?;
        let mut errors = FieldErrors::new();
        let mut note = |name, messages: Vec<String>| {
            errors.insert(name, messages);
        };
        let mut change = Self::default();
        let wanted = |name| !partial || fields.get(name).is_some();
        if wanted("name") {
            match label(fields.get("name"), Name::parse) {
                Ok(name) => change.name = Some(name),
                Err(messages) => note("name", messages),
            }
        }
        if wanted("realm") {
            match label(fields.get("realm"), Realm::parse) {
                Ok(realm) => change.realm = Some(realm),
                Err(messages) => note("realm", messages),
            }
        }
        let algorithm = optional(fields, "algorithm", check_algorithm);
        change.algorithm = algorithm.unwrap_or_else(|m| fault(&mut note, "algorithm", m));
        let digits = optional(fields, "digits", |v| {
            check_integer(v, (*DIGITS.start()).into(), (*DIGITS.end()).into())
        });
        change.digits = digits
            .unwrap_or_else(|m| fault(&mut note, "digits", m))
            .map(|digits| digits.and_then(|n| u8::try_from(n).ok()));
        let period = optional(fields, "period", |v| {
            check_integer(v, (*PERIOD_SECONDS.start()).into(), (*PERIOD_SECONDS.end()).into())
        });
        change.period = period
            .unwrap_or_else(|m| fault(&mut note, "period", m))
            .map(|period| period.and_then(|n| u32::try_from(n).ok()));
        let enabled = fields.get("enabled").map(check_bool).transpose();
        change.enabled = enabled.unwrap_or_else(|m| fault(&mut note, "enabled", m));
        let expires_at = optional(fields, "expires_at", check_time);
        change.expires_at = expires_at.unwrap_or_else(|m| fault(&mut note, "expires_at", m));
        let comment = fields.get("comment").map(check_comment).transpose();
        change.comment = comment.unwrap_or_else(|m| fault(&mut note, "comment", m));
        if errors.is_empty() { Ok(change) } else { Err(ApiError::Fields(errors)) }
    }

    /// Whom a new entry is for; `None` if name or realm is left out.
    pub(super) fn principal(&self) -> Option<Principal> {
        Some(Principal { name: self.name.clone()?, realm: self.realm.clone()? })
    }

    /// The entry with the change made.
    pub(super) fn apply(&self, old: &Entry, now: UnixTime) -> Entry {
        let mut new = old.clone();
        new.principal = Principal {
            name: self.name.clone().unwrap_or_else(|| old.principal.name.clone()),
            realm: self.realm.clone().unwrap_or_else(|| old.principal.realm.clone()),
        };
        new.overrides.algorithm = self.algorithm.unwrap_or(old.overrides.algorithm);
        new.overrides.digits = self.digits.unwrap_or(old.overrides.digits);
        new.overrides.period = self.period.unwrap_or(old.overrides.period);
        new.enabled = self.enabled.unwrap_or(old.enabled);
        new.expires_at = self.expires_at.unwrap_or(old.expires_at);
        if let Some(comment) = &self.comment {
            new.comment.clone_from(comment);
        }
        if new != *old {
            new.updated_at = now;
            new.previous = new.previous.filter(|previous| previous.until > now);
        }
        new
    }
}

fn fault<T>(
    note: &mut impl FnMut(&'static str, Vec<String>),
    name: &'static str,
    messages: Vec<String>,
) -> Option<T> {
    note(name, messages);
    None
}

fn label<T>(
    value: Option<&Value>,
    parse: impl Fn(&str) -> Result<T, crate::entry::Invalid>,
) -> Result<T, Vec<String>> {
    let text = check_text(value, LABEL)?;
    if !is_nfc(text) {
        return Err(vec![NOT_NFC.to_owned()]);
    }
    // What check_text lets through can only be unprintable.
    parse(text).map_err(|_| vec![UNPRINTABLE.to_owned()])
}

/// A field that may be missing, or null.
fn optional<T>(
    fields: &Fields,
    name: &str,
    check: impl Fn(&Value) -> Result<T, Vec<String>>,
) -> Result<Option<Option<T>>, Vec<String>> {
    match fields.get_nullable(name) {
        None => Ok(None),
        Some(Value::Null) => Ok(Some(None)),
        Some(value) => check(value).map(|checked| Some(Some(checked))),
    }
}

fn check_algorithm(value: &Value) -> Result<Algorithm, Vec<String>> {
    [Algorithm::Sha1, Algorithm::Sha256, Algorithm::Sha512]
        .into_iter()
        .find(|known| *value == Value::text(known.as_str().to_owned()))
        .ok_or_else(|| vec!["Must be SHA1, SHA256 or SHA512.".to_owned()])
}

fn check_comment(value: &Value) -> Result<String, Vec<String>> {
    let text = check_text(Some(value), COMMENT)?;
    if text.chars().any(|c| c.is_control() && !matches!(c, '\n' | '\t')) {
        return Err(vec!["Control characters are not allowed.".to_owned()]);
    }
    Ok(text.to_owned())
}

fn check_time(value: &Value) -> Result<UnixTime, Vec<String>> {
    match value {
        Value::Text { text, surrogate: None } => parse_rfc3339(text.trim()),
        _ => None,
    }
    .ok_or_else(|| {
        vec!["Datetime has wrong format. Use RFC 3339, such as 2030-12-31T23:59:59Z.".to_owned()]
    })
}

/// RFC 3339 with any offset, from 1970 on; fractions of a second are cut off.
fn parse_rfc3339(text: &str) -> Option<UnixTime> {
    // humantime knows no offsets.
    let (local, offset) = match text.strip_suffix(['Z', 'z']) {
        Some(local) => (local, 0),
        None => {
            let (local, offset) = text.split_at_checked(text.len().checked_sub(6)?)?;
            let (sign, clock) = offset.split_at_checked(1)?;
            let (hours, minutes) = clock.split_once(':')?;
            let number = |text: &str, max| {
                let two_digits = text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit());
                text.parse::<i64>().ok().filter(|n| two_digits && *n <= max)
            };
            let seconds = number(hours, 23)? * 3600 + number(minutes, 59)? * 60;
            match sign {
                "+" => (local, seconds),
                "-" => (local, -seconds),
                _ => return None,
            }
        }
    };
    let time = humantime::parse_rfc3339(&format!("{local}Z")).ok()?;
    let unix = time.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs();
    unix.checked_add_signed(-offset).filter(|unix| *unix <= MAX_TIME)
}

/// RFC 3339 in UTC.
fn rfc3339(at: UnixTime) -> String {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(at.min(MAX_TIME));
    humantime::format_rfc3339_seconds(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::json;
    use crate::entry::{EntryId, Seed};

    fn entry() -> Entry {
        let seed = Seed::parse("JBSWY3DPEHPK3PXP").unwrap();
        Entry::new(EntryId(7), Principal::parse("alice", "staff").unwrap(), seed, 60)
    }

    fn read(body: &str, partial: bool) -> Result<Change, Json> {
        Change::read(&json::parse(body).unwrap(), partial).map_err(|error| match error {
            ApiError::Fields(errors) => json!(errors),
            other => panic!("{other}"),
        })
    }

    #[test]
    fn times_have_offsets() {
        for (text, unix) in [
            ("1970-01-01T00:00:00Z", Some(0)),
            ("2030-12-31T23:59:59Z", Some(1_924_991_999)),
            ("2030-12-31t23:59:59.999z", None),
            ("2030-12-31T23:59:59.999Z", Some(1_924_991_999)),
            ("2031-01-01T00:59:59+01:00", Some(1_924_991_999)),
            ("2030-12-31T18:29:59-05:30", Some(1_924_991_999)),
            ("1970-01-01T00:00:00+00:01", None),
            ("1969-12-31T23:59:59Z", None),
            ("9999-12-31T23:59:59Z", Some(MAX_TIME)),
            ("9999-12-31T23:59:59-00:01", None),
            ("2030-12-31T23:59:59", None),
            ("2030-12-31", None),
            ("2030-12-31T23:59:59+1:00", None),
            ("2030-12-31T23:59:59+-1:00", None),
            ("2030-12-31T23:59:59+24:00", None),
            ("ü", None),
            ("", None),
        ] {
            assert_eq!(parse_rfc3339(text), unix, "{text}");
        }
        assert_eq!(rfc3339(1_924_991_999), "2030-12-31T23:59:59Z");
    }

    #[test]
    fn new_names_are_normalised() {
        let name = |name| read(&json!({ "name": name }).to_string(), true);
        assert!(name("\u{fc}nal").is_ok());
        let errors = name("u\u{308}nal").unwrap_err();
        assert_eq!(errors, json!({ "name": ["Use Unicode normalization form C."] }));
    }

    #[test]
    fn all_bad_fields_are_told_at_once() {
        let errors = read(
            r#"{"name":"a\u200bb","digits":9,"period":"x","algorithm":"MD5","enabled":null,
                "expires_at":"soon","comment":"\u001b[2J"}"#,
            false,
        )
        .unwrap_err();
        assert_eq!(
            errors,
            json!({
                "name": ["Control and invisible characters are not allowed."],
                "realm": ["This field is required."],
                "digits": ["Ensure this value is less than or equal to 8."],
                "period": ["A valid integer is required."],
                "algorithm": ["Must be SHA1, SHA256 or SHA512."],
                "enabled": ["This field may not be null."],
                "expires_at":
                    ["Datetime has wrong format. Use RFC 3339, such as 2030-12-31T23:59:59Z."],
                "comment": ["Control characters are not allowed."],
            })
        );
    }

    #[test]
    fn a_change_touches_what_it_names() {
        let old = entry();
        let untouched = read("{}", true).unwrap().apply(&old, 99);
        assert_eq!(untouched, old);
        let body = r#"{"realm":" users ","digits":8,"comment":" x ","enabled":false,
                       "expires_at":"1970-01-01T01:00:00Z"}"#;
        let new = read(body, true).unwrap().apply(&old, 99);
        assert_eq!(new.principal, Principal::parse("alice", "users").unwrap());
        assert_eq!((new.overrides.digits, new.expires_at), (Some(8), Some(3600)));
        assert_eq!((new.enabled, new.updated_at, new.created_at), (false, 99, 60));
        assert_eq!((new.seed.clone(), new.comment.as_str()), (old.seed.clone(), "x"));
        let back = read(r#"{"digits":null,"expires_at":null}"#, true).unwrap().apply(&new, 100);
        assert_eq!((back.overrides.digits, back.expires_at), (None, None));
    }

    #[test]
    fn what_cannot_be_opened_is_marked() {
        let Entry { id, principal, .. } = entry();
        let entry = Err(crate::store::StoreError::Corrupt("s3cr3t cause".into()));
        let stored = Stored { id, principal, revision: crate::store::Version(1), entry };
        let rules = Arc::new(TokenRules::default());
        let mut expected = json!({
            "id": 7, "name": "alice", "realm": "staff",
            "error": "This entry cannot be opened, the gate's log says why.",
        });
        assert_eq!(
            View { seed: false, full: true, rules: rules.clone() }.stored(&stored),
            expected
        );
        expected["seed"] = Json::Null;
        assert_eq!(View { seed: true, full: false, rules }.stored(&stored), expected);
    }

    #[test]
    fn effective_settings_are_shown_in_full() {
        let rules = Arc::new(TokenRules::default());
        let brief = View { seed: false, full: false, rules: rules.clone() }.of(&entry());
        assert_eq!(brief, json!({"id": 7, "name": "alice", "realm": "staff"}));
        let full = View { seed: true, full: true, rules }.of(&entry());
        assert_eq!(
            full,
            json!({
                "id": 7, "name": "alice", "realm": "staff", "seed": "JBSWY3DPEHPK3PXP",
                "algorithm": "SHA1", "digits": 6, "period": 30, "previous_seed_until": null,
                "enabled": true, "created_at": "1970-01-01T00:01:00Z", "updated_at": "1970-01-01T00:01:00Z",
                "expires_at": null, "comment": "",
            })
        );
    }
}
