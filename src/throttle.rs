//! Failed attempts (RFC 4226 section 7.3): who has to wait before the next token is looked at.
//!
//! Three buckets close, each by its own quota: that of one name from one source, that of one name
//! from all sources, and that of one source whatever the name. Only the first one concerns a source
//! that proved itself under that name not long ago, so nobody can lock a working service out by
//! guessing from elsewhere. Whoever got hold of one token could make sources known with it: so only so
//! many become known in a day, and one that only fails from then on is a stranger again.
//!
//! Decisions are made on tables in this process: of fixed size, the same for names that exist and
//! names that do not. Failures of existing names are also counted in the store, behind the request's
//! back, and what other gates counted there closes the buckets here. While the store is away, or where
//! there is none, every gate counts for itself.

use std::hash::{BuildHasher as _, RandomState};
use std::hint::black_box;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use ring::digest::{SHA256, digest};
use tokio::sync::Semaphore;
use tokio::time::MissedTickBehavior;
use tracing::debug;

use crate::audit::Event;
use crate::clock::{Clock, Moment};
use crate::config::ThrottleConfig;
use crate::entry::{EntryId, Principal, PrincipalRef};
use crate::metrics::Metrics;
use crate::net::source_of;
use crate::store::{Failure, LEDGER_PATIENCE, MAX_LEDGER_BATCH, Quota, Store};

mod table;

use table::Table;

/// Reports that wait for the store; further ones stay in this process.
const QUEUE: usize = 4096;
/// Questions to the store at the same time; further ones wait for their turn.
const RECALLS: usize = 32;
/// Sources that become known under one name.
const NEWCOMERS: Quota = Quota { failures: 100, per: Duration::from_secs(24 * 3600) };
/// Failures after which a known source that did not prove itself again is a stranger.
const LAPSES: Quota = Quota { failures: 100, per: Duration::from_secs(30 * 24 * 3600) };
/// How long the store's answer that a source is not known stands.
const NOT_REMEMBERED_FOR: Duration = Duration::from_secs(60);
/// How often a success is written to the store again, at most.
const REFRESH: Duration = Duration::from_secs(3600);
/// How far the store's clock and ours may be apart within one answer.
const ROUNDING: Duration = Duration::from_secs(1);
/// How often the store is told.
const SHARE: Duration = Duration::from_millis(50);
/// How often closed buckets are counted for the metrics.
const LOOK_AROUND: Duration = Duration::from_secs(5);

/// Where an attempt comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// A client's address: of IPv6 the first 64 bits, of which one client may have any.
    Address(IpAddr),
    /// A Unix socket of this machine.
    Local,
    /// A service that asks about others, and does not say where they are.
    Service(EntryId),
    /// What such a service says of where its client is: it is believed about its own clients only.
    ClientOf(EntryId, IpAddr),
}

impl Source {
    /// The source behind a peer's address; `None`: a Unix socket.
    #[must_use]
    pub fn of(address: Option<IpAddr>) -> Self {
        address.map_or(Self::Local, |address| Self::Address(source_of(address)))
    }

    /// The client's address, if there is one.
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        match self {
            Self::Address(address) | Self::ClientOf(_, address) => Some(*address),
            Self::Local | Self::Service(_) => None,
        }
    }

    /// The source behind `address`, as `service` says.
    #[must_use]
    pub fn told_by(service: EntryId, address: IpAddr) -> Self {
        match Self::of(Some(address)) {
            Self::Address(address) => Self::ClientOf(service, address),
            other => other,
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(IpAddr::V6(network)) => write!(f, "{network}/64"),
            Self::Address(v4) => v4.fmt(f),
            Self::Local => f.write_str("local"),
            Self::Service(id) => write!(f, "service {id}"),
            Self::ClientOf(id, address) => write!(f, "{} of service {id}", Self::Address(*address)),
        }
    }
}

/// Which bucket is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// One name from one source.
    Source,
    /// One name from everywhere.
    Entry,
    /// One source, whatever the name.
    Address,
}

impl Scope {
    /// A bounded word for logs and metric labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Entry => "entry",
            Self::Address => "address",
        }
    }
}

/// An attempt that comes too early: its token is not looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Throttled {
    /// From then on the next one is looked at.
    pub retry_after: Duration,
    /// Which bucket is closed the longest.
    pub by: Scope,
}

impl Throttled {
    /// For `Retry-After`: whole seconds, rounded up.
    #[must_use]
    pub fn retry_after_seconds(&self) -> u64 {
        self.retry_after.as_secs() + u64::from(self.retry_after.subsec_nanos() > 0)
    }
}

/// What an attempt is counted under, in the tables of this process.
#[derive(Clone, Copy)]
struct Keys {
    pair: u64,
    name: u64,
    source: u64,
}

