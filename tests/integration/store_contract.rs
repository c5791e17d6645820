//! What every kind of store promises: the same tests for SQLite, one Redis, and a Redis Cluster.

use std::collections::{BTreeSet, HashMap};

use otpgate::entry::{Entry, EntryId, PrincipalRef};
use otpgate::seal::SealError;
use otpgate::store::{MAX_BATCH, Step, Store, StoreError, Stored, Version};

use crate::redis_server::LIMIT;
use crate::store_rig::{Follow, Rig, create, entry, opened, stored, who};

on_stores!([sqlite, redis, cluster, scriptless, valkey] [
    a_store_is_made_once,
    nothing_works_before_it_is_made,
    entries_are_found_by_name_and_number,
    lists_are_ordered_and_paged,
    long_lists_are_complete,
    updates_compare_and_set,
    renames_keep_the_number,
    deletes_are_final,
    batches_are_all_or_nothing,
    numbers_are_never_used_twice,
    imported_numbers_move_the_counter,
    numbers_have_an_end,
    strange_names_are_kept_apart,
    concurrent_updates_lose_nothing,
    followers_see_what_others_write,
    followers_go_on_after_reconnecting,
    followers_notice_a_trimmed_log,
    followers_notice_another_history,
    batches_are_bounded,
    an_emptied_store_is_an_error,
    nothing_readable_is_stored,
    a_moved_blob_does_not_open,
    another_key_does_not_open,
]);

async fn get(store: &Store, who: &otpgate::entry::Principal) -> Option<Stored> {
    store.get(who.into()).await.expect("the store answers")
}

async fn names(store: &Store) -> Vec<String> {
    let all = store.list(None, 100).await.expect("the store answers");
    all.iter().map(|stored| stored.principal.to_string()).collect()
}

async fn a_store_is_made_once(rig: Rig) {
    let store = rig.store();
    assert_eq!(store.init().await, Ok(true));
    assert_eq!(store.init().await, Ok(false));
    create(&store, "a", "r").await.unwrap();
    assert_eq!(rig.store().init().await, Ok(false));
    assert_eq!(names(&rig.store()).await, ["a@r"]);
}

async fn nothing_works_before_it_is_made(rig: Rig) {
    all_operations_answer_not_initialised(&rig).await;
    assert_eq!(rig.store().init().await, Ok(true));
}

async fn all_operations_answer_not_initialised(rig: &Rig) {
    let not = StoreError::NotInitialised;
    let store = rig.store();
    assert_eq!(store.get((&who("a", "r")).into()).await, Err(not.clone()));
    assert_eq!(store.get_by_id(EntryId(1)).await, Err(not.clone()));
    assert_eq!(store.list(None, 10).await, Err(not.clone()));
    assert_eq!(create(&store, "a", "r").await, Err(not.clone()));
    assert_eq!(store.insert(&[entry(1, who("a", "r"))]).await, Err(not.clone()));
    let feed = store.feed(std::sync::Arc::new(otpgate::clock::SystemClock)).await;
    match feed {
        Err(error) => assert_eq!(error, not),
        Ok(mut feed) => assert_eq!(feed.load(&mut |_| ()).await.map(|_| ()), Err(not)),
    }
}

async fn entries_are_found_by_name_and_number(rig: Rig) {
    let store = rig.ready().await;
    let mut made = entry(7, who("alice", "staff"));
    made.enabled = false;
    made.expires_at = Some(1_800_000_000);
    made.comment = "a \"comment\"\n with ünicode \u{1f511}".into();
    made.overrides.digits = Some(8);
    let revision = store.insert(std::slice::from_ref(&made)).await.unwrap();

    for store in [&store, &rig.store()] {
        let stored = stored(&made, revision);
        assert_eq!(get(store, &made.principal).await, Some(stored.clone()));
        assert_eq!(store.get_by_id(EntryId(7)).await.unwrap(), Some(stored));
        assert_eq!(get(store, &who("staff", "alice")).await, None);
        for id in [0, 6, 8, u64::MAX] {
            assert_eq!(store.get_by_id(EntryId(id)).await.unwrap(), None, "{id}");
        }
    }
    assert_eq!(create(&store, "alice", "staff").await, Err(StoreError::Conflict));
    assert_eq!(get(&store, &made.principal).await.unwrap().entry, Ok(made));
}

