//! The ledger: what every kind of store promises about uses of tokens, failures and successes, and
//! what each kind goes through.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use otpgate::clock::{Clock as _, SystemClock, UnixTime};
use otpgate::entry::EntryId;
use otpgate::store::{
    Failure, LEDGER_PATIENCE, MAX_LEDGER_BATCH, Quota, Spending, Store, StoreError,
};
use rand::RngExt as _;

use crate::harness::eventually;
use crate::redis_server::{Options, RedisServer};
use crate::store_rig::{Place, Rig, create};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
/// Longest time to be told that the ledger does not answer, on a busy machine.
const TOLD: Duration = LEDGER_PATIENCE.saturating_add(SECOND);

on_stores!([sqlite, redis, cluster, scriptless, valkey] [
    a_token_is_used_as_often_as_its_budget,
    the_same_request_may_ask_again,
    tokens_are_told_apart,
    marks_end_by_themselves,
    buckets_count_as_quotas_do,
    batches_count_in_order_and_at_once,
    calls_are_bounded,
    a_ledger_without_a_store_is_an_error,
]);

fn now() -> UnixTime {
    SystemClock.now().unix
}

/// A use of entry 7's token of time step 1000.
fn spending(by: &str, budget: u32) -> Spending {
    let (id, by) = (EntryId(7), by.to_owned());
    Spending { id, serial: 0, counter: 1000, by, budget, keep: MINUTE }
}

async fn spend(store: &Store, by: &str, budget: u32) -> bool {
    store.spend(&spending(by, budget), now()).await.expect("the ledger answers")
}

fn failure(bucket: &str, failures: u32, per: Duration) -> Failure {
    Failure { bucket: bucket.to_owned(), quota: Quota { failures, per } }
}

/// The errors of all four questions.
async fn troubles(store: &Store) -> [StoreError; 4] {
    let keys = ["k".to_owned()];
    [
        store.spend(&spending("trouble", 1), now()).await.unwrap_err(),
        store.count_failures(&[failure("b", 3, MINUTE)], now()).await.unwrap_err(),
        store.remember(&keys, MINUTE, now()).await.unwrap_err(),
        store.remembers("k", now()).await.unwrap_err(),
    ]
}

async fn a_token_is_used_as_often_as_its_budget(rig: Rig) {
    rig.ready().await;
    let stores = [rig.store(), rig.store(), rig.store()];
    for (counter, budget) in [(1, 1), (2, 5), (3, 1), (4, 5)] {
        let tasks: Vec<_> = (0..50)
            .map(|i| {
                let store = stores[i % 3].clone();
                let use_ = Spending { counter, ..spending(&format!("request {i}"), budget) };
                tokio::spawn(async move { store.spend(&use_, now()).await.unwrap() })
            })
            .collect();
        let mut passed = 0;
        for task in tasks {
            passed += u32::from(task.await.unwrap());
        }
        assert_eq!(passed, budget);
    }
}

async fn the_same_request_may_ask_again(rig: Rig) {
    let (store, other) = (rig.ready().await, rig.store());
    for by in ["a", "a", "b", "a", "b"] {
        assert!(spend(&store, by, 2).await && spend(&other, by, 2).await, "{by}");
    }
    assert!(!spend(&store, "c", 2).await && !spend(&other, "c", 2).await);
    // What was refused leaves no trace.
    assert!(spend(&store, "c", 3).await);
    assert!(spend(&other, "a", 1).await, "it had its use before the budget shrank");
}

async fn tokens_are_told_apart(rig: Rig) {
    let store = rig.ready().await;
    let use_ = spending("a", 1);
    for other in [
        use_.clone(),
        Spending { id: EntryId(8), ..use_.clone() },
        Spending { serial: 1, ..use_.clone() },
        Spending { counter: 1001, ..use_.clone() },
        Spending { id: EntryId(71), serial: 0, counter: 0, ..use_.clone() },
        Spending { id: EntryId(7), serial: 10, counter: 0, ..use_.clone() },
        Spending { id: EntryId::MAX, serial: u32::MAX, counter: u64::MAX >> 1, ..use_.clone() },
    ] {
        assert!(store.spend(&other, now()).await.unwrap(), "{other:?}");
        let again = Spending { by: "b".into(), ..other };
        assert!(!store.spend(&again, now()).await.unwrap(), "{again:?}");
    }
}

