//! The gate on a free port.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use otpgate::clock::{Clock, SystemClock};
use otpgate::config::{
    Address, HeaderNames, HealthCheck, Limits, Listen, ListenTls, ProxyConfig, Target, TlsFiles,
    TrustedPeer, Upstream, UpstreamHttp, UpstreamTimeouts,
};
use otpgate::metrics::Metrics;
use otpgate::net::{Listener, TermsHandle, TlsError};
use otpgate::otp::{Generator, TokenParams};
use otpgate::policy::{Mode, Policy, Route, SimilarPaths};
use otpgate::proxy::{Parts, Regime, Upstreams, app};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::directory::{Caller, Followed};

/// What a test may choose; everything else is the default.
pub(crate) struct Setup {
    pub(crate) listen: Address,
    pub(crate) tls: Option<TlsFiles>,
    pub(crate) client_ca: Option<PathBuf>,
    pub(crate) h2c: bool,
    pub(crate) allow_from: Vec<&'static str>,
    pub(crate) upstreams: Vec<Upstream>,
    pub(crate) routes: Vec<Route>,
    pub(crate) mode: Mode,
    pub(crate) limits: Limits,
    pub(crate) timeouts: UpstreamTimeouts,
    pub(crate) health: HealthCheck,
    pub(crate) trusted: Vec<&'static str>,
    pub(crate) headers: HeaderNames,
    pub(crate) max_stale: Duration,
}

/// A plain upstream on TCP.
pub(crate) fn plain(address: SocketAddr) -> Upstream {
    Upstream {
        targets: vec![Target::Host(address.ip().to_string(), address.port())],
        http: UpstreamHttp::Http1,
        tls: None,
    }
}

impl Setup {
    pub(crate) fn to(upstream: Upstream) -> Self {
        Self {
            listen: Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 0))),
            tls: None,
            client_ca: None,
            h2c: false,
            allow_from: Vec::new(),
            upstreams: vec![upstream],
            routes: Vec::new(),
            mode: Mode::Enforce,
            limits: Limits::default(),
            timeouts: UpstreamTimeouts::default(),
            health: HealthCheck { interval: None, ..HealthCheck::default() },
            trusted: Vec::new(),
            headers: HeaderNames::default(),
            max_stale: Duration::from_secs(15),
        }
    }

    pub(crate) async fn start(self) -> Gate {
        let metrics = Arc::new(Metrics::new(["staff".to_owned()]));
        let (stop, stopping) = watch::channel(false);
        let alice = Caller::new("alice", "staff");
        let bob = Caller::new("bob", "guests");
        let store = Followed::new(&[&alice, &bob], self.max_stale, metrics.clone()).await;
        let listen = Listen {
            tls: self.tls.map(|files| ListenTls { files, client_ca_file: self.client_ca }),
            h2c: self.h2c,
            allow_from: self.allow_from.iter().map(|net| net.parse().unwrap()).collect(),
            ..Listen::at(self.listen)
        };
        let trusted: Vec<_> =
            self.trusted.iter().map(|net| TrustedPeer::Network(net.parse().unwrap())).collect();
        let config = ProxyConfig {
            listen: vec![listen.clone()],
            upstreams: self.upstreams,
            mode: self.mode,
            similar_paths: SimilarPaths::Refuse,
            trusted_proxies: trusted.clone(),
            limits: self.limits,
            timeouts: self.timeouts,
            health: self.health,
            threads: None,
        };
        let upstreams = Arc::new(Upstreams::new(&config, metrics.clone()).unwrap());
        upstreams.resolve().await;
        let looking_after = upstreams.clone();
        let until = stopping.clone();
        tokio::spawn(async move { looking_after.run(until).await });
        let regime = Regime::new(Parts {
            verifier: store.verifier(metrics.clone()),
            policy: Arc::new(Policy::new(self.routes).with_mode(self.mode)),
            headers: self.headers,
            config,
            upstreams,
            access_log: true,
        });
        let regime = Arc::new(ArcSwap::from_pointee(regime));
        let gate = app(regime, metrics.clone(), Arc::new(SystemClock), 1);
        let listener =
            Listener::bind("proxy", std::slice::from_ref(&listen), self.limits, metrics.clone())
                .unwrap()
                .trusting(&trusted);
        let address = listener.addresses().remove(0);
        let terms = listener.terms();
        let running = tokio::spawn(listener.run(gate, stopping));
        Gate {
            address,
            listen,
            limits: self.limits,
            terms,
            metrics,
            alice,
            bob,
            store,
            stop,
            running,
        }
    }
}

/// A running gate; it stops when dropped.
pub(crate) struct Gate {
    pub(crate) address: Address,
    listen: Listen,
    pub(crate) limits: Limits,
    terms: TermsHandle,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) alice: Caller,
    pub(crate) bob: Caller,
    pub(crate) store: Followed,
    pub(crate) stop: watch::Sender<bool>,
    pub(crate) running: JoinHandle<()>,
}

impl Gate {
    pub(crate) fn tcp(&self) -> SocketAddr {
        match &self.address {
            Address::Tcp(address) => *address,
            Address::Unix(_) => panic!("on a Unix socket"),
        }
    }

    pub(crate) fn unix(&self) -> PathBuf {
        match &self.address {
            Address::Unix(path) => path.clone(),
            Address::Tcp(_) => panic!("on TCP"),
        }
    }

    /// Reads certificates again, and takes [`Self::limits`].
    pub(crate) fn renew(&self) -> Result<(), TlsError> {
        let listen = std::slice::from_ref(&self.listen);
        let terms = self.terms.prepare(listen, self.limits, &[]);
        self.terms.apply(terms.map_err(|mut errors| errors.remove(0))?);
        Ok(())
    }

    /// The caller's present token.
    pub(crate) fn token(&self, caller: &Caller) -> String {
        Generator::new(&caller.seed, TokenParams::default()).token_at(SystemClock.now().unix)
    }

    /// Header lines that prove `caller`.
    pub(crate) fn proof_of(&self, caller: &Caller) -> String {
        let token = self.token(caller);
        let (name, realm) = (caller.name, caller.realm);
        format!("X-Auth-Name: {name}\r\nX-Auth-Realm: {realm}\r\nX-Auth-Token: {token}\r\n")
    }

    /// Header lines that prove alice of staff.
    pub(crate) fn proof(&self) -> String {
        self.proof_of(&self.alice)
    }

    /// A whole `GET` with alice's proof.
    pub(crate) fn get(&self, target: &str) -> String {
        format!("GET {target} HTTP/1.1\r\nHost: gate\r\n{}\r\n", self.proof())
    }

    /// The value of a metric, by the beginning of its line.
    pub(crate) fn metric(&self, line: &str) -> f64 {
        let text = String::from_utf8(self.metrics.render()).unwrap();
        let found = text.lines().find_map(|l| l.strip_prefix(line));
        found.map_or(0.0, |rest| rest.trim().parse().unwrap())
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.running.abort();
        let _ = self.stop.send(true);
    }
}