async fn lists_are_ordered_and_paged(rig: Rig) {
    let store = rig.ready().await;
    assert_eq!(store.list(None, 10).await, Ok(Vec::new()));
    for name in ["c", "a", "d", "b"] {
        create(&store, name, "r").await.unwrap();
    }
    store.insert(&[entry(100, who("z", "r")), entry(50, who("y", "r"))]).await.unwrap();
    assert_eq!(names(&store).await, ["c@r", "a@r", "d@r", "b@r", "y@r", "z@r"]);

    let ids = async |after: Option<u64>, limit| -> Vec<u64> {
        let page = store.list(after.map(EntryId), limit).await.unwrap();
        page.iter().map(|stored| stored.id.0).collect()
    };
    assert_eq!(ids(None, 3).await, [1, 2, 3]);
    assert_eq!(ids(Some(3), 2).await, [4, 50]);
    assert_eq!(ids(Some(50), 2).await, [100]);
    assert_eq!(ids(Some(100), 2).await, [0; 0]);
    assert_eq!(ids(Some(u64::MAX), 2).await, [0; 0]);
    assert_eq!(ids(Some(10), usize::MAX).await, [50, 100]);
    assert_eq!(ids(None, 0).await, [0; 0]);
}

async fn long_lists_are_complete(rig: Rig) {
    let store = rig.ready().await;
    // More than one page of any backend, in an order that is not that of their numbers.
    let entries: Vec<_> = (1..=1200).rev().map(|i| entry(i, who(&format!("n{i}"), "r"))).collect();
    for batch in entries.chunks(MAX_BATCH) {
        store.insert(batch).await.unwrap();
    }
    let found = store.list(None, usize::MAX).await.unwrap();
    let ids: Vec<_> = found.iter().map(|stored| stored.id.0).collect();
    assert_eq!(ids, (1..=1200).collect::<Vec<_>>());
    assert_eq!(store.list(Some(EntryId(100)), 501).await.unwrap().len(), 501);

    let (_, rows) = Follow::start(&rig.store()).await;
    let loaded: BTreeSet<_> = rows.iter().map(|row| row.id.0).collect();
    assert_eq!((rows.len(), loaded.len()), (1200, 1200));
}

async fn updates_compare_and_set(rig: Rig) {
    let (store, other) = (rig.ready().await, rig.store());
    let made = create(&store, "a", "r").await.unwrap();
    let old = get(&store, &made.principal).await.unwrap();
    let changed = Entry { enabled: false, ..made.clone() };
    let revision = other.update(&old, &changed).await.unwrap();
    assert!(revision > old.revision);

    let stale = Entry { comment: "stale".into(), ..made.clone() };
    assert_eq!(store.update(&old, &stale).await, Err(StoreError::Conflict));
    assert_eq!(store.delete(&old).await, Err(StoreError::Conflict));
    let renamed = Entry { principal: who("b", "r"), ..made.clone() };
    assert_eq!(store.update(&old, &renamed).await, Err(StoreError::Conflict));
    let stored = stored(&changed, revision);
    assert_eq!(get(&store, &made.principal).await, Some(stored));
    assert_eq!(get(&store, &renamed.principal).await, None);
}

