//! Key names, the Lua scripts, and what they answer.
//!
//! Everything that must change together shares one hash tag, so a Redis Cluster keeps it on one node:
//!
//! - `{prefix}:meta`: the format; without it there is no store. While an import fills the store, the
//!   word `importing` and the import's tag follow it, so that only that import works with it
//! - `{prefix}:head`: hash of `v` and `n`, version and nonce of the last write, and `id`, the next
//!   free number
//! - `{prefix}:log`: stream of the records `<version>-0` with `n` nonce, `p` previous nonce, `k` keys
//! - `{prefix}:ids`: sorted set of entry keys by number
//! - `{prefix}:e:<key>`: an entry, `<revision>:<number>:<blob>`
//!
//! and those of the ledger, which end by themselves:
//!
//! - `{prefix}:u:<number>.<serial>.<time step>`: set of who used that token of that entry
//! - `{prefix}:t:<bucket>`: level of a bucket, in microseconds of the server's clock
//! - `{prefix}:g:<key>`: there while the key is remembered
//! - `{prefix}:w`: there for a moment, so that replicas can be asked how far they are

use std::time::Duration;

use redis::Cmd;

use crate::entry::{EntryId, Principal};
use crate::store::log::{self, RETENTION};
use crate::store::{
    Action, Blob, Expect, Failure, Mutation, Nonce, Row, Spending, StoreError, Version,
};

/// What `meta` holds.
pub(super) const FORMAT: &str = "otpgate 1";
/// What follows it while an import fills the store, before the import's tag.
const IMPORTING: &str = " importing ";

/// Names of keys.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    pub(super) meta: String,
    pub(super) head: String,
    pub(super) log: String,
    pub(super) ids: String,
    /// What `meta` must hold for anything to be done.
    pub(super) format: String,
    entry: String,
    uses: String,
    bucket: String,
    remembered: String,
    pub(super) later: String,
}

impl Keys {
    pub(super) fn new(prefix: &str) -> Self {
        let key = |name| format!("{{{prefix}}}:{name}");
        Self {
            meta: key("meta"),
            head: key("head"),
            log: key("log"),
            ids: key("ids"),
            format: FORMAT.to_owned(),
            entry: key("e:"),
            uses: key("u:"),
            bucket: key("t:"),
            remembered: key("g:"),
            later: key("w"),
        }
    }

    /// The same keys, for the import with that tag.
    pub(super) fn importing(&self, tag: &str) -> Self {
        Self { format: format!("{FORMAT}{IMPORTING}{tag}"), ..self.clone() }
    }

    /// Judges the value of the `meta` key.
    pub(super) fn check_meta(&self, meta: Option<&str>) -> Result<(), StoreError> {
        if meta == Some(self.format.as_str()) {
            return Ok(());
        }
        // An import finds the store open.
        Err(check_meta(meta).err().unwrap_or_else(log::ended))
    }

    /// The member of `ids` that an entry's key belongs to.
    pub(super) fn member<'a>(&self, key: &'a str) -> Option<&'a str> {
        key.strip_prefix(self.entry.as_str())
    }

    /// A pattern of `SCAN` for the keys of all entries.
    pub(super) fn all_entries(&self) -> String {
        let mut pattern = String::new();
        for c in self.entry.chars() {
            if matches!(c, '*' | '?' | '[' | ']' | '\\') {
                pattern.push('\\');
            }
            pattern.push(c);
        }
        pattern.push('*');
        pattern
    }

    /// The key of an entry, given what [`log::key_of`] made.
    pub(super) fn entry(&self, member: &str) -> String {
        format!("{}{member}", self.entry)
    }

    /// The set of who used a token.
    pub(super) fn uses(&self, Spending { id, serial, counter, .. }: &Spending) -> String {
        format!("{}{id}.{serial}.{counter}", self.uses)
    }

    /// The key of a bucket.
    pub(super) fn bucket(&self, name: &str) -> String {
        format!("{}{name}", self.bucket)
    }

    /// The key that is there while `name` is remembered.
    pub(super) fn remembered(&self, name: &str) -> String {
        format!("{}{name}", self.remembered)
    }

    pub(super) fn fixed(&self) -> [&str; 4] {
        [&self.meta, &self.head, &self.log, &self.ids]
    }
}

