//! Failovers by a real Sentinel that lose something.

use otpgate::entry::Seed;
use otpgate::store::Store;

use super::load::Kind;
use super::relay::Relay;
use super::site::{MAX_STALE, Site};
use super::{BACK, is_long, now, report, slack, summary};
use crate::redis_server::{LIMIT, Options, RedisServer, wait_until, wait_within};
use crate::store_rig::Rig;

/// Another user than the gates': taking its rights away cuts servers off from each other.
const PEER: &str = "peer";

/// The user of a Sentinel that stays with an old primary.
const LONE: &str = "lone";
/// What Sentinels and replicas do: without its rights, users of theirs that are off cannot go on as the
/// default one.
const THEIRS: [&str; 8] =
    ["-ping", "-info", "-multi", "-replicaof", "-slaveof", "-config", "-publish", "-subscribe"];

/// Milliseconds without an answer after which a server counts as down.
const DOWN_AFTER: u32 = 500;

/// A primary, which belongs to a site, its replica and a Sentinel.
struct Trio {
    replica: RedisServer,
    sentinel: RedisServer,
    first: u16,
}

fn start_server() -> RedisServer {
    let args = ["--masteruser", PEER, "--masterauth", PEER];
    let args = args.map(str::to_owned).to_vec();
    let server = RedisServer::start(Options { aof: true, args, ..Options::default() });
    for user in [PEER, LONE] {
        let password = format!(">{user}");
        server.run::<()>(&["ACL", "SETUSER", user, "on", &password, "~*", "&*", "+@all"]);
    }
    server
}

/// Takes a server away from Sentinels and replicas that are `user` there.
fn cut_off(server: &RedisServer, user: &str) {
    server.run::<()>(&["ACL", "SETUSER", user, "off"]);
    server.run::<()>(&[["ACL", "SETUSER", "default"].as_slice(), &THEIRS].concat());
    server.run::<i64>(&["CLIENT", "KILL", "USER", user]);
}

fn start_pair() -> (RedisServer, RedisServer) {
    let (primary, replica) = (start_server(), start_server());
    replica.run::<()>(&["REPLICAOF", "127.0.0.1", &primary.port.to_string()]);
    wait_until("the replica is in sync", || {
        replica.run::<String>(&["INFO", "replication"]).contains("link_status:up")
    });
    (primary, replica)
}

/// A Sentinel that is `user` on the servers, and agrees with `quorum` that a primary is gone.
fn start_sentinel(
    primary: &RedisServer,
    user: &str,
    quorum: usize,
    down_after: u32,
) -> RedisServer {
    let config = format!(
        "sentinel monitor main 127.0.0.1 {} {quorum}\n\
         sentinel down-after-milliseconds main {down_after}\n\
         sentinel failover-timeout main 1000\nsentinel auth-user main {user}\n\
         sentinel auth-pass main {user}\n",
        primary.port
    );
    let sentinel = RedisServer::start(Options { sentinel: Some(config), ..Options::default() });
    wait_until("the Sentinel knows the replica", || {
        sentinel.run::<Vec<redis::Value>>(&["SENTINEL", "REPLICAS", "main"]).len() == 1
    });
    sentinel
}

/// The port of the primary that a Sentinel names.
fn named_by(sentinel: &RedisServer) -> u16 {
    let command = ["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main"];
    sentinel.run::<(String, u16)>(&command).1
}

fn start(down_after: u32) -> (RedisServer, Trio) {
    let (primary, replica) = start_pair();
    let sentinel = start_sentinel(&primary, PEER, 1, down_after);
    let first = primary.port;
    (primary, Trio { replica, sentinel, first })
}

impl Trio {
    fn url(&self, sentinel: u16) -> String {
        format!("redis-sentinel://127.0.0.1:{sentinel}/main")
    }

    fn has_moved(&self) -> bool {
        named_by(&self.sentinel) != self.first
    }
}

