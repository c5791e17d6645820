//! Real Redis servers on free loopback ports, each in its own directory, killed when dropped.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use otpgate::clock::{Clock, SystemClock};
use redis::ConnectionLike;
use tempfile::TempDir;

/// Where `tests/tools/install` puts it.
const VALKEY: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/target/tools/valkey/usr/bin/valkey-server");

/// Longest wait for anything that a test waits for.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// Waits until `done` holds; says what it waited for if that takes too long.
pub(crate) fn wait_until(what: &str, done: impl FnMut() -> bool) {
    wait_within(LIMIT, what, done);
}

/// As [`wait_until`], for what takes its time by itself.
pub(crate) fn wait_within(limit: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let start = SystemClock.now().monotonic;
    while !done() {
        assert!(start.elapsed() < limit, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A port that nobody listens on right now.
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").port()
}

/// What a server should be like; `Default` is a plain one that keeps nothing.
#[derive(Clone, Default)]
pub(crate) struct Options {
    /// Append-only file with `appendfsync always`.
    pub(crate) aof: bool,
    /// Password of the default user.
    pub(crate) password: Option<String>,
    /// Directory with `ca.pem`, `server.pem` and `server.key`: the port speaks TLS, and asks for
    /// client certificates.
    pub(crate) tls: Option<PathBuf>,
    /// Valkey instead of Redis.
    pub(crate) valkey: bool,
    /// Further arguments, such as `--user …` or `--cluster-enabled yes`.
    pub(crate) args: Vec<String>,
    /// A Sentinel with this configuration instead of a server.
    pub(crate) sentinel: Option<String>,
}

/// A running server.
pub(crate) struct RedisServer {
    child: Option<Child>,
    dir: TempDir,
    options: Options,
    pub(crate) port: u16,
}

impl RedisServer {
    /// Starts a server and waits until it answers.
    pub(crate) fn start(options: Options) -> Self {
        // Somebody else may take the port between looking and listening.
        for _ in 0..5 {
            let dir = tempfile::tempdir().expect("a directory");
            let port = free_port();
            let mut server = Self { child: None, dir, options: options.clone(), port };
            if server.try_spawn() {
                return server;
            }
        }
        panic!("redis-server does not start");
    }

    /// A plain server.
    pub(crate) fn plain() -> Self {
        Self::start(Options::default())
    }

    /// Starts it again on the same port and directory.
    pub(crate) fn restart(&mut self) {
        assert!(self.try_spawn(), "redis-server does not start again");
    }

    /// Kills it as a crash would.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("SIGKILL");
            child.wait().expect("its end");
        }
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: i32) {
        let child = self.child.as_ref().expect("it runs");
        let pid = i32::try_from(child.id()).expect("process ids are small");
        // SAFETY: kill takes two integers; the process is our child and not yet waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Its Unix socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("redis.sock")
    }

    /// Its store URL, without a password.
    pub(crate) fn url(&self) -> String {
        let scheme = if self.options.tls.is_some() { "rediss" } else { "redis" };
        format!("{scheme}://127.0.0.1:{}", self.port)
    }

    /// A connection with all rights, through the Unix socket.
    pub(crate) fn admin(&self) -> redis::Connection {
        self.try_admin().expect("the server answers")
    }

    /// Sends one command with all rights.
    pub(crate) fn run<T: redis::FromRedisValue>(&self, words: &[&str]) -> T {
        command(words).query(&mut self.admin()).unwrap_or_else(|e| panic!("{words:?}: {e}"))
    }

    /// Changes the default user's password and ends all connections.
    pub(crate) fn change_password(&mut self, password: &str) {
        self.run::<()>(&["CONFIG", "SET", "requirepass", password]);
        self.options.password = Some(password.to_owned());
        self.run::<i64>(&["CLIENT", "KILL", "TYPE", "normal"]);
    }

    /// Waits until a replica of this server has all that it has.
    pub(crate) fn wait_for(&self, replica: &Self) {
        let offset = |server: &Self, name: &str| {
            let info: String = server.run(&["INFO", "replication"]);
            info.lines().find_map(|line| line.strip_prefix(name).map(str::to_owned))
        };
        wait_until("the replica has all", || {
            let sent = offset(self, "master_repl_offset:");
            sent.is_some() && sent == offset(replica, "slave_repl_offset:")
        });
    }

    fn try_admin(&self) -> redis::RedisResult<redis::Connection> {
        let mut login = redis::RedisConnectionInfo::default().set_skip_set_lib_name();
        if let Some(password) = &self.options.password {
            login = login.set_password(password);
        }
        let address = redis::ConnectionAddr::Unix(self.socket());
        let info = redis::IntoConnectionInfo::into_connection_info(address)?;
        redis::Client::open(info.set_redis_settings(login))?.get_connection()
    }

    fn try_spawn(&mut self) -> bool {
        let log = std::fs::File::create(self.dir.path().join("out.txt")).expect("a log file");
        let child = self.command().stdout(log).stderr(Stdio::null()).spawn();
        self.child = Some(child.expect("what `tests/tools/install test` brings"));
        let start = SystemClock.now().monotonic;
        loop {
            if self.try_admin().is_ok_and(|mut conn| conn.check_connection()) {
                return true;
            }
            let child = self.child.as_mut().expect("just spawned");
            if child.try_wait().expect("its state").is_some() || start.elapsed() > LIMIT {
                self.kill();
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn command(&self) -> Command {
        let options = &self.options;
        let dir = self.dir.path();
        let mut command = Command::new(if options.valkey { VALKEY } else { "redis-server" });
        if let Some(config) = &options.sentinel {
            let file = dir.join("sentinel.conf");
            std::fs::write(&file, config).expect("its configuration");
            command.arg(file).arg("--sentinel");
        }
        command.arg("--dir").arg(dir).arg("--unixsocket").arg(self.socket());
        command.args(["--bind", "127.0.0.1", "--protected-mode", "no"]);
        let port = self.port.to_string();
        match &options.tls {
            None => command.args(["--port", &port]),
            Some(files) => command
                .args(["--port", "0", "--tls-port", &port])
                .arg("--tls-ca-cert-file")
                .arg(files.join("ca.pem"))
                .arg("--tls-cert-file")
                .arg(files.join("server.pem"))
                .arg("--tls-key-file")
                .arg(files.join("server.key")),
        };
        if options.sentinel.is_none() {
            command.args(["--save", "", "--appendonly", if options.aof { "yes" } else { "no" }]);
            command.args(["--appendfsync", "always", "--repl-diskless-sync-delay", "0"]);
        }
        if let Some(password) = &options.password {
            command.args(["--requirepass", password]);
        }
        command.args(&options.args);
        command
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A command out of words.
pub(crate) fn command(words: &[&str]) -> redis::Cmd {
    let mut command = redis::cmd(words[0]);
    command.arg(&words[1..]);
    command
}

/// Three primaries that share the slots.
pub(crate) struct RedisCluster {
    pub(crate) nodes: Vec<RedisServer>,
}

impl RedisCluster {
    /// The cluster that all tests share that run at the same time: forming one takes seconds.
    pub(crate) fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<RedisCluster>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let cluster = Arc::new(Self::start(&[]));
            *shared = Arc::downgrade(&cluster);
            cluster
        })
    }

    /// A cluster of one's own, with further arguments for its nodes.
    pub(crate) fn start(args: &[&str]) -> Self {
        let nodes: Vec<_> = (0..3).map(|_| Self::start_node(args)).collect();
        for (i, node) in nodes.iter().enumerate() {
            let (first, last) = (16384 * i / 3, 16384 * (i + 1) / 3 - 1);
            node.run::<()>(&["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &last.to_string()]);
            node.run::<()>(&["CLUSTER", "SET-CONFIG-EPOCH", &(i + 1).to_string()]);
        }
        let cluster = Self { nodes };
        cluster.nodes[1..].iter().for_each(|other| cluster.meet(other));
        wait_until("the cluster has formed", || {
            cluster.nodes.iter().all(|node| {
                let info: String = node.run(&["CLUSTER", "INFO"]);
                info.contains("cluster_state:ok") && info.contains("cluster_known_nodes:3")
            })
        });
        cluster
    }

    fn start_node(args: &[&str]) -> RedisServer {
        let bus = free_port().to_string();
        let own = ["--cluster-enabled", "yes", "--cluster-port", &bus];
        let args = [&own, args].concat().into_iter().map(str::to_owned).collect();
        RedisServer::start(Options { args, aof: true, ..Options::default() })
    }

    fn meet(&self, other: &RedisServer) {
        let bus: (String, String) = other.run(&["CONFIG", "GET", "cluster-port"]);
        let port = other.port.to_string();
        self.nodes[0].run::<()>(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus.1]);
    }

    /// A replica of the node with that number, in sync.
    pub(crate) fn add_replica(&self, of: usize) -> RedisServer {
        let replica = Self::start_node(&["--cluster-node-timeout", "800"]);
        self.meet(&replica);
        let primary = &self.nodes[of];
        let id: String = primary.run(&["CLUSTER", "MYID"]);
        wait_until("the replica knows its primary", || {
            command(&["CLUSTER", "REPLICATE", &id]).exec(&mut replica.admin()).is_ok()
        });
        wait_until("the replica is in sync", || {
            primary.run::<String>(&["INFO", "replication"]).contains("state=online")
        });
        let port = replica.port.to_string();
        wait_until("all nodes know the replica", || {
            self.nodes.iter().all(|node| {
                let nodes: String = node.run(&["CLUSTER", "NODES"]);
                nodes.lines().any(|line| line.contains(&port) && line.contains("slave"))
            })
        });
        replica
    }

    /// The number of the node that has `key`.
    pub(crate) fn number_of_owner(&self, key: &str) -> usize {
        let port = self.owner(key).port;
        self.nodes.iter().position(|node| node.port == port).expect("it is one of them")
    }

    /// Its store URL.
    pub(crate) fn url(&self) -> String {
        let nodes: Vec<_> =
            self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port)).collect();
        format!("redis-cluster://{}", nodes.join(","))
    }

    /// The node that has `key`.
    pub(crate) fn owner(&self, key: &str) -> &RedisServer {
        let has =
            |node: &&RedisServer| command(&["EXISTS", key]).query::<i64>(&mut node.admin()).is_ok();
        self.nodes.iter().find(has).expect("one node owns every slot")
    }
}

/// Files of a certificate authority, a server and a client, in `dir`: `ca.pem`, `server.pem`,
/// `server.key`, `client.pem`, `client.key`, and `other-ca.pem` of an unrelated authority.
pub(crate) fn make_certificates(dir: &Path) {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
    let authority = |name: &str| {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        // By default all certificates have one name, and would seem to have signed themselves.
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("a CA")
    };
    let write = |name: &str, text: String| std::fs::write(dir.join(name), text).expect("written");
    let ca = authority("test CA");
    write("ca.pem", ca.pem());
    write("other-ca.pem", authority("other CA").pem());
    for name in ["server", "client"] {
        let key = KeyPair::generate().expect("a key");
        let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        let cert = CertificateParams::new(names).expect("names").signed_by(&key, &ca);
        write(&format!("{name}.pem"), cert.expect("signed").pem());
        write(&format!("{name}.key"), key.serialize_pem());
    }
}
