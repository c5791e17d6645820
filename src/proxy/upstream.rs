//! Upstream servers: groups of equal backends, their names resolved and their health checked in the
//! background, so that a request never waits for either.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::join_all;
use pingora::lb::health_check::{HealthCheck as BackendCheck, HttpHealthCheck};
use pingora::lb::{Backend, Backends};
use pingora::protocols::ALPN;
use pingora::protocols::l4::socket::SocketAddr as BackendAddress;
use pingora::upstreams::peer::{HttpPeer, HttpUpstreamRequestPolicy};
use pingora::utils::tls::{WrappedX509, parse_x509};
use pingora::{Error, ErrorType};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::{info, warn};
use x509_parser::parse_x509_certificate;

use super::discovery::{Discovery, Shared};
use super::request::Kind;
use super::survey::Survey;
use super::tunnel::TunnelConnector;
use crate::config::{HealthCheck, ProxyConfig, Target, Upstream, UpstreamHttp, UpstreamTimeouts};
use crate::metrics::Metrics;
use crate::policy::RouteTimeouts;

/// Time between look-ups while a name has never been resolved.
const DNS_RETRY: Duration = Duration::from_secs(1);
/// Most attempts to find a backend that can be connected to.
pub(super) const MAX_ATTEMPTS: usize = 4;
/// Requests at the same time on one HTTP/2 connection, and how much an upstream may send ahead.
const H2_STREAMS: usize = 128;
const H2_STREAM_WINDOW: u32 = 512 << 10;
const H2_CONNECTION_WINDOW: u32 = 2 << 20;
/// Sets the pool's keys of connections for WebSockets apart from those of their groups.
const TUNNELS: u64 = 1 << 63;
/// The key of the next group that is made: never that of another one before.
static NEXT_GROUP: AtomicU64 = AtomicU64::new(1);

/// Why the upstreams cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// A CA file.
    #[error("`{path}` contains no usable CA certificate: {cause}")]
    Ca {
        /// Which file.
        path: PathBuf,
        /// Why not.
        cause: String,
    },
    /// TLS without a name to check would not be checked at all.
    #[error("an upstream with TLS needs a server name")]
    NoServerName,
}

/// What a request needs of the connection to its upstream.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Needs {
    /// Time-outs of its route.
    timeouts: RouteTimeouts,
    /// Streams may be silent for long; WebSockets need HTTP/1.1 whatever the group speaks.
    kind: Kind,
    /// Nothing of its head is the client's connection's.
    is_end_to_end: bool,
}

impl Needs {
    pub(super) fn of(timeouts: RouteTimeouts, seen: &Survey) -> Self {
        Self { timeouts, kind: seen.kind, is_end_to_end: !seen.is_hop_by_hop }
    }
}

/// All groups, in the order of the configuration.
pub struct Upstreams {
    groups: Vec<Group>,
    timeouts: UpstreamTimeouts,
    health: HealthCheck,
    metrics: Arc<Metrics>,
    tunnels: Arc<TunnelConnector>,
}

struct Group {
    backends: Backends,
    /// Where the next request's turn begins.
    turn: AtomicUsize,
    template: HttpPeer,
    discovery: Arc<Discovery>,
}

impl Upstreams {
    /// Sets the groups up; [`Self::resolve`] finds their addresses.
    ///
    /// # Errors
    /// If a CA file cannot be used, or a server name is missing.
    pub fn new(config: &ProxyConfig, metrics: Arc<Metrics>) -> Result<Self, UpstreamError> {
        let groups = config
            .upstreams
            .iter()
            .map(|upstream| {
                Group::new(upstream, NEXT_GROUP.fetch_add(1, Ordering::Relaxed), config)
            })
            .collect::<Result<_, _>>()?;
        let (timeouts, health) = (config.timeouts, config.health.clone());
        Ok(Self { groups, timeouts, health, metrics, tunnels: Arc::new(TunnelConnector) })
    }

    /// Looks all names up once. What cannot be resolved is tried again by [`Self::run`]; until then
    /// its requests get 502.
    pub async fn resolve(&self) {
        join_all(self.groups.iter().map(Group::resolve)).await;
        self.note_health();
    }

    /// Makes itself ready to take the place of `old`: what that knows of names is not forgotten, and servers
    /// that are down are known before the first request.
    pub async fn succeed(&self, old: &Self) {
        for group in &self.groups {
            old.groups.iter().for_each(|old| group.discovery.learn_from(&old.discovery));
        }
        self.resolve().await;
        join_all(self.groups.iter().map(|group| group.backends.run_health_check(true))).await;
        self.note_health();
    }

    /// Keeps addresses and health current until `stop` turns true.
    pub async fn run(&self, mut stop: watch::Receiver<bool>) {
        let all = join_all(self.groups.iter().map(|group| self.look_after(group)));
        tokio::select! {
            () = async { drop(stop.wait_for(|stop| *stop).await) } => {}
            _ = all => {}
        }
    }

