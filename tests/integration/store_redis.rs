//! What only Redis can go through: passwords, TLS, failing servers and connections, Sentinel.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use otpgate::clock::{Clock, SystemClock};
use otpgate::config::{RedisConfig, RedisWrites, StoreConfig, TlsFiles};
use otpgate::entry::EntryId;
use otpgate::store::url::StoreUrl;
use otpgate::store::{Failure, Quota, Spending, Store, StoreError};
use tokio::runtime::Handle;

use crate::directory_follow::Gate;
use crate::harness::eventually;
use crate::redis_server::{LIMIT, Options, RedisServer, free_port, make_certificates, wait_until};
use crate::store_rig::{Follow, Place, Rig, create, entry, opened, who};

/// A rig on a server that `options` describe; its URL is made by `url`.
fn rig(options: Options, url: impl FnOnce(&RedisServer) -> String) -> Rig {
    let server = RedisServer::start(options);
    let url = url(&server);
    Rig::on_server(server, &url)
}

pub(crate) fn at(rig: &Rig, url: &str) -> Store {
    let url = StoreUrl::parse(url).unwrap();
    Store::open(&StoreConfig { url, ..rig.config.clone() }).unwrap()
}

/// Everything once: operations and a follower.
async fn works(rig: &Rig) {
    all_works(&rig.store()).await;
}

/// As [`works`], from an empty store on.
pub(crate) async fn all_works(store: &Store) {
    store.init().await.unwrap();
    let (mut follow, _) = Follow::start(store).await;
    let made = create(store, "a", "r").await.unwrap();
    assert_eq!(follow.changes().await.unwrap().len(), 1);
    assert_eq!(store.list(None, 10).await.unwrap()[0].entry, Ok(made));
    marks_work(store, 1).await;
}

/// Marks, those of uses for the token of one time step.
pub(crate) async fn marks_work(store: &Store, counter: u64) {
    let use_ = |by| Spending { counter, ..spending(by) };
    assert_eq!(store.spend(&use_("a"), now()).await, Ok(true));
    assert_eq!(store.spend(&use_("b"), now()).await, Ok(false));
    let quota = Quota { failures: 1, per: Duration::from_secs(60) };
    let failure = Failure { bucket: "b".into(), quota };
    assert!(!store.count_failures(&[failure], now()).await.unwrap()[0].is_zero());
    store.remember(&["k".into()], Duration::from_secs(60), now()).await.unwrap();
    assert_eq!(store.remembers("k", now()).await, Ok(true));
}

pub(crate) fn now() -> u64 {
    SystemClock.now().unix
}

pub(crate) fn spending(by: &str) -> Spending {
    let keep = Duration::from_secs(60);
    Spending { id: EntryId(1), serial: 0, counter: 1, by: by.into(), budget: 1, keep }
}

async fn refusal(store: &Store) -> StoreError {
    store.get((&who("a", "r")).into()).await.unwrap_err()
}

#[tokio::test]
async fn through_a_unix_socket() {
    works(&rig(Options::default(), |server| format!("redis+unix://{}", server.socket().display())))
        .await;
}

#[tokio::test]
async fn in_another_database() {
    let rig = rig(Options::default(), |server| format!("{}/5", server.url()));
    works(&rig).await;
    let sizes: String = rig.run(&["INFO", "keyspace"]);
    assert!(sizes.contains("db5:") && !sizes.contains("db0:"), "{sizes}");
}

#[tokio::test]
async fn with_a_password() {
    let options = Options { password: Some("s3cr:3t/@".into()), ..Options::default() };
    let rig = rig(options, |server| format!("redis://:s3cr%3A3t%2F%40@127.0.0.1:{}", server.port));
    works(&rig).await;
    let port = rig.port();
    for (url, hint) in [
        (format!("redis://127.0.0.1:{port}"), "password"),
        (format!("redis://:wr0ng@127.0.0.1:{port}"), "password"),
        (format!("redis://who:wr0ng@127.0.0.1:{port}"), "password"),
    ] {
        let error = refusal(&at(&rig, &url)).await;
        assert!(matches!(&error, StoreError::Denied(why) if why.contains(hint)), "{url}: {error}");
        assert!(!error.to_string().contains("wr0ng"));
    }
}

