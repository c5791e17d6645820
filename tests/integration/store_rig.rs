//! Stores of every kind behind one interface, for tests that all kinds must pass unchanged.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use otpgate::clock::SystemClock;
use otpgate::config::{RedisConfig, Sealing, StoreConfig};
use otpgate::entry::{Entry, EntryId, Principal, Seed};
use otpgate::seal::Sealer;
use otpgate::store::url::StoreUrl;
use otpgate::store::{Feed, Position, Row, Step, Store, StoreError, Stored, Version};
use serde_json::Value;
use tempfile::TempDir;

/// Each of `tests`, functions that take a [`Rig`], on every kind of store that is named: a module a
/// kind.
macro_rules! on_stores {
    ([$($kind:ident),+] $tests:tt) => {
        $(on_stores!(@one $kind $tests);)+
    };
    (@one $kind:ident [$($test:ident),+ $(,)?]) => {
        mod $kind {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                super::$test($crate::store_rig::Rig::$kind().await).await;
            })+
        }
    };
}

use crate::harness::otpgate;
use crate::redis_server::{LIMIT, Options, RedisCluster, RedisServer, command};

/// One place where entries are kept.
pub(crate) struct Rig {
    pub(crate) config: StoreConfig,
    pub(crate) place: Place,
    /// As it was given, with a password if there is one.
    url: String,
    dir: Dir,
}

/// Where a rig keeps its files.
enum Dir {
    Own(TempDir),
    /// Another process's.
    Given(PathBuf),
}

impl Dir {
    fn new() -> Self {
        Self::Own(tempfile::tempdir().expect("a directory"))
    }

    fn path(&self) -> &Path {
        match self {
            Self::Own(dir) => dir.path(),
            Self::Given(dir) => dir,
        }
    }
}

pub(crate) enum Place {
    Sqlite(PathBuf),
    Redis(Box<RedisServer>),
    Cluster(Arc<RedisCluster>),
}

impl Rig {
    /// A file that does not exist yet.
    pub(crate) async fn sqlite() -> Self {
        Self::sqlite_in(Dir::new())
    }

    /// The SQLite store that another process's rig keeps in `dir`.
    pub(crate) fn in_directory(dir: &Path) -> Self {
        Self::sqlite_in(Dir::Given(dir.to_owned()))
    }

    fn sqlite_in(dir: Dir) -> Self {
        let file = dir.path().join("store.db");
        Self::at(&format!("sqlite:{}", file.display()), Place::Sqlite(file), dir)
    }

    /// An empty server of its own, which keeps what it acknowledged.
    pub(crate) async fn redis() -> Self {
        let options = Options { aof: true, ..Options::default() };
        let server = tokio::task::block_in_place(|| RedisServer::start(options));
        let dir = Dir::new();
        Self::at(&server.url(), Place::Redis(Box::new(server)), dir)
    }

    /// A Redis as some hosters run it: without scripts and `CONFIG`.
    pub(crate) async fn scriptless() -> Self {
        let mut args = Vec::new();
        for command in ["EVAL", "EVALSHA", "SCRIPT", "CONFIG"] {
            args.extend(["--rename-command", command, ""].map(str::to_owned));
        }
        let options = Options { aof: true, args, ..Options::default() };
        let server = tokio::task::block_in_place(|| RedisServer::start(options));
        let url = server.url();
        Self::on_server(server, &url)
    }

    /// A Valkey of its own.
    pub(crate) async fn valkey() -> Self {
        let options = Options { aof: true, valkey: true, ..Options::default() };
        let server = tokio::task::block_in_place(|| RedisServer::start(options));
        let url = server.url();
        Self::on_server(server, &url)
    }

    /// Any server, reached at `url`.
    pub(crate) fn on_server(server: RedisServer, url: &str) -> Self {
        Self::at(url, Place::Redis(Box::new(server)), Dir::new())
    }