async fn renames_keep_the_number(rig: Rig) {
    let store = rig.ready().await;
    let a = create(&store, "a", "r").await.unwrap();
    let taken = create(&store, "taken", "r").await.unwrap();
    let old = get(&store, &a.principal).await.unwrap();

    let onto = Entry { principal: taken.principal.clone(), ..a.clone() };
    assert_eq!(store.update(&old, &onto).await, Err(StoreError::Conflict));
    assert_eq!(names(&store).await, ["a@r", "taken@r"]);

    let moved = Entry { principal: who("b", "other"), ..a.clone() };
    store.update(&old, &moved).await.unwrap();
    assert_eq!(get(&store, &a.principal).await, None);
    assert_eq!(store.get_by_id(a.id).await.unwrap().unwrap().entry.as_ref(), Ok(&moved));
    assert_eq!(names(&store).await, ["b@other", "taken@r"]);

    let again = create(&store, "a", "r").await.unwrap();
    assert!(again.id > taken.id);
}

async fn deletes_are_final(rig: Rig) {
    let store = rig.ready().await;
    let made = create(&store, "a", "r").await.unwrap();
    let old = get(&store, &made.principal).await.unwrap();
    store.delete(&old).await.unwrap();
    assert_eq!(get(&store, &made.principal).await, None);
    assert_eq!(store.get_by_id(made.id).await, Ok(None));
    assert_eq!(names(&store).await, [""; 0]);
    assert_eq!(store.delete(&old).await, Err(StoreError::Conflict));
    assert_eq!(store.update(&old, &made).await, Err(StoreError::Conflict));
    let again = create(&store, "a", "r").await.unwrap();
    assert!(again.id > made.id);
    // A revision of the deleted one does not fit the new one.
    assert_eq!(store.delete(&old).await, Err(StoreError::Conflict));
}

async fn batches_are_all_or_nothing(rig: Rig) {
    let store = rig.ready().await;
    let there = create(&store, "there", "r").await.unwrap();
    let (mut follow, _) = Follow::start(&rig.store()).await;
    let (conflict, twice) =
        (StoreError::Conflict, |what: &str| StoreError::Refused(format!("{what} twice at once")));
    for (batch, why, error) in [
        (
            vec![entry(10, who("new", "r")), entry(11, there.principal.clone())],
            "a name is taken",
            conflict.clone(),
        ),
        (
            vec![entry(10, who("new", "r")), entry(there.id.0, who("x", "r"))],
            "a number is taken",
            conflict,
        ),
        (
            vec![entry(10, who("new", "r")), entry(11, who("new", "r"))],
            "a name comes twice",
            twice("new@r"),
        ),
        (
            vec![entry(10, who("new", "r")), entry(10, who("x", "r"))],
            "a number comes twice",
            twice("the number 10"),
        ),
    ] {
        assert_eq!(store.insert(&batch).await, Err(error), "{why}");
        assert_eq!(names(&store).await, ["there@r"], "{why}");
    }
    assert_eq!(follow.changes().await, Ok(Vec::new()), "failed batches leave no trace in the log");

    let batch = [entry(10, who("new", "r")), entry(11, who("x", "r"))];
    store.insert(&batch).await.unwrap();
    assert_eq!(names(&store).await, ["there@r", "new@r", "x@r"]);
    assert_eq!(follow.changes().await.unwrap().len(), 2);
}

async fn numbers_are_never_used_twice(rig: Rig) {
    rig.ready().await;
    let stores = [rig.store(), rig.store()];
    let tasks = (0..40).map(|i| {
        let store = stores[i % 2].clone();
        tokio::spawn(async move { create(&store, &format!("n{i}"), "r").await.unwrap().id })
    });
    let mut ids = BTreeSet::new();
    for task in tasks.collect::<Vec<_>>() {
        assert!(ids.insert(task.await.unwrap()), "given out twice");
    }
    // A number that was reserved for a create that failed is not given out again, nor is a deleted one.
    assert_eq!(create(&stores[0], "n0", "r").await, Err(StoreError::Conflict));
    let last = get(&stores[0], &who("n1", "r")).await.unwrap();
    stores[0].delete(&last).await.unwrap();
    let next = create(&rig.store(), "next", "r").await.unwrap().id;
    assert!(next > *ids.last().unwrap());
}

