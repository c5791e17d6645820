//! Redis users that may do no more than the operations manual says.

use std::time::Duration;

use otpgate::clock::SystemClock;
use otpgate::config::{RedisConfig, StoreConfig};
use otpgate::entry::{Entry, Seed};
use otpgate::store::url::StoreUrl;
use otpgate::store::{Store, StoreError, Stored};

use crate::harness::{ALICE, Sandbox, eventually, token, wrong_token};
use crate::peers::echo::Echo;
use crate::redis_server::{Options, RedisServer, command};
use crate::store_redis::{all_works, marks_work};
use crate::store_rig::{Follow, Place, Rig, create, entry, who};

/// What the manual gives to `user`: by scripts, then by transactions.
fn rights(user: &str) -> [Vec<&'static str>; 2] {
    let manual = include_str!("../../docs/operations.md");
    let start = format!("ACL SETUSER {user} on >PASSWORD ");
    let lines = manual.lines().filter_map(|line| line.trim().strip_prefix(&start));
    let lines: Vec<_> = lines.map(|rights| rights.split(' ').collect()).collect();
    lines.try_into().expect("two lines")
}

fn may(server: &RedisServer, user: &str, rights: &[&str]) {
    let mut words = vec!["ACL", "SETUSER", user, "reset", "on", ">pw"];
    words.extend(rights);
    server.run::<()>(&words);
}

/// The store as `user` sees it.
fn seen_by(rig: &Rig, user: &str, redis: RedisConfig) -> Store {
    let url = StoreUrl::parse(&format!("redis://{user}:pw@127.0.0.1:{}", rig.port())).unwrap();
    Store::open(&StoreConfig { url, redis, ..rig.config.clone() }).unwrap()
}

async fn start(valkey: bool) -> Rig {
    let options = Options { valkey, ..Options::default() };
    let server = tokio::task::block_in_place(|| RedisServer::start(options));
    let url = server.url();
    let mut rig = Rig::on_server(server, &url);
    rig.config.prefix = "otpgate".into();
    rig
}

/// What a gate without an api does, index mode included.
async fn follows(store: &Store, admin: &Store, name: &str) {
    let (mut follow, _) = Follow::start(store).await;
    let made = create(admin, name, "r").await.unwrap();
    assert_eq!(follow.changes().await.unwrap().len(), 1);
    let row = store.get_since((&made.principal).into(), &follow.position).await.unwrap().unwrap();
    assert_eq!(store.unseal(&row), Ok(made.clone()));
    let mut names = Vec::new();
    let mut feed = store.feed(std::sync::Arc::new(SystemClock)).await.unwrap();
    feed.load_names(&mut |name| names.push(name.to_owned())).await.unwrap();
    assert!(names.contains(&format!("r/{name}")));
    let warnings = store.warnings().await;
    assert!(!warnings.iter().any(|warning| warning.contains("cannot see how")), "{warnings:?}");
}

/// That `user` cannot change what is stored, whatever it sends.
async fn cannot_write(rig: &Rig, user: &str, there: &Stored) {
    let store = seen_by(rig, user, RedisConfig::default());
    let refused = |error: StoreError, what: &str| {
        assert!(matches!(error, StoreError::Denied(_)), "{user} {what}: {error}");
    };
    refused(create(&store, "new", "r").await.unwrap_err(), "creates");
    refused(store.insert(&[entry(99, who("new", "r"))]).await.unwrap_err(), "inserts");
    refused(store.delete(there).await.unwrap_err(), "deletes");

    let key = rig.entry_key(&there.principal);
    let before: (u64, Vec<u8>) = (rig.run(&["XLEN", &rig.key("log")]), rig.run(&["GET", &key]));
    let client = redis::Client::open(format!("redis://{user}:pw@127.0.0.1:{}", rig.port()));
    let mut conn = client.unwrap().get_connection().unwrap();
    let set = "return redis.call('SET', ARGV[1], 'x')";
    for words in [
        &["SET", &key, "x"][..],
        &["DEL", &key],
        &["UNLINK", &key],
        &["RENAME", &key, &rig.key("u:x")],
        &["COPY", &key, &rig.key("u:x")],
        &["SADD", &rig.key("new"), "x"],
        &["PEXPIRE", &key, "1"],
        &["XADD", &rig.key("log"), "*", "n", "x"],
        &["HSET", &rig.key("head"), "v", "1000000"],
        &["SET", &rig.key("meta"), "x"],
        &["EVAL", set, "0", &key],
        &["EVAL", set, "1", &key, &key],
        &["EVAL", set, "1", &rig.key("u:x"), &rig.key("meta")],
        &["FLUSHALL"],
        &["CONFIG", "SET", "maxmemory", "1"],
        &["ACL", "SETUSER", user, "+@all"],
        &["SET", "elsewhere", "x"],
        &["GET", "elsewhere"],
    ] {
        let answer = command(words).query::<redis::Value>(&mut conn);
        assert!(answer.is_err(), "{user}: {words:?} {answer:?}");
    }
    assert_eq!(before, (rig.run(&["XLEN", &rig.key("log")]), rig.run(&["GET", &key])));
}