/// An attempt whose token may be looked at: what it shows is told with it.
#[must_use]
#[derive(Clone, Copy)]
pub struct Admitted<'a> {
    who: PrincipalRef<'a>,
    source: Source,
    /// `None`: nothing is counted.
    keys: Option<Keys>,
    /// Since the throttle's origin.
    at: Duration,
}

/// What the store is told, behind the request's back.
struct Report {
    keys: Keys,
    who: Principal,
    source: Source,
    what: What,
}

#[derive(Clone, Copy)]
enum What {
    /// A token was refused. What known sources do counts against themselves alone.
    Failed { is_known: bool },
    /// A name proved itself.
    Succeeded,
}

/// Counts failed attempts and says who has to wait.
pub struct Throttle {
    config: ArcSwap<ThrottleConfig>,
    /// `None`: a remote server has the entries.
    store: Option<Store>,
    metrics: Arc<Metrics>,
    origin: Instant,
    hasher: RandomState,
    /// Levels of the buckets of one name from one source.
    pairs: Table,
    /// Levels of the buckets of one name.
    names: Table,
    /// Levels of the buckets of one source.
    sources: Table,
    /// Until when a name's success from a source is remembered.
    successes: Table,
    /// Until when the store need not be asked about one.
    strangers: Table,
    /// Levels of what sources that became known count in, by name.
    newcomers: Table,
    /// Levels of what failures of known sources count in, by name and source.
    lapses: Table,
    recalls: Semaphore,
    /// Held while the store is told: who stops waits for what is under way.
    telling: tokio::sync::Mutex<()>,
    /// For the store, in the order that they came.
    waiting: Mutex<Vec<Report>>,
}

impl Throttle {
    /// Nobody has failed yet.
    #[must_use]
    pub fn new(
        config: ThrottleConfig,
        store: Option<Store>,
        metrics: Arc<Metrics>,
        now: Moment,
    ) -> Self {
        Self {
            config: ArcSwap::from_pointee(config),
            store,
            metrics,
            origin: now.monotonic,
            hasher: RandomState::new(),
            pairs: Table::new(),
            names: Table::new(),
            sources: Table::new(),
            successes: Table::new(),
            strangers: Table::new(),
            newcomers: Table::new(),
            lapses: Table::new(),
            recalls: Semaphore::new(RECALLS),
            telling: tokio::sync::Mutex::default(),
            waiting: Mutex::default(),
        }
    }

    /// Attempts from now on are counted so. What was counted before keeps its time: a bucket that is
    /// closed opens when it would have, or earlier where more is allowed now.
    pub fn set_config(&self, config: ThrottleConfig) {
        self.config.store(Arc::new(config));
    }

    fn config(&self) -> ThrottleConfig {
        **self.config.load()
    }

