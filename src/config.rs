//! Settings: typed, with their defaults. [`load`] reads file, environment and flags; every problem is
//! reported at once with its key path.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

use crate::client::ClientTls;
use crate::directory::TokenRules;
use crate::entry::{Name, Realm, Seed};
use crate::policy::{Mode, Policy, Route, SimilarPaths};
use crate::store::Quota;

mod headers;
mod listeners;
pub mod load;
mod peers;
mod reader;
mod remote;
mod restart;
mod routes;
mod store;
mod throttle;
mod tokens;
pub mod warnings;

/// Where a listener listens, or an upstream is reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// An IP address and port.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl std::fmt::Display for Address {
    /// As in the configuration.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Certificate and key of a listener, as PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The chain, the listener's own certificate first.
    pub cert_file: PathBuf,
    /// Its private key.
    pub key_file: PathBuf,
}

/// TLS of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenTls {
    /// What it shows to clients.
    pub files: TlsFiles,
    /// CA certificates, PEM: clients must show a certificate that one of them signed. `None`: none is
    /// asked for.
    pub client_ca_file: Option<PathBuf>,
}

impl From<TlsFiles> for ListenTls {
    /// Asks clients for nothing.
    fn from(files: TlsFiles) -> Self {
        Self { files, client_ca_file: None }
    }
}

/// Owner alone may connect to the Unix socket of a listener, unless set otherwise.
pub const UNIX_MODE: u32 = 0o600;

/// One address of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Where.
    pub address: Address,
    /// TLS with ALPN `h2` and `http/1.1`; `None`: plain.
    pub tls: Option<ListenTls>,
    /// HTTP/2 by prior knowledge on a plain listener, beside HTTP/1.1.
    pub h2c: bool,
    /// Peers that may connect; empty: any. Says nothing about Unix sockets.
    pub allow_from: Vec<IpNet>,
    /// Permissions of a Unix socket's file.
    pub unix_mode: u32,
}

impl Listen {
    /// Plain HTTP/1.1 for everybody.
    #[must_use]
    pub fn at(address: Address) -> Self {
        Self { address, tls: None, h2c: false, allow_from: Vec::new(), unix_mode: UNIX_MODE }
    }
}

/// Bounds of every connection of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Open connections of all addresses of the listener together.
    pub max_connections: usize,
    /// Open connections of one source, an IPv4 address or an IPv6 network of 64 bits; trusted proxies
    /// and Unix sockets are not counted. `None`: any.
    pub max_connections_per_source: Option<usize>,
    /// Longest time from a connection's (or, kept alive, a request's) first byte to the end of its
    /// head, TLS handshake included.
    pub head_timeout: Duration,
    /// Longest time that a kept-alive connection stays idle. Longer than proxies and client libraries keep
    /// theirs (nginx and load balancers 60 seconds, Go and hyper 90): whoever closes first never meets a
    /// request that is on its way.
    pub keepalive_timeout: Duration,
    /// Longest wait for the next bytes of a request's body.
    pub body_timeout: Duration,
    /// Longest wait for the client to take bytes.
    pub write_timeout: Duration,
    /// Least bytes a second that a client sends of a request's body, or takes of what is sent to it,
    /// averaged over the time that it lets us wait beyond `body_timeout` or `write_timeout`; `None`:
    /// any.
    pub min_body_rate: Option<NonZeroU32>,
    /// Largest head, in bytes: request line and headers.
    pub max_head_bytes: usize,
    /// Most headers of a request.
    pub max_headers: usize,
    /// Largest request body, in bytes; `None`: any.
    pub max_body_bytes: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 10_000,
            max_connections_per_source: Some(1_000),
            head_timeout: Duration::from_secs(15),
            keepalive_timeout: Duration::from_secs(120),
            body_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(60),
            min_body_rate: NonZeroU32::new(100),
            max_head_bytes: 64 << 10,
            max_headers: 100,
            max_body_bytes: None,
        }
    }
}

