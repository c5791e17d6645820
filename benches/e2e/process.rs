//! Processes on a core of their own, and what they use.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use otpgate::clock::{Clock as _, SystemClock};

/// What a process is for: it says where it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Upstream and load.
    Load,
    /// What is measured.
    Tested,
}

impl Side {
    /// Where what is measured has one thread, it has a core of its own; otherwise all share all cores.
    fn cores(self, threads: usize) -> String {
        let last = std::thread::available_parallelism().map_or(1, usize::from) - 1;
        match (self, threads) {
            (Self::Load, 1) => "0".to_owned(),
            (Self::Tested, 1) => "1".to_owned(),
            _ => format!("0-{last}"),
        }
    }
}

/// How long a process may take to end when asked.
const PATIENCE: Duration = Duration::from_secs(5);
/// The unit of `/proc/stat`: USER_HZ, 100 wherever Linux runs.
const TICK: Duration = Duration::from_millis(10);

/// Now, for durations.
pub(crate) fn now() -> Instant {
    SystemClock.now().monotonic
}

/// A command on the cores of its side that also ends when this process does; what is measured has so many
/// `threads`.
pub(crate) fn pinned(side: Side, threads: usize, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("taskset");
    command
        .args(["-c", &side.cores(threads), "setpriv", "--pdeathsig", "TERM"])
        .arg(program)
        .stdin(Stdio::null());
    command
}

/// Gives processes, with all their threads, the load's included, precedence over everything else on their cores, or
/// takes it from them: under the scheduler's usual slices, which last milliseconds, the slowest hundredth of
/// answers tells when whose slice ended. Not for load that saturates a core. Whether that is allowed.
pub(crate) fn prefer(pids: &[u32], preferred: bool) -> bool {
    let policy = if preferred { ["--fifo", "10"] } else { ["--other", "0"] };
    let one = |pid: &u32| {
        let mut command = Command::new("chrt");
        let pid = pid.to_string();
        let command = command.args(["--all-tasks", policy[0], "--pid", policy[1], &pid]);
        command.stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    // All of them, or what has no precedence would be measured beside what has.
    let allowed = pids.iter().all(one);
    if preferred && !allowed {
        prefer(pids, false);
    }
    allowed
}

/// A process; ended when dropped.
pub(crate) struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    pub(crate) fn start(name: &str, command: &mut Command, log: PathBuf) -> Self {
        let file = fs::File::create(&log).expect("a log file");
        let child = command.stdout(Stdio::null()).stderr(file).spawn();
        let child = child.unwrap_or_else(|e| panic!("{name}: {e}; `tests/tools/install bench`?"));
        Self { child, name: name.to_owned(), log }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails if it has ended by itself, with what it complained about.
    pub(crate) fn must_run(&mut self) {
        let ended = self.child.try_wait().expect("its state");
        assert!(ended.is_none(), "{} has ended: {ended:?}{}", self.name, self.complaints());
    }

    /// The last lines of its log.
    pub(crate) fn complaints(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let last = lines.iter().skip(lines.len().saturating_sub(5));
        last.map(|line| format!("\n{}: {line}", self.name)).collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let pid = i32::try_from(self.child.id()).expect("process ids are small");
        // SAFETY: kill takes two integers; the process is our child and not yet waited for.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        let asked = now();
        while asked.elapsed() < PATIENCE {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What was used during a run.
pub(crate) struct Used {
    /// Of the processes that are measured.
    pub(crate) cpu: Duration,
    /// Their resident memory at its end, in bytes.
    pub(crate) memory: u64,
    /// Of one core, by upstream and load.
    pub(crate) load_percent: f64,
    /// Of one core, by programs that are none of ours.
    pub(crate) foreign_percent: f64,
}

/// Watches a run.
pub(crate) struct Watch {
    tested: Vec<u32>,
    ours: Vec<u32>,
    began: Instant,
    cpu: Duration,
    /// Ticks of the tested, of all of ours, and of everybody.
    ticks: [u64; 3],
}

impl Watch {
    /// `tested` are measured; `ours` are all that this program has started, these included.
    pub(crate) fn begin(tested: Vec<u32>, ours: Vec<u32>) -> Self {
        let (cpu, ticks) = (cpu(&tested), ticks(&tested, &ours));
        Self { tested, ours, began: now(), cpu, ticks }
    }

    pub(crate) fn end(self) -> Used {
        let took = self.began.elapsed();
        let after = ticks(&self.tested, &self.ours);
        let [tested, ours, all] =
            std::array::from_fn(|i| TICK * u32::try_from(after[i] - self.ticks[i]).expect("small"));
        let percent = |part: Duration| 100.0 * part.as_secs_f64() / took.as_secs_f64();
        Used {
            cpu: cpu(&self.tested) - self.cpu,
            memory: self.tested.iter().map(|pid| memory(*pid)).sum(),
            load_percent: percent(ours.saturating_sub(tested)),
            foreign_percent: percent(all.saturating_sub(ours)),
        }
    }
}

/// Time on a processor, of all threads that live.
fn cpu(pids: &[u32]) -> Duration {
    let of_thread = |path: &Path| {
        let text = fs::read_to_string(path.join("schedstat")).unwrap_or_default();
        text.split(' ').next().and_then(|nanos| nanos.parse().ok()).unwrap_or(0)
    };
    let threads = pids.iter().flat_map(|pid| fs::read_dir(format!("/proc/{pid}/task")).ok());
    let nanos = threads.flatten().flatten().map(|thread| of_thread(&thread.path())).sum();
    Duration::from_nanos(nanos)
}

/// Resident bytes.
pub(crate) fn memory(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kilobytes.unwrap_or(0) << 10
}

fn ticks(tested: &[u32], ours: &[u32]) -> [u64; 3] {
    let own = numbers(&after_name("/proc/self/stat"));
    // Its own, and those of the children that have ended: the load.
    let own: u64 = own[11..15].iter().sum();
    let of = |pids: &[u32]| pids.iter().map(|pid| of_process(*pid)).sum::<u64>();
    [of(tested), of(ours) + own, everybody()]
}

fn of_process(pid: u32) -> u64 {
    let numbers = numbers(&after_name(&format!("/proc/{pid}/stat")));
    numbers.get(11..13).map_or(0, |times| times.iter().sum())
}

/// The fields behind the program's name, which may hold anything; the first of them is a letter, read as 0.
fn after_name(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.rsplit_once(") ").map(|(_, rest)| rest.to_owned()).unwrap_or_default()
}

/// User, nice, system and stolen time of all cores; interrupts are nobody's.
fn everybody() -> u64 {
    let text = fs::read_to_string("/proc/stat").expect("Linux");
    let line = numbers(text.lines().next().expect("its first line").trim_start_matches("cpu"));
    [0, 1, 2, 7].iter().map(|i| line[*i]).sum()
}

fn numbers(text: &str) -> Vec<u64> {
    text.split_whitespace().map(|word| word.parse().unwrap_or(0)).collect()
}
