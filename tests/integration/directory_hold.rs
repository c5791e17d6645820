//! Gates that hold less than everything: names and the entries used most, or some realms alone.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use otpgate::clock::SystemClock;
use otpgate::directory::{Hold, Unavailable};
use otpgate::entry::{Entry, Principal, Seed};
use otpgate::store::digest::Digest;
use otpgate::store::{Scope, Store};

use crate::directory_follow::{Gate, as_seen, break_store, mend_store};
use serde_json::json;

use crate::harness::{ADMIN, ALICE, BOB, Sandbox, eventually, http, token};
use crate::peers::echo::Echo;
use crate::redis_server::LIMIT;
use crate::store_redis::{Relay, Verdict, at};
use crate::store_rig::{Follow, Place, Rig, create, entry, who};

/// As few entries in memory as can be set.
fn index() -> Hold {
    Hold { cached_entries: Some(100), ..Hold::default() }
}

fn only(realms: &[&str]) -> Scope {
    Scope::only(realms.iter().map(|realm| (*realm).to_owned()))
}

async fn gate(rig: &Rig, hold: &Hold) -> Gate {
    let gate = Gate::holding(hold, rig.store(), Arc::new(SystemClock));
    gate.loaded().await;
    gate
}

fn fetches(gate: &Gate, outcome: &str) -> u64 {
    let line = format!("otpgate_directory_fetches_total{{outcome=\"{outcome}\"}} ");
    let text = String::from_utf8(gate.metrics.render()).expect("text");
    text.lines().find_map(|l| l.strip_prefix(&line)).map_or(0, |n| n.parse().expect("a number"))
}

async fn shows(gate: &Gate, entry: &Entry) -> bool {
    gate.find(&entry.principal).await == Ok(Some(as_seen(entry)))
}

/// Replaces the seed of an entry; `None`: deletes it.
async fn change(store: &Store, old: &Entry, new: Option<&Entry>) -> otpgate::store::Version {
    let stored = store.get((&old.principal).into()).await.unwrap().unwrap();
    match new {
        Some(new) => store.update(&stored, new).await.unwrap(),
        None => store.delete(&stored).await.unwrap(),
    }
}

on_stores!([sqlite, redis] [
    entries_are_fetched_once_and_followed_from_then_on,
    unknown_names_ask_nothing_of_the_store,
    an_entry_that_changes_while_it_is_fetched_is_never_kept_as_it_was,
    what_is_in_memory_outlasts_the_store,
    an_entry_of_another_history_is_not_taken,
    a_lost_place_is_loaded_again,
    other_realms_are_left_out,
    accounts_match_what_is_stored,
]);

async fn entries_are_fetched_once_and_followed_from_then_on(rig: Rig) {
    let store = rig.ready().await;
    let a = create(&store, "a", "r").await.unwrap();
    let gate = gate(&rig, &index()).await;
    assert_eq!((gate.directory.len(), gate.directory.held()), (1, 0));
    for _ in 0..3 {
        assert!(shows(&gate, &a).await);
    }
    assert_eq!((fetches(&gate, "found"), gate.directory.held()), (1, 1));

    let rotated = Entry { seed: Seed::random(), ..a.clone() };
    let version = change(&store, &a, Some(&rotated)).await;
    assert!(gate.directory.wait_for(version, LIMIT).await);
    assert!(shows(&gate, &rotated).await);
    assert_eq!(fetches(&gate, "found"), 1, "the change log brought it");

    let renamed = Entry { principal: who("z", "r"), ..rotated.clone() };
    let version = change(&store, &rotated, Some(&renamed)).await;
    assert!(gate.directory.wait_for(version, LIMIT).await);
    assert_eq!(gate.find(&a.principal).await, Ok(None));
    assert!(shows(&gate, &renamed).await);

    let version = change(&store, &renamed, None).await;
    assert!(gate.directory.wait_for(version, LIMIT).await);
    assert_eq!(gate.find(&renamed.principal).await, Ok(None));
    assert_eq!((gate.directory.len(), gate.directory.held()), (0, 0));

    let broken = entry(9, who("b", "r"));
    let version = rig.with_other_key().insert(std::slice::from_ref(&broken)).await.unwrap();
    assert!(gate.directory.wait_for(version, LIMIT).await);
    assert_eq!(gate.find(&broken.principal).await, Err(Unavailable::Broken));
}

