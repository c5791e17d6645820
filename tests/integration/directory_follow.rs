//! The directory on real stores: what it shows, when it is stale, how it recovers.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use otpgate::checker::Checker;
use otpgate::clock::{Clock, ManualClock, SystemClock};
use otpgate::directory::follower::Follower;
use otpgate::directory::{Credential, Directory, Hold, TokenRules, Unavailable};
use otpgate::entry::{Entry, EntryId, Principal};
use otpgate::metrics::Metrics;
use otpgate::otp::{Generator, TokenParams};
use otpgate::store::Store;
use tokio::task::JoinHandle;

use crate::harness::eventually;
use crate::redis_server::LIMIT;
use crate::store_rig::{Place, Rig, create, entry, who};

const MAX_STALE: Duration = Duration::from_secs(15);

/// What a look-up shows of an entry: its number, state, end and a token of its seed.
pub(crate) type Seen = (EntryId, bool, Option<u64>, String);

pub(crate) fn as_seen(entry: &Entry) -> Seen {
    let token = Generator::new(&entry.seed, TokenParams::default()).token_at(1_000_000);
    (entry.id, entry.enabled, entry.expires_at, token)
}

/// A directory with its follower.
pub(crate) struct Gate {
    pub(crate) directory: Arc<Directory>,
    clock: Arc<dyn Clock>,
    pub(crate) metrics: Arc<Metrics>,
    task: JoinHandle<()>,
}

impl Gate {
    pub(crate) fn start(store: Store) -> Self {
        Self::with_clock(store, Arc::new(SystemClock))
    }

    fn with_clock(store: Store, clock: Arc<dyn Clock>) -> Self {
        Self::holding(&Hold::default(), store, clock)
    }

    pub(crate) fn holding(hold: &Hold, store: Store, clock: Arc<dyn Clock>) -> Self {
        let metrics = Arc::new(Metrics::new([]));
        let (rules, now) = (TokenRules::default(), clock.now());
        let directory = Directory::new(store, hold, rules, MAX_STALE, metrics.clone(), now);
        let directory = Arc::new(directory);
        let follower = Follower::new(directory.clone(), clock.clone());
        let task = tokio::spawn(async move { follower.run().await });
        Self { directory, clock, metrics, task }
    }

    /// At once, as it must be where all entries are in memory.
    fn look_up(&self, who: &Principal) -> Result<Option<Seen>, Unavailable> {
        self.find(who).now_or_never().expect("nothing is asked of the store")
    }

    pub(crate) async fn find(&self, who: &Principal) -> Result<Option<Seen>, Unavailable> {
        let read = |found: Option<&Credential>| {
            let token = |c: &Checker| c.token_at(1_000_000).expose().to_owned();
            found.map(|c| (c.id, c.enabled, c.expires_at, token(&c.checker)))
        };
        self.directory.look_up(who.into(), self.clock.now(), read).await
    }

    pub(crate) fn shows(&self, entry: &Entry) -> bool {
        self.look_up(&entry.principal) == Ok(Some(as_seen(entry)))
    }

    pub(crate) fn knows_none(&self, who: &Principal) -> bool {
        self.look_up(who) == Ok(None)
    }

    pub(crate) async fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        eventually(what, || async { done(self).then_some(()) }).await;
    }

    pub(crate) async fn loaded(&self) {
        self.until("entries are loaded", |gate| gate.directory.is_current(gate.clock.now())).await;
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}

on_stores!([sqlite, redis] [
    changes_come_into_force,
    it_fails_closed_and_recovers,
    it_is_stale_before_the_first_load,
    a_full_load_drops_what_vanished,
    an_emptied_store_becomes_stale_not_unknown,
    a_broken_entry_is_unavailable_alone,
    it_keeps_up_with_concurrent_writers,
    a_short_outage_needs_no_full_load,
]);

/// Takes the store away.
pub(crate) fn break_store(rig: &mut Rig) {
    match &mut rig.place {
        Place::Sqlite(file) => std::fs::rename(&*file, file.with_extension("away")).unwrap(),
        Place::Redis(server) => server.kill(),
        Place::Cluster(_) => panic!("shared with other tests"),
    }
}

