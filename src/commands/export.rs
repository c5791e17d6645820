//! `otpgate store export`: all entries in a file.

use std::fs;
use std::io::{self, IsTerminal as _, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use serde_json::json;
use tempfile::NamedTempFile;
use tokio::signal::unix::{SignalKind, signal};

use super::progress::Progress;
use super::this_user;
use crate::audit::Event;
use crate::cli::{Failure, Settings, Usage};
use crate::clock::SystemClock;
use crate::config::Sealing;
use crate::logging::init_file_trail;
use crate::store::Store;
use crate::store::export::{ExportFile, Exported};

/// Arguments of `otpgate store export`.
#[derive(Clone, Debug, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    settings: Settings,
    /// File to write, for its owner alone; it appears when it is complete, in place of an older
    /// export
    /// [default: standard output; `-` also if that is a terminal]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write seeds that everybody can read who can read the file
    ///
    /// Otherwise entries stay sealed as they are in the store, and the file is of no use without the
    /// sealing key.
    #[arg(long)]
    reveal_seeds: bool,
    /// For machines: {"entries", "changes", "unopened", "version"}; on standard error if the export goes to
    /// standard output
    #[arg(long)]
    json: bool,
}

impl ExportArgs {
    /// The file to write, unless it is standard output.
    fn file(&self) -> Option<&Path> {
        self.output.as_deref().filter(|path| *path != Path::new("-"))
    }
}

/// Writes the file and tells what is in it.
///
/// # Errors
/// If seeds would be readable that should not, the store fails, or the file cannot be written.
pub async fn run(args: ExportArgs) -> Result<ExitCode, Failure> {
    if args.output.is_none() && io::stdout().is_terminal() {
        let usage = "the export would go to the terminal: name a file with `--output`, or `-`";
        return Err(Usage(usage.into()).into());
    }
    let config = args.settings.load_store()?;
    if matches!(config.store.sealing, Sealing::Off) && !args.reveal_seeds {
        let refusal = "`store.sealing` is off, so the export would hold readable seeds: say \
                       `--reveal-seeds` if that is meant";
        return Err(refusal.into());
    }
    if let Some(path) = args.file() {
        check_replaceable(path)?;
    }
    let _logging = init_file_trail(&config.log)?;
    let store = Store::open_as_it_is(&config.store)?;
    if args.reveal_seeds {
        super::note("otpgate: the export holds seeds: whoever reads it can be anybody");
    }
    let result = tokio::select! {
        result = write(&store, &args) => result,
        // What is half written is removed on the way out. On standard output nothing is, and who reads that
        // may let this process wait for ever: signals end it as any other.
        () = stopped(), if args.file().is_some() => Err("interrupted, nothing was exported".into()),
    };
    Event {
        action: "store_export",
        outcome: if result.is_ok() { "done" } else { "failed" },
        caller: Some(this_user()),
        seeds: Some(args.reveal_seeds),
        entries: result.as_ref().ok().and_then(|done| usize::try_from(done.entries).ok()),
        ..Event::default()
    }
    .log();
    tell(&result?, &args)?;
    Ok(ExitCode::SUCCESS)
}

/// Fails if something stands at `path` that is no export: a mistyped name must not cost a key, a database or
/// a device.
fn check_replaceable(path: &Path) -> Result<(), Failure> {
    let name = path.display();
    let refuse = |what: &str| format!("`{name}` is {what}, it is not replaced: name another file");
    let meta = match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(|e| format!("cannot write `{name}`: {e}"))?,
    };
    if !meta.is_file() {
        return Err(refuse("no regular file").into());
    }
    let is_export = meta.len() == 0
        || ExportFile::is_one(path).map_err(|e| format!("cannot read what is in `{name}`: {e}"))?;
    if is_export { Ok(()) } else { Err(refuse("there and no export").into()) }
}

async fn write(store: &Store, args: &ExportArgs) -> Result<Exported, Failure> {
    let mut progress = Progress::of_store("exporting", store).await;
    let reach = |done| progress.reach(done);
    let clock = Arc::new(SystemClock);
    let Some(path) = args.file() else {
        return Ok(store.export(&mut io::stdout(), args.reveal_seeds, clock, reach).await?);
    };
    let cannot = |e: io::Error| format!("cannot write `{}`: {e}", path.display());
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Mode 0600, and gone unless it is complete.
    let mut draft = NamedTempFile::new_in(directory).map_err(cannot)?;
    let exported = store.export(draft.as_file_mut(), args.reveal_seeds, clock, reach).await?;
    draft.as_file().sync_all().map_err(cannot)?;
    draft.persist(path).map_err(|e| cannot(e.error))?;
    fs::File::open(directory).and_then(|d| d.sync_all()).map_err(cannot)?;
    Ok(exported)
}

/// Waits until this process is asked to end.
async fn stopped() {
    match (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
        (Ok(mut interrupt), Ok(mut terminate)) => {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        }
        // Then it ends at once, as if nobody listened.
        _ => std::future::pending().await,
    }
}

fn tell(done: &Exported, args: &ExportArgs) -> Result<(), Failure> {
    let Exported { version, entries, changes, unopened } = done;
    let text = if args.json {
        let version = version.0;
        json!({ "entries": entries, "changes": changes, "unopened": unopened, "version": version })
            .to_string()
    } else {
        format!(
            "{entries} entries exported, {changes} changes since, up to version {version}; {unopened} \
             cannot be opened"
        )
    };
    if args.file().is_some() {
        return super::print(&text);
    }
    writeln!(io::stderr(), "{text}").map_err(|e| format!("cannot write the result: {e}").into())
}
