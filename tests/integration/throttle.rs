//! How often tokens are looked at, over days of attack: the bounds that the docs state, and who is
//! never stopped.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use otpgate::clock::{Clock, ManualClock};
use otpgate::config::ThrottleConfig;
use otpgate::directory::follower::Follower;
use otpgate::directory::{Directory, Hold, TokenRules};
use otpgate::entry::{Entry, EntryId, Principal, PrincipalRef, Seed};
use otpgate::metrics::Metrics;
use otpgate::otp::{Generator, Reuse, Token, TokenParams};
use otpgate::seal::Sealer;
use otpgate::store::Store;
use otpgate::store::sqlite::Sqlite;
use otpgate::throttle::{Source, Throttle};
use otpgate::verifier::{Attempt, Basis, Denied, Entries, Refusal, Verifier};
use proptest::prelude::*;
use tokio::task::JoinSet;

use crate::harness::eventually;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Gates that share a store, in a time that stands still until it is moved.
struct World {
    clock: Arc<ManualClock>,
    store: Store,
    directory: Arc<Directory>,
    metrics: Arc<Metrics>,
    gates: Vec<Gate>,
    victim: Generator,
    _following: JoinSet<()>,
    folder: tempfile::TempDir,
}

struct Gate {
    throttle: Arc<Throttle>,
    verifier: Verifier,
}

impl World {
    /// With one entry, `victim`.
    async fn new(gates: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let backend = Sqlite::new(&folder.path().join("otpgate.db"));
        let store = Store::new(Arc::new(backend), Sealer::off());
        store.init().await.unwrap();
        let seed = Seed::random();
        let victim = Generator::new(&seed, TokenParams::default());
        let who = Principal::parse("victim", "staff").unwrap();
        let (_, version) = store.create(|id| Entry::new(id, who, seed, 0)).await.unwrap();
        let clock = Arc::new(ManualClock::at(1_700_000_000));
        let metrics = Arc::new(Metrics::new([]));
        let rules = TokenRules::default();
        // The follower looks at real times only now and then; here days pass in between.
        let (of, hold, now) = (store.clone(), Hold::default(), clock.now());
        let directory = Directory::new(of, &hold, rules, 365 * DAY, metrics.clone(), now);
        let directory = Arc::new(directory);
        let follower = Follower::new(directory.clone(), clock.clone());
        let mut following = JoinSet::new();
        following.spawn(async move { follower.run().await });
        assert!(directory.wait_for(version, Duration::from_secs(10)).await);
        let mut world = Self {
            clock,
            store,
            directory,
            metrics,
            gates: Vec::new(),
            victim,
            _following: following,
            folder,
        };
        world.gates = (0..gates).map(|_| world.gate()).collect();
        world
    }

    /// A gate that has just started.
    fn gate(&self) -> Gate {
        let config = ThrottleConfig::default();
        let now = self.clock.now();
        let (store, metrics) = (self.store.clone(), self.metrics.clone());
        let throttle = Arc::new(Throttle::new(config, Some(store.clone()), metrics.clone(), now));
        let basis = Basis::Entries(Box::new(Entries::new(self.directory.clone(), store)));
        let verifier = Verifier::new(basis, throttle.clone(), metrics);
        Gate { throttle, verifier }
    }

    async fn attempt(
        &self,
        gate: usize,
        name: &str,
        source: Source,
        token: Option<&Token>,
    ) -> Result<(), Refusal> {
        let who = PrincipalRef::parse(name, "staff").unwrap();
        let attempt = Attempt { who, token, source, request: "any", reuse: None };
        self.gates[gate].verifier.verify(attempt, self.clock.now()).await.map(drop)
    }

    /// A wrong token. Tells whether it was looked at; if not, how long to wait.
    async fn guess(&self, gate: usize, name: &str, source: Source) -> Result<(), Duration> {
        match self.attempt(gate, name, source, None).await {
            Err(Refusal::Denied(Denied::WrongToken | Denied::UnknownPrincipal)) => Ok(()),
            Err(Refusal::Throttled(throttled)) => Err(throttled.retry_after),
            other => panic!("{other:?}"),
        }
    }

