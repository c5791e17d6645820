//! `otpgate serve`: wires config, store, directory, verifier, proxy, API and ops, and stops them in
//! order.

use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::audit::Event;
use crate::cli::Failure;
use crate::clock::{Clock, SystemClock};
use crate::config::warnings::{Warning, warnings};
use crate::config::{Address, Config, ShutdownConfig};
use crate::directory::Directory;
use crate::directory::follower::{Follower, watch_currency};
use crate::logging::LevelHandle;
use crate::metrics::Metrics;
use crate::net::service::TowerApp;
use crate::net::{Drain, Handle, Inherited, LAST_CHANCE, Listener, Workers};
use crate::ops::Ops;
use crate::policy::Mode;
use crate::proxy;
use crate::remote::Remote;
use crate::store::Store;
use crate::throttle::Throttle;
use crate::verifier::{Basis, Entries, Verifier};

mod live;
mod manager;
mod reload;
mod source;
mod upgrade;

use live::{Core, Live};
use reload::Reloader;
pub use source::Source;
use upgrade::{Predecessor, Program};

/// Time between two looks whether entries are current.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Before the end of the grace, so that what has a bound of its own ends by that.
const MARGIN: Duration = Duration::from_secs(1);

/// For telling the store of failed attempts at the end: one that is slow does not hold up the stop.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// Runs the gate with `config` until SIGTERM or SIGINT, or until another process has taken over (SIGUSR2); other
/// settings come from `source` meanwhile. `takes_over`: from the gate that started this process.
///
/// # Errors
/// What keeps it from starting.
pub fn run(config: Config, source: Source, takes_over: bool) -> Result<ExitCode, Failure> {
    // Before there are threads.
    let (predecessor, mut inherited) = if takes_over {
        let (predecessor, inherited) = Predecessor::meet()?;
        (Some(predecessor), inherited)
    } else {
        let inherited = Inherited::from_service_manager()
            .map_err(|error| format!("what the service manager handed over: {error}"))?;
        (None, inherited)
    };
    let program = Program::of_this_process()?;
    let (_logging, level) = crate::logging::init(&config.log)?;
    warnings(&config).iter().for_each(warn_of);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        let mut signals = Signals::new()?;
        let hangups = signal(SignalKind::hangup())?;
        // Nothing is refused where the whole gate only reports.
        let reports = config.proxy.mode == Mode::Report;
        let in_queue = !inherited.left().is_empty();
        let mut server = Server::prepare(config, Arc::new(SystemClock), &mut inherited).await?;
        check_left(&inherited, takes_over)?;
        match predecessor {
            Some(predecessor) => predecessor.succeed(&server).await?,
            None => {
                if in_queue && let Some(name) = signals.stop.before(server.first_load()).await {
                    info!("{name}: nothing was accepted yet, stopping");
                    return Ok(ExitCode::SUCCESS);
                }
                server.open();
                manager::ready();
            }
        }
        note_gate("started", reports.then_some("report_mode"));
        server.reload_from(source, hangups, level);
        let end = signals.end(&server, &program).await;
        tokio::select! {
            () = server.stop(end) => info!("stopped"),
            name = signals.stop.now(end) => warn!("{name} again: stopping at once"),
        }
        note_gate("stopped", (end == End::Succeeded).then_some("succeeded"));
        Ok::<_, Failure>(ExitCode::SUCCESS)
    });
    // Store threads may be blocked in I/O; nothing acknowledged depends on them any more.
    runtime.shutdown_background();
    outcome
}

/// Why a gate ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was told to.
    Stopped,
    /// Another process serves in its place, on the same sockets.
    Succeeded,
}

/// The signals that `serve` knows.
struct Signals {
    stop: Stop,
    upgrade: Signal,
}

/// Those that say stop.
struct Stop {
    term: Signal,
    int: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        let stop =
            Stop { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? };
        Ok(Self { stop, upgrade: signal(SignalKind::user_defined2())? })
    }

    /// Waits for the end of the gate's service, and tries every upgrade until then.
    async fn end(&mut self, server: &Server, program: &Program) -> End {
        loop {
            tokio::select! {
                _ = self.upgrade.recv() => {}
                name = self.stop.recv() => return draining(name),
            }
            let handed_over = tokio::select! {
                handed_over = upgrade::hand_over(program, server) => handed_over,
                name = self.stop.recv() => return draining(name),
            };
            match handed_over {
                Ok(pid) => {
                    server.leave_files();
                    manager::goes_on_in(pid);
                    info!(pid, "another process serves now: draining");
                    return End::Succeeded;
                }
                Err(error) => server.note_failed_upgrade(&error),
            }
        }
    }
}

