//! Finds the server to talk to, and connects to it.
//!
//! Every connection is a plain one to a server that says that it is a primary. On a Cluster all keys
//! of a store share one slot, so its owner is all that is needed; this avoids redis-rs's cluster
//! client, its retries and its sharing of blocked connections. With Sentinel, the primary is asked
//! for at every connect and again all the time ([`super::sentinel`]): a primary that was cut off does
//! not know that there is a new one, and would prove old contents current.

use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use redis::aio::MultiplexedConnection;
use redis::io::tcp::{TcpSettings, socket2::TcpKeepalive};
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ErrorKind, IntoConnectionInfo,
    RedisConnectionInfo, RedisError, TlsCertificates, Value,
};

use super::error::store_error;
use super::sentinel::Sentinels;
use crate::clock::{Clock, SystemClock};
use crate::secret::Secret;
use crate::store::StoreError;
use crate::store::url::{Login, RedisUrl, Topology};

/// Longest time to connect to one server, TLS and AUTH included.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long data may stay unacknowledged by the other side's kernel.
const USER_TIMEOUT: Duration = Duration::from_secs(3);
const KEEPALIVE: Duration = Duration::from_secs(5);
/// How often Sentinels are asked whether the primary is still the same. Entries are proven current as of then
/// at most, so it must be well below the shortest `store.max_stale`.
const SENTINEL_INTERVAL: Duration = Duration::from_millis(500);
/// Nodes of a cluster that are remembered beside the configured ones.
const MAX_KNOWN_NODES: usize = 64;

pub(super) type Node = (String, u16);

/// A connection to the primary.
#[derive(Clone)]
pub(super) struct Link {
    pub(super) conn: MultiplexedConnection,
    node: Option<Node>,
    asked: Instant,
}

/// What servers and Sentinels want to see of who connects.
pub struct Access {
    servers: Login,
    /// Without a password, Sentinels are first asked anonymously, then with the servers'.
    sentinels: Login,
    certificates: TlsCertificates,
}

impl Access {
    /// The part of `url` that is a secret or stands beside one, and what TLS needs.
    #[must_use]
    pub fn new(url: &RedisUrl, certificates: TlsCertificates) -> Self {
        let servers = Login { username: url.username.clone(), password: url.password.clone() };
        Self { servers, sentinels: url.sentinel.clone(), certificates }
    }
}

/// Makes connections.
pub(super) struct Connector {
    topology: Topology,
    database: i64,
    tls: bool,
    /// For connections to come.
    access: ArcSwap<Access>,
    /// Any key of the store: says which slot of a cluster it is in.
    slot_key: String,
    /// Where the URL names some.
    sentinels: Option<Sentinels>,
    known: Mutex<Vec<Node>>,
    /// Which of a cluster's nodes to ask first: the one that answered last.
    answered: AtomicUsize,
}

