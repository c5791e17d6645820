//! `otpgate store export` and `import`: what is taken elsewhere is what was there, whatever happens on the
//! way.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use otpgate::config::Sealing;
use otpgate::entry::{
    Algorithm, Entry, EntryId, Name, Overrides, Principal, Realm, Retiring, Seed,
};
use otpgate::store::{MAX_BATCH, Store, StoreError, Version};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};
use tokio::sync::RwLock;

use crate::harness::{
    ALICE, BOB, Gate, Sandbox, eventually, http, otpgate, run, stderr, stdout, token,
};
use crate::peers::echo::Echo;
use crate::store_rig::{Place, Rig, create, entry, opened, verify, who};

on_stores!([sqlite, redis, cluster, scriptless] [
    a_file_is_the_store_at_one_version,
    gates_wait_for_the_end_of_an_import,
    nothing_is_written_of_a_file_that_is_not_whole,
    entries_come_beside_those_that_are_there,
    what_does_not_open_is_told,
    what_is_not_whole_stays_closed,
]);

/// Exports to a file beside the store.
fn export(rig: &Rig, args: &[&str]) -> (String, Value) {
    let file = rig.path(&format!("{:x}.export", rand::random::<u32>()));
    let file = file.to_str().unwrap().to_owned();
    let output = rig.run_command(&[&["export", "--json", "--output", &file], args].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    (file, serde_json::from_slice(&output.stdout).unwrap())
}

/// Imports a file that was exported from `from`.
fn import(rig: &Rig, from: &Rig, file: &str, args: &[&str]) -> Output {
    let Sealing::KeyFile { path, .. } = &from.config.sealing else { unreachable!() };
    let key = ["--export-key-file", path.to_str().unwrap()];
    rig.run_command(&[&["import", file], &key[..], args].concat())
}

/// Imported, present, and the refused records.
fn report(output: &Output) -> (u64, u64, Vec<String>) {
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", stderr(output)));
    let refused = report["refused"].as_array().unwrap();
    let refused = refused.iter().map(|one| format!("{}: {}", one["record"], one["reason"]));
    let number = |key: &str| report[key].as_u64().unwrap();
    (number("imported"), number("present"), refused.collect())
}

async fn listed(store: &Store) -> Vec<Entry> {
    store.list(None, usize::MAX).await.unwrap().iter().map(|s| opened(s).clone()).collect()
}

async fn insert(store: &Store, entries: &[Entry]) {
    for batch in entries.chunks(MAX_BATCH) {
        store.insert(batch).await.unwrap();
    }
}

prop_compose! {
    fn any_seed()(bytes in proptest::collection::vec(any::<u8>(), 1..40)) -> Seed {
        Seed::parse(data_encoding::BASE32_NOPAD.encode(&bytes).as_str()).unwrap()
    }
}

fn any_label() -> impl Strategy<Value = String> {
    "\\PC{1,20}|[a/%@ \"\\\\]{1,9}".prop_filter_map("a label", |text| {
        Name::parse(&text).ok().map(|name| name.as_str().to_owned())
    })
}

prop_compose! {
    /// With every field that an entry has.
    fn any_entry()(
        (name, realm, comment) in (any_label(), any_label(), "\\PC{0,30}|[\\x00-\\x1f\"\\\\]{0,9}"),
        (seed, serial, enabled) in (any_seed(), any::<u32>(), any::<bool>()),
        previous in proptest::option::of((any_seed(), any::<u32>(), any::<u64>())),
        (digits, period) in (proptest::option::of(6_u8..=8), proptest::option::of(5_u32..=3600)),
        algorithm in proptest::option::of(proptest::sample::select(
            vec![Algorithm::Sha1, Algorithm::Sha256, Algorithm::Sha512],
        )),
        (created_at, updated_at, expires_at) in
            (any::<u64>(), any::<u64>(), proptest::option::of(any::<u64>())),
    ) -> Entry {
        Entry {
            id: EntryId(0),
            principal: Principal {
                realm: Realm::parse(&realm).unwrap(), name: Name::parse(&name).unwrap(),
            },
            seed,
            serial,
            previous: previous.map(|(seed, serial, until)| Retiring { seed, serial, until }),
            overrides: Overrides { algorithm, digits, period },
            enabled,
            created_at,
            updated_at,
            expires_at,
            comment,
        }
    }
}

/// Entries of all kinds, with gaps between their numbers.
fn entries(count: usize) -> Vec<Entry> {
    let strategy = proptest::collection::vec((any_entry(), 1_u64..50), count);
    let made = strategy.new_tree(&mut TestRunner::default()).unwrap().current();
    let (mut id, mut taken) = (0, std::collections::HashSet::new());
    let made = made.into_iter().filter(|(entry, _)| taken.insert(entry.principal.clone()));
    made.map(|(entry, gap)| {
        id += gap;
        Entry { id: EntryId(id), ..entry }
    })
    .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_on_the_way_to_redis_and_back() {
    let rigs = [Rig::sqlite().await, Rig::redis().await, Rig::sqlite().await, Rig::redis().await];
    let first = rigs[0].ready().await;
    let mut entries = entries(600);
    insert(&first, &entries).await;
    // The newest ones go; their numbers are not given again.
    for _ in 0..2 {
        let gone = entries.pop().unwrap();
        first.delete(&first.get_by_id(gone.id).await.unwrap().unwrap()).await.unwrap();
    }
    let next = create(&first, "next", "r").await.unwrap();
    first.delete(&first.get_by_id(next.id).await.unwrap().unwrap()).await.unwrap();

    for (step, args) in [&[][..], &["--reveal-seeds"], &[]].iter().enumerate() {
        let (from, to) = (&rigs[step], &rigs[step + 1]);
        let (file, told) = export(from, args);
        assert_eq!((&told["entries"], &told["unopened"]), (&json!(entries.len()), &json!(0)));
        let text = std::fs::read_to_string(&file).unwrap();
        let shown = entries
            .iter()
            .any(|entry| entry.seed.expose().len() > 8 && text.contains(entry.seed.expose()));
        assert_eq!(shown, !args.is_empty(), "seeds are shown only if that is said");

        let dry = import(to, from, &file, &["--json", "--dry-run"]);
        assert_eq!(report(&dry), (entries.len() as u64, 0, vec![]));
        assert!(matches!(to.store().count().await, Err(StoreError::NotInitialised)));
        let done = import(to, from, &file, &["--json"]);
        assert_eq!(report(&done), (entries.len() as u64, 0, vec![]));
        assert_eq!(listed(&to.store()).await, entries);
        let again = import(to, from, &file, &["--json"]);
        assert_eq!(report(&again), (0, entries.len() as u64, vec![]));
        assert!(verify(to, &[]).0);
        let made = create(&to.store(), "made", "r").await.unwrap();
        assert!(made.id > next.id, "{} was given before", made.id);
        to.store().delete(&to.store().get_by_id(made.id).await.unwrap().unwrap()).await.unwrap();
    }
}

/// A change, and the version that it made.
type Change = (Version, Principal, Option<Entry>);

/// Changes entries, one in `parts`, until told to stop.
async fn change(store: Store, part: u64, parts: u64, stop: Arc<AtomicBool>) -> Vec<Change> {
    let mut done = Vec::new();
    let mut round = 0;
    while !stop.load(Ordering::SeqCst) {
        round += 1;
        let id = EntryId(parts * (rand::random::<u64>() % 200) + part + 1);
        let Some(old) = store.get_by_id(id).await.unwrap() else {
            let name = format!("again{round}");
            let again = Entry { id, ..entry(id.0, who(&name, &part.to_string())) };
            let version = store.insert(std::slice::from_ref(&again)).await.unwrap();
            done.push((version, again.principal.clone(), Some(again)));
            continue;
        };
        let before = opened(&old).clone();
        match round % 6 {
            0 | 1 => {
                let version = store.delete(&old).await.unwrap();
                done.push((version, before.principal, None));
            }
            2 => {
                let principal = who(&format!("renamed{round}"), &part.to_string());
                let after = Entry { principal: principal.clone(), ..before.clone() };
                let version = store.update(&old, &after).await.unwrap();
                done.push((version, before.principal, None));
                done.push((version, principal, Some(after)));
            }
            _ => {
                let after = Entry { comment: round.to_string(), ..before };
                let version = store.update(&old, &after).await.unwrap();
                done.push((version, after.principal.clone(), Some(after)));
            }
        }
    }
    done
}

async fn a_file_is_the_store_at_one_version(rig: Rig) {
    let store = rig.ready().await;
    let start: Vec<_> = (1..=4_000).map(|id| entry(id, who(&format!("n{id}"), "r"))).collect();
    insert(&store, &start).await;
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> =
        (0..2).map(|part| tokio::spawn(change(rig.store(), part, 2, stop.clone()))).collect();
    let mut files = Vec::new();
    for _ in 0..4 {
        files.push(export(&rig, &[]));
    }
    stop.store(true, Ordering::SeqCst);
    let mut changes: Vec<Change> = Vec::new();
    for writer in writers {
        changes.extend(writer.await.unwrap());
    }
    changes.sort_by_key(|(version, ..)| *version);
    assert!(files.iter().any(|(_, told)| told["changes"] != 0), "{files:?}");
    for (file, told) in files {
        let mut expected: BTreeMap<Principal, Entry> =
            start.iter().map(|entry| (entry.principal.clone(), entry.clone())).collect();
        for (version, principal, after) in &changes {
            if version.0 <= told["version"].as_u64().unwrap() {
                expected.remove(principal);
                expected.extend(after.iter().map(|entry| (principal.clone(), entry.clone())));
            }
        }
        let copy = Rig::sqlite().await;
        let done = import(&copy, &rig, &file, &["--json"]);
        assert!(done.status.success(), "{}", stderr(&done));
        let copied = listed(&copy.store()).await;
        let copied: BTreeMap<_, _> =
            copied.into_iter().map(|entry| (entry.principal.clone(), entry)).collect();
        assert!(copied == expected, "{told}");
    }
}

/// Starts an import, and waits until some of it is written.
fn start_import(rig: &Rig, from: &Rig, file: &str) -> Child {
    let Sealing::KeyFile { path, .. } = &from.config.sealing else { unreachable!() };
    let mut command = rig.command(&["import", file, "--export-key-file", path.to_str().unwrap()]);
    let mut running = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(running.stderr.take().unwrap()).lines();
    tokio::task::block_in_place(|| {
        let far = lines.find(|line| line.as_ref().unwrap().ends_with("000 entries done"));
        assert!(far.is_some(), "it ended early");
    });
    running
}

/// One that is killed, another one, and the gates meanwhile.
async fn gates_wait_for_the_end_of_an_import(rig: Rig) {
    const COUNT: u64 = 6_000;
    let source = Rig::sqlite().await;
    let from = source.ready().await;
    let mut entries: Vec<_> = (1..COUNT).map(|id| entry(id, who(&format!("n{id}"), "r"))).collect();
    // The last one that is written.
    let alice = Entry { seed: Seed::parse(ALICE).unwrap(), ..entry(COUNT, who("alice", "shop")) };
    entries.push(alice);
    insert(&from, &entries).await;
    let (file, _) = export(&source, &[]);

    // One gate knows the store as an empty one, and so does who has used it.
    let known = rig.ready().await;
    assert_eq!(known.count().await, Ok(0));
    assert_eq!(create(&known, "spent", "r").await.map(|entry| entry.id), Ok(EntryId(1)));
    known.delete(&known.get_by_id(EntryId(1)).await.unwrap().unwrap()).await.unwrap();
    let (sandbox, echo) = (Sandbox::new(), Echo::start().await);
    // Longer than anything here takes: what was true of the empty store is not true any more.
    let settings = format!(
        "[proxy]\nupstream = '{}'\n{}max_stale = '5m'\n",
        echo.address,
        rig.settings(&rig.config.sealing)
    );
    let before = sandbox.serve(&settings).ready().await;
    let mut running = start_import(&rig, &source, &file);
    running.kill().unwrap();
    running.wait().unwrap();
    let during = sandbox.serve(&settings);
    for gate in [&before, &during] {
        let ready = format!("{}/readyz", gate.ops);
        eventually("the gate knows that entries are missing", || async {
            let answer = http().get(&ready).send().await.unwrap();
            let red = answer.status() == 503;
            let why: Value = answer.json().await.unwrap();
            let text = why["reason"].as_str().unwrap_or_default();
            (red && text.contains("an import is under way")).then_some(())
        })
        .await;
    }
    let call = async |gate: &Gate| {
        let answer = gate.call("/", "alice", "shop", &token(ALICE)).send().await.unwrap();
        answer.status().as_u16()
    };
    for gate in [&before, &during] {
        assert_eq!(call(gate).await, 503);
    }
    // Nobody else works on it.
    let importing = Err(StoreError::Importing);
    for store in [known, rig.store()] {
        assert_eq!(store.count().await, importing);
        assert_eq!(store.init().await.map(|_| 0), importing);
        assert_eq!(store.get((&who("n1", "r")).into()).await.map(|_| 0), importing);
        assert_eq!(store.get_by_id(EntryId(1)).await.map(|_| 0), importing);
        assert_eq!(create(&store, "new", "r").await.map(|_| 0), importing);
        assert_eq!(store.insert(&[entry(99_999, who("new", "r"))]).await.map(|_| 0), importing);
    }
    for args in [&["verify"][..], &["export", "-o", "-"], &["rekey"], &["bootstrap"]] {
        let output = rig.run_command(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(stderr(&output).contains("an import is under way"), "{}", stderr(&output));
    }
    let other = Rig::sqlite().await;
    other.ready().await;
    let (foreign, _) = export(&other, &[]);
    let refused = import(&rig, &other, &foreign, &[]);
    assert!(stderr(&refused).contains("of the same file again"), "{}", stderr(&refused));

    // It goes on, and callers never hear that they are unknown.
    let stop = Arc::new(AtomicBool::new(false));
    let calling = async {
        let mut seen = BTreeMap::<u16, usize>::new();
        while !stop.load(Ordering::SeqCst) {
            for gate in [&before, &during] {
                *seen.entry(call(gate).await).or_default() += 1;
            }
        }
        seen
    };
    let resuming = async {
        let Sealing::KeyFile { path, .. } = &source.config.sealing else { unreachable!() };
        let key = path.to_str().unwrap();
        let mut command = rig.command(&["import", &file, "--json", "--export-key-file", key]);
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        for gate in [&before, &during] {
            eventually("callers pass", || async { (call(gate).await == 200).then_some(()) }).await;
        }
        stop.store(true, Ordering::SeqCst);
        output
    };
    let (seen, output) = tokio::join!(calling, resuming);
    let (imported, present, refused) = report(&output);
    assert_eq!((imported + present, refused), (COUNT, vec![]));
    assert!(present >= 1_000 && imported > 0, "{present} were there already");
    assert!(seen.contains_key(&503) && seen.keys().all(|s| [200, 503].contains(s)), "{seen:?}");
    assert_eq!(listed(&rig.store()).await, entries);
    let (equal, told) = verify(&rig, &[&before.ops, &during.ops]);
    assert!(equal, "{told}");
}

async fn nothing_is_written_of_a_file_that_is_not_whole(rig: Rig) {
    let source = Rig::sqlite().await;
    let from = source.ready().await;
    let entries: Vec<_> = (1..=5).map(|id| entry(id, who(&format!("n{id}"), "r"))).collect();
    insert(&from, &entries).await;
    let (file, _) = export(&source, &[]);
    let good = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<_> = good.lines().collect();
    let without = |n: usize| {
        let kept = lines.iter().enumerate().filter(|(i, _)| *i != n).map(|(_, line)| *line);
        kept.collect::<Vec<_>>().join("\n") + "\n"
    };
    let (plain, _) = export(&source, &["--reveal-seeds"]);
    let plain = std::fs::read_to_string(plain).unwrap();
    let slipped_in = good.replacen(lines[1], plain.lines().nth(1).unwrap(), 1);
    let cases = [
        (without(6), "the end is missing"),
        (good[..good.len() - 9].to_owned(), "the end is missing"),
        (good[..good.len() - 1].to_owned(), "the end is missing"),
        (without(3), "changed or damaged"),
        (good.replace("n3", "n9"), "changed or damaged"),
        (good.replace("\"next_id\":6", "\"next_id\":5"), "changed or damaged"),
        (good.replace("\"version\":1", "\"version\":2"), "changed or damaged"),
        (
            good.replace("\"next_id\":6", "\"next_id\":7").replace("_export\":1", "_export\":2"),
            "number 2",
        ),
        (format!("{good}{good}"), "something follows the end"),
        (format!("{good}x"), "something follows the end"),
        (slipped_in, "all are sealed"),
        (good.replace("\"r\"", "\" r\""), "an impossible name or realm"),
        (good.replace("\"id\":2,", "\"id\":0,"), "an impossible id"),
        (good.replace("\"id\":2,", ""), "neither an entry nor a deletion"),
        (good.replace("\"realm\"", "\"rea1m\""), "line 2: not as in an export"),
        (format!("{{\"otpgate_export\":1}}{good}"), "line 1: not as in an export"),
        ("{\"otpgate_export\":".to_owned(), "the end is missing"),
        ("[\"hunter2\"]".to_owned(), "neither an export nor a `dumpdata` file"),
        ("SQLite format 3\0hunter2".to_owned(), "an SQLite file"),
        (String::new(), "neither an export nor a `dumpdata` file"),
    ];
    let bad = rig.path("bad.export");
    let attempt = |text: &str| {
        std::fs::write(&bad, text).unwrap();
        import(&rig, &source, bad.to_str().unwrap(), &[])
    };
    for (text, why) in &cases {
        let output = attempt(text);
        assert_eq!(output.status.code(), Some(1), "{why}");
        let words = stderr(&output);
        assert!(words.contains(why) && !words.contains("hunter2"), "{why}: {words}");
    }
    let wrong = rig.run_command(&["import", &file]);
    assert_eq!(wrong.status.code(), Some(1));
    let words = stderr(&wrong);
    assert!(words.contains("5 entries cannot be opened, nothing is imported"), "{words}");
    assert!(words.contains("id 3 (n3@r): sealed with the key `"), "{words}");
    assert!(words.contains("`--export-key-file`"), "{words}");
    assert_eq!(rig.store().count().await, Err(StoreError::NotInitialised), "nothing was made");
    assert!(import(&rig, &source, &file, &[]).status.success());
    assert_eq!(listed(&rig.store()).await, entries);
}

async fn entries_come_beside_those_that_are_there(rig: Rig) {
    let source = Rig::sqlite().await;
    let from = source.ready().await;
    let entries: Vec<_> = (1..=5).map(|id| entry(id, who(&format!("n{id}"), "r"))).collect();
    insert(&from, &entries).await;
    let gone = from.get_by_id(EntryId(5)).await.unwrap().unwrap();
    from.delete(&gone).await.unwrap();
    let (file, _) = export(&source, &[]);

    let store = rig.ready().await;
    let renamed = Entry { principal: who("n2", "r"), ..entry(77, who("n2", "r")) };
    let clash = entry(3, who("other", "r"));
    insert(&store, &[entries[0].clone(), renamed.clone(), clash.clone()]).await;
    let dry = report(&import(&rig, &source, &file, &["--json", "--dry-run"]));
    let done = import(&rig, &source, &file, &["--json"]);
    assert_eq!((done.status.code(), &report(&done)), (Some(1), &dry));
    let refused = vec![
        "\"id 2 (n2@r)\": \"the store has another entry of that name\"".to_owned(),
        "\"id 3 (n3@r)\": \"the store uses that id otherwise\"".to_owned(),
    ];
    assert_eq!(dry, (1, 1, refused));
    let now = [entries[0].clone(), clash, entries[3].clone(), renamed];
    assert_eq!(listed(&store).await, now);
    assert_eq!(create(&store, "next", "r").await.unwrap().id, EntryId(78));
    assert!(verify(&rig, &[]).0);
}

async fn what_does_not_open_is_told(rig: Rig) {
    let store = rig.ready().await;
    let entries: Vec<_> = (1..=4).map(|id| entry(id, who(&format!("n{id}"), "r"))).collect();
    insert(&store, &entries).await;
    rig.swap(&entries[1].principal, &entries[2].principal);
    let (file, told) = export(&rig, &[]);
    assert_eq!((&told["entries"], &told["unopened"]), (&json!(4), &json!(2)));
    let copy = Rig::sqlite().await;
    let refused = import(&copy, &rig, &file, &["--json"]);
    assert_eq!(refused.status.code(), Some(1));
    let words = stderr(&refused);
    assert!(words.contains("id 2 (n2@r): the stored blob does not open"), "{words}");
    assert_eq!(copy.store().count().await, Err(StoreError::NotInitialised));
    let (imported, _, refused) =
        report(&import(&copy, &rig, &file, &["--json", "--skip-unopened"]));
    assert_eq!((imported, refused.len()), (2, 2));
    assert_eq!(listed(&copy.store()).await, [entries[0].clone(), entries[3].clone()]);
    // Damage of any kind does not stand in the way of the rest's backup.
    let broken = b"\x01?";
    match &rig.place {
        Place::Sqlite(_) => {
            let sql = "UPDATE entries SET blob = ?1 WHERE id = 4";
            rig.sqlite_file().execute(sql, [broken]).unwrap();
        }
        _ => {
            rig.set(&rig.entry_key(&entries[3].principal), &[b"1:4:", &broken[..]].concat());
            rig.run::<()>(&["DEL", &rig.entry_key(&entries[2].principal)]);
        }
    }
    for args in [&[][..], &["--reveal-seeds"]] {
        let (file, told) = export(&rig, args);
        assert_eq!((&told["entries"], &told["unopened"]), (&json!(4), &json!(3)));
        let copy = Rig::sqlite().await;
        let done = import(&copy, &rig, &file, &["--json", "--skip-unopened"]);
        assert_eq!(report(&done).0, 1);
        assert_eq!(listed(&copy.store()).await, entries[..1]);
    }
}

/// Who goes on with another key, or on a server that forgot something, does not open what is not whole.
async fn what_is_not_whole_stays_closed(rig: Rig) {
    const COUNT: u64 = 6_000;
    let source = Rig::sqlite().await;
    let from = source.ready().await;
    let entries: Vec<_> = (1..=COUNT).map(|id| entry(id, who(&format!("n{id}"), "r"))).collect();
    insert(&from, &entries).await;
    let (file, _) = export(&source, &[]);
    let signal = |running: &Child, signal: i32| {
        let pid = i32::try_from(running.id()).unwrap();
        // SAFETY: kill takes two integers; the process is our child and not yet waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    };

    let mut running = start_import(&rig, &source, &file);
    signal(&running, libc::SIGSTOP);
    match &rig.place {
        Place::Sqlite(_) => {
            rig.sqlite_file().execute("DELETE FROM entries WHERE id = 7", []).unwrap();
        }
        _ => {
            rig.run::<()>(&["DEL", &rig.entry_key(&entries[6].principal)]);
            rig.run::<()>(&["ZREM", &rig.key("ids"), "r/n7"]);
        }
    }
    signal(&running, libc::SIGCONT);
    assert_eq!(tokio::task::block_in_place(|| running.wait().unwrap()).code(), Some(1));
    assert_eq!(rig.store().count().await, Err(StoreError::Importing));

    let Sealing::KeyFile { path, .. } = &source.config.sealing else { unreachable!() };
    let args = ["import", &file, "--export-key-file", path.to_str().unwrap()];
    let mut other = rig.command_with(&rig.keys("other.key", &[]), &args);
    let refused = tokio::task::block_in_place(|| other.output().unwrap());
    assert_eq!(refused.status.code(), Some(1), "{}", stdout(&refused));
    assert!(stderr(&refused).contains("so the store stays closed"), "{}", stderr(&refused));
    assert_eq!(rig.store().count().await, Err(StoreError::Importing));

    // With the new key, and the one that it was begun with.
    let keys = rig.keys("other.key", &["sealing.key"]);
    let mut both = rig.command_with(&keys, &args);
    let done = tokio::task::block_in_place(|| both.output().unwrap());
    assert!(done.status.success(), "{}", stderr(&done));
    assert_eq!(listed(&rig.with_sealing(keys)).await, entries);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn seeds_leave_the_store_only_if_that_is_said() {
    let rig = Rig::sqlite().await;
    let plain = rig.with_sealing(Sealing::Off);
    plain.init().await.unwrap();
    let alice = Entry { seed: Seed::parse(ALICE).unwrap(), ..entry(1, who("alice", "shop")) };
    insert(&plain, std::slice::from_ref(&alice)).await;
    let unsealed = |args: &[&str]| rig.command_with(&Sealing::Off, args).output().unwrap();
    let refused = unsealed(&["export"]);
    assert_eq!((refused.status.code(), stdout(&refused)), (Some(1), String::new()));
    assert!(stderr(&refused).contains("--reveal-seeds"), "{}", stderr(&refused));
    // Nor where sealing was turned on since.
    let refused = rig.run_command(&["export"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(!stdout(&refused).contains("alice"), "{}", stdout(&refused));
    assert!(stderr(&refused).contains("alice@shop is not sealed"), "{}", stderr(&refused));
    let said = unsealed(&["export", "--reveal-seeds"]);
    assert!(said.status.success() && stdout(&said).contains(ALICE));
    assert!(stderr(&said).contains("the export holds seeds"), "{}", stderr(&said));
    let file = rig.path("plain");
    std::fs::write(&file, stdout(&said)).unwrap();
    let copy = Rig::sqlite().await;
    let done = copy.run_command(&["import", file.to_str().unwrap()]);
    assert!(done.status.success(), "{}", stderr(&done));
    assert_eq!(listed(&copy.store()).await, [alice]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_is_private_and_there_when_it_is_whole() {
    let rig = Rig::sqlite().await;
    let store = rig.ready().await;
    create(&store, "a", "r").await.unwrap();
    let file = rig.path("backup");
    let args = ["export", "--output", file.to_str().unwrap()];
    assert!(rig.run_command(&args).status.success());
    let yesterdays = std::fs::read(&file).unwrap();
    create(&store, "b", "r").await.unwrap();
    let trail = rig.path("audit.log");
    let mut command = rig.command(&args);
    command.env("OTPGATE_LOG__AUDIT", format!("file:{}", trail.display()));
    assert!(command.output().unwrap().status.success());
    let mode = |file: &Path| std::fs::metadata(file).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&file), 0o600);
    assert_ne!(std::fs::read(&file).unwrap(), yesterdays);
    let audit = std::fs::read_to_string(&trail).unwrap();
    for part in ["store_export", "done", "\"seeds\":false"] {
        assert!(audit.contains(part), "{part} in {audit}");
    }
    let whole = std::fs::read_to_string(&file).unwrap();
    assert!(whole.ends_with("\"}\n") && whole.contains("\"sha256\""), "{whole}");
    // A slip of the keyboard costs no key, no database, no device.
    let fifo = std::ffi::CString::new(rig.path("fifo").to_str().unwrap()).unwrap();
    // SAFETY: the path is a string that ends in a zero, and lives until the call is over.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
    std::os::unix::fs::symlink(&file, rig.path("link")).unwrap();
    for name in ["sealing.key", "store.db", "fifo", "link", "."] {
        let place = rig.path(name);
        let before = std::fs::symlink_metadata(&place).unwrap();
        let output = rig.run_command(&["export", "--output", place.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1), "{name}");
        assert!(stderr(&output).contains("it is not replaced"), "{name}: {}", stderr(&output));
        assert_eq!(std::fs::symlink_metadata(&place).unwrap().ino(), before.ino(), "{name}");
    }
    std::fs::write(rig.path("made"), "").unwrap();
    let made = rig.path("made");
    assert!(rig.run_command(&["export", "-o", made.to_str().unwrap()]).status.success());
    // What cannot be made whole leaves the one before, and nothing else.
    let files = || std::fs::read_dir(rig.path("")).unwrap().count();
    let plain = rig.with_sealing(Sealing::Off);
    let spoiled = entry(9, who("plain", "r"));
    plain.insert(&[spoiled]).await.unwrap();
    let mut command = rig.command(&args);
    let count = files();
    assert_eq!(command.output().unwrap().status.code(), Some(1));
    assert_eq!((files(), std::fs::read_to_string(&file).unwrap()), (count, whole));
    let missing = rig.path("absent/backup");
    let output = rig.run_command(&["export", "--output", missing.to_str().unwrap()]);
    assert!(stderr(&output).contains("absent/backup"), "{}", stderr(&output));
}

/// An import of ungleich-otp's entries closes a new store too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dump_is_imported_as_a_whole_too() {
    let rig = Rig::redis().await;
    let fields = |n: u64| json!({ "name": format!("n{n}"), "realm": "r", "seed": ALICE });
    let record = |n: u64| json!({ "model": "otpauth.otpseed", "pk": n, "fields": fields(n) });
    let dump = rig.path("dump.json");
    std::fs::write(&dump, Value::from_iter((1..=4_000).map(record)).to_string()).unwrap();
    let dump = dump.to_str().unwrap();
    let source = Rig::sqlite().await;
    let mut running = start_import(&rig, &source, dump);
    running.kill().unwrap();
    running.wait().unwrap();
    assert_eq!(rig.store().count().await, Err(StoreError::Importing));
    let (imported, present, refused) = report(&rig.run_command(&["import", "--json", dump]));
    assert_eq!((imported + present, refused), (4_000, vec![]));
    assert!(imported > 0 && present >= 1_000, "{present} were there already");
    assert_eq!(rig.store().count().await, Ok(4_000));
    assert!(verify(&rig, &[]).0);
}

/// A mistyped store leaves nothing behind, not even a key.
#[test]
fn who_only_looks_makes_nothing() {
    let (from, to) = (Sandbox::with_entries(), Sandbox::new());
    let (file, folder) = (from.path("file"), to.path(""));
    let file = file.to_str().unwrap();
    let done = run(&["store", "export", "--store", &from.store(), "-o", file]);
    assert!(done.status.success(), "{}", stderr(&done));
    let key = from.path("otpgate.db.key");
    let dry = ["import", "--dry-run", "--export-key-file", key.to_str().unwrap(), file];
    for (args, code) in [(&dry[..], 0), (&["export", "-o", "-"], 1), (&["verify"], 1)] {
        let output = run(&[&["store"][..], args, &["--store", &to.store()]].concat());
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", stderr(&output));
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0, "{args:?}");
    }
}

/// Who ends an export leaves no half of one behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_that_is_ended_leaves_nothing() {
    let rig = Rig::redis().await;
    let store = rig.ready().await;
    insert(
        &store,
        &(1..=10_000).map(|id| entry(id, who(&id.to_string(), "r"))).collect::<Vec<_>>(),
    )
    .await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("backup");
    let mut command = rig.command(&["export", "--output", file.to_str().unwrap()]);
    let mut running = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(running.stderr.take().unwrap()).lines().map(Result::unwrap);
    let pid = i32::try_from(running.id()).unwrap();
    tokio::task::block_in_place(|| {
        // It waits for the server then, in the middle of its work.
        assert!(lines.any(|line| line == "1000 entries done"));
        rig.run::<()>(&["CLIENT", "PAUSE", "1000", "ALL"]);
        // SAFETY: kill takes two integers; the process is our child and not yet waited for.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
        assert_eq!(running.wait().unwrap().code(), Some(1));
    });
    let said: Vec<_> = lines.collect();
    assert!(said.iter().any(|line| line.contains("interrupted")), "{said:?}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// The manual's way from SQLite to Redis, step by step, with two gates: no call is refused or fails.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_notice_no_move() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let upstream = format!("[proxy]\nupstream = '{}'\n", echo.address);
    // The calls that each gate gets, which a balancer would send there, and those under way.
    let gates: Vec<_> = [0, 1].map(|_| sandbox.serve(&upstream)).into();
    let mut running = Vec::new();
    for gate in gates {
        running.push(Some(gate.ready().await));
    }
    let base = |gate: &Option<Gate>| gate.as_ref().unwrap().proxy.clone();
    let targets: Vec<_> = running.iter().map(|gate| RwLock::new(Some(base(gate)))).collect();
    let targets = Arc::new(targets);
    let stop = Arc::new(AtomicBool::new(false));
    let callers = [("alice", "shop", ALICE), ("bob", "lab", BOB)].map(|(name, realm, seed)| {
        let (targets, stop) = (targets.clone(), stop.clone());
        tokio::spawn(async move {
            let (mut seen, client) = (BTreeMap::<u16, usize>::new(), http());
            for turn in 0.. {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                // Held while the call is under way.
                let target = targets[turn % 2].read().await;
                let Some(base) = &*target else { continue };
                let call = client.get(format!("{base}/")).header("X-Auth-Name", name);
                let call = call.header("X-Auth-Realm", realm).header("X-Auth-Token", token(seed));
                *seen.entry(call.send().await.unwrap().status().as_u16()).or_default() += 1;
                drop(target);
                tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            }
            seen
        })
    });

    let rig = Rig::redis().await;
    let (file, key) = (sandbox.path("move.export"), sandbox.path("store.key"));
    std::fs::copy(rig.path("sealing.key"), &key).unwrap();
    let [file, key] = [&file, &key].map(|path| path.to_str().unwrap().to_owned());
    let old_key = sandbox.path("otpgate.db.key").to_str().unwrap().to_owned();
    let redis = format!("redis://127.0.0.1:{}", rig.port());
    let store = |args: &[&str]| {
        let mut command = otpgate();
        command.arg("store").args(args);
        tokio::task::block_in_place(|| command.output().unwrap())
    };
    let done = store(&["export", "--store", &sandbox.store(), "--output", &file]);
    assert!(done.status.success(), "{}", stderr(&done));
    let keys = ["--key-file", &key, "--export-key-file", &old_key];
    let done = store(&[&["import", "--store", &redis][..], &keys, &[&file]].concat());
    assert!(done.status.success(), "{}", stderr(&done));
    for (gate, target) in running.iter_mut().zip(&*targets) {
        // Taken out of the balancer, restarted, and put in again.
        *target.write().await = None;
        let old = gate.take().unwrap();
        old.signal(libc::SIGTERM);
        assert!(tokio::task::block_in_place(|| old.wait()).success());
        let settings = format!("{upstream}[store]\nurl = '{redis}'\nkey_file = '{key}'\n");
        *gate = Some(sandbox.serve(&settings).ready().await);
        *target.write().await = Some(base(gate));
    }
    let mut args = vec!["verify", "--store", &redis, "--key-file", &key];
    for gate in &running {
        args.extend(["--gate", &gate.as_ref().unwrap().ops]);
    }
    let equal = store(&args);
    assert!(equal.status.success(), "{}{}", stdout(&equal), stderr(&equal));
    // Some more calls, on the new store alone.
    let before = echo.seen();
    eventually("calls go on", || async { (echo.seen() > before + 20).then_some(()) }).await;
    stop.store(true, Ordering::SeqCst);
    for caller in callers {
        let seen = caller.await.unwrap();
        assert!(seen.keys().eq([&200]), "{seen:?}");
    }
}