async fn marks_end_by_themselves(rig: Rig) {
    let store = rig.ready().await;
    let start = SystemClock.now().monotonic;
    let short = |by: &str| Spending { keep: SECOND, ..spending(by, 1) };
    let keys = ["short".to_owned()];
    assert!(store.spend(&short("a"), now()).await.unwrap());
    store.remember(&keys, SECOND, now()).await.unwrap();
    store.remember(&["long".to_owned()], MINUTE, now()).await.unwrap();
    assert_eq!(store.remembers("absent", now()).await, Ok(false));

    eventually("the use is forgotten", || async {
        let passed = store.spend(&short("b"), now()).await.unwrap();
        assert!(!passed || start.elapsed() >= SECOND, "forgotten after {:?}", start.elapsed());
        passed.then_some(())
    })
    .await;
    eventually("the success is forgotten", || async {
        let kept = store.remembers("short", now()).await.unwrap();
        assert!(kept || start.elapsed() >= SECOND, "forgotten after {:?}", start.elapsed());
        (!kept).then_some(())
    })
    .await;
    assert_eq!(store.remembers("long", now()).await, Ok(true));
    let quick = [failure("quick", 1, Duration::from_millis(10))];
    store.count_failures(&quick, now()).await.unwrap();
    assert!(spend(&store, "long", 2).await);
    if !matches!(rig.place, Place::Sqlite(_)) {
        let short = "all that is left is what was to last";
        eventually(short, || async { (marks(&rig) == 2).then_some(()) }).await;
    }
}

/// Marks that are stored, ended ones included.
fn marks(rig: &Rig) -> usize {
    match &rig.place {
        Place::Sqlite(_) => {
            let sql = "SELECT (SELECT count(*) FROM uses) + (SELECT count(*) FROM buckets) +
                              (SELECT count(*) FROM remembered)";
            ledger_file(rig).query_row(sql, [], |row| row.get(0)).unwrap()
        }
        _ => rig.run::<Vec<String>>(&["KEYS", &rig.key("[utg]:*")]).len(),
    }
}

fn ledger_file(rig: &Rig) -> rusqlite::Connection {
    let Place::Sqlite(file) = &rig.place else { panic!("not an SQLite store") };
    rusqlite::Connection::open(format!("{}.ledger", file.display())).unwrap()
}

/// Random quotas, on buckets that stand anywhere.
async fn buckets_count_as_quotas_do(rig: Rig) {
    let store = rig.ready().await;
    for _ in 0..20 {
        let mut random = rand::rng();
        let failures = random.random_range(1..20);
        let per = Duration::from_millis(random.random_range(1_000..100_000_000));
        let one = failure(&format!("b{}", rand::random::<u64>()), failures, per);
        let (quota, step) = (one.quota, u64::try_from(per.as_millis() / 500).unwrap());
        if matches!(rig.place, Place::Sqlite(_)) {
            // Its time is what it is told.
            let (mut now, mut level) = (1_700_000_000, Duration::ZERO);
            for _ in 0..30 {
                now += rand::rng().random_range(0..step / 5 + 2);
                let at = Duration::from_secs(now);
                level = quota.after_failure(level, at);
                let told = store.count_failures(std::slice::from_ref(&one), now).await.unwrap();
                assert_eq!(told, [quota.closed_for(level, at)], "{one:?} at {now}");
            }
            continue;
        }
        // Its time is its own: the truth lies between what it shows before and after.
        let key = rig.key(&format!("t:{}", one.bucket));
        let time = || {
            let (seconds, micros): (u64, u64) = rig.run(&["TIME"]);
            Duration::from_micros(seconds * 1_000_000 + micros)
        };
        let stands = || {
            let level: Option<u64> = rig.run(&["GET", &key]);
            Duration::from_micros(level.unwrap_or(0))
        };
        for i in 0..8 {
            // As far ahead as a bucket can stand, and anywhere from long ago to there.
            let below = if i == 0 { 0 } else { rand::rng().random_range(0..step * 5500) };
            let at = time() + quota.horizon() - Duration::from_millis(below);
            rig.run::<()>(&["SET", &key, &at.as_micros().to_string()]);
            let (old, before) = (stands(), time());
            let told = store.count_failures(std::slice::from_ref(&one), now()).await.unwrap();
            let (after, new) = (time(), stands());
            let micro = Duration::from_micros(1);
            let levels = [before, after].map(|at| quota.after_failure(old, at));
            assert!(levels[0] <= new + micro && new <= levels[1], "{levels:?} {new:?} {one:?}");
            let slack = micro * (quota.failures + 1);
            assert!(told[0] + slack >= quota.closed_for(new, after), "{told:?} {one:?}");
            assert!(told[0] <= quota.closed_for(new, before) + slack, "{told:?} {one:?}");
            let left: u64 = rig.run(&["PTTL", &key]);
            let drained = new.saturating_sub(after) + SECOND;
            assert!(Duration::from_millis(left) <= drained, "{left} ms, {drained:?}");
        }
    }
}