async fn unknown_names_ask_nothing_of_the_store(rig: Rig) {
    let store = rig.ready().await;
    create(&store, "a", "r").await.unwrap();
    let gate = gate(&rig, &index()).await;
    let asked = |rig: &Rig| match rig.place {
        Place::Redis(_) => {
            let stats: String = rig.run(&["INFO", "commandstats"]);
            stats.lines().find(|line| line.starts_with("cmdstat_zscore")).map(str::to_owned)
        }
        _ => None,
    };
    let before = asked(&rig);
    for i in 0..10_000 {
        assert_eq!(gate.find(&who(&format!("nobody-{i}"), "r")).await, Ok(None));
    }
    let all = ["found", "absent", "failed"].map(|outcome| fetches(&gate, outcome));
    assert_eq!((all, gate.directory.held()), ([0; 3], 0));
    assert_eq!(asked(&rig), before);
}

/// Readers of many entries for little room, beside a writer.
async fn an_entry_that_changes_while_it_is_fetched_is_never_kept_as_it_was(rig: Rig) {
    const ENTRIES: usize = 300;
    let store = rig.ready().await;
    let mut entries: Vec<_> =
        (0..ENTRIES).map(|i| entry(i as u64 + 1, who(&format!("e{i}"), "r"))).collect();
    store.insert(&entries).await.unwrap();
    let gate = Arc::new(gate(&rig, &index()).await);
    let stop = Arc::new(AtomicBool::new(false));
    let names: Arc<Vec<Principal>> =
        Arc::new(entries.iter().map(|entry| entry.principal.clone()).collect());
    let readers: Vec<_> = (0..6)
        .map(|reader| {
            let (gate, stop, names) = (gate.clone(), stop.clone(), names.clone());
            tokio::spawn(async move {
                let mut seen = 0;
                while !stop.load(Ordering::Relaxed) {
                    for i in 0..ENTRIES {
                        // The first ones most often, as the writer.
                        let i = if (i + reader) % 3 == 0 { i } else { i % 10 };
                        gate.find(&names[i]).await.expect("the store is there");
                        seen += 1;
                    }
                }
                seen
            })
        })
        .collect();
    for round in 0..200 {
        let at = (round * 7) % if round % 4 == 0 { ENTRIES } else { 10 };
        let new = Entry { seed: Seed::random(), ..entries[at].clone() };
        let version = change(&store, &entries[at], Some(&new)).await;
        entries[at] = new;
        assert!(gate.directory.wait_for(version, LIMIT).await);
        assert!(shows(&gate, &entries[at]).await, "round {round}");
    }
    stop.store(true, Ordering::Relaxed);
    for reader in readers {
        assert!(reader.await.unwrap() > 0);
    }
    for entry in &entries {
        assert!(shows(&gate, entry).await);
    }
    assert!(gate.directory.held() <= 150, "{} are in memory", gate.directory.held());
    assert!(fetches(&gate, "found") > ENTRIES as u64, "entries were dropped and fetched again");
}

async fn what_is_in_memory_outlasts_the_store(mut rig: Rig) {
    let store = rig.ready().await;
    let (a, b) = (create(&store, "a", "r").await.unwrap(), create(&store, "b", "r").await.unwrap());
    let gate = gate(&rig, &index()).await;
    assert!(shows(&gate, &a).await);
    break_store(&mut rig);
    assert!(shows(&gate, &a).await);
    assert_eq!(gate.find(&b.principal).await, Err(Unavailable::NotHeld));
    assert_eq!(gate.find(&who("nobody", "r")).await, Ok(None));
    mend_store(&mut rig);
    let found = || async { shows(&gate, &b).await.then_some(()) };
    eventually("the store gives entries again", found).await;
}