    /// The cluster at `url`, whose nodes the test itself holds.
    pub(crate) fn on_cluster(url: &str) -> Self {
        let nodes = Vec::new();
        Self::at(url, Place::Cluster(Arc::new(RedisCluster { nodes })), Dir::new())
    }

    /// The port of the server, where there is just one.
    pub(crate) fn port(&self) -> u16 {
        match &self.place {
            Place::Redis(server) => server.port,
            _ => panic!("not a single Redis"),
        }
    }

    /// A prefix of its own in the shared cluster.
    pub(crate) async fn cluster() -> Self {
        let cluster = tokio::task::block_in_place(RedisCluster::shared);
        let dir = Dir::new();
        Self::at(&cluster.url(), Place::Cluster(cluster), dir)
    }

    fn at(url: &str, place: Place, dir: Dir) -> Self {
        let config = StoreConfig {
            url: StoreUrl::parse(url).expect("a store URL"),
            max_stale: Duration::from_secs(15),
            hold: Default::default(),
            prefix: format!("test-{:016x}", rand::random::<u64>()),
            redis: RedisConfig::default(),
            sealing: key_file(&dir, "sealing.key"),
            ca_file: None,
            client_tls: None,
        };
        Self { config, place, url: url.to_owned(), dir }
    }

    /// Another process's view of the place: nothing is shared in memory.
    pub(crate) fn store(&self) -> Store {
        Store::open(&self.config).expect("the settings are good")
    }

    /// The store, made if it is not there yet.
    pub(crate) async fn ready(&self) -> Store {
        let store = self.store();
        store.init().await.expect("the store can be made");
        store
    }

    /// The same place, written to otherwise.
    pub(crate) fn written_by(&self, redis: RedisConfig) -> Store {
        Store::open(&StoreConfig { redis, ..self.config.clone() }).expect("settings are good")
    }

    /// The same place, seen with another sealing key.
    pub(crate) fn with_other_key(&self) -> Store {
        self.with_sealing(self.keys("other.key", &[]))
    }

    /// The same place, sealed otherwise.
    pub(crate) fn with_sealing(&self, sealing: Sealing) -> Store {
        Store::open(&StoreConfig { sealing, ..self.config.clone() }).expect("settings are good")
    }

    /// Key files of these names, made if they are not there; [`Self::store`] has `sealing.key`.
    pub(crate) fn keys(&self, name: &str, old: &[&str]) -> Sealing {
        let path = |name| {
            let Sealing::KeyFile { path, .. } = key_file(&self.dir, name) else { unreachable!() };
            path
        };
        Sealing::KeyFile {
            path: path(name),
            old: old.iter().map(|n| path(n)).collect(),
            make: false,
        }
    }

    /// The place and these keys as settings of the program.
    pub(crate) fn settings(&self, sealing: &Sealing) -> String {
        let StoreConfig { prefix, .. } = &self.config;
        let url = &self.url;
        let sealing = match sealing {
            Sealing::Off => "sealing = 'off'".to_owned(),
            Sealing::KeyFile { path, old, .. } => {
                format!("key_file = {path:?}\nold_key_files = {old:?}")
            }
        };
        format!("[store]\nurl = '{url}'\nprefix = '{prefix}'\n{sealing}\n")
    }

    /// `otpgate store` with these arguments, on this place and with these keys.
    pub(crate) fn command_with(&self, sealing: &Sealing, args: &[&str]) -> Command {
        let config = self.dir.path().join(format!("{:016x}.toml", rand::random::<u64>()));
        std::fs::write(&config, self.settings(sealing)).expect("written");
        let mut command = otpgate();
        command.arg("store").args(args).arg("--config").arg(config);
        command
    }

