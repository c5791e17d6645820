//! Both ways to write to Redis, by scripts and by transactions: side by side, with answers that get lost,
//! with replicas to wait for, and where something fails halfway.

use std::collections::BTreeMap;
use std::time::Duration;

use otpgate::clock::{Clock as _, SystemClock};
use otpgate::config::{RedisConfig, RedisWrites, StoreConfig};
use otpgate::entry::{Entry, Principal};
use otpgate::store::url::StoreUrl;
use otpgate::store::{Failure, Quota, Spending, Store, StoreError};

use crate::harness::eventually;
use crate::redis_server::{Options, RedisServer, wait_until};
use crate::store_redis::{Relay, Verdict, now, spending};
use crate::store_rig::{Follow, Rig, create, entry, opened, who};

const WAYS: [RedisWrites; 2] = [RedisWrites::Scripts, RedisWrites::Transactions];

fn by(writes: RedisWrites) -> RedisConfig {
    RedisConfig { writes, ..RedisConfig::default() }
}

/// Through a relay.
fn through(rig: &Rig, relay: &Relay, redis: RedisConfig) -> Store {
    let url = StoreUrl::parse(&format!("redis://127.0.0.1:{}", relay.port)).unwrap();
    Store::open(&StoreConfig { url, redis, ..rig.config.clone() }).unwrap()
}

/// Whether a piece of an answer is that to a write: the only one of a script, the second of a transaction.
fn is_written(writes: RedisWrites, answer: &[u8]) -> bool {
    writes == RedisWrites::Scripts || answer.starts_with(b"+QUEUED")
}

/// Creates, changes and deletes; all that was acknowledged, and how many commits that were.
async fn history(store: Store, writer: usize) -> (BTreeMap<Principal, Entry>, u64) {
    let (mut model, mut commits) = (BTreeMap::new(), 0);
    for i in 0..40 {
        let made = create(&store, &format!("w{writer}-{i}"), "r").await.unwrap();
        commits += 1;
        let old = store.get((&made.principal).into()).await.unwrap().unwrap();
        match i % 3 {
            0 => {
                store.delete(&old).await.unwrap();
                commits += 1;
            }
            1 => {
                let new = Entry { comment: format!("{i}"), ..made };
                store.update(&old, &new).await.unwrap();
                commits += 1;
                model.insert(new.principal.clone(), new);
            }
            _ => drop(model.insert(made.principal.clone(), made)),
        }
    }
    (model, commits)
}

