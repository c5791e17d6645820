//! What a store and its followers do: revocation latency, look-up cost and memory at several sizes, recovery.
//! Run by `make bench-store` on a quiet machine; needs redis-server.
//!
//! Every size runs in a process of its own, so that memory is its own.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use otpgate::clock::{Clock as _, SystemClock};
use otpgate::config::{Sealing, StoreConfig};
use otpgate::directory::Hold;
use otpgate::entry::{Principal, PrincipalRef};
use otpgate::seal::Sealer;
use otpgate::store::url::StoreUrl;
use otpgate::store::{MAX_BATCH, Store, Version};

#[path = "support/filled.rs"]
mod filled;
#[allow(dead_code, reason = "shared with the tests, which use all of it")]
#[path = "../tests/integration/redis_server.rs"]
mod redis_server;

use filled::{Gate, entry, fill, principal};
use redis_server::{Options, RedisServer};

/// Sizes that are measured unless arguments name others.
const SIZES: [u64; 2] = [10_000, 1_000_000];
/// Writes whose way to all followers is timed.
const WRITES: usize = 500;
/// Times that Redis is killed and started again.
const CRASHES: usize = 15;
/// Look-ups of each kind.
const LOOK_UPS: usize = 2_000_000;
/// Names that are used often.
const HOT: usize = 1_000;

/// What a child process is to measure: in the environment, since cargo has arguments of its own.
const CHILD: &str = "BENCH_STORE_CHILD";

fn main() {
    let threads = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = threads.expect("a runtime");
    if let Ok(child) = std::env::var(CHILD) {
        return runtime.block_on(measure_size(&child));
    }
    let sizes: Vec<u64> = std::env::args().filter_map(|text| text.parse().ok()).collect();
    let sizes = if sizes.is_empty() { SIZES.to_vec() } else { sizes };
    runtime.block_on(async {
        println!("\n| writes with followers | p50 | p99 | most |\n|---|---|---|---|");
        for followers in [1, 50] {
            revocation(followers).await;
        }
        println!("\n| recovery | p50 | most |\n|---|---|---|");
        recovery(1).await;
        recovery(50).await;
    });
    println!(
        "\n| entries | holds | load | memory | an entry | hot | any | unknown | not held |\n\
         |---|---|---|---|---|---|---|---|---|"
    );
    for size in sizes {
        runtime.block_on(sizes_of(size));
    }
}

/// A place of its own, with the settings to reach it.
struct Place {
    server: RedisServer,
    config: StoreConfig,
    _folder: tempfile::TempDir,
}

impl Place {
    fn new(aof: bool) -> Self {
        let server = RedisServer::start(Options { aof, ..Options::default() });
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key");
        std::fs::write(&path, Sealer::random_key().as_bytes()).expect("written");
        let config = settings(&server.url(), &path);
        Self { server, config, _folder: folder }
    }

    fn store(&self) -> Store {
        Store::open(&self.config).expect("good settings")
    }
}

fn settings(url: &str, key: &std::path::Path) -> StoreConfig {
    let mut config = otpgate::config::load::load(None, [], &[]).expect("defaults").store;
    config.url = StoreUrl::parse(url).expect("a URL");
    config.sealing = Sealing::KeyFile { path: key.to_owned(), old: Vec::new(), make: false };
    config
}

fn part(times: &[Duration], part: f64) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    times[((times.len() - 1) as f64 * part).round() as usize]
}

/// From the acknowledgement of a write until the last of all followers has it in force.
async fn revocation(followers: usize) {
    let place = Place::new(true);
    let store = place.store();
    store.init().await.expect("made");
    fill(&store, (1..=10_000).map(entry)).await;
    let gates: Vec<_> = (0..followers)
        .map(|_| Gate::start(place.store(), &Hold::default(), Arc::new(SystemClock)))
        .collect();
    let mut times = Vec::new();
    for number in 0..WRITES as u64 {
        let who = principal(number + 1);
        let old = store.get((&who).into()).await.expect("read").expect("it is there");
        let version = store.delete(&old).await.expect("deleted");
        let done = SystemClock.now().monotonic;
        for gate in &gates {
            gate.has(version).await;
        }
        // The first one waits for the loads.
        if number > 0 {
            times.push(done.elapsed());
        }
    }
    let [p50, p99, most] = [0.5, 0.99, 1.0].map(|p| part(&times, p));
    println!("| {followers} | {p50:.1?} | {p99:.1?} | {most:.1?} |");
}