    async fn look_after(&self, group: &Group) {
        tokio::join!(
            async {
                if group.discovery.is_static() {
                    return;
                }
                loop {
                    let known = group.discovery.all_known();
                    tokio::time::sleep(if known { self.health.dns_interval } else { DNS_RETRY })
                        .await;
                    group.resolve().await;
                }
            },
            async {
                let Some(period) = self.health.interval else { return };
                let mut ticks = interval(period);
                ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
                loop {
                    ticks.tick().await;
                    group.backends.run_health_check(true).await;
                    self.note_health();
                }
            }
        );
    }

    fn note_health(&self) {
        let (mut healthy, mut unhealthy) = (0, 0);
        for group in &self.groups {
            for backend in group.backends.get_backend().iter() {
                if group.backends.ready(backend) { healthy += 1 } else { unhealthy += 1 }
            }
        }
        self.metrics.upstream_backends.with_label_values(&["healthy"]).set(healthy);
        self.metrics.upstream_backends.with_label_values(&["unhealthy"]).set(unhealthy);
    }

    /// How many backends a group has at the moment.
    pub(super) fn size(&self, group: usize) -> usize {
        self.groups.get(group).map_or(0, |g| g.backends.get_backend().len())
    }

    /// The next backend of a group, those in `tried` last: healthy ones first, but if none is, the
    /// others in turn, since a check can be wrong while a request could be answered.
    pub(super) fn peer(
        &self,
        group: usize,
        tried: &[BackendAddress],
        needs: Needs,
    ) -> Option<Box<HttpPeer>> {
        let group = self.groups.get(group)?;
        let address = group.choose(tried)?;
        let mut peer = Box::new(group.template.clone());
        peer._address = address;
        peer.options.read_timeout = Some(match needs.kind {
            Kind::Plain => needs.timeouts.read.unwrap_or(self.timeouts.read),
            Kind::WebSocket | Kind::Events | Kind::Grpc => self.timeouts.stream_idle,
        });
        peer.options.write_timeout = Some(needs.timeouts.write.unwrap_or(self.timeouts.write));
        if needs.is_end_to_end {
            // Nothing has to be removed: pingora need not look for each header that it would remove.
            peer.options.http_upstream_request_policy = HttpUpstreamRequestPolicy::preserve();
        }
        if needs.kind == Kind::WebSocket {
            peer.options.alpn = ALPN::H1;
            peer.options.custom_l4 = Some(self.tunnels.clone());
            // Neither one that was made for other requests, nor kept for them if there is no tunnel.
            peer.group_key |= TUNNELS;
            peer.options.idle_timeout = Some(Duration::ZERO);
        }
        Some(peer)
    }
}

impl Group {
    /// `key` keeps the groups' pooled connections apart, also from those of groups that other settings made:
    /// pingora's pool does not look at the CA or the protocol.
    fn new(upstream: &Upstream, key: u64, config: &ProxyConfig) -> Result<Self, UpstreamError> {
        let template = template(upstream, key, &config.timeouts)?;
        let discovery = Arc::new(Discovery::new(upstream.targets.clone()));
        let mut backends = Backends::new(Box::new(Shared(discovery.clone())));
        if config.health.interval.is_some() {
            backends.set_health_check(check(upstream, &template, config));
        }
        Ok(Self { backends, turn: AtomicUsize::new(0), template, discovery })
    }

    /// Round robin, in our own few lines: pingora's selector may skip a backend when requests race,
    /// and has no notion of those that this request has tried.
    fn choose(&self, tried: &[BackendAddress]) -> Option<BackendAddress> {
        let all = self.backends.get_backend();
        if all.len() == 1 {
            // It is asked whatever is known of it.
            return all.first().map(|backend| backend.addr.clone());
        }
        let first = self.turn.fetch_add(1, Ordering::Relaxed) % all.len().max(1);
        let in_turn = || all.iter().skip(first).chain(all.iter().take(first));
        let is_new = |backend: &&Backend| !tried.contains(&backend.addr);
        in_turn()
            .filter(is_new)
            .find(|backend| self.backends.ready(backend))
            .or_else(|| in_turn().find(is_new))
            .or_else(|| in_turn().next())
            .map(|backend| backend.addr.clone())
    }

    async fn resolve(&self) {
        // Discovery itself never fails: it keeps what it knew.
        let _ = self.backends.update(|_| {}).await;
    }
}

