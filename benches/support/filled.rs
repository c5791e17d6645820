//! Stores with many entries, and directories that follow them.

use std::sync::Arc;
use std::time::Duration;

use otpgate::clock::Clock;
use otpgate::directory::follower::Follower;
use otpgate::directory::{Directory, Hold, TokenRules};
use otpgate::entry::{Entry, EntryId, Principal, Seed};
use otpgate::metrics::Metrics;
use otpgate::store::{MAX_BATCH, Store, Version};

const PATIENCE: Duration = Duration::from_secs(600);

/// Who has that entry.
pub(crate) fn principal(number: u64) -> Principal {
    Principal::parse(&format!("service-{number}"), "bench").expect("a name")
}

/// One of many entries.
pub(crate) fn entry(number: u64) -> Entry {
    Entry::new(EntryId(number), principal(number), Seed::random(), 1_700_000_000)
}

/// Makes these entries, in batches; the last change.
pub(crate) async fn fill(store: &Store, entries: impl IntoIterator<Item = Entry>) -> Version {
    let mut entries = entries.into_iter().peekable();
    let mut version = Version(0);
    while entries.peek().is_some() {
        let batch: Vec<_> = entries.by_ref().take(MAX_BATCH).collect();
        version = store.insert(&batch).await.expect("inserted");
    }
    version
}

/// A directory with its follower, which ends with it.
pub(crate) struct Gate {
    pub(crate) directory: Arc<Directory>,
    task: tokio::task::JoinHandle<()>,
}

impl Gate {
    pub(crate) fn start(store: Store, hold: &Hold, clock: Arc<dyn Clock>) -> Self {
        let (rules, metrics) = (TokenRules::default(), Arc::new(Metrics::new([])));
        let (stale, now) = (Duration::from_secs(15), clock.now());
        let directory = Arc::new(Directory::new(store, hold, rules, stale, metrics, now));
        let follower = Follower::new(directory.clone(), clock);
        let task = tokio::spawn(async move { follower.run().await });
        Self { directory, task }
    }

    /// Waits until it has that change.
    pub(crate) async fn has(&self, version: Version) {
        assert!(self.directory.wait_for(version, PATIENCE).await);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}
