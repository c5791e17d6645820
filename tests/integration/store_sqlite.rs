//! What only SQLite can go through: files of all sorts, locks, full and read-only disks, other
//! processes.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use otpgate::clock::{Clock as _, SystemClock};
use otpgate::entry::{Entry, EntryId};
use otpgate::store::{Spending, Store, StoreError};
use rusqlite::Connection;

use crate::directory_follow::Gate;
use crate::store_rig::{Follow, Place, Rig, create, entry, opened, who};

fn file(rig: &Rig) -> &Path {
    match &rig.place {
        Place::Sqlite(file) => file,
        _ => panic!("not an SQLite store"),
    }
}

/// The error of whatever is tried on a store that cannot be used.
async fn trouble(store: &Store) -> StoreError {
    let read = store.get((&who("a", "r")).into()).await.unwrap_err();
    let feed = store.feed(Arc::new(SystemClock)).await.map(|_| ()).unwrap_err();
    assert_eq!(read, feed);
    read
}

#[tokio::test]
async fn the_file_is_private_and_durable() {
    let rig = Rig::sqlite().await;
    let store = rig.ready().await;
    create(&store, "a", "r").await.unwrap();
    for suffix in ["", "-wal", "-shm"] {
        let path = format!("{}{suffix}", file(&rig).display());
        let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{path}");
    }
    let mode: String =
        rig.sqlite_file().query_row("PRAGMA journal_mode", [], |row| row.get(0)).unwrap();
    assert_eq!(mode, "wal");
    assert_eq!(store.warnings().await, Vec::<String>::new());
}

#[tokio::test]
async fn other_files_are_not_touched() {
    let rig = Rig::sqlite().await;
    let text =
        b"this is no database, but long enough to look like one to those who do not look well";
    std::fs::write(file(&rig), text).unwrap();
    for error in [trouble(&rig.store()).await, rig.store().init().await.unwrap_err()] {
        assert!(
            matches!(&error, StoreError::Corrupt(why) if why.contains("not a database")),
            "{error}"
        );
    }
    assert_eq!(std::fs::read(file(&rig)).unwrap(), text);

    std::fs::remove_file(file(&rig)).unwrap();
    let conn = Connection::open(file(&rig)).unwrap();
    conn.execute_batch("CREATE TABLE theirs (x); PRAGMA user_version = 1").unwrap();
    drop(conn);
    let before = std::fs::read(file(&rig)).unwrap();
    for error in [trouble(&rig.store()).await, rig.store().init().await.unwrap_err()] {
        assert!(
            matches!(&error, StoreError::Corrupt(why) if why.contains("another application")),
            "{error}"
        );
    }
    assert_eq!(std::fs::read(file(&rig)).unwrap(), before);
}

#[tokio::test]
async fn newer_formats_are_refused() {
    let rig = Rig::sqlite().await;
    rig.ready().await;
    rig.sqlite_file().pragma_update(None, "user_version", 2).unwrap();
    for error in [trouble(&rig.store()).await, rig.store().init().await.unwrap_err()] {
        assert!(matches!(&error, StoreError::Corrupt(why) if why.contains("number 2")), "{error}");
    }
}

#[tokio::test]
async fn an_empty_file_is_a_store_to_be() {
    let rig = Rig::sqlite().await;
    std::fs::write(file(&rig), b"").unwrap();
    assert_eq!(trouble(&rig.store()).await, StoreError::NotInitialised);
    assert_eq!(rig.store().init().await, Ok(true));
    create(&rig.store(), "a", "r").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn it_is_made_once_however_many_try() {
    let rig = Rig::sqlite().await;
    let tries = (0..8).map(|_| {
        let store = rig.store();
        tokio::spawn(async move { store.init().await })
    });
    let mut made = 0;
    for done in tries.collect::<Vec<_>>() {
        made += u32::from(done.await.unwrap().unwrap());
    }
    assert_eq!(made, 1);
}

#[tokio::test]
async fn a_replaced_file_is_never_taken_for_current() {
    let rig = Rig::sqlite().await;
    let store = rig.ready().await;
    let a = create(&store, "a", "r").await.unwrap();
    let (mut follow, _) = Follow::start(&store).await;
    follow.changes().await.unwrap();

    // Another store comes in its place; connections to the old file are open.
    let other = Rig::sqlite().await;
    create(&other.ready().await, "b", "r").await.unwrap();
    other.sqlite_file().execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    std::fs::rename(file(&other), file(&rig)).unwrap();
    for suffix in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(format!("{}{suffix}", file(&rig).display()));
    }
    let poll = follow.feed.poll(&follow.position).await;
    assert!(
        matches!(&poll, Err(StoreError::Unreachable(why)) if why.contains("replaced")),
        "{poll:?}"
    );
    // New operations go to the file that is there now.
    assert_eq!(store.get((&a.principal).into()).await, Ok(None));
    follow.reconnect(&store).await;
    assert!(follow.changes().await.is_err(), "its history is another one");
}