async fn rights_suffice(valkey: bool) {
    let rig = start(valkey).await;
    let Place::Redis(server) = &rig.place else { panic!("not a single Redis") };
    let [scripts, transactions] = rights("manager");
    for (user, rights) in [("manager", scripts), ("transactor", transactions)] {
        may(server, user, &rights);
        let store = seen_by(&rig, user, RedisConfig::default());
        all_works(&store).await;
        follows(&store, &store, &format!("by-{user}")).await;
        let redis = RedisConfig {
            wait_replicas: 1,
            wait_timeout: Duration::from_millis(20),
            ..RedisConfig::default()
        };
        let unknown =
            create(&seen_by(&rig, user, redis), &format!("w-{user}"), "r").await.unwrap_err();
        assert!(unknown.to_string().contains("0 replicas"), "{unknown}");
        rig.empty();
    }

    let admin = rig.ready().await;
    let there = create(&admin, "there", "r").await.unwrap();
    let there = admin.get((&there.principal).into()).await.unwrap().unwrap();
    let [scripts, transactions] = rights("sidecar");
    let is_for_reading = |right: &&str| !right.starts_with('~');
    let readers: Vec<&str> = scripts
        .iter()
        .copied()
        .filter(is_for_reading)
        .take_while(|right| *right != "+time")
        .collect();
    assert!(readers.len() > 5 && readers.len() < scripts.len() - 10);
    may(server, "reader", &readers);
    let reader = seen_by(&rig, "reader", RedisConfig::default());
    follows(&reader, &admin, "seen-by-reader").await;
    cannot_write(&rig, "reader", &there).await;
    for (i, (user, rights)) in [("sidecar", scripts), ("side", transactions)].iter().enumerate() {
        may(server, user, rights);
        let store = seen_by(&rig, user, RedisConfig::default());
        follows(&store, &admin, &format!("seen-by-{user}")).await;
        marks_work(&store, i as u64).await;
        cannot_write(&rig, user, &there).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rights_of_the_manual_suffice_in_redis() {
    rights_suffice(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rights_of_the_manual_suffice_in_valkey() {
    rights_suffice(true).await;
}

/// The real program as a pure sidecar: one-time tokens, throttling, entries that change.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_serves_with_its_rights() {
    let rig = start(false).await;
    let Place::Redis(server) = &rig.place else { panic!("not a single Redis") };
    let admin = rig.written_by(RedisConfig::default());
    admin.init().await.unwrap();
    let made = entry(1, who("alice", "shop"));
    let made = Entry { seed: Seed::parse(ALICE).unwrap(), ..made };
    admin.insert(std::slice::from_ref(&made)).await.unwrap();
    let echo = Echo::start().await;
    for (i, rights) in rights("sidecar").iter().enumerate() {
        let user = format!("sidecar{i}");
        may(server, &user, rights);
        let sandbox = Sandbox::new();
        let store = rig.settings(&rig.config.sealing);
        let store = store.replace("redis://", &format!("redis://{user}:pw@"));
        let settings = format!(
            "{store}[proxy]\nupstream = '{}'\n[api]\nlisten = 'off'\n[totp]\nreuse = 'once'\n",
            echo.address
        );
        let gate = sandbox.serve(&settings).ready().await;
        let status = async |token: &str| {
            gate.call("/", "alice", "shop", token).send().await.unwrap().status().as_u16()
        };
        forget_marks(&rig);
        let good = token(ALICE);
        assert_eq!(status(&good).await, 200, "{}", gate.log_text());
        assert_eq!(status(&good).await, 401);
        for _ in 0..12 {
            status(&wrong_token(ALICE)).await;
        }
        let buckets = || rig.run::<Vec<String>>(&["KEYS", &rig.key("t:*")]).len();
        eventually("failures are counted in the store", || async { (buckets() > 0).then_some(()) })
            .await;
        assert!(!gate.log_text().contains("NOPERM"), "{}", gate.log_text());
    }
}

fn forget_marks(rig: &Rig) {
    for key in rig.run::<Vec<String>>(&["KEYS", &rig.key("[utg]:*")]) {
        rig.run::<()>(&["DEL", &key]);
    }
}
