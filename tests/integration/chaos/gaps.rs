//! What happens in the store while a gate does not look, and damage in it.

use std::time::Duration;

use otpgate::entry::Seed;

use super::load::{Caller, Kind, Line};
use super::relay::Relay;
use super::site::{DEFAULT_MAX_STALE, Site, in_force};
use super::{now, report, rounds};
use crate::harness::Gate;
use crate::redis_server::wait_until;
use crate::store_rig::who;

#[test]
fn connections_killed_with_a_delete_in_the_gap() {
    let site = Site::durable_redis();
    let relay = Relay::to(site.rig.port());
    let gate = site.gate_at(&format!("redis://127.0.0.1:{}", relay.port), DEFAULT_MAX_STALE);
    let doomed: Vec<_> =
        (0..rounds(3, 30)).map(|i| site.caller(Kind::Revoked, &format!("doomed{i}"))).collect();
    let mut callers = site.callers();
    callers.extend(doomed.iter().cloned());
    let load = site.load(&[&gate], callers);
    for doomed in &doomed {
        relay.refuse();
        site.rig.run::<i64>(&["CLIENT", "KILL", "TYPE", "normal"]);
        let stored = site.stored(doomed);
        site.runtime.block_on(site.store.delete(&stored)).expect("the store takes it");
        relay.open();
        doomed.must_be_refused(now(), super::BACK + super::slack());
        load.each_gate_refuses(doomed);
    }
    site.in_step(&[&gate]);
    assert_eq!(site.full_loads(&gate), 1.0, "the log tells all that was missed");
    let seen = load.stop();
    report("`CLIENT KILL`, a delete before the gate was back", &seen, &seen.noticed());
    seen.nobody_noticed();
}

#[test]
fn the_log_trimmed_past_the_gates_position() {
    let site = Site::durable_redis();
    let relay = Relay::to(site.rig.port());
    let gate = site.gate_at(&format!("redis://127.0.0.1:{}", relay.port), DEFAULT_MAX_STALE);
    let rounds = rounds(2, 20);
    let doomed: Vec<_> =
        (0..rounds).map(|i| site.caller(Kind::Revoked, &format!("doomed{i}"))).collect();
    let mut callers = site.callers();
    callers.extend(doomed.iter().cloned());
    let load = site.load(&[&gate], callers);
    for (i, doomed) in doomed.iter().enumerate() {
        relay.refuse();
        site.rig.run::<i64>(&["CLIENT", "KILL", "TYPE", "normal"]);
        let stored = site.stored(doomed);
        site.runtime.block_on(site.store.delete(&stored)).expect("the store takes it");
        for n in 0..10 {
            site.create(&format!("more{i}-{n}"), "shop", Seed::random());
        }
        site.rig.trim_log(3);
        relay.open();
        doomed.must_be_refused(now(), super::BACK + super::slack());
        load.each_gate_refuses(doomed);
        site.in_step(&[&gate]);
    }
    assert_eq!(site.full_loads(&gate), 1.0 + rounds as f64);
    let seen = load.stop();
    report(
        "Change log trimmed past the position of a gate that was cut off",
        &seen,
        &seen.noticed(),
    );
    seen.nobody_noticed();
}

/// Refused for good: with 401, or with 503 where its entry cannot be read.
fn is_refused(gate: &Gate, caller: &Caller) -> bool {
    let status = Line::to(gate).call(caller);
    assert!([200, 401, 503].contains(&status), "{status}");
    status != 200
}

