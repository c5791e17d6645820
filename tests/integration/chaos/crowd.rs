//! Many gates that return at once.

use std::time::Duration;

use super::load::{Kind, Load, Pace};
use super::site::Site;
use super::{BACK, median, now, report, rounds, slack, summary};
use crate::harness::Gate;

/// Calls of a command since the server was started.
fn calls(site: &Site, command: &str) -> u64 {
    let stats: String = site.rig.run(&["INFO", "commandstats"]);
    let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:")));
    let calls = line.and_then(|line| line.strip_prefix("calls=")?.split(',').next());
    calls.map_or(0, |calls| calls.parse().expect("a number"))
}

#[test]
fn many_gates_return_at_once() {
    let mut site = Site::durable_redis();
    let callers = site.callers();
    let backup = site.back_up();
    let late = site.caller(Kind::Revoked, "late");
    let gates: Vec<_> = (0..rounds(3, 10)).map(|_| site.closing_gate()).collect();
    let gates: Vec<&Gate> = gates.iter().collect();
    let pace = Pace { connections: 1, rate: 40 };
    let load = Load::start(&gates, callers.into_iter().chain([late.clone()]).collect(), pace);
    load.each_gate_answers(200, now());

    // The same store: nobody needs to load it again.
    let mut back = Vec::new();
    for _ in 0..rounds(1, 5) {
        site.rig.server().kill();
        load.each_gate_answers(503, now());
        site.rig.server().restart();
        back.extend(load.each_gate_answers(200, now()));
        assert_eq!(calls(&site, "zrangebyscore"), 0, "all entries were loaded again");
    }

    // An older one: everybody loads it, once.
    site.rig.server().kill();
    load.each_gate_answers(503, now());
    backup.restore();
    site.rig.server().restart();
    let since = now();
    late.must_be_refused(since, Duration::ZERO);
    let loaded = load.each_gate_answers(200, since);
    load.each_gate_refuses(&late);
    // One step with entries and one that finds no more.
    assert_eq!(calls(&site, "zrangebyscore"), 2 * gates.len() as u64);
    site.in_step(&gates);
    for gate in &gates {
        assert_eq!(site.full_loads(gate), 2.0);
    }

    let how_long = format!("back: {}; with a full load: {}", summary(&back), summary(&loaded));
    report(&format!("{} gates return at once", gates.len()), &load.stop(), &how_long);
    assert!(median(&back) < BACK + slack(), "{}", summary(&back));
    assert!(median(&loaded) < BACK + slack(), "{}", summary(&loaded));
}
