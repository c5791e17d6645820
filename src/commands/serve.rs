//! `otpgate serve`: wires config, store, directory, verifier, proxy, API and ops, and stops them in
//! order.

use std::process::ExitCode;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::api::Api;
use crate::audit::Event;
use crate::cli::Failure;
use crate::clock::{Clock, SystemClock};
use crate::config::warnings::{Warning, warnings};
use crate::config::{Address, Config, ShutdownConfig};
use crate::decision::Decider;
use crate::directory::Directory;
use crate::directory::follower::{Follower, watch_currency};
use crate::metrics::Metrics;
use crate::net::Listener;
use crate::net::service::TowerApp;
use crate::ops::Ops;
use crate::policy::Mode;
use crate::proxy::{self, Upstreams};
use crate::store::Store;
use crate::throttle::Throttle;
use crate::verifier::Verifier;

/// Runs the gate until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps it from starting.
pub fn run(config: Config) -> Result<ExitCode, Failure> {
    let _logging = crate::logging::init(&config.log)?;
    for Warning { key, text } in warnings(&config) {
        warn!(key, "unsafe setting: {text}");
    }
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = config.proxy.threads {
        runtime.worker_threads(threads);
    }
    let runtime = runtime.enable_all().build()?;
    let outcome = runtime.block_on(async {
        let (mut term, mut int) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        // Nothing is refused where the whole gate only reports.
        let reports = config.proxy.mode == Mode::Report;
        let server = Server::start(config, Arc::new(SystemClock)).await?;
        note_gate("started", reports.then_some("report_mode"));
        tokio::select! {
            _ = term.recv() => info!("SIGTERM: draining"),
            _ = int.recv() => info!("SIGINT: draining"),
        }
        // A second signal means now.
        tokio::select! {
            () = server.stop() => info!("stopped"),
            _ = term.recv() => warn!("a second signal: stopping at once"),
            _ = int.recv() => warn!("a second signal: stopping at once"),
        }
        note_gate("stopped", None);
        Ok::<_, Failure>(ExitCode::SUCCESS)
    });
    // Store threads may be blocked in I/O; nothing acknowledged depends on them any more.
    runtime.shutdown_background();
    outcome
}

/// Adds to the audit trail that this gate has started or stopped.
fn note_gate(outcome: &'static str, reason: Option<&'static str>) {
    Event { action: "gate", outcome, reason, ..Event::default() }.log();
}

/// A running gate. Dropping it stops it at once.
pub struct Server {
    /// Where the proxy listens; empty: off.
    pub proxy: Vec<Address>,
    /// Where the API listens; empty: off.
    pub api: Vec<Address>,
    /// Where health checks and metrics are; empty: off.
    pub ops: Vec<Address>,
    /// Its entries.
    pub directory: Arc<Directory>,
    throttle: Arc<Throttle>,
    clock: Arc<dyn Clock>,
    shutdown: ShutdownConfig,
    draining: watch::Sender<bool>,
    closing: watch::Sender<bool>,
    closing_back: watch::Sender<bool>,
    /// Serves callers: finishes by itself once `closing` is true.
    front: JoinSet<()>,
    /// Serves the front: the follower, upstream checks, ops; ended last.
    back: JoinSet<()>,
}

