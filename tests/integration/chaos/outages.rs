//! One Redis that is away for a while, or comes back as another one.

use std::sync::Arc;
use std::time::Duration;

use otpgate::entry::Seed;

use super::load::{Caller, Kind, Load};
use super::relay::Relay;
use super::site::{MAX_STALE, Site, in_force};
use super::{BACK, median, now, report, rounds, slack, summary};
use crate::harness::{ADMIN, Gate, otpgate, stderr};
use crate::redis_server::{Options, wait_until};
use crate::store_rig::who;

/// How long Redis makes a follower wait for news: it tells of a flushed log only then.
const BLOCK: Duration = Duration::from_millis(500);
/// Much shorter than `max_stale`, longer than what Redis makes followers wait.
const SHORT: Duration = Duration::from_millis(800);

/// Takes the store away until the gate closes, and brings it back; how long that gate took to be back.
fn close_and_return(
    site: &mut Site,
    load: &Load,
    gate: &Gate,
    down: impl FnOnce(&mut Site),
    up: impl FnOnce(&mut Site),
) -> Duration {
    let since = now();
    down(site);
    let closed = load.each_gate_answers(503, since);
    assert!(closed[0] < MAX_STALE + slack(), "it closed {closed:?} after the store was away");
    assert_eq!(site.ops(gate, "/readyz").0, 503);
    up(site);
    let since = now();
    let back = load.each_gate_answers(200, since)[0];
    assert_eq!(site.ops(gate, "/readyz").0, 200);
    back
}

fn check_return(times: &[Duration]) {
    assert!(median(times) < BACK + slack(), "{}", summary(times));
}

#[test]
fn redis_killed_until_gates_close() {
    let mut site = Site::durable_redis();
    let gate = site.closing_gate();
    let load = site.load(&[&gate], site.callers());
    let mut back = Vec::new();
    for _ in 0..rounds(1, 10) {
        back.push(close_and_return(
            &mut site,
            &load,
            &gate,
            |site| site.rig.server().kill(),
            |site| site.rig.server().restart(),
        ));
    }
    site.in_step(&[&gate]);
    assert_eq!(site.full_loads(&gate), 1.0, "nothing was missed, so nothing is loaded again");
    let how_long = format!("back after Redis answered: {}", summary(&back));
    report("Redis killed (AOF), gates closed, restarted", &load.stop(), &how_long);
    check_return(&back);
}

#[test]
fn redis_stopped_for_less_than_max_stale() {
    let site = Site::durable_redis();
    let gate = site.gate();
    let doomed = site.caller(Kind::Revoked, "doomed");
    let mut callers = site.callers();
    callers.push(doomed.clone());
    let load = site.load(&[&gate], callers);
    let server = site.redis_server();
    for _ in 0..rounds(1, 10) {
        server.signal(libc::SIGSTOP);
        std::thread::sleep(SHORT);
        server.signal(libc::SIGCONT);
        load.each_gate_answers(200, now());
        // Until it has proved itself again: else the next round's would add up.
        wait_until("the gate is current", || {
            site.metric(&gate, "otpgate_directory_staleness_seconds") < 0.6
        });
    }
    site.revoke(&doomed, in_force());
    load.each_gate_refuses(&doomed);
    let seen = load.stop();
    report("Redis stopped (SIGSTOP) for less than `max_stale`", &seen, &seen.noticed());
    seen.nobody_noticed();
}

#[test]
fn redis_stopped_for_longer_than_max_stale() {
    let mut site = Site::durable_redis();
    let gate = site.closing_gate();
    let load = site.load(&[&gate], site.callers());
    let mut back = Vec::new();
    for _ in 0..rounds(1, 10) {
        back.push(close_and_return(
            &mut site,
            &load,
            &gate,
            |site| site.redis_server().signal(libc::SIGSTOP),
            |site| site.redis_server().signal(libc::SIGCONT),
        ));
    }
    site.in_step(&[&gate]);
    let how_long = format!("back after Redis went on: {}", summary(&back));
    report("Redis stopped (SIGSTOP) for longer than `max_stale`", &load.stop(), &how_long);
    check_return(&back);
}

