//! The one task that writes the directory: loads the store, then follows its change log.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

use super::{Directory, Status};
use crate::audit::Event;
use crate::clock::Clock;
use crate::entry::Principal;
use crate::metrics::Metrics;
use crate::store::{Feed, Position, Row, Step, Store, StoreError};

/// Shortest and longest pause before the store is asked again after a failure.
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_secs(1);
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
}

impl Follower {
    /// Joins the parts; [`Self::run`] does the work.
    #[must_use]
    pub fn new(
        store: Store,
        directory: Arc<Directory>,
        clock: Arc<dyn Clock>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { store, directory, clock, metrics }
    }

    /// Follows for ever; dropping the future stops it.
    pub async fn run(self) -> ! {
        if self.store.is_local() {
            self.make_ready().await;
        }
        let mut place = None;
        let mut pause = RETRY_MIN;
        loop {
            let error = self.follow(&mut place, &mut pause).await;
            self.note_trouble(&error);
            tokio::time::sleep(jittered(pause)).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    /// Makes a file of one's own if it is new. Only at the start, and never a shared server: what is
    /// empty later, or there, may have been emptied.
    async fn make_ready(&self) {
        let mut pause = RETRY_MIN;
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
                Err(error) => self.note_trouble(&error),
            }
            tokio::time::sleep(jittered(pause)).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    /// Connects and follows until something fails.
    async fn follow(&self, place: &mut Option<Place>, pause: &mut Duration) -> StoreError {
        let mut feed = match self.store.feed(self.clock.clone()).await {
            Ok(feed) => feed,
            Err(error) => return error,
        };
        loop {
            if let Err(error) = self.advance(feed.as_mut(), place).await {
                return error;
            }
            if place.as_ref().is_some_and(|at| at.proven) {
                *pause = RETRY_MIN;
            }
        }
    }

    async fn advance(
        &self,
        feed: &mut dyn Feed,
        place: &mut Option<Place>,
    ) -> Result<(), StoreError> {
        let Some(at) = place else {
            self.directory.begin_load();
            let position = feed.load(&mut |row| self.apply(row)).await?;
            *place = Some(Place { position, proven: false });
            return Ok(());
        };
        match feed.poll(&at.position).await? {
            Step::Current { as_of } => self.proven(at, as_of),
            Step::Changed { rows, position, as_of } => {
                self.metrics.directory_changes.inc_by(rows.len() as u64);
                let each = rows.len() <= EVENTS_AT_ONCE;
                if !each {
                    let entries = Some(rows.len());
                    Event { action: "entries", outcome: "changed", entries, ..Event::default() }
                        .log();
                }
                for (principal, row) in rows {
                    let before = self.accepts(&principal);
                    match row {
                        Some(row) => self.apply(row),
                        None => self.directory.remove(&principal),
                    }
                    let after = self.accepts(&principal);
                    if each && before != after {
                        note_turn(&principal, after);
                    }
                }
                at.position = position;
                self.proven(at, as_of);
            }
            Step::Lost(why) if at.proven => {
                warn!(why, "the place in the change log is lost, loading all entries again");
                *place = None;
            }
            // Loading again at once could go on for ever.
            Step::Lost(why) => {
                *place = None;
                return Err(StoreError::Unreachable(format!("{why}, while entries were loaded")));
            }
        }
        Ok(())
    }

    fn proven(&self, at: &mut Place, as_of: Instant) {
        let version = at.position.version;
        if !std::mem::replace(&mut at.proven, true) {
            self.directory.end_load();
            self.metrics.directory_full_loads.inc();
            info!(entries = self.directory.len(), version = version.0, "entries loaded");
        }
        self.directory.proven(version, as_of);
    }

    /// Whether the right token of `who` is accepted, its end aside: that comes without a change.
    fn accepts(&self, who: &Principal) -> bool {
        let slots = self.directory.slots.pin();
        let credential = slots.get(who).and_then(|slot| slot.credential.as_ref());
        credential.is_some_and(|credential| credential.enabled)
    }

    fn apply(&self, row: Row) {
        match self.store.unseal(&row) {
            Ok(entry) => self.directory.set(&entry),
            Err(error) => {
                error!(%error, id = row.id.0, "an entry cannot be used, its principal gets 503");
                self.metrics.directory_broken_entries.inc();
                self.directory.set_broken(row.principal);
            }
        }
    }

    /// Logs a trouble once, not at every retry.
    fn note_trouble(&self, error: &StoreError) {
        self.metrics.store_error(self.store.kind(), "follow", error);
        let status = self.directory.status();
        let text = error.to_string();
        if status.trouble.as_ref() != Some(&text) {
            error!(error = text, "cannot follow the store, trying again");
            self.directory.report(Status { loaded: status.loaded, trouble: Some(text) });
        }
    }
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
