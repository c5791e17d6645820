//! Sentinel and Cluster: primaries that die and come back, slots that move.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use otpgate::clock::{Clock as _, SystemClock};
use otpgate::config::{RedisConfig, RedisWrites, TlsFiles};
use otpgate::entry::Entry;
use otpgate::secret::Secret;
use otpgate::store::url::{Login, StoreUrl};
use otpgate::store::{Store, StoreError};
use tokio::task::{JoinHandle, block_in_place};

use crate::directory_follow::Gate;
use crate::harness::eventually;
use crate::redis_server::{
    Options, RedisCluster, RedisServer, free_port, make_certificates, wait_until,
};
use crate::store_redis::{now, spending};
use crate::store_rig::{Follow, Place, Rig, create, opened, stored};

/// Commits that are on a replica when they are acknowledged.
fn replicated() -> RedisConfig {
    RedisConfig { wait_replicas: 1, ..RedisConfig::default() }
}

/// Creates entries until one is not acknowledged.
fn until_refused(store: Store) -> JoinHandle<Vec<Entry>> {
    tokio::spawn(async move {
        let mut acknowledged = Vec::new();
        while let Ok(made) = create(&store, &format!("n{}", acknowledged.len()), "r").await {
            acknowledged.push(made);
        }
        acknowledged
    })
}

/// That the gates hold what was acknowledged, and go on.
async fn go_on(gates: &[Gate], store: &Store, acknowledged: &[Entry], name: &str) {
    let made = eventually("writes go on", || async { create(store, name, "r").await.ok() }).await;
    for gate in gates {
        gate.until("the new write is in force", |gate| gate.shows(&made)).await;
        assert!(acknowledged.iter().all(|entry| gate.shows(entry)), "nothing is lost");
    }
    let listed = store.list(None, usize::MAX).await.unwrap();
    let there: BTreeSet<_> = listed.iter().map(|stored| stored.id).collect();
    assert!(acknowledged.iter().all(|entry| there.contains(&entry.id)), "nothing is lost");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_with_passwords_and_tls_lead_through_a_failover() {
    let certificates = tempfile::tempdir().unwrap();
    make_certificates(certificates.path());
    let tls = Some(certificates.path().to_owned());
    let start = |args: &[&str]| {
        let args = [&["--tls-replication", "yes", "--masterauth", "s3rver"], args].concat();
        RedisServer::start(Options {
            aof: true,
            password: Some("s3rver".into()),
            tls: tls.clone(),
            args: args.into_iter().map(str::to_owned).collect(),
            ..Options::default()
        })
    };
    let primary = block_in_place(|| start(&[]));
    let first = primary.port;
    let replica = block_in_place(|| start(&["--replicaof", "127.0.0.1", &first.to_string()]));
    let in_sync = || primary.run::<String>(&["INFO", "replication"]).contains("state=online");
    block_in_place(|| wait_until("the replica is in sync", in_sync));
    let config = format!(
        "sentinel monitor main 127.0.0.1 {first} 1\nsentinel auth-pass main s3rver\n\
         sentinel down-after-milliseconds main 2000\nsentinel failover-timeout main 3000\n\
         tls-replication yes\nuser asker on >s3ntinel +@all\n"
    );
    let sentinel = block_in_place(|| {
        RedisServer::start(Options {
            sentinel: Some(config),
            password: Some("adm1n".into()),
            tls: tls.clone(),
            ..Options::default()
        })
    });
    let knows_replica =
        || sentinel.run::<Vec<redis::Value>>(&["SENTINEL", "REPLICAS", "main"]).len() == 1;
    block_in_place(|| wait_until("the Sentinel knows the replica", knows_replica));

    let nodes = format!("127.0.0.1:{},127.0.0.1:{}", free_port(), sentinel.port);
    let mut rig = Rig::on_server(primary, &format!("rediss-sentinel://:s3rver@{nodes}/main"));
    rig.config.ca_file = Some(certificates.path().join("ca.pem"));
    let file = |name| certificates.path().join(name);
    rig.config.client_tls =
        Some(TlsFiles { cert_file: file("client.pem"), key_file: file("client.key") });
    // Without its own password, the Sentinel refuses, and is not shown anything but the servers'.
    let error = rig.store().init().await.unwrap_err();
    assert!(matches!(&error, StoreError::Denied(why) if why.contains("Sentinel")), "{error}");
    let StoreUrl::Redis(url) = &mut rig.config.url else { panic!("not Redis") };
    let password = Some(Secret::new("s3ntinel".to_owned()));
    url.sentinel = Login { username: Some("asker".into()), password };

    let store = rig.ready().await;
    let gone = create(&store, "gone", "r").await.unwrap();
    let gates = [Gate::start(rig.store()), Gate::start(rig.store())];
    for gate in &gates {
        gate.until("the store is loaded", |gate| gate.shows(&gone)).await;
    }
    let writer = until_refused(rig.written_by(replicated()));
    gates[0].until("writes are under way", |gate| gate.directory.len() > 20).await;
    rig.server().kill();
    let acknowledged = writer.await.unwrap();
    go_on(&gates, &store, &acknowledged, "after").await;
    let old = store.get((&gone.principal).into()).await.unwrap().unwrap();
    store.delete(&old).await.unwrap();
    for gate in &gates {
        gate.until("the entry is revoked", |gate| gate.knows_none(&gone.principal)).await;
    }

    // The old primary comes back with the revoked entry, and for a while thinks that it is the primary.
    block_in_place(|| rig.server().restart());
    assert_eq!(rig.run::<u64>(&["EXISTS", &rig.entry_key(&gone.principal)]), 1);
    let thinks_so = || rig.run::<String>(&["INFO", "replication"]).contains("role:master");
    let (fresh, mut looks) = (rig.store(), 0);
    while looks < 50 && thinks_so() {
        looks += 1;
        for gate in &gates {
            assert!(gate.knows_none(&gone.principal), "a revoked entry is back");
        }
        for store in [&store, &fresh, &rig.store()] {
            assert_eq!(store.get((&gone.principal).into()).await, Ok(None));
        }
    }
    assert!(looks > 0, "it was told before anybody looked");
    go_on(&gates, &store, &acknowledged, "at last").await;
    assert_eq!(replica.run::<u64>(&["EXISTS", &rig.key("e:r/at%20last")]), 1);
}

/// Moves the slot of a rig in a cluster by hand, in steps.
struct Move<'a> {
    rig: &'a Rig,
    source: &'a RedisServer,
    target: &'a RedisServer,
    slot: String,
}

