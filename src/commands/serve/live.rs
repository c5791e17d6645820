//! What a gate is made of, and how a running one takes new settings over: everything that can fail is
//! prepared before anything changes.

use std::sync::Arc;

use arc_swap::ArcSwap;
use axum::Router;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet, spawn_blocking};

use super::{Failure, known_realms};
use crate::api::Api;
use crate::clock::Clock;
use crate::config::load::Problem;
use crate::config::{Config, ShutdownConfig, Upstream};
use crate::decision::Decider;
use crate::metrics::Metrics;
use crate::net::{NewTerms, TermsHandle};
use crate::policy::Policy;
use crate::proxy::{self, Regime, Upstreams};
use crate::store::open::Renewal;
use crate::throttle::Throttle;
use crate::verifier::Verifier;

/// What lasts as long as the process, whatever its settings.
#[derive(Clone)]
pub(super) struct Core {
    pub(super) throttle: Arc<Throttle>,
    pub(super) verifier: Arc<Verifier>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) clock: Arc<dyn Clock>,
}

impl Core {
    fn regime(&self, config: &Config, policy: Arc<Policy>, upstreams: Arc<Upstreams>) -> Regime {
        Regime::new(proxy::Parts {
            verifier: self.verifier.clone(),
            policy,
            headers: config.headers.clone(),
            config: config.proxy.clone(),
            upstreams,
            access_log: config.log.access,
        })
    }

    fn api(&self, config: &Config, policy: Arc<Policy>) -> Router {
        let api = Api {
            decider: Decider::new(self.verifier.clone(), config.headers.clone()),
            verifier: self.verifier.clone(),
            policy,
            clock: self.clock.clone(),
            metrics: self.metrics.clone(),
            realms: config.realms.clone(),
            config: config.api.clone(),
        };
        api.router()
    }
}

/// A running gate, as far as settings concern it.
pub(super) struct Live {
    core: Core,
    /// What is in force.
    pub(super) config: Config,
    /// Of proxy, API and ops.
    terms: [TermsHandle; 3],
    /// `None`: the proxy is off.
    pub(super) gate: Option<LiveGate>,
    pub(super) api: Arc<ArcSwap<Router>>,
    pub(super) shutdown: Arc<ArcSwap<ShutdownConfig>>,
    /// True when upstreams need no care any more.
    stop: watch::Receiver<bool>,
    /// Looks after upstreams.
    care: JoinSet<()>,
}

/// What the proxy judges and forwards by.
pub(super) struct LiveGate {
    pub(super) regime: Arc<ArcSwap<Regime>>,
    upstreams: Arc<Upstreams>,
    care: AbortHandle,
}

/// What is read of files for new settings.
struct Prepared {
    terms: [NewTerms; 3],
    /// `None`: there is no store.
    renewal: Option<Renewal>,
    /// `None`: those that there are stay.
    upstreams: Option<Upstreams>,
}

impl Live {
    /// Makes what serves under `config`.
    ///
    /// # Errors
    /// If an upstream can never work as configured.
    pub(super) async fn start(
        core: Core,
        config: Config,
        terms: [TermsHandle; 3],
        stop: watch::Receiver<bool>,
    ) -> Result<Self, Failure> {
        let policy = Arc::new(config.policy());
        let api = Arc::new(ArcSwap::from_pointee(core.api(&config, policy.clone())));
        let shutdown = Arc::new(ArcSwap::from_pointee(config.shutdown));
        let care = JoinSet::new();
        let gate = None;
        let mut live = Self { core, config, terms, gate, api, shutdown, stop, care };
        if !live.config.proxy.listen.is_empty() {
            let upstreams = Upstreams::new(&live.config.proxy, live.core.metrics.clone())?;
            upstreams.resolve().await;
            let upstreams = Arc::new(upstreams);
            let regime =
                ArcSwap::from_pointee(live.core.regime(&live.config, policy, upstreams.clone()));
            let care = live.look_after(upstreams.clone());
            live.gate = Some(LiveGate { regime: Arc::new(regime), upstreams, care });
        }
        Ok(live)
    }

