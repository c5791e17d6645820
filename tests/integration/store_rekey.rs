//! `otpgate store rekey`: a change of sealing keys as the operations manual walks it, and what may
//! happen on the way.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use otpgate::config::Sealing;
use otpgate::entry::{Entry, EntryId, Seed};
use otpgate::seal::SealError;
use otpgate::store::{MAX_BATCH, Store, StoreError};
use serde_json::{Value, json};
use tokio::sync::RwLock;

use crate::harness::{
    ADMIN, ALICE, Gate, Sandbox, VERIFIER, eventually, http, otpgate, stderr, stdout, token,
};
use crate::peers::echo::Echo;
use crate::store_rig::{Rig, entry, opened, who};

on_stores!([sqlite, redis, cluster, scriptless] [
    keys_are_changed_while_callers_pass,
    a_killed_run_is_continued,
    concurrent_writes_are_kept,
    only_the_seal_changes_and_only_once,
    what_cannot_be_opened_is_named,
    plain_entries_are_sealed_on_demand,
]);

/// `otpgate store rekey` with these keys.
fn command(rig: &Rig, sealing: &Sealing, args: &[&str]) -> (Command, tempfile::NamedTempFile) {
    let config = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(config.path(), rig.settings(sealing)).unwrap();
    let mut command = otpgate();
    command.args(["store", "rekey", "--config"]).arg(config.path()).args(args);
    (command, config)
}

fn rekey(rig: &Rig, sealing: &Sealing, args: &[&str]) -> Output {
    let (mut command, _config) = command(rig, sealing, args);
    tokio::task::block_in_place(|| command.output().unwrap())
}

/// Its exit code and report.
fn report(rig: &Rig, sealing: &Sealing, args: &[&str]) -> (Option<i32>, Value) {
    let output = rekey(rig, sealing, &[&["--json"], args].concat());
    let report = serde_json::from_str(&stdout(&output));
    (output.status.code(), report.unwrap_or_else(|e| panic!("{e}: {}", stderr(&output))))
}

/// Rekeyed, already and unopened.
fn counts(report: &Value) -> [u64; 3] {
    ["rekeyed", "already", "unopened"].map(|key| report[key].as_u64().unwrap())
}

async fn insert(store: &Store, count: u64) -> Vec<Entry> {
    let entries: Vec<_> = (1..=count).map(|n| entry(n, who(&format!("n{n}"), "r"))).collect();
    for batch in entries.chunks(MAX_BATCH) {
        store.insert(batch).await.unwrap();
    }
    entries
}

async fn listed(store: &Store) -> Vec<Entry> {
    store.list(None, usize::MAX).await.unwrap().iter().map(|s| opened(s).clone()).collect()
}

async fn only_the_seal_changes_and_only_once(rig: Rig) {
    let store = rig.ready().await;
    let mut entries = insert(&store, 450).await;
    let rich = Entry {
        enabled: false,
        updated_at: 1_700_000_123,
        expires_at: Some(1_900_000_000),
        comment: "ünïcode\n".into(),
        serial: 3,
        ..entry(1000, who("rich", "r"))
    };
    store.insert(std::slice::from_ref(&rich)).await.unwrap();
    entries.push(rich);

    let new = rig.keys("new.key", &["sealing.key"]);
    let (code, first) = report(&rig, &new, &[]);
    assert_eq!((code, counts(&first)), (Some(0), [451, 0, 0]), "{first}");
    assert_eq!(first["old_keys"][0]["entries"], 0);
    assert!(first["old_keys"][0]["file"].as_str().unwrap().ends_with("sealing.key"), "{first}");
    assert_eq!(listed(&rig.with_sealing(rig.keys("new.key", &[]))).await, entries);
    let refused = store.list(None, 1).await.unwrap().pop().unwrap().entry;
    assert!(matches!(refused, Err(StoreError::Sealed { cause: SealError::UnknownKey(_), .. })));

    let stored = store.list(None, usize::MAX).await.unwrap();
    let (code, again) = report(&rig, &new, &[]);
    assert_eq!((code, counts(&again)), (Some(0), [0, 451, 0]), "{again}");
    let revisions =
        |of: &[otpgate::store::Stored]| -> Vec<_> { of.iter().map(|s| s.revision).collect() };
    let now = store.list(None, usize::MAX).await.unwrap();
    assert_eq!(revisions(&stored), revisions(&now), "a second run writes nothing");

    // Somebody who writes with the old key is found, by the same command.
    let behind = rig.with_sealing(rig.keys("sealing.key", &["new.key"]));
    let old = behind.get_by_id(EntryId(7)).await.unwrap().unwrap();
    behind.update(&old, opened(&old)).await.unwrap();
    assert_eq!(counts(&report(&rig, &new, &[]).1), [1, 450, 0]);

    let output = rekey(&rig, &new, &[]);
    assert!(output.status.success());
    let text = stdout(&output);
    assert!(
        text.starts_with("0 rekeyed, 451 already, 0 cannot be opened\nno entry needs"),
        "{text}"
    );
    let audit = stderr(&output);
    assert_eq!(audit.matches("otpgate::audit").count(), 1, "{audit}");
    for part in ["action=\"store_rekey\"", "outcome=\"done\"", "entries=0"] {
        assert!(audit.contains(part), "{part} in {audit}");
    }
}