/// A peer of the group, all but its address.
fn template(
    upstream: &Upstream,
    key: u64,
    timeouts: &UpstreamTimeouts,
) -> Result<HttpPeer, UpstreamError> {
    let name = upstream.tls.as_ref().map_or("", |tls| tls.server_name.as_str());
    if upstream.tls.is_some() && name.is_empty() {
        return Err(UpstreamError::NoServerName);
    }
    let mut peer =
        HttpPeer::new(SocketAddr::from(([0, 0, 0, 0], 1)), upstream.tls.is_some(), name.to_owned());
    peer.group_key = key;
    let options = &mut peer.options;
    options.alpn = match (upstream.http, &upstream.tls) {
        (UpstreamHttp::Http2, _) => ALPN::H2,
        (UpstreamHttp::Auto, Some(_)) => ALPN::H2H1,
        (UpstreamHttp::Auto, None) | (UpstreamHttp::Http1, _) => ALPN::H1,
    };
    options.connection_timeout = Some(timeouts.connect);
    options.total_connection_timeout = Some(timeouts.connect);
    options.idle_timeout = Some(timeouts.idle);
    options.tcp_keepalive = Some(crate::net::KEEPALIVE);
    options.max_h2_streams = H2_STREAMS;
    options.h2_stream_window_size = Some(H2_STREAM_WINDOW);
    options.h2_connection_window_size = Some(H2_CONNECTION_WINDOW);
    if let Some(path) = upstream.tls.as_ref().and_then(|tls| tls.ca_file.as_ref()) {
        options.ca = Some(read_ca(path)?);
    }
    Ok(peer)
}

fn read_ca(path: &PathBuf) -> Result<Arc<[WrappedX509]>, UpstreamError> {
    let bad = |cause: String| UpstreamError::Ca { path: path.clone(), cause };
    let text = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
    let mut certificates = Vec::new();
    for der in CertificateDer::pem_slice_iter(&text) {
        let der = der.map_err(|error| bad(error.to_string()))?;
        // pingora's own parser panics.
        parse_x509_certificate(&der).map_err(|error| bad(error.to_string()))?;
        certificates.push(WrappedX509::new(der.to_vec(), parse_x509));
    }
    if certificates.is_empty() {
        return Err(bad("no certificate in it".to_owned()));
    }
    Ok(certificates.into())
}

fn check(
    upstream: &Upstream,
    template: &HttpPeer,
    config: &ProxyConfig,
) -> Box<dyn BackendCheck + Send + Sync> {
    let limit = config.timeouts.connect;
    let Some(path) = &config.health.path else {
        return Box::new(ConnectCheck { limit });
    };
    let host = match (&upstream.tls, upstream.targets.first()) {
        (Some(tls), _) => tls.server_name.clone(),
        (None, Some(Target::Host(host, port))) => format!("{host}:{port}"),
        (None, _) => "localhost".to_owned(),
    };
    let mut check = HttpHealthCheck::new(&host, upstream.tls.is_some());
    check.peer_template = template.clone();
    check.peer_template.options.read_timeout = Some(limit);
    check.peer_template.options.write_timeout = Some(limit);
    if check.req.set_raw_path(path.as_bytes()).is_err() {
        warn!(path, "the path of health checks is no path, connecting is checked instead");
        return Box::new(ConnectCheck { limit });
    }
    check.validator = Some(Box::new(|response| match response.status.as_u16() {
        200..=399 => Ok(()),
        status => Error::e_explain(ErrorType::HTTPStatus(status), "in a health check"),
    }));
    check.health_changed_callback = Some(Box::new(LogChange));
    Box::new(check)
}

/// Healthy is what can be connected to.
struct ConnectCheck {
    limit: Duration,
}

#[async_trait]
impl BackendCheck for ConnectCheck {
    async fn check(&self, target: &Backend) -> pingora::Result<()> {
        let connected = timeout(self.limit, async {
            match &target.addr {
                BackendAddress::Inet(address) => TcpStream::connect(address).await.map(drop),
                BackendAddress::Unix(address) => match address.as_pathname() {
                    Some(path) => UnixStream::connect(path).await.map(drop),
                    None => Err(std::io::ErrorKind::NotFound.into()),
                },
            }
        });
        match connected.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Error::e_because(ErrorType::ConnectError, "in a health check", error),
            Err(_) => Error::e_explain(ErrorType::ConnectTimedout, "in a health check"),
        }
    }

    async fn health_status_change(&self, target: &Backend, healthy: bool) {
        log_change(target, healthy);
    }

    fn health_threshold(&self, _: bool) -> usize {
        1
    }
}

struct LogChange;

#[async_trait]
impl pingora::lb::health_check::HealthObserve for LogChange {
    async fn observe(&self, target: &Backend, healthy: bool) {
        log_change(target, healthy);
    }
}

fn log_change(target: &Backend, healthy: bool) {
    let address = &target.addr;
    if healthy {
        info!(%address, "an upstream server is healthy again");
    } else {
        warn!(%address, "an upstream server is unhealthy");
    }
}