    /// Whether a token of `who` from `source` may be looked at.
    ///
    /// # Errors
    /// If not, until when.
    pub async fn check<'a>(
        &self,
        who: PrincipalRef<'a>,
        source: Source,
        now: Moment,
    ) -> Result<Admitted<'a>, Throttled> {
        let (config, at) = (self.config(), self.since_origin(now));
        if !config.enabled {
            return Ok(Admitted { who, source, keys: None, at });
        }
        let keys = self.keys(who, source);
        let closed = |table: &Table, key, quota: Quota, by| {
            let retry_after = quota.closed_for(table.get(key, at), at);
            (!retry_after.is_zero()).then_some(Throttled { retry_after, by })
        };
        let name = closed(&self.names, keys.name, config.per_entry, Scope::Entry);
        let source_wide = closed(&self.sources, keys.source, config.per_address, Scope::Address);
        let shared = [name, source_wide].into_iter().flatten().max_by_key(|t| t.retry_after);
        let shared = match shared {
            Some(_) if self.is_known(who, source, keys, at, now).await => None,
            shared => shared,
        };
        // Last: what failed while the store was asked has been counted.
        let own = closed(&self.pairs, keys.pair, config.per_source, Scope::Source);
        match own.into_iter().chain(shared).max_by_key(|t| t.retry_after) {
            None => Ok(Admitted { who, source, keys: Some(keys), at }),
            Some(throttled) => {
                self.metrics.throttled(throttled.by.as_str());
                Err(throttled)
            }
        }
    }

    /// Counts a refused token. `id` is that of the entry, if there is one.
    pub fn failed(&self, attempt: Admitted<'_>, id: Option<EntryId>) {
        let Admitted { who, source, keys: Some(keys), at } = attempt else { return };
        let config = self.config();
        let fail = |table: &Table, key, quota: Quota| {
            let level = table.update(key, |level| quota.after_failure(level, at));
            !quota.closed_for(level, at).is_zero()
        };
        let closed = |scope, is: bool| is.then(|| log_closed(scope, who, source, id));
        closed(Scope::Source, fail(&self.pairs, keys.pair, config.per_source));
        // A source that is known under this name is held by its own bucket alone.
        let is_known = !self.successes.get(keys.pair, at).is_zero() && !self.has_lapsed(keys, at);
        if is_known {
            self.lapses.update(keys.pair, |level| LAPSES.after_failure(level, at));
        } else {
            closed(Scope::Entry, fail(&self.names, keys.name, config.per_entry));
            if !matches!(source, Source::Service(_)) {
                closed(Scope::Address, fail(&self.sources, keys.source, config.per_address));
            }
        }
        // Made for unknown names too: that is the work that could be noticed.
        let what = What::Failed { is_known };
        let report = black_box(Report { keys, who: who.to_owned(), source, what });
        if id.is_some() {
            self.report(report);
        }
    }

    /// Notes that an attempt was proven.
    pub fn succeeded(&self, attempt: Admitted<'_>) {
        let Admitted { who, source, keys: Some(keys), at } = attempt else { return };
        if !self.lapses.get(keys.pair, at).is_zero() {
            self.lapses.set(keys.pair, Duration::ZERO);
        }
        let keep = self.config().remember_success;
        let fresh = at + keep.saturating_sub(REFRESH.min(keep / 4));
        let until = self.successes.get(keys.pair, at);
        if until >= fresh || (until.is_zero() && !self.admit(keys, at)) {
            return;
        }
        self.successes.set(keys.pair, at + keep);
        self.report(Report { keys, who: who.to_owned(), source, what: What::Succeeded });
    }

    /// Tells the store what happens here and learns what happened elsewhere. Never ends.
    pub async fn run(&self, clock: Arc<dyn Clock>) {
        let every = |period| {
            let mut interval = tokio::time::interval(period);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        };
        let (mut share, mut look_around) = (every(SHARE), every(LOOK_AROUND));
        loop {
            tokio::select! {
                _ = share.tick() => self.flush(clock.now()).await,
                _ = look_around.tick() => self.look_around(clock.now()),
            }
        }
    }

    /// Tells the store what it has not been told yet.
    pub async fn flush(&self, now: Moment) {
        let _telling = self.telling.lock().await;
        let mut waiting = std::mem::take(&mut *self.waiting());
        while !waiting.is_empty() {
            // Each may be a failure in two buckets.
            let rest = waiting.split_off(waiting.len().min(MAX_LEDGER_BATCH / 2));
            if !self.tell(std::mem::replace(&mut waiting, rest), now).await {
                // It would not take these either, and each try takes time.
                self.metrics.throttle_unshared.inc_by(waiting.len() as u64);
                return;
            }
        }
    }

    /// Whether the source has proved itself under that name not long ago, here or elsewhere.
    async fn is_known(
        &self,
        who: PrincipalRef<'_>,
        source: Source,
        keys: Keys,
        at: Duration,
        now: Moment,
    ) -> bool {
        if self.has_lapsed(keys, at) {
            return false;
        }
        if let Some(is_known) = self.recollection(keys, at) {
            return is_known;
        }
        let Some(store) = &self.store else { return false };
        // In turn, not refused: the calls of a known source may come many at a time.
        let turn = tokio::time::timeout(LEDGER_PATIENCE, self.recalls.acquire());
        let Ok(Ok(_turn)) = turn.await else { return false };
        if let Some(is_known) = self.recollection(keys, at) {
            return is_known;
        }
        let Ok(is_known) = store.remembers(&stored_key('s', who, Some(source)), now.unix).await
        else {
            // That says nothing about the source: the next attempt asks again.
            return false;
        };
        if is_known {
            // Until a success here says more.
            self.successes.set(keys.pair, at + REFRESH);
        } else {
            self.strangers.set(keys.pair, at + NOT_REMEMBERED_FOR);
        }
        is_known
    }

    /// Whether the source is known, if that need not be asked.
    fn recollection(&self, keys: Keys, at: Duration) -> Option<bool> {
        if !self.successes.get(keys.pair, at).is_zero() {
            return Some(true);
        }
        (!self.strangers.get(keys.pair, at).is_zero()).then_some(false)
    }

    /// Whether a known source has failed too often since it proved itself.
    fn has_lapsed(&self, keys: Keys, at: Duration) -> bool {
        !LAPSES.closed_for(self.lapses.get(keys.pair, at), at).is_zero()
    }

    /// Whether one more source may become known under that name; counts it if so.
    fn admit(&self, keys: Keys, at: Duration) -> bool {
        let mut admitted = false;
        self.newcomers.update(keys.name, |level| {
            admitted = NEWCOMERS.closed_for(level, at).is_zero();
            if admitted { NEWCOMERS.after_failure(level, at) } else { level }
        });
        admitted
    }

    /// Leaves a report for the next [`Self::flush`]. Nobody is woken: that would take time, and only for
    /// names that exist.
    fn report(&self, report: Report) {
        if self.store.is_none() {
            return;
        }
        let mut waiting = self.waiting();
        if waiting.len() < QUEUE {
            waiting.push(report);
        } else {
            self.metrics.throttle_unshared.inc();
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Report>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the store took it.
    async fn tell(&self, batch: Vec<Report>, now: Moment) -> bool {
        let Some(store) = &self.store else { return true };
        let (config, reports) = (self.config(), batch.len() as u64);
        let (mut failures, mut places, mut successes) = (Vec::new(), Vec::new(), Vec::new());
        for Report { keys, who, source, what } in batch {
            let who = (&who).into();
            let What::Failed { is_known } = what else {
                successes.push(stored_key('s', who, Some(source)));
                continue;
            };
            let quota = config.per_source;
            failures.push(Failure { bucket: stored_key('p', who, Some(source)), quota });
            places.push((&self.pairs, keys.pair, quota));
            if !is_known {
                let quota = config.per_entry;
                failures.push(Failure { bucket: stored_key('n', who, None), quota });
                places.push((&self.names, keys.name, quota));
            }
        }
        let told = async {
            if !successes.is_empty() {
                store.remember(&successes, config.remember_success, now.unix).await?;
            }
            if failures.is_empty() {
                Ok(Vec::new())
            } else {
                store.count_failures(&failures, now.unix).await
            }
        };
        match told.await {
            Ok(waits) => {
                let at = self.since_origin(now);
                for ((table, key, quota), wait) in places.into_iter().zip(waits) {
                    let shared = quota.level_closed_for(wait, at);
                    // What was counted here only is not to look different for being counted there
                    // too: names that do not exist never are.
                    let is_news = |level| shared > level + ROUNDING;
                    table.update(key, |level| if is_news(level) { shared } else { level });
                }
            }
            // The store's own metrics and the follower say more.
            Err(error) => {
                self.metrics.throttle_unshared.inc_by(reports);
                debug!(%error, "failed attempts are counted in this process only");
                return false;
            }
        }
        true
    }

    fn look_around(&self, now: Moment) {
        let (config, at) = (self.config(), self.since_origin(now));
        for (table, quota, scope) in [
            (&self.pairs, config.per_source, Scope::Source),
            (&self.names, config.per_entry, Scope::Entry),
            (&self.sources, config.per_address, Scope::Address),
        ] {
            let closed = table.count(|level| !quota.closed_for(level, at).is_zero());
            self.metrics.set_throttled(scope.as_str(), closed);
        }
    }

    fn keys(&self, who: PrincipalRef<'_>, source: Source) -> Keys {
        let [name, source] = [self.hasher.hash_one(who), self.hasher.hash_one(source)];
        // Neither can be chosen, so neither can what they make together.
        Keys { pair: name.rotate_left(32) ^ source, name, source }
    }

    fn since_origin(&self, now: Moment) -> Duration {
        now.monotonic.saturating_duration_since(self.origin)
    }
}

/// From here on tokens are not looked at. Only names of existing entries are told: others are anybody's
/// text. What opens again does so by itself, and makes no event.
fn log_closed(scope: Scope, who: PrincipalRef<'_>, source: Source, id: Option<EntryId>) {
    let entry = match (scope, id) {
        (Scope::Address, _) => None,
        (_, Some(id)) => Some((id, who.to_owned())),
        (_, None) => return,
    };
    let (client, caller) = match source {
        Source::Address(address) => (Some(address), None),
        Source::Local => (None, None),
        Source::Service(id) => (None, Some(format!("service {id}"))),
        Source::ClientOf(id, address) => (Some(address), Some(format!("service {id}"))),
    };
    Event {
        action: "throttle",
        outcome: "closed",
        reason: Some(scope.as_str()),
        caller,
        client,
        id: entry.as_ref().map(|(id, _)| *id),
        subject: entry.as_ref().map(|(_, who)| who),
        ..Event::default()
    }
    .log();
}

/// The key of a bucket or a success in the store: the same on every gate, and of fixed length however
/// long the names are.
fn stored_key(kind: char, who: PrincipalRef<'_>, source: Option<Source>) -> String {
    let source = source.map_or_else(String::new, |source| source.to_string());
    let mut text = Vec::new();
    for part in [who.realm(), who.name(), &source] {
        text.extend_from_slice(&(part.len() as u64).to_be_bytes());
        text.extend_from_slice(part.as_bytes());
    }
    let digest = digest(&SHA256, &text);
    format!("{kind}{}", data_encoding::HEXLOWER.encode(&digest.as_ref()[..16]))
}