/// A script with its hash, called by hash where the server knows it.
pub(super) struct Script(redis::Script, &'static str);

impl Script {
    fn new(code: &'static str) -> Self {
        Self(redis::Script::new(code), code)
    }

    /// The call by hash, or, where the server answered `NOSCRIPT`, with the code.
    pub(super) fn call(&self, by_hash: bool, arguments: &Arguments) -> Cmd {
        let mut cmd = if by_hash { redis::cmd("EVALSHA") } else { redis::cmd("EVAL") };
        cmd.arg(if by_hash { self.0.get_hash() } else { self.1 });
        cmd.arg(arguments.keys.len()).arg(&arguments.keys).arg(&arguments.values);
        cmd
    }
}

/// `KEYS` and `ARGV` of a call.
pub(super) struct Arguments {
    keys: Vec<String>,
    values: Vec<Vec<u8>>,
}

impl Arguments {
    fn new(keys: &Keys) -> Self {
        let values = vec![keys.format.clone().into()];
        Self { keys: keys.fixed().map(str::to_owned).to_vec(), values }
    }

    /// For the ledger's scripts, which only read the others: `keys` are all that they write, so that a
    /// user may be allowed no more.
    fn of_ledger(keys: &Keys, ledger: Vec<String>) -> Self {
        Self { keys: ledger, values: vec![keys.format.clone().into(), keys.meta.clone().into()] }
    }

    fn with(mut self, value: impl ToString) -> Self {
        self.values.push(value.to_string().into_bytes());
        self
    }
}

/// All scripts.
pub(super) struct Scripts {
    pub(super) init: Script,
    pub(super) commit: Script,
    pub(super) reserve: Script,
    pub(super) list: Script,
    pub(super) raise: Script,
    pub(super) begin: Script,
    pub(super) end: Script,
    pub(super) spend: Script,
    pub(super) count: Script,
    pub(super) remember: Script,
    pub(super) remembers: Script,
}

impl Scripts {
    pub(super) fn new() -> Self {
        Self {
            init: Script::new(include_str!("init.lua")),
            commit: Script::new(include_str!("commit.lua")),
            reserve: Script::new(include_str!("reserve.lua")),
            list: Script::new(include_str!("list.lua")),
            raise: Script::new(include_str!("raise.lua")),
            begin: Script::new(include_str!("begin.lua")),
            end: Script::new(include_str!("end.lua")),
            spend: Script::new(include_str!("spend.lua")),
            count: Script::new(include_str!("count.lua")),
            remember: Script::new(include_str!("remember.lua")),
            remembers: Script::new(include_str!("remembers.lua")),
        }
    }
}

pub(super) fn init_arguments(keys: &Keys) -> Arguments {
    Arguments::new(keys).with(Nonce::ORIGIN)
}

pub(super) fn reserve_arguments(keys: &Keys) -> Arguments {
    Arguments::new(keys).with(EntryId::MAX)
}

pub(super) fn raise_arguments(keys: &Keys, next: EntryId) -> Arguments {
    Arguments::new(keys).with(next)
}

/// From the keys of everybody to those of the import.
pub(super) fn begin_arguments(keys: &Keys, importing: &Keys) -> Arguments {
    Arguments::new(keys).with(&importing.format).with(Nonce::ORIGIN)
}

pub(super) fn end_arguments(importing: &Keys) -> Arguments {
    Arguments::new(importing).with(FORMAT)
}

/// Entries with a number above `after`, up to and including `last`.
pub(super) fn list_arguments(keys: &Keys, after: u64, last: u64, limit: usize) -> Arguments {
    Arguments::new(keys).with(after).with(last).with(limit).with(&keys.entry)
}

pub(super) fn commit_arguments(keys: &Keys, batch: &[Mutation], nonce: &Nonce) -> Arguments {
    let mut arguments =
        Arguments::new(keys).with(&nonce.0).with(log::keys_text(batch)).with(RETENTION);
    for Mutation { principal, expect, action } in batch {
        let member = log::key_of(principal.into());
        arguments.keys.push(keys.entry(&member));
        let expected = match expect {
            Expect::Absent => String::new(),
            Expect::At(revision) => revision.to_string(),
        };
        let (id, blob) = match action {
            Action::Put { id, blob } => (id.to_string(), blob.0.clone()),
            Action::Delete => (String::new(), Vec::new()),
        };
        arguments = arguments.with(member).with(expected).with(id);
        arguments.values.push(blob);
    }
    arguments
}

pub(super) fn spend_arguments(keys: &Keys, spending: &Spending) -> Arguments {
    let Spending { by, budget, keep, .. } = spending;
    let arguments = Arguments::of_ledger(keys, vec![keys.uses(spending)]);
    arguments.with(by).with(budget).with(millis(*keep))
}

pub(super) fn count_arguments(keys: &Keys, failures: &[Failure]) -> Arguments {
    let buckets = failures.iter().map(|failure| keys.bucket(&failure.bucket)).collect();
    let mut arguments = Arguments::of_ledger(keys, buckets);
    for Failure { quota, .. } in failures {
        let (interval, horizon) = (quota.interval().as_micros(), quota.horizon().as_micros());
        arguments = arguments.with(interval).with(quota.failures.max(1)).with(horizon);
    }
    arguments
}

pub(super) fn remember_arguments(keys: &Keys, remembered: &[String], keep: Duration) -> Arguments {
    let remembered = remembered.iter().map(|key| keys.remembered(key)).collect();
    Arguments::of_ledger(keys, remembered).with(millis(keep))
}

pub(super) fn remembers_arguments(keys: &Keys, key: &str) -> Arguments {
    Arguments::of_ledger(keys, vec![keys.remembered(key)])
}

/// For `PEXPIRE`, which takes nothing below 1; never shorter than asked for.
pub(super) fn millis(keep: Duration) -> u128 {
    keep.as_nanos().div_ceil(1_000_000).max(1)
}

/// What the scripts answer: a word and what belongs to it.
pub(super) fn understand(reply: Vec<String>) -> Result<u64, StoreError> {
    let mut words = reply.into_iter();
    let (word, rest) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    match word.as_str() {
        "ok" => rest
            .parse()
            .map_err(|_| StoreError::Corrupt("a script answered with something odd".into())),
        "conflict" => Err(StoreError::Conflict),
        "full" => Err(log::no_numbers_left()),
        "absent" => Err(StoreError::NotInitialised),
        "foreign" => Err(check_meta(Some(&rest)).err().unwrap_or_else(log::ended)),
        "headless" => Err(headless()),
        "busy" => {
            Err(StoreError::Unreachable("others write at the same time, over and over".into()))
        }
        "half" => Err(StoreError::Unknown(format!("a part of the write failed: {rest}"))),
        "remains" => Err(StoreError::Corrupt(
            "keys with the store's prefix are there, but its `meta` key is not: restore a backup, \
             or delete them to begin anew"
                .into(),
        )),
        _ => Err(StoreError::Corrupt("a script answered with something odd".into())),
    }
}

/// As [`understand`], where several numbers belong to the word.
pub(super) fn understand_all(reply: Vec<String>) -> Result<Vec<u64>, StoreError> {
    match reply.split_first() {
        Some((word, numbers)) if word == "ok" => {
            numbers.iter().map(|number| understand(vec![word.clone(), number.clone()])).collect()
        }
        _ => understand(reply).map(|_| Vec::new()),
    }
}

/// There is a store, but not where it ends.
pub(super) fn headless() -> StoreError {
    StoreError::Corrupt("its `head` key is gone: was it evicted, or deleted by hand?".into())
}

/// As [`Keys::check_meta`], for everybody but an import.
fn check_meta(meta: Option<&str>) -> Result<(), StoreError> {
    match meta {
        None => Err(StoreError::NotInitialised),
        Some(FORMAT) => Ok(()),
        Some(other) if other.strip_prefix(FORMAT).is_some_and(|s| s.starts_with(IMPORTING)) => {
            Err(StoreError::Importing)
        }
        Some(other) => match other.strip_prefix("otpgate ").and_then(|n| n.parse::<u32>().ok()) {
            Some(number) => Err(StoreError::Corrupt(format!(
                "its format is number {number}, this otpgate knows `{FORMAT}`"
            ))),
            None => Err(StoreError::Corrupt("its keys are another application's".into())),
        },
    }
}

/// An entry's row, given its number as `ids` has it and its value. What is gone or cannot be read has
/// revision 0 and an empty blob, which does not open: its principal gets 503, not "unknown".
pub(super) fn row(principal: Principal, id: Option<EntryId>, value: Option<&[u8]>) -> Row {
    let (revision, own_id, blob) =
        value.and_then(parse_row).unwrap_or((Version(0), EntryId(0), Vec::new()));
    // Where the two differ, the one that is found by is right; then the blob does not open.
    Row { principal, id: id.unwrap_or(own_id), revision, blob: Blob(blob) }
}

/// The number that an entry's value says; `None` if it is damaged.
pub(super) fn own_id(value: &[u8]) -> Option<EntryId> {
    parse_row(value).map(|(_, id, _)| id)
}

fn parse_row(value: &[u8]) -> Option<(Version, EntryId, Vec<u8>)> {
    let mut parts = value.splitn(3, |byte| *byte == b':');
    let mut number = || std::str::from_utf8(parts.next()?).ok()?.parse().ok();
    let (revision, id) = (Version(number()?), EntryId(number()?));
    Some((revision, id, parts.next()?.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Quota;

    #[test]
    fn values_are_read_and_junk_is_broken() {
        let who = Principal::parse("a", "b").unwrap();
        let read = row(who.clone(), None, Some(b"12:7:blob:with:colons\x00\xff"));
        assert_eq!((read.revision, read.id), (Version(12), EntryId(7)));
        assert_eq!(read.blob.0, b"blob:with:colons\x00\xff");
        for junk in [&b""[..], b"junk", b"1:2", b"x:2:b", b"1:-2:b", b"\xff:2:b"] {
            let broken = row(who.clone(), Some(EntryId(9)), Some(junk));
            assert_eq!((broken.revision, broken.id), (Version(0), EntryId(9)), "{junk:?}");
            assert_eq!(broken, row(who.clone(), Some(EntryId(9)), None));
        }
    }

    #[test]
    fn keys_share_their_hash_tag() {
        let keys = Keys::new("gate");
        for key in [keys.fixed().map(str::to_owned).to_vec(), vec![keys.entry("r/n")]].concat() {
            assert!(key.starts_with("{gate}:"), "{key}");
        }
        let spending = Spending {
            id: EntryId(7),
            serial: 2,
            counter: 59,
            by: "a".into(),
            budget: 1,
            keep: Duration::from_micros(1),
        };
        assert_eq!(spend_arguments(&keys, &spending).keys[0], "{gate}:u:7.2.59");
        let quota = Quota { failures: 3, per: Duration::from_secs(1) };
        let failure = Failure { bucket: "{b}".into(), quota };
        assert_eq!(count_arguments(&keys, &[failure]).keys[0], "{gate}:t:{b}");
        assert_eq!(remembers_arguments(&keys, "k").keys[0], "{gate}:g:k");
        let remembered = remember_arguments(&keys, &["k".into()], Duration::ZERO);
        assert_eq!(remembered.keys[0], "{gate}:g:k");
    }

    #[test]
    fn formats_are_told_apart() {
        assert_eq!(check_meta(Some(FORMAT)), Ok(()));
        assert_eq!(check_meta(None), Err(StoreError::NotInitialised));
        assert!(check_meta(Some("otpgate 2")).unwrap_err().to_string().contains("number 2"));
        assert_eq!(check_meta(Some("otpgate 1 importing ab")), Err(StoreError::Importing));
        let importer = Keys::new("gate").importing("ab");
        assert_eq!(importer.check_meta(Some("otpgate 1 importing ab")), Ok(()));
        assert_eq!(importer.check_meta(Some("otpgate 1 importing cd")), Err(StoreError::Importing));
        assert!(matches!(importer.check_meta(Some(FORMAT)), Err(StoreError::Refused(_))));
        assert!(check_meta(Some("x")).unwrap_err().to_string().contains("another application"));
    }
}