    /// The victim's own call, with the right token.
    async fn call(&self, gate: usize, source: Source) -> Result<(), Refusal> {
        let token = self.victim.token_at(self.clock.now().unix);
        self.attempt(gate, "victim", source, Token::parse(&token).as_ref()).await
    }

    /// What happens behind requests' backs.
    async fn settle(&self) {
        for gate in &self.gates {
            gate.throttle.flush(self.clock.now()).await;
        }
    }
}

fn v4(i: u32) -> Source {
    Source::of(Some(IpAddr::V4(Ipv4Addr::from_bits(0xcb00_7100 + i))))
}

/// The attackers' addresses: a botnet, and one network of IPv6 with all the addresses in it.
fn attacker(i: u32) -> Source {
    let network: u128 = 0x2001_0db8_0000_0001 << 64;
    match i % 3 {
        0 => Source::of(Some(IpAddr::V6(Ipv6Addr::from_bits(network + u128::from(i))))),
        _ => v4(1000 + i),
    }
}

/// 15,000 sources guess for two days, on three gates, one of which restarts; the service calls all the
/// while. The numbers are those of `docs/operations.md`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guesses_are_bounded_and_the_service_is_never_refused() {
    let mut world = World::new(3).await;
    let service = v4(1);
    world.call(0, service).await.unwrap();
    world.settle().await;
    let step = Duration::from_secs(5);
    let steps = u32::try_from(2 * DAY.as_secs() / step.as_secs()).unwrap();
    let (mut looked_at, mut first_day, mut stopped) = (0, 0, 0);
    for i in 0..steps {
        let gate = (i % 3) as usize;
        match world.guess(gate, "victim", attacker(i)).await {
            Ok(()) => looked_at += 1,
            Err(_) => stopped += 1,
        }
        if i % 6 == 0 {
            let gate = (i / 6 % 3) as usize;
            let called = world.call(gate, service).await;
            assert!(called.is_ok(), "{called:?} at step {i}");
        }
        world.settle().await;
        if i == steps / 4 {
            world.gates[1] = world.gate();
        }
        if i == steps / 2 {
            first_day = looked_at;
        }
        world.clock.advance(step);
    }
    assert_eq!(world.metrics.throttle_unshared.get(), 0, "the store took all");
    assert!(stopped > steps / 2, "an attack that is worth the name: {stopped}");
    // One more for each gate: it learns with its own next failure what others have counted.
    assert!((400..=500 + 4).contains(&first_day), "{first_day} guesses on the first day");
    let second_day = looked_at - first_day;
    assert!((300..=400 + 4).contains(&second_day), "{second_day} guesses on the second day");
}

/// Who sits at the service's own address is held by the quota of that address, and by that of all
/// strangers once the service does not call from there any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_known_source_has_its_own_bound() {
    for (calls_on, expected) in [(true, 1350..=1450), (false, 450..=100 + 500)] {
        let world = World::new(1).await;
        let source = v4(1);
        let (mut looked_at, mut due) = (0, true);
        let step = Duration::from_secs(10);
        for i in 0..DAY.as_secs() / step.as_secs() {
            due |= calls_on && i % 180 == 0;
            // Every half an hour, as soon as it is let through.
            due = due && world.call(0, source).await.is_err();
            looked_at += u32::from(world.guess(0, "victim", source).await.is_ok());
            world.settle().await;
            world.clock.advance(step);
        }
        assert!(expected.contains(&looked_at), "{looked_at}, calls on: {calls_on}");
    }
}

