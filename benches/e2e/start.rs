//! From the start of a process to its first answer.

use std::time::Duration;

use serde::Serialize;

use crate::callers::Kind;
use crate::process::{memory, now};
use crate::stand::{Part, Places, Stand, ask, free_ports};

/// Starts of each, for every round.
const TIMES: usize = 3;
const PATIENCE: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_micros(200);

/// A start.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Start {
    pub(crate) part: &'static str,
    pub(crate) milliseconds: f64,
    /// Resident after the first answer, in bytes.
    pub(crate) memory: u64,
}

/// Starts bare pingora and the gate in turn; other processes of them are idle meanwhile.
pub(crate) fn measure(stand: &Stand, rounds: usize) -> Vec<Start> {
    let parts = [("bare", Part::Bare), ("otpgate", Part::Gate)];
    let all = (0..rounds * TIMES).flat_map(|_| parts);
    all.map(|(name, part)| start(stand, name, part)).collect()
}

fn start(stand: &Stand, name: &'static str, part: Part) -> Start {
    let [plain, h2c, tls, api] = free_ports();
    let request = stand.callers.once(Kind::Right);
    let began = now();
    let mut process = stand.spawn(part, Places { plain, h2c, tls, api });
    while !matches!(ask(plain, &request), Ok(200)) {
        process.must_run();
        assert!(began.elapsed() < PATIENCE, "{name} does not answer");
        std::thread::sleep(PAUSE);
    }
    let milliseconds = began.elapsed().as_secs_f64() * 1e3;
    Start { part: name, milliseconds, memory: memory(process.pid()) }
}