    /// The same with the place's own key.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        self.command_with(&self.config.sealing, args)
    }

    /// Runs such a command to its end.
    pub(crate) fn run_command(&self, args: &[&str]) -> Output {
        let mut command = self.command(args);
        tokio::task::block_in_place(|| command.output().expect("the program runs"))
    }

    /// A file's path beside the store's.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Loses all contents behind the store's back.
    pub(crate) fn empty(&self) {
        match &self.place {
            Place::Sqlite(file) => {
                for suffix in ["", "-wal", "-shm"] {
                    let _ = std::fs::remove_file(format!("{}{suffix}", file.display()));
                }
            }
            Place::Redis(server) => server.run(&["FLUSHALL"]),
            Place::Cluster(_) => {
                let keys: Vec<String> = self.run(&["KEYS", &format!("{}*", self.key(""))]);
                if !keys.is_empty() {
                    let words: Vec<_> =
                        std::iter::once("DEL").chain(keys.iter().map(String::as_str)).collect();
                    self.run::<()>(&words);
                }
            }
        }
    }

    /// Forgets all records of the log but the last `keep`.
    pub(crate) fn trim_log(&self, keep: usize) {
        match &self.place {
            Place::Sqlite(_) => {
                let sql = "DELETE FROM log WHERE version <= (SELECT max(version) FROM log) - ?1";
                self.sqlite_file().execute(sql, [keep]).expect("trimmed");
            }
            _ => self.run(&["XTRIM", &self.key("log"), "MAXLEN", &keep.to_string()]),
        }
    }

    /// Exchanges what is stored for two principals.
    pub(crate) fn swap(&self, a: &Principal, b: &Principal) {
        match &self.place {
            Place::Sqlite(_) => {
                let conn = self.sqlite_file();
                let blob = |who: &Principal| -> Vec<u8> {
                    let sql = "SELECT blob FROM entries WHERE realm = ?1 AND name = ?2";
                    conn.query_row(sql, [who.realm.as_str(), who.name.as_str()], |row| row.get(0))
                        .expect("the entry is there")
                };
                for (who, blob) in [(a, blob(b)), (b, blob(a))] {
                    let sql = "UPDATE entries SET blob = ?3 WHERE realm = ?1 AND name = ?2";
                    conn.execute(sql, (who.realm.as_str(), who.name.as_str(), blob)).expect("set");
                }
            }
            _ => {
                let [a, b] = [a, b].map(|who| self.entry_key(who));
                self.run::<()>(&["RENAME", &a, &self.key("swap")]);
                self.run::<()>(&["RENAME", &b, &a]);
                self.run::<()>(&["RENAME", &self.key("swap"), &b]);
            }
        }
    }

    /// Everything that is stored, as raw bytes.
    pub(crate) fn dump(&self) -> Vec<u8> {
        match &self.place {
            Place::Sqlite(file) => ["", "-wal"]
                .iter()
                .flat_map(|end| std::fs::read(format!("{}{end}", file.display())).expect("read"))
                .collect(),
            _ => {
                let keys: Vec<String> = self.run(&["KEYS", &format!("{}*", self.key(""))]);
                let keys = keys.iter().filter(|key| key.contains(":e:"));
                keys.flat_map(|key| self.run::<Vec<u8>>(&["GET", key])).collect()
            }
        }
    }

    /// A connection to the file beside the store's own.
    pub(crate) fn sqlite_file(&self) -> rusqlite::Connection {
        let Place::Sqlite(file) = &self.place else { panic!("not an SQLite store") };
        rusqlite::Connection::open(file).expect("it opens")
    }

    /// The server, where there is just one.
    pub(crate) fn server(&mut self) -> &mut RedisServer {
        let Place::Redis(server) = &mut self.place else { panic!("not a single Redis") };
        server
    }

    /// Sends a command to the server that has the store's keys.
    pub(crate) fn run<T: redis::FromRedisValue>(&self, words: &[&str]) -> T {
        let server = match &self.place {
            Place::Redis(server) => server,
            Place::Cluster(cluster) => cluster.owner(&self.key("meta")),
            Place::Sqlite(_) => panic!("not a Redis store"),
        };
        command(words).query(&mut server.admin()).unwrap_or_else(|e| panic!("{words:?}: {e}"))
    }

    /// Sets a key of Redis to any bytes.
    pub(crate) fn set(&self, key: &str, value: &[u8]) {
        let server = match &self.place {
            Place::Redis(server) => server,
            Place::Cluster(cluster) => cluster.owner(key),
            Place::Sqlite(_) => panic!("not a Redis store"),
        };
        redis::cmd("SET").arg(key).arg(value).exec(&mut server.admin()).expect("it is set");
    }

    /// A key of the store in Redis.
    pub(crate) fn key(&self, name: &str) -> String {
        format!("{{{}}}:{name}", self.config.prefix)
    }

    /// The key of an entry with an ASCII name.
    pub(crate) fn entry_key(&self, who: &Principal) -> String {
        self.key(&format!("e:{}/{}", who.realm, who.name))
    }
}