/// As one that a primary has which was replaced: it lacks what is in force here.
async fn an_entry_of_another_history_is_not_taken(rig: Rig) {
    let store = rig.ready().await;
    let a = create(&store, "a", "r").await.unwrap();
    let (follow, _) = Follow::start(&store).await;
    let found = |position| {
        let store = store.clone();
        let who = a.principal.clone();
        async move { store.get_since((&who).into(), &position).await.map(|row| row.is_some()) }
    };
    assert_eq!(found(follow.position.clone()).await, Ok(true));
    create(&store, "b", "r").await.unwrap();
    assert_eq!(found(follow.position.clone()).await, Ok(true), "later is good");
    let ahead = Follow::start(&store).await.0.position;
    let mut other = ahead.clone();
    other.nonce.0.replace_range(..1, "x");
    assert!(found(other).await.is_err(), "another write had that number");
    let mut later = ahead.clone();
    later.version.0 += 1;
    assert!(found(later).await.is_err(), "it is behind");
    rig.trim_log(1);
    assert!(found(follow.position).await.is_err(), "nobody can tell any more");
    assert_eq!(found(ahead).await, Ok(true));
}

async fn a_lost_place_is_loaded_again(rig: Rig) {
    let store = rig.ready().await;
    let a = create(&store, "a", "r").await.unwrap();
    let gate = gate(&rig, &index()).await;
    assert!(shows(&gate, &a).await);
    rig.empty();
    let store = rig.ready().await;
    let mut others = Vec::new();
    for name in ["a", "b", "c"] {
        others.push(create(&store, name, "r").await.unwrap());
    }
    gate.until("the new history is known", |gate| gate.directory.len() == 3).await;
    for entry in &others {
        assert!(shows(&gate, entry).await);
    }
    assert!(!shows(&gate, &a).await);
}

async fn other_realms_are_left_out(rig: Rig) {
    let store = rig.ready().await;
    let ours = create(&store, "a", "r/1").await.unwrap();
    let theirs = create(&store, "a", "other").await.unwrap();
    let holds = [None, Some(100)]
        .map(|cached_entries| Hold { cached_entries, scope: only(&["r/1", "empty"]) });
    for hold in holds {
        let gate = gate(&rig, &hold).await;
        assert!(shows(&gate, &ours).await);
        assert_eq!(gate.find(&theirs.principal).await, Ok(None));
        assert_eq!(gate.directory.len(), 1);
        let (b, c) = (format!("b{:?}", hold.cached_entries), who("c", "other"));
        let b = create(&store, &b, "r/1").await.unwrap();
        let c = entry(b.id.0 + 1, c);
        let version = store.insert(std::slice::from_ref(&c)).await.unwrap();
        assert!(gate.directory.wait_for(version, LIMIT).await);
        assert!(shows(&gate, &b).await);
        assert_eq!(gate.find(&c.principal).await, Ok(None));
        assert_eq!(gate.directory.len(), 2);
        for entry in [&b, &c] {
            change(&store, entry, None).await;
        }
    }
}

async fn accounts_match_what_is_stored(rig: Rig) {
    let store = rig.ready().await;
    for i in 0..50 {
        create(&store, &format!("e{i}"), if i % 5 == 0 { "s" } else { "r" }).await.unwrap();
    }
    let all = gate(&rig, &Hold::default()).await;
    let names = gate(&rig, &index()).await;
    let some = gate(&rig, &Hold { scope: only(&["s"]), ..Hold::default() }).await;
    for round in 0..3 {
        let (follow, rows) = Follow::start(&store).await;
        let (mut expected, mut of_s) = (Digest::default(), Digest::default());
        for row in &rows {
            expected.add_row(row);
            if row.principal.realm.as_str() == "s" {
                of_s.add_row(row);
            }
        }
        for gate in [&all, &names, &some] {
            assert!(gate.directory.wait_for(follow.position.version, LIMIT).await);
            assert_eq!(gate.directory.account().position, follow.position);
        }
        assert_eq!(all.directory.account().digest, expected);
        assert_eq!(some.directory.account().digest, of_s);
        let known = names.directory.account().digest;
        assert_eq!((known.entries, known.names), (expected.entries, expected.names));

        let principals: HashSet<_> = rows.iter().map(|row| row.principal.clone()).collect();
        for who in principals.iter().take(4 + round) {
            let old = store.get(who.into()).await.unwrap().unwrap();
            store.delete(&old).await.unwrap();
        }
    }
}