impl Stop {
    /// The signal that came before `work` was done, if one did.
    async fn before(&mut self, work: impl Future<Output = ()>) -> Option<&'static str> {
        tokio::select! {
            () = work => None,
            name = self.recv() => Some(name),
        }
    }

    /// The name of the one that means now: the second. A process that was succeeded has not heard the first
    /// yet, which is sent to all processes of a service.
    async fn now(&mut self, end: End) -> &'static str {
        if end == End::Succeeded {
            let name = self.recv().await;
            info!("{name}: draining already");
        }
        self.recv().await
    }

    /// The next one's name.
    async fn recv(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.int.recv() => "SIGINT",
        }
    }
}

fn draining(signal: &str) -> End {
    manager::stopping();
    info!("{signal}: draining");
    End::Stopped
}

/// Whether every socket that was opened for this process has its place.
fn check_left(inherited: &Inherited, takes_over: bool) -> Result<(), Failure> {
    let left = inherited.left().join("`, `");
    if left.is_empty() {
        return Ok(());
    }
    if takes_over {
        // The settings have changed since.
        info!("no longer listening on `{left}`");
        return Ok(());
    }
    let told = "the service manager handed over sockets on";
    let fix = "name them in `proxy.listen`, `api.listen` or `ops.listen`, or take them out of the socket unit";
    Err(format!("{told} `{left}`, where nothing is to listen: {fix}").into())
}

fn warn_of(Warning { key, text }: &Warning) {
    warn!(key, "unsafe setting: {text}");
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
    verifier: Arc<Verifier>,
    throttle: Arc<Throttle>,
    clock: Arc<dyn Clock>,
    shutdown: Arc<ArcSwap<ShutdownConfig>>,
    /// `None`: it is a reloader's.
    live: Option<Live>,
    /// Where claims are checked, for the log.
    store: String,
    first_load_within: Duration,
    metrics: Arc<Metrics>,
    /// Its listening sockets.
    handles: Vec<Handle>,
    drain: Arc<Drain>,
    opening: watch::Sender<bool>,
    draining: watch::Sender<bool>,
    closing: watch::Sender<bool>,
    closing_ops: watch::Sender<bool>,
    closing_back: watch::Sender<bool>,
    /// Serves callers: finishes by itself once `closing` is true.
    front: JoinSet<()>,
    /// Serves the front: the follower, upstream checks, ops; ended last.
    back: JoinSet<()>,
    /// To the very end: what drives a connection to the store may run where a request first needed it.
    _workers: Arc<Workers>,
}

impl Server {
    /// Binds every listener, opens the store and serves: [`Self::prepare`] and [`Self::open`].
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub async fn start(config: Config, clock: Arc<dyn Clock>) -> Result<Self, Failure> {
        let server = Self::prepare(config, clock, &mut Inherited::default()).await?;
        server.open();
        Ok(server)
    }

