//! What came out: Markdown tables and JSON.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use clap::ValueEnum as _;
use serde::Serialize;

use crate::load::Load;
use crate::machine::{Fact, Facts};
use crate::plan::{Arm, Plan, Scenario};
use crate::process::Used;
use crate::start::Start;

/// Of one run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Sample {
    /// Requests a second.
    rate: f64,
    errors: u64,
    latencies: Option<[f64; 3]>,
    /// Seconds of 100,000 requests.
    cpu: f64,
    memory: u64,
    load_percent: f64,
    foreign_percent: f64,
}

impl Sample {
    pub(crate) fn new(load: &Load, used: &Used) -> Self {
        Self {
            rate: load.requests as f64 / load.seconds,
            errors: load.errors,
            latencies: load.latencies,
            cpu: used.cpu.as_secs_f64() * 1e5 / load.requests as f64,
            memory: used.memory,
            load_percent: used.load_percent,
            foreign_percent: used.foreign_percent,
        }
    }

    fn latency(&self, which: usize) -> f64 {
        self.latencies.map_or(f64::NAN, |latencies| latencies[which])
    }
}

#[derive(Serialize)]
struct Run {
    round: usize,
    scenario: Scenario,
    arm: Arm,
    /// Requests a second that were to be sent.
    fixed: Option<u64>,
    #[serde(flatten)]
    sample: Sample,
}

/// All runs.
#[derive(Serialize)]
pub(crate) struct Report<'a> {
    facts: Facts,
    plan: &'a Plan,
    runs: Vec<Run>,
    starts: Vec<Start>,
}

impl<'a> Report<'a> {
    pub(crate) fn new(facts: Facts, plan: &'a Plan) -> Self {
        Self { facts, plan, runs: Vec::new(), starts: Vec::new() }
    }

    pub(crate) fn add(
        &mut self,
        round: usize,
        scenario: Scenario,
        arm: Arm,
        fixed: Option<u64>,
        sample: Sample,
    ) {
        eprintln!(
            "round {round} {} {}: {:.0}/s, {:.2} s CPU of 100,000, others used {:.1} %",
            name(scenario),
            arm.name(),
            sample.rate,
            sample.cpu,
            sample.foreign_percent
        );
        self.runs.push(Run { round, scenario, arm, fixed, sample });
        // Now: a run that fails later loses nothing.
        self.save();
    }

    /// Whether processes had precedence on their cores under fixed load.
    pub(crate) fn note_precedence(&mut self, had: bool) {
        let is = match had {
            true => "all processes of the benchmark in the real-time class (SCHED_FIFO)",
            false => "in the usual class, since chrt may not: tails are the scheduler's",
        };
        self.facts.push(Fact { what: "fixed load", is: is.to_owned() });
    }

    pub(crate) fn add_starts(&mut self, starts: Vec<Start>) {
        self.starts = starts;
        self.save();
    }

    /// The median rate.
    pub(crate) fn rate(&self, scenario: Scenario, arm: Arm) -> Option<f64> {
        self.median((scenario, None), arm, |sample| sample.rate)
    }

    /// Writes it to target/bench.md and, with all runs, target/bench.json.
    fn save(&self) {
        let text = self.markdown();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
        std::fs::create_dir_all(&folder).expect("target");
        let json = serde_json::to_string_pretty(self).expect("JSON");
        std::fs::write(folder.join("bench.md"), text).expect("target/bench.md");
        std::fs::write(folder.join("bench.json"), json).expect("target/bench.json");
    }

