//! What Sentinels say, and servers that are starting: the other side is a stand-in, which says what real
//! ones say for moments.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use otpgate::clock::{Clock as _, SystemClock};
use otpgate::config::{RedisConfig, RedisWrites, StoreConfig};
use otpgate::store::url::StoreUrl;
use otpgate::store::{Scope, Step, Store, StoreError};
use tokio::task::block_in_place;

use crate::directory_follow::Gate;
use crate::harness::eventually;
use crate::redis_server::{RedisServer, free_port, wait_until};
use crate::store_redis::{now, spending};
use crate::store_rig::{Follow, Rig, create, entry, who};

/// Answers each command, which is a line of words, with what a function says; nothing hangs it.
struct StandIn {
    port: u16,
    connections: Arc<AtomicUsize>,
    commands: Arc<AtomicUsize>,
    /// When the last command came.
    asked: Arc<Mutex<Option<Instant>>>,
}

impl StandIn {
    fn start(answer: impl Fn(&str) -> String + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (connections, commands, asked) = Default::default();
        let stand_in = Self { port, connections, commands, asked };
        let (connections, commands) = (stand_in.connections.clone(), stand_in.commands.clone());
        let asked = stand_in.asked.clone();
        let answer = Arc::new(move |command: &str| {
            commands.fetch_add(1, Ordering::Relaxed);
            *asked.lock().unwrap() = Some(SystemClock.now().monotonic);
            answer(command)
        });
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                connections.fetch_add(1, Ordering::Relaxed);
                let (stream, answer) = (stream.unwrap(), answer.clone());
                std::thread::spawn(move || serve(stream, &*answer));
            }
        });
        stand_in
    }

    /// A Sentinel that names the server at `primary`, which a failover of number `epoch` made the primary,
    /// and knows so many `others`.
    fn sentinel(primary: u16, epoch: u64, others: usize) -> Self {
        let bulk = |text: String| format!("${}\r\n{text}\r\n", text.len());
        let list = move |words: Vec<String>| {
            let count = words.len();
            format!("*{count}\r\n{}", words.into_iter().map(bulk).collect::<String>())
        };
        Self::start(move |command| match command {
            "SENTINEL get-master-addr-by-name main" => {
                list(vec!["127.0.0.1".into(), primary.to_string()])
            }
            "SENTINEL master main" => list(vec![
                "config-epoch".into(),
                epoch.to_string(),
                "num-other-sentinels".into(),
                others.to_string(),
            ]),
            _ => "-ERR unknown command\r\n".into(),
        })
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    fn commands(&self) -> usize {
        self.commands.load(Ordering::Relaxed)
    }
}

fn serve(stream: TcpStream, answer: &dyn Fn(&str) -> String) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut writer = stream;
    let header = |reader: &mut BufReader<TcpStream>| -> Option<usize> {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        line.get(1..)?.trim_end().parse().ok()
    };
    while let Some(count) = header(&mut reader) {
        let mut words = Vec::new();
        for _ in 0..count {
            let Some(length) = header(&mut reader) else { return };
            let mut word = vec![0; length + 2];
            if reader.read_exact(&mut word).is_err() {
                return;
            }
            words.push(String::from_utf8_lossy(&word[..length]).into_owned());
        }
        if writer.write_all(answer(&words.join(" ")).as_bytes()).is_err() {
            return;
        }
    }
}

/// The rig's server as these Sentinels see it.
fn through(rig: &Rig, sentinels: &[u16], writes: RedisWrites) -> Store {
    let nodes: Vec<_> = sentinels.iter().map(|port| format!("127.0.0.1:{port}")).collect();
    let url = StoreUrl::parse(&format!("redis-sentinel://{}/main", nodes.join(","))).unwrap();
    let redis = RedisConfig { writes, ..RedisConfig::default() };
    Store::open(&StoreConfig { url, redis, ..rig.config.clone() }).unwrap()
}