impl Connector {
    pub(super) fn new(url: RedisUrl, certificates: TlsCertificates, slot_key: String) -> Self {
        // redis-rs takes the process's default provider and panics without one; somebody else may
        // have installed it before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let sentinels = match &url.topology {
            Topology::Sentinel { nodes, service } => Some(Sentinels::new(nodes, service)),
            _ => None,
        };
        let (known, answered) = Default::default();
        let access = ArcSwap::from_pointee(Access::new(&url, certificates));
        let RedisUrl { topology, database, tls, .. } = url;
        Self { topology, database, tls, access, slot_key, sentinels, known, answered }
    }

    /// Connections from now on are made with `access`; open ones stay.
    pub(super) fn set_access(&self, access: Access) {
        self.access.store(Arc::new(access));
    }

    /// Connects to the primary; answers on the connection may take `patience`.
    pub(super) async fn connect(&self, patience: Duration) -> Result<Link, StoreError> {
        match &self.topology {
            Topology::Single(host, port) => {
                let node = (host.clone(), *port);
                self.primary(self.address(&node), Some(node), patience).await
            }
            Topology::Unix(path) => {
                self.primary(ConnectionAddr::Unix(path.clone()), None, patience).await
            }
            Topology::Sentinel { .. } => match &self.sentinels {
                Some(sentinels) => self.through_sentinels(sentinels, patience).await,
                None => Err(no_nodes()),
            },
            Topology::Cluster(seeds) => self.slot_owner(seeds, patience).await,
        }
    }

    /// Whether the last time that somebody made sure of the primary of `link` is long ago.
    pub(super) fn must_confirm(&self, link: &Link) -> bool {
        let age = SystemClock.monotonic().saturating_duration_since(link.asked);
        self.sentinels.is_some() && age >= SENTINEL_INTERVAL
    }

    /// Makes sure, if the last time is long ago, that the primary is still the one of `link`.
    ///
    /// # Errors
    /// If it is another one, or too few Sentinels answer: nobody can tell then.
    pub(super) async fn confirm(&self, link: &mut Link) -> Result<(), StoreError> {
        let Some(sentinels) = self.sentinels.as_ref().filter(|_| self.must_confirm(link)) else {
            return Ok(());
        };
        let verdict = sentinels.primary(self, SENTINEL_INTERVAL / 2).await?;
        if !verdict.is_for(link.node.as_ref()) {
            return Err(StoreError::Unreachable("there is a new primary".into()));
        }
        link.asked = verdict.asked;
        Ok(())
    }

    /// Until when what `link` answered at `asked` was certainly an answer of the primary.
    pub(super) fn vouched(&self, link: &Link, asked: Instant) -> Instant {
        if self.sentinels.is_some() { asked.min(link.asked) } else { asked }
    }

    /// What an operator should know about how servers are found.
    pub(super) fn warning(&self) -> Option<String> {
        self.sentinels.as_ref().and_then(Sentinels::warning)
    }

    /// What was found was not the server to ask: asks another one first the next time.
    pub(super) fn doubt(&self) {
        self.answered.fetch_add(1, Ordering::Relaxed);
    }

    async fn through_sentinels(
        &self,
        sentinels: &Sentinels,
        patience: Duration,
    ) -> Result<Link, StoreError> {
        let verdict = sentinels.primary(self, Duration::ZERO).await?;
        let mut trouble = no_nodes();
        for node in verdict.primaries {
            match self.primary(self.address(&node), Some(node), patience).await {
                Ok(link) => return Ok(Link { asked: verdict.asked, ..link }),
                Err(error) => trouble = error,
            }
        }
        Err(trouble)
    }

    /// Numbers of `nodes`, that of the one that answered last first: one that is away costs its
    /// time-out once, not at every question.
    fn in_order(&self, nodes: &[Node]) -> impl Iterator<Item = usize> + use<> {
        let (count, first) = (nodes.len(), self.answered.load(Ordering::Relaxed));
        (0..count).map(move |i| first.wrapping_add(i) % count)
    }

    async fn slot_owner(&self, seeds: &[Node], patience: Duration) -> Result<Link, StoreError> {
        let mut nodes = self.known.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let others: Vec<_> = seeds.iter().filter(|node| !nodes.contains(node)).cloned().collect();
        nodes.extend(others);
        let mut trouble = no_nodes();
        for number in self.in_order(&nodes) {
            let found = match self.ask_cluster(&nodes[number]).await {
                Ok(owner) => {
                    self.answered.store(number, Ordering::Relaxed);
                    self.primary(self.address(&owner), Some(owner), patience).await
                }
                Err(error) => Err(error),
            };
            match found {
                Ok(link) => return Ok(link),
                Err(error) => trouble = error,
            }
        }
        Err(trouble)
    }

    /// Which node owns the store's slot, in the eyes of `node`. Remembers the other primaries.
    async fn ask_cluster(&self, node: &Node) -> Result<Node, StoreError> {
        let ask = async || -> Result<(u64, Vec<Vec<Value>>), RedisError> {
            let mut conn = self.dial(self.address(node), self.login(0), CONNECT_TIMEOUT).await?;
            redis::pipe()
                .cmd("CLUSTER")
                .arg("KEYSLOT")
                .arg(&self.slot_key)
                .cmd("CLUSTER")
                .arg("SLOTS")
                .query_async(&mut conn)
                .await
        };
        let (slot, ranges) = ask().await.map_err(|error| store_error(&error))?;
        let ranges: Vec<_> = ranges.iter().filter_map(|range| slot_range(range, node)).collect();
        let mut primaries: Vec<_> = ranges.iter().map(|(_, primary)| primary.clone()).collect();
        primaries.sort();
        primaries.dedup();
        primaries.truncate(MAX_KNOWN_NODES);
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = primaries;
        ranges
            .into_iter()
            .find(|(slots, _)| slots.contains(&slot))
            .map(|(_, owner)| owner)
            .ok_or_else(|| StoreError::Unreachable("no node of the cluster has its slot".into()))
    }

    /// Connects to a server that says that it is a primary.
    async fn primary(
        &self,
        address: ConnectionAddr,
        node: Option<Node>,
        patience: Duration,
    ) -> Result<Link, StoreError> {
        let asked = SystemClock.monotonic();
        let connect = async || -> Result<_, RedisError> {
            let mut conn = self.dial(address, self.login(self.database), patience).await?;
            let hello = redis::cmd("HELLO").query_async(&mut conn).await?;
            Ok((conn, hello))
        };
        let (conn, hello): (_, Value) = connect().await.map_err(|error| store_error(&error))?;
        check_role(&hello)?;
        Ok(Link { conn, node, asked })
    }

    pub(super) async fn dial(
        &self,
        address: ConnectionAddr,
        login: RedisConnectionInfo,
        patience: Duration,
    ) -> Result<MultiplexedConnection, RedisError> {
        let tcp = TcpSettings::default()
            .set_nodelay(true)
            .set_keepalive(TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE))
            .set_user_timeout(USER_TIMEOUT);
        let info = address.into_connection_info()?.set_redis_settings(login).set_tcp_settings(tcp);
        let client = if self.tls {
            Client::build_with_tls(info, self.access.load().certificates.clone())?
        } else {
            Client::open(info)?
        };
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(patience));
        client.get_multiplexed_async_connection_with_config(&config).await
    }

    pub(super) fn address(&self, (host, port): &Node) -> ConnectionAddr {
        let (host, port) = (host.clone(), *port);
        match self.tls {
            true => ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None },
            false => ConnectionAddr::Tcp(host, port),
        }
    }

    /// How Sentinels know us.
    pub(super) fn sentinel_login(&self) -> Login {
        self.access.load().sentinels.clone()
    }

    pub(super) fn login(&self, database: i64) -> RedisConnectionInfo {
        let Login { username, password } = &self.access.load().servers;
        login(username.as_deref(), password.as_ref()).set_db(database)
    }
}