/// Protocol towards an upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum UpstreamHttp {
    /// HTTP/1.1.
    #[default]
    Http1,
    /// HTTP/2: by ALPN over TLS, by prior knowledge otherwise.
    Http2,
    /// Over TLS whichever ALPN chooses, HTTP/1.1 otherwise.
    Auto,
}

/// TLS towards an upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamTls {
    /// The name that its certificate must bear, also sent as SNI; never empty.
    pub server_name: String,
    /// Certificates that may have signed it, PEM; `None`: the system's.
    pub ca_file: Option<PathBuf>,
}

/// One upstream server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Host (DNS name or IP address) and port.
    Host(String, u16),
    /// A Unix socket.
    Unix(PathBuf),
}

/// A group of equal upstream servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// At least one.
    pub targets: Vec<Target>,
    /// Protocol, the same for all.
    pub http: UpstreamHttp,
    /// `None`: plain.
    pub tls: Option<UpstreamTls>,
}

/// Time-outs and checks towards upstreams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UpstreamTimeouts {
    /// Longest time to connect, TLS included.
    pub connect: Duration,
    /// Longest wait for the upstream's next bytes; not for upgraded connections.
    pub read: Duration,
    /// Longest wait for the upstream to take bytes.
    pub write: Duration,
    /// Idle connections are closed after this; shorter than the upstream's own keep-alive.
    pub idle: Duration,
    /// Longest silence in both directions of an upgraded connection or a gRPC stream.
    pub stream_idle: Duration,
}

impl Default for UpstreamTimeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(3),
            read: Duration::from_secs(60),
            write: Duration::from_secs(60),
            idle: Duration::from_secs(55),
            stream_idle: Duration::from_secs(3600),
        }
    }
}

/// How upstream servers are looked after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// Time between two checks; `None`: no checks.
    pub interval: Option<Duration>,
    /// Path that must answer 2xx or 3xx to `GET`; `None`: connecting is enough.
    pub path: Option<String>,
    /// Time between two look-ups of DNS names.
    pub dns_interval: Duration,
}

impl Default for HealthCheck {
    fn default() -> Self {
        Self {
            interval: Some(Duration::from_secs(5)),
            path: None,
            dns_interval: Duration::from_secs(10),
        }
    }
}

/// A peer whose word on where requests come from is taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TrustedPeer {
    /// One with an address in this network.
    Network(IpNet),
    /// One that is let into the listener's Unix socket.
    Unix,
}

/// `[proxy]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyConfig {
    /// Empty: off.
    pub listen: Vec<Listen>,
    /// Index 0 is `proxy.upstream`; further ones belong to routes. Empty only if `listen` is.
    pub upstreams: Vec<Upstream>,
    /// For routes without their own.
    pub mode: Mode,
    /// What happens to paths that some servers take for a route's.
    pub similar_paths: SimilarPaths,
    /// Peers whose `X-Forwarded-*`, `Forwarded` and `X-Request-Id` are kept.
    pub trusted_proxies: Vec<TrustedPeer>,
    /// Bounds towards callers.
    pub limits: Limits,
    /// Bounds towards upstreams.
    pub timeouts: UpstreamTimeouts,
    /// Health checks and DNS.
    pub health: HealthCheck,
    /// Worker threads, which serve proxy and API; `None`: one a core.
    pub threads: Option<usize>,
}

/// The largest request body of the API, unless set otherwise: Django's own bound.
pub const API_MAX_BODY_BYTES: u64 = 2_621_440;

/// `[api]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiConfig {
    /// Empty: off.
    pub listen: Vec<Listen>,
    /// Proxies that may ask for decisions, and whose word on where a request comes from is taken.
    pub trusted_proxies: Vec<TrustedPeer>,
    /// Hosts that requests may name, in lower case; empty: any.
    pub allowed_hosts: Vec<String>,
    /// Whether seeds show in lists and single entries.
    pub reveal_seeds: bool,
    /// How long a rotated seed is accepted beside the new one, unless the request says.
    pub rotate_overlap: Duration,
    /// Bounds towards callers.
    pub limits: Limits,
}