/// Those that have not heard of it yet name a server that still thinks that it is a primary, whether the
/// new one can be reached from here or not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_primary_of_the_latest_failover_is_asked() {
    let rig = Rig::redis().await;
    let made = create(&rig.ready().await, "a", "r").await.unwrap();
    for (epoch_of_other, is_found) in [(2, false), (0, true)] {
        let ours = StandIn::sentinel(rig.port(), 1, 1);
        let other = StandIn::sentinel(free_port(), epoch_of_other, 1);
        let store = through(&rig, &[ours.port, other.port], RedisWrites::Auto);
        // One of two is enough, and the other may be late.
        store.list(None, 1).await.ok();
        let found = || async {
            let found = store.get((&made.principal).into()).await;
            (found.is_ok() == is_found).then_some(found)
        };
        let found = eventually("both Sentinels are heard", found).await;
        assert!(matches!(&found, Ok(Some(_)) | Err(StoreError::Unreachable(_))), "{found:?}");
        if !is_found {
            assert!(store.feed(Arc::new(SystemClock)).await.is_err(), "nothing old is followed");
        }
    }
}

/// Some Sentinels may tell a name and others an address.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_that_write_the_primary_differently_agree() {
    let rig = Rig::redis().await;
    let relay = crate::store_redis::Relay::to(rig.port());
    let sentinels = [rig.port(), relay.port].map(|port| StandIn::sentinel(port, 1, 1));
    rig.ready().await;
    let store = through(&rig, &[sentinels[0].port, sentinels[1].port], RedisWrites::Auto);
    let (mut follow, _) = Follow::start(&store).await;
    let before = sentinels[0].commands();
    while sentinels[0].commands() < before + 12 {
        let poll = follow.feed.poll(&follow.position).await;
        assert!(poll.is_ok(), "{poll:?}");
    }
}

/// What a primary says is current as of when Sentinels said that it is one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_current_beyond_what_sentinels_said() {
    let rig = Rig::redis().await;
    rig.ready().await;
    let sentinel = StandIn::sentinel(rig.port(), 1, 0);
    let store = through(&rig, &[sentinel.port], RedisWrites::Auto);
    let (mut follow, _) = Follow::start(&store).await;
    let before = sentinel.commands();
    while sentinel.commands() < before + 4 {
        create(&store, &format!("e{}", follow.position.version), "r").await.unwrap();
        for _ in 0..3 {
            let polled = SystemClock.now().monotonic;
            let as_of = match follow.feed.poll(&follow.position).await {
                Ok(Step::Changed { as_of, position, .. }) => {
                    follow.position = position;
                    as_of
                }
                Ok(Step::Current { as_of }) => as_of,
                other => panic!("{other:?}"),
            };
            assert!(as_of <= sentinel.asked.lock().unwrap().expect("it was asked"));
            assert!(
                polled.saturating_duration_since(as_of) < Duration::from_secs(1),
                "asked often"
            );
        }
    }
}

/// Whoever waited for an answer that did not come does not wait for another one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_that_hang_are_asked_once_for_all() {
    let rig = Rig::redis().await;
    let hanging = StandIn::start(|_| String::new());
    let store = through(&rig, &[hanging.port], RedisWrites::Transactions);
    let tries: Vec<_> = (0..4)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.list(None, 1).await })
        })
        .collect();
    for task in tries {
        assert!(matches!(task.await.unwrap(), Err(StoreError::Unreachable(_))));
    }
    assert!(hanging.connections() <= 2, "asked {} times", hanging.connections());
}