/// `otpgate store verify` of a store and of gates, given by their ops addresses: whether all of them hold the
/// same, and the report.
pub(crate) fn verify(rig: &Rig, gates: &[&str]) -> (bool, Value) {
    let mut args = vec!["verify", "--json"];
    for gate in gates {
        args.extend(["--gate", gate]);
    }
    let output = rig.run_command(&args);
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!(report["ok"].as_bool(), Some(output.status.success()), "{report}");
    (output.status.success(), report)
}

fn key_file(dir: &Dir, name: &str) -> Sealing {
    let path = dir.path().join(name);
    if !path.exists() {
        std::fs::write(&path, Sealer::random_key().as_bytes()).expect("written");
    }
    Sealing::KeyFile { path, old: Vec::new(), make: false }
}

/// A principal.
pub(crate) fn who(name: &str, realm: &str) -> Principal {
    Principal::parse(name, realm).expect("a good name and realm")
}

/// An entry with a random seed.
pub(crate) fn entry(id: u64, principal: Principal) -> Entry {
    Entry::new(EntryId(id), principal, Seed::random(), 1_700_000_000)
}

/// What a store should give for an entry.
pub(crate) fn stored(entry: &Entry, revision: Version) -> Stored {
    let (id, principal) = (entry.id, entry.principal.clone());
    Stored { id, principal, revision, entry: Ok(entry.clone()) }
}

/// An entry that should be readable.
pub(crate) fn opened(stored: &Stored) -> &Entry {
    stored.entry.as_ref().expect("it opens")
}

/// Creates an entry with a random seed.
pub(crate) async fn create(store: &Store, name: &str, realm: &str) -> Result<Entry, StoreError> {
    let principal = who(name, realm);
    let make = |id| Entry::new(id, principal, Seed::random(), 1_700_000_000);
    store.create(make).await.map(|(entry, _)| entry)
}

/// A follower by hand.
pub(crate) struct Follow {
    pub(crate) feed: Box<dyn Feed>,
    pub(crate) position: Position,
}

impl Follow {
    /// Connects and loads everything.
    pub(crate) async fn start(store: &Store) -> (Self, Vec<Row>) {
        let mut feed = store.feed(Arc::new(SystemClock)).await.expect("it connects");
        let mut rows = Vec::new();
        let position = feed.load(&mut |row| rows.push(row)).await.expect("it loads");
        (Self { feed, position }, rows)
    }

    /// Goes on with another connection from where it is.
    pub(crate) async fn reconnect(&mut self, store: &Store) {
        self.feed = store.feed(Arc::new(SystemClock)).await.expect("it connects");
    }

    /// The changes up to now; `Err` with the reason if the place is lost.
    pub(crate) async fn changes(&mut self) -> Result<Vec<(Principal, Option<Row>)>, &'static str> {
        let mut changes = Vec::new();
        loop {
            let poll = tokio::time::timeout(LIMIT, self.feed.poll(&self.position)).await;
            match poll.expect("polls end in bounded time").expect("the store answers") {
                Step::Changed { rows, position, .. } => {
                    changes.extend(rows);
                    self.position = position;
                }
                Step::Current { .. } => return Ok(changes),
                Step::Lost(why) => return Err(why),
            }
        }
    }
}
