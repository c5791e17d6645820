//! A directory that follows a SQLite store, which a test can stop and start again.

use std::sync::Arc;
use std::time::Duration;

use otpgate::clock::{Clock, SystemClock};
use otpgate::directory::follower::Follower;
use otpgate::directory::{Directory, Hold, TokenRules};
use otpgate::entry::{Entry, Principal, Seed};
use otpgate::metrics::Metrics;
use otpgate::seal::Sealer;
use otpgate::store::Store;
use otpgate::store::sqlite::Sqlite;
use otpgate::verifier::Verifier;
use tempfile::TempDir;
use tokio::task::JoinHandle;

use crate::api_harness::unthrottled_verifier;

/// A principal and its seed.
pub(crate) struct Caller {
    pub(crate) name: &'static str,
    pub(crate) realm: &'static str,
    pub(crate) seed: Seed,
}

impl Caller {
    pub(crate) fn new(name: &'static str, realm: &'static str) -> Self {
        Self { name, realm, seed: Seed::random() }
    }
}

/// A synced directory and what keeps it so.
pub(crate) struct Followed {
    pub(crate) directory: Arc<Directory>,
    store: Store,
    following: Option<JoinHandle<()>>,
    _folder: TempDir,
}

impl Followed {
    pub(crate) fn verifier(&self, metrics: Arc<Metrics>) -> Arc<Verifier> {
        unthrottled_verifier(self.directory.clone(), self.store.clone(), metrics)
    }

    /// With an entry for each of `callers`.
    pub(crate) async fn new(
        callers: &[&Caller],
        max_stale: Duration,
        metrics: Arc<Metrics>,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let backend = Sqlite::new(&folder.path().join("otpgate.db"));
        let store = Store::new(Arc::new(backend), Sealer::off());
        store.init().await.unwrap();
        let mut version = None;
        for caller in callers {
            let who = Principal::parse(caller.name, caller.realm).unwrap();
            let seed = caller.seed.clone();
            version = Some(store.create(|id| Entry::new(id, who, seed, 0)).await.unwrap().1);
        }
        let now = SystemClock.now();
        let (hold, rules) = (Hold::default(), TokenRules::default());
        let directory = Directory::new(store.clone(), &hold, rules, max_stale, metrics, now);
        let directory = Arc::new(directory);
        let mut followed = Self { directory, store, following: None, _folder: folder };
        followed.start();
        assert!(followed.directory.wait_for(version.unwrap(), super::LIMIT).await);
        followed
    }

    /// No news from the store any more.
    pub(crate) fn stop(&mut self) {
        if let Some(task) = self.following.take() {
            task.abort();
        }
    }

    pub(crate) fn start(&mut self) {
        let follower = Follower::new(self.directory.clone(), Arc::new(SystemClock));
        self.following = Some(tokio::spawn(async move {
            follower.run().await;
        }));
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.stop();
    }
}