/// The store of a site as one of its servers has it.
fn store_on(site: &Site, server: &RedisServer) -> Store {
    let url = otpgate::store::url::StoreUrl::parse(&server.url()).expect("a URL");
    let config = otpgate::config::StoreConfig { url, ..site.rig.config.clone() };
    Store::open(&config).expect("good settings")
}

#[test]
fn a_failover_that_loses_the_tail() {
    // Where the old primary comes back, a busy machine must not make Sentinel fail over to it.
    let (primary, trio) = start(if is_long() { 3_000 } else { DOWN_AFTER });
    let url = trio.url(trio.sentinel.port);
    let mut site = Site::on(|| async { Rig::on_server(primary, &url) });
    let gate = site.gate();
    let callers = site.callers();
    site.redis_server().wait_for(&trio.replica);
    // Stopped, it does not take what comes; nothing waits for it in a connection.
    trio.replica.signal(libc::SIGSTOP);
    site.rig.run::<i64>(&["CLIENT", "KILL", "TYPE", "replica"]);
    let lost = site.caller(Kind::Revoked, "lost");
    let load = site.load(&[&gate], [callers, vec![lost.clone()]].concat());
    load.each_gate_answers(200, now());
    site.rig.server().kill();
    let killed = now();
    trio.replica.signal(libc::SIGCONT);
    wait_until("there is a new primary", || trio.has_moved());
    let promoted = now();
    lost.must_be_refused(promoted, BACK + slack());
    load.each_gate_refuses(&lost);
    let refused = now();
    site.in_step(&[&gate]);
    assert_eq!(site.full_loads(&gate), 2.0);

    // The old primary comes back with what was lost, and says that it is a primary until it is told:
    // Sentinel waits for ten seconds.
    if is_long() {
        site.rig.server().restart();
        site.rig.run::<()>(&["ACL", "SETUSER", PEER, "on", ">peer", "~*", "&*", "+@all"]);
        // It counts these from when it heard of the server, and asks for news every ten seconds.
        wait_within(3 * LIMIT, "it has become a replica", || {
            site.rig.run::<String>(&["INFO", "replication"]).contains("role:slave")
        });
    }
    site.create("after", "shop", Seed::random());
    site.in_step(&[&gate]);
    let seen = load.stop();
    let how_long = format!(
        "{}; failover in {} ms, the lost entry refused {} ms later",
        seen.noticed(),
        (promoted - killed).as_millis(),
        (refused - promoted).as_millis()
    );
    report("Sentinel failover that loses acknowledged writes", &seen, &how_long);
    seen.nobody_noticed();
}

#[test]
fn an_old_primary_isolated_together_with_a_gate() {
    isolate("Old primary isolated together with a gate", |relay, _| relay.silence());
}

/// Nothing hangs here: the gate has all the time to follow its old primary.
#[test]
fn an_old_primary_followed_by_a_gate_that_sentinels_refuse() {
    isolate("Old primary reached by a gate, Sentinel refusing connections", |relay, trio| {
        relay.refuse();
        trio.sentinel.run::<i64>(&["CLIENT", "KILL", "TYPE", "normal"]);
    });
}