#[test]
fn a_script_that_fails_midway() {
    let site = Site::durable_redis();
    let gate = site.gate();
    let doomed = site.caller(Kind::Revoked, "doomed");
    let mut callers = site.callers();
    callers.push(doomed.clone());
    let load = site.load(&[&gate], callers);
    let stored = site.stored(&doomed);
    // The set of entries becomes a text: the delete fails after it wrote to the log and removed the entry.
    let (ids, aside) = (site.rig.key("ids"), site.rig.key("aside"));
    site.rig.run::<()>(&["RENAME", &ids, &aside]);
    site.rig.run::<()>(&["SET", &ids, "planted"]);
    let deleted = site.runtime.block_on(site.store.delete(&stored));
    assert!(deleted.is_err(), "{deleted:?}");
    // It was not acknowledged, but begun: nobody may make more of it than there was.
    wait_until("the entry is refused", || is_refused(&gate, &doomed));
    doomed.must_be_refused(now(), Duration::ZERO);
    site.rig.run::<()>(&["DEL", &ids]);
    site.rig.run::<()>(&["RENAME", &aside, &ids]);
    // A gate that loads all of it agrees with the one that followed.
    let fresh = site.gate();
    assert!(is_refused(&fresh, &doomed));
    // Done again, it is done.
    let left = site.stored(&doomed);
    site.runtime.block_on(site.store.delete(&left)).expect("the store takes it");
    site.in_step(&[&gate, &fresh]);
    site.create("later", "shop", Seed::random());
    site.in_step(&[&gate, &fresh]);
    assert_eq!(site.full_loads(&gate), 1.0, "the log goes on");
    let seen = load.stop();
    report("A delete that failed midway (a planted key of another type)", &seen, &seen.noticed());
    seen.nobody_noticed();
}

#[test]
fn a_server_out_of_memory() {
    let site = Site::durable_redis();
    let gate = site.gate();
    let doomed = site.caller(Kind::Revoked, "doomed");
    let mut callers = site.callers();
    callers.push(doomed.clone());
    let load = site.load(&[&gate], callers);
    let stored = site.stored(&doomed);
    site.rig.run::<()>(&["CONFIG", "SET", "maxmemory", "1"]);
    for _ in 0..rounds(5, 50) {
        let deleted = site.runtime.block_on(site.store.delete(&stored));
        assert!(deleted.is_err(), "{deleted:?}");
    }
    // All or nothing: the entry that could not be deleted is still there.
    assert!(!is_refused(&gate, &doomed));
    site.rig.run::<()>(&["CONFIG", "SET", "maxmemory", "0"]);
    site.revoke(&doomed, in_force());
    load.each_gate_refuses(&doomed);
    site.in_step(&[&gate]);
    let seen = load.stop();
    report("Redis out of memory, deletes refused meanwhile", &seen, &seen.noticed());
    seen.nobody_noticed();
}

#[test]
fn swapped_blobs_and_unknown_keys_prove_nobody() {
    let site = Site::durable_redis();
    let [a, b] = ["a", "b"].map(|name| site.create(name, "shop", Seed::random()));
    site.rig.swap(&a.principal, &b.principal);
    // Sealed with a key that no gate has.
    let foreign = site.runtime.block_on(async {
        let make = |id| otpgate::entry::Entry::new(id, who("foreign", "shop"), Seed::random(), 1);
        site.rig.with_other_key().create(make).await.expect("the store takes it").0
    });
    let mut callers = site.callers();
    // With its own token, and with that of the entry that it was swapped with.
    let broken = [
        Caller::of(Kind::Revoked, &a),
        Caller::of(Kind::Revoked, &b),
        Caller::new(Kind::Revoked, a.principal.clone(), &b.seed),
        Caller::new(Kind::Revoked, b.principal.clone(), &a.seed),
        Caller::of(Kind::Revoked, &foreign),
    ];
    let gate = site.gate();
    for caller in broken {
        caller.must_be_refused(now(), Duration::ZERO);
        assert_eq!(Line::to(&gate).call(&caller), 503, "{}", caller.principal.name);
        callers.push(caller);
    }
    assert_eq!(site.metric(&gate, "otpgate_directory_broken_entries_total"), 3.0);
    let load = site.load(&[&gate], callers);
    for n in 0..rounds(5, 50) {
        site.create(&format!("n{n}"), "shop", Seed::random());
        load.each_gate_answers(200, now());
    }
    let seen = load.stop();
    let how_long = "503 for these entries alone, as long as they are so";
    report("Blobs swapped between two names, another sealed with an unknown key", &seen, how_long);
    seen.nobody_noticed();
}
