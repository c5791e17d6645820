//! Failovers by a real Sentinel that lose something.

use otpgate::entry::Seed;
use otpgate::store::Store;

use super::load::Kind;
use super::relay::Relay;
use super::site::{MAX_STALE, Site};
use super::{BACK, is_long, now, report, slack, summary};
use crate::redis_server::{Options, RedisServer, wait_until};
use crate::store_rig::Rig;

/// Another user than the gates': taking its rights away cuts servers off from each other.
const PEER: &str = "peer";

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
    let user = ["ACL", "SETUSER", PEER, "on", ">peer", "~*", "&*", "+@all"];
    server.run::<()>(&user);
    server
}

fn start() -> (RedisServer, Trio) {
    let (primary, replica) = (start_server(), start_server());
    replica.run::<()>(&["REPLICAOF", "127.0.0.1", &primary.port.to_string()]);
    wait_until("the replica is in sync", || {
        replica.run::<String>(&["INFO", "replication"]).contains("link_status:up")
    });
    let config = format!(
        "sentinel monitor main 127.0.0.1 {} 1\nsentinel down-after-milliseconds main 500\n\
         sentinel failover-timeout main 1000\n\
         sentinel failover-timeout main 1000\nsentinel auth-user main {PEER}\nsentinel auth-pass main {PEER}\n",
        primary.port
    );
    let sentinel = RedisServer::start(Options { sentinel: Some(config), ..Options::default() });
    wait_until("the Sentinel knows the replica", || {
        sentinel.run::<Vec<redis::Value>>(&["SENTINEL", "REPLICAS", "main"]).len() == 1
    });
    let first = primary.port;
    (primary, Trio { replica, sentinel, first })
}

impl Trio {
    fn url(&self, sentinel: u16) -> String {
        format!("redis-sentinel://127.0.0.1:{sentinel}/main")
    }

    fn has_moved(&self) -> bool {
        let (_, port): (String, u16) =
            self.sentinel.run(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main"]);
        port != self.first
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
    let (primary, trio) = start();
    let url = trio.url(trio.sentinel.port);
    let mut site = Site::on(|| async { Rig::on_server(primary, &url) });
    let gate = site.gate();
    let callers = site.callers();
    wait_until("the replica has all", || {
        let offset = |server: &RedisServer, name: &str| {
            let info: String = server.run(&["INFO", "replication"]);
            info.lines().find_map(|line| line.strip_prefix(name).map(str::to_owned))
        };
        let sent = offset(site.redis_server(), "master_repl_offset:");
        sent.is_some() && sent == offset(&trio.replica, "slave_repl_offset:")
    });
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
        wait_until("it has become a replica", || {
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
    let (primary, trio) = start();
    let relay = Relay::to(trio.sentinel.port);
    let url = trio.url(trio.sentinel.port);
    let site = Site::on(|| async { Rig::on_server(primary, &url) });
    // This one reaches the Sentinel through the relay, the old primary always.
    let gate = site.gate_at(&trio.url(relay.port), MAX_STALE);
    let doomed = site.caller(Kind::Revoked, "doomed");
    let load = site.load(&[&gate], [site.callers(), vec![doomed.clone()]].concat());
    load.each_gate_answers(200, now());

    relay.silence();
    // The old primary is away for Sentinel and replica: their user may not do anything any more, nor may
    // anybody else what they do.
    site.rig.run::<()>(&["ACL", "SETUSER", PEER, "off"]);
    let theirs = ["-ping", "-info", "-multi", "-replicaof", "-slaveof", "-config", "-publish"];
    site.rig.run::<()>(&[["ACL", "SETUSER", "default"].as_slice(), &theirs].concat());
    site.rig.run::<i64>(&["CLIENT", "KILL", "USER", PEER]);
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
    report("Old primary isolated together with a gate", &seen, &how_long);
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