async fn imported_numbers_move_the_counter(rig: Rig) {
    let store = rig.ready().await;
    store.insert(&[entry(5, who("a", "r")), entry(41, who("b", "r"))]).await.unwrap();
    assert_eq!(create(&store, "c", "r").await.unwrap().id, EntryId(42));
    store.insert(&[entry(7, who("d", "r"))]).await.unwrap();
    assert_eq!(create(&store, "e", "r").await.unwrap().id, EntryId(43));
}

async fn numbers_have_an_end(rig: Rig) {
    let store = rig.ready().await;
    for id in [0, EntryId::MAX.0 + 1, u64::MAX] {
        let refused = store.insert(&[entry(id, who("a", "r"))]).await;
        assert!(matches!(refused, Err(StoreError::Refused(_))), "{id}: {refused:?}");
    }
    let largest = [entry(EntryId::MAX.0 - 1, who("y", "r")), entry(EntryId::MAX.0, who("z", "r"))];
    store.insert(&largest).await.unwrap();
    for wanted in &largest {
        let found = store.get_by_id(wanted.id).await.unwrap().unwrap();
        assert_eq!(found.entry.as_ref(), Ok(wanted), "neighbouring large numbers are told apart");
    }
    assert_eq!(store.list(Some(EntryId(EntryId::MAX.0 - 1)), 9).await.unwrap().len(), 1);
    assert!(matches!(create(&store, "a", "r").await, Err(StoreError::Refused(_))));
    assert_eq!(names(&store).await, ["y@r", "z@r"]);
}

async fn strange_names_are_kept_apart(rig: Rig) {
    let store = rig.ready().await;
    let (mut follow, _) = Follow::start(&rig.store()).await;
    let long = "\u{1f511}".repeat(128);
    let all = [
        ("a/b", "c"),
        ("b", "c/a"),
        ("a%2Fb", "c"),
        ("A", "c"),
        ("a", "c"),
        ("é", "c"),
        ("e\u{301}", "c"),
        ("a b", "c"),
        ("a:b", "c*"),
        ("[a]?{b}", "\\c"),
        ("'; DROP TABLE entries; --", "\"c\""),
        ("ü@mail.example", "*"),
        (long.as_str(), long.as_str()),
    ];
    let mut made = HashMap::new();
    for (name, realm) in all {
        let entry = create(&store, name, realm).await.unwrap();
        made.insert(entry.principal.clone(), entry);
    }
    assert_eq!(made.len(), all.len());
    for (principal, entry) in &made {
        assert_eq!(get(&store, principal).await.unwrap().entry.as_ref(), Ok(entry));
    }
    let rows = follow.changes().await.unwrap();
    assert_eq!(rows.len(), all.len());
    for (principal, row) in rows {
        assert_eq!(store.unseal(&row.unwrap()).unwrap(), made[&principal]);
    }
    let (_, rows) = Follow::start(&rig.store()).await;
    for row in &rows {
        assert_eq!(store.unseal(row).unwrap(), made[&row.principal]);
    }
    assert_eq!(rows.len(), all.len());
}

async fn concurrent_updates_lose_nothing(rig: Rig) {
    let store = rig.ready().await;
    let made = create(&store, "counter", "r").await.unwrap();
    let count = async |store: Store| {
        for _ in 0..15 {
            loop {
                let old = get(&store, &who("counter", "r")).await.unwrap();
                let entry = opened(&old);
                let next = entry.comment.parse().unwrap_or(0) + 1;
                let new = Entry { comment: next.to_string(), ..entry.clone() };
                match store.update(&old, &new).await {
                    Ok(_) => break,
                    Err(error) => assert_eq!(error, StoreError::Conflict),
                }
            }
        }
    };
    let (a, b) = (rig.store(), rig.store());
    tokio::join!(count(a.clone()), count(a), count(b.clone()), count(b));
    let counted = get(&store, &made.principal).await.unwrap();
    assert_eq!(opened(&counted).comment, "60");
}

