//! Reading of one settings table: every key is asked for once, every problem is collected with its key
//! path, and whatever nobody asked for is unknown.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use toml::{Table, Value};
use zeroize::Zeroizing;

/// Shorter ones keep the machine busy with nothing; much longer ones overflow clocks.
const DURATIONS: RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_secs(365 * 24 * 3600);

/// More than any bundle of CAs has.
const LARGEST_FILE: u64 = 16 << 20;

/// One thing that is wrong with the settings.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The key path, such as `proxy.listen`, with where it came from if not from the file.
    pub key: String,
    /// What is wrong and what would be right; never a secret.
    pub message: String,
}

impl Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.key, self.message)
    }
}

/// Which files settings may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Files {
    /// Also pipes: they are read once.
    Any,
    /// What can be read again, and at once.
    Regular,
}

impl Files {
    /// Why the file at `path` is none of these; what is not there is none of its business.
    #[must_use]
    pub fn objection(self, path: &Path) -> Option<&'static str> {
        let meta = std::fs::metadata(path).ok().filter(|_| self == Self::Regular)?;
        if !meta.is_file() {
            return Some("no regular file: it cannot be read again");
        }
        (meta.len() > LARGEST_FILE).then_some("larger than 16 MiB: it holds something else")
    }
}

/// Where a value came from, if not from the file, and its raw text, which may be a secret.
#[derive(Clone)]
pub(super) struct Origin {
    /// A flag or an environment variable.
    pub(super) name: String,
    /// What was written there.
    pub(super) raw: Zeroizing<String>,
}

struct Shared {
    problems: RefCell<Vec<Problem>>,
    may_name: Files,
    /// Files that settings name, whether they could be read or not.
    files: RefCell<BTreeSet<PathBuf>>,
    /// By key path.
    origins: BTreeMap<String, Origin>,
}

/// One table, with its key path.
pub(super) struct Section {
    shared: Rc<Shared>,
    path: String,
    table: Table,
    asked: BTreeSet<String>,
}

impl Section {
    /// The root of all settings, of which these problems are known already.
    pub(super) fn root(
        may_name: Files,
        table: Table,
        origins: BTreeMap<String, Origin>,
        problems: Vec<Problem>,
    ) -> Self {
        let shared = Rc::new(Shared {
            may_name,
            origins,
            problems: RefCell::new(problems),
            files: RefCell::default(),
        });
        Self { shared, path: String::new(), table, asked: BTreeSet::new() }
    }

    /// Notes a problem of `key`.
    pub(super) fn problem(&self, key: &str, message: impl Display) {
        let path = self.path_of(key);
        let key = match self.shared.origins.get(&path) {
            Some(origin) => format!("{path} ({})", origin.name),
            None => path,
        };
        self.shared.problems.borrow_mut().push(Problem { key, message: message.to_string() });
    }

    /// Notes that `key` depends on the contents of `path`. Whether that may be opened.
    pub(super) fn depends_on(&self, key: &str, path: &Path) -> bool {
        self.shared.files.borrow_mut().insert(path.to_owned());
        let objection = self.shared.may_name.objection(path);
        if let Some(objection) = objection {
            self.problem(key, format_args!("`{}` is {objection}", path.display()));
        }
        objection.is_none()
    }

