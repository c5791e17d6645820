//! What was acknowledged survives `kill -9`, at whatever moment it comes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use otpgate::entry::Seed;
use otpgate::otp::{Generator, TokenParams};
use reqwest::Method;
use serde_json::{Value, json};

use super::site::{Manager, Site};
use super::{report, rounds};
use crate::harness::PATIENCE;
use crate::redis_server::wait_until;
use crate::store_rig::opened;

/// Who writes at the same time.
const WRITERS: usize = 4;

/// What the store must hold of a name.
#[derive(Clone, PartialEq, Eq)]
enum Fate {
    /// An entry whose seed makes this token.
    There(String),
    Gone,
    /// A request about it was not acknowledged.
    Unsure,
}

/// What was acknowledged.
#[derive(Default)]
struct Book {
    fates: Mutex<HashMap<String, Fate>>,
    acknowledged: AtomicUsize,
    is_over: AtomicBool,
}

impl Book {
    fn note(&self, name: &str, fate: Fate) {
        if fate != Fate::Unsure {
            self.acknowledged.fetch_add(1, Ordering::Relaxed);
        }
        self.fates.lock().expect("no panic").insert(name.to_owned(), fate);
    }
}

/// A token that tells seeds apart.
fn mark(seed: &Seed) -> String {
    Generator::new(seed, TokenParams::default()).token_at(1_000_000)
}

/// Creates, rotates and deletes until something fails.
async fn write(manager: Manager, tag: String, book: Arc<Book>) {
    let mut number = 0;
    while !book.is_over.load(Ordering::Relaxed) {
        number += 1;
        if write_one(&manager, &format!("{tag}-{number}"), number, &book).await.is_none() {
            return;
        }
    }
}

async fn write_one(manager: &Manager, name: &str, number: usize, book: &Book) -> Option<()> {
    let done = async |status, method, path: &str, body| {
        book.note(name, Fate::Unsure);
        let (got, answer) = manager.ask(method, path, body).await?;
        (got == status).then_some(answer)
    };
    let there = |answer: &Value| {
        let seed = Seed::parse(answer["seed"].as_str().expect("a seed")).expect("a seed");
        Fate::There(mark(&seed))
    };
    let wanted = json!({ "name": name, "realm": "shop" });
    let made = done(201, Method::POST, "", Some(wanted)).await?;
    book.note(name, there(&made));
    if number.is_multiple_of(2) {
        let path = format!("{}/rotate/", made["id"]);
        let rotated = done(200, Method::POST, &path, Some(json!({}))).await?;
        book.note(name, there(&rotated));
    }
    if number.is_multiple_of(3) {
        done(204, Method::DELETE, &format!("{}/", made["id"]), None).await?;
        book.note(name, Fate::Gone);
    }
    Some(())
}

/// Names whose fate in the store is not the acknowledged one.
fn lost(site: &Site, book: &Book) -> Vec<String> {
    let listed = site.runtime.block_on(site.store.list(None, usize::MAX)).expect("it lists");
    let held: HashMap<_, _> =
        listed.iter().map(|s| (s.principal.name.as_str(), mark(&opened(s).seed))).collect();
    let fates = book.fates.lock().expect("no panic");
    let is_lost = |(name, fate): &(&String, &Fate)| match fate {
        Fate::There(token) => held.get(name.as_str()) != Some(token),
        Fate::Gone => held.contains_key(name.as_str()),
        Fate::Unsure => false,
    };
    fates.iter().filter(is_lost).map(|(name, _)| name.clone()).collect()
}

/// Who is killed.
#[derive(Clone, Copy)]
struct Victims {
    writer: bool,
    redis: bool,
}

/// Kills the victims again and again while writes go on through a gate's API; callers of another gate
/// on the same store notice nothing.
fn kill_and_count(mut site: Site, victims: Victims, scenario: &str) {
    let sidecar = site.gate();
    let load = site.load(&[&sidecar], site.callers());
    let mut writer = site.gate();
    let (mut acknowledged, mut lost_ones) = (0, Vec::new());
    let (rounds, enough) = (rounds(3, 60), rounds(20, 100));
    for round in 0..rounds {
        let manager = site.manager(&writer);
        wait_until("the API answers", || {
            let asked = site.runtime.block_on(manager.ask(Method::GET, "?limit=1", None));
            asked.is_some_and(|(status, _)| status == 200)
        });
        let book = Arc::new(Book::default());
        let writers: Vec<_> = (0..WRITERS)
            .map(|i| (site.manager(&writer), format!("w{round}-{i}")))
            .map(|(manager, tag)| site.runtime.spawn(write(manager, tag, book.clone())))
            .collect();
        wait_until("writes are under way", || book.acknowledged.load(Ordering::Relaxed) > enough);
        // Anywhere within a write.
        std::thread::sleep(Duration::from_micros(rand::random_range(0..20_000)));
        if victims.redis {
            site.rig.server().kill();
        }
        if victims.writer {
            writer.signal(libc::SIGKILL);
        }
        book.is_over.store(true, Ordering::Relaxed);
        // At once: who waits for an answer about an interrupted write may still get it.
        if victims.redis {
            site.rig.server().restart();
        }
        for writer in writers {
            let ended =
                site.runtime.block_on(async { tokio::time::timeout(PATIENCE, writer).await });
            ended.expect("answers come, or do not").expect("no panic");
        }
        if victims.writer {
            writer = site.gate();
        }
        acknowledged += book.acknowledged.load(Ordering::Relaxed);
        lost_ones.extend(lost(&site, &book));
    }
    site.in_step(&[&sidecar, &writer]);
    let seen = load.stop();
    let how_long = format!(
        "killed {rounds} times; {acknowledged} acknowledged creates, rotations and deletes, {} lost",
        lost_ones.len()
    );
    report(scenario, &seen, &how_long);
    seen.nobody_noticed();
    assert_eq!(lost_ones, [""; 0], "{how_long}");
}

#[test]
fn a_killed_gate_on_sqlite_loses_nothing() {
    let victims = Victims { writer: true, redis: false };
    kill_and_count(Site::sqlite(), victims, "Writing gate killed, SQLite");
}

#[test]
fn a_killed_redis_loses_nothing() {
    let victims = Victims { writer: false, redis: true };
    let scenario = "Redis killed under writes, `appendfsync always`";
    kill_and_count(Site::durable_redis(), victims, scenario);
}

#[test]
fn a_killed_gate_and_its_redis_lose_nothing() {
    let victims = Victims { writer: true, redis: true };
    let scenario = "Redis and the writing gate killed at once, `appendfsync always`";
    kill_and_count(Site::durable_redis(), victims, scenario);
}
