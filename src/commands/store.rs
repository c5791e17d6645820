//! `otpgate store`: work on the store itself, also while gates run on it.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::json;

use super::{block_on, export, import, note_write, print, rekey, verify};
use crate::cli::{Failure, Settings, Usage};
use crate::client::read_seed;
use crate::clock::{Clock as _, SystemClock};
use crate::entry::{Entry, Name, Principal, Seed};
use crate::logging::init_file_trail;
use crate::store::{Store, StoreError};

/// Arguments of `otpgate store`.
#[derive(Clone, Debug, Args)]
pub struct StoreArgs {
    #[command(subcommand)]
    command: StoreCommand,
}

#[derive(Clone, Debug, Subcommand)]
enum StoreCommand {
    /// Make a new store usable
    Init {
        #[command(flatten)]
        settings: Settings,
        /// For machines: {"created"}
        #[arg(long)]
        json: bool,
    },
    /// Make the first admin entry, in a new store or one without it
    Bootstrap(BootstrapArgs),
    /// Write all entries to a file, for a backup or a move, also while gates run
    Export(export::ExportArgs),
    /// Take entries over from an export, or from ungleich-otp's `dumpdata` JSON; their ids are kept
    Import(import::ImportArgs),
    /// Tell whether what is stored agrees with itself, and with what gates hold
    Verify(verify::VerifyArgs),
    /// Seal every entry anew with `store.key_file`, also while gates run; can be run again
    Rekey(rekey::RekeyArgs),
}

#[derive(Clone, Debug, Args)]
struct BootstrapArgs {
    #[command(flatten)]
    settings: Settings,
    /// Name of the entry
    #[arg(long, default_value = "admin")]
    name: String,
    /// Its realm [default: the admin realm of the configuration]
    #[arg(long)]
    realm: Option<String>,
    /// File with the seed to use instead of a random one, `-` for standard input
    #[arg(long, value_name = "FILE")]
    seed_file: Option<PathBuf>,
    /// For machines: {"id", "name", "realm", "seed"}
    #[arg(long)]
    json: bool,
}

/// Runs one of them.
///
/// # Errors
/// What failed.
pub fn run(args: StoreArgs) -> Result<ExitCode, Failure> {
    match args.command {
        StoreCommand::Init { settings, json } => block_on(init(settings, json)),
        StoreCommand::Bootstrap(args) => block_on(bootstrap(args)),
        StoreCommand::Export(args) => block_on(export::run(args)),
        StoreCommand::Import(args) => block_on(import::run(args)),
        StoreCommand::Verify(args) => block_on(verify::run(args)),
        StoreCommand::Rekey(args) => block_on(rekey::run(args)),
    }
}

async fn init(settings: Settings, as_json: bool) -> Result<ExitCode, Failure> {
    let config = settings.load_store()?;
    let _logging = init_file_trail(&config.log)?;
    let created = Store::open(&config.store)?.init().await?;
    if created {
        note_write("store_init", None, None);
    }
    print(&match (as_json, created) {
        (true, _) => json!({ "created": created }).to_string(),
        (false, true) => "the store is ready".to_owned(),
        (false, false) => "the store was ready already".to_owned(),
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn bootstrap(args: BootstrapArgs) -> Result<ExitCode, Failure> {
    let config = args.settings.load_store()?;
    let realm = args.realm.as_deref().unwrap_or(config.realms.admin.as_str());
    Name::parse(&args.name).map_err(|e| Usage(format!("--name {e}")))?;
    let principal =
        Principal::parse(&args.name, realm).map_err(|e| Usage(format!("--realm {e}")))?;
    let seed = match &args.seed_file {
        Some(path) => read_seed(path)?,
        None => Seed::random(),
    };
    let _logging = init_file_trail(&config.log)?;
    let store = Store::open(&config.store)?;
    store.init().await?;
    let now = SystemClock.now().unix;
    let created = store.create(|id| Entry::new(id, principal.clone(), seed, now)).await;
    let (entry, _) = match created {
        Err(StoreError::Conflict) => {
            return Err(format!("there is an entry of {principal} already").into());
        }
        other => other?,
    };
    note_write("store_bootstrap", Some(&entry), None);
    let who = &entry.principal;
    print_once(&entry, args.json)
        .map_err(|e| format!("{e}; {who} was made, but nobody knows its seed"))?;
    Ok(ExitCode::SUCCESS)
}

/// The only time that the seed is shown here.
fn print_once(entry: &Entry, as_json: bool) -> Result<(), Failure> {
    let Principal { name, realm } = &entry.principal;
    let seed = entry.seed.expose();
    print(&if as_json {
        json!({ "id": entry.id, "name": name, "realm": realm, "seed": seed }).to_string()
    } else {
        format!("id     {}\nname   {name}\nrealm  {realm}\nseed   {seed}", entry.id)
    })
}
