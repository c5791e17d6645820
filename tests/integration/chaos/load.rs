//! Steady load: calls at a fixed rate over a few keep-alive connections to every gate, in threads of
//! their own, so that nothing that a test waits for slows them down.

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use otpgate::clock::{Clock as _, SystemClock};
use otpgate::entry::{Entry, EntryId, Principal, Seed};
use otpgate::otp::{Generator, TokenParams};

use super::now;
use crate::harness::{Gate, PATIENCE, address};
use crate::redis_server::wait_until;

/// What a caller should get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// The right token of an entry: 200, or 503 while the store is away.
    Living,
    /// The right token of an entry that is to go: never 200 once that must be in force.
    Revoked,
    /// A name that no entry has: never 200.
    Unknown,
    /// A wrong token of a living entry: never 200.
    Wrong,
}

/// Somebody who calls.
pub(super) struct Caller {
    pub(super) kind: Kind,
    pub(super) principal: Principal,
    seed: Seed,
    generator: Generator,
    /// When its entry went, and for how long it may be accepted after that.
    gone: OnceLock<(Instant, Duration)>,
}

impl Caller {
    pub(super) fn new(kind: Kind, principal: Principal, seed: &Seed) -> Arc<Self> {
        let generator = Generator::new(seed, TokenParams::default());
        let seed = seed.clone();
        Arc::new(Self { kind, principal, seed, generator, gone: OnceLock::new() })
    }

    /// With the right token of an entry.
    pub(super) fn of(kind: Kind, entry: &Entry) -> Arc<Self> {
        Self::new(kind, entry.principal.clone(), &entry.seed)
    }

    /// Its entry, to be made once more.
    pub(super) fn entry(&self, id: EntryId) -> Entry {
        Entry::new(id, self.principal.clone(), self.seed.clone(), 1_700_000_000)
    }

    /// Nobody may accept it later than `bound` after `gone`.
    pub(super) fn must_be_refused(&self, gone: Instant, bound: Duration) {
        assert_eq!(self.kind, Kind::Revoked);
        self.gone.set((gone, bound)).expect("an entry goes once");
    }

    fn token(&self) -> String {
        let unix = SystemClock.now().unix;
        if self.kind != Kind::Wrong {
            return self.generator.token_at(unix);
        }
        let step = |n: i64| self.generator.token_at(unix.saturating_add_signed(n * 30));
        let good: Vec<_> = (-2..=2).map(step).collect();
        (0..).map(|n| format!("{n:06}")).find(|token| !good.contains(token)).expect("one is wrong")
    }

    /// Whether that is what a gate answers that knows of the caller all that there is to know now.
    pub(super) fn is_served(&self, status: u16) -> bool {
        (status == 200) != self.is_refused(now())
    }

    /// Whether 200 for a call that was sent then is a wrong answer.
    fn is_refused(&self, sent: Instant) -> bool {
        match self.kind {
            Kind::Living => false,
            Kind::Revoked => self.gone.get().is_some_and(|(gone, bound)| sent > *gone + *bound),
            Kind::Unknown | Kind::Wrong => true,
        }
    }
}

/// A keep-alive connection to a gate's proxy.
pub(super) struct Line {
    address: SocketAddr,
    stream: Option<BufReader<TcpStream>>,
}

impl Line {
    pub(super) fn to(gate: &Gate) -> Self {
        Self { address: address(&gate.proxy), stream: None }
    }

    /// The status that a call gets; 0 if it gets none.
    pub(super) fn call(&mut self, caller: &Caller) -> u16 {
        let status = self.try_call(caller);
        if status.is_err() {
            self.stream = None;
        }
        status.unwrap_or(0)
    }

    fn try_call(&mut self, caller: &Caller) -> io::Result<u16> {
        if self.stream.is_none() {
            let stream = TcpStream::connect_timeout(&self.address, PATIENCE)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            self.stream = Some(BufReader::new(stream));
        }
        let stream = self.stream.as_mut().expect("just connected");
        let request = format!(
            "GET / HTTP/1.1\r\nHost: gate\r\nX-Auth-Name: {}\r\nX-Auth-Realm: {}\r\n\
             X-Auth-Token: {}\r\n\r\n",
            caller.principal.name,
            caller.principal.realm,
            caller.token()
        );
        stream.get_mut().write_all(request.as_bytes())?;
        read_answer(stream)
    }
}