#[test]
fn packets_lost_without_a_reset() {
    let mut site = Site::durable_redis();
    let relay = Relay::to(site.rig.port());
    let gate = site.gate_at(&format!("redis://127.0.0.1:{}", relay.port), MAX_STALE);
    let rounds = rounds(1, 10);
    let doomed: Vec<_> =
        (0..rounds).map(|i| site.caller(Kind::Revoked, &format!("doomed{i}"))).collect();
    let mut callers = site.callers();
    callers.extend(doomed.iter().cloned());
    let load = site.load(&[&gate], callers);
    let mut back = Vec::new();
    for doomed in &doomed {
        back.push(close_and_return(
            &mut site,
            &load,
            &gate,
            |site| {
                relay.silence();
                // The gate cannot know: it may accept the entry for `max_stale`, and no longer.
                site.revoke(doomed, MAX_STALE + slack());
            },
            |_| relay.open(),
        ));
        load.each_gate_refuses(doomed);
    }
    site.in_step(&[&gate]);
    let how_long = format!("back after packets passed again: {}", summary(&back));
    report("Packets lost without a reset, an entry deleted meanwhile", &load.stop(), &how_long);
    check_return(&back);
}

#[test]
fn redis_restarted_empty() {
    let mut site = Site::redis(Options::default());
    let gate = site.closing_gate();
    let mut callers = site.callers();
    let dropped = site.caller(Kind::Revoked, "dropped");
    callers.push(dropped.clone());
    // The one that is there before and after.
    callers[0] = admin();
    let load = site.load(&[&gate], callers);
    let back = close_and_return(
        &mut site,
        &load,
        &gate,
        |site| {
            site.rig.server().kill();
            site.rig.server().restart();
        },
        |site| {
            bootstrap(site);
            dropped.must_be_refused(now(), slack());
        },
    );
    load.each_gate_refuses(&dropped);
    site.in_step(&[&gate]);
    let how_long = format!("503 until it was set up again, then back: {}", summary(&[back]));
    report("Redis restarted empty", &load.stop(), &how_long);
}

fn admin() -> Arc<Caller> {
    let seed = Seed::parse(ADMIN).expect("a seed");
    Caller::new(Kind::Living, who("admin", "ungleich-admin"), &seed)
}

/// Makes the store and the admin anew, as an operator would.
fn bootstrap(site: &Site) {
    let seed = site.file("admin.seed", ADMIN);
    let mut command = otpgate();
    command.args(["store", "bootstrap", "--config"]).arg(site.settings_file());
    let done = command.arg("--seed-file").arg(seed).output().expect("the program runs");
    assert!(done.status.success(), "{}", stderr(&done));
}

#[test]
fn flushed_and_written_to_at_once() {
    let site = Site::durable_redis();
    let gate = site.gate();
    let rounds = rounds(2, 20);
    let mut callers = site.callers();
    callers[0] = admin();
    let dropped: Vec<_> =
        (0..rounds).map(|i| site.caller(Kind::Revoked, &format!("dropped{i}"))).collect();
    callers.extend(dropped.iter().cloned());
    let load = site.load(&[&gate], callers);
    load.each_gate_answers(200, now());
    for (i, dropped) in dropped.iter().enumerate() {
        if i > 0 {
            site.runtime.block_on(site.store.create(|id| dropped.entry(id))).expect("it is made");
            let since = now();
            load.each_gate_answers(200, since);
        }
        site.rig.empty();
        bootstrap(&site);
        dropped.must_be_refused(now(), BLOCK + in_force());
        // Numbers of the new log pass those of the old one.
        for n in 0..20 {
            site.create(&format!("new{i}-{n}"), "shop", Seed::random());
        }
        load.each_gate_refuses(dropped);
        site.in_step(&[&gate]);
    }
    assert_eq!(site.full_loads(&gate), 1.0 + rounds as f64);
    let seen = load.stop();
    report("`FLUSHALL`, at once another store with other writes", &seen, &seen.noticed());
    seen.nobody_noticed();
}

#[test]
fn an_older_backup_restored() {
    let mut site = Site::durable_redis();
    let gate = site.gate();
    let mut callers = site.callers();
    let backup = site.back_up();
    let late = site.caller(Kind::Revoked, "late");
    callers.push(late.clone());
    let load = site.load(&[&gate], callers);
    site.rig.server().kill();
    backup.restore();
    site.rig.server().restart();
    late.must_be_refused(now(), BACK + slack());
    // The log goes on with the numbers that the gate has seen already.
    for n in 0..5 {
        site.create(&format!("new{n}"), "shop", Seed::random());
    }
    load.each_gate_refuses(&late);
    site.in_step(&[&gate]);
    assert_eq!(site.full_loads(&gate), 2.0);
    let seen = load.stop();
    report("Redis put back from an older backup, written to at once", &seen, &seen.noticed());
    seen.nobody_noticed();
}