impl<'a> Move<'a> {
    fn begin(rig: &'a Rig, cluster: &'a RedisCluster) -> Self {
        let source = cluster.owner(&rig.key("meta"));
        let target = cluster.nodes.iter().find(|node| node.port != source.port).unwrap();
        let slot: u64 = source.run(&["CLUSTER", "KEYSLOT", &rig.key("meta")]);
        let this = Self { rig, source, target, slot: slot.to_string() };
        this.set(target, &["IMPORTING", &Self::id(source)]);
        this.set(source, &["MIGRATING", &Self::id(target)]);
        this
    }

    fn id(node: &RedisServer) -> String {
        node.run(&["CLUSTER", "MYID"])
    }

    fn set(&self, node: &RedisServer, words: &[&str]) {
        node.run::<()>(&[&["CLUSTER", "SETSLOT", &self.slot], words].concat());
    }

    fn carry(&self, keys: &[String]) {
        let port = self.target.port.to_string();
        let mut words = vec!["MIGRATE", "127.0.0.1", &port, "", "0", "5000", "KEYS"];
        words.extend(keys.iter().map(String::as_str));
        self.source.run::<String>(&words);
    }

    fn left(&self) -> Vec<String> {
        self.source.run(&["CLUSTER", "GETKEYSINSLOT", &self.slot, "100000"])
    }

    fn end(self, cluster: &RedisCluster) {
        loop {
            let left = self.left();
            if left.is_empty() {
                break;
            }
            self.carry(&left);
        }
        for node in std::iter::once(self.target).chain(&cluster.nodes) {
            self.set(node, &["NODE", &Self::id(self.target)]);
        }
        assert_eq!(self.target.run::<u64>(&["EXISTS", &self.rig.key("meta")]), 1);
    }
}