#[tokio::test]
async fn a_server_that_repeats_what_it_does_not_understand_is_not_quoted() {
    let args = ["--rename-command", "AUTH", ""].map(str::to_owned).to_vec();
    let options = Options { args, ..Options::default() };
    let rig = rig(options, |server| format!("redis://:s3cr3t@127.0.0.1:{}", server.port));
    let error = refusal(&rig.store()).await;
    assert!(matches!(error, StoreError::Denied(_)), "{error}");
    assert!(!error.to_string().contains("s3cr3t"), "{error}");
}

#[tokio::test]
async fn over_tls_with_client_certificates() {
    let dir = tempfile::tempdir().unwrap();
    make_certificates(dir.path());
    let options = Options { tls: Some(dir.path().to_owned()), ..Options::default() };
    let mut rig = rig(options, RedisServer::url);
    rig.config.ca_file = Some(dir.path().join("ca.pem"));
    let client = TlsFiles {
        cert_file: dir.path().join("client.pem"),
        key_file: dir.path().join("client.key"),
    };
    rig.config.client_tls = Some(client);
    works(&rig).await;

    rig.config.ca_file = Some(dir.path().join("other-ca.pem"));
    let error = refusal(&rig.store()).await;
    assert!(
        matches!(&error, StoreError::Unreachable(why) if why.contains("certificate")),
        "{error}"
    );
    rig.config.ca_file = Some(dir.path().join("ca.pem"));
    rig.config.client_tls = None;
    let error = refusal(&rig.store()).await;
    assert!(matches!(error, StoreError::Unreachable(_)), "{error}");
    let plain = at(&rig, &format!("redis://127.0.0.1:{}", rig.port()));
    let error = refusal(&plain).await;
    assert!(matches!(error, StoreError::Unreachable(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_away_is_told_quickly() {
    let mut rig = Rig::redis().await;
    let store = rig.ready().await;
    let made = create(&store, "a", "r").await.unwrap();
    rig.server().kill();
    let start = SystemClock.now().monotonic;
    // Many at once share one attempt to connect.
    let tries: Vec<_> = (0..50)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move { refusal(&store).await })
        })
        .collect();
    for task in tries {
        let error = task.await.unwrap();
        assert!(matches!(error, StoreError::Unreachable(_)), "{error}");
    }
    assert!(matches!(create(&store, "b", "r").await, Err(StoreError::Unreachable(_))));
    assert!(start.elapsed() < std::time::Duration::from_secs(3), "{:?}", start.elapsed());

    tokio::task::block_in_place(|| rig.server().restart());
    // Not at once: for a moment nobody connects where that just failed.
    let found = || async { store.get((&made.principal).into()).await.ok() };
    assert!(eventually("it answers", found).await.is_some());
    create(&store, "b", "r").await.unwrap();
}

/// Calls by the thousand are not connections by the thousand.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_away_is_not_stormed() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("redis://{}", listener.local_addr().unwrap());
    let connections = Arc::new(AtomicU32::new(0));
    let counted = connections.clone();
    tokio::spawn(async move {
        while let Ok((closed, _)) = listener.accept().await {
            drop(closed);
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    let store = at(&Rig::redis().await, &url);
    let start = SystemClock.now().monotonic;
    let mut calls = 0_u32;
    while calls < 2_000 {
        refusal(&store).await;
        calls += 1;
    }
    let most = 2 + u32::try_from(start.elapsed().as_millis()).unwrap() / 20;
    let made = connections.load(Ordering::Relaxed);
    assert!((1..=most).contains(&made), "{made} connections, {most} at most");
    assert!(made < calls / 10, "{made} connections for {calls} calls");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs_is_told_in_bounded_time() {
    let rig = Rig::redis().await;
    let store = rig.ready().await;
    create(&store, "a", "r").await.unwrap();
    let (mut follow, _) = Follow::start(&store).await;
    rig.run::<()>(&["CLIENT", "PAUSE", "20000", "ALL"]);
    let start = SystemClock.now().monotonic;
    let write = create(&store, "b", "r");
    let (write, poll) = tokio::join!(write, follow.feed.poll(&follow.position));
    assert!(write.is_err());
    assert!(matches!(poll, Err(StoreError::Unreachable(_))), "{poll:?}");
    assert!(start.elapsed() < std::time::Duration::from_secs(15), "{:?}", start.elapsed());
}

#[tokio::test]
async fn replicas_are_refused() {
    let (primary, replica) = (RedisServer::plain(), RedisServer::plain());
    replica.run::<()>(&["REPLICAOF", "127.0.0.1", &primary.port.to_string()]);
    let port = replica.port;
    let rig = Rig::on_server(primary, &format!("redis://127.0.0.1:{port}"));
    let error = refusal(&rig.store()).await;
    assert!(matches!(&error, StoreError::Unreachable(why) if why.contains("replica")), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_becomes_a_replica_proves_nothing_any_more() {
    let rig = Rig::redis().await;
    let store = rig.ready().await;
    let made = create(&store, "a", "r").await.unwrap();
    let (mut follow, _) = Follow::start(&store).await;
    // Of nobody, so that it keeps what it has.
    rig.run::<()>(&["REPLICAOF", "127.0.0.1", &free_port().to_string()]);
    // Whether the connection dies or the role shows, it ends in an error and never in "current".
    let poll = follow.feed.poll(&follow.position).await;
    assert!(poll.is_err(), "{poll:?}");
    for writes in [RedisWrites::Scripts, RedisWrites::Transactions] {
        let store = rig.written_by(RedisConfig { writes, ..RedisConfig::default() });
        // So that it is connected when the server changes.
        rig.run::<()>(&["REPLICAOF", "NO", "ONE"]);
        assert_eq!(store.list(None, 10).await.unwrap().len(), 1);
        assert_eq!(store.remembers("k", now()).await, Ok(false));
        rig.run::<()>(&["REPLICAOF", "127.0.0.1", &free_port().to_string()]);
        assert!(store.get((&made.principal).into()).await.is_err());
        assert!(store.list(None, 10).await.is_err());
        assert!(store.remembers("k", now()).await.is_err());
        assert!(create(&store, "b", "r").await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_server_stays_readable() {
    let rig = Rig::redis().await;
    let store = rig.ready().await;
    let made = create(&store, "a", "r").await.unwrap();
    let old = store.get((&made.principal).into()).await.unwrap().unwrap();
    rig.run::<()>(&["CONFIG", "SET", "maxmemory", "1"]);
    for error in [
        create(&store, "b", "r").await.map(|_| ()).unwrap_err(),
        store.delete(&old).await.map(|_| ()).unwrap_err(),
    ] {
        assert!(matches!(error, StoreError::ReadOnly(_)), "{error}");
    }
    assert_eq!(store.get((&made.principal).into()).await.unwrap(), Some(old));
    let (mut follow, rows) = Follow::start(&store).await;
    assert_eq!(rows.len(), 1);
    rig.run::<()>(&["CONFIG", "SET", "maxmemory", "0"]);
    create(&store, "b", "r").await.unwrap();
    assert_eq!(follow.changes().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_applications_keys_are_not_touched() {
    for (key, value, hint) in [
        ("meta", "theirs", "another application"),
        ("meta", "otpgate 2", "number 2"),
        ("log", "theirs", "meta"),
    ] {
        let rig = Rig::redis().await;
        rig.run::<()>(&["SET", &rig.key(key), value]);
        let error = rig.store().init().await.unwrap_err();
        assert!(matches!(&error, StoreError::Corrupt(why) if why.contains(hint)), "{error}");
        assert_eq!(rig.run::<Vec<String>>(&["KEYS", "*"]), [rig.key(key)]);
    }
    let rig = Rig::redis().await;
    rig.run::<()>(&["LPUSH", &rig.key("meta"), "x"]);
    let error = refusal(&rig.store()).await;
    assert!(matches!(&error, StoreError::Corrupt(why) if why.contains("WRONGTYPE")), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_evicted_entry_is_broken_not_unknown() {
    let rig = Rig::redis().await;
    let store = rig.ready().await;
    let (a, b) = (create(&store, "a", "r").await.unwrap(), create(&store, "b", "r").await.unwrap());
    rig.run::<()>(&["DEL", &rig.entry_key(&a.principal)]);
    rig.run::<()>(&["SET", &rig.entry_key(&b.principal), "junk"]);
    let (_, rows) = Follow::start(&store).await;
    assert_eq!(rows.len(), 2);
    assert!(rows.iter().all(|row| store.unseal(row).is_err()));
    // Making it again heals it.
    let again = create(&store, "a", "r").await.unwrap();
    let (_, rows) = Follow::start(&store).await;
    let healed = rows.iter().filter_map(|row| store.unseal(row).ok());
    assert_eq!(healed.collect::<Vec<_>>(), [again]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn evicted_and_damaged_entries_can_be_found_and_deleted() {
    let rig = Rig::redis().await;
    let store = rig.ready().await;
    let mut gone = Vec::new();
    for (i, damage) in [None, Some(""), Some("junk"), Some("12"), Some("a list")].iter().enumerate()
    {
        let made = create(&store, &format!("n{i}"), "r").await.unwrap();
        match damage {
            None => rig.run::<()>(&["DEL", &rig.entry_key(&made.principal)]),
            Some("a list") => {
                rig.run::<()>(&["DEL", &rig.entry_key(&made.principal)]);
                rig.run::<()>(&["LPUSH", &rig.entry_key(&made.principal), "x"]);
            }
            Some(value) => rig.run::<()>(&["SET", &rig.entry_key(&made.principal), value]),
        }
        gone.push(made);
    }
    let listed = store.list(None, 10).await.unwrap();
    assert_eq!(listed.len(), gone.len());
    for (made, listed) in gone.iter().zip(&listed) {
        assert!(listed.entry.is_err());
        assert_eq!((listed.id, &listed.principal), (made.id, &made.principal));
        assert_eq!(store.get((&made.principal).into()).await.unwrap().as_ref(), Some(listed));
        assert_eq!(store.get_by_id(made.id).await.unwrap().as_ref(), Some(listed));
    }
    // Whoever heals one in between keeps it.
    let healed = create(&store, "n0", "r").await.unwrap();
    assert_eq!(store.delete(&listed[0]).await, Err(StoreError::Conflict));
    let (mut follow, _) = Follow::start(&rig.store()).await;
    for listed in &listed[1..] {
        store.delete(listed).await.unwrap();
        assert_eq!(store.delete(listed).await, Err(StoreError::Conflict));
    }
    assert_eq!(follow.changes().await.unwrap().len(), gone.len() - 1);
    let left = store.list(None, 10).await.unwrap();
    assert_eq!(left.iter().map(opened).collect::<Vec<_>>(), [&healed]);
}

/// Entries that a full load takes in more than one step.
async fn fill(store: &Store) {
    let entries: Vec<_> = (1..=1500).map(|i| entry(i, who(&format!("n{i}"), "r"))).collect();
    for batch in entries.chunks(500) {
        store.insert(batch).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_emptied_during_a_full_load_is_an_error() {
    let rig = Rig::redis().await;
    let store = rig.ready().await;
    fill(&store).await;
    let mut feed = store.feed(Arc::new(SystemClock)).await.unwrap();
    let mut rows = 0;
    let loaded = feed
        .load(&mut |_| {
            if rows == 0 {
                rig.empty();
            }
            rows += 1;
        })
        .await;
    assert_eq!(loaded, Err(StoreError::NotInitialised));
    assert!(rows > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_load_counts_only_if_the_log_goes_on_from_it() {
    let rig = Rig::redis().await;
    fill(&rig.ready().await).await;
    let relay = Relay::to(rig.port());
    // While the first names of entries are on their way, the store becomes another one, in which the
    // numbers that were passed already are used again.
    let (other, runtime) = (rig.store(), Handle::current());
    let Place::Redis(server) = &rig.place else { panic!("not a single Redis") };
    let mut server = server.admin();
    let (made, replaced) = std::sync::mpsc::channel();
    relay.arm(move |answer| {
        if !answer.windows(4).any(|part| part == b"r/n1") {
            return Verdict::Wait;
        }
        redis::cmd("FLUSHALL").exec(&mut server).unwrap();
        let entry = runtime.block_on(async {
            other.init().await.unwrap();
            create(&other, "new", "r").await.unwrap()
        });
        made.send(entry).unwrap();
        Verdict::PassOn
    });
    let gate = Gate::start(at(&rig, &format!("redis://127.0.0.1:{}", relay.port)));
    let new = tokio::task::block_in_place(|| replaced.recv_timeout(LIMIT).unwrap());
    gate.until("the other store is followed", |gate| gate.shows(&new)).await;
    assert_eq!(gate.directory.len(), 1);
    assert_eq!(gate.metrics.directory_full_loads.get(), 1, "the mixture never counted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forgotten_scripts_are_sent_again() {
    let rig = Rig::redis().await;
    let store = rig.ready().await;
    create(&store, "a", "r").await.unwrap();
    rig.run::<()>(&["SCRIPT", "FLUSH"]);
    create(&store, "b", "r").await.unwrap();
    assert_eq!(store.list(None, 10).await.unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_loses_nothing_and_needs_no_full_load() {
    let mut rig = Rig::redis().await;
    let gate = Gate::start(rig.ready().await);
    gate.until("the store is loaded", |gate| gate.directory.status().loaded).await;
    for round in 0..3 {
        let store = rig.store();
        let writer = tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            for i in 0.. {
                match create(&store, &format!("n{round}-{i}"), "r").await {
                    Ok(made) => acknowledged.push(made),
                    Err(_) => break,
                }
            }
            acknowledged
        });
        gate.until("writes are under way", |gate| gate.directory.len() > 20 * (round + 1)).await;
        rig.server().kill();
        let acknowledged = writer.await.unwrap();
        tokio::task::block_in_place(|| rig.server().restart());
        for entry in &acknowledged {
            gate.until("what was acknowledged is in force", |gate| gate.shows(entry)).await;
        }
        let store = rig.store();
        let listed = store.list(None, usize::MAX).await.unwrap();
        gate.until("nothing else is", |gate| gate.directory.len() == listed.len()).await;
    }
    assert_eq!(gate.metrics.directory_full_loads.get(), 1);
}

/// What a trap says about a piece of an answer.
pub(crate) enum Verdict {
    /// It is passed on; the trap waits for the next.
    Wait,
    /// It is passed on; the trap is gone.
    PassOn,
    /// It is passed on once the channel's other end is dropped; the trap is gone.
    Hold(mpsc::Receiver<()>),
    /// It is swallowed, and both connections end; the trap is gone.
    Cut,
}

pub(crate) type Trap = Box<dyn FnMut(&[u8]) -> Verdict + Send>;

/// A relay to `port` with a trap for what the server says.
pub(crate) struct Relay {
    pub(crate) port: u16,
    trap: Arc<Mutex<Option<Trap>>>,
}

impl Relay {
    pub(crate) fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let trap = Arc::<Mutex<Option<Trap>>>::default();
        let relay = Self { port: listener.local_addr().unwrap().port(), trap: trap.clone() };
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (client, server) = (client.unwrap(), TcpStream::connect(("127.0.0.1", port)));
                let Ok(server) = server else { continue };
                let pair = (client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || pass(pair.0, pair.1, &Mutex::default()));
                let trap = trap.clone();
                std::thread::spawn(move || pass(server, client, &trap));
            }
        });
        relay
    }

    pub(crate) fn arm(&self, trap: impl FnMut(&[u8]) -> Verdict + Send + 'static) {
        *self.trap.lock().unwrap() = Some(Box::new(trap));
    }

    pub(crate) fn is_armed(&self) -> bool {
        self.trap.lock().unwrap().is_some()
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, trap: &Mutex<Option<Trap>>) {
    let mut buffer = [0; 65536];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let answer = &buffer[..length];
        let verdict = {
            let mut armed = trap.lock().unwrap();
            let verdict = armed.as_mut().map_or(Verdict::Wait, |trap| trap(answer));
            if !matches!(verdict, Verdict::Wait) {
                *armed = None;
            }
            verdict
        };
        match verdict {
            Verdict::Wait | Verdict::PassOn => {}
            Verdict::Hold(end) => drop(end.recv()),
            Verdict::Cut => break,
        }
        if to.write_all(answer).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_whose_answer_is_lost_with_the_server_is_unknown() {
    let mut rig = Rig::redis().await;
    rig.ready().await;
    let relay = Relay::to(rig.server().port);
    let store = at(&rig, &format!("redis://127.0.0.1:{}", relay.port));
    create(&store, "a", "r").await.unwrap();
    let old = store.get((&who("a", "r")).into()).await.unwrap().unwrap();
    rig.run::<()>(&["CLIENT", "PAUSE", "60000", "ALL"]);
    let server = rig.server();
    let (written, ()) = tokio::join!(store.delete(&old), async {
        tokio::task::block_in_place(|| server.kill());
    });
    assert!(matches!(written, Err(StoreError::Unknown(_))), "{written:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinel_leads_to_the_primary_and_to_the_next_one() {
    let (primary, replica) = tokio::task::block_in_place(|| {
        let servers = (RedisServer::plain(), RedisServer::plain());
        servers.1.run::<()>(&["REPLICAOF", "127.0.0.1", &servers.0.port.to_string()]);
        servers
    });
    let in_sync = || replica.run::<String>(&["INFO", "replication"]).contains("link_status:up");
    tokio::task::block_in_place(|| wait_until("the replica is in sync", in_sync));
    // It is told to fail over: a busy machine should not make it do so once more.
    let config = format!(
        "sentinel monitor main 127.0.0.1 {} 1\nsentinel down-after-milliseconds main 20000\n",
        primary.port
    );
    let options = Options { sentinel: Some(config), ..Options::default() };
    let sentinel = tokio::task::block_in_place(|| RedisServer::start(options));
    let knows_replica =
        || sentinel.run::<Vec<redis::Value>>(&["SENTINEL", "REPLICAS", "main"]).len() == 1;
    tokio::task::block_in_place(|| wait_until("the Sentinel knows the replica", knows_replica));

    // The first address is of nobody.
    let url =
        format!("redis-sentinel://127.0.0.1:{},127.0.0.1:{}/main", free_port(), sentinel.port);
    let first = primary.port;
    let mut rig = Rig::on_server(primary, &url);
    works(&rig).await;
    // One that hangs costs its time-out once: the ledger, which connects by itself, cannot wait so long.
    let hanging = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = hanging.local_addr().unwrap().port();
    let nodes = format!("127.0.0.1:{port},127.0.0.1:{}", sentinel.port);
    let store = at(&rig, &format!("redis-sentinel://{nodes}/main"));
    store.list(None, 1).await.unwrap();
    assert_eq!(store.spend(&spending("c"), now()).await, Ok(false));

    let store = rig.store();
    let gate = Gate::start(rig.store());
    gate.until("the store is loaded", |gate| gate.directory.status().loaded).await;

    // A failover loses what the replica does not have yet.
    tokio::task::block_in_place(|| rig.server().wait_for(&replica));
    sentinel.run::<()>(&["SENTINEL", "FAILOVER", "main"]);
    let moved = || {
        let (_, port): (String, u16) =
            sentinel.run(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main"]);
        port != first
    };
    tokio::task::block_in_place(|| wait_until("there is a new primary", moved));
    let made = eventually("writes go on", || async { create(&store, "b", "r").await.ok() }).await;
    gate.until("the write on the new primary is in force", |gate| gate.shows(&made)).await;
    let on_new: i64 = replica.run(&["EXISTS", &rig.entry_key(&made.principal)]);
    assert_eq!(on_new, 1);
}

#[tokio::test]
async fn forgetful_servers_are_warned_about() {
    let rig = rig(Options::default(), RedisServer::url);
    let warnings = rig.store().warnings().await;
    assert!(warnings.iter().any(|w| w.contains("append-only file")), "{warnings:?}");
    let durable = Options { aof: true, ..Options::default() };
    let rig = self::rig(durable, RedisServer::url);
    let warnings = rig.store().warnings().await;
    assert!(!warnings.iter().any(|w| w.contains("Redis")), "{warnings:?}");
    rig.run::<()>(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru", "appendfsync", "everysec"]);
    let warnings = rig.store().warnings().await;
    assert!(warnings.iter().any(|w| w.contains("evict")), "{warnings:?}");
    assert!(warnings.iter().any(|w| w.contains("everysec")), "{warnings:?}");
    rig.run::<()>(&["CONFIG", "SET", "maxmemory-policy", "noeviction", "appendfsync", "always"]);
    let redis = RedisConfig { wait_replicas: 1, ..RedisConfig::default() };
    let warnings = rig.written_by(redis).warnings().await;
    assert!(warnings.len() == 1 && warnings[0].contains("wait_replicas"), "{warnings:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_seen_is_told_once() {
    let rig = Rig::scriptless().await;
    let warnings = rig.ready().await.warnings().await;
    assert!(
        warnings.len() == 1 && warnings[0].contains("does not let this user see"),
        "{warnings:?}"
    );
}
