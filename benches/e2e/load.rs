//! Load: wrk and h2load as fast as it goes, our own at a fixed rate.

use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::callers::Kind;
use crate::open_loop;
use crate::plan::{Arm, Scenario};
use crate::process::{Side, pinned};
use crate::stand::Stand;

/// Connections of wrk and of fixed load.
pub(crate) const CONNECTIONS: usize = 32;
const H2_CONNECTIONS: usize = 8;
const H2_STREAMS: usize = 4;

/// What a run took.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Load {
    pub(crate) requests: u64,
    /// Of these, how many were not answered as they should.
    pub(crate) errors: u64,
    pub(crate) seconds: f64,
    /// Microseconds from when a request was due: the median, 99 and 99.9 of a hundred. Only with a schedule.
    pub(crate) latencies: Option<[f64; 3]>,
}

/// Makes requests of a file, one after the other, and says what came of it.
const SCRIPT: &str = r#"
local requests, at = {}, 0
function init(args)
    for request in io.open(args[1], "rb"):read("*a"):gmatch("[^%z]+") do
        requests[#requests + 1] = request
    end
end
function request()
    at = at % #requests + 1
    return requests[at]
end
function done(summary)
    local e = summary.errors
    io.write(string.format("\nBENCH %d %d %d %d\n", summary.requests, summary.duration, e.status,
        e.connect + e.read + e.write + e.timeout))
end
"#;

/// Runs wrk.
pub(crate) fn wrk(stand: &Stand, arm: Arm, scenario: Scenario, seconds: u64) -> Load {
    let script = stand.path("wrk.lua");
    fs::write(&script, SCRIPT).expect("the folder takes files");
    let scheme = if scenario == Scenario::Tls { "https" } else { "http" };
    let output = pinned(Side::Load, stand.threads, "wrk")
        .args(["-t1", &format!("-c{CONNECTIONS}"), &format!("-d{seconds}s"), "-s"])
        .arg(&script)
        .arg(format!("{scheme}://127.0.0.1:{}/", stand.port(arm, scenario)))
        .arg("--")
        .arg(requests(stand, kind(arm, scenario)))
        .output()
        .expect("what `tests/tools/install bench` brings");
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.strip_prefix("BENCH "));
    let line =
        line.unwrap_or_else(|| panic!("wrk: {text}{}", String::from_utf8_lossy(&output.stderr)));
    let numbers: Vec<u64> = line.split(' ').map(|n| n.parse().expect("a number")).collect();
    let [requests, micros, refused, failed] = numbers[..] else { panic!("wrk: {line}") };
    let errors = match arm {
        Arm::OtpgateWrong => requests - refused,
        _ => refused,
    };
    let seconds = micros as f64 / 1e6;
    Load { requests, errors: errors + failed, seconds, latencies: None }
}

/// Runs h2load, whose requests all bear one claim.
pub(crate) fn h2load(stand: &Stand, arm: Arm, seconds: u64) -> Load {
    let mut command = pinned(Side::Load, stand.threads, "h2load");
    command.args(["-t1", &format!("-c{H2_CONNECTIONS}"), &format!("-m{H2_STREAMS}")]);
    command.args(["-D", &seconds.to_string(), "-H", "User-Agent: billing/2.4"]);
    command.args(["-H", "Accept: application/json"]);
    for header in stand.callers.claim() {
        command.args(["-H", &header]);
    }
    command.arg(format!("http://127.0.0.1:{}/items/1", stand.port(arm, Scenario::Http2)));
    let output = command.output().expect("what `tests/tools/install bench` brings");
    let text = String::from_utf8_lossy(&output.stdout);
    let after = |begin: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(begin));
        line.unwrap_or_else(|| panic!("h2load says nothing of {begin}: {text}"))
    };
    let first = |line: &str| line.trim().split(' ').next().and_then(|n| n.parse::<u64>().ok());
    let good = first(after("status codes:")).expect("a number");
    let counts = after("requests:").split(", ").filter_map(|part| {
        let (number, what) = part.trim().split_once(' ')?;
        Some((what, number.parse::<u64>().ok()?))
    });
    // What is under way at the end was neither done nor refused.
    let done = counts.clone().find(|(what, _)| *what == "done").map_or(0, |(_, n)| n);
    let seconds = seconds as f64;
    Load { requests: done, errors: done.saturating_sub(good), seconds, latencies: None }
}

/// Sends so many requests a second, whatever becomes of them.
pub(crate) fn at_rate(stand: &Stand, arm: Arm, rate: u64, seconds: u64) -> Load {
    let task = open_loop::Task {
        port: stand.port(arm, Scenario::FixedLoad),
        connections: CONNECTIONS,
        rate,
        seconds,
        requests: requests(stand, kind(arm, Scenario::FixedLoad)),
    };
    let output = pinned(Side::Load, stand.threads, std::env::current_exe().expect("this program"))
        .env(crate::CHILD, open_loop::CHILD)
        .env(open_loop::TASK, serde_json::to_string(&task).expect("JSON"))
        .output()
        .expect("it runs");
    let load = serde_json::from_slice::<Load>(&output.stdout);
    load.unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)))
}

fn kind(arm: Arm, scenario: Scenario) -> Kind {
    match (arm, scenario) {
        (Arm::Verify, _) => Kind::Verify,
        (Arm::OtpgateWrong, _) => Kind::Wrong,
        (_, Scenario::NewConnections) => Kind::Once,
        (_, Scenario::Bodies) => Kind::Large,
        _ => Kind::Right,
    }
}

/// A file of requests whose tokens are of now.
fn requests(stand: &Stand, kind: Kind) -> PathBuf {
    let file = stand.path("requests");
    stand.callers.write(kind, &file);
    file
}