async fn what_cannot_be_opened_is_named(rig: Rig) {
    let store = rig.ready().await;
    let entries = insert(&store, 6).await;
    rig.swap(&entries[1].principal, &entries[4].principal);
    let foreign = rig.with_sealing(rig.keys("foreign.key", &[]));
    foreign.insert(&[entry(7, who("foreign", "r"))]).await.unwrap();

    let new = rig.keys("new.key", &["sealing.key", "new.key"]);
    let (code, first) = report(&rig, &new, &[]);
    assert_eq!((code, counts(&first)), (Some(1), [4, 0, 3]), "{first}");
    let named = first["unopened_entries"].as_array().unwrap();
    let ids: Vec<_> = named.iter().map(|entry| entry["id"].as_u64().unwrap()).collect();
    assert_eq!(ids, [2, 5, 7]);
    assert_eq!((&named[2]["name"], &named[2]["realm"]), (&json!("foreign"), &json!("r")));
    assert!(named[0]["reason"].as_str().unwrap().contains("moved to another name"), "{first}");
    assert!(named[2]["reason"].as_str().unwrap().contains("unknown key"), "{first}");
    // Two that bear the old key stay; the writing key, named as an old one too, is no old key.
    let old_keys = first["old_keys"].as_array().unwrap();
    assert_eq!(
        old_keys.iter().map(|k| k["entries"].as_u64()).collect::<Vec<_>>(),
        [Some(2), Some(0)]
    );
    let output = rekey(&rig, &new, &[]);
    assert_eq!(output.status.code(), Some(1));
    let text = stdout(&output);
    assert!(text.contains("\n  id 7 (foreign@r): sealed with the unknown key"), "{text}");
    assert!(text.contains("\n2 entries still need the old key "), "{text}");
    let audit = stderr(&output);
    assert!(audit.contains("outcome=\"incomplete\" reason=\"unopened_entries\""), "{audit}");

    // What is damaged under the writing key is no success either.
    rig.swap(&entries[0].principal, &entries[2].principal);
    let (code, damaged) = report(&rig, &new, &[]);
    assert_eq!((code, counts(&damaged)), (Some(1), [0, 2, 5]), "{damaged}");
}

async fn plain_entries_are_sealed_on_demand(rig: Rig) {
    let plain = rig.with_sealing(Sealing::Off);
    plain.init().await.unwrap();
    let entries = insert(&plain, 5).await;
    let output = rekey(&rig, &Sealing::Off, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("`store.sealing` is off"), "{}", stderr(&output));

    let sealing = rig.keys("sealing.key", &[]);
    let (code, refused) = report(&rig, &sealing, &[]);
    assert_eq!((code, counts(&refused)), (Some(1), [0, 0, 5]), "{refused}");
    assert_eq!(listed(&plain).await, entries, "nothing was changed");
    let (code, sealed) = report(&rig, &sealing, &["--seal-plain"]);
    assert_eq!((code, counts(&sealed)), (Some(0), [5, 0, 0]), "{sealed}");
    assert_eq!(listed(&rig.store()).await, entries);
    assert_eq!(counts(&report(&rig, &sealing, &["--seal-plain"]).1), [0, 5, 0]);
}

