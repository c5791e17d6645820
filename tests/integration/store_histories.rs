//! Random histories on every kind of store, against a model; and a directory that follows them.

use std::collections::BTreeMap;

use otpgate::entry::{Entry, EntryId, Principal};
use otpgate::store::{Store, StoreError, Version};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tokio::runtime::Handle;
use tokio::sync::Mutex;

use crate::directory_follow::Gate;
use crate::redis_server::LIMIT;
use crate::store_rig::{Rig, create, entry, opened, who};

/// Names that one history uses, so that they meet often.
const NAMES: u8 = 5;

/// One step; numbers stand for names.
#[derive(Clone, Debug)]
enum Op {
    Create(u8),
    Import(u8, u64),
    Disable(u8),
    Rename(u8, u8),
    Delete(u8),
    /// With what was read before another change.
    StaleDelete(u8),
}

fn op() -> impl Strategy<Value = Op> {
    let name = 0..NAMES;
    prop_oneof![
        3 => name.clone().prop_map(Op::Create),
        1 => (name.clone(), 1..80_u64).prop_map(|(name, id)| Op::Import(name, id)),
        2 => name.clone().prop_map(Op::Disable),
        2 => (name.clone(), name.clone()).prop_map(|(from, to)| Op::Rename(from, to)),
        2 => name.clone().prop_map(Op::Delete),
        1 => name.prop_map(Op::StaleDelete),
    ]
}

/// What the store should hold.
#[derive(Default)]
struct Model {
    entries: BTreeMap<Principal, Entry>,
    /// Every number up to here may have been used.
    used: u64,
    histories: u32,
}

impl Model {
    async fn step(&mut self, op: &Op, realm: &str, store: &Store) -> Option<Version> {
        let name = |number: &u8| who(&format!("n{number}"), realm);
        match op {
            Op::Create(n) => self.create(name(n), store).await,
            Op::Import(n, id) => self.import(entry(*id, name(n)), store).await,
            Op::Disable(n) => {
                let old = self.read(&name(n), store).await?;
                let new = Entry { enabled: false, ..opened(&old).clone() };
                let version = store.update(&old, &new).await.unwrap();
                self.entries.insert(name(n), new);
                Some(version)
            }
            Op::Rename(from, to) => {
                let old = self.read(&name(from), store).await?;
                let new = Entry { principal: name(to), ..opened(&old).clone() };
                let renamed = store.update(&old, &new).await;
                if from != to && self.entries.contains_key(&name(to)) {
                    assert_eq!(renamed, Err(StoreError::Conflict));
                    return None;
                }
                self.entries.remove(&name(from));
                self.entries.insert(name(to), new);
                Some(renamed.unwrap())
            }
            Op::Delete(n) => {
                let old = self.read(&name(n), store).await?;
                self.entries.remove(&name(n));
                Some(store.delete(&old).await.unwrap())
            }
            Op::StaleDelete(n) => {
                let old = self.read(&name(n), store).await?;
                let version = store.update(&old, opened(&old)).await.unwrap();
                assert_eq!(store.delete(&old).await, Err(StoreError::Conflict));
                Some(version)
            }
        }
    }

    async fn create(&mut self, principal: Principal, store: &Store) -> Option<Version> {
        let made = create(store, principal.name.as_str(), principal.realm.as_str()).await;
        if self.entries.contains_key(&principal) {
            assert_eq!(made, Err(StoreError::Conflict));
            return None;
        }
        let made = made.unwrap();
        assert!(made.id.0 > self.used, "number {} was used before", made.id);
        self.used = made.id.0;
        let revision = store.get((&principal).into()).await.unwrap().unwrap().revision;
        self.entries.insert(principal, made);
        Some(revision)
    }

    async fn import(&mut self, new: Entry, store: &Store) -> Option<Version> {
        let inserted = store.insert(std::slice::from_ref(&new)).await;
        let taken = self.entries.values().any(|entry| entry.id == new.id);
        if taken || self.entries.contains_key(&new.principal) {
            assert_eq!(inserted, Err(StoreError::Conflict));
            return None;
        }
        self.used = self.used.max(new.id.0);
        self.entries.insert(new.principal.clone(), new);
        Some(inserted.unwrap())
    }

    /// What is stored, which must be what the model says.
    async fn read(&self, principal: &Principal, store: &Store) -> Option<otpgate::store::Stored> {
        let found = store.get(principal.into()).await.unwrap();
        assert_eq!(found.as_ref().map(opened), self.entries.get(principal));
        found
    }

    async fn compare(&self, realm: &str, store: &Store, gate: &Gate) {
        let listed: Vec<_> = store.list(None, usize::MAX).await.unwrap();
        let by_id: BTreeMap<EntryId, &Entry> =
            self.entries.values().map(|entry| (entry.id, entry)).collect();
        assert!(listed.iter().map(opened).eq(by_id.into_values()));
        assert_eq!(gate.directory.len(), self.entries.len());
        assert!(self.entries.values().all(|entry| gate.shows(entry)));
        for absent in (0..NAMES).map(|n| who(&format!("n{n}"), realm)) {
            assert_eq!(gate.knows_none(&absent), !self.entries.contains_key(&absent));
        }
    }
}

async fn histories_match_the_model(rig: Rig) {
    let stores = [rig.ready().await, rig.store()];
    let gate = Gate::start(rig.store());
    let model = Mutex::new(Model::default());
    let history = async |ops: Vec<Op>| {
        let mut model = model.lock().await;
        model.histories += 1;
        let realm = format!("r{}", model.histories);
        let mut last = None;
        for (i, op) in ops.iter().enumerate() {
            last = model.step(op, &realm, &stores[i % 2]).await.or(last);
        }
        if let Some(version) = last {
            assert!(gate.directory.wait_for(version, LIMIT).await, "the directory keeps up");
            model.compare(&realm, &stores[0], &gate).await;
        }
    };
    let runtime = Handle::current();
    tokio::task::block_in_place(|| {
        // A failure leaves its traces in the store, so the first one found is shown as it is.
        let config = Config {
            cases: 12,
            max_shrink_iters: 0,
            failure_persistence: None,
            ..Config::default()
        };
        let result = TestRunner::new(config).run(&prop::collection::vec(op(), 1..40), |ops| {
            runtime.block_on(history(ops));
            Ok(())
        });
        if let Err(error) = result {
            panic!("{error}");
        }
    });
}

on_stores!([sqlite, redis, cluster, scriptless, valkey][histories_match_the_model]);