/// Adds to one counter, over and over, by compare-and-set.
async fn add(store: Store, times: u32) {
    for _ in 0..times {
        loop {
            let old = store.get((&who("counter", "r")).into()).await.unwrap().unwrap();
            let count = opened(&old).comment.parse().unwrap_or(0) + 1;
            let new = Entry { comment: count.to_string(), ..opened(&old).clone() };
            match store.update(&old, &new).await {
                Ok(_) => break,
                Err(error) => assert_eq!(error, StoreError::Conflict),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_kinds_of_writers_share_a_store() {
    let rig = Rig::redis().await;
    create(&rig.ready().await, "counter", "r").await.unwrap();
    let (mut follow, _) = Follow::start(&rig.store()).await;
    let start = follow.position.version.0;
    let stores: Vec<_> = (0..6).map(|i| rig.written_by(by(WAYS[i % 2]))).collect();
    let histories: Vec<_> =
        stores.iter().enumerate().map(|(i, s)| tokio::spawn(history(s.clone(), i))).collect();
    let counting: Vec<_> =
        stores[..4].iter().map(|store| tokio::spawn(add(store.clone(), 10))).collect();
    let (mut model, mut commits) = (BTreeMap::new(), 0);
    for history in histories {
        let (acknowledged, count) = history.await.unwrap();
        model.extend(acknowledged);
        commits += count;
    }
    for task in counting {
        task.await.unwrap();
        commits += 10;
    }
    let listed: Vec<_> = stores[1].list(None, usize::MAX).await.unwrap();
    assert_eq!(listed, stores[0].list(None, usize::MAX).await.unwrap());
    let mut found: BTreeMap<_, _> =
        listed.iter().map(|s| (s.principal.clone(), opened(s).clone())).collect();
    assert_eq!(found.remove(&who("counter", "r")).unwrap().comment, "40");
    assert!(found == model, "all that was acknowledged is there, and nothing else");
    // The log chains, and has each of them once.
    follow.changes().await.unwrap();
    assert_eq!(follow.position.version.0, start + commits);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_kinds_of_gates_share_a_ledger() {
    let rig = Rig::redis().await;
    rig.ready().await;
    let stores = WAYS.map(|way| rig.written_by(by(way)));
    let tasks: Vec<_> = (0..40)
        .map(|i| {
            let store = stores[i % 2].clone();
            let use_ = Spending { budget: 5, ..spending(&format!("request {i}")) };
            let quota = Quota { failures: 100, per: Duration::from_secs(100_000) };
            let failure = [Failure { bucket: "b".into(), quota }];
            tokio::spawn(async move {
                store.count_failures(&failure, now()).await.unwrap();
                store.spend(&use_, now()).await.unwrap()
            })
        })
        .collect();
    let mut passed = 0;
    for task in tasks {
        passed += u32::from(task.await.unwrap());
    }
    assert_eq!(passed, 5);
    // 40 of 100 were counted: the 60th of these is the last that is let through.
    let quota = Quota { failures: 100, per: Duration::from_secs(100_000) };
    let rest = vec![Failure { bucket: "b".into(), quota }; 60];
    let told = stores[1].count_failures(&rest, now()).await.unwrap();
    assert!(told[58].is_zero() && !told[59].is_zero(), "{told:?}");
    stores[1].remember(&["k".into()], Duration::from_secs(60), now()).await.unwrap();
    assert_eq!(stores[0].remembers("k", now()).await, Ok(true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_whose_answer_is_lost_is_found_out_about() {
    for way in WAYS {
        let rig = Rig::redis().await;
        rig.ready().await;
        let relay = Relay::to(rig.port());
        let store = through(&rig, &relay, by(way));
        let a = create(&store, "a", "r").await.unwrap();

        let cut = move |answer: &[u8]| match is_written(way, answer) {
            true => Verdict::Cut,
            false => Verdict::Wait,
        };
        let old = store.get((&a.principal).into()).await.unwrap().unwrap();
        relay.arm(cut);
        let version = store.update(&old, &a).await.unwrap();
        assert!(!relay.is_armed(), "the answer was swallowed");
        let now = store.get((&a.principal).into()).await.unwrap().unwrap();
        assert_eq!(now.revision, version);
        assert_eq!(version.0, old.revision.0 + 1, "it was done once");

        relay.arm(cut);
        let version = store.delete(&now).await.unwrap();
        assert!(!relay.is_armed(), "the answer was swallowed");
        assert_eq!(version.0, now.revision.0 + 1);
        assert_eq!(rig.store().list(None, 10).await, Ok(Vec::new()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_whose_answer_is_lost_is_not_done_again_after_it_was_undone() {
    for way in WAYS {
        let rig = Rig::redis().await;
        rig.ready().await;
        let relay = Relay::to(rig.port());
        let store = through(&rig, &relay, by(way));
        let made = entry(7, who("a", "r"));
        // Connection and script are there before, so that the next answer is that of the write.
        let other = create(&store, "other", "r").await.unwrap();
        let (mut follow, _) = Follow::start(&rig.store()).await;

        // An admin revokes the entry before its maker has learnt that it was made.
        let (admin, runtime) = (rig.store(), tokio::runtime::Handle::current());
        let principal = made.principal.clone();
        relay.arm(move |answer| {
            if !is_written(way, answer) {
                return Verdict::Wait;
            }
            runtime.block_on(async {
                let old = admin.get((&principal).into()).await.unwrap().expect("it was made");
                admin.delete(&old).await.unwrap();
            });
            Verdict::Cut
        });
        let version = store.insert(std::slice::from_ref(&made)).await.unwrap();
        assert!(!relay.is_armed(), "the answer was swallowed");
        assert_eq!(version.0, follow.position.version.0 + 1);
        let left = rig.store().list(None, 10).await.unwrap();
        assert_eq!(left.iter().map(opened).collect::<Vec<_>>(), [&other], "it stays revoked");
        assert_eq!(follow.changes().await, Ok(vec![(made.principal, None)]));
        assert_eq!(follow.position.version.0, version.0 + 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_use_whose_answer_is_lost_counts_once() {
    for way in WAYS {
        let rig = Rig::redis().await;
        rig.ready().await;
        let relay = Relay::to(rig.port());
        let store = through(&rig, &relay, by(way));
        let other = Spending { counter: 2, ..spending("a") };
        assert_eq!(store.spend(&other, now()).await, Ok(true));
        relay.arm(move |answer| match is_written(way, answer) {
            true => Verdict::Cut,
            false => Verdict::Wait,
        });
        assert_eq!(store.spend(&spending("a"), now()).await, Ok(true));
        assert!(!relay.is_armed(), "the answer was swallowed");
        assert_eq!(store.spend(&spending("b"), now()).await, Ok(false));
    }
}

/// A batch is done or not done, wherever the server runs out of memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_fills_up_does_all_of_a_write_or_nothing() {
    for way in WAYS {
        let rig = Rig::redis().await;
        rig.ready().await;
        let store = rig.written_by(by(way));
        let memory: String = rig.run(&["INFO", "memory"]);
        let used = memory.lines().find_map(|line| line.strip_prefix("used_memory:")).unwrap();
        let limit = used.trim().parse::<u64>().unwrap() + 1_500_000;
        rig.run::<()>(&["CONFIG", "SET", "maxmemory", &limit.to_string()]);
        let mut batches = 0;
        let refusal = loop {
            let first = 50 * batches + 1;
            let batch: Vec<_> =
                (first..first + 50).map(|i| entry(i, who(&format!("n{i}"), "r"))).collect();
            match store.insert(&batch).await {
                Ok(version) => assert_eq!(version.0, batches + 1),
                Err(error) => break error,
            }
            batches += 1;
        };
        assert!(matches!(refusal, StoreError::ReadOnly(_)), "{refusal}");
        assert!(batches > 0, "some fitted");
        let head: (u64,) = rig.run(&["HMGET", &rig.key("head"), "v"]);
        assert_eq!((head.0, rig.run::<u64>(&["XLEN", &rig.key("log")])), (batches, batches));
        let listed = store.list(None, usize::MAX).await.unwrap();
        assert_eq!(listed.len() as u64, 50 * batches);
        assert!(listed.iter().all(|stored| stored.entry.is_ok()));
        rig.run::<()>(&["CONFIG", "SET", "maxmemory", "0"]);
        assert_eq!(create(&store, "a", "r").await.unwrap().id.0, 50 * batches + 1);
    }
}

/// Redis does not roll back a script that fails halfway. Here it may not do the command that `lacks`.
async fn fails_halfway(lacks: &str, logged: u64) {
    let rig = Rig::redis().await;
    let store = rig.ready().await;
    let kept = create(&store, "kept", "r").await.unwrap();
    let (mut follow, _) = Follow::start(&rig.store()).await;
    rig.run::<()>(&["ACL", "SETUSER", "some", "on", ">pw", "~*", "+@all", &format!("-{lacks}")]);
    let url = StoreUrl::parse(&format!("redis://some:pw@127.0.0.1:{}", rig.port())).unwrap();
    let length = || rig.run::<u64>(&["XLEN", &rig.key("log")]);
    for way in WAYS {
        let (url, redis, before) = (url.clone(), by(way), length());
        let some = StoreConfig { url, redis, ..rig.config.clone() };
        let some = Store::open(&some).unwrap();
        let error = some.insert(&[entry(70, who("half", "r"))]).await.unwrap_err();
        assert!(matches!(error, StoreError::Denied(_)), "{lacks}: {error}");
        let wanted = if way == RedisWrites::Scripts { logged } else { 0 };
        assert_eq!(length() - before, wanted, "{lacks} {way:?}: a transaction leaves no half");
    }
    for (name, way) in [("n0", WAYS[0]), ("n1", WAYS[1])] {
        create(&rig.written_by(by(way)), name, "r").await.unwrap();
    }
    let changes = follow.changes().await.unwrap_or_else(|why| panic!("{lacks}: {why}"));
    let seen: BTreeMap<_, _> = changes.into_iter().collect();
    assert!(seen[&who("n0", "r")].is_some() && seen[&who("n1", "r")].is_some());
    assert!(seen.get(&who("half", "r")).is_none_or(Option::is_none), "{lacks}: none found it");
    let listed = store.list(None, 10).await.unwrap();
    assert!(listed.iter().any(|stored| stored.entry.as_ref() == Ok(&kept)));
    // Whatever is there of it can be made again.
    if lacks == "set" {
        let half = store.get((&who("half", "r")).into()).await.unwrap().unwrap();
        assert!(half.entry.is_err());
    }
    store.insert(&[entry(70, who("half", "r"))]).await.unwrap();
    assert_eq!(follow.changes().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_failed_halfway_is_seen_by_followers_and_continued_by_writers() {
    let all = [("xadd", 0), ("hset", 1), ("zadd", 1), ("set", 1)];
    futures_util::future::join_all(all.map(|(lacks, logged)| fails_halfway(lacks, logged))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_open_a_transaction_writes_nothing() {
    let rig = Rig::redis().await;
    rig.ready().await;
    for (i, lacks) in ["watch", "multi", "exec"].iter().enumerate() {
        let user = format!("u{i}");
        rig.run::<()>(&["ACL", "SETUSER", &user, "on", ">pw", "~*", "+@all", &format!("-{lacks}")]);
        let url = StoreUrl::parse(&format!("redis://{user}:pw@127.0.0.1:{}", rig.port())).unwrap();
        let redis = by(RedisWrites::Transactions);
        let store = Store::open(&StoreConfig { url, redis, ..rig.config.clone() }).unwrap();
        for error in [
            store.insert(&[entry(1, who("a", "r"))]).await.unwrap_err(),
            store.spend(&spending("a"), now()).await.unwrap_err(),
        ] {
            assert!(matches!(error, StoreError::Denied(_)), "{lacks}: {error}");
        }
    }
    assert_eq!(rig.run::<Vec<String>>(&["KEYS", "*"]).len(), 2, "meta and head, as made");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scripts_are_given_up_only_if_that_is_left_open() {
    let rig = Rig::scriptless().await;
    let scripts = rig.written_by(by(RedisWrites::Scripts));
    let error = scripts.init().await.unwrap_err();
    assert!(error.to_string().contains("unknown command"), "{error}");
    let store = rig.written_by(by(RedisWrites::Auto));
    assert_eq!(store.init().await, Ok(true));
    // Many at once that all begin with scripts.
    let store = rig.written_by(by(RedisWrites::Auto));
    let tasks: Vec<_> = (0..20)
        .map(|i| {
            let store = store.clone();
            tokio::spawn(async move { create(&store, &format!("n{i}"), "r").await.unwrap() })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(store.list(None, 100).await.unwrap().len(), 20);
}

/// A primary and its replica.
fn pair() -> (RedisServer, RedisServer) {
    let aof = Options { aof: true, ..Options::default() };
    let (primary, replica) = (RedisServer::start(aof), RedisServer::plain());
    replica.run::<()>(&["REPLICAOF", "127.0.0.1", &primary.port.to_string()]);
    // Not only in its own eyes.
    wait_until("the replica is in sync", || {
        primary.run::<String>(&["INFO", "replication"]).contains("state=online")
    });
    (primary, replica)
}

/// Creates an entry that a replica confirms; one that runs may be late, on a busy machine.
async fn confirmed(store: &Store, name: &str) -> Entry {
    eventually("the replica confirms", || async {
        let made = create(store, name, "r").await;
        if made.is_err() {
            let there = store.get((&who(name, "r")).into()).await.unwrap();
            store.delete(&there.unwrap()).await.ok();
        }
        made.ok()
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_wait_for_replicas_and_nothing_else_does() {
    let (primary, replica) = tokio::task::block_in_place(pair);
    let url = primary.url();
    let rig = Rig::on_server(primary, &url);
    rig.ready().await;
    let wait_timeout = Duration::from_millis(600);
    for (i, writes) in WAYS.into_iter().enumerate() {
        let redis = RedisConfig { writes, wait_replicas: 1, wait_timeout };
        let relay = Relay::to(rig.port());
        let (store, relayed) =
            (rig.written_by(redis.clone()), through(&rig, &relay, redis.clone()));
        let made = confirmed(&store, &format!("a{i}")).await;
        confirmed(&relayed, &format!("b{i}")).await;
        let old = store.get((&made.principal).into()).await.unwrap().unwrap();

        replica.signal(libc::SIGSTOP);
        let start = SystemClock.now().monotonic;
        let name = format!("c{i}");
        let (unknown, ()) = tokio::join!(create(&store, &name, "r"), async {
            // While it waits.
            store.get((&made.principal).into()).await.unwrap();
            assert_eq!(store.list(None, 1).await.unwrap().len(), 1);
            let spending = Spending { counter: i as u64, ..spending("a") };
            assert_eq!(store.spend(&spending, now()).await, Ok(true));
            assert!(start.elapsed() < wait_timeout, "{:?}", start.elapsed());
        });
        let error = unknown.unwrap_err();
        assert!(
            matches!(&error, StoreError::Unknown(why) if why.contains("0 replicas of 1")),
            "{error}"
        );
        assert!(start.elapsed() >= wait_timeout);
        assert!(store.get((&who(&name, "r")).into()).await.unwrap().is_some(), "it is written");

        // Nor is it acknowledged where the answer was lost and the write is found.
        relay.arm(move |answer| match is_written(writes, answer) {
            true => Verdict::Cut,
            false => Verdict::Wait,
        });
        let found = relayed.update(&old, &made).await;
        assert!(!relay.is_armed(), "the answer was swallowed");
        assert!(matches!(found, Err(StoreError::Unknown(_))), "{found:?}");

        replica.signal(libc::SIGCONT);
        let name = format!("d{i}");
        confirmed(&store, &name).await;
        let there: u64 = replica.run(&["EXISTS", &rig.entry_key(&who(&name, "r"))]);
        assert_eq!(there, 1, "what is acknowledged is on the replica");
    }
}