    /// Opens the store, and takes its sockets out of `inherited` or binds them: connections wait in the kernel's
    /// queue until [`Self::open`]. The store need not answer yet: until it does,
    /// the gate is not ready and answers 503.
    ///
    /// # Errors
    /// All addresses that cannot be bound; a store or upstream that can never work as configured.
    pub async fn prepare(
        config: Config,
        clock: Arc<dyn Clock>,
        inherited: &mut Inherited,
    ) -> Result<Self, Failure> {
        let metrics = Arc::new(Metrics::new(known_realms(&config)));
        crate::logging::log_panics(metrics.clone());
        crate::logging::count_audit_failures(&metrics);
        let drain = Arc::<Drain>::default();
        let listeners = bind(&config, &metrics, inherited)?;
        let addresses = listeners.each_ref().map(Listener::addresses);
        let handles = listeners.iter().flat_map(Listener::handles).collect();
        let [callers, api, ops] = listeners.map(|listener| listener.draining(&drain));
        let basis = basis(&config, &metrics, &clock)?;
        let store = match &basis {
            Basis::Entries(entries) => Some(entries.store.clone()),
            Basis::Remote(_) => None,
        };
        let throttle =
            Arc::new(Throttle::new(config.throttle, store, metrics.clone(), clock.now()));
        let verifier = Arc::new(Verifier::new(basis, throttle.clone(), metrics.clone()));
        let workers = Workers::start(worker_threads(&config))?;
        let (draining, _) = watch::channel(false);
        let (closing, _) = watch::channel(false);
        let (closing_ops, _) = watch::channel(false);
        let (opening, _) = watch::channel(false);
        let (closing_back, _) = watch::channel(false);
        let (mut front, mut back) = (JoinSet::new(), JoinSet::new());

        let core = Core {
            throttle: throttle.clone(),
            verifier: verifier.clone(),
            metrics: metrics.clone(),
            clock: clock.clone(),
        };
        let store = source_of(&config);
        let first_load_within =
            config.remote.as_ref().map_or(config.store.max_stale, |remote| remote.max_stale);
        let terms = [&callers, &api, &ops].map(Listener::terms);
        let live = Live::start(core, config, terms, closing_back.subscribe()).await?;
        let shutdown = live.shutdown.clone();
        if let Some(gate) = &live.gate {
            let (regime, metrics, clock) = (gate.regime.clone(), metrics.clone(), clock.clone());
            let all = workers.count();
            let app = move || proxy::app(regime.clone(), metrics.clone(), clock.clone(), all);
            let serving = callers.run_on(workers.clone(), app, closing.subscribe());
            front.spawn(once(opening.subscribe(), serving));
        }
        if !addresses[1].is_empty() {
            let app = Arc::new(TowerApp::replaceable(live.api.clone()));
            let serving = api.run_on(workers.clone(), move || app.clone(), closing.subscribe());
            front.spawn(once(opening.subscribe(), serving));
        }
        if !addresses[2].is_empty() {
            let (verifier, clock) = (verifier.clone(), clock.clone());
            let ops_app = Ops::new(verifier, metrics.clone(), clock, draining.subscribe());
            let app = Arc::new(TowerApp::new(ops_app.router()));
            // Probes and scrapes go on while callers drain.
            back.spawn(once(opening.subscribe(), ops.run(app, closing_ops.subscribe())));
        }
        let (throttling, throttle_clock) = (throttle.clone(), clock.clone());
        back.spawn(async move { throttling.run(throttle_clock).await });
        follow(&verifier, &clock, &mut back);

        let [proxy, api, ops] = addresses;
        Ok(Self {
            proxy,
            api,
            ops,
            verifier,
            throttle,
            clock,
            shutdown,
            live: Some(live),
            store,
            first_load_within,
            metrics,
            handles,
            drain,
            opening,
            draining,
            closing,
            closing_ops,
            closing_back,
            front,
            back,
            _workers: workers,
        })
    }

    /// From now on has `source` read again when it changes, and at each of `hangups`.
    fn reload_from(&mut self, source: Source, hangups: Signal, level: LevelHandle) {
        let Some(live) = self.live.take() else { return };
        let (metrics, clock) = (self.metrics.clone(), self.clock.clone());
        let reloader = Reloader { source, live, level, metrics, clock, hangups };
        self.back.spawn(reloader.run());
    }