/// Right answers or none, while keys are on both nodes.
async fn nothing_is_wrong(rig: &Rig, made: &[Entry], gate: &Gate, stage: &str) {
    let look = async |writes| {
        let store = rig.written_by(RedisConfig { writes, ..RedisConfig::default() });
        let (first, use_) = (&made[0], spending("other"));
        let (listed, one, numbered, spent) = tokio::join!(
            store.list(None, usize::MAX),
            store.get((&first.principal).into()),
            store.get_by_id(first.id),
            store.spend(&use_, now()),
        );
        if let Ok(listed) = listed {
            let right = listed.iter().filter(|stored| stored.entry.is_ok()).count();
            assert!(right == listed.len() && right >= made.len(), "{stage} {writes:?}");
        }
        for found in [one, numbered].into_iter().flatten() {
            assert_eq!(found.as_ref().map(opened), Some(first), "{stage} {writes:?}");
        }
        assert_ne!(spent, Ok(true), "{stage} {writes:?}: the token was used before");
        assert!(made.iter().all(|entry| gate.shows(entry)), "{stage}");
    };
    tokio::join!(look(RedisWrites::Scripts), look(RedisWrites::Transactions));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_moves_while_writes_come() {
    let rig = Rig::cluster().await;
    let Place::Cluster(cluster) = &rig.place else { panic!("not a cluster") };
    let store = rig.ready().await;
    let mut made = Vec::new();
    for i in 0..60 {
        made.push(create(&store, &format!("m{i}"), "r").await.unwrap());
    }
    assert_eq!(store.spend(&spending("first"), now()).await, Ok(true));
    let gate = Gate::start(rig.store());
    gate.until("the store is loaded", |gate| gate.directory.len() == made.len()).await;
    let (mut follow, _) = Follow::start(&rig.store()).await;
    let start = follow.position.version.0;
    let is_over = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = [RedisWrites::Scripts, RedisWrites::Transactions]
        .into_iter()
        .map(|writes| {
            let store = rig.written_by(RedisConfig { writes, ..RedisConfig::default() });
            let is_over = is_over.clone();
            tokio::spawn(async move {
                let mut acknowledged = Vec::new();
                for i in 0.. {
                    match create(&store, &format!("{writes:?}{i}"), "r").await {
                        Ok(made) => acknowledged.push(made),
                        Err(StoreError::Unreachable(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                    if is_over.load(Ordering::Relaxed) {
                        return acknowledged;
                    }
                }
                unreachable!()
            })
        })
        .collect();

    gate.until("writes are under way", |gate| gate.directory.len() > made.len() + 10).await;
    let moving = block_in_place(|| Move::begin(&rig, cluster));
    nothing_is_wrong(&rig, &made, &gate, "nothing has moved yet").await;
    let half: Vec<_> =
        made.iter().step_by(2).map(|entry| rig.entry_key(&entry.principal)).collect();
    block_in_place(|| moving.carry(&half));
    nothing_is_wrong(&rig, &made, &gate, "entries have moved").await;
    block_in_place(|| moving.carry(&[rig.key("log"), rig.key("meta")]));
    nothing_is_wrong(&rig, &made, &gate, "log and meta have moved").await;
    let polled = SystemClock.now().monotonic;
    block_in_place(|| moving.end(cluster));
    // A follower that asks the old owner is told, in bounded time.
    while follow.feed.poll(&follow.position).await.is_ok() {
        assert!(polled.elapsed() < Duration::from_secs(5));
    }
    let count = gate.directory.len();
    gate.until("writes go on", |gate| gate.directory.len() > count + 10).await;
    is_over.store(true, Ordering::Relaxed);
    let mut commits = 0;
    for writer in writers {
        let acknowledged = writer.await.unwrap();
        commits += acknowledged.len() as u64;
        for entry in &acknowledged {
            gate.until("what was acknowledged is in force", |gate| gate.shows(entry)).await;
        }
        made.extend(acknowledged);
    }
    let listed = rig.store().list(None, usize::MAX).await.unwrap();
    assert_eq!(listed.len(), made.len());
    assert!(listed.iter().all(|stored| gate.shows(opened(stored))));
    follow.reconnect(&rig.store()).await;
    follow.changes().await.expect("the log chains on the new node");
    assert_eq!(follow.position.version.0, start + commits);
    assert_eq!(gate.metrics.directory_full_loads.get(), 1, "nothing was loaded again");
    assert_eq!(store.spend(&spending("other"), now()).await, Ok(false));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_takes_over_from_a_primary_of_a_cluster() {
    let mut cluster = block_in_place(|| RedisCluster::start(&["--cluster-node-timeout", "800"]));
    let mut rig = Rig::on_cluster(&cluster.url());
    let at = cluster.number_of_owner(&rig.key("meta"));
    let replica = block_in_place(|| cluster.add_replica(at));
    let store = rig.ready().await;
    let first = create(&store, "first", "r").await.unwrap();
    let revision = store.get((&first.principal).into()).await.unwrap().unwrap().revision;
    let gates = [Gate::start(rig.store()), Gate::start(rig.store())];
    let writer = until_refused(rig.written_by(replicated()));
    gates[0].until("writes are under way", |gate| gate.directory.len() > 20).await;
    cluster.nodes[at].kill();
    let mut acknowledged = writer.await.unwrap();
    acknowledged.push(first.clone());
    go_on(&gates, &store, &acknowledged, "after").await;
    store.delete(&stored(&first, revision)).await.unwrap();
    acknowledged.pop();

    // It comes back with the revoked entry, and is a replica now.
    block_in_place(|| cluster.nodes[at].restart());
    go_on(&gates, &store, &acknowledged, "back").await;
    rig.config.url = StoreUrl::parse(&cluster.url()).unwrap();
    assert_eq!(rig.store().get((&first.principal).into()).await, Ok(None));
    for gate in &gates {
        assert!(gate.knows_none(&first.principal));
    }
    assert_eq!(replica.run::<u64>(&["EXISTS", &rig.key("e:r/back")]), 1);
}