impl Server {
    /// Binds every listener, opens the store and serves. The store need not answer yet: until it does,
    /// the gate is not ready and answers 503.
    ///
    /// # Errors
    /// All addresses that cannot be bound; a store or upstream that can never work as configured.
    pub async fn start(config: Config, clock: Arc<dyn Clock>) -> Result<Self, Failure> {
        let metrics = Arc::new(Metrics::new(known_realms(&config)));
        crate::logging::log_panics(metrics.clone());
        crate::logging::count_audit_failures(&metrics);
        let [callers, api, ops] = bind(&config, &metrics)?;
        let addresses = [&callers, &api, &ops].map(Listener::addresses);
        let store = Store::open(&config.store)?.with_metrics(metrics.clone());
        let directory = Arc::new(Directory::new(
            store.clone(),
            &config.store.hold,
            config.rules.clone(),
            config.store.max_stale,
            metrics.clone(),
            clock.now(),
        ));
        let throttle =
            Arc::new(Throttle::new(config.throttle, store.clone(), metrics.clone(), clock.now()));
        let verifier = Arc::new(Verifier::new(
            directory.clone(),
            throttle.clone(),
            store.clone(),
            metrics.clone(),
        ));
        let policy = Arc::new(ArcSwap::from_pointee(config.policy()));
        let (draining, _) = watch::channel(false);
        let (closing, _) = watch::channel(false);
        let (closing_back, _) = watch::channel(false);
        let (mut front, mut back) = (JoinSet::new(), JoinSet::new());

        if !addresses[0].is_empty() {
            let upstreams = Arc::new(Upstreams::new(&config.proxy, metrics.clone())?);
            let gate = proxy::app(proxy::Parts {
                verifier: verifier.clone(),
                policy: policy.clone(),
                headers: config.headers.clone(),
                config: config.proxy.clone(),
                upstreams: upstreams.clone(),
                metrics: metrics.clone(),
                clock: clock.clone(),
                access_log: config.log.access,
            });
            upstreams.resolve().await;
            let stop = closing_back.subscribe();
            back.spawn(async move { upstreams.run(stop).await });
            front.spawn(callers.run(gate, closing.subscribe()));
        }
        if !addresses[1].is_empty() {
            let api_app = Api {
                store: store.clone(),
                decider: Decider::new(verifier.clone(), config.headers.clone()),
                verifier,
                policy,
                clock: clock.clone(),
                metrics: metrics.clone(),
                realms: config.realms.clone(),
                config: config.api.clone(),
            };
            let app = Arc::new(TowerApp::new(api_app.router()));
            front.spawn(api.run(app, closing.subscribe()));
        }
        if !addresses[2].is_empty() {
            let (directory, clock) = (directory.clone(), clock.clone());
            let ops_app = Ops::new(directory, metrics.clone(), clock, draining.subscribe());
            let app = Arc::new(TowerApp::new(ops_app.router()));
            // Probes and scrapes go on while callers drain.
            back.spawn(ops.run(app, closing_back.subscribe()));
        }
        back.spawn(warn_about(store));
        let (throttling, throttle_clock) = (throttle.clone(), clock.clone());
        back.spawn(async move { throttling.run(throttle_clock).await });
        let watched = (directory.clone(), clock.clone());
        back.spawn(async move { watch_currency(watched.0, watched.1).await });
        let follower = Follower::new(directory.clone(), clock.clone());
        back.spawn(async move { follower.run().await });

        let [proxy, api, ops] = addresses;
        info!(
            version = env!("CARGO_PKG_VERSION"),
            proxy = %list(&proxy), api = %list(&api), ops = %list(&ops),
            store = %config.store.url,
            "serving"
        );
        let shutdown = config.shutdown;
        Ok(Self {
            proxy,
            api,
            ops,
            directory,
            throttle,
            clock,
            shutdown,
            draining,
            closing,
            closing_back,
            front,
            back,
        })
    }

    /// Turns `/readyz` red, waits the configured delay, closes the listeners and lets accepted
    /// requests finish within the configured grace.
    pub async fn stop(mut self) {
        self.draining.send_replace(true);
        tokio::time::sleep(self.shutdown.delay).await;
        self.closing.send_replace(true);
        let finished = async { while self.front.join_next().await.is_some() {} };
        if tokio::time::timeout(self.shutdown.grace, finished).await.is_err() {
            warn!("requests still ran at the end of `shutdown.grace`: cut");
        }
        self.front.shutdown().await;
        self.closing_back.send_replace(true);
        self.back.shutdown().await;
        self.throttle.flush(self.clock.now()).await;
    }
}

/// Binds all three listeners; the errors of all of them at once.
fn bind(config: &Config, metrics: &Arc<Metrics>) -> Result<[Listener; 3], Failure> {
    let mut errors = Vec::new();
    let mut bind = |name, listen, limits, trusted| {
        Listener::bind(name, listen, limits, metrics.clone())
            .map(|listener| listener.trusting(trusted))
            .map_err(|e| errors.extend(e))
            .ok()
    };
    let (proxy, api, ops) = (&config.proxy, &config.api, &config.ops);
    let bound = (
        bind("proxy", &proxy.listen, proxy.limits, &proxy.trusted_proxies),
        bind("api", &api.listen, api.limits, &api.trusted_proxies),
        bind("ops", &ops.listen, ops.limits, &[]),
    );
    match bound {
        (Some(proxy), Some(api), Some(ops)) => Ok([proxy, api, ops]),
        _ => {
            let lines: Vec<_> = errors.iter().map(ToString::to_string).collect();
            Err(lines.join("\notpgate: ").into())
        }
    }
}

/// Logs what an operator should know about how the store is set up.
async fn warn_about(store: Store) {
    for warning in store.warnings().await {
        warn!("{warning}");
    }
}

/// Realms that may be metric labels: those that the configuration names.
fn known_realms(config: &Config) -> Vec<String> {
    let reserved = [&config.realms.admin, &config.realms.auth].map(|r| r.as_str().to_owned());
    reserved.into_iter().chain(config.rules.realms.keys().cloned()).collect()
}

fn list(addresses: &[Address]) -> String {
    match addresses {
        [] => "off".to_owned(),
        some => some.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    }
}
