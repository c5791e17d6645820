//! Times of what the gate does for every request, part by part: `cargo bench --bench micro`, on a quiet machine.
//! Names as arguments choose; `--help` says more.

use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use divan::Bencher;
use otpgate::clock::{Clock as _, SystemClock};
use otpgate::directory::Hold;
use otpgate::entry::Principal;
use otpgate::seal::Sealer;
use otpgate::store::Store;
use otpgate::store::sqlite::Sqlite;
use tokio::runtime::Runtime;

#[path = "support/bare.rs"]
mod bare;
#[path = "support/filled.rs"]
mod filled;
#[path = "support/hot.rs"]
mod hot;
#[path = "support/whole.rs"]
mod whole;

use filled::{Gate, entry, fill, principal};
use hot::{HOT, Rig, look_up};
use whole::{WHOLE, Whole};

/// Entries that are looked up often.
const HOT_NAMES: u64 = 1_000;

fn main() {
    divan::main();
}

// Samples of many repetitions, here and below: of one alone, the caches' misses are what is timed.
#[divan::bench(args = HOT.map(|(name, _)| name), sample_size = 1_000)]
fn of_each_request(bencher: Bencher, name: &str) {
    let (_, run) = HOT.into_iter().find(|(of, _)| *of == name).expect("it is in the table");
    let rig = Rig::new();
    let mut number = 0;
    bencher.bench_local(|| {
        number += 1;
        run(&rig, number);
    });
}

/// With client and upstream in the same thread.
#[divan::bench(args = WHOLE.map(|(name, _)| name), sample_size = 100)]
fn whole(bencher: Bencher, name: &str) {
    let (_, front) = WHOLE.into_iter().find(|(of, _)| *of == name).expect("it is in the table");
    let mut whole = Whole::new(front);
    let mut number = 0;
    bencher.bench_local(|| {
        number += 1;
        whole.ask(number);
    });
}

#[divan::bench(args = [10_000, 1_000_000], threads = [1, 2], sample_size = 10_000)]
fn directory(bencher: Bencher, entries: u64) {
    look_ups(bencher, Filled::of(entries));
}

#[divan::bench(args = [10_000, 1_000_000], threads = [1, 2], sample_size = 10_000)]
fn directory_while_writes_run(bencher: Bencher, entries: u64) {
    let filled = Filled::of(entries);
    let _writes = filled.write();
    look_ups(bencher, filled);
}

fn look_ups(bencher: Bencher, filled: &Filled) {
    let names: Vec<Principal> = (1..=HOT_NAMES).map(principal).collect();
    let (now, next) = (SystemClock.now(), AtomicUsize::new(0));
    // Each thread begins elsewhere, and counts for itself: a shared count would be what is measured.
    thread_local!(static AT: std::cell::Cell<Option<usize>> = const { std::cell::Cell::new(None) });
    bencher.bench(|| {
        let at = AT.get().unwrap_or_else(|| next.fetch_add(names.len() / 2, Ordering::Relaxed)) + 1;
        AT.set(Some(at));
        look_up(&filled.gate.directory, &names[at % names.len()], now)
    });
}

/// A directory of so many entries that follows its store.
struct Filled {
    gate: Gate,
    store: Store,
    runtime: Runtime,
    entries: u64,
    _folder: tempfile::TempDir,
}

impl Filled {
    /// The one of that size: a million take a while.
    fn of(entries: u64) -> &'static Self {
        static SMALL: LazyLock<Filled> = LazyLock::new(|| Filled::new(10_000));
        static LARGE: LazyLock<Filled> = LazyLock::new(|| Filled::new(1_000_000));
        match entries {
            10_000 => &SMALL,
            _ => &LARGE,
        }
    }

    fn new(entries: u64) -> Self {
        let mut threads = tokio::runtime::Builder::new_multi_thread();
        let runtime = threads.worker_threads(1).enable_all().build().expect("a runtime");
        let folder = tempfile::tempdir().expect("a folder");
        let backend = Sqlite::new(&folder.path().join("otpgate.db"));
        let store = Store::new(Arc::new(backend), Sealer::off());
        let gate = runtime.block_on(async {
            store.init().await.expect("a new store");
            let version = fill(&store, (1..=entries).map(entry)).await;
            let gate = Gate::start(store.clone(), &Hold::default(), Arc::new(SystemClock));
            gate.has(version).await;
            gate
        });
        Self { gate, store, runtime, entries, _folder: folder }
    }

    /// Makes and deletes entries, one after the other, until the result is dropped.
    fn write(&'static self) -> Writes {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let number = self.entries + 1;
        let task = self.runtime.spawn(async move {
            while !stopped.load(Ordering::Relaxed) {
                self.store.insert(&[entry(number)]).await.expect("inserted");
                let who = principal(number);
                let stored =
                    self.store.get((&who).into()).await.expect("read").expect("it is there");
                self.store.delete(&stored).await.expect("deleted");
            }
        });
        Writes { stop, task: Some(task), runtime: &self.runtime }
    }
}

/// Ends the writes, an entry that was made included.
struct Writes {
    stop: Arc<AtomicBool>,
    task: Option<tokio::task::JoinHandle<()>>,
    runtime: &'static Runtime,
}

impl Drop for Writes {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(task) = self.task.take() {
            self.runtime.block_on(task).expect("the writes succeed");
        }
    }
}