    /// Tables of what there is so far.
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::from("| | |\n|---|---|\n");
        for fact in &self.facts {
            line(&mut text, format_args!("| {} | {} |", fact.what, fact.is));
        }
        let Plan { rounds, seconds, foreign, .. } = self.plan;
        line(
            &mut text,
            format_args!(
                "| runs | {rounds} rounds of {seconds} s, medians (least to most); {} of {} runs while other \
                 programs used {foreign} % of a core or more |",
                self.runs.iter().filter(|run| run.sample.foreign_percent >= *foreign).count(),
                self.runs.len()
            ),
        );
        let keys: BTreeSet<_> = self.runs.iter().map(|run| (run.scenario, run.fixed)).collect();
        for key in keys {
            match key.1 {
                None => self.closed_loop(&mut text, key),
                Some(rate) => self.open_loop(&mut text, key, rate),
            }
        }
        self.start_table(&mut text);
        self.goals(&mut text);
        text
    }

    fn closed_loop(&self, text: &mut String, key: Key) {
        line(
            text,
            format_args!(
                "\n### {}\n\n| arm | requests/s | to bare | CPU s per 100,000 | memory, MB | load core | errors |\n\
                 |---|---|---|---|---|---|---|",
                title(key.0)
            ),
        );
        for arm in self.arms(key) {
            let ratio = self.ratio(key, arm, Arm::Bare, |sample| sample.rate);
            line(
                text,
                format_args!(
                    "| {} | {} | {} | {} | {:.1} | {:.0} % | {} |",
                    arm.name(),
                    self.spread(key, arm, 0, |sample| sample.rate),
                    ratio.map_or("".to_owned(), |ratio| format!("{ratio:.3}")),
                    self.spread(key, arm, 2, |sample| sample.cpu),
                    self.value(key, arm, |sample| sample.memory as f64 / 1e6),
                    self.value(key, arm, |sample| sample.load_percent),
                    self.errors(key, arm),
                ),
            );
        }
    }

    fn open_loop(&self, text: &mut String, key: Key, rate: u64) {
        line(
            text,
            format_args!(
                "\n### {rate} requests a second\n\n| arm | p50, µs | p99, µs | p99.9, µs | p99 beyond bare | \
                 CPU s per 100,000 | errors |\n|---|---|---|---|---|---|---|"
            ),
        );
        for arm in self.arms(key) {
            let [p50, p99, p999] =
                [0, 1, 2].map(|i| self.spread(key, arm, 0, move |s| s.latency(i)));
            let beyond = self.pairs(key, arm, Arm::Bare, |a, b| a.latency(1) - b.latency(1));
            line(
                text,
                format_args!(
                    "| {} | {p50} | {p99} | {p999} | {} | {} | {} |",
                    arm.name(),
                    middle(beyond).map_or("".to_owned(), |micros| format!("{micros:+.0}")),
                    self.spread(key, arm, 2, |sample| sample.cpu),
                    self.errors(key, arm),
                ),
            );
        }
    }

    fn start_table(&self, text: &mut String) {
        if self.starts.is_empty() {
            return;
        }
        text.push_str(
            "\n### Start\n\n| what | to the first answer, ms | memory then, MB |\n|---|---|---|\n",
        );
        for part in ["bare", "otpgate"] {
            let of = |value: fn(&Start) -> f64| {
                self.starts.iter().filter(|start| start.part == part).map(value).collect::<Vec<_>>()
            };
            let times = spread(of(|start| start.milliseconds), 1);
            let memory = spread(of(|start| start.memory as f64 / 1e6), 1);
            line(text, format_args!("| {part} | {times} | {memory} |"));
        }
    }

    /// The goals, as far as their arms ran.
    fn goals(&self, text: &mut String) {
        let (keep_alive, http2) = ((Scenario::KeepAlive, None), (Scenario::Http2, None));
        let (gate, bare) = (Arm::Otpgate, Arm::Bare);
        let rate = |key, other| self.ratio(key, gate, other, |sample| sample.rate);
        // Seconds of 100,000 requests are tens of microseconds of one.
        let added = self.pairs(keep_alive, gate, bare, |a, b| (a.cpu - b.cpu) * 10.0);
        let wrong = self.ratio(keep_alive, Arm::OtpgateWrong, gate, |sample| sample.cpu);
        let fixed = self.runs.iter().filter_map(|run| run.fixed).max();
        let p99 = fixed.map(|rate| (Scenario::FixedLoad, Some(rate)));
        let p99 = p99.map(|key| self.pairs(key, gate, bare, |a, b| a.latency(1) - b.latency(1)));
        let starts = self.starts.iter().filter(|start| start.part == "otpgate");
        let start = middle(starts.map(|start| start.milliseconds).collect());
        let memory = self.median(keep_alive, gate, |sample| sample.memory as f64 / 1e6);
        let goals = [
            ("otpgate / bare pingora, HTTP/1.1 keep-alive", "≥ 0.97", rate(keep_alive, bare), 3),
            ("otpgate / bare pingora, HTTP/2", "≥ 0.97", rate(http2, bare), 3),
            ("CPU of a request beyond bare pingora, µs", "≤ 1", middle(added), 2),
            ("CPU of a wrong token / of a right one", "≤ 1", wrong, 2),
            ("otpgate / nginx + auth_request", "≥ 1.5", rate(keep_alive, Arm::NginxAuth), 2),
            ("otpgate / nginx proxy_pass", "≥ 0.75", rate(keep_alive, Arm::Nginx), 2),
            ("otpgate / Caddy + forward_auth", "≥ 5", rate(keep_alive, Arm::CaddyAuth), 2),
            (
                "p99 beyond bare pingora at the higher fixed rate, µs",
                "≤ 50",
                p99.and_then(middle),
                0,
            ),
            ("/verify, requests/s", "", self.rate(Scenario::KeepAlive, Arm::Verify), 0),
            ("memory under load, MB", "≤ 16", memory, 1),
            ("start to first answer, ms", "≤ 50", start, 1),
        ];
        text.push_str("\n### Goals\n\n| what | goal | measured |\n|---|---|---|\n");
        for (what, goal, measured, digits) in goals {
            if let Some(measured) = measured {
                line(text, format_args!("| {what} | {goal} | {measured:.digits$} |"));
            }
        }
    }

    fn arms(&self, key: Key) -> BTreeSet<Arm> {
        let of_key = self.runs.iter().filter(|run| (run.scenario, run.fixed) == key);
        of_key.map(|run| run.arm).collect()
    }

    /// With their rounds.
    fn samples(&self, key: Key, arm: Arm) -> Vec<(usize, &Sample)> {
        let runs = self.runs.iter();
        let of_key = runs.filter(|run| (run.scenario, run.fixed) == key && run.arm == arm);
        of_key.map(|run| (run.round, &run.sample)).collect()
    }

    fn errors(&self, key: Key, arm: Arm) -> u64 {
        self.samples(key, arm).iter().map(|(_, sample)| sample.errors).sum()
    }

    fn values(&self, key: Key, arm: Arm, value: impl Fn(&Sample) -> f64) -> Vec<f64> {
        self.samples(key, arm).into_iter().map(|(_, sample)| value(sample)).collect()
    }

    fn median(&self, key: Key, arm: Arm, value: impl Fn(&Sample) -> f64) -> Option<f64> {
        middle(self.values(key, arm, value))
    }

    fn value(&self, key: Key, arm: Arm, value: impl Fn(&Sample) -> f64) -> f64 {
        self.median(key, arm, value).unwrap_or(f64::NAN)
    }

    fn spread(&self, key: Key, arm: Arm, digits: usize, value: impl Fn(&Sample) -> f64) -> String {
        spread(self.values(key, arm, value), digits)
    }

    /// Compares two arms within each round.
    fn pairs(
        &self,
        key: Key,
        arm: Arm,
        other: Arm,
        compare: impl Fn(&Sample, &Sample) -> f64,
    ) -> Vec<f64> {
        let others = self.samples(key, other);
        let of_round =
            |round| others.iter().find(|(of, _)| *of == round).map(|(_, sample)| *sample);
        let samples = self.samples(key, arm).into_iter();
        samples.filter_map(|(round, sample)| Some(compare(sample, of_round(round)?))).collect()
    }

    /// The median of the rounds' ratios.
    fn ratio(&self, key: Key, arm: Arm, other: Arm, value: impl Fn(&Sample) -> f64) -> Option<f64> {
        middle(self.pairs(key, arm, other, |a, b| value(a) / value(b)))
    }
}

/// A table: a scenario, and its rate if that is fixed.
type Key = (Scenario, Option<u64>);

fn name(scenario: Scenario) -> String {
    scenario.to_possible_value().expect("none is skipped").get_name().to_owned()
}

fn title(scenario: Scenario) -> String {
    let help = scenario.to_possible_value().and_then(|value| value.get_help().cloned());
    help.map_or_else(|| name(scenario), |help| help.to_string())
}

fn line(text: &mut String, of: std::fmt::Arguments<'_>) {
    writeln!(text, "{of}").expect("strings take all");
}

/// The median.
fn middle(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.len().checked_sub(1)? / 2, values.len() / 2);
    Some((values[low] + values[high]) / 2.0)
}

/// The median and, of several, the least and the most.
fn spread(values: Vec<f64>, digits: usize) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let several = values.len() > 1;
    match middle(values) {
        None => String::new(),
        Some(value) if several => format!("{value:.digits$} ({least:.digits$}–{most:.digits$})"),
        Some(value) => format!("{value:.digits$}"),
    }
}
