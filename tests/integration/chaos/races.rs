//! Deletes that race look-ups on several gates.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::load::{Caller, Kind, Line};
use super::site::{Site, in_force};
use super::{IN_FORCE, now, report, rounds, slack};
use crate::harness::{Gate, PATIENCE};

/// What the prober of one gate tells.
enum Word {
    /// The entry is accepted.
    Accepted,
    /// It is not any more; when the last call was sent that was.
    Refused(Instant),
}

/// Calls one gate as fast as is useful, until it refuses.
fn probe(gate: &Gate, caller: &Caller, tell: &mpsc::Sender<Word>) {
    let mut line = Line::to(gate);
    let mut last = None;
    loop {
        let sent = now();
        match (line.call(caller), last) {
            (200, None) => tell.send(Word::Accepted).expect("somebody listens"),
            (200, Some(_)) => {}
            (401, None) => continue,
            (401, Some(last)) => return tell.send(Word::Refused(last)).expect("somebody listens"),
            (other, _) => panic!("{other}"),
        }
        last = Some(sent);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn deletes_race_look_ups() {
    let site = Site::durable_redis();
    let gates = [site.gate(), site.gate(), site.gate()];
    let all: Vec<&Gate> = gates.iter().collect();
    let doomed: Vec<_> =
        (0..rounds(25, 400)).map(|i| site.caller(Kind::Revoked, &format!("doomed{i}"))).collect();
    let load = site.load(&all, site.callers());
    let mut late = Vec::new();
    for caller in &doomed {
        let (tell, told) = mpsc::channel();
        std::thread::scope(|scope| {
            for gate in &gates {
                let tell = tell.clone();
                scope.spawn(move || probe(gate, caller, &tell));
            }
            for _ in &gates {
                let word = told.recv_timeout(PATIENCE).expect("every gate accepts it");
                assert!(matches!(word, Word::Accepted));
            }
            assert_eq!(site.delete_through(&gates[0], caller), 204);
            let acknowledged = now();
            for _ in &gates {
                match told.recv_timeout(PATIENCE).expect("every gate refuses it") {
                    Word::Refused(last) => late.push(last.saturating_duration_since(acknowledged)),
                    Word::Accepted => panic!("accepted after it was refused"),
                }
            }
        });
    }
    late.sort();
    let p99 = late[(late.len() * 99).div_ceil(100) - 1];
    let worst = late[late.len() - 1];
    let how_long = format!(
        "last accepted after the acknowledgement of {} deletes on {} gates: p50 {:.1} ms, p99 {:.1} \
         ms, at most {:.1} ms",
        doomed.len(),
        gates.len(),
        late[late.len() / 2].as_secs_f64() * 1e3,
        p99.as_secs_f64() * 1e3,
        worst.as_secs_f64() * 1e3
    );
    let seen = load.stop();
    report("Deletes racing look-ups", &seen, &how_long);
    seen.nobody_noticed();
    assert!(p99 < IN_FORCE + slack() / 2, "{how_long}");
    assert!(worst < in_force(), "{how_long}");
}