pub(super) fn login(username: Option<&str>, password: Option<&Secret>) -> RedisConnectionInfo {
    let mut login = RedisConnectionInfo::default().set_skip_set_lib_name();
    if let Some(username) = username {
        login = login.set_username(username);
    }
    if let Some(password) = password {
        login = login.set_password(password.expose());
    }
    login
}

fn no_nodes() -> StoreError {
    StoreError::Unreachable("no server is configured".into())
}

/// Refuses a replica by its answer to `HELLO`: it may be cut off from its primary without knowing.
pub(super) fn check_role(hello: &Value) -> Result<(), StoreError> {
    let text = |value: &Value| redis::from_redis_value_ref::<String>(value).ok();
    let role = match hello {
        Value::Array(items) => items
            .chunks_exact(2)
            .find(|pair| text(&pair[0]).as_deref() == Some("role"))
            .and_then(|pair| text(&pair[1])),
        _ => None,
    };
    match role.as_deref() {
        Some("master" | "primary") => Ok(()),
        Some(_) => Err(StoreError::Unreachable("the server is a replica, not a primary".into())),
        None => Err(StoreError::Corrupt("Redis does not tell its role (before version 6?)".into())),
    }
}

/// As [`check_role`], for answers that are read together with others.
pub(super) fn is_of_primary(hello: &Value) -> Result<(), RedisError> {
    check_role(hello).map_err(|error| (ErrorKind::Io, "wrong server", error.to_string()).into())
}

/// Slots and primary of one element of `CLUSTER SLOTS`: start, end, primary, replicas.
fn slot_range(range: &[Value], asked: &Node) -> Option<(std::ops::RangeInclusive<u64>, Node)> {
    let [Value::Int(start), Value::Int(end), Value::Array(primary), ..] = range else {
        return None;
    };
    let [host, Value::Int(port), ..] = primary.as_slice() else { return None };
    // An empty or unknown name means: the one that you are talking to.
    let host = redis::from_redis_value_ref::<Option<String>>(host)
        .ok()?
        .filter(|host| !host.is_empty() && host != "?")
        .unwrap_or_else(|| asked.0.clone());
    let host = host.parse::<IpAddr>().map_or(host, |ip| ip.to_string());
    let slots = u64::try_from(*start).ok()?..=u64::try_from(*end).ok()?;
    Some((slots, (host, u16::try_from(*port).ok()?)))
}