async fn a_killed_run_is_continued(rig: Rig) {
    const COUNT: u64 = 5_000;
    let entries = insert(&rig.ready().await, COUNT).await;
    let new = rig.keys("new.key", &["sealing.key"]);
    let (mut command, _config) = command(&rig, &new, &[]);
    let mut running = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(running.stderr.take().unwrap()).lines();
    tokio::task::block_in_place(|| {
        let far = lines.find(|line| line.as_ref().unwrap().ends_with("000 entries done"));
        assert!(far.is_some());
        running.kill().unwrap();
        running.wait().unwrap();
    });
    let both = rig.with_sealing(new.clone());
    assert_eq!(listed(&both).await, entries, "nothing is lost in between");
    let (code, rest) = report(&rig, &new, &[]);
    let [rekeyed, already, unopened] = counts(&rest);
    assert_eq!((code, rekeyed + already, unopened), (Some(0), COUNT, 0), "{rest}");
    assert!(rekeyed > 0 && already >= 1_000, "{rest}");
    assert_eq!(listed(&rig.with_sealing(rig.keys("new.key", &[]))).await, entries);
}

/// Whatever admins do meanwhile, nothing of it is lost or undone.
async fn concurrent_writes_are_kept(rig: Rig) {
    insert(&rig.ready().await, 300).await;
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..3_u64)
        .map(|part| {
            let store = rig.with_sealing(rig.keys("a.key", &["b.key", "sealing.key"]));
            let stop = stop.clone();
            // Writer n changes, deletes and makes entries whose number leaves the rest n.
            tokio::spawn(async move {
                let mut truth = BTreeMap::<u64, Option<Entry>>::new();
                let mut round = 0;
                while !stop.load(Ordering::SeqCst) {
                    round += 1;
                    let id = 3 * (rand::random::<u64>() % 100) + part + 1;
                    let Some(old) = store.get_by_id(EntryId(id)).await.unwrap() else {
                        let again = entry(id, who(&format!("again{id}"), "r"));
                        store.insert(std::slice::from_ref(&again)).await.unwrap();
                        truth.insert(id, Some(again));
                        continue;
                    };
                    let new = Entry { comment: round.to_string(), ..opened(&old).clone() };
                    let (result, after) = match round % 5 {
                        0 => (store.delete(&old).await, None),
                        _ => (store.update(&old, &new).await, Some(new)),
                    };
                    match result {
                        Ok(_) => drop(truth.insert(id, after)),
                        Err(error) => assert_eq!(error, StoreError::Conflict),
                    }
                }
                truth
            })
        })
        .collect();
    // To and fro, so that every run has all entries to do.
    for (key, old) in
        [("b.key", "a.key"), ("a.key", "b.key"), ("b.key", "a.key"), ("a.key", "b.key")]
    {
        let sealing = rig.keys(key, &[old, "sealing.key"]);
        let (_, done) = report(&rig, &sealing, &[]);
        let [rekeyed, _, unopened] = counts(&done);
        assert!(rekeyed > 0 && unopened == 0, "{done}");
        assert_eq!(done["old_keys"][1]["entries"], 0, "{done}");
    }
    stop.store(true, Ordering::SeqCst);
    let only_a = rig.with_sealing(rig.keys("a.key", &[]));
    let mut changed = 0;
    for writer in writers {
        for (id, expected) in writer.await.unwrap() {
            let found = only_a.get_by_id(EntryId(id)).await.unwrap();
            assert_eq!(found.as_ref().map(opened), expected.as_ref());
            changed += 1;
        }
    }
    assert!(changed > 20, "{changed}");
    assert!(only_a.list(None, usize::MAX).await.unwrap().iter().all(|s| s.entry.is_ok()));
}

/// Gates on one store, in turn replaced by others.
struct Fleet<'a> {
    rig: &'a Rig,
    sandbox: Sandbox,
    echo: Echo,
    /// Where callers may call; nobody calls while it changes.
    gates: Arc<RwLock<Vec<Gate>>>,
}