    /// Takes `wanted` over as far as a running gate can; names the settings that need a restart.
    ///
    /// # Errors
    /// Why it cannot: nothing has changed then.
    pub(super) async fn take_over(
        &mut self,
        wanted: Config,
    ) -> Result<Vec<&'static str>, Vec<Problem>> {
        let (config, kept) = wanted.as_far_as_running(&self.config);
        let prepared = self.prepare(&config).await?;
        if let (Some(upstreams), Some(gate)) = (&prepared.upstreams, &self.gate) {
            upstreams.succeed(&gate.upstreams).await;
        }
        self.put_into_force(config, prepared);
        Ok(kept)
    }

    async fn prepare(&self, config: &Config) -> Result<Prepared, Vec<Problem>> {
        let (config, terms) = (config.clone(), self.terms.clone());
        let metrics = self.core.metrics.clone();
        let others = self.needs_other_upstreams(&config);
        let preparing = spawn_blocking(move || prepare(&config, &terms, others, metrics));
        preparing.await.unwrap_or_else(|_| Err(vec![problem("reload", "preparing failed")]))
    }

    /// CA files may have changed, without a change of settings.
    fn needs_other_upstreams(&self, config: &Config) -> bool {
        if self.gate.is_none() {
            return false;
        }
        let (new, old) = (&config.proxy, &self.config.proxy);
        let by_file =
            |upstream: &Upstream| upstream.tls.as_ref().is_some_and(|tls| tls.ca_file.is_some());
        (&new.upstreams, &new.timeouts, &new.health) != (&old.upstreams, &old.timeouts, &old.health)
            || new.upstreams.iter().any(by_file)
    }

    /// Cannot fail. Each part changes at once and as a whole.
    fn put_into_force(&mut self, config: Config, prepared: Prepared) {
        let core = self.core.clone();
        core.metrics.set_realms(known_realms(&config));
        if let Some(entries) = core.verifier.entries() {
            if prepared.renewal.is_some_and(|renewal| entries.store.renew(renewal)) {
                entries.directory.keys_changed();
            }
            entries.directory.set_max_stale(config.store.max_stale);
            if config.rules != *entries.directory.rules() {
                entries.set_rules(config.rules.clone());
            }
        }
        core.throttle.set_config(config.throttle);
        self.shutdown.store(Arc::new(config.shutdown));
        for (terms, new) in self.terms.iter().zip(prepared.terms) {
            terms.apply(new);
        }
        let policy = Arc::new(config.policy());
        self.api.store(Arc::new(core.api(&config, policy.clone())));
        if let Some(upstreams) = prepared.upstreams.map(Arc::new) {
            let care = self.look_after(upstreams.clone());
            if let Some(gate) = &mut self.gate {
                gate.upstreams = upstreams;
                std::mem::replace(&mut gate.care, care).abort();
            }
        }
        if let Some(gate) = &self.gate {
            gate.regime.store(Arc::new(core.regime(&config, policy, gate.upstreams.clone())));
        }
        self.config = config;
    }

    fn look_after(&mut self, upstreams: Arc<Upstreams>) -> AbortHandle {
        // Those that ended are forgotten.
        while self.care.try_join_next().is_some() {}
        let stop = self.stop.clone();
        self.care.spawn(async move { upstreams.run(stop).await })
    }
}

fn prepare(
    config: &Config,
    [proxy, api, ops]: &[TermsHandle; 3],
    other_upstreams: bool,
    metrics: Arc<Metrics>,
) -> Result<Prepared, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut terms = |key, handle: &TermsHandle, listen, limits, trusted| {
        let new = handle.prepare(listen, limits, trusted);
        new.map_err(|errors| problems.extend(errors.iter().map(|error| problem(key, error)))).ok()
    };
    let terms = (
        terms(
            "proxy.listen",
            proxy,
            &config.proxy.listen,
            config.proxy.limits,
            &config.proxy.trusted_proxies,
        ),
        terms(
            "api.listen",
            api,
            &config.api.listen,
            config.api.limits,
            &config.api.trusted_proxies,
        ),
        terms("ops.listen", ops, &config.ops.listen, config.ops.limits, &[]),
    );
    let has_store = config.remote.is_none();
    let renewal = has_store
        .then(|| Renewal::read(&config.store))
        .transpose()
        .map_err(|error| problems.push(problem("store", error)));
    let upstreams = other_upstreams
        .then(|| Upstreams::new(&config.proxy, metrics))
        .transpose()
        .map_err(|error| problems.push(problem("proxy.upstream", error)));
    match (terms, renewal, upstreams) {
        ((Some(proxy), Some(api), Some(ops)), Ok(renewal), Ok(upstreams)) => {
            Ok(Prepared { terms: [proxy, api, ops], renewal, upstreams })
        }
        _ => Err(problems),
    }
}

fn problem(key: &str, message: impl ToString) -> Problem {
    Problem { key: key.to_owned(), message: message.to_string() }
}