/// From the first answer of a Redis that was killed until all followers have what is written then.
async fn recovery(followers: usize) {
    let mut place = Place::new(true);
    let store = place.store();
    store.init().await.expect("made");
    fill(&store, (1..=10_000).map(entry)).await;
    let gates: Vec<_> = (0..followers)
        .map(|_| Gate::start(place.store(), &Hold::default(), Arc::new(SystemClock)))
        .collect();
    let mut times = Vec::new();
    for crash in 0..CRASHES as u64 {
        let version = store.insert(&[entry(20_000 + 2 * crash)]).await.expect("inserted");
        for gate in &gates {
            gate.has(version).await;
        }
        place.server.kill();
        // Long enough for the pauses between tries to grow.
        tokio::time::sleep(Duration::from_millis(700)).await;
        place.server.restart();
        let back = SystemClock.now().monotonic;
        let version = loop {
            if let Ok(version) = store.insert(&[entry(20_001 + 2 * crash)]).await {
                break version;
            }
        };
        for gate in &gates {
            gate.has(version).await;
        }
        times.push(back.elapsed());
    }
    println!(
        "| kill -9 and restart with AOF, {followers} gates | {:.0?} | {:.0?} |",
        part(&times, 0.5),
        part(&times, 1.0)
    );
}

/// Fills a Redis and lets a process for each way of holding measure itself.
async fn sizes_of(entries: u64) {
    let place = Place::new(false);
    let store = place.store();
    store.init().await.expect("made");
    fill(&store, (1..=entries).map(entry)).await;
    let Sealing::KeyFile { path, .. } = &place.config.sealing else { unreachable!() };
    for hold in ["all", "index"] {
        let child = format!("{hold} {entries} {} {}", place.server.url(), path.display());
        let program = std::env::current_exe().expect("this program");
        let status = Command::new(program).env(CHILD, child).status().expect("it runs");
        assert!(status.success());
    }
}

async fn measure_size(child: &str) {
    let [hold, entries, url, key] = child.split(' ').collect::<Vec<_>>()[..] else {
        panic!("what is to be measured?")
    };
    let entries: u64 = entries.parse().expect("a number");
    let cached_entries = (hold == "index").then_some(100_000);
    let config = settings(url, std::path::Path::new(key));
    let store = Store::open(&config).expect("good settings");
    let before = resident();
    let began = SystemClock.now().monotonic;
    let gate =
        Gate::start(store, &Hold { cached_entries, ..Hold::default() }, Arc::new(SystemClock));
    gate.has(Version(entries.div_ceil(MAX_BATCH as u64))).await;
    let load = began.elapsed();
    let memory = resident() - before;
    let hot: Vec<_> = (0..HOT).map(|_| principal(random(entries))).collect();
    for who in &hot {
        look_up(&gate, who.into()).await;
    }
    let hot = time(&gate, &hot, LOOK_UPS).await;
    // What is not held costs a round trip, so that fewer must do; all of them are different.
    let any: Vec<_> = (0..100_000).map(|_| principal(random(entries))).collect();
    let (any, not_held) = match cached_entries {
        None => (format!("{:.0?}", time(&gate, &any, LOOK_UPS).await), String::new()),
        Some(_) => (String::new(), format!("{:.1?}", time(&gate, &any[..20_000], 20_000).await)),
    };
    let unknown: Vec<_> = (0..100_000).map(|_| principal(entries + 1 + random(1 << 40))).collect();
    let unknown = time(&gate, &unknown, LOOK_UPS).await;
    println!(
        "| {entries} | {hold} | {load:.2?} | {:.0} MiB | {:.0} B | {hot:.0?} | {any} | {unknown:.0?} | {not_held} |",
        memory as f64 / f64::from(1 << 20),
        memory as f64 / entries as f64,
    );
}

fn random(below: u64) -> u64 {
    rand::random_range(1..=below)
}

async fn look_up(gate: &Gate, who: PrincipalRef<'_>) -> bool {
    let found = gate.directory.look_up(who, SystemClock.now(), |found| found.is_some()).await;
    found.expect("it is current")
}

/// The mean time of a look-up.
async fn time(gate: &Gate, names: &[Principal], times: usize) -> Duration {
    let began = SystemClock.now().monotonic;
    let mut found = 0_usize;
    for who in names.iter().cycle().take(times) {
        found += usize::from(look_up(gate, who.into()).await);
    }
    std::hint::black_box(found);
    began.elapsed() / u32::try_from(times).expect("not that many")
}

/// Bytes of memory that this process has.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: u64 =
        text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("a number of pages");
    pages * 4096
}
