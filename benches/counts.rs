//! Instructions and allocations of what the gate does for every request, compared with `benches/counts.json`:
//! `make bench-check`. Both hardly depend on how busy the machine is. Needs valgrind.
//!
//! Every subject runs twice under callgrind, in a process of its own, with different numbers of repetitions: the
//! difference is the repetitions' alone, whatever starting took. Valgrind's processor has no SHA extensions, so
//! that tokens take more instructions there than on most machines.

use std::alloc::{GlobalAlloc, Layout};
use std::collections::BTreeMap;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU64, Ordering};

use mimalloc::MiMalloc;
use serde::{Deserialize, Serialize};

#[path = "support/bare.rs"]
mod bare;
#[path = "support/filled.rs"]
mod filled;
#[path = "support/hot.rs"]
mod hot;
#[path = "support/whole.rs"]
mod whole;

use hot::{HOT, Rig};
use whole::{WHOLE, Whole};

const FIGURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/counts.json");
/// More instructions than that are a regression.
const BOUND_PERCENT: f64 = 3.0;
/// Fewer differ from run to run: hash maps have other keys each time.
const BOUND_INSTRUCTIONS: f64 = 50.0;
/// Allocations are whole; what grows now and then gives fractions.
const BOUND_ALLOCATIONS: f64 = 0.5;
/// Repetitions before anything counts, and of the two runs: of parts, and of whole requests.
const WARM_UP: usize = 500;
const TIMES_HOT: [usize; 2] = [500, 5_500];
const TIMES_WHOLE: [usize; 2] = [500, 1_500];
/// What a child process is to run, and how often.
const CHILD: &str = "BENCH_COUNTS_CHILD";
const CHILD_TIMES: &str = "BENCH_COUNTS_TIMES";

/// What is kept in the repository.
#[derive(Serialize, Deserialize)]
struct Figures {
    toolchain: String,
    /// Whether the compiler optimised.
    optimised: bool,
    counts: BTreeMap<String, Counts>,
}

/// Of one repetition.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Counts {
    instructions: f64,
    allocations: f64,
}

fn main() -> ExitCode {
    if let Ok(subject) = std::env::var(CHILD) {
        let times = std::env::var(CHILD_TIMES).expect("how often");
        repeat(&subject, times.parse().expect("a number"));
        return ExitCode::SUCCESS;
    }
    let arguments: Vec<_> = std::env::args().skip(1).filter(|text| text != "--bench").collect();
    let accept = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => false,
        ["--accept"] => true,
        _ => {
            eprintln!("usage: counts [--accept]");
            return ExitCode::from(2);
        }
    };
    let kept = if accept { None } else { Some(read()) };
    let now = Figures { toolchain: toolchain(), optimised: optimised(), counts: count() };
    print_gates_own(&now);
    match kept {
        None => {
            let text = serde_json::to_string_pretty(&now).expect("JSON");
            std::fs::write(FIGURES, text + "\n").expect("the file can be written");
            println!("\nwritten to {FIGURES}");
            ExitCode::SUCCESS
        }
        Some(kept) => compare(&kept, &now),
    }
}

fn read() -> Figures {
    let text = std::fs::read_to_string(FIGURES);
    let text =
        text.unwrap_or_else(|e| panic!("{FIGURES}: {e}; `make bench-check ACCEPT=1` makes it"));
    let figures: Figures = serde_json::from_str(&text).expect("what `--accept` wrote");
    assert_eq!(figures.optimised, optimised(), "the figures are of another profile");
    figures
}

fn toolchain() -> String {
    let output =
        Command::new(std::env::var("RUSTC").unwrap_or("rustc".to_owned())).arg("-V").output();
    String::from_utf8(output.expect("rustc runs").stdout).expect("UTF-8").trim().to_owned()
}

fn optimised() -> bool {
    !cfg!(debug_assertions)
}