    /// What [`Self::depends_on`] was told so far, in any section.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        self.shared.files.borrow().iter().cloned().collect()
    }

    /// Whether `key` is set.
    pub(super) fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// Whether nothing is set.
    pub(super) fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// What is set and was not asked for yet.
    pub(super) fn keys(&self) -> Vec<String> {
        self.table.keys().cloned().collect()
    }

    /// The names of all sub-tables that were not asked for by name.
    pub(super) fn other_tables(&self) -> Vec<String> {
        let is_table =
            |(key, value): &(&String, &Value)| value.is_table() && !self.asked.contains(*key);
        self.table.iter().filter(is_table).map(|(key, _)| key.clone()).collect()
    }

    /// The raw value of `key`.
    pub(super) fn take(&mut self, key: &str) -> Option<Value> {
        self.asked.insert(key.to_owned());
        self.table.remove(key)
    }

    /// The value of `key`, of any type that serde reads.
    pub(super) fn get<T: DeserializeOwned>(&mut self, key: &str) -> Option<T> {
        let value = self.take(key)?;
        let kind = value.type_str();
        match value.try_into() {
            Ok(value) => Some(value),
            // A variable's text may look like another type: `123456` for a name.
            Err(error) => self.raw_text(key).and_then(|raw| raw.try_into().ok()).or_else(|| {
                let message = error.message().split('\n').next().unwrap_or_default().to_owned();
                self.problem(key, format_args!("{message} (found {kind})"));
                None
            }),
        }
    }

    /// The value of `key`, or `default`.
    pub(super) fn or<T: DeserializeOwned>(&mut self, key: &str, default: T) -> T {
        self.get(key).unwrap_or(default)
    }

    /// A whole number within `range`.
    pub(super) fn number<T>(&mut self, key: &str, range: RangeInclusive<T>) -> Option<T>
    where
        T: PartialOrd + Display + TryFrom<i64>,
    {
        let value = match self.take(key)? {
            Value::Integer(value) => T::try_from(value).ok().filter(|n| range.contains(n)),
            _ => None,
        };
        if value.is_none() {
            let (from, to) = (range.start(), range.end());
            self.problem(key, format_args!("must be a whole number from {from} to {to}"));
        }
        value
    }

    /// A text, parsed.
    pub(super) fn parse<T, E: Display>(
        &mut self,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        let value = self.take(key)?;
        let text = match &value {
            Value::String(text) => text.clone(),
            other => match self.raw_text(key) {
                Some(Value::String(raw)) => raw,
                _ => {
                    self.problem(
                        key,
                        format_args!("expected a string, found {}", other.type_str()),
                    );
                    return None;
                }
            },
        };
        match parse(&text) {
            Ok(value) => Some(value),
            Err(error) => {
                self.problem(key, error);
                None
            }
        }
    }

    /// As [`Self::parse`], for a key that must be set.
    pub(super) fn required<T, E: Display>(
        &mut self,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        if !self.has(key) {
            self.asked.insert(key.to_owned());
            self.problem(key, "is missing");
        }
        self.parse(key, parse)
    }

    /// One text or a list of them, each parsed.
    pub(super) fn list<T, E: Display>(
        &mut self,
        key: &str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<Vec<T>> {
        let items = match self.take(key)? {
            Value::Array(items) => items,
            single => vec![single],
        };
        let mut parsed = Vec::with_capacity(items.len());
        for (i, item) in items.iter().enumerate() {
            let Value::String(text) = item else {
                self.problem(
                    key,
                    format_args!("item {i}: expected a string, found {}", item.type_str()),
                );
                continue;
            };
            match parse(text) {
                Ok(value) => parsed.push(value),
                Err(error) => self.problem(key, format_args!("item {i}: {error}")),
            }
        }
        Some(parsed)
    }

    /// One of a few words.
    pub(super) fn choice<T: Copy>(&mut self, key: &str, choices: &[(&str, T)]) -> Option<T> {
        self.parse(key, |text| {
            let found = choices.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
            found.ok_or_else(|| {
                let words: Vec<_> = choices.iter().map(|(word, _)| format!("`{word}`")).collect();
                format!("`{text}` is none of {}", words.join(", "))
            })
        })
    }

    /// A duration such as `15s` or `1m 30s`.
    pub(super) fn duration(&mut self, key: &str) -> Option<Duration> {
        self.parse(key, |text| match humantime::parse_duration(text) {
            Ok(duration) if DURATIONS.contains(&duration) => Ok(duration),
            Ok(_) => Err(format!("`{text}` is not between 1ms and 365days")),
            Err(error) => Err(format!("`{text}` is no duration such as `15s`: {error}")),
        })
    }

    /// A duration that may be turned off by `off`: `Some(None)`.
    pub(super) fn duration_or_off(&mut self, key: &str) -> Option<Option<Duration>> {
        if self.table.get(key).and_then(Value::as_str) == Some("off") {
            self.take(key);
            return Some(None);
        }
        self.duration(key).map(Some)
    }

    /// A number of bytes: an integer, or a text such as `64KiB`.
    pub(super) fn bytes(&mut self, key: &str) -> Option<u64> {
        if let Some(Value::Integer(_)) = self.table.get(key) {
            return self.number(key, 0..=i64::MAX as u64);
        }
        self.parse(key, parse_bytes)
    }

    /// An existing file's path.
    pub(super) fn file(&mut self, key: &str) -> Option<PathBuf> {
        let path: PathBuf = self.get(key)?;
        if self.depends_on(key, &path)
            && let Err(error) = std::fs::File::open(&path)
        {
            self.problem(key, format_args!("cannot read `{}`: {error}", path.display()));
        }
        Some(path)
    }

    /// A secret: `key`, or the contents of the file that `<key>_file` names, never both.
    pub(super) fn secret(&mut self, key: &str) -> Option<crate::secret::Secret> {
        let file_key = format!("{key}_file");
        let direct = match self.take(key) {
            None => None,
            Some(Value::String(text)) => Some(text),
            Some(_) => match self.raw_text(key) {
                Some(Value::String(raw)) => Some(raw),
                _ => {
                    self.problem(key, "expected a string");
                    None
                }
            },
        };
        let path: Option<PathBuf> = self.get(&file_key);
        if path.as_ref().is_some_and(|path| !self.depends_on(&file_key, path)) {
            return None;
        }
        if direct.is_some() && path.is_some() {
            self.problem(key, format_args!("`{key}` and `{file_key}` are both set: keep one"));
            return None;
        }
        let text = match path {
            None => direct?,
            Some(path) => match std::fs::read_to_string(&path).map(Zeroizing::new) {
                Ok(text) => text.trim_end_matches(['\n', '\r']).to_owned(),
                Err(error) => {
                    self.problem(
                        &file_key,
                        format_args!("cannot read `{}`: {error}", path.display()),
                    );
                    return None;
                }
            },
        };
        Some(crate::secret::Secret::new(text))
    }

    /// The table at `key`, empty if it is not set.
    pub(super) fn section(&mut self, key: &str) -> Self {
        let table = match self.take(key) {
            None => Table::new(),
            Some(Value::Table(table)) => table,
            Some(other) => {
                self.problem(key, format_args!("expected a table, found {}", other.type_str()));
                Table::new()
            }
        };
        self.child(key, table)
    }

    /// The tables of the array of tables at `key`, each with its place.
    pub(super) fn sections(&mut self, key: &str) -> Vec<(usize, Self)> {
        let items = match self.take(key) {
            None => Vec::new(),
            Some(Value::Array(items)) => items,
            Some(other) => {
                self.problem(
                    key,
                    format_args!("expected an array of tables, found {}", other.type_str()),
                );
                Vec::new()
            }
        };
        let mut sections = Vec::with_capacity(items.len());
        for (i, item) in items.into_iter().enumerate() {
            match item {
                Value::Table(table) => {
                    sections.push((i, self.child(&format!("{key}[{i}]"), table)))
                }
                other => self.problem(
                    &format!("{key}[{i}]"),
                    format_args!("expected a table, found {}", other.type_str()),
                ),
            }
        }
        sections
    }

    /// A section over a table that a value of this one holds.
    pub(super) fn child(&self, key: &str, table: Table) -> Self {
        let path = self.path_of(key);
        Self { shared: self.shared.clone(), path, table, asked: BTreeSet::new() }
    }

    /// Reports what nobody asked for.
    pub(super) fn finish(self) {
        for key in self.table.keys() {
            let known: Vec<_> = self.asked.iter().map(String::as_str).collect();
            self.problem(key, format_args!("unknown key; known here: {}", known.join(", ")));
        }
    }

    /// As [`Self::finish`], for the root: all problems, sorted by key.
    pub(super) fn problems(self) -> Vec<Problem> {
        let shared = self.shared.clone();
        self.finish();
        let mut problems = shared.problems.take();
        problems.sort();
        problems.dedup();
        problems
    }

    fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn raw_text(&self, key: &str) -> Option<Value> {
        let origin = self.shared.origins.get(&self.path_of(key))?;
        Some(Value::String(origin.raw.to_string()))
    }
}

fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor = match text[digits.len()..].trim() {
        "" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => 0,
    };
    let bytes =
        digits.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).filter(|_| factor > 0);
    bytes.ok_or_else(|| format!("`{text}` is no number of bytes such as `64KiB`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(text: &str) -> Section {
        Section::root(Files::Any, toml::from_str(text).unwrap(), BTreeMap::new(), Vec::new())
    }

    fn problems(section: Section) -> Vec<String> {
        section.problems().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn all_problems_are_reported_with_their_paths() {
        let mut r = root("a = 'x'\nb = 5\n[s]\nd = '0s'\nu = 1\n[[t]]\nn = true\n");
        assert_eq!(r.get::<u16>("a"), None);
        assert_eq!(r.parse("b", |t| t.parse::<std::net::IpAddr>()), None);
        let mut s = r.section("s");
        assert_eq!(s.duration("d"), None);
        s.finish();
        for (_, mut t) in r.sections("t") {
            assert_eq!(t.choice("n", &[("x", 1)]), None);
            t.finish();
        }
        let found = problems(r);
        assert_eq!(found.len(), 5, "{found:#?}");
        for (line, start) in found.iter().zip([
            "a: ",
            "b: expected a string",
            "s.d: `0s` is not between",
            "s.u: unknown key; known here: d",
            "t[0].n: ",
        ]) {
            assert!(line.starts_with(start), "{line} / {start}");
        }
    }

    #[test]
    fn sizes_have_units() {
        let mut r = root("a = 5\nb = '64KiB'\nc = '2 MiB'\nd = '1.5MiB'\ne = '99999999999GiB'\n");
        assert_eq!(r.bytes("a"), Some(5));
        assert_eq!(r.bytes("b"), Some(65_536));
        assert_eq!(r.bytes("c"), Some(2 << 20));
        assert_eq!(r.bytes("d"), None);
        assert_eq!(r.bytes("e"), None);
        assert_eq!(problems(r).len(), 2);
    }

    #[test]
    fn a_secret_comes_from_one_place_and_is_never_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("secret");
        std::fs::write(&file, "from-file\n").unwrap();
        let path = file.display();
        let mut r = root(&format!(
            "a_file = '{path}'\nb = 'hunter2'\nb_file = '{path}'\nc_file = '/absent'\nd = 77\n"
        ));
        assert_eq!(r.secret("a").unwrap().expose(), "from-file");
        assert!(r.secret("b").is_none());
        assert!(r.secret("c").is_none());
        assert!(r.secret("d").is_none());
        let found = problems(r).join("\n");
        assert!(found.contains("b: `b` and `b_file` are both set"), "{found}");
        assert!(found.contains("c_file: cannot read"), "{found}");
        assert!(!found.contains("hunter2") && !found.contains("77"), "{found}");
    }
}