/// The answer of the fetch comes when the change that it does not know is in force.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fetched_entry_that_changed_meanwhile_is_fetched_again() {
    let mut rig = Rig::redis().await;
    let store = rig.ready().await;
    let a = create(&store, "a", "r").await.unwrap();
    let relay = Relay::to(rig.server().port);
    let through = at(&rig, &format!("redis://127.0.0.1:{}", relay.port));
    let gate = Arc::new(Gate::holding(&index(), through, Arc::new(SystemClock)));
    gate.loaded().await;

    let blob: Vec<u8> = rig.run(&["GET", &rig.entry_key(&a.principal)]);
    let (release, held) = mpsc::channel::<()>();
    let mut held = Some(held);
    relay.arm(move |answer| {
        match answer.windows(blob.len()).any(|part| part == blob).then(|| held.take()).flatten() {
            Some(held) => Verdict::Hold(held),
            None => Verdict::Wait,
        }
    });
    let looking = tokio::spawn({
        let (gate, who) = (gate.clone(), a.principal.clone());
        async move { gate.find(&who).await }
    });
    let is_held = || async { (!relay.is_armed()).then_some(()) };
    eventually("the entry was read", is_held).await;
    let rotated = Entry { seed: Seed::random(), ..a.clone() };
    let version = change(&store, &a, Some(&rotated)).await;
    assert!(gate.directory.wait_for(version, LIMIT).await);
    drop(release);
    assert_eq!(looking.await.unwrap(), Ok(Some(as_seen(&rotated))));
    assert!(shows(&gate, &rotated).await);
}

/// The settings, on the real program: calls pass, metrics and `/directory` tell what is held.
#[tokio::test(flavor = "multi_thread")]
async fn a_gate_with_little_in_memory_lets_its_callers_through() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let upstream = format!("[proxy]\nupstream = '{}'\n", echo.address);
    let store =
        "[store]\nhold = 'index'\ncached_entries = 100\nrealms = ['shop', 'ungleich-auth']\n";
    let gate = sandbox.serve(&(upstream + store)).ready().await;
    let status = async |name: &str, realm: &str, seed: &str| {
        gate.call("/", name, realm, &token(seed)).send().await.unwrap().status().as_u16()
    };
    assert_eq!(status("alice", "shop", ALICE).await, 200);
    assert_eq!(status("alice", "shop", BOB).await, 401);
    assert_eq!(status("nobody", "shop", ALICE).await, 401);
    assert_eq!(status("admin", "ungleich-admin", ADMIN).await, 401, "its realm is left out");
    let get = async |path: &str| {
        http().get(format!("{}{path}", gate.ops)).send().await.unwrap().text().await.unwrap()
    };
    let metrics = get("/metrics").await;
    for line in [
        "otpgate_directory_fetches_total{outcome=\"found\"} 1\n",
        "otpgate_directory_held_entries 1\n",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
    let account: serde_json::Value = serde_json::from_str(&get("/directory").await).unwrap();
    assert_eq!((&account["holds"], &account["contents"]), (&json!("index"), &json!(null)));
    assert_eq!(account["realms"], json!(["shop", "ungleich-auth"]));
    assert!(account["entries"].as_u64().unwrap() >= 2 && account["current"] == true, "{account}");
}
