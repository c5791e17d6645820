//! The one task that writes the directory: loads the store, then follows its change log.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::{Directory, Opener, Status};
use crate::audit::Event;
use crate::clock::Clock;
use crate::entry::Principal;
use crate::metrics::Metrics;
use crate::store::{Feed, Position, Row, Step, Store, StoreError};

/// Shortest and longest pause before the store is asked again after a failure.
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// Longest pause while it cannot be reached, or is empty: the gate should be back soon after the store is.
const RETRY_MAX_AWAY: Duration = Duration::from_millis(70);
/// How long a server that is empty is asked on the same connection: another one may lead elsewhere.
const KEPT_WHILE_EMPTY: Duration = Duration::from_secs(5);
/// A full load that took less is repeated at once; gates that lose their place together share the store's
/// time otherwise.
const CHEAP_LOAD: Duration = Duration::from_millis(50);
/// The time over which gates spread their full loads, as a multiple of what one took.
const LOAD_SPREAD: u32 = 4;
/// The longest such time, as a part of `max_stale`.
const MAX_LOAD_SPREAD: u32 = 4;
/// More changes that come at once, as of an import, are one audit event.
const EVENTS_AT_ONCE: usize = 100;
/// How often it is looked at whether entries are current.
const CURRENCY_CHECK: Duration = Duration::from_millis(100);

/// How far the directory has followed.
struct Place {
    position: Position,
    /// `false` from a full load on until the log is seen to continue from there: only then was it one
    /// history that was loaded, and not the remains of one and the beginning of another.
    proven: bool,
}

/// Keeps a [`Directory`] current.
pub struct Follower {
    store: Store,
    directory: Arc<Directory>,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
    /// `None`: all entries must be loaded.
    place: Option<Place>,
    /// Before the store is asked again.
    pause: Duration,
    /// What the last full load took.
    load_cost: Duration,
}

impl Follower {
    /// A follower for `directory`, of its store; [`Self::run`] does the work.
    #[must_use]
    pub fn new(directory: Arc<Directory>, clock: Arc<dyn Clock>) -> Self {
        let Opener { store, metrics, .. } = directory.opener.clone();
        let (place, pause, load_cost) = (None, RETRY_MIN, Duration::ZERO);
        Self { store, directory, clock, metrics, place, pause, load_cost }
    }

    /// Follows for ever; dropping the future stops it.
    pub async fn run(mut self) -> ! {
        if self.store.is_local() {
            self.make_ready().await;
        }
        loop {
            let error = self.follow().await;
            self.note_trouble(&error);
            self.wait_after(&error).await;
        }
    }

    /// Waits before another try; longer from one to the next.
    async fn wait_after(&mut self, error: &StoreError) {
        let longest = match error {
            StoreError::Unreachable(_) => RETRY_MAX_AWAY,
            error if opens_later(error) => RETRY_MAX_AWAY,
            _ => RETRY_MAX,
        };
        let pause = self.pause.min(longest);
        tokio::time::sleep(jittered(pause)).await;
        self.pause = (pause * 2).min(longest);
    }

    /// Makes a file of one's own if it is new. Only at the start, and never a shared server: what is
    /// empty later, or there, may have been emptied.
    async fn make_ready(&mut self) {
        loop {
            match self.store.init().await {
                Ok(false) => return,
                Ok(true) => {
                    info!("the store is new: make the first admin with `otpgate store bootstrap`");
                    return;
                }
                // What is there may be followed, if not written.
                Err(StoreError::ReadOnly(why)) if self.store.list(None, 1).await.is_ok() => {
                    warn!(why, "the store takes no writes");
                    return;
                }
                Err(error) => {
                    self.note_trouble(&error);
                    self.wait_after(&error).await;
                }
            }
        }
    }

    /// Connects and follows until something fails.
    async fn follow(&mut self) -> StoreError {
        let mut feed = match self.store.feed(self.clock.clone()).await {
            Ok(feed) => feed,
            Err(error) => return error,
        };
        feed.narrow(self.directory.scope().clone());
        let kept_until = self.clock.monotonic() + KEPT_WHILE_EMPTY;
        loop {
            if self.directory.must_reopen() {
                self.place = None;
            }
            let advanced = match &self.place {
                None => self.load(feed.as_mut()).await,
                Some(at) => {
                    let step = feed.poll(&at.position).await;
                    match step {
                        Ok(step) => self.take(step).await,
                        Err(error) => Err(error),
                    }
                }
            };
            if let Err(error) = advanced {
                let is_late = self.clock.monotonic() >= kept_until;
                if is_late || self.store.is_local() || !opens_later(&error) {
                    return error;
                }
                // The connection is good: many gates that made another one each time were a burden.
                self.note_trouble(&error);
                self.wait_after(&error).await;
                continue;
            }
            if self.place.as_ref().is_some_and(|at| at.proven) {
                self.pause = RETRY_MIN;
            }
        }
    }

