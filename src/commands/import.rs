//! `otpgate store import`: entries of ungleich-otp, from Django's `dumpdata` JSON.

use std::collections::HashSet;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;
use zeroize::Zeroizing;

use crate::cli::{Failure, Settings};
use crate::client::printable;
use crate::clock::{Clock as _, SystemClock, UnixTime};
use crate::entry::{Entry, EntryId, Name, Principal, PrincipalRef, Realm, Seed};
use crate::logging::init_file_trail;
use crate::store::Store;

/// Entries written at once.
const BATCH: usize = 200;
/// The model that holds entries, without its app's name: apps may be renamed.
const MODEL: &str = "otpseed";

/// Arguments of `otpgate store import`.
#[derive(Clone, Debug, Args)]
pub struct ImportArgs {
    #[command(flatten)]
    settings: Settings,
    /// File that `manage.py dumpdata` wrote
    file: PathBuf,
    /// Write nothing, only tell what would be taken
    #[arg(long)]
    dry_run: bool,
    /// For machines: {"imported", "present", "refused"}
    #[arg(long)]
    json: bool,
}

/// One object of a dump. Its fields are read only if it is an entry: other models have others.
#[derive(Deserialize)]
struct DumpObject<'a> {
    model: String,
    #[serde(default)]
    pk: serde_json::Value,
    #[serde(borrow)]
    fields: Option<&'a RawValue>,
}

#[derive(Default, Deserialize)]
struct DumpFields {
    #[serde(default)]
    name: String,
    #[serde(default)]
    realm: String,
    #[serde(default)]
    seed: Zeroizing<String>,
}

/// What became of a dump's records.
#[derive(Default)]
struct Report {
    imported: usize,
    /// Already in the store, the same.
    present: usize,
    /// Record and reason.
    refused: Vec<(String, String)>,
}

/// Reads the file, takes over every usable entry and tells what could not be taken. Can be run again:
/// what is there already, and the same, is left alone.
///
/// # Errors
/// If the file is no dump or the store fails.
pub async fn run(args: ImportArgs) -> Result<ExitCode, Failure> {
    let config = args.settings.load()?;
    let text = std::fs::read(&args.file)
        .map(Zeroizing::new)
        .map_err(|e| format!("cannot read `{}`: {e}", args.file.display()))?;
    // serde's message may quote a seed: say only where it stopped.
    let objects: Vec<DumpObject<'_>> = serde_json::from_slice(&text).map_err(|e| {
        let (line, column) = (e.line(), e.column());
        format!("`{}` is not a `dumpdata` file: line {line}, column {column}", args.file.display())
    })?;
    let mut report = Report::default();
    let entries = usable(objects, SystemClock.now().unix, &mut report);
    let _logging = init_file_trail(&config.log)?;
    let store = Store::open(&config.store)?;
    if !args.dry_run {
        store.init().await?;
    }
    let new = absent(&store, entries, &mut report).await?;
    if !args.dry_run {
        for batch in new.chunks(BATCH) {
            store.insert(batch).await?;
            super::note_write("store_import", None, Some(batch.len()));
        }
    }
    report.imported = new.len();
    super::print(&text_of(&report, &args))?;
    Ok(if report.refused.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The entries that make sense by themselves.
fn usable(objects: Vec<DumpObject<'_>>, now: UnixTime, report: &mut Report) -> Vec<Entry> {
    let mut principals = HashSet::new();
    let mut ids = HashSet::new();
    let mut entries = Vec::new();
    for (i, object) in objects.into_iter().enumerate() {
        let model = object.model.rsplit('.').next().unwrap_or_default();
        if !model.eq_ignore_ascii_case(MODEL) {
            continue;
        }
        let fields = object.fields.map_or("{}", RawValue::get);
        // serde's message may quote the seed.
        let Ok(fields) = serde_json::from_str::<DumpFields>(fields) else {
            let reason = "its name, realm and seed are not all texts".to_owned();
            report.refused.push((format!("record {}", i + 1), reason));
            continue;
        };
        let label = format!("record {} ({}@{})", i + 1, fields.name, fields.realm);
        let entry = match parse(&object.pk, &fields, now) {
            Ok(entry) => entry,
            Err(reason) => {
                report.refused.push((label, reason));
                continue;
            }
        };
        let twice = !principals.insert(entry.principal.clone()) | !ids.insert(entry.id);
        if twice {
            report.refused.push((label, "stands twice in the file".to_owned()));
        } else {
            entries.push(entry);
        }
    }
    entries
}

fn parse(pk: &serde_json::Value, fields: &DumpFields, now: UnixTime) -> Result<Entry, String> {
    let id = pk.as_u64().filter(|id| (1..EntryId::MAX.0).contains(id));
    let id = id.ok_or("its pk is no positive number")?;
    let name = Name::parse(&fields.name).map_err(|e| format!("its name {e}"))?;
    let realm = Realm::parse(&fields.realm).map_err(|e| format!("its realm {e}"))?;
    let seed = Seed::parse(&fields.seed).map_err(|e| format!("its seed {e}"))?;
    Ok(Entry::new(EntryId(id), Principal { realm, name }, seed, now))
}

/// The entries that the store does not hold; those that clash with it are refused.
async fn absent(
    store: &Store,
    entries: Vec<Entry>,
    report: &mut Report,
) -> Result<Vec<Entry>, Failure> {
    let mut new = Vec::new();
    for entry in entries {
        let label = format!("id {} ({})", entry.id, entry.principal);
        let same_principal = match store.get(PrincipalRef::from(&entry.principal)).await {
            // A dry run looks at a store that need not exist yet.
            Err(crate::store::StoreError::NotInitialised) => None,
            other => other?,
        };
        match same_principal {
            Some(old) if old.entry.as_ref().is_ok_and(|old| is_same(old, &entry)) => {
                report.present += 1;
            }
            Some(_) => {
                report.refused.push((label, "the store has another entry of that name".into()))
            }
            None => match store.get_by_id(entry.id).await {
                Ok(Some(_)) => {
                    report.refused.push((label, "the store uses that id otherwise".into()))
                }
                Ok(None) | Err(crate::store::StoreError::NotInitialised) => new.push(entry),
                Err(error) => return Err(error.into()),
            },
        }
    }
    Ok(new)
}

fn is_same(old: &Entry, new: &Entry) -> bool {
    (old.id, &old.seed) == (new.id, &new.seed)
}

fn text_of(report: &Report, args: &ImportArgs) -> String {
    let Report { imported, present, refused } = report;
    if args.json {
        let refused: Vec<_> = refused
            .iter()
            .map(|(record, reason)| json!({ "record": record, "reason": reason }))
            .collect();
        return json!({ "imported": imported, "present": present, "refused": refused }).to_string();
    }
    let verb = if args.dry_run { "would be imported" } else { "imported" };
    let count = refused.len();
    let mut text = format!("{imported} {verb}, {present} there already, {count} refused");
    for (record, reason) in refused {
        // Names that were refused for their control characters are among them.
        text.push_str(&format!("\n  {}: {reason}", printable(record)));
    }
    text
}