/// Runs every subject and prints what it counts.
fn count() -> BTreeMap<String, Counts> {
    println!("| what | instructions | allocations |\n|---|---|---|");
    let parts = HOT.iter().map(|(name, _)| (*name, TIMES_HOT));
    let subjects = parts.chain(WHOLE.iter().map(|(name, _)| (*name, TIMES_WHOLE)));
    let count = |(name, times): (&str, [usize; 2])| {
        let [few, many] = times.map(|times| run_child(name, times));
        let more = (times[1] - times[0]) as f64;
        let each = |few: u64, many: u64| many.saturating_sub(few) as f64 / more;
        let counts = Counts {
            instructions: each(few.0, many.0).round(),
            allocations: (each(few.1, many.1) * 100.0).round() / 100.0,
        };
        println!("| {name} | {:.0} | {:.2} |", counts.instructions, counts.allocations);
        (name.to_owned(), counts)
    };
    subjects.map(count).collect()
}

/// Instructions and allocations of a run.
fn run_child(subject: &str, times: usize) -> (u64, u64) {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe().expect("this program"))
        .env(CHILD, subject)
        .env(CHILD_TIMES, times.to_string())
        .output()
        .expect("what `tests/tools/install bench` brings");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{subject}: {said}");
    let collected = said.lines().find_map(|line| line.split_once("Collected : "));
    let instructions = collected.and_then(|(_, number)| number.trim().parse().ok());
    let allocations = String::from_utf8_lossy(&output.stdout).trim().parse();
    (instructions.expect("callgrind's sum"), allocations.expect("a number"))
}

/// The child: does it so often and prints how many allocations that took.
fn repeat(subject: &str, times: usize) {
    let mut run = find(subject);
    for number in 0..WARM_UP {
        run(number);
    }
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for number in WARM_UP..WARM_UP + times {
        run(number);
    }
    println!("{}", ALLOCATIONS.load(Ordering::Relaxed) - before);
}

fn find(subject: &str) -> Box<dyn FnMut(usize)> {
    if let Some((_, run)) = HOT.into_iter().find(|(name, _)| *name == subject) {
        let rig = Rig::new();
        return Box::new(move |number| run(&rig, number));
    }
    let (_, front) = WHOLE.into_iter().find(|(name, _)| *name == subject).expect("a subject");
    let mut whole = Whole::new(front);
    Box::new(move |number| whole.ask(number))
}

fn print_gates_own(figures: &Figures) {
    let [bare, _, duties, gate] = WHOLE.map(|(name, _)| figures.counts[name]);
    println!();
    for (what, other) in [("bare pingora", bare), ("bare pingora with its duties", duties)] {
        println!(
            "The gate's own, beyond {what}: {:.0} instructions ({:.1} %), {:.2} allocations.",
            gate.instructions - other.instructions,
            (gate.instructions / other.instructions - 1.0) * 100.0,
            gate.allocations - other.allocations
        );
    }
}

/// Says what is more than it was, and fails if that is clear.
fn compare(kept: &Figures, now: &Figures) -> ExitCode {
    println!("\ncompared with {FIGURES}:");
    if kept.toolchain != now.toolchain {
        println!(
            "its toolchain was {}, this is {}: small differences are the compiler's",
            kept.toolchain, now.toolchain
        );
    }
    let mut worse = kept.counts.keys().filter(|name| !now.counts.contains_key(*name)).count();
    for (name, now) in &now.counts {
        let Some(old) = kept.counts.get(name) else {
            println!("{name}: not in the figures");
            worse += 1;
            continue;
        };
        let percent = (now.instructions / old.instructions - 1.0) * 100.0;
        let allocations = now.allocations - old.allocations;
        let bound = (old.instructions * BOUND_PERCENT / 100.0).max(BOUND_INSTRUCTIONS);
        let more = now.instructions - old.instructions;
        let is_worse = more > bound || allocations > BOUND_ALLOCATIONS;
        worse += usize::from(is_worse);
        if is_worse || more < -bound || allocations < -BOUND_ALLOCATIONS {
            let verdict = if is_worse { "WORSE" } else { "better" };
            println!(
                "{name}: {verdict}: {percent:+.1} % instructions, {allocations:+.2} allocations"
            );
        }
    }
    println!(
        "`make bench-check ACCEPT=1` makes these the figures to compare with; commit them with what explains them"
    );
    if worse == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Made and grown since the start.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// The program's, counted.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: all is passed on to the program's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { MiMalloc.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { MiMalloc.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { MiMalloc.realloc(pointer, layout, size) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { MiMalloc.alloc_zeroed(layout) }
    }
}