/// Brings it back with its contents.
pub(crate) fn mend_store(rig: &mut Rig) {
    match &mut rig.place {
        Place::Sqlite(file) => std::fs::rename(file.with_extension("away"), &*file).unwrap(),
        Place::Redis(server) => tokio::task::block_in_place(|| server.restart()),
        Place::Cluster(_) => panic!("shared with other tests"),
    }
}

async fn changes_come_into_force(rig: Rig) {
    let store = rig.ready().await;
    let a = create(&store, "a", "r").await.unwrap();
    // The follower is a store of its own, as in another process.
    let gate = Gate::start(rig.store());
    gate.loaded().await;
    assert!(gate.shows(&a));
    assert!(gate.knows_none(&who("b", "r")));

    let old = store.get((&a.principal).into()).await.unwrap().unwrap();
    let b = Entry { principal: who("b", "r"), enabled: false, expires_at: Some(9), ..a.clone() };
    let version = store.update(&old, &b).await.unwrap();
    assert!(gate.directory.wait_for(version, LIMIT).await);
    assert!(gate.shows(&b) && gate.knows_none(&a.principal));

    let old = store.get((&b.principal).into()).await.unwrap().unwrap();
    let version = store.delete(&old).await.unwrap();
    assert!(gate.directory.wait_for(version, LIMIT).await);
    assert!(gate.knows_none(&b.principal));
    assert_eq!(gate.directory.len(), 0);
    assert_eq!(gate.metrics.directory_full_loads.get(), 1);
}

async fn it_is_stale_before_the_first_load(rig: Rig) {
    let store = rig.store();
    let makes_it = store.is_local();
    let gate = Gate::start(store);
    assert_eq!(gate.look_up(&who("a", "r")), Err(Unavailable::Stale));
    if makes_it {
        gate.loaded().await;
        assert!(gate.directory.is_empty());
    } else {
        // A server without a store may have been emptied.
        gate.until("the trouble is known", |gate| gate.directory.status().trouble.is_some()).await;
        assert_eq!(gate.look_up(&who("a", "r")), Err(Unavailable::Stale));
    }
    let a = create(&rig.ready().await, "a", "r").await.unwrap();
    gate.until("the new store is followed", |gate| gate.shows(&a)).await;
    assert_eq!(gate.directory.status().trouble, None);
}

async fn it_fails_closed_and_recovers(mut rig: Rig) {
    let store = rig.ready().await;
    let a = create(&store, "a", "r").await.unwrap();
    let clock = Arc::new(ManualClock::at(1_700_000_000));
    let gate = Gate::with_clock(rig.store(), clock.clone());
    gate.loaded().await;
    // While the store answers, time does no harm.
    for _ in 0..3 {
        clock.advance(Duration::from_secs(10));
        let fresh = |gate: &Gate| {
            gate.directory.staleness(gate.clock.now()).is_some_and(|age| age.is_zero())
        };
        gate.until("the contents are proven again", fresh).await;
    }

    break_store(&mut rig);
    gate.until("the outage is noticed", |gate| gate.directory.status().trouble.is_some()).await;
    // From here on nothing is proven, so only this moves the age.
    clock.advance(MAX_STALE);
    assert!(gate.shows(&a), "callers notice nothing for max_stale");
    clock.advance(Duration::from_millis(1));
    assert_eq!(gate.look_up(&a.principal), Err(Unavailable::Stale));
    assert_eq!(gate.look_up(&who("unknown", "r")), Err(Unavailable::Stale));

    mend_store(&mut rig);
    gate.until("the gate opens again", |gate| gate.shows(&a)).await;
    assert_eq!(gate.directory.status().trouble, None);
    let b = create(&rig.store(), "b", "r").await.unwrap();
    gate.until("changes arrive again", |gate| gate.shows(&b)).await;
}

