//! What is run, in which order, and each single run.

use std::path::PathBuf;

use clap::ValueEnum;
use serde::Serialize;

use crate::load::{self, Load};
use crate::process::Watch;
use crate::report::{Report, Sample};
use crate::stand::Stand;

/// Runs of one kind, at most, until other programs leave the machine alone.
pub(crate) const TRIES: usize = 5;
/// Seconds before the first round, for each arm, that count for nothing.
const WARM_UP: u64 = 1;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Arm {
    /// The upstream, without any proxy: what load and upstream take themselves.
    Direct,
    /// pingora's own server that forwards everything.
    Bare,
    /// The same with the runtime that each worker of the gate has: one thread, whose work nobody steals.
    BareWithoutStealing,
    /// `bare` with the gate's allocator.
    BareWithOurAllocator,
    /// The same as `bare` on the gate's listener.
    BareOnOurListener,
    /// That with the gate's allocator, and with all that any gate asks of pingora: headers, time-outs.
    BareWithOurDuties,
    /// The gate, right tokens in headers.
    Otpgate,
    /// Another build of the gate (`--other`).
    OtpgateOther,
    /// The gate with a line for every request.
    OtpgateLog,
    /// The gate, wrong tokens.
    OtpgateWrong,
    /// nginx, `proxy_pass`.
    Nginx,
    /// nginx that asks the gate (`auth_request`).
    NginxAuth,
    /// Caddy that asks the gate (`forward_auth`).
    CaddyAuth,
    /// HAProxy.
    Haproxy,
    /// The gate's API: `POST /verify`.
    Verify,
}

impl Arm {
    /// Its name, as in arguments.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().expect("none is skipped").get_name().to_owned()
    }

    fn takes(self, scenario: Scenario) -> bool {
        use Scenario::{Bodies, FixedLoad, Http2, KeepAlive, NewConnections, Start};
        match (self, scenario) {
            (_, Start) => false,
            (Self::OtpgateLog | Self::OtpgateWrong, scenario) => scenario == KeepAlive,
            (Self::BareWithoutStealing | Self::BareWithOurAllocator, scenario) => {
                matches!(scenario, KeepAlive | Http2)
            }
            (Self::Verify, scenario) => matches!(scenario, KeepAlive | FixedLoad),
            (Self::Direct, scenario) => {
                matches!(scenario, KeepAlive | FixedLoad | NewConnections | Bodies)
            }
            _ => true,
        }
    }
}

/// How it is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Scenario {
    /// HTTP/1.1, 32 connections that are kept alive.
    KeepAlive,
    /// HTTP/1.1, a connection for each request.
    NewConnections,
    /// HTTP/2 without TLS, 8 connections of 4 streams.
    Http2,
    /// HTTP/1.1 over TLS, 32 connections that are kept alive.
    Tls,
    /// Answers of 100 kB, otherwise as the first.
    Bodies,
    /// So many requests a second, on a constant schedule, as the first.
    FixedLoad,
    /// From the start of the process to its first answer.
    Start,
}

/// All that is to be done.
#[derive(Debug, Serialize)]
pub(crate) struct Plan {
    /// Another build of the gate.
    pub(crate) other: Option<PathBuf>,
    /// Of each program that is measured.
    pub(crate) threads: usize,
    pub(crate) rounds: usize,
    pub(crate) seconds: u64,
    pub(crate) tries: usize,
    pub(crate) arms: Vec<Arm>,
    pub(crate) scenarios: Vec<Scenario>,
    pub(crate) rates: Vec<u64>,
    pub(crate) foreign: f64,
}

impl Plan {
    /// The runs without a given rate: all scenarios of one round, then the next, so that what changes on the
    /// machine meets all arms.
    pub(crate) fn runs(&self) -> Vec<(usize, Scenario, Arm)> {
        let closed = |s: &Scenario| !matches!(s, Scenario::FixedLoad | Scenario::Start);
        let turns = |s: Scenario| self.turns(s).into_iter().map(move |(n, arm)| (n, s, arm));
        let mut runs: Vec<_> =
            self.scenarios.iter().copied().filter(closed).flat_map(turns).collect();
        runs.sort_by_key(|(round, ..)| *round);
        runs
    }

    /// The arms of a scenario, round after round, in alternating order.
    pub(crate) fn turns(&self, scenario: Scenario) -> Vec<(usize, Arm)> {
        let arms: Vec<_> = self.arms.iter().copied().filter(|arm| arm.takes(scenario)).collect();
        let of_round = |round| {
            let mut arms = arms.clone();
            if round % 2 == 1 {
                arms.reverse();
            }
            arms.into_iter().map(move |arm| (round, arm))
        };
        (0..self.rounds).flat_map(of_round).collect()
    }

    /// Rates of fixed load: half of what the gate took, or else bare pingora, and of what the slowest took that
    /// forwards.
    pub(crate) fn rates(&self, report: &Report) -> Vec<u64> {
        if !self.rates.is_empty() {
            return self.rates.clone();
        }
        let rate = |arm: &Arm| report.rate(Scenario::KeepAlive, *arm);
        let forwards = |arm: &&Arm| !matches!(arm, Arm::Direct | Arm::Verify | Arm::OtpgateWrong);
        let slowest = self.arms.iter().filter(forwards).filter_map(rate).min_by(f64::total_cmp);
        let gate = rate(&Arm::Otpgate).or_else(|| rate(&Arm::Bare));
        let rates = [gate, slowest].into_iter().flatten();
        let mut rates: Vec<_> = rates.map(|rate| (rate / 2.0) as u64).collect();
        rates.dedup();
        assert!(!rates.is_empty(), "fixed load needs `--rates` or the scenario `keep-alive`");
        rates
    }
}

/// Runs `arm` as fast as it goes.
pub(crate) fn run(
    plan: &Plan,
    stand: &Stand,
    report: &mut Report,
    round: usize,
    scenario: Scenario,
    arm: Arm,
) {
    let load = |seconds| match scenario {
        Scenario::Http2 => load::h2load(stand, arm, seconds),
        _ => load::wrk(stand, arm, scenario, seconds),
    };
    if round == 0 {
        load(WARM_UP.min(plan.seconds));
    }
    let sample = undisturbed(plan, stand, arm, || load(plan.seconds));
    report.add(round, scenario, arm, None, sample);
}

/// Runs `arm` at `rate`, if it takes that at all.
pub(crate) fn run_at(
    plan: &Plan,
    stand: &Stand,
    report: &mut Report,
    round: usize,
    arm: Arm,
    rate: u64,
) {
    let most = report.rate(Scenario::KeepAlive, arm).unwrap_or(f64::INFINITY);
    if rate as f64 > 0.9 * most {
        return;
    }
    let sample = undisturbed(plan, stand, arm, || load::at_rate(stand, arm, rate, plan.seconds));
    report.add(round, Scenario::FixedLoad, arm, Some(rate), sample);
}

/// Repeats a run that other programs disturbed, so often at most.
fn undisturbed(plan: &Plan, stand: &Stand, arm: Arm, run: impl Fn() -> Load) -> Sample {
    let mut sample = None;
    for _ in 0..plan.tries {
        let watch = Watch::begin(stand.processes(arm), stand.all());
        let load = run();
        let used = watch.end();
        let taken = Sample::new(&load, &used);
        let is_quiet = used.foreign_percent < plan.foreign;
        sample = Some(taken);
        if is_quiet {
            break;
        }
    }
    sample.expect("it ran")
}
