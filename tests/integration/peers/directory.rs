//! A directory that follows a store in memory, which a test can take away.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use otpgate::clock::{Clock, SystemClock};
use otpgate::directory::follower::Follower;
use otpgate::directory::{Directory, TokenRules};
use otpgate::entry::{Entry, EntryId, Principal, PrincipalRef, Seed};
use otpgate::metrics::Metrics;
use otpgate::seal::Sealer;
use otpgate::store::{
    Action, Backend, Feed, Mutation, Nonce, Position, Row, Step, Store, StoreError, Version,
};
use tokio::sync::watch;

struct Memory {
    rows: Vec<Row>,
    down: Arc<AtomicBool>,
}

struct MemoryFeed {
    rows: Vec<Row>,
    down: Arc<AtomicBool>,
    clock: Arc<dyn Clock>,
}

impl MemoryFeed {
    fn now(&self) -> Result<Instant, StoreError> {
        if self.down.load(Ordering::SeqCst) {
            return Err(StoreError::Unreachable("taken away".into()));
        }
        Ok(self.clock.now().monotonic)
    }
}

#[async_trait]
impl Feed for MemoryFeed {
    async fn load(
        &mut self,
        take: &mut (dyn FnMut(Row) + Send),
    ) -> Result<(Position, Instant), StoreError> {
        let now = self.now()?;
        self.rows.iter().cloned().for_each(take);
        Ok((Position { version: Version(1), nonce: Nonce::random() }, now))
    }

    async fn poll(&mut self, _: &Position) -> Result<Step, StoreError> {
        tokio::time::sleep(Duration::from_millis(10)).await;
        Ok(Step::Current { as_of: self.now()? })
    }
}

#[async_trait]
impl Backend for Memory {
    fn kind(&self) -> &'static str {
        "memory"
    }
    async fn init(&self) -> Result<bool, StoreError> {
        Ok(false)
    }
    async fn get(&self, _: PrincipalRef<'_>) -> Result<Option<Row>, StoreError> {
        Ok(None)
    }
    async fn get_by_id(&self, _: EntryId) -> Result<Option<Row>, StoreError> {
        Ok(None)
    }
    async fn list(&self, _: Option<EntryId>, _: usize) -> Result<Vec<Row>, StoreError> {
        Ok(Vec::new())
    }
    async fn reserve_id(&self) -> Result<EntryId, StoreError> {
        Ok(EntryId(1))
    }
    async fn commit(&self, batch: &[Mutation]) -> Result<Version, StoreError> {
        assert!(batch.iter().all(|m| matches!(m.action, Action::Delete)), "tests do not write");
        Ok(Version(1))
    }
    async fn feed(&self, clock: Arc<dyn Clock>) -> Result<Box<dyn Feed>, StoreError> {
        let (rows, down) = (self.rows.clone(), self.down.clone());
        Ok(Box::new(MemoryFeed { rows, down, clock }))
    }
}

/// A principal and its seed.
pub struct Caller {
    pub name: &'static str,
    pub realm: &'static str,
    pub seed: Seed,
}

impl Caller {
    pub fn new(name: &'static str, realm: &'static str) -> Self {
        Self { name, realm, seed: Seed::random() }
    }

    fn row(&self, id: u64) -> Row {
        let principal = Principal::parse(self.name, self.realm).unwrap();
        let entry = Entry::new(EntryId(id), principal.clone(), self.seed.clone(), 0);
        let blob = format!(
            r#"{{"seed":"{}","enabled":true,"created_at":0,"updated_at":0}}"#,
            entry.seed.expose()
        );
        let blob = Sealer::off().seal(&principal, entry.id, blob.as_bytes());
        Row { principal, id: entry.id, revision: Version(1), blob }
    }
}

/// A synced directory of `callers`, and the switch that takes its store away.
pub async fn of(
    callers: &[&Caller],
    max_stale: Duration,
    metrics: Arc<Metrics>,
    stop: watch::Receiver<bool>,
) -> (Arc<Directory>, Arc<AtomicBool>) {
    let down = Arc::new(AtomicBool::new(false));
    let rows = (1..).zip(callers).map(|(id, caller)| caller.row(id)).collect();
    let store = Store::new(Arc::new(Memory { rows, down: down.clone() }), Sealer::off());
    let directory = Arc::new(Directory::new(TokenRules::default(), max_stale, SystemClock.now()));
    let follower = Follower::new(store, directory.clone(), Arc::new(SystemClock), metrics);
    tokio::spawn(follower.run(stop));
    assert!(directory.wait_for(Version(1), super::LIMIT).await);
    (directory, down)
}
