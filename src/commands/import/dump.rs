//! Entries of ungleich-otp: Django's `dumpdata` JSON, and what its database gives.

use std::collections::HashSet;

use serde::Deserialize;
use serde_json::value::RawValue;
use zeroize::Zeroizing;

use crate::cli::Failure;
use crate::clock::UnixTime;
use crate::entry::{Entry, EntryId, Name, Principal, Realm, Seed};
use crate::store::export::ReadError;
use crate::store::import::{Candidates, Gathering, Source};

/// The model that holds entries, without its app's name: apps may be renamed.
const MODEL: &str = "otpseed";

/// One object of a dump. Its fields are read only if it is an entry: other models have others.
#[derive(Deserialize)]
struct DumpObject<'a> {
    model: String,
    #[serde(default)]
    pk: serde_json::Value,
    #[serde(borrow)]
    fields: Option<&'a RawValue>,
}

/// What ungleich-otp keeps of an entry.
#[derive(Default, Deserialize)]
pub(super) struct Fields {
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) realm: String,
    #[serde(default)]
    pub(super) seed: Zeroizing<String>,
}

/// One entry of a file.
pub(super) struct Record {
    /// Where it stands, counted from 1.
    pub(super) number: usize,
    /// Its pk and fields; `None`: they are not of the right kinds.
    pub(super) said: Option<(Option<u64>, Fields)>,
}

/// The usable entries of a dump.
pub(super) struct Dump {
    entries: Vec<Entry>,
    /// Record and reason of the others.
    pub(super) refused: Vec<(String, String)>,
}

impl Dump {
    /// Reads the text of a file.
    ///
    /// # Errors
    /// If it is no dump.
    pub(super) fn read(text: &[u8], now: UnixTime) -> Result<Self, Failure> {
        // serde's message may quote a seed: say only where it stopped.
        let objects: Vec<DumpObject<'_>> = serde_json::from_slice(text)
            .map_err(|e| format!("line {}, column {}", e.line(), e.column()))?;
        Ok(Self::of(records(objects), now))
    }

    /// Takes what makes sense.
    pub(super) fn of(records: impl Iterator<Item = Record>, now: UnixTime) -> Self {
        let mut refused = Vec::new();
        let entries = usable(records, now, &mut refused);
        Self { entries, refused }
    }

    /// Its entries, each principal and number once.
    pub(super) fn candidates(&self) -> Candidates {
        let mut found = Gathering::default();
        for (place, entry) in self.entries.iter().enumerate() {
            found.put(&entry.principal, entry.id, place as u64, true);
        }
        found.sort().expect("what stands twice was refused").0
    }
}

impl Source for Dump {
    fn entry(&mut self, place: u64) -> Result<Entry, ReadError> {
        let entry = usize::try_from(place).ok().and_then(|place| self.entries.get(place));
        entry.cloned().ok_or(ReadError::Changed)
    }
}

/// What a dump says of each entry.
fn records(objects: Vec<DumpObject<'_>>) -> impl Iterator<Item = Record> {
    objects.into_iter().enumerate().filter_map(|(i, object)| {
        let model = object.model.rsplit('.').next().unwrap_or_default();
        let is_entry = model.eq_ignore_ascii_case(MODEL);
        is_entry.then(|| {
            let fields = object.fields.map_or("{}", RawValue::get);
            // serde's message may quote the seed.
            let said = serde_json::from_str(fields).ok().map(|fields| (object.pk.as_u64(), fields));
            Record { number: i + 1, said }
        })
    })
}

/// The entries that make sense by themselves.
fn usable(
    records: impl Iterator<Item = Record>,
    now: UnixTime,
    refused: &mut Vec<(String, String)>,
) -> Vec<Entry> {
    let mut principals = HashSet::new();
    let mut ids = HashSet::new();
    let mut entries = Vec::new();
    for Record { number, said } in records {
        let Some((id, fields)) = said else {
            let reason = "its name, realm and seed are not all texts".to_owned();
            refused.push((format!("record {number}"), reason));
            continue;
        };
        let label = format!("record {number} ({}@{})", fields.name, fields.realm);
        let entry = match parse(id, &fields, now) {
            Ok(entry) => entry,
            Err(reason) => {
                refused.push((label, reason));
                continue;
            }
        };
        let twice = !principals.insert(entry.principal.clone()) | !ids.insert(entry.id);
        if twice {
            refused.push((label, "stands twice in the file".to_owned()));
        } else {
            entries.push(entry);
        }
    }
    entries
}

fn parse(id: Option<u64>, fields: &Fields, now: UnixTime) -> Result<Entry, String> {
    let id = id.filter(|id| (1..EntryId::MAX.0).contains(id));
    let id = id.ok_or("its pk is no positive number")?;
    let name = Name::parse(&fields.name).map_err(|e| format!("its name {e}"))?;
    let realm = Realm::parse(&fields.realm).map_err(|e| format!("its realm {e}"))?;
    let seed = Seed::parse(&fields.seed).map_err(|e| format!("its seed {e}"))?;
    Ok(Entry::new(EntryId(id), Principal { realm, name }, seed, now))
}