/// Reads an answer whose length its head tells, and gives its status.
fn read_answer(stream: &mut BufReader<TcpStream>) -> io::Result<u16> {
    let odd = || io::Error::from(io::ErrorKind::InvalidData);
    let (mut status, mut length) = (None, None);
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        match line.trim_end() {
            "" if line.is_empty() => return Err(io::ErrorKind::UnexpectedEof.into()),
            "" => break,
            head if status.is_none() => {
                status = head.split(' ').nth(1).and_then(|word| word.parse().ok());
            }
            header => {
                let (name, value) = header.split_once(':').ok_or_else(odd)?;
                if name.eq_ignore_ascii_case("content-length") {
                    length = value.trim().parse().ok();
                }
            }
        }
    }
    let mut body = vec![0; length.ok_or_else(odd)?];
    stream.read_exact(&mut body)?;
    status.ok_or_else(odd)
}

/// How much load.
#[derive(Clone, Copy)]
pub(super) struct Pace {
    /// Connections to every gate.
    pub(super) connections: usize,
    /// Calls a second on every one of them.
    pub(super) rate: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self { connections: 4, rate: 50 }
    }
}

/// What became of one call.
#[derive(Clone, Copy)]
struct Sample {
    sent: Instant,
    answered: Instant,
    gate: usize,
    caller: usize,
    status: u16,
}

/// Calls under way.
pub(super) struct Load {
    started: Instant,
    callers: Arc<[Arc<Caller>]>,
    samples: Arc<Mutex<Vec<Sample>>>,
    is_over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    gates: usize,
}

impl Load {
    /// Calls every gate: each second call is a living entry's, the others take turns.
    pub(super) fn start(gates: &[&Gate], callers: Vec<Arc<Caller>>, pace: Pace) -> Self {
        let mut load = Self {
            started: now(),
            callers: callers.into(),
            samples: Arc::default(),
            is_over: Arc::default(),
            threads: Vec::new(),
            gates: gates.len(),
        };
        let turns: Arc<[usize]> = turns(&load.callers).into();
        for (gate, target) in gates.iter().enumerate() {
            for connection in 0..pace.connections {
                let callers = load.callers.clone();
                let (samples, is_over) = (load.samples.clone(), load.is_over.clone());
                let mut line = Line::to(target);
                let mut turn = connection * turns.len() / pace.connections..;
                let turns = turns.clone();
                let period = Duration::from_secs(1) / pace.rate;
                // Not all connections at the same instants.
                let mut next = load.started + period * connection as u32 / pace.connections as u32;
                load.threads.push(std::thread::spawn(move || {
                    while !is_over.load(Ordering::Relaxed) {
                        std::thread::sleep(next.saturating_duration_since(now()));
                        next = (next + period).max(now());
                        let caller = turns[turn.next().expect("endless") % turns.len()];
                        let sent = now();
                        let status = line.call(&callers[caller]);
                        let sample = Sample { sent, answered: now(), gate, caller, status };
                        samples.lock().expect("no panic").push(sample);
                    }
                }));
            }
        }
        load
    }

    /// Waits until every gate has answered a living entry's call that was sent after `since` with
    /// `status`; how long after `since` each did.
    pub(super) fn each_gate_answers(&self, status: u16, since: Instant) -> Vec<Duration> {
        let mut first = vec![None; self.gates];
        let mut looked = 0;
        wait_until(&format!("all gates answer {status}"), || {
            let samples = self.samples.lock().expect("no panic");
            for sample in &samples[std::mem::replace(&mut looked, samples.len())..] {
                let is_it = self.callers[sample.caller].kind == Kind::Living
                    && sample.status == status
                    && sample.sent >= since;
                if is_it {
                    first[sample.gate].get_or_insert(sample.answered - since);
                }
            }
            first.iter().all(Option::is_some)
        });
        first.into_iter().flatten().collect()
    }

    /// Waits until no gate accepts `caller` any more.
    pub(super) fn each_gate_refuses(&self, caller: &Arc<Caller>) {
        let wanted =
            self.callers.iter().position(|one| Arc::ptr_eq(one, caller)).expect("it calls");
        let since = now();
        wait_until("all gates refuse an entry", || {
            let samples = self.samples.lock().expect("no panic");
            let answers = samples.iter().rev().take_while(|s| s.sent >= since);
            let refusals = answers.filter(|s| s.caller == wanted && s.status != 200);
            refusals.map(|s| s.gate).collect::<std::collections::BTreeSet<_>>().len() == self.gates
        });
    }

    /// Ends it, a little later.
    pub(super) fn stop(self) -> Seen {
        let answers = || self.samples.lock().expect("no panic").len();
        let enough = answers() + 50 * self.gates;
        wait_until("there is some load", || answers() >= enough);
        self.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("no panic");
        }
        let samples = std::mem::take(&mut *self.samples.lock().expect("no panic"));
        Seen { started: self.started, callers: self.callers, samples }
    }
}