    /// Loads everything.
    async fn load(&mut self, feed: &mut dyn Feed) -> Result<(), StoreError> {
        let began = self.clock.monotonic();
        let directory = self.directory.clone();
        directory.begin_load();
        let position = match directory.holds_all() {
            true => feed.load(&mut |row| directory.load(&row)).await?,
            false => feed.load_names(&mut |key| directory.load_name(key)).await?,
        };
        directory.raise(&position);
        self.load_cost = self.clock.monotonic().saturating_duration_since(began);
        self.place = Some(Place { position, proven: false });
        Ok(())
    }

    /// Does what the log says.
    async fn take(&mut self, step: Step) -> Result<(), StoreError> {
        let Some(at) = &mut self.place else { return Ok(()) };
        match step {
            Step::Current { as_of } => self.prove(as_of),
            Step::Changed { rows, position, as_of } => {
                at.position = position;
                self.directory.raise(&at.position);
                self.change(rows);
                self.prove(as_of);
            }
            Step::Lost(why) if at.proven => {
                warn!(why, "the place in the change log is lost, loading all entries again");
                self.place = None;
                self.await_turn().await;
            }
            // Loading again at once could go on for ever.
            Step::Lost(why) => {
                self.place = None;
                self.await_turn().await;
                return Err(StoreError::Unreachable(format!("{why}, while entries were loaded")));
            }
        }
        Ok(())
    }

    /// What made this gate lose its place most likely did so to all: if they all loaded at once, the store
    /// would be busy for everybody.
    async fn await_turn(&self) {
        if self.load_cost >= CHEAP_LOAD {
            let most = self.directory.max_stale() / MAX_LOAD_SPREAD;
            let spread = (self.load_cost * LOAD_SPREAD).min(most);
            tokio::time::sleep(spread.mul_f64(rand::random_range(0.0..=1.0))).await;
        }
    }

    fn change(&self, rows: Vec<(Principal, Option<Row>)>) {
        self.metrics.directory_changes.inc_by(rows.len() as u64);
        let each = rows.len() <= EVENTS_AT_ONCE;
        if !each {
            let entries = Some(rows.len());
            Event { action: "entries", outcome: "changed", entries, ..Event::default() }.log();
        }
        for (principal, row) in rows {
            let before = self.directory.accepts(&principal);
            let after = self.directory.change(&principal, row.as_ref());
            // What is not known to have been refused before counts as accepted.
            if each && before.unwrap_or(true) != after {
                note_turn(&principal, after);
            }
        }
    }

    fn prove(&mut self, as_of: Instant) {
        let Some(at) = &mut self.place else { return };
        if !std::mem::replace(&mut at.proven, true) {
            self.directory.end_load();
            self.metrics.directory_full_loads.inc();
            let version = at.position.version.0;
            info!(entries = self.directory.len(), version, "entries loaded");
        }
        self.directory.proven(&at.position, as_of);
    }

    /// Logs a trouble once, not at every retry.
    fn note_trouble(&self, error: &StoreError) {
        // Not even for `max_stale` more is it true that a name is unknown: its entry may just be coming.
        if *error == StoreError::Importing && self.directory.is_empty() {
            self.directory.doubt();
        }
        self.metrics.store_error(self.store.kind(), "follow", error);
        let status = self.directory.status();
        let text = error.to_string();
        if status.trouble.as_ref() != Some(&text) {
            error!(error = text, "cannot follow the store, trying again");
            self.directory.report(Status { loaded: status.loaded, trouble: Some(text) });
        }
    }
}

/// Whether the store answers, and only has no entries to give yet.
fn opens_later(error: &StoreError) -> bool {
    matches!(error, StoreError::NotInitialised | StoreError::Importing)
}

/// Adds to the audit trail that from now on an entry's tokens are accepted here, or refused.
fn note_turn(subject: &Principal, accepted: bool) {
    let outcome = if accepted { "accepted" } else { "refused" };
    Event { action: "entry", outcome, subject: Some(subject), ..Event::default() }.log();
}

/// Adds to the audit trail, for ever, when the gate stops answering because its entries are not known to
/// be current, and when it answers again.
pub async fn watch_currency(directory: Arc<Directory>, clock: Arc<dyn Clock>) -> ! {
    let mut was_current = false;
    loop {
        let is_current = directory.is_current(clock.now());
        if std::mem::replace(&mut was_current, is_current) != is_current {
            let outcome = if is_current { "current" } else { "stale" };
            Event { action: "directory", outcome, ..Event::default() }.log();
        }
        tokio::time::sleep(CURRENCY_CHECK).await;
    }
}

/// Between half of `pause` and all of it, so that many gates do not return at the same instant.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::random_range(0.5..=1.0))
}
