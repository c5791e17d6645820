//! Replays the recorded cases of ungleich-otp against a gate. What differs must be exactly what
//! `docs/conformance.md` lists: that table is the only list.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use otpgate::entry::Seed;
use serde_json::Value;

use crate::api_harness::*;

/// Entries of preload.jsonl whose seeds are no base32: no token of theirs can ever be right, so they
/// cannot be imported.
const NOT_IMPORTABLE: [&str; 3] = ["p-bad", "p-empty", "p-auth-bad"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Runs a program to its end. Blocks a thread, not the runtime.
async fn output_of(mut command: std::process::Command) -> std::process::Output {
    command.stdin(Stdio::null());
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

async fn python() -> PathBuf {
    let made = output_of(std::process::Command::new(root().join("tests/tools/venv"))).await;
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    PathBuf::from(String::from_utf8(made.stdout).unwrap().trim())
}

/// Puts the preloaded entries into the store and writes those that were taken to a file.
async fn preload(gate: &Gate, taken: &Path) {
    let text = std::fs::read_to_string(root().join("tests/conformance/preload.jsonl")).unwrap();
    let (mut lines, mut entries, mut refused) = (String::new(), Vec::new(), Vec::new());
    for (line, id) in text.lines().zip(100..) {
        let value: Value = serde_json::from_str(line).unwrap();
        let field = |name: &str| value[name].as_str().unwrap();
        if Seed::parse(field("seed")).is_err() {
            refused.push(field("alias").to_owned());
            continue;
        }
        entries.push(entry(id, (field("name"), field("realm"), field("seed"))));
        lines.push_str(line);
        lines.push('\n');
    }
    assert_eq!(refused, NOT_IMPORTABLE);
    gate.store.insert(&entries).await.unwrap();
    std::fs::write(taken, lines).unwrap();
}

/// The ids in the first column of the tables of docs/conformance.md.
fn listed() -> BTreeSet<String> {
    let text = std::fs::read_to_string(root().join("docs/conformance.md")).unwrap();
    text.lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`').map(|(id, _)| id.to_owned()))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recorded_cases_match_but_for_what_the_docs_list() {
    let gate = Gate::start_with(Setup { skew_steps: 3, ..Setup::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let taken = folder.path().join("preload.jsonl");
    preload(&gate, &taken).await;

    let mut replay = std::process::Command::new(python().await);
    replay
        .arg(root().join("tests/conformance/replay.py"))
        .args(["--quiet", "--base", &gate.base])
        .args(["--admin-name", ADMIN.0, "--admin-realm", ADMIN.1, "--admin-seed", ADMIN.2])
        .arg("--preload")
        .arg(&taken);
    let replayed = output_of(replay).await;
    let text = String::from_utf8(replayed.stdout).unwrap();
    assert!(
        text.contains(" match, "),
        "the replay did not end: {text}{}",
        String::from_utf8_lossy(&replayed.stderr)
    );

    let of = |kind: &str| {
        let lines = text.lines().filter_map(|line| line.strip_prefix(kind));
        lines.map(|line| line.trim().to_owned()).collect::<Vec<_>>()
    };
    let id = |line: &str| line.split_whitespace().nth(1).unwrap().to_owned();
    let skipped: BTreeSet<_> = of("SKIP").iter().map(|line| id(line)).collect();
    assert_eq!(skipped, BTreeSet::from(["verify.store.p-bad".to_owned()]), "{text}");
    let mismatches = of("MISMATCH");
    let documented: Vec<_> = mismatches.iter().filter(|line| line.starts_with("docu")).collect();
    assert!(documented.is_empty(), "{text}");
    let different: BTreeSet<_> = mismatches.iter().map(|line| id(line)).collect();
    assert_eq!(different, listed(), "{text}");
}
