//! The one task that writes the directory: loads the store, then follows its change log.

use std::sync::Arc;
use std::time::Duration;

use tracing::{error, info, warn};

use super::{Directory, Status};
use crate::clock::Clock;
use crate::metrics::Metrics;
use crate::store::{Feed, Position, Row, Step, Store, StoreError};

/// Shortest and longest pause before the store is asked again after a failure.
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_secs(1);

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
        let mut position = None;
        let mut pause = RETRY_MIN;
        loop {
            let error = self.follow(&mut position, &mut pause).await;
            self.note_trouble(&error);
            tokio::time::sleep(jittered(pause)).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    /// Connects and follows until something fails.
    async fn follow(&self, position: &mut Option<Position>, pause: &mut Duration) -> StoreError {
        let mut feed = match self.store.feed(self.clock.clone()).await {
            Ok(feed) => feed,
            Err(error) => return error,
        };
        loop {
            if let Err(error) = self.advance(feed.as_mut(), position).await {
                return error;
            }
            *pause = RETRY_MIN;
        }
    }

    async fn advance(
        &self,
        feed: &mut dyn Feed,
        position: &mut Option<Position>,
    ) -> Result<(), StoreError> {
        let Some(at) = position else {
            *position = Some(self.load(feed).await?);
            return Ok(());
        };
        match feed.poll(at).await? {
            Step::Current { as_of } => self.directory.proven(at.version, as_of),
            Step::Changed { rows, position: new, as_of } => {
                self.metrics.directory_changes.inc_by(rows.len() as u64);
                for (principal, row) in rows {
                    match row {
                        Some(row) => self.apply(row),
                        None => self.directory.remove(&principal),
                    }
                }
                self.directory.proven(new.version, as_of);
                *at = new;
            }
            Step::Lost(why) => {
                warn!(why, "the place in the change log is lost, loading all entries again");
                *position = None;
            }
        }
        Ok(())
    }

    async fn load(&self, feed: &mut dyn Feed) -> Result<Position, StoreError> {
        self.directory.begin_load();
        let (position, as_of) = feed.load(&mut |row| self.apply(row)).await?;
        self.directory.end_load();
        self.metrics.directory_full_loads.inc();
        self.directory.proven(position.version, as_of);
        info!(entries = self.directory.len(), version = position.version.0, "entries loaded");
        Ok(position)
    }

    fn apply(&self, row: Row) {
        match self.store.unseal(&row) {
            Ok(stored) => self.directory.set(&stored.entry),
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

/// Between half of `pause` and all of it, so that many gates do not return at the same instant.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::random_range(0.5..=1.0))
}
