//! `otpgate store import`: entries of an export, or of ungleich-otp.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use data_encoding::HEXLOWER;
use ring::digest::{SHA256, digest};
use serde_json::json;
use zeroize::Zeroizing;

use super::progress::Progress;
use crate::cli::{Failure, Settings};
use crate::client::printable;
use crate::clock::{Clock as _, SystemClock};
use crate::config::Config;
use crate::entry::{Entry, EntryId};
use crate::logging::init_file_trail;
use crate::store::Store;
use crate::store::export::{Checked, ExportFile};
use crate::store::import::{Candidates, Compared, Source};
use crate::store::open::opener;

mod database;
mod dump;

use database::Database;
use dump::Dump;

/// How every SQLite file begins.
const SQLITE: &[u8] = b"SQLite format 3\0";
/// The most records that a report names.
const MAX_NAMED: usize = 1_000;

/// Arguments of `otpgate store import`.
///
/// A new or empty store opens to gates when all entries are in it; until then they answer 503. Run it
/// again if it was broken off: it goes on.
#[derive(Clone, Debug, Args)]
pub struct ImportArgs {
    #[command(flatten)]
    settings: Settings,
    /// File that `otpgate store export` or `manage.py dumpdata` wrote, or ungleich-otp's db.sqlite3
    file: PathBuf,
    /// File with a sealing key that an export's entries need beside the keys of this store; can be given
    /// several times
    #[arg(long, value_name = "FILE")]
    export_key_file: Vec<PathBuf>,
    /// Leave out entries of an export that cannot be opened, instead of importing nothing
    ///
    /// Who they belong to is unknown to the new store: refused, where the old one answered 503.
    #[arg(long)]
    skip_unopened: bool,
    /// Write nothing, only tell what would be taken
    #[arg(long)]
    dry_run: bool,
    /// For machines: {"imported", "present", "refused"}
    #[arg(long)]
    json: bool,
}

/// What is to be imported.
struct Cargo {
    source: Box<dyn Source>,
    candidates: Candidates,
    /// Whether the store has an entry already.
    same: fn(&Entry, &Entry) -> bool,
    /// Says which file it is.
    tag: String,
    /// Numbers below this were given already.
    next_id: Option<EntryId>,
    /// What cannot be imported, whatever the store holds.
    refused: Refused,
}

/// Records that are not imported.
#[derive(Default)]
struct Refused {
    count: u64,
    /// The first of them, and why.
    named: Vec<(String, String)>,
}

/// What became of a file's records.
struct Report {
    imported: u64,
    /// Already in the store, the same.
    present: u64,
    refused: Refused,
}

