//! `otpgate client list` with many entries: neither the gate nor the client holds all of them.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use otpgate::entry::Seed;
use otpgate::store::MAX_BATCH;

use crate::harness::{ADMIN, Gate, Sandbox, eventually, http, otpgate};
use crate::store_rig::{Rig, entry, who};

/// The most memory that a process has had so far, in KiB.
fn peak(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn command(gate: &Gate, args: &[&str]) -> Command {
    let mut command = otpgate();
    command.args(["client", "--server-url", &gate.api, "--auth-name", "admin"]);
    command.args(["--auth-realm", "ungleich-admin", "list"]).args(args);
    command.env("OTPGATE_AUTH_SEED", ADMIN);
    command
}

/// Lists all entries; the client's peak when nearly all were printed.
fn list(gate: &Gate, count: usize) -> u64 {
    let mut child = command(gate, &[]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    // A head, and the admin. What is left fills the pipe, so that it cannot end.
    let nearly = lines.by_ref().take(count - 6_000).count();
    let peak = peak(child.id());
    assert_eq!(nearly + lines.count(), count + 2);
    assert!(child.wait().unwrap().success());
    peak
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_does_not_grow_with_the_list() {
    const FEW: u64 = 7_000;
    const MANY: u64 = 40_000;
    let rig = Rig::sqlite().await;
    let store = rig.ready().await;
    let admin = entry(1_000_000, who("admin", "ungleich-admin"));
    let admin = otpgate::entry::Entry { seed: Seed::parse(ADMIN).unwrap(), ..admin };
    store.insert(&[admin]).await.unwrap();
    let entries: Vec<_> = (1..=MANY).map(|n| entry(n, who(&format!("n{n}"), "r"))).collect();
    let (few, rest) = entries.split_at(usize::try_from(FEW).unwrap());
    for batch in few.chunks(MAX_BATCH) {
        store.insert(batch).await.unwrap();
    }
    // Holds names alone, so that its own entries do not hide what the list takes.
    let settings = format!("{}hold = 'index'\n", rig.settings(&rig.config.sealing));
    let gate = Sandbox::new().serve(&settings).ready().await;
    let pid = u32::try_from(gate.pid()).unwrap();
    let with_few = list(&gate, few.len());
    for batch in rest.chunks(MAX_BATCH) {
        store.insert(batch).await.unwrap();
    }
    eventually("the gate knows all names", || async {
        let metrics = http().get(format!("{}/metrics", gate.ops)).send().await.unwrap();
        let line = format!("otpgate_directory_entries {}\n", entries.len() + 1);
        metrics.text().await.unwrap().contains(&line).then_some(())
    })
    .await;
    let gate_before = peak(pid);
    let with_many = list(&gate, entries.len());
    let gate_after = peak(pid);
    // The answer has 12 MB.
    assert!(with_many < with_few + 3_000, "{with_few} KiB, then {with_many} KiB");
    assert!(gate_after < gate_before + 3_000, "{gate_before} KiB, then {gate_after} KiB");

    let json = command(&gate, &["--json"]).output().unwrap();
    let listed: Vec<serde_json::Value> = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(listed.len(), entries.len() + 1);
}
