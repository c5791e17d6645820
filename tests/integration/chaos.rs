//! Stores in trouble, seen by callers: the real program in front of a real upstream and a real store,
//! under steady load, while the store is killed, emptied, cut off or put back.
//!
//! Whatever happens: a token that proves nobody is never accepted, but for the time that the store
//! takes to tell or `max_stale` where it cannot, and a living entry is never called unknown.
//!
//! Every run does each scenario briefly, but for those that are ignored; `make chaos` does all of
//! them at length and writes what callers saw to `target/chaos.md`.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use otpgate::clock::{Clock as _, SystemClock};

mod cluster;
mod crowd;
mod durability;
mod files;
mod gaps;
mod load;
mod outages;
mod races;
mod relay;
mod sentinel;
mod site;

use load::Seen;

/// How soon an acknowledged change is in force on connected gates.
const IN_FORCE: Duration = Duration::from_millis(50);
/// How soon a gate is back in service once its store answers.
const BACK: Duration = Duration::from_millis(100);

fn now() -> Instant {
    SystemClock.now().monotonic
}

/// Whether this is `make chaos`: alone on the machine, and in no hurry.
fn is_long() -> bool {
    std::env::var_os("OTPGATE_CHAOS").is_some()
}

/// How often something is done, in every run and in `make chaos`.
fn rounds(short: usize, long: usize) -> usize {
    if is_long() { long } else { short }
}

/// What the machine may add to a bound: other tests keep it busy in every run.
fn slack() -> Duration {
    Duration::from_millis(if is_long() { 300 } else { 1500 })
}

/// Adds what a scenario showed to the table of `make chaos`, then fails the test if anything was answered
/// wrongly.
fn report(scenario: &str, seen: &Seen, how_long: &str) {
    let accepted = match seen.accepted_for() {
        Some(longest) => {
            format!("; revoked tokens accepted for {} ms at most", longest.as_millis())
        }
        None => String::new(),
    };
    let wrong = seen.wrongly_accepted();
    let row = format!("| {scenario} | {} | {how_long}{accepted} | {wrong} |\n", seen.told());
    if is_long() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/chaos.md");
        let file = std::fs::OpenOptions::new().create(true).append(true).open(file);
        file.expect("the table").write_all(row.as_bytes()).expect("one more row");
    }
    println!("{row}");
    seen.check();
}

/// The middle and the largest of some times.
fn summary(times: &[Duration]) -> String {
    let mut times = times.to_vec();
    times.sort();
    match times.as_slice() {
        [] => "never".to_owned(),
        [only] => format!("{} ms", only.as_millis()),
        all => format!(
            "median {} ms, longest {} ms of {}",
            median(all).as_millis(),
            all[all.len() - 1].as_millis(),
            all.len()
        ),
    }
}

/// The middle of some times.
fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    times[times.len() / 2]
}