    /// Waits for entries, as long as callers may be let wait for a store: they wait in the queue of a service
    /// manager's sockets, and would get 503.
    async fn first_load(&self) {
        let current = async {
            while !self.is_current() {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        // Without entries the answers say why.
        let _ = tokio::time::timeout(self.first_load_within, current).await;
    }

    /// Begins to accept connections.
    pub fn open(&self) {
        self.metrics.started(self.clock.now().unix);
        self.opening.send_replace(true);
        info!(
            version = env!("CARGO_PKG_VERSION"),
            pid = std::process::id(),
            proxy = %list(&self.proxy), api = %list(&self.api), ops = %list(&self.ops),
            store = %self.store,
            "serving"
        );
    }

    /// Whether it can answer callers.
    fn is_current(&self) -> bool {
        self.verifier.is_current(self.clock.now())
    }

    /// The files of Unix sockets are a successor's from now on.
    fn leave_files(&self) {
        for handle in &self.handles {
            handle.keep_file(true);
        }
    }

    fn note_failed_upgrade(&self, error: &upgrade::Failed) {
        warn!(%error, "the upgrade failed, this process goes on");
        self.metrics.upgrade_failures.inc();
        Event { action: "upgrade", outcome: "failed", ..Event::default() }.log();
    }

    /// Lets what was accepted finish within the configured grace, with listeners closed.
    ///
    /// A gate that is told to stop turns `/readyz` red first, and waits the configured delay. One that was
    /// succeeded leaves that to its successor, and lets idle connections wait for a last request: nobody waits
    /// for its end.
    pub async fn stop(mut self, end: End) {
        self.drain.announce();
        if end == End::Stopped {
            self.draining.send_replace(true);
            tokio::time::sleep(self.shutdown.load().delay).await;
        }
        let ShutdownConfig { grace, streams, .. } = **self.shutdown.load();
        let nearly_all = grace.saturating_sub(MARGIN).max(LAST_CHANCE);
        let idle = if end == End::Succeeded { nearly_all } else { LAST_CHANCE };
        self.drain.set_bounds(idle, streams.min(nearly_all));
        if end == End::Succeeded {
            self.closing_ops.send_replace(true);
        }
        self.closing.send_replace(true);
        let finished = async { while self.front.join_next().await.is_some() {} };
        if tokio::time::timeout(grace, finished).await.is_err() {
            let open = ["proxy", "api"].map(|name| self.metrics.open_connections(name).get());
            let connections = open.iter().sum::<i64>();
            warn!(connections, "requests still ran at the end of `shutdown.grace`: cut");
        }
        let streams = self.drain.streams_cut();
        if streams > 0 {
            info!(streams, "streams were still open at the end of `shutdown.streams`: ended");
        }
        self.front.shutdown().await;
        self.closing_ops.send_replace(true);
        self.closing_back.send_replace(true);
        // Before the task that does so else is cut off in the midst of it.
        let told = self.throttle.flush(self.clock.now());
        if tokio::time::timeout(LAST_WORDS, told).await.is_err() {
            warn!("the store is slow: it was not told of all failed attempts");
        }
        self.back.shutdown().await;
    }
}

/// Runs `serving` once `opened` is true.
async fn once(mut opened: watch::Receiver<bool>, serving: impl Future<Output = ()>) {
    // Without a sender there is no server any more.
    if opened.wait_for(|opened| *opened).await.is_ok() {
        serving.await;
    }
}

/// Binds all three listeners; the errors of all of them at once.
fn bind(
    config: &Config,
    metrics: &Arc<Metrics>,
    inherited: &mut Inherited,
) -> Result<[Listener; 3], Failure> {
    let mut errors = Vec::new();
    let mut bind = |name, listen, limits, trusted| {
        Listener::open(name, listen, limits, metrics.clone(), inherited)
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

/// What claims are checked against.
fn basis(
    config: &Config,
    metrics: &Arc<Metrics>,
    clock: &Arc<dyn Clock>,
) -> Result<Basis, Failure> {
    if let Some(remote) = &config.remote {
        let remote = Remote::new(remote, &config.rules, metrics.clone(), clock.clone())?;
        return Ok(Basis::Remote(Arc::new(remote)));
    }
    let store = Store::open(&config.store)?.with_metrics(metrics.clone());
    let directory = Arc::new(Directory::new(
        store.clone(),
        &config.store.hold,
        config.rules.clone(),
        config.store.max_stale,
        metrics.clone(),
        clock.now(),
    ));
    Ok(Basis::Entries(Box::new(Entries::new(directory, store))))
}

/// Keeps what claims are checked against current.
fn follow(verifier: &Verifier, clock: &Arc<dyn Clock>, back: &mut JoinSet<()>) {
    match verifier.basis() {
        Basis::Entries(entries) => {
            back.spawn(warn_about(entries.store.clone()));
            let watched = (entries.directory.clone(), clock.clone());
            back.spawn(async move { watch_currency(watched.0, watched.1).await });
            let follower = Follower::new(entries.directory.clone(), clock.clone());
            back.spawn(async move { follower.run().await });
        }
        Basis::Remote(remote) => {
            let remote = remote.clone();
            back.spawn(async move { remote.run().await });
        }
    }
}

/// One a core unless that is set; the cores that the process may use, its share of them included.
fn worker_threads(config: &Config) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    config.proxy.threads.unwrap_or_else(cores)
}

/// Where claims are checked, for the log.
fn source_of(config: &Config) -> String {
    config.remote.as_ref().map_or_else(|| config.store.url.to_string(), |remote| remote.url.clone())
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
