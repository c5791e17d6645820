//! Replays the recorded cases of ungleich-otp against a gate. What differs must be exactly what
//! `docs/conformance.md` lists: that table is the only list.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::harness::{ADMIN, Sandbox, output_within, python, stderr, stdout};

/// A replay takes some seconds, and waits for a time step to pass now and then.
const PATIENCE: Duration = Duration::from_secs(300);

/// Entries of preload.jsonl whose seeds are no base32: no token of theirs can ever be right, so they
/// cannot be imported.
const NOT_IMPORTABLE: [&str; 3] = ["p-bad", "p-empty", "p-auth-bad"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Imports the preloaded entries, behind the admin, and writes those that were taken to a file.
fn preload(sandbox: &Sandbox) -> PathBuf {
    let text = std::fs::read_to_string(root().join("tests/conformance/preload.jsonl")).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let field = |line: &Value, name: &str| line[name].as_str().unwrap().to_owned();
    let fields: Vec<_> =
        lines.iter().map(|line| ["name", "realm", "seed"].map(|name| field(line, name))).collect();
    let mut entries = vec![(1, "admin", "ungleich-admin", ADMIN)];
    entries.extend(
        (100..)
            .zip(&fields)
            .map(|(id, [name, realm, seed])| (id, name.as_str(), realm.as_str(), seed.as_str())),
    );
    let refused = sandbox.import(&entries);
    let is_refused = |line: &Value| {
        let whose = format!("({}@{})", field(line, "name"), field(line, "realm"));
        refused.iter().any(|record| record.ends_with(&whose))
    };
    let (bad, good): (Vec<_>, Vec<_>) = lines.iter().partition(|line| is_refused(line));
    assert_eq!(bad.iter().map(|line| field(line, "alias")).collect::<Vec<_>>(), NOT_IMPORTABLE);
    let good: Vec<_> = good.iter().map(ToString::to_string).collect();
    sandbox.write("preload.jsonl", &good.join("\n"))
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
    let sandbox = Sandbox::new();
    let taken = preload(&sandbox);
    let gate = sandbox.serve("[totp]\nskew = 3\n[throttle]\nenabled = false\n").ready().await;

    let mut replay = Command::new(python().await);
    replay
        .arg(root().join("tests/conformance/replay.py"))
        .args(["--quiet", "--base", &gate.api])
        .args(["--admin-name", "admin", "--admin-realm", "ungleich-admin", "--admin-seed", ADMIN])
        .arg("--preload")
        .arg(&taken);
    let replayed = output_within(PATIENCE, replay).await;
    let text = stdout(&replayed);
    assert!(text.contains(" match, "), "the replay did not end: {text}{}", stderr(&replayed));

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