async fn batches_count_in_order_and_at_once(rig: Rig) {
    let (store, other) = (rig.ready().await, rig.store());
    let at = now();
    let batch = [failure("a", 2, MINUTE), failure("b", 1, MINUTE), failure("a", 2, MINUTE)];
    let near = |told: &[Duration], seconds: &[u64]| {
        let told: Vec<_> = told.iter().map(|told| told.as_secs_f64().round() as u64).collect();
        assert_eq!(told, seconds);
    };
    near(&store.count_failures(&batch, at).await.unwrap(), &[0, 60, 30]);
    near(&other.count_failures(&batch[..1], at).await.unwrap(), &[60]);
    assert_eq!(store.count_failures(&[], at).await, Ok(Vec::new()));

    // Of many at the same time, none is lost.
    let tasks: Vec<_> = (0..30)
        .map(|i| {
            let store = [&store, &other][i % 2].clone();
            let one = [failure("many", 100, 100 * MINUTE)];
            tokio::spawn(async move { store.count_failures(&one, at).await.unwrap() })
        })
        .collect();
    for task in tasks {
        near(&task.await.unwrap(), &[0]);
    }
    let rest: Vec<_> = (0..71).map(|_| failure("many", 100, 100 * MINUTE)).collect();
    let told = store.count_failures(&rest, at).await.unwrap();
    assert!(told[68].is_zero() && told[69] > MINUTE / 2 && told[70] > MINUTE, "{told:?}");
}

async fn calls_are_bounded(rig: Rig) {
    let store = rig.ready().await;
    let refused = |result: Result<(), StoreError>| {
        assert!(matches!(result, Err(StoreError::Refused(_))), "{result:?}");
    };
    let key = |i: usize| format!("{i:~<100}");
    let failures: Vec<_> = (0..=MAX_LEDGER_BATCH).map(|i| failure(&key(i), 1, MINUTE)).collect();
    let keys: Vec<_> = (0..=MAX_LEDGER_BATCH).map(key).collect();
    refused(store.count_failures(&failures, now()).await.map(drop));
    refused(store.remember(&keys, MINUTE, now()).await);
    for bad in ["", "a b", "ü", "a\n", &"k".repeat(101)] {
        refused(store.count_failures(&[failure(bad, 1, MINUTE)], now()).await.map(drop));
        refused(store.remember(&["fine".into(), bad.into()], MINUTE, now()).await);
    }
    assert_eq!(store.remembers("fine", now()).await, Ok(false));

    let told = store.count_failures(&failures[1..], now()).await.unwrap();
    assert!(told.len() == MAX_LEDGER_BATCH && told.iter().all(|told| *told > MINUTE / 2));
    store.remember(&keys[1..], MINUTE, now()).await.unwrap();
    assert_eq!(store.remembers(&keys[0], now()).await, Ok(false));
    assert_eq!(store.remembers(&keys[MAX_LEDGER_BATCH], now()).await, Ok(true));
}