async fn followers_see_what_others_write(rig: Rig) {
    let store = rig.ready().await;
    let a = create(&store, "a", "r").await.unwrap();
    let (mut follow, rows) = Follow::start(&rig.store()).await;
    assert_eq!(rows.len(), 1);
    assert_eq!(store.unseal(&rows[0]).unwrap(), a);
    assert_eq!(follow.position.version, rows[0].revision);

    // The follower is waiting already when the write comes.
    let write = async {
        tokio::task::yield_now().await;
        create(&store, "b", "r").await.unwrap()
    };
    let wait = async {
        loop {
            match follow.feed.poll(&follow.position).await.unwrap() {
                Step::Changed { rows, position, .. } => return (rows, position),
                Step::Current { .. } => {}
                Step::Lost(why) => panic!("{why}"),
            }
        }
    };
    let (b, seen) = tokio::join!(write, tokio::time::timeout(LIMIT, wait));
    let (rows, position) = seen.expect("the write is seen");
    assert_eq!(rows.len(), 1);
    assert_eq!(store.unseal(rows[0].1.as_ref().unwrap()).unwrap(), b);
    follow.position = position;

    // Several changes at once: rows are as they are now, and deleted ones are gone.
    let old = get(&store, &a.principal).await.unwrap();
    let moved = Entry { principal: who("c", "r"), ..a.clone() };
    store.update(&old, &moved).await.unwrap();
    let old = get(&store, &b.principal).await.unwrap();
    store.delete(&old).await.unwrap();
    let rows: HashMap<_, _> = follow.changes().await.unwrap().into_iter().collect();
    assert_eq!(rows[&a.principal], None);
    assert_eq!(rows[&b.principal], None);
    assert_eq!(store.unseal(rows[&moved.principal].as_ref().unwrap()).unwrap(), moved);
    assert_eq!(follow.changes().await, Ok(Vec::new()));
}

async fn followers_go_on_after_reconnecting(rig: Rig) {
    let store = rig.ready().await;
    let (mut follow, _) = Follow::start(&rig.store()).await;
    // From the very beginning of an empty log.
    create(&store, "a", "r").await.unwrap();
    follow.reconnect(&rig.store()).await;
    assert_eq!(follow.changes().await.unwrap().len(), 1);
    // With nothing new, and with something new.
    follow.reconnect(&rig.store()).await;
    assert_eq!(follow.changes().await, Ok(Vec::new()));
    create(&store, "b", "r").await.unwrap();
    create(&store, "c", "r").await.unwrap();
    follow.reconnect(&rig.store()).await;
    assert_eq!(follow.changes().await.unwrap().len(), 2);
}

async fn followers_notice_a_trimmed_log(rig: Rig) {
    let store = rig.ready().await;
    for name in ["a", "b"] {
        create(&store, name, "r").await.unwrap();
    }
    let (mut follow, _) = Follow::start(&rig.store()).await;
    // Everything up to here is known: it may go.
    rig.trim_log(0);
    assert_eq!(follow.changes().await, Ok(Vec::new()));
    for name in ["c", "d", "e"] {
        create(&store, name, "r").await.unwrap();
    }
    let mut late = Follow { position: follow.position.clone(), ..Follow::start(&store).await.0 };
    assert_eq!(follow.changes().await.unwrap().len(), 3);
    rig.trim_log(2);
    assert!(late.changes().await.is_err(), "the record after its position is gone");
    rig.trim_log(0);
    assert!(late.changes().await.is_err(), "all records are gone");
    assert_eq!(follow.changes().await, Ok(Vec::new()));
}

async fn followers_notice_another_history(rig: Rig) {
    let store = rig.ready().await;
    for name in ["a", "b", "c"] {
        create(&store, name, "r").await.unwrap();
    }
    let (mut follow, _) = Follow::start(&rig.store()).await;
    let known = follow.position.clone();
    // Emptied, made again, and with fewer, as many and more writes than before.
    rig.empty();
    rig.store().init().await.unwrap();
    for (i, name) in ["x", "y", "z", "u", "v"].iter().enumerate() {
        follow.reconnect(&rig.store()).await;
        follow.position = known.clone();
        assert!(follow.changes().await.is_err(), "after {i} writes");
        create(&rig.store(), name, "r").await.unwrap();
    }
    let (follow, rows) = Follow::start(&rig.store()).await;
    assert_eq!((rows.len(), follow.position.version), (5, Version(5)));
}