fn isolate(scenario: &str, hide: impl FnOnce(&Relay, &Trio)) {
    let (primary, trio) = start(DOWN_AFTER);
    let relay = Relay::to(trio.sentinel.port);
    let url = trio.url(trio.sentinel.port);
    let site = Site::on(|| async { Rig::on_server(primary, &url) });
    // This one reaches the Sentinel through the relay, the old primary always.
    let gate = site.gate_at(&trio.url(relay.port), MAX_STALE);
    let doomed = site.caller(Kind::Revoked, "doomed");
    let load = site.load(&[&gate], [site.callers(), vec![doomed.clone()]].concat());
    load.each_gate_answers(200, now());
    site.redis_server().wait_for(&trio.replica);

    hide(&relay, &trio);
    // The old primary is away for Sentinel and replica: their user may not do anything any more, nor may
    // anybody else what they do.
    cut_off(site.redis_server(), PEER);
    wait_until("there is a new primary", || trio.has_moved());
    let new = store_on(&site, &trio.replica);
    let stored = wait_for_entry(&site, &new, &doomed.principal);
    site.runtime.block_on(new.delete(&stored)).expect("the new primary takes it");
    let acknowledged = now();
    doomed.must_be_refused(acknowledged, MAX_STALE + slack());
    load.each_gate_answers(503, acknowledged);
    let closed = now();

    relay.open();
    let opened = now();
    let back = load.each_gate_answers(200, opened);
    load.each_gate_refuses(&doomed);
    let seen = load.stop();
    let how_long = format!(
        "closed {} ms after the delete on the new primary; back: {}",
        (closed - acknowledged).as_millis(),
        summary(&back)
    );
    report(scenario, &seen, &how_long);
}

/// The Sentinel answers, and so does the primary that it names, but there is another one.
#[test]
#[ignore = "takes longer: make chaos"]
fn an_old_primary_isolated_together_with_a_gate_and_one_of_three_sentinels() {
    let (primary, replica) = start_pair();
    let first = primary.port;
    let sentinels = [LONE, PEER, PEER].map(|user| start_sentinel(&primary, user, 2, DOWN_AFTER));
    for sentinel in &sentinels {
        wait_until("Sentinels know each other", || {
            sentinel.run::<Vec<redis::Value>>(&["SENTINEL", "SENTINELS", "main"]).len() == 2
        });
    }
    let [lone, others @ ..] = &sentinels;
    let relays = [0, 1].map(|number| Relay::to(others[number].port));
    let nodes = [lone.port, relays[0].port, relays[1].port].map(|port| format!("127.0.0.1:{port}"));
    let url = format!("redis-sentinel://{}/main", nodes.join(","));
    let site = Site::on(|| async { Rig::on_server(primary, &url) });
    let gate = site.gate_at(&url, MAX_STALE);
    let doomed = site.caller(Kind::Revoked, "doomed");
    let load = site.load(&[&gate], [site.callers(), vec![doomed.clone()]].concat());
    load.each_gate_answers(200, now());
    site.redis_server().wait_for(&replica);

    // On one side the gate, the old primary and a Sentinel, on the other all else.
    relays.iter().for_each(Relay::silence);
    let cut = now();
    lone.run::<()>(&["ACL", "SETUSER", "default", "-publish"]);
    cut_off(&replica, LONE);
    cut_off(site.redis_server(), PEER);
    wait_until("there is a new primary", || {
        others.iter().all(|sentinel| named_by(sentinel) == replica.port)
    });
    let new = store_on(&site, &replica);
    let stored = wait_for_entry(&site, &new, &doomed.principal);
    site.runtime.block_on(new.delete(&stored)).expect("the new primary takes it");
    let acknowledged = now();
    doomed.must_be_refused(acknowledged, MAX_STALE + slack());
    load.each_gate_answers(503, acknowledged);
    let closed = now();
    assert_eq!(named_by(lone), first, "it has heard of nothing");

    let opened = now();
    relays.iter().for_each(Relay::open);
    let back = load.each_gate_answers(200, opened);
    load.each_gate_refuses(&doomed);
    let seen = load.stop();
    let how_long = format!(
        "closed {} ms after the cut, the delete on the new primary was {} ms after it; back: {}",
        (closed - cut).as_millis(),
        (acknowledged - cut).as_millis(),
        summary(&back)
    );
    report(
        "Old primary isolated together with a gate and one of three Sentinels",
        &seen,
        &how_long,
    );
}

/// What a server holds of an entry, once it is the primary.
fn wait_for_entry(
    site: &Site,
    store: &Store,
    who: &otpgate::entry::Principal,
) -> otpgate::store::Stored {
    site.runtime.block_on(crate::harness::eventually("the new primary answers", || async {
        store.get(who.into()).await.ok().flatten()
    }))
}