#[tokio::test]
async fn a_held_lock_delays_and_then_fails_writes_only() {
    let rig = Rig::sqlite().await;
    let store = rig.ready().await;
    let a = create(&store, "a", "r").await.unwrap();
    let conn = rig.sqlite_file();
    conn.execute_batch("BEGIN IMMEDIATE").unwrap();
    let error = create(&store, "b", "r").await.unwrap_err();
    assert!(matches!(&error, StoreError::Unreachable(why) if why.contains("lock")), "{error}");
    assert!(store.get((&a.principal).into()).await.unwrap().is_some());
    assert!(Follow::start(&store).await.0.changes().await.is_ok());

    let write = create(&store, "b", "r");
    let release = async {
        tokio::task::yield_now().await;
        conn.execute_batch("ROLLBACK").unwrap();
    };
    let (written, ()) = tokio::join!(write, release);
    written.unwrap();
}

#[tokio::test]
async fn the_log_keeps_a_bounded_number_of_records() {
    let rig = Rig::sqlite().await;
    let store = rig.ready().await;
    let conn = rig.sqlite_file();
    conn.execute_batch(
        "WITH RECURSIVE n(v) AS (SELECT 1 UNION ALL SELECT v + 1 FROM n WHERE v < 100500)
         INSERT INTO log SELECT v, 'n' || v, 'n' || (v - 1), '' FROM n;
         UPDATE state SET version = 100500, nonce = 'n100500'",
    )
    .unwrap();
    create(&store, "a", "r").await.unwrap();
    let (count, first): (u64, u64) = conn
        .query_row("SELECT count(*), min(version) FROM log", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .unwrap();
    assert_eq!((count, first), (100_000, 502));
}

/// Runs `work` in a thread whose file accesses are those of an ordinary user: root may do anything.
fn as_nobody(work: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: setfsuid takes no pointers and changes only the calling thread, which ends here;
            // threads that it starts inherit it. Without root it changes nothing, and need not.
            unsafe { libc::setfsuid(65534) };
            work();
        });
        thread.join().unwrap();
    });
}

#[tokio::test]
async fn a_read_only_file_stays_readable() {
    let rig = Rig::sqlite().await;
    let store = rig.ready().await;
    let a = create(&store, "a", "r").await.unwrap();
    let dir = file(&rig).parent().unwrap();
    let modes = |file_mode, dir_mode| {
        for suffix in ["", "-wal", "-shm"] {
            let path = format!("{}{suffix}", file(&rig).display());
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(file_mode)).unwrap();
        }
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(dir_mode)).unwrap();
    };
    modes(0o444, 0o555);
    as_nobody(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let store = rig.store();
            let found = store.get((&a.principal).into()).await.unwrap().unwrap();
            assert_eq!(found.entry.as_ref(), Ok(&a));
            let (mut follow, rows) = Follow::start(&store).await;
            assert_eq!((rows.len(), follow.changes().await), (1, Ok(Vec::new())));
            for error in [
                store.spend(&spending(1, "a"), now()).await.map(|_| ()).unwrap_err(),
                create(&store, "b", "r").await.map(|_| ()).unwrap_err(),
                store.delete(&found).await.map(|_| ()).unwrap_err(),
            ] {
                assert!(matches!(error, StoreError::ReadOnly(_)), "{error}");
            }
        });
    });
    // Out of reach altogether.
    let locked_out = rig.store();
    modes(0o444, 0o000);
    as_nobody(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let error = runtime.block_on(trouble(&locked_out));
        assert!(matches!(error, StoreError::Denied(_)), "{error}");
    });
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).unwrap();
    modes(0o600, 0o700);
    create(&store, "b", "r").await.unwrap();
}

/// What a child process of these tests does, given by the environment.
const CHILD: &str = "OTPGATE_TEST_CHILD";

