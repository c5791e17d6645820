//! `otpgate store rekey`: the last but one step of a change of sealing keys.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::progress::Progress;
use crate::audit::Event;
use crate::cli::{Failure, Settings};
use crate::config::Sealing;
use crate::logging;
use crate::store::Store;
use crate::store::rekey::Rekeyed;

/// Arguments of `otpgate store rekey`.
#[derive(Clone, Debug, Args)]
pub struct RekeyArgs {
    #[command(flatten)]
    settings: Settings,
    /// Also seal entries that are not sealed, as `sealing = "off"` left them
    ///
    /// Whoever may write to the store can put such entries there, and sealing makes them trusted: do
    /// this once, right after turning sealing on.
    #[arg(long)]
    seal_plain: bool,
    /// For machines: {"rekeyed", "already", "unopened", "unopened_entries", "old_keys"}
    #[arg(long)]
    json: bool,
}

/// Seals every entry with the writing key and tells which old keys may go.
///
/// # Errors
/// If sealing is off or the store fails.
pub async fn run(args: RekeyArgs) -> Result<ExitCode, Failure> {
    let config = args.settings.load_store()?;
    let Sealing::KeyFile { old, .. } = &config.store.sealing else {
        return Err("`store.sealing` is off: there is no key to seal entries with".into());
    };
    let (_logging, _) = logging::init(&config.log)?;
    let store = Store::open(&config.store)?;
    let mut progress = Progress::of_store("sealing", &store).await;
    let report = store
        .rekey(args.seal_plain, |seen| progress.reach(seen))
        .await
        .map_err(|e| format!("{e}; what was sealed anew stays so, run it again to go on"))?;
    drop(progress);
    audit(&report);
    super::print(&if args.json { json_of(&report, old) } else { text_of(&report, old) })?;
    Ok(if report.is_complete() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn audit(report: &Rekeyed) {
    let (outcome, reason) = match report {
        report if report.is_complete() => ("done", None),
        Rekeyed { unopened: 0, .. } => ("incomplete", Some("old_key_in_use")),
        _ => ("incomplete", Some("unopened_entries")),
    };
    let entries = usize::try_from(report.rekeyed).ok();
    let caller = Some(super::this_user());
    Event { action: "store_rekey", outcome, reason, caller, entries, ..Event::default() }.log();
}

fn json_of(report: &Rekeyed, old: &[PathBuf]) -> String {
    let Rekeyed { rekeyed, already, unopened, named, old_keys } = report;
    let named: Vec<_> = named
        .iter()
        .map(|entry| {
            let (name, realm) = (&entry.principal.name, &entry.principal.realm);
            json!({ "id": entry.id, "name": name, "realm": realm, "reason": entry.why })
        })
        .collect();
    let old_keys: Vec<_> = old
        .iter()
        .zip(old_keys)
        .map(|(file, (key, entries))| {
            json!({ "file": file.display().to_string(), "key": key.to_string(), "entries": entries })
        })
        .collect();
    json!({
        "rekeyed": rekeyed, "already": already, "unopened": unopened,
        "unopened_entries": named, "old_keys": old_keys,
    })
    .to_string()
}

fn text_of(report: &Rekeyed, old: &[PathBuf]) -> String {
    let Rekeyed { rekeyed, already, unopened, named, old_keys } = report;
    let mut text = format!("{rekeyed} rekeyed, {already} already, {unopened} cannot be opened");
    for entry in named {
        text.push_str(&format!("\n  id {} ({}): {}", entry.id, entry.principal, entry.why));
    }
    let more = unopened - named.len() as u64;
    if more > 0 {
        text.push_str(&format!("\n  and {more} more"));
    }
    for (file, (key, entries)) in old.iter().zip(old_keys) {
        let file = file.display();
        text.push_str(&match entries {
            0 => format!(
                "\nno entry needs the old key {file} ({key}) any more: it may be dropped, if no gate \
                 writes with it"
            ),
            1 => format!("\n1 entry still needs the old key {file} ({key})"),
            n => format!("\n{n} entries still need the old key {file} ({key})"),
        });
    }
    text
}