async fn a_short_outage_needs_no_full_load(mut rig: Rig) {
    let store = rig.ready().await;
    let a = create(&store, "a", "r").await.unwrap();
    let gate = Gate::start(rig.store());
    gate.loaded().await;
    break_store(&mut rig);
    gate.until("the outage is noticed", |gate| gate.directory.status().trouble.is_some()).await;
    mend_store(&mut rig);
    let store = rig.store();
    let b = create(&store, "b", "r").await.unwrap();
    gate.until("what came meanwhile is there", |gate| gate.shows(&b)).await;
    assert!(gate.shows(&a));
    assert_eq!(gate.metrics.directory_full_loads.get(), 1);
}

async fn a_full_load_drops_what_vanished(rig: Rig) {
    let store = rig.ready().await;
    let (a, b) = (create(&store, "a", "r").await.unwrap(), create(&store, "b", "r").await.unwrap());
    let gate = Gate::start(rig.store());
    gate.loaded().await;
    assert!(gate.shows(&a) && gate.shows(&b));
    // As if an old backup came back: other contents, no records about the difference.
    rig.empty();
    let store = rig.ready().await;
    let new = create(&store, "a", "r").await.unwrap();
    gate.until("the new contents are in force", |gate| gate.shows(&new)).await;
    gate.until("what vanished is gone", |gate| gate.knows_none(&b.principal)).await;
    assert_eq!(gate.directory.len(), 1);
}

async fn an_emptied_store_becomes_stale_not_unknown(rig: Rig) {
    let a = create(&rig.ready().await, "a", "r").await.unwrap();
    let clock = Arc::new(ManualClock::at(1_700_000_000));
    let gate = Gate::with_clock(rig.store(), clock.clone());
    gate.loaded().await;
    rig.empty();
    gate.until("the loss is noticed", |gate| gate.directory.status().trouble.is_some()).await;
    assert!(gate.shows(&a));
    clock.advance(MAX_STALE + Duration::from_millis(1));
    assert_eq!(gate.look_up(&a.principal), Err(Unavailable::Stale));
}

async fn a_broken_entry_is_unavailable_alone(rig: Rig) {
    let store = rig.ready().await;
    let a = create(&store, "a", "r").await.unwrap();
    let (b, c) = (create(&store, "b", "r").await.unwrap(), create(&store, "c", "r").await.unwrap());
    rig.swap(&a.principal, &b.principal);
    let gate = Gate::start(rig.store());
    gate.loaded().await;
    assert_eq!(gate.look_up(&a.principal), Err(Unavailable::Broken));
    assert_eq!(gate.look_up(&b.principal), Err(Unavailable::Broken));
    assert!(gate.shows(&c));
    assert!(gate.knows_none(&who("d", "r")));
    assert_eq!(gate.metrics.directory_broken_entries.get(), 2);

    // Written with a key that this gate does not have.
    let foreign = create(&rig.with_other_key(), "foreign", "r").await.unwrap();
    let broken = |gate: &Gate| gate.look_up(&foreign.principal) == Err(Unavailable::Broken);
    gate.until("the foreign entry has arrived", broken).await;
    assert!(gate.shows(&c));
}

async fn it_keeps_up_with_concurrent_writers(rig: Rig) {
    let store = rig.ready().await;
    let base: Vec<_> = (1..=200).map(|i| entry(i, who(&format!("base{i}"), "r"))).collect();
    store.insert(&base).await.unwrap();
    let write = |writer: u32| {
        let store = rig.store();
        tokio::spawn(async move {
            let mut kept = Vec::new();
            for i in 0..40 {
                let made = create(&store, &format!("w{writer}-{i}"), "r").await.unwrap();
                if i % 2 == 0 {
                    kept.push(made);
                } else {
                    let old = store.get((&made.principal).into()).await.unwrap().unwrap();
                    store.delete(&old).await.unwrap();
                }
            }
            kept
        })
    };
    // Loading and writing overlap.
    let first = write(1);
    let gate = Gate::start(rig.store());
    let second = write(2);
    let mut all = base;
    all.extend(first.await.unwrap());
    all.extend(second.await.unwrap());
    let last = create(&store, "last", "r").await.unwrap();
    gate.until("the last write is in force", |gate| gate.shows(&last)).await;
    assert_eq!(gate.directory.len(), all.len() + 1);
    assert!(all.iter().all(|entry| gate.shows(entry)));
}