/// `[ops]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpsConfig {
    /// Empty: off.
    pub listen: Vec<Listen>,
    /// Bounds towards callers.
    pub limits: Limits,
}

/// `[store]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreConfig {
    /// Where entries are kept.
    pub url: crate::store::url::StoreUrl,
    /// Contents not proven current for longer are refused.
    pub max_stale: Duration,
    /// Which entries gates have in memory.
    pub hold: crate::directory::Hold,
    /// Before every key in Redis.
    pub prefix: String,
    /// How Redis is written to.
    pub redis: RedisConfig,
    /// Whether entries are sealed.
    pub sealing: Sealing,
    /// CA certificates of `rediss://`, PEM; `None`: the system's.
    pub ca_file: Option<PathBuf>,
    /// Client certificate and key for `rediss://`.
    pub client_tls: Option<TlsFiles>,
}

/// `[remote]`: another server that says whether claims are true, in place of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteConfig {
    /// Its API: `https://...`, `http://...` or `unix:/PATH`.
    pub url: String,
    /// Who the gate is there.
    pub name: Name,
    /// In which realm, which may verify.
    pub realm: Realm,
    /// What its tokens are made of.
    pub seed: Seed,
    /// Certificates towards the server.
    pub tls: ClientTls,
    /// Longest time until a claim is decided.
    pub timeout: Duration,
    /// The gate is not ready if the server has not confirmed for longer that it may verify.
    pub max_stale: Duration,
    /// Most questions at the same time; further ones wait for their turn.
    pub max_in_flight: usize,
    /// Most claims that are remembered once they are confirmed; 0: none.
    pub cache_entries: usize,
}

/// How Redis is written to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisConfig {
    /// By scripts or by transactions.
    pub writes: RedisWrites,
    /// How many replicas must have a change of entries before it is acknowledged; 0: none.
    pub wait_replicas: u32,
    /// How long they may take.
    pub wait_timeout: Duration,
}

impl Default for RedisConfig {
    fn default() -> Self {
        let wait_timeout = Duration::from_secs(1);
        Self { writes: RedisWrites::Auto, wait_replicas: 0, wait_timeout }
    }
}

/// How that is done in Redis which must be done at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedisWrites {
    /// By scripts, until the server says that it has none for this user.
    Auto,
    /// By Lua scripts.
    Scripts,
    /// By `WATCH`, `MULTI` and `EXEC`.
    Transactions,
}

/// How stored entries are sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sealing {
    /// Not at all.
    Off,
    /// With the key in a file; made beside a new SQLite file if it is absent and `make` is set.
    KeyFile {
        /// The writing key.
        path: PathBuf,
        /// Keys that still open.
        old: Vec<PathBuf>,
        /// Whether an absent key file is made.
        make: bool,
    },
}

/// `[realms]`: the realms with powers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReservedRealms {
    /// Its principals manage entries.
    pub admin: Realm,
    /// Its principals verify others.
    pub auth: Realm,
}

/// `[headers]`: names in lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderNames {
    /// Carries the claimed name.
    pub name: http::HeaderName,
    /// Carries the claimed realm.
    pub realm: http::HeaderName,
    /// Carries the token.
    pub token: http::HeaderName,
    /// Carries the proven name to the upstream.
    pub identity_name: http::HeaderName,
    /// Carries the proven realm to the upstream.
    pub identity_realm: http::HeaderName,
    /// Carries `name@realm` to the upstream; `None`: not sent.
    pub identity_principal: Option<http::HeaderName>,
}

impl HeaderNames {
    /// Those that carry a claim: name, realm, token.
    #[must_use]
    pub fn credentials(&self) -> [&http::HeaderName; 3] {
        [&self.name, &self.realm, &self.token]
    }

    /// Those that say who is proven.
    pub fn identity(&self) -> impl Iterator<Item = &http::HeaderName> {
        [&self.identity_name, &self.identity_realm].into_iter().chain(&self.identity_principal)
    }

