//! `otpgate store verify`: it finds what was changed behind the change log's back, in the store and between
//! the store and its gates.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use otpgate::entry::{Entry, EntryId};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpListener;

use crate::harness::{Gate, Sandbox, http, stderr, stdout};
use crate::redis_server::{Options, RedisServer};
use crate::store_rig::{Place, Rig, create, entry, opened, verify, who};

on_stores!([sqlite, redis, cluster, scriptless] [
    gates_are_compared_with_their_store,
    every_kind_of_damage_is_found,
    writes_may_go_on,
]);

/// What a report says is wrong with the store.
fn problems(report: &Value) -> Vec<String> {
    let named = report["problems"].as_array().unwrap();
    assert_eq!(report["problem_count"], json!(named.len()));
    named.iter().map(|one| one.as_str().unwrap().to_owned()).collect()
}

/// What it says of its gates, in their order.
fn differences(report: &Value) -> Vec<Vec<&str>> {
    let gates = report["gates"].as_array().unwrap();
    gates
        .iter()
        .map(|gate| {
            let what = gate["differences"].as_array().unwrap();
            assert_eq!(gate["equal"], json!(what.is_empty()));
            what.iter().map(|one| one.as_str().unwrap()).collect()
        })
        .collect()
}

async fn gate(sandbox: &Sandbox, rig: &Rig, more: &str) -> Gate {
    let store = rig.settings(&rig.config.sealing);
    sandbox.serve(&format!("{store}{more}\n")).ready().await
}

async fn gates_are_compared_with_their_store(rig: Rig) {
    let store = rig.ready().await;
    for n in 0..30 {
        create(&store, &format!("n{n}"), ["shop", "lab"][n % 2]).await.unwrap();
    }
    let sandbox = Sandbox::new();
    let all = gate(&sandbox, &rig, "").await;
    let index = gate(&sandbox, &rig, "hold = 'index'").await;
    let some = gate(&sandbox, &rig, "realms = ['lab', 'ungleich-admin']").await;
    let gates = [&all, &index, &some].map(|gate| gate.ops.clone());
    let gates = gates.each_ref().map(String::as_str);
    let (equal, report) = verify(&rig, &gates);
    assert!(equal, "{report}");
    assert_eq!((&report["entries"], problems(&report)), (&json!(30), vec![]));
    let text = stdout(&rig.run_command(&["verify", "--gate", &some.ops]));
    assert!(text.contains("30 entries at version 30, 0 problems"), "{text}");
    assert!(text.contains(": equal, 15 entries"), "{text}");

    // Behind the log's back: gates do not hear of it, and the store does not show it by itself.
    let [lab, shop] = [("n1", "lab"), ("n0", "shop")].map(|(name, realm)| who(name, realm));
    let copy = Rig::sqlite().await;
    let other = copy.with_sealing(rig.config.sealing.clone());
    other.init().await.unwrap();
    let old = store.get((&lab).into()).await.unwrap().unwrap();
    // Sealed for that entry, by a store that has this one's key.
    let new = Entry { comment: "forged".into(), ..opened(&old).clone() };
    other.insert(&[new]).await.unwrap();
    let forged: Vec<u8> =
        copy.sqlite_file().query_row("SELECT blob FROM entries", [], |row| row.get(0)).unwrap();
    match &rig.place {
        Place::Sqlite(_) => {
            let sql = "UPDATE entries SET blob = ?1 WHERE id = ?2";
            rig.sqlite_file().execute(sql, (forged, old.id.0)).unwrap();
        }
        _ => {
            let value = [format!("{}:{}:", old.revision, old.id).as_bytes(), &forged].concat();
            rig.set(&rig.entry_key(&lab), &value);
        }
    }
    assert_eq!(opened(&store.get((&lab).into()).await.unwrap().unwrap()).comment, "forged");
    let (equal, report) = verify(&rig, &gates);
    assert!(!equal && problems(&report).is_empty(), "{report}");
    let other = "holds other contents than the store";
    assert_eq!(differences(&report), [vec![other], vec![], vec![other]]);

    // An entry that only the store has lost.
    match &rig.place {
        Place::Sqlite(_) => {
            let sql = "DELETE FROM entries WHERE name = ?1";
            rig.sqlite_file().execute(sql, [shop.name.as_str()]).unwrap();
        }
        _ => {
            rig.run::<()>(&["DEL", &rig.entry_key(&shop)]);
            rig.run::<()>(&["ZREM", &rig.key("ids"), "shop/n0"]);
        }
    }
    let (equal, report) = verify(&rig, &gates);
    assert!(!equal && problems(&report).is_empty(), "{report}");
    let found = differences(&report);
    let fewer = "holds 30 entries, the store 29";
    assert_eq!(found[0], [fewer, "holds other names than the store", other]);
    assert_eq!(found[1], [fewer, "holds other names than the store"]);
    assert_eq!(found[2], [other]);

    // A gate that is not there, an address of something else.
    let api = all.api.clone();
    drop(all);
    let (equal, report) = verify(&rig, &[gates[0], &api, gates[1]]);
    assert!(!equal);
    assert!(differences(&report)[0][0].starts_with("cannot be asked: "), "{report}");
    let usage = rig.run_command(&["verify", "--gate", "localhost:9464"]);
    assert_eq!(usage.status.code(), Some(2), "{}", stderr(&usage));
}