/// Every second turn is a living caller's.
fn turns(callers: &[Arc<Caller>]) -> Vec<usize> {
    let of = |living: bool| {
        let is = move |i: &usize| (callers[*i].kind == Kind::Living) == living;
        (0..callers.len()).filter(is).collect::<Vec<_>>()
    };
    let (living, others) = (of(true), of(false));
    assert!(!living.is_empty(), "somebody must live");
    let count = others.len().max(living.len()).max(1);
    // As many turns as let everybody have one.
    (0..count)
        .flat_map(|i| {
            let other = others.get(i % others.len().max(1)).copied();
            [Some(living[i % living.len()]), other]
        })
        .flatten()
        .collect()
}

/// What callers saw.
pub(super) struct Seen {
    started: Instant,
    callers: Arc<[Arc<Caller>]>,
    samples: Vec<Sample>,
}

impl Seen {
    fn of(&self, kind: Kind) -> impl Iterator<Item = &Sample> {
        self.samples.iter().filter(move |sample| self.callers[sample.caller].kind == kind)
    }

    /// Calls that were accepted though they proved nobody.
    pub(super) fn wrongly_accepted(&self) -> usize {
        let wrong = |s: &&Sample| s.status == 200 && self.callers[s.caller].is_refused(s.sent);
        self.samples.iter().filter(wrong).count()
    }

    /// For how long an entry's token was accepted at most after it had gone, if any was.
    pub(super) fn accepted_for(&self) -> Option<Duration> {
        let accepted = self.of(Kind::Revoked).filter(|s| s.status == 200);
        let late = |s: &Sample| {
            let (gone, _) = self.callers[s.caller].gone.get()?;
            s.sent.checked_duration_since(*gone)
        };
        accepted.filter_map(late).max()
    }

    /// Fails the test if anything was answered wrongly.
    pub(super) fn check(&self) {
        let odd: Vec<_> = self
            .samples
            .iter()
            .filter(|s| {
                let caller = &self.callers[s.caller];
                let wrong = s.status == 200 && caller.is_refused(s.sent);
                let lost = caller.kind == Kind::Living && s.status == 401;
                wrong || lost || ![200, 401, 503].contains(&s.status)
            })
            .map(|s| {
                let caller = &self.callers[s.caller];
                format!(
                    "{} ms: gate {} answered {} with {}",
                    (s.sent - self.started).as_millis(),
                    s.gate,
                    caller.principal.name,
                    s.status
                )
            })
            .collect();
        let first = &odd[..odd.len().min(20)];
        assert!(odd.is_empty(), "{} odd answers: {first:#?}\n{}", odd.len(), self.timeline());
    }

    /// What callers of living entries noticed, in words.
    pub(super) fn noticed(&self) -> String {
        match self.of(Kind::Living).filter(|s| s.status != 200).count() {
            0 => "not noticed".to_owned(),
            failed => format!("noticed by {failed} calls"),
        }
    }

    /// Fails the test if a living entry's caller noticed anything.
    pub(super) fn nobody_noticed(&self) {
        assert!(self.of(Kind::Living).all(|s| s.status == 200), "{}", self.timeline());
    }

    /// Statuses counted, by kind of caller.
    pub(super) fn told(&self) -> String {
        let counts = |kind| {
            let mut counts: BTreeMap<u16, usize> = BTreeMap::new();
            for sample in self.of(kind) {
                *counts.entry(sample.status).or_default() += 1;
            }
            counts.iter().map(|(status, n)| format!("{n}×{status}")).collect::<Vec<_>>().join(" ")
        };
        let kinds = [
            ("living", Kind::Living),
            ("revoked", Kind::Revoked),
            ("unknown", Kind::Unknown),
            ("wrong", Kind::Wrong),
        ];
        let told = kinds.map(|(name, kind)| (name, counts(kind)));
        let told = told.iter().filter(|(_, counts)| !counts.is_empty());
        told.map(|(name, counts)| format!("{name} {counts}")).collect::<Vec<_>>().join("; ")
    }

    /// Statuses of every tenth of a second, by kind of caller.
    fn timeline(&self) -> String {
        let mut tenths: BTreeMap<u128, BTreeMap<(Kind, u16), usize>> = BTreeMap::new();
        for sample in &self.samples {
            let tenth = (sample.sent - self.started).as_millis() / 100;
            let kind = self.callers[sample.caller].kind;
            *tenths.entry(tenth).or_default().entry((kind, sample.status)).or_default() += 1;
        }
        let mut lines: Vec<String> = Vec::new();
        let mut last = None;
        for (tenth, counts) in &tenths {
            let statuses: Vec<_> = counts.keys().copied().collect();
            if last.replace(statuses.clone()) != Some(statuses) {
                lines.push(format!("{}.{} s: {counts:?}", tenth / 10, tenth % 10));
            }
        }
        lines.join("\n")
    }
}