    /// Both; some may be there twice.
    pub fn protected(&self) -> impl Iterator<Item = &http::HeaderName> {
        self.credentials().into_iter().chain(self.identity())
    }
}

impl Default for HeaderNames {
    fn default() -> Self {
        let name = http::HeaderName::from_static;
        Self {
            name: name("x-auth-name"),
            realm: name("x-auth-realm"),
            token: name("x-auth-token"),
            identity_name: name("x-auth-name"),
            identity_realm: name("x-auth-realm"),
            identity_principal: None,
        }
    }
}

/// `[throttle]`: how often tokens may be wrong (RFC 4226 section 7.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThrottleConfig {
    /// Whether anybody ever has to wait.
    pub enabled: bool,
    /// Of one name, from one source.
    pub per_source: Quota,
    /// Of one name, from all sources that have not proved themselves under it lately.
    pub per_entry: Quota,
    /// From one source, of all names under which it has not proved itself lately.
    pub per_address: Quota,
    /// What `lately` means.
    pub remember_success: Duration,
}

impl Default for ThrottleConfig {
    fn default() -> Self {
        let quota = |failures, seconds| Quota { failures, per: Duration::from_secs(seconds) };
        Self {
            enabled: true,
            per_source: quota(10, 10 * 60),
            per_entry: quota(100, 6 * 3600),
            per_address: quota(50, 10 * 60),
            remember_success: Duration::from_secs(30 * 24 * 3600),
        }
    }
}

/// Form of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Where audit events go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AuditTo {
    /// Among the other lines, in their form.
    #[default]
    Stderr,
    /// Standard output, as JSON.
    Stdout,
    /// The end of a file, as JSON.
    File(PathBuf),
}

/// `[log]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// A level, or `tracing` directives such as `info,otpgate=debug`. Audit events do not depend on it.
    pub level: String,
    /// Text or JSON.
    pub format: LogFormat,
    /// Whether every request gets an access line.
    pub access: bool,
    /// Where audit events go.
    pub audit: AuditTo,
}

/// How the process stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShutdownConfig {
    /// Time between `/readyz` turning red and listeners closing.
    pub delay: Duration,
    /// Longest time that accepted requests may take to finish after that.
    pub grace: Duration,
    /// Longest time that WebSockets, event streams and gRPC calls may live on after listeners closed; never beyond
    /// `grace`.
    pub streams: Duration,
    /// Longest time in which a successor must be ready.
    pub upgrade_timeout: Duration,
}

/// `[process]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessConfig {
    /// Whether a crash may leave a core file, and debuggers may attach: both show every seed.
    pub core_dumps: bool,
}

/// `[reload]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReloadConfig {
    /// Time between two looks at the files that settings come from; `None`: only SIGHUP has them read
    /// again.
    pub watch: Option<Duration>,
}

/// All settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The gate.
    pub proxy: ProxyConfig,
    /// Management and verify.
    pub api: ApiConfig,
    /// Health and metrics.
    pub ops: OpsConfig,
    /// Where entries are; means nothing beside `remote`.
    pub store: StoreConfig,
    /// Who says whether claims are true, if that is not for a store to say.
    pub remote: Option<RemoteConfig>,
    /// How tokens are checked.
    pub rules: TokenRules,
    /// Realms with powers.
    pub realms: ReservedRealms,
    /// Header names.
    pub headers: HeaderNames,
    /// Failed attempts.
    pub throttle: ThrottleConfig,
    /// Logging.
    pub log: LogConfig,
    /// Stopping.
    pub shutdown: ShutdownConfig,
    /// When settings are read again.
    pub reload: ReloadConfig,
    /// The process itself.
    pub process: ProcessConfig,
    /// `[[route]]`s in the order of the file.
    pub routes: Vec<Route>,
}

impl Config {
    /// Who may pass where.
    #[must_use]
    pub fn policy(&self) -> Policy {
        Policy::new(self.routes.clone())
            .with_similar_paths(self.proxy.similar_paths)
            .with_mode(self.proxy.mode)
    }
}