/// Statements or commands of one kind of damage, and words of what is told.
async fn every_kind_of_damage_is_found(rig: Rig) {
    let store = rig.ready().await;
    for n in 1..=6 {
        create(&store, &format!("n{n}"), "r").await.unwrap();
    }
    let (sound, report) = verify(&rig, &[]);
    assert!(sound, "{report}");
    let expect = |words: &[&str]| {
        let (sound, report) = verify(&rig, &[]);
        let found = problems(&report);
        assert!(!sound && found.len() == words.len(), "{words:?}: {found:?}");
        for word in words {
            assert!(found.iter().any(|one| one.contains(word)), "{word}: {found:?}");
        }
    };
    rig.swap(&who("n1", "r"), &who("n2", "r"));
    match &rig.place {
        Place::Sqlite(_) => {
            let file = rig.sqlite_file();
            let run = |sql: &str| file.execute_batch(sql).unwrap();
            let unopened =
                ["the entry of n1@r cannot be opened", "the entry of n2@r cannot be opened"];
            expect(&unopened);
            run("UPDATE entries SET name = 'a' || char(7) WHERE name = 'n1';
                 UPDATE entries SET name = 'b' || char(7) WHERE name = 'n2'");
            expect(&["2 entries have an impossible name"]);
            run("DELETE FROM entries WHERE name LIKE '%' || char(7)");
            for (damage, words, repair) in [
                (
                    "UPDATE entries SET revision = 99 WHERE id = 3",
                    "revision 99",
                    "UPDATE entries SET revision = 3 WHERE id = 3",
                ),
                (
                    "UPDATE state SET next_id = 6",
                    "the next id is 6, but 6 is in use",
                    "UPDATE state SET next_id = 7",
                ),
                (
                    "UPDATE log SET previous = 'x' WHERE version = 4",
                    "at record 4",
                    "UPDATE log SET previous = (SELECT nonce FROM log WHERE version = 3) WHERE version = 4",
                ),
                (
                    "UPDATE state SET nonce = 'x'",
                    "does not end where",
                    "UPDATE state SET nonce = (SELECT nonce FROM log WHERE version = 6)",
                ),
            ] {
                run(damage);
                expect(&[words]);
                run(repair);
            }
            run("DELETE FROM log WHERE version = 3");
            expect(&["at record 4"]);
            run("DELETE FROM log WHERE version < 3");
        }
        _ => {
            let key = |name: &str| rig.key(name);
            let entry = |name: &str| rig.entry_key(&who(name, "r"));
            expect(&[
                "the entry of n1@r has another id than 1",
                "the entry of n2@r has another id than 2",
                "the entry of n1@r cannot be opened",
                "the entry of n2@r cannot be opened",
            ]);
            rig.swap(&who("n1", "r"), &who("n2", "r"));
            rig.set(&entry("n1"), b"junk");
            expect(&["the entry of n1@r cannot be opened"]);
            rig.run::<()>(&["DEL", &entry("n1")]);
            expect(&["the entry of n1@r (id 1) is gone", "the entry of n1@r cannot be opened"]);
            rig.run::<()>(&["ZREM", &key("ids"), "r/n1"]);
            rig.run::<()>(&["ZREM", &key("ids"), "r/n2"]);
            expect(&["no id leads to the entry of n2@r"]);
            rig.run::<()>(&["DEL", &entry("n2")]);
            rig.set(&key("e:no-key"), b"1:1:x");
            expect(&["no id leads to a key with an impossible name"]);
            rig.run::<()>(&["DEL", &key("e:no-key")]);
            rig.run::<()>(&["ZADD", &key("ids"), "2", "r/%61"]);
            expect(&["id 2 has an impossible name"]);
            rig.run::<()>(&["ZREM", &key("ids"), "r/%61"]);
            rig.run::<()>(&["HSET", &key("head"), "id", "6"]);
            expect(&["the next id is 6, but 6 is in use"]);
            rig.run::<()>(&["HSET", &key("head"), "id", "7"]);
            let value: Vec<u8> = rig.run(&["GET", &entry("n3")]);
            rig.set(&entry("n3"), &[b"99", &value[1..]].concat());
            expect(&["revision 99"]);
            rig.set(&entry("n3"), &value);
            let nonce: String = rig.run(&["HGET", &key("head"), "n"]);
            rig.run::<()>(&["HSET", &key("head"), "n", "x"]);
            expect(&["does not end where"]);
            rig.run::<()>(&["HSET", &key("head"), "n", &nonce]);
            rig.run::<i64>(&["XDEL", &key("log"), "3-0"]);
            expect(&["at record 4"]);
        }
    }
    rig.trim_log(2);
    let (sound, report) = verify(&rig, &[]);
    assert!(sound, "{report}");
}

/// Nothing that just changes is taken for damage.
async fn writes_may_go_on(rig: Rig) {
    let store = rig.ready().await;
    for n in 1..=50 {
        store.insert(&[entry(n, who(&format!("n{n}"), "r"))]).await.unwrap();
    }
    let sandbox = Sandbox::new();
    let gate = gate(&sandbox, &rig, "").await;
    let done = Arc::new(AtomicU64::new(0));
    let (gently, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let writer = tokio::spawn({
        let (store, done) = (rig.store(), done.clone());
        let (gently, stop) = (gently.clone(), stop.clone());
        async move {
            while !stop.load(Ordering::SeqCst) {
                let writes = done.fetch_add(1, Ordering::SeqCst) + 1;
                if gently.load(Ordering::SeqCst) {
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
                let id = EntryId(writes % 50 + 1);
                let old = store.get_by_id(id).await.unwrap().unwrap();
                let name = format!("w{writes}");
                if writes % 5 == 0 {
                    store.delete(&old).await.unwrap();
                    store.insert(&[entry(id.0, who(&name, "r"))]).await.unwrap();
                } else {
                    let new = Entry { principal: who(&name, "r"), ..opened(&old).clone() };
                    store.update(&old, &new).await.unwrap();
                }
            }
        }
    });
    for look in 0.. {
        let (sound, report) = verify(&rig, &[]);
        assert!(sound, "{report}");
        if look >= 5 && done.load(Ordering::SeqCst) > 20 {
            break;
        }
    }
    // To be compared, everything must be still for a moment.
    gently.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        let (equal, report) = verify(&rig, &[&gate.ops]);
        assert!(equal, "{report}");
    }
    // Until then it waits, and takes nothing that just changes for a difference.
    gently.store(false, Ordering::SeqCst);
    let before = done.load(Ordering::SeqCst);
    let (equal, report) = std::thread::scope(|scope| {
        let verifying = scope.spawn(|| {
            let report = rig.command(&["verify", "--json", "--gate", &gate.ops]).output().unwrap();
            (report.status.success(), stdout(&report))
        });
        tokio::task::block_in_place(|| {
            while done.load(Ordering::SeqCst) < before + 40 && !verifying.is_finished() {
                std::thread::sleep(Duration::from_millis(1));
            }
            stop.store(true, Ordering::SeqCst);
            verifying.join().unwrap()
        })
    });
    assert!(equal, "{report}");
    writer.await.unwrap();
    let (equal, report) = verify(&rig, &[&gate.ops]);
    assert!(equal, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_not_be_looked_at_is_told() {
    let server = RedisServer::start(Options {
        args: ["--user", "gate", "on", ">pw", "~*", "+@all", "-scan"].map(str::to_owned).to_vec(),
        ..Options::default()
    });
    let url = format!("redis://gate:pw@127.0.0.1:{}", server.port);
    let rig = Rig::on_server(server, &url);
    let store = rig.ready().await;
    create(&store, "a", "r").await.unwrap();
    let (sound, report) = verify(&rig, &[]);
    assert!(sound, "{report}");
    assert!(report["left_out"][0].as_str().unwrap().contains("SCAN is refused"), "{report}");
}

/// Answers with these, one after the other, the last one again and again; its address.
async fn answering(answers: Vec<Value>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        for turn in 0.. {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            while line != "\r\n" {
                line.clear();
                stream.read_line(&mut line).await.unwrap();
            }
            let body = answers[turn.min(answers.len() - 1)].to_string();
            let length = body.len();
            let head =
                format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
            stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
        }
    });
    address
}

/// A gate may be asked just when it applies a change, and sum up some of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gate_that_differs_is_asked_again() {
    let rig = Rig::sqlite().await;
    create(&rig.ready().await, "a", "r").await.unwrap();
    let sandbox = Sandbox::new();
    let gate = gate(&sandbox, &rig, "").await;
    let told = http().get(format!("{}/directory", gate.ops)).send().await.unwrap();
    let told: Value = told.json().await.unwrap();
    let with = |key: &str, value: Value| {
        let mut told = told.clone();
        told[key] = value;
        told
    };
    let mixed = with("contents", json!("0000000000000000"));
    let moment = answering(vec![told.clone(), mixed.clone(), told.clone()]).await;
    assert!(verify(&rig, &[&moment]).0, "that was a moment");
    let stale = with("current", json!(false));
    for (answers, what) in [
        (vec![mixed.clone()], "holds other contents than the store"),
        (vec![told.clone(), mixed.clone(), stale], "its entries are not known to be current"),
        (vec![with("nonce", json!("x"))], "follows another change log"),
    ] {
        let (equal, report) = verify(&rig, &[&answering(answers).await]);
        let found = differences(&report);
        assert!(!equal && found[0].len() == 1 && found[0][0].contains(what), "{report}");
    }
}