/// Wrong tokens look the same for names that exist and names that do not, to the second.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_names_are_throttled_as_known_ones() {
    let (known, unknown) = (World::new(1).await, World::new(1).await);
    for i in 0..3000 {
        // Bursts from one source, then from many.
        let source = if i < 40 { attacker(1) } else { attacker(i / 7) };
        let answers =
            (known.guess(0, "victim", source).await, unknown.guess(0, "nobody", source).await);
        assert_eq!(answers.0, answers.1, "attempt {i}");
        for world in [&known, &unknown] {
            world.settle().await;
            world.clock.advance(Duration::from_millis(u64::from(i * 37 % 2500)));
        }
    }
}

/// One source cannot try many names: nor is it shut out of the one that it proves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_tries_many_names_is_stopped() {
    let world = World::new(1).await;
    let source = v4(7);
    world.call(0, source).await.unwrap();
    let mut looked_at = 0;
    for i in 0..10_000 {
        looked_at += i32::from(world.guess(0, &format!("n{i}"), source).await.is_ok());
    }
    assert_eq!(looked_at, 50);
    world.call(0, source).await.unwrap();
    assert!(world.guess(0, "victim", v4(8)).await.is_ok(), "others are not concerned");
}

/// Who repeats a used token has not proved himself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_used_token_makes_nobody_known() {
    let world = World::new(1).await;
    let token = Token::parse(&world.victim.token_at(world.clock.now().unix));
    let once = async |source, request| {
        let who = PrincipalRef::parse("victim", "staff").unwrap();
        let reuse = Some(Reuse::ONCE);
        let attempt = Attempt { who, token: token.as_ref(), source, request, reuse };
        world.gates[0].verifier.verify(attempt, world.clock.now()).await.map(drop)
    };
    once(v4(1), "first").await.unwrap();
    assert_eq!(once(v4(2), "second").await, Err(Refusal::Denied(Denied::Reused)));
    world.settle().await;
    for i in 0..100 {
        world.guess(0, "victim", v4(1000 + i)).await.unwrap();
    }
    world.call(0, v4(1)).await.unwrap();
    assert!(matches!(world.call(0, v4(2)).await, Err(Refusal::Throttled(_))));
}

/// A service that does not say for whom it asks has many clients.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_may_ask_about_many_names() {
    let world = World::new(1).await;
    for i in 0..500 {
        world.guess(0, &format!("n{i}"), Source::Service(EntryId(7))).await.unwrap();
    }
    let client = Source::told_by(EntryId(7), Ipv4Addr::LOCALHOST.into());
    for i in 0..50 {
        world.guess(0, &format!("n{i}"), client).await.unwrap();
    }
    world.guess(0, "n50", client).await.unwrap_err();
}

/// To the second, for entries that end and for seeds that are rotated out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_ends_ends_on_time() {
    let world = World::new(1).await;
    let (end, seeds) = (world.clock.now().unix + 20, [Seed::random(), Seed::random()]);
    let make = |name: &str| {
        let who = Principal::parse(name, "staff").unwrap();
        let [seed, old] = seeds.clone();
        move |id| {
            let entry = Entry::new(id, who, old, 0);
            match entry.principal.name.as_str() {
                "expiring" => Entry { expires_at: Some(end), seed, ..entry },
                _ => entry.rotate(seed, end, None, 0).unwrap(),
            }
        }
    };
    world.store.create(make("expiring")).await.unwrap();
    let (_, version) = world.store.create(make("rotated")).await.unwrap();
    assert!(world.directory.wait_for(version, Duration::from_secs(10)).await);
    let call = async |name, seed: &Seed| {
        let token = Generator::new(seed, TokenParams::default()).token_at(world.clock.now().unix);
        world.attempt(0, name, v4(1), Token::parse(&token).as_ref()).await
    };
    world.clock.advance(Duration::from_secs(19));
    for (name, seed) in [("expiring", &seeds[0]), ("rotated", &seeds[0]), ("rotated", &seeds[1])] {
        call(name, seed).await.unwrap();
    }
    world.clock.advance(Duration::from_secs(1));
    assert_eq!(call("expiring", &seeds[0]).await, Err(Refusal::Denied(Denied::Expired)));
    assert_eq!(call("rotated", &seeds[1]).await, Err(Refusal::Denied(Denied::WrongToken)));
    call("rotated", &seeds[0]).await.unwrap();
}