impl Fleet<'_> {
    async fn gate(&self, sealing: &Sealing) -> Gate {
        let store = self.rig.settings(sealing);
        let upstream = self.echo.address;
        self.sandbox.serve(&format!("[proxy]\nupstream = '{upstream}'\n{store}")).ready().await
    }

    /// Restarts one gate after the other with these keys.
    async fn roll(&self, sealing: &Sealing) {
        for i in 0..2 {
            let new = self.gate(sealing).await;
            let old = std::mem::replace(&mut self.gates.write().await[i], new);
            old.signal(libc::SIGTERM);
            tokio::task::block_in_place(|| old.wait());
        }
    }

    /// An admin makes an entry through one gate, and it passes through both.
    async fn make(&self, name: &str) -> Seed {
        let gates = self.gates.read().await;
        let made = http()
            .post(format!("{}/ungleichotp/", gates[0].api))
            .json(&json!({
                "auth_name": "admin", "auth_realm": "ungleich-admin", "auth_token": token(ADMIN),
                "name": name, "realm": "shop",
            }))
            .send()
            .await
            .unwrap();
        assert_eq!(made.status(), 201);
        let made: Value = made.json().await.unwrap();
        let seed = made["seed"].as_str().unwrap();
        for gate in gates.iter() {
            eventually("the new entry passes", || async {
                let call = gate.call("/", name, "shop", &token(seed)).send().await.unwrap();
                (call.status() == 200).then_some(())
            })
            .await;
        }
        Seed::parse(seed).unwrap()
    }
}

/// The steps of the operations manual.
async fn keys_are_changed_while_callers_pass(rig: Rig) {
    let store = rig.ready().await;
    let fixed = [
        (1, "admin", "ungleich-admin", ADMIN),
        (2, "verifier", "ungleich-auth", VERIFIER),
        (3, "alice", "shop", ALICE),
    ];
    for (id, name, realm, seed) in fixed {
        let entry = Entry { seed: Seed::parse(seed).unwrap(), ..entry(id, who(name, realm)) };
        store.insert(&[entry]).await.unwrap();
    }
    let before = rig.keys("sealing.key", &[]);
    let gates = Arc::default();
    let fleet = Fleet { rig: &rig, sandbox: Sandbox::new(), echo: Echo::start().await, gates };
    for _ in 0..2 {
        let gate = fleet.gate(&before).await;
        fleet.gates.write().await.push(gate);
    }
    let (passed, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let callers: Vec<_> = (0..2)
        .map(|i| {
            let (gates, passed, stop) = (fleet.gates.clone(), passed.clone(), stop.clone());
            tokio::spawn(async move {
                while !stop.load(Ordering::SeqCst) {
                    let gates = gates.read().await;
                    let call = gates[i].call("/", "alice", "shop", &token(ALICE)).send().await;
                    assert_eq!(call.unwrap().status(), 200);
                    passed.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    let calls = async |step: &str| {
        let (start, passed) = (passed.load(Ordering::SeqCst), &passed);
        eventually(step, || async { (passed.load(Ordering::SeqCst) > start + 4).then_some(()) })
            .await;
    };

    let mut made = vec![("first", fleet.make("first").await)];
    calls("as it was").await;
    fleet.roll(&rig.keys("sealing.key", &["new.key"])).await;
    made.push(("second", fleet.make("second").await));
    calls("all gates know the new key").await;

    // While gates write with either key, and read both.
    let writing = rig.keys("new.key", &["sealing.key"]);
    let first = fleet.gate(&writing).await;
    let old = std::mem::replace(&mut fleet.gates.write().await[0], first);
    drop(old);
    made.push(("third", fleet.make("third").await));
    calls("one gate writes with the new key").await;
    fleet.roll(&writing).await;
    made.push(("fourth", fleet.make("fourth").await));
    calls("all gates write with the new key").await;

    let (code, done) = report(&rig, &writing, &[]);
    let [rekeyed, already, _] = counts(&done);
    assert_eq!((code, rekeyed, already), (Some(0), 5, 2), "{done}");
    assert_eq!(done["old_keys"][0]["entries"], 0);
    calls("entries are sealed anew").await;

    fleet.roll(&rig.keys("new.key", &[])).await;
    made.push(("fifth", fleet.make("fifth").await));
    calls("the old key is gone").await;
    for (name, seed) in &made {
        for gate in fleet.gates.read().await.iter() {
            let call = gate.call("/", name, "shop", &token(seed.expose())).send().await.unwrap();
            assert_eq!(call.status(), 200, "{name}");
            assert!(!gate.log_text().contains("cannot be used"), "{}", gate.log_text());
        }
    }
    stop.store(true, Ordering::SeqCst);
    for caller in callers {
        caller.await.unwrap();
    }
}