/// Reads the file, takes over every usable entry and tells what could not be taken. Can be run again:
/// what is there already, and the same, is left alone.
///
/// # Errors
/// If the file is none of ours or the store fails.
pub async fn run(args: ImportArgs) -> Result<ExitCode, Failure> {
    let config = args.settings.load_store()?;
    let cargo = read(&args, &config).map_err(|e| format!("`{}`: {e}", args.file.display()))?;
    let _logging = init_file_trail(&config.log)?;
    let report = if args.dry_run {
        look(&Store::open_as_it_is(&config.store)?, cargo).await?
    } else {
        import(&Store::open(&config.store)?, cargo).await?
    };
    super::print(&text_of(&report, &args))?;
    Ok(if report.refused.count == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Reads and checks all of the file.
fn read(args: &ImportArgs, config: &Config) -> Result<Cargo, Failure> {
    let sealer = opener(&config.store, &args.export_key_file)?;
    if let Some(file) = ExportFile::open(&args.file, sealer)? {
        return read_export(file, args);
    }
    let text = std::fs::read(&args.file).map(Zeroizing::new)?;
    let now = SystemClock.now().unix;
    let (dump, next_id) = if text.starts_with(SQLITE) {
        let Database { records, next_id } = database::read(&args.file)
            .map_err(|e| format!("it is an SQLite file that cannot be imported: {e}"))?;
        (Dump::of(records.into_iter(), now), next_id)
    } else {
        let dump = Dump::read(&text, now)
            .map_err(|e| format!("it is neither an export nor a `dumpdata` file: {e}"))?;
        (dump, None)
    };
    let named = dump.refused.clone();
    Ok(Cargo {
        candidates: dump.candidates(),
        same: |old, new| (old.id, &old.seed) == (new.id, &new.seed),
        tag: HEXLOWER.encode(digest(&SHA256, &text).as_ref()),
        next_id,
        refused: Refused { count: named.len() as u64, named },
        source: Box::new(dump),
    })
}

fn read_export(mut file: ExportFile, args: &ImportArgs) -> Result<Cargo, Failure> {
    let progress = Progress::of_bytes("checking", length(&args.file));
    let checked = file.check(|read| progress.show(read))?;
    drop(progress);
    let Checked { sealed, next_id, sha256, candidates, unopened, named, .. } = checked;
    if !sealed && !args.json {
        super::note("otpgate: the export holds readable seeds: nothing shows who made it");
    }
    let named =
        named.into_iter().map(|one| (format!("id {} ({})", one.id, one.principal), one.why));
    let refused = Refused { count: unopened, named: named.collect() };
    if refused.count > 0 && !args.skip_unopened {
        let list = refused.text();
        return Err(format!(
            "{unopened} entries cannot be opened, nothing is imported (`--skip-unopened` leaves them \
             out){list}"
        )
        .into());
    }
    let same = |old: &Entry, new: &Entry| old == new;
    let (tag, next_id) = (sha256, Some(next_id));
    Ok(Cargo { source: Box::new(file), candidates, same, tag, next_id, refused })
}

/// Zero if it cannot be told: reading will say why.
fn length(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |meta| meta.len())
}

/// What an import would do.
async fn look(store: &Store, mut cargo: Cargo) -> Result<Report, Failure> {
    let compared = compare(store, &mut cargo).await?;
    Ok(Report::new(compared, cargo.refused))
}

async fn import(store: &Store, mut cargo: Cargo) -> Result<Report, Failure> {
    let importer = store.begin_import(&cargo.tag).await?;
    let filled = match &importer {
        Some(importer) => fill_closed(importer, &mut cargo).await,
        None => fill(store, &mut cargo).await,
    };
    let compared = filled.map_err(|e| format!("{e}; run it again to go on"))?;
    Ok(Report::new(compared, cargo.refused))
}

/// Fills a store that is closed until all is in it, and opens it: what gates do not find there then, they
/// refuse.
async fn fill_closed(importer: &Store, cargo: &mut Cargo) -> Result<Compared, Failure> {
    let compared = fill(importer, cargo).await?;
    // An import alone wrote there, of the same file.
    if compared.clashes > 0 {
        let count = compared.clashes;
        return Err(format!(
            "{count} entries that this import wrote before are not as in the file, so the store stays \
             closed: was it begun with another `store.key_file`? Use that, or add it to \
             `store.old_key_files`"
        )
        .into());
    }
    let again = compare(importer, cargo).await?;
    if again.new + again.clashes > 0 {
        let count = again.new + again.clashes;
        return Err(format!(
            "the store has lost or changed {count} entries that it took, so it stays closed: did it fail \
             over?"
        )
        .into());
    }
    importer.end_import().await?;
    Ok(compared)
}

async fn fill(target: &Store, cargo: &mut Cargo) -> Result<Compared, Failure> {
    let compared = compare(target, cargo).await?;
    let mut progress = Progress::new("importing", Some(compared.new));
    let mut done = 0;
    let insert = target.take_over(&cargo.candidates, &mut *cargo.source, |batch| {
        super::note_write("store_import", None, Some(batch));
        done += batch as u64;
        progress.reach(done);
    });
    insert.await?;
    if let Some(next_id) = cargo.next_id {
        target.raise_next_id(next_id).await?;
    }
    Ok(compared)
}

async fn compare(store: &Store, cargo: &mut Cargo) -> Result<Compared, Failure> {
    let progress = Progress::of_store("comparing", store).await;
    let Cargo { candidates, source, same, .. } = cargo;
    Ok(store.compare(candidates, &mut **source, *same, |seen| progress.show(seen)).await?)
}

impl Report {
    fn new(compared: Compared, mut refused: Refused) -> Self {
        let Compared { new, present, clashes, named } = compared;
        refused.count += clashes;
        let room = MAX_NAMED.saturating_sub(refused.named.len());
        let named = named.into_iter().map(|(record, why)| (record, why.to_owned()));
        refused.named.extend(named.take(room));
        Self { imported: new, present, refused }
    }
}

impl Refused {
    /// A line each.
    fn text(&self) -> String {
        // Names that were refused for their control characters are among them.
        let line = |(record, why): &(String, String)| format!("\n  {}: {why}", printable(record));
        let mut text: String = self.named.iter().map(line).collect();
        let more = self.count - self.named.len() as u64;
        if more > 0 {
            text.push_str(&format!("\n  and {more} more"));
        }
        text
    }
}

fn text_of(report: &Report, args: &ImportArgs) -> String {
    let Report { imported, present, refused } = report;
    if args.json {
        let refused: Vec<_> = refused
            .named
            .iter()
            .map(|(record, reason)| json!({ "record": record, "reason": reason }))
            .collect();
        return json!({ "imported": imported, "present": present, "refused": refused }).to_string();
    }
    let verb = if args.dry_run { "would be imported" } else { "imported" };
    let (count, list) = (refused.count, refused.text());
    format!("{imported} {verb}, {present} there already, {count} refused{list}")
}