/// What one gate has counted holds on another that has just started.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_outlive_a_gate() {
    let mut world = World::new(1).await;
    for _ in 0..10 {
        world.guess(0, "victim", v4(1)).await.unwrap();
    }
    world.settle().await;
    world.gates[0] = world.gate();
    world.guess(0, "victim", v4(1)).await.unwrap();
    world.settle().await;
    let wait = world.guess(0, "victim", v4(1)).await.unwrap_err();
    assert!((119..=121).contains(&wait.as_secs()), "{wait:?}");
}

/// Who stops a gate waits for what it is telling the store already.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_flush_waits_for_the_one_before() {
    let world = World::new(1).await;
    world.guess(0, "victim", v4(1)).await.unwrap();
    world.settle().await;
    world.guess(0, "victim", v4(1)).await.unwrap();
    let ledger = rusqlite::Connection::open(world.folder.path().join("otpgate.db.ledger")).unwrap();
    ledger.execute_batch("BEGIN EXCLUSIVE").unwrap();
    let (throttle, now) = (&world.gates[0].throttle, world.clock.now());
    let [mut first, mut last] = [0, 1].map(|_| Box::pin(throttle.flush(now)));
    assert!(first.as_mut().now_or_never().is_none(), "it waits for the store");
    assert!(last.as_mut().now_or_never().is_none(), "it waits for the first one");
    ledger.execute_batch("ROLLBACK").unwrap();
    tokio::join!(first, last);
    assert_eq!(world.metrics.throttle_unshared.get(), 0, "the store took it");
}

/// Everybody waits at most as long as was said, and is then looked at.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_said_about_waiting_is_true() {
    let world = World::new(1).await;
    for round in 0..50 {
        if let Err(wait) = world.guess(0, "victim", v4(round % 3)).await {
            world.clock.advance(wait - Duration::from_millis(1).min(wait));
            assert!(world.guess(0, "victim", v4(round % 3)).await.is_err(), "round {round}");
            world.clock.advance(Duration::from_millis(2));
            world.guess(0, "victim", v4(round % 3)).await.unwrap();
        }
        world.settle().await;
    }
}

/// However many attempts come at once, they are held as if they came one after the other; only those
/// that other threads look at in the same instant come on top.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn attempts_at_the_same_time_are_counted() {
    let world = Arc::new(World::new(1).await);
    let mut guesses = JoinSet::new();
    for _ in 0..400 {
        let world = world.clone();
        guesses.spawn(async move { world.guess(0, "victim", v4(1)).await.is_ok() });
    }
    let looked_at = guesses.join_all().await.into_iter().filter(|ok| *ok).count();
    assert!((10..=10 + 3).contains(&looked_at), "{looked_at}");
}

/// On a gate that has just started, while strangers have closed the name.
async fn restarted_under_attack(service: Source) -> World {
    let mut world = World::new(1).await;
    world.call(0, service).await.unwrap();
    for i in 0..100 {
        world.guess(0, "victim", v4(1000 + i)).await.unwrap();
    }
    world.settle().await;
    world.gates[0] = world.gate();
    world.guess(0, "victim", v4(2000)).await.unwrap();
    world.settle().await;
    assert!(world.guess(0, "victim", v4(2001)).await.is_err(), "the store remembers the attack");
    world
}

/// All calls of a known source pass, also those that come while the store is asked about it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_at_the_same_time_wait_for_the_store() {
    let world = restarted_under_attack(v4(1)).await;
    let calls = (0..200).map(|_| world.call(0, v4(1)));
    for called in futures_util::future::join_all(calls).await {
        called.unwrap();
    }
}

/// The other side of it: waiting for the store is no way past the quota.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guesses_that_waited_for_the_store_are_counted() {
    let world = restarted_under_attack(v4(1)).await;
    let guesses = (0..200).map(|_| world.guess(0, "victim", v4(1)));
    let guesses = futures_util::future::join_all(guesses).await;
    assert_eq!(guesses.into_iter().filter(Result::is_ok).count(), 10);
}