/// Each connection is confirmed, not made anew, as often as Sentinels are asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn own_connections_outlast_what_sentinels_said() {
    let rig = Rig::redis().await;
    rig.ready().await;
    let sentinel = StandIn::sentinel(rig.port(), 1, 0);
    let store = through(&rig, &[sentinel.port], RedisWrites::Transactions);
    let made = || {
        let stats: String = rig.run(&["INFO", "stats"]);
        let line = stats.lines().find_map(|l| l.strip_prefix("total_connections_received:"));
        line.unwrap().parse::<usize>().unwrap()
    };
    store.list(None, 1).await.unwrap();
    let (connections, asked) = (made(), sentinel.commands());
    // Some times of asking Sentinels.
    while sentinel.commands() < asked + 8 {
        store.list(None, 1).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(made() - connections, 1, "that of the question alone");
    assert_eq!(sentinel.connections(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_that_are_not_named_are_warned_about() {
    let rig = Rig::redis().await;
    rig.ready().await;
    for (others, is_warned) in [(2, true), (0, false)] {
        let sentinel = StandIn::sentinel(rig.port(), 1, others);
        let warnings = through(&rig, &[sentinel.port], RedisWrites::Auto).warnings().await;
        let found = warnings.iter().any(|text| text.contains("1 of 3 Sentinels"));
        assert_eq!(found, is_warned, "{warnings:?}");
    }
}

/// A server that reads its file says so to every question: connecting again does not help.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_loading_is_not_stormed() {
    let loading = StandIn::start(|command| match command {
        "HELLO" => "*2\r\n$4\r\nrole\r\n$6\r\nmaster\r\n".into(),
        _ => "-LOADING Redis is loading the dataset in memory\r\n".into(),
    });
    let rig = Rig::redis().await;
    let url = StoreUrl::parse(&format!("redis://127.0.0.1:{}", loading.port)).unwrap();
    let store = Store::open(&StoreConfig { url, ..rig.config.clone() }).unwrap();
    let used = store.spend(&spending("a"), now()).await;
    assert!(
        matches!(&used, Err(StoreError::Unreachable(why)) if why.contains("LOADING")),
        "{used:?}"
    );
    assert!(loading.commands() > 5 && loading.connections() == 1, "{}", loading.connections());

    let gate = Gate::start(store);
    block_in_place(|| wait_until("it was asked often", || loading.commands() > 60));
    assert!(loading.connections() <= 4, "{} connections", loading.connections());
    assert!(!gate.directory.status().loaded);
}

/// It may be filled at any moment, so it is asked often: on the connection that is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_empty_is_not_stormed() {
    let empty = StandIn::start(|command| match command.split(' ').next() {
        Some("HELLO") => "*2\r\n$4\r\nrole\r\n$6\r\nmaster\r\n".into(),
        Some("HMGET") => "*2\r\n$-1\r\n$-1\r\n".into(),
        Some("XREVRANGE") => "*0\r\n".into(),
        _ => "$-1\r\n".into(),
    });
    let url = StoreUrl::parse(&format!("redis://127.0.0.1:{}", empty.port)).unwrap();
    let rig = Rig::redis().await;
    let store = Store::open(&StoreConfig { url, ..rig.config.clone() }).unwrap();
    let start = SystemClock.now().monotonic;
    let gate = Gate::start(store);
    block_in_place(|| wait_until("it was asked often", || empty.commands() > 80));
    let most = 1 + usize::try_from(start.elapsed().as_secs()).unwrap() / 5;
    assert!(empty.connections() <= most, "{} connections", empty.connections());
    assert!(!gate.directory.status().loaded);
}

/// A replica may be behind, whatever the log says that it has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_of_other_realms_prove_nothing_on_a_replica() {
    let old = Rig::redis().await;
    let new = block_in_place(RedisServer::plain);
    let store = old.ready().await;
    create(&store, "a", "r").await.unwrap();
    new.run::<()>(&["REPLICAOF", "127.0.0.1", &old.port().to_string()]);
    let in_sync = |info: String| info.contains("link_status:up");
    block_in_place(|| {
        wait_until("they are in sync", || in_sync(new.run(&["INFO", "replication"])))
    });
    let (mut follow, _) = Follow::start(&store).await;
    follow.feed.narrow(Scope::only(["r".to_owned()]));

    // They change places.
    new.run::<()>(&["REPLICAOF", "NO", "ONE"]);
    let url = StoreUrl::parse(&new.url()).unwrap();
    let later = Store::open(&StoreConfig { url, ..old.config.clone() }).unwrap();
    later.insert(&[entry(9, who("a", "other"))]).await.unwrap();
    old.run::<()>(&["REPLICAOF", "127.0.0.1", &new.port.to_string()]);
    let logged = || old.run::<u64>(&["XLEN", &old.key("log")]) == 2;
    block_in_place(|| wait_until("the change is replicated", logged));
    let poll = follow.feed.poll(&follow.position).await;
    assert!(poll.is_err(), "{poll:?}");
}
