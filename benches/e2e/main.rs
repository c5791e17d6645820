//! Requests through the gate beside bare pingora, nginx, HAProxy and Caddy, in one run: `make bench`, on a
//! quiet machine. `docs/performance.md` says what is measured and how; `--help` how to choose.
//!
//! Upstream and load are on the first core, what is measured on the second, unless it has several threads. What this program starts it
//! pins, watches and stops; it is itself started again as bare pingora and as the load of fixed rate.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser, ValueEnum};

mod allocator;
#[path = "../support/bare.rs"]
mod bare;
mod bare_server;
mod callers;
mod configs;
mod load;
mod machine;
mod open_loop;
mod plan;
mod process;
mod report;
mod stand;
mod start;

use plan::{Arm, Plan, Scenario};
use report::Report;
use stand::Stand;

/// What a child process is: in the environment, since cargo has arguments of its own.
const CHILD: &str = "BENCH_CHILD";

/// End-to-end benchmark: tables on standard output, in target/bench.md and, with all runs, target/bench.json.
#[derive(Debug, Parser)]
struct Options {
    /// Rounds; each runs every arm of every scenario once.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each run.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Only these arms (and bare pingora, which the others are compared with).
    #[arg(long, value_delimiter = ',')]
    arms: Vec<Arm>,
    /// Only these scenarios.
    #[arg(long, value_delimiter = ',')]
    scenarios: Vec<Scenario>,
    /// Requests a second of fixed load, instead of half of what arms took before.
    #[arg(long, value_delimiter = ',')]
    rates: Vec<u64>,
    /// Runs are repeated while other programs use more of one core than that, in percent.
    #[arg(long, default_value_t = 6.0)]
    foreign: f64,
    /// Threads of each proxy; more than one share all cores with load and upstream (nginx, which has processes, is
    /// left out then).
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..))]
    threads: u8,
    /// Another build of the gate, for the arm `otpgate-other`.
    #[arg(long, value_name = "PROGRAM")]
    other: Option<PathBuf>,
    /// One round of one second, nothing repeated: shows that all works, measures nothing.
    #[arg(long)]
    quick: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    fn plan(self) -> Plan {
        if self.arms.contains(&Arm::OtpgateOther) && self.other.is_none() {
            let why = "the arm `otpgate-other` needs `--other PROGRAM`\n";
            Self::command().error(ErrorKind::MissingRequiredArgument, why).exit();
        }
        let mut arms: BTreeSet<_> = match self.arms[..] {
            [] => Arm::value_variants().iter().copied().collect(),
            _ => self.arms.into_iter().chain([Arm::Bare]).collect(),
        };
        if self.other.is_none() {
            arms.remove(&Arm::OtpgateOther);
        }
        if self.threads > 1 {
            arms.retain(|arm| !matches!(arm, Arm::Nginx | Arm::NginxAuth));
        }
        let arms = arms.into_iter().collect();
        let scenarios = match self.scenarios[..] {
            [] => Scenario::value_variants().to_vec(),
            _ => self.scenarios,
        };
        let (rounds, seconds, tries) =
            if self.quick { (1, 1, 1) } else { (self.rounds, self.seconds, plan::TRIES) };
        let (other, rates, foreign) = (self.other, self.rates, self.foreign);
        let threads = self.threads.into();
        Plan { other, threads, rounds, seconds, tries, arms, scenarios, rates, foreign }
    }
}

fn main() -> ExitCode {
    match std::env::var(CHILD).as_deref() {
        Ok(bare_server::CHILD) => bare_server::run(),
        Ok(open_loop::CHILD) => open_loop::run(),
        _ => measure(Options::parse().plan()),
    }
    ExitCode::SUCCESS
}

fn measure(plan: Plan) {
    let facts = machine::facts(plan.threads);
    let stand = Stand::start(&plan);
    let mut report = Report::new(facts, &plan);
    for (round, scenario, arm) in plan.runs() {
        plan::run(&plan, &stand, &mut report, round, scenario, arm);
    }
    if plan.scenarios.contains(&Scenario::FixedLoad) {
        // With this process, for the load that it starts.
        let all = [stand.all(), vec![std::process::id()]].concat();
        report.note_precedence(process::prefer(&all, true));
        for rate in plan.rates(&report) {
            for (round, arm) in plan.turns(Scenario::FixedLoad) {
                plan::run_at(&plan, &stand, &mut report, round, arm, rate);
            }
        }
        process::prefer(&all, false);
    }
    if plan.scenarios.contains(&Scenario::Start) {
        report.add_starts(start::measure(&stand, plan.rounds));
    }
    println!("{}", report.markdown());
}
