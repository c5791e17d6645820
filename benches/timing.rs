//! Whether the time of a refusal tells why: run by hand, on a quiet machine. CONTRIBUTING.md says how.
//!
//! Starts the real program and sends refused claims of several kinds over one kept-alive loopback
//! connection, in random order. Each kind is compared with a known name's wrong token: medians, and Welch's t
//! of the times below their common 95th percentile, since rare delays are the machine's.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use otpgate::clock::{Clock as _, SystemClock};
use otpgate::entry::{Entry, Principal, Seed};
use otpgate::seal::Sealer;
use otpgate::store::Store;
use otpgate::store::sqlite::Sqlite;

/// Claims of each kind, unless the variable `N` says otherwise.
const CLAIMS: usize = 100_000;
/// Answered before times count: connections, caches and branch predictors settle.
const WARM_UP: usize = 2_000;
/// The part of the times, the fastest, that is compared.
const KEPT: f64 = 0.95;
/// Beyond this |t| two means differ (as in dudect, Reparaz et al. 2017).
const T_LIMIT: f64 = 4.5;

/// Name, token and what it stands for; names of one length, so that the bytes on the wire are as many.
const KINDS: [(&str, &str, &str); 4] = [
    ("known-one", "000000", "known name, wrong token"),
    ("absent-00", "000000", "unknown name"),
    ("disabled0", "000000", "disabled entry"),
    ("known-one", "00000x", "token of wrong form"),
];

fn main() {
    let claims = std::env::var("N").map_or(CLAIMS, |n| n.parse().expect("N is a number"));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let database = folder.path().join("otpgate.db");
    fill(&database);
    let gate = Gate::start(&database);
    println!("{claims} claims of each kind, nanoseconds");
    measure("proxy", &gate.proxy, claims, |name, token| {
        format!(
            "GET / HTTP/1.1\r\nHost: gate\r\nX-Auth-Name: {name}\r\nX-Auth-Realm: bench\r\nX-Auth-Token: {token}\r\n\r\n"
        )
    });
    measure("api", &gate.api, claims, |name, token| {
        let body =
            format!(r#"{{"auth_name":"{name}","auth_realm":"bench","auth_token":"{token}"}}"#);
        format!(
            "POST /verify HTTP/1.1\r\nHost: gate\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
    });
}

/// Makes the entries, unsealed: the directory holds them opened either way.
fn fill(database: &std::path::Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let store = Store::new(Arc::new(Sqlite::new(database)), Sealer::off());
        store.init().await.expect("a new store");
        for (name, enabled) in [("known-one", true), ("disabled0", false)] {
            let who = Principal::parse(name, "bench").expect("a principal");
            let make = |id| {
                let entry = Entry::new(id, who.clone(), Seed::random(), SystemClock.now().unix);
                Entry { enabled, ..entry }
            };
            store.create(make).await.expect("a new entry");
        }
    });
}

/// The real program; killed when dropped.
struct Gate {
    child: Child,
    proxy: String,
    api: String,
}

impl Gate {
    fn start(database: &std::path::Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_otpgate"))
            .args(["serve", "--log-format", "json", "--ops", "off"])
            .args(["--proxy", "127.0.0.1:0", "--api", "127.0.0.1:0"])
            .env("OTPGATE_STORE__URL", format!("sqlite:{}", database.display()))
            .env("OTPGATE_STORE__SEALING", "off")
            .env("OTPGATE_LOG__ACCESS", "false")
            // Failures are counted as ever, but nobody has to wait.
            .envs(["SOURCE", "ENTRY", "ADDRESS"].map(|of| {
                let quota = "{ failures = 1000000, per = '1000s' }";
                (format!("OTPGATE_THROTTLE__PER_{of}"), quota)
            }))
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let mut gate = Self { child, proxy: String::new(), api: String::new() };
        let (mut serving, mut loaded) = (false, false);
        while !(serving && loaded) {
            let line = lines.next().expect("it serves").expect("a line");
            let line: serde_json::Value = serde_json::from_str(&line).expect("JSON");
            loaded |= line["message"] == "entries loaded";
            if line["message"] == "serving" {
                serving = true;
                gate.proxy = line["proxy"].as_str().expect("an address").to_owned();
                gate.api = line["api"].as_str().expect("an address").to_owned();
            }
        }
        std::thread::spawn(move || lines.for_each(drop));
        gate
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn measure(listener: &str, address: &str, claims: usize, request: impl Fn(&str, &str) -> String) {
    let requests = KINDS.map(|(name, token, _)| request(name, token));
    let mut stream = TcpStream::connect(address).expect("the gate listens");
    stream.set_nodelay(true).expect("a socket");
    let mut times: [Vec<f64>; KINDS.len()] = Default::default();
    for round in 0..WARM_UP + claims {
        let mut order = [0, 1, 2, 3];
        for i in (1..order.len()).rev() {
            order.swap(i, rand::random_range(0..=i));
        }
        for kind in order {
            let took = ask(&mut stream, requests[kind].as_bytes());
            if round >= WARM_UP {
                times[kind].push(took);
            }
        }
    }
    report(listener, &times);
}

/// Nanoseconds from the request's last byte to the answer's.
fn ask(stream: &mut TcpStream, request: &[u8]) -> f64 {
    let mut answer = [0; 2048];
    let mut filled = 0;
    let start = SystemClock.now().monotonic;
    stream.write_all(request).expect("the gate reads");
    loop {
        let read = stream.read(&mut answer[filled..]).expect("the gate answers");
        assert!(read > 0, "the gate closed the connection");
        filled += read;
        if is_whole(&answer[..filled]) {
            let took = SystemClock.now().monotonic.duration_since(start);
            assert!(answer.starts_with(b"HTTP/1.1 40"), "not a refusal");
            return took.as_nanos() as f64;
        }
    }
}

fn is_whole(answer: &[u8]) -> bool {
    let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") else { return false };
    let head = std::str::from_utf8(&answer[..end]).expect("ASCII").to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    let length: usize = length.expect("a length").trim().parse().expect("a number");
    answer.len() >= end + 4 + length
}

fn report(listener: &str, times: &[Vec<f64>]) {
    let mut all: Vec<f64> = times.concat();
    all.sort_by(f64::total_cmp);
    let limit = all[(all.len() as f64 * KEPT) as usize - 1];
    let kept: Vec<Vec<f64>> =
        times.iter().map(|of| of.iter().copied().filter(|time| *time <= limit).collect()).collect();
    println!("\n{listener}\n{:<26}{:>10}{:>10}{:>10}  verdict", "", "median", "differs", "t");
    for (i, (_, _, what)) in KINDS.iter().enumerate() {
        let differs = median(&times[i]) - median(&times[0]);
        let t = if i == 0 { 0.0 } else { welch(&kept[i], &kept[0]) };
        let verdict = match i {
            0 => "compared with",
            _ if t.abs() < T_LIMIT => "cannot be told apart",
            _ => "differs",
        };
        println!("{what:<26}{:>10.0}{differs:>10.0}{t:>10.2}  {verdict}", median(&times[i]));
    }
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Welch's t of two samples.
fn welch(a: &[f64], b: &[f64]) -> f64 {
    let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len() as f64;
    let (ma, mb) = (mean(a), mean(b));
    let spread = |of: &[f64], mean: f64| {
        let squares: f64 = of.iter().map(|time| (time - mean).powi(2)).sum();
        squares / (of.len() - 1) as f64 / of.len() as f64
    };
    (ma - mb) / (spread(a, ma) + spread(b, mb)).sqrt()
}