async fn batches_are_bounded(rig: Rig) {
    let store = rig.ready().await;
    let (mut follow, _) = Follow::start(&rig.store()).await;
    let entries: Vec<_> =
        (1..=1 + MAX_BATCH as u64).map(|i| entry(i, who(&format!("n{i}"), "r"))).collect();
    let refused = store.insert(&entries).await;
    assert!(matches!(refused, Err(StoreError::Refused(_))), "{refused:?}");
    assert_eq!(store.list(None, 1).await, Ok(Vec::new()));
    store.insert(&entries[1..]).await.unwrap();
    assert_eq!(follow.changes().await.unwrap().len(), MAX_BATCH);
}

async fn an_emptied_store_is_an_error(rig: Rig) {
    let store = rig.ready().await;
    let made = create(&store, "a", "r").await.unwrap();
    let (mut follow, _) = Follow::start(&rig.store()).await;
    rig.empty();
    // Never "unknown entry", neither for new connections nor for those that were there before.
    all_operations_answer_not_initialised(&rig).await;
    let not = Err(StoreError::NotInitialised);
    assert_eq!(store.get(PrincipalRef::from(&made.principal)).await, not);
    assert_eq!(create(&store, "b", "r").await.map(|_| ()), not.clone().map(|_: Option<Stored>| ()));
    let poll = follow.feed.poll(&follow.position).await;
    assert!(poll.is_err(), "{poll:?}");
}

async fn nothing_readable_is_stored(rig: Rig) {
    let store = rig.ready().await;
    let made = create(&store, "a", "r").await.unwrap();
    let dump = rig.dump();
    let contains = |text: &str| dump.windows(text.len()).any(|part| part == text.as_bytes());
    assert!(dump.len() > 100);
    assert!(!contains(made.seed.expose()));
    assert!(!contains("enabled"));
}

async fn a_moved_blob_does_not_open(rig: Rig) {
    let store = rig.ready().await;
    let (a, b) = (create(&store, "a", "r").await.unwrap(), create(&store, "b", "r").await.unwrap());
    let c = create(&store, "c", "r").await.unwrap();
    rig.swap(&a.principal, &b.principal);
    for moved in [&a, &b] {
        let found = get(&store, &moved.principal).await.unwrap();
        let expected =
            StoreError::Sealed { principal: moved.principal.clone(), cause: SealError::Broken };
        assert_eq!(found.entry, Err(expected));
    }
    assert_eq!(get(&store, &c.principal).await.unwrap().entry, Ok(c));
    let (_, rows) = Follow::start(&rig.store()).await;
    assert_eq!(rows.len(), 3, "followers get all rows and see which are broken");
    assert_eq!(rows.iter().filter(|row| store.unseal(row).is_err()).count(), 2);
}

async fn another_key_does_not_open(rig: Rig) {
    let made = create(&rig.ready().await, "a", "r").await.unwrap();
    let store = rig.with_other_key();
    let found = get(&store, &made.principal).await.unwrap();
    assert!(
        matches!(&found.entry, Err(StoreError::Sealed { cause: SealError::UnknownKey(_), .. })),
        "{found:?}"
    );
    let other = create(&store, "b", "r").await.expect("the others can be written");
    // It stands in lists beside the others, and can be deleted.
    let listed = store.list(None, 10).await.unwrap();
    assert_eq!(listed, [found.clone(), get(&store, &other.principal).await.unwrap()]);
    assert_eq!(store.get_by_id(made.id).await, Ok(Some(found.clone())));
    store.delete(&found).await.unwrap();
    assert_eq!(names(&store).await, ["b@r"]);
    assert_eq!(store.delete(&found).await, Err(StoreError::Conflict));
}
