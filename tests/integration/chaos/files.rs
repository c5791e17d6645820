//! SQLite files in trouble.

use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use reqwest::Method;
use serde_json::json;

use super::load::{Caller, Kind, Line};
use super::site::{MAX_STALE, Site, in_force};
use super::{is_long, median, now, report, rounds, slack, summary};
use crate::harness::Gate;
use crate::store_rig::Place;

fn file(site: &Site) -> PathBuf {
    match &site.rig.place {
        Place::Sqlite(file) => file.clone(),
        _ => panic!("not an SQLite store"),
    }
}

/// The file and those that belong to it.
fn files(site: &Site) -> [PathBuf; 3] {
    let file = file(site);
    ["", "-wal", "-shm"].map(|end| PathBuf::from(format!("{}{end}", file.display())))
}

/// Lets no file of a process grow beyond that.
fn limit_files(gate: &Gate, bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the process is our child and not yet waited for; the limit outlives the call.
    let done = unsafe {
        libc::prlimit(gate.pid(), libc::RLIMIT_FSIZE, &raw const limit, std::ptr::null_mut())
    };
    assert_eq!(done, 0);
}

#[test]
fn a_full_disk() {
    let site = Site::sqlite();
    let gate = site.gate_with(|command| {
        // SAFETY: the call is async-signal-safe. Without it the limit below would kill the process.
        unsafe {
            command.pre_exec(|| {
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                Ok(())
            });
        }
    });
    let doomed = site.caller(Kind::Revoked, "doomed");
    let load = site.load(&[&gate], [site.callers(), vec![doomed.clone()]].concat());
    limit_files(&gate, 300_000);
    let (manager, mut made) = (site.manager(&gate), 0);
    let refusal = loop {
        let body = json!({
            "name": format!("n{made}"), "realm": "shop", "comment": "x".repeat(250),
        });
        let work = manager.ask(Method::POST, "", Some(body));
        match site.runtime.block_on(work).expect("an answer").0 {
            201 => made += 1,
            other => break other,
        }
        assert!(made < 5_000, "the limit does not work");
    };
    assert_eq!((refusal, site.delete_through(&gate, &doomed)), (503, 503));
    site.in_step(&[&gate]);
    assert_eq!(Line::to(&gate).call(&doomed), 200, "what could not be deleted is there");
    limit_files(&gate, libc::RLIM_INFINITY);
    assert_eq!(site.delete_through(&gate, &doomed), 204);
    doomed.must_be_refused(now(), in_force());
    load.each_gate_refuses(&doomed);
    site.in_step(&[&gate]);
    let held = site.runtime.block_on(site.store.list(None, usize::MAX)).expect("it lists");
    let held = held.iter().filter(|stored| stored.principal.name.as_str().starts_with('n'));
    assert_eq!(held.count(), made, "exactly what was acknowledged is there");
    let seen = load.stop();
    report("SQLite on a full disk", &seen, &format!("{}; writes get 503", seen.noticed()));
}

#[test]
fn a_lock_held_by_another_process() {
    let site = Site::sqlite();
    let gate = site.gate();
    let doomed: Vec<_> = ["doomed", "later"].map(|n| site.caller(Kind::Revoked, n)).into();
    let load = site.load(&[&gate], [site.callers(), doomed.clone()].concat());
    let other = site.rig.sqlite_file();
    other.execute_batch("BEGIN IMMEDIATE").expect("a lock");
    std::thread::scope(|scope| {
        let deleting = scope.spawn(|| (site.delete_through(&gate, &doomed[0]), now()));
        load.each_gate_answers(200, now() + Duration::from_millis(300));
        other.execute_batch("ROLLBACK").expect("unlocked");
        let (status, acknowledged) = deleting.join().expect("no panic");
        assert_eq!(status, 204);
        doomed[0].must_be_refused(acknowledged, in_force());
    });
    load.each_gate_refuses(&doomed[0]);
    if is_long() {
        other.execute_batch("BEGIN IMMEDIATE").expect("a lock");
        assert_eq!(site.delete_through(&gate, &doomed[1]), 503);
        other.execute_batch("ROLLBACK").expect("unlocked");
    }
    assert_eq!(site.delete_through(&gate, &doomed[1]), 204);
    doomed[1].must_be_refused(now(), in_force());
    load.each_gate_refuses(&doomed[1]);
    let seen = load.stop();
    seen.nobody_noticed();
    report(
        "SQLite locked by another process",
        &seen,
        &format!("{}; writes wait, then get 503", seen.noticed()),
    );
}

#[test]
fn a_file_replaced_under_the_gate() {
    let site = Site::sqlite();
    let gate = site.gate();
    let callers = site.callers();
    let rounds = rounds(2, 30);
    let late: Vec<Arc<Caller>> =
        (0..rounds).map(|i| site.caller(Kind::Revoked, &format!("late{i}"))).collect();
    let load = site.load(&[&gate], [callers, late.clone()].concat());
    let backup = file(&site).with_extension("backup");
    for late in &late {
        // A backup from before the last one of them was made, put back as the manual says.
        let conn = site.rig.sqlite_file();
        conn.execute("VACUUM INTO ?1", [backup.to_str()]).expect("a copy");
        drop(conn);
        let copy = rusqlite::Connection::open(&backup).expect("it opens");
        let who = [late.principal.realm.as_str(), late.principal.name.as_str()];
        copy.execute("DELETE FROM entries WHERE realm = ?1 AND name = ?2", who).expect("gone");
        copy.execute("UPDATE state SET nonce = hex(randomblob(8))", []).expect("another history");
        drop(copy);
        let [file, wal, shm] = files(&site);
        std::fs::rename(&backup, &file).expect("moved");
        for rest in [wal, shm] {
            let _ = std::fs::remove_file(rest);
        }
        late.must_be_refused(now(), in_force());
        load.each_gate_refuses(late);
        site.in_step(&[&gate]);
    }
    assert_eq!(site.full_loads(&gate), 1.0 + rounds as f64);
    let seen = load.stop();
    seen.nobody_noticed();
    report("SQLite file replaced under the gate by an older one", &seen, &seen.noticed());
    seen.nobody_noticed();
}

#[test]
fn a_file_deleted_under_the_gate() {
    let site = Site::sqlite();
    let gate = site.closing_gate();
    let load = site.load(&[&gate], site.callers());
    let away = |path: &PathBuf| PathBuf::from(format!("{}.away", path.display()));
    let mut back = Vec::new();
    for _ in 0..rounds(1, 10) {
        let since = now();
        for path in files(&site).iter().filter(|path| path.exists()) {
            std::fs::rename(path, away(path)).expect("moved");
        }
        let closed = load.each_gate_answers(503, since);
        assert!(closed[0] < MAX_STALE + slack(), "{closed:?}");
        assert!(!file(&site).exists(), "nobody makes an empty store in its place");
        for path in files(&site).iter().rev().filter(|path| away(path).exists()) {
            std::fs::rename(away(path), path).expect("moved");
        }
        back.extend(load.each_gate_answers(200, now()));
    }
    site.in_step(&[&gate]);
    let how_long = format!("back after the file was there again: {}", summary(&back));
    report("SQLite file deleted under the gate", &load.stop(), &how_long);
    // A store that is not there is asked for once a second.
    assert!(median(&back) < Duration::from_secs(1) + slack(), "{}", summary(&back));
}