/// A store that does not answer says nothing about who is known.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_comes_back_is_asked_again() {
    let world = restarted_under_attack(v4(1)).await;
    let file = world.folder.path().join("otpgate.db");
    let away = world.folder.path().join("away.db");
    std::fs::rename(&file, &away).unwrap();
    assert!(matches!(world.call(0, v4(1)).await, Err(Refusal::Throttled(_))));
    std::fs::rename(&away, &file).unwrap();
    // No time passes for the gate.
    eventually("it is known again", || async { world.call(0, v4(1)).await.ok() }).await;
}

/// Who guesses on many gates in the same instant is ahead of the count once, not at every burst.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bursts_on_many_gates_are_made_up_for() {
    const GATES: u32 = 5;
    const DAYS: u32 = 6;
    let world = World::new(GATES as usize).await;
    let mut looked_at = 0;
    for burst in 0..DAYS * 24 / 6 {
        for i in 0..150 * GATES {
            let source = v4(1000 * (burst + 1) + i);
            let guess = world.guess((i % GATES) as usize, "victim", source).await;
            looked_at += u32::from(guess.is_ok());
        }
        world.settle().await;
        world.clock.advance(DAY / 4);
    }
    assert!(looked_at >= 100 * GATES, "{looked_at}");
    assert!(looked_at <= 100 * GATES + 400 * DAYS, "{looked_at} guesses");
}

/// Who has got hold of one token can make sources known with it, but not as many as he has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stolen_token_opens_no_endless_guessing() {
    let world = World::new(1).await;
    for i in 0..1000 {
        world.call(0, v4(i)).await.unwrap();
    }
    world.settle().await;
    let mut looked_at = 0;
    for _ in 0..2 * 24 * 6 {
        for i in (0..1000).step_by(4) {
            while world.guess(0, "victim", v4(i)).await.is_ok() {
                looked_at += 1;
            }
        }
        world.settle().await;
        world.clock.advance(Duration::from_secs(600));
    }
    // 100 sources fail 100 times, and all together as strangers do.
    let most = 100 * (100 + 2 * 100 / 30) + 100 + 2 * 400;
    assert!(looked_at <= most, "{looked_at} guesses, {most} are possible");
    // They are strangers by then, and known again once they prove themselves.
    let attack = async || {
        for i in 0..600 {
            let _ = world.guess(0, "victim", v4(10_000 + i)).await;
        }
    };
    attack().await;
    world.call(0, v4(0)).await.unwrap_err();
    world.clock.advance(DAY);
    world.call(0, v4(0)).await.unwrap();
    attack().await;
    world.call(0, v4(0)).await.unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever the order and pace of attempts from any sources, no bucket lets more through than
    /// its quota.
    #[test]
    fn no_pattern_of_attempts_beats_the_quotas(
        attempts in proptest::collection::vec((0_u32..6, 0_u32..3, 0_u64..400), 1..400),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1)
            .enable_all().build().unwrap();
        runtime.block_on(async {
            let world = World::new(1).await;
            let start = world.clock.now().unix;
            let mut pairs: HashMap<(u32, u32), u64> = HashMap::new();
            let mut names: HashMap<u32, u64> = HashMap::new();
            for (source, name, pause) in attempts {
                let text = if name == 0 { "victim".to_owned() } else { format!("n{name}") };
                if world.guess(0, &text, v4(source)).await.is_ok() {
                    *pairs.entry((source, name)).or_default() += 1;
                    *names.entry(name).or_default() += 1;
                }
                world.settle().await;
                world.clock.advance(Duration::from_secs(pause));
                let passed = world.clock.now().unix - start;
                assert!(pairs.values().all(|count| *count <= 10 + passed / 60));
                assert!(names.values().all(|count| *count <= 100 + passed / 216));
            }
        });
    }
}