/// Starts this test binary again, to be `child` on the store of `rig`.
fn child(rig: &Rig, role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "store_sqlite::child_process", "--nocapture", "--test-threads=1"]);
    command.env(CHILD, role).env("OTPGATE_TEST_DIR", file(rig).parent().unwrap());
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// Not a test by itself: the other process of the tests below.
#[test]
fn child_process() {
    let Ok(role) = std::env::var(CHILD) else { return };
    let dir = PathBuf::from(std::env::var_os("OTPGATE_TEST_DIR").unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let store = Rig::in_directory(&dir).store();
    runtime.block_on(async {
        match role.as_str() {
            "write" => loop {
                let made =
                    create(&store, &format!("n{}", rand::random::<u64>()), "r").await.unwrap();
                println!("\nmade {}", made.id);
            },
            "fill" => {
                let big = |id, name: &str| Entry {
                    comment: "x".repeat(1000),
                    ..entry(id, who(name, "r"))
                };
                for i in 10.. {
                    match store.insert(&[big(i, &format!("n{i}"))]).await {
                        Ok(_) => assert!(i < 10_000, "the limit does not work"),
                        Err(error) => {
                            assert!(matches!(error, StoreError::ReadOnly(_)), "{error}");
                            let all = store.list(None, usize::MAX).await.unwrap();
                            println!("\nfull at {} of {}", i - 10, all.len());
                            let (mut follow, rows) = Follow::start(&store).await;
                            assert_eq!(rows.len(), all.len());
                            follow.changes().await.unwrap();
                            return;
                        }
                    }
                }
            }
            "spend" => {
                for counter in 0.. {
                    assert!(store.spend(&spending(counter, "child"), now()).await.unwrap());
                    println!("\nspent {counter}");
                }
            }
            "fill ledger" => {
                for counter in 0.. {
                    match store.spend(&spending(counter, "child"), now()).await {
                        Ok(passed) => assert!(passed && counter < 20_000),
                        Err(error) => {
                            assert!(matches!(error, StoreError::ReadOnly(_)), "{error}");
                            println!("\nspent {counter}");
                            // Entries' own file has room.
                            create(&store, "roomy", "r").await.unwrap();
                            return;
                        }
                    }
                }
            }
            other => panic!("unknown role {other}"),
        }
    });
}

fn now() -> u64 {
    SystemClock.now().unix
}

fn spending(counter: u64, by: &str) -> Spending {
    let keep = std::time::Duration::from_secs(600);
    Spending { id: EntryId(1), serial: 0, counter, by: by.into(), budget: 1, keep }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn marks_survive_the_death_of_their_maker() {
    let rig = Rig::sqlite().await;
    let store = rig.ready().await;
    let mut spender = child(&rig, "spend").spawn().unwrap();
    let lines = BufReader::new(spender.stdout.take().unwrap()).lines();
    let spent: Vec<u64> = tokio::task::block_in_place(|| {
        let mut spent = lines.filter_map(|line| line.unwrap().strip_prefix("spent ")?.parse().ok());
        let mut first: Vec<_> = spent.by_ref().take(100).collect();
        spender.kill().unwrap();
        spender.wait().unwrap();
        first.extend(spent);
        first
    });
    assert!(spent.len() >= 100);
    for counter in spent {
        assert!(!store.spend(&spending(counter, "parent"), now()).await.unwrap(), "{counter}");
        assert!(store.spend(&spending(counter, "child"), now()).await.unwrap(), "{counter}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_takes_no_marks_and_keeps_those_it_has() {
    let rig = Rig::sqlite().await;
    let store = rig.ready().await;
    let text = with_small_files(child(&rig, "fill ledger"));
    let spent = text.lines().find_map(|line| line.strip_prefix("spent ")).expect("it got full");
    let spent: u64 = spent.parse().unwrap();
    assert!(spent > 10);
    for counter in 0..spent {
        assert!(!store.spend(&spending(counter, "parent"), now()).await.unwrap(), "{counter}");
    }
    assert!(store.spend(&spending(spent, "parent"), now()).await.unwrap(), "it was not taken");
}

/// Runs `command` to its end, in which no file may grow much; what it wrote.
fn with_small_files(mut command: Command) -> String {
    // SAFETY: both calls are async-signal-safe, and their arguments outlive them.
    unsafe {
        command.pre_exec(|| {
            // No file may grow beyond this; without the handler the process would be killed.
            let limit = libc::rlimit { rlim_cur: 400_000, rlim_max: 400_000 };
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            match libc::setrlimit(libc::RLIMIT_FSIZE, &limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let output = tokio::task::block_in_place(|| command.stderr(Stdio::piped()).output().unwrap());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_stops_writes_and_nothing_else() {
    let rig = Rig::sqlite().await;
    let store = rig.ready().await;
    create(&store, "a", "r").await.unwrap();
    let text = with_small_files(child(&rig, "fill"));
    let full = text.lines().find_map(|line| line.strip_prefix("full at ")).expect("it got full");
    let (written, listed) = full.split_once(" of ").unwrap();
    let written: usize = written.parse().unwrap();
    assert!(written > 10, "{full}");
    assert_eq!(
        listed.parse::<usize>().unwrap(),
        written + 1,
        "exactly what was acknowledged is there"
    );
    // Here there is room.
    assert_eq!(store.list(None, usize::MAX).await.unwrap().len(), written + 1);
    create(&store, "b", "r").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_process_is_followed_and_what_it_acknowledged_survives_its_death() {
    let rig = Rig::sqlite().await;
    let gate = Gate::start(rig.ready().await);
    gate.until("the empty store is loaded", |gate| gate.directory.status().loaded).await;
    for _ in 0..3 {
        let mut writer = child(&rig, "write").spawn().unwrap();
        let lines = BufReader::new(writer.stdout.take().unwrap()).lines();
        let acknowledged: Vec<EntryId> = tokio::task::block_in_place(|| {
            let mut made =
                lines.filter_map(|line| line.unwrap().strip_prefix("made ")?.parse().ok());
            let mut ids: Vec<_> = made.by_ref().take(30).map(EntryId).collect();
            writer.kill().unwrap();
            writer.wait().unwrap();
            ids.extend(made.map(EntryId));
            ids
        });
        let store = rig.store();
        assert!(acknowledged.len() >= 30);
        for id in &acknowledged {
            let stored =
                store.get_by_id(*id).await.unwrap().expect("what was acknowledged is there");
            gate.until("the entry is in force", |gate| gate.shows(opened(&stored))).await;
        }
    }
    assert_eq!(gate.metrics.directory_full_loads.get(), 1);
}