/// Never "not used yet", neither for new connections nor for those that were there before.
async fn a_ledger_without_a_store_is_an_error(rig: Rig) {
    let not = [const { StoreError::NotInitialised }; 4];
    assert_eq!(troubles(&rig.store()).await, not);
    let store = rig.ready().await;
    assert!(spend(&store, "a", 1).await);
    store.remember(&["k".to_owned()], MINUTE, now()).await.unwrap();
    rig.empty();
    assert_eq!(troubles(&store).await, not);
    assert_eq!(troubles(&rig.store()).await, not);
    if !matches!(rig.place, Place::Sqlite(_)) {
        assert_eq!(marks(&rig), 0, "nothing was written");
    }
}

#[tokio::test]
async fn the_ledgers_file_is_private_and_apart() {
    let rig = Rig::sqlite().await;
    let store = rig.ready().await;
    let Place::Sqlite(file) = &rig.place else { unreachable!() };
    let version = || -> i64 {
        rig.sqlite_file().query_row("SELECT version FROM state", [], |row| row.get(0)).unwrap()
    };
    let (watcher, before) = (rig.sqlite_file(), version());
    let changes =
        || -> i64 { watcher.query_row("PRAGMA data_version", [], |row| row.get(0)).unwrap() };
    let seen = changes();
    // A store made by a build that knew no ledger is just one without this file.
    assert!(!std::fs::exists(format!("{}.ledger", file.display())).unwrap());
    assert!(spend(&store, "a", 1).await);
    assert_eq!((changes(), version()), (seen, before), "followers are not woken");
    for suffix in ["", "-wal", "-shm"] {
        let path = format!("{}.ledger{suffix}", file.display());
        let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{path}");
    }
    // What is not ours is left alone.
    let rig = Rig::sqlite().await;
    let store = rig.ready().await;
    ledger_file(&rig).execute_batch("CREATE TABLE theirs (x); PRAGMA user_version = 1").unwrap();
    for error in troubles(&store).await {
        let theirs = matches!(&error, StoreError::Corrupt(why) if why.contains("another"));
        assert!(theirs, "{error}");
    }
    create(&store, "entries do not care", "r").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_and_ledger_do_not_wait_for_each_other() {
    let rig = Rig::sqlite().await;
    let store = rig.ready().await;
    assert!(spend(&store, "a", 9).await);
    let entries = rig.sqlite_file();
    entries.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert!(spend(&store, "b", 9).await);
    entries.execute_batch("ROLLBACK").unwrap();

    let ledger = ledger_file(&rig);
    ledger.execute_batch("BEGIN IMMEDIATE").unwrap();
    let start = SystemClock.now().monotonic;
    let waiting: Vec<_> = (0..20)
        .map(|i| {
            let store = store.clone();
            tokio::spawn(async move {
                let answer = store.spend(&spending(&format!("w{i}"), 99), now()).await;
                (answer.unwrap_err(), start.elapsed())
            })
        })
        .collect();
    create(&store, "entry", "r").await.unwrap();
    for task in waiting {
        let (error, took) = task.await.unwrap();
        assert!(matches!(error, StoreError::Unreachable(_)), "{error}");
        assert!(took < TOLD, "{took:?}");
    }
    ledger.execute_batch("ROLLBACK").unwrap();
    eventually("the ledger goes on", || async {
        store.spend(&spending("c", 99), now()).await.unwrap_or(false).then_some(())
    })
    .await;
}

#[tokio::test]
async fn marks_outlive_a_backup_that_is_put_back() {
    let rig = Rig::sqlite().await;
    let store = rig.ready().await;
    create(&store, "a", "r").await.unwrap();
    assert!(spend(&store, "a", 1).await);
    let Place::Sqlite(file) = &rig.place else { unreachable!() };
    let backup = file.with_extension("backup");
    let sql = format!("VACUUM INTO '{}'", backup.display());
    rig.sqlite_file().execute_batch(&sql).unwrap();
    std::fs::rename(&backup, file).unwrap();
    for suffix in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(format!("{}{suffix}", file.display()));
    }
    assert!(!spend(&store, "b", 1).await);
    assert!(spend(&store, "a", 1).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ledgers_tables_stay_small() {
    let rig = Rig::sqlite().await;
    let store = rig.ready().await;
    for n in 0..500_u64 {
        let at = 1_700_000_000 + n;
        let mark = Spending { counter: n, keep: 20 * SECOND, ..spending("a", 1) };
        assert!(store.spend(&mark, at).await.unwrap());
        let key = format!("k{n}");
        store.count_failures(&[failure(&key, 1, 20 * SECOND)], at).await.unwrap();
        store.remember(&[key], 20 * SECOND, at).await.unwrap();
    }
    assert!(marks(&rig) <= 3 * 22, "{}", marks(&rig));
    // So does the write-ahead log: 3,000 marks are more than it would hold at once.
    let Place::Sqlite(file) = &rig.place else { unreachable!() };
    let log = format!("{}.ledger-wal", file.display());
    for n in 0..3_000 {
        let mark = Spending { counter: n, serial: 1, ..spending("a", 1) };
        assert!(store.spend(&mark, now()).await.unwrap());
    }
    let size = std::fs::metadata(log).unwrap().len();
    assert!(size < 20_000_000, "{size}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_away_or_hangs_is_told_in_time() {
    let mut rig = Rig::redis().await;
    let store = rig.ready().await;
    assert!(spend(&store, "a", 1).await);
    let told = async |store: &Store| {
        let start = SystemClock.now().monotonic;
        let asking: Vec<_> = (0..50)
            .map(|i| {
                let store = store.clone();
                tokio::spawn(async move {
                    store.spend(&spending(&format!("r{i}"), 99), now()).await.unwrap_err()
                })
            })
            .collect();
        for task in asking {
            let error = task.await.unwrap();
            assert!(matches!(error, StoreError::Unreachable(_)), "{error}");
        }
        assert!(start.elapsed() < TOLD, "{:?}", start.elapsed());
        for error in troubles(store).await {
            assert!(matches!(error, StoreError::Unreachable(_)), "{error}");
        }
        assert!(start.elapsed() < 5 * TOLD, "{:?}", start.elapsed());
    };
    rig.server().signal(libc::SIGSTOP);
    told(&store).await;
    rig.server().signal(libc::SIGCONT);
    eventually("it goes on", || async {
        store.spend(&spending("a", 1), now()).await.ok().map(|passed| assert!(passed))
    })
    .await;
    rig.server().kill();
    told(&store).await;
    tokio::task::block_in_place(|| rig.server().restart());
    // With an append-only file, what was acknowledged is still known.
    let again = spending("a", 1);
    let known = || async { store.spend(&again, now()).await.ok() };
    assert!(eventually("the ledger answers again", known).await);
    assert!(!spend(&store, "b", 1).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_server_takes_no_marks() {
    let rig = Rig::redis().await;
    let store = rig.ready().await;
    store.remember(&["k".to_owned()], MINUTE, now()).await.unwrap();
    rig.run::<()>(&["CONFIG", "SET", "maxmemory", "1"]);
    let error = store.spend(&spending("a", 1), now()).await.unwrap_err();
    assert!(matches!(error, StoreError::ReadOnly(_)), "{error}");
    assert_eq!(store.remembers("k", now()).await, Ok(true));
    rig.run::<()>(&["CONFIG", "SET", "maxmemory", "0"]);
    assert!(spend(&store, "a", 1).await);
}

#[tokio::test]
async fn policies_that_forget_marks_are_warned_about() {
    let server = RedisServer::start(Options { aof: true, ..Options::default() });
    let url = server.url();
    let rig = Rig::on_server(server, &url);
    rig.run::<()>(&["CONFIG", "SET", "maxmemory-policy", "volatile-ttl"]);
    let warnings = rig.store().warnings().await;
    assert!(warnings.iter().any(|w| w.contains("evict marks of used tokens")), "{warnings:?}");
}
