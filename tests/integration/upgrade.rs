//! A gate that is succeeded by a new process, on the same sockets; and its stop.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use serde_json::Value;

use crate::harness::{ALICE, Gate, PATIENCE, Sandbox, eventually, free_port, http, token};
use crate::peers::echo::Echo;
use crate::peers::tls::Pki;
use crate::peers::wire::Connection;

mod activation;
mod callers;
mod failures;
mod streams;

use callers::Callers;

/// A line of processes, each the successor of the one before; all are killed when dropped.
struct Dynasty {
    gate: Gate,
    /// The process that serves now.
    reigning: i32,
    successors: Mutex<Vec<i32>>,
}

impl Dynasty {
    fn new(gate: Gate) -> Self {
        let reigning = gate.pid();
        Self { gate, reigning, successors: Mutex::default() }
    }

    /// One that every successor can be made of, on free ports.
    async fn found(sandbox: &Sandbox, settings: &str) -> Self {
        Self::new(sandbox.serve(settings).ready().await)
    }

    fn signal(&self, signal: i32) {
        // SAFETY: kill takes two integers.
        assert_eq!(unsafe { libc::kill(self.reigning, signal) }, 0);
    }

    /// The next process that an old one has started; later ones are known by their id.
    fn next_of(&self, message: &str) -> i32 {
        let known = self.successors.lock().unwrap().clone();
        let pid = |line: &Value| i32::try_from(line["pid"].as_i64().unwrap_or_default()).unwrap();
        let line = self
            .gate
            .wait_for_log(|line| line["message"] == message && !known.contains(&pid(line)));
        pid(&line.expect("the log goes on"))
    }

    /// Upgrades; the old process drains.
    fn upgrade(&mut self) -> i32 {
        self.signal(libc::SIGUSR2);
        let new = self.next_of("another process serves now: draining");
        self.successors.lock().unwrap().push(new);
        std::mem::replace(&mut self.reigning, new)
    }

    /// How often this was logged, by all processes.
    fn count(&self, message: &str) -> usize {
        self.gate.log_text().matches(&format!("\"message\":\"{message}\"")).count()
    }
}

impl Drop for Dynasty {
    fn drop(&mut self) {
        for pid in self.successors.lock().unwrap().iter() {
            // SAFETY: kill takes two integers. A process of ours that has ended is nobody else yet.
            unsafe { libc::kill(*pid, libc::SIGKILL) };
        }
    }
}

/// Whether a process has ended, though perhaps nobody has waited for it.
fn has_ended(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_none_or(|state| state.is_empty() || state.starts_with('Z'))
}

/// The sockets and pipes that a process has open; what two processes share has one name.
fn shareable(pid: i32) -> BTreeSet<String> {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let targets = files.filter_map(|file| std::fs::read_link(file.unwrap().path()).ok());
    let names = targets.map(|target| target.display().to_string());
    names.filter(|name| name.starts_with("socket:") || name.starts_with("pipe:")).collect()
}

/// The addresses of a listener, in order.
fn addresses(gate: &Gate, listener: &str) -> Vec<String> {
    let line = gate.wait_for_log(|line| line["message"] == "serving").unwrap();
    line[listener].as_str().unwrap().split(", ").map(str::to_owned).collect()
}

fn tcp(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_upgrades_under_load_fail_no_request() {
    let (echo, pki, sandbox) = (Echo::start().await, Pki::new(), Sandbox::with_entries());
    let unix = sandbox.path("gate.sock");
    let settings = format!(
        "[proxy]\nupstream = '{}'\nlisten = ['127.0.0.1:0', {{ address = '127.0.0.1:0', \
         tls_cert_file = '{}', tls_key_file = '{}' }}, 'unix:{}', {{ address = '127.0.0.1:0', \
         h2c = true }}]\n[throttle]\nenabled = false\n",
        echo.address,
        pki.files.cert_file.display(),
        pki.files.key_file.display(),
        unix.display(),
    );
    let mut gates = Dynasty::found(&sandbox, &settings).await;
    let proxy = addresses(&gates.gate, "proxy");
    let callers = Callers::new();
    callers.keep_alive("kept alive", tcp(&proxy[0]));
    callers.anew("new connections", tcp(&proxy[0]));
    callers.over_tls("TLS", tcp(&proxy[1]), &pki);
    callers.http2_over_tls("HTTP/2 over TLS", tcp(&proxy[1]), &pki);
    callers.unix("Unix socket", &unix);
    callers.http2("HTTP/2", tcp(&proxy[3]));
    callers.ready("readiness", gates.gate.ops.clone());
    callers.verify("API", gates.gate.api.clone());
    for _ in 0..3 {
        callers.go_on(30).await;
        let old = gates.upgrade();
        callers.go_on(30).await;
        // Nobody is left behind: who is told to comes back over another connection.
        eventually("the old process ends", || async { has_ended(old).then_some(()) }).await;
    }
    let told = callers.end().await;
    assert_eq!(gates.count("requests still ran at the end of `shutdown.grace`: cut"), 0);
    assert_eq!(gates.count("stopped"), 3);
    assert_eq!(gates.count("serving"), 4);
    assert!(unix.exists(), "the last one's");
    eprintln!("{told}");
    gates.signal(libc::SIGTERM);
    eventually("the last one ends", || async { has_ended(gates.reigning).then_some(()) }).await;
    assert!(!unix.exists(), "who listens last removes it");
}

#[tokio::test]
async fn a_successor_inherits_the_listening_sockets_and_nothing_else() {
    let sandbox = Sandbox::with_entries();
    let mut gates =
        Dynasty::found(&sandbox, &format!("[proxy]\nupstream = '127.0.0.1:{}'\n", free_port()))
            .await;
    let proxy = crate::harness::address(&gates.gate.proxy);
    // Open, and not to be inherited.
    let mut held = Connection::to(proxy).await;
    assert_eq!(held.ask("GET / HTTP/1.1\r\nHost: g\r\n\r\n").await.unwrap().status, 401);
    let ours = gates.upgrade();
    let new = gates.reigning;
    let shared = || -> Vec<_> { shareable(ours).intersection(&shareable(new)).cloned().collect() };
    let sockets = shared().iter().filter(|name| name.starts_with("socket:")).count();
    assert!(sockets <= 3, "the listeners at most: {:?}", shared());
    // Standard output and standard error it has from us.
    let from_us = shareable(i32::try_from(std::process::id()).unwrap());
    eventually("the old one has closed its listeners", || async {
        shared().iter().all(|name| from_us.contains(name)).then_some(())
    })
    .await;
    assert!(shared().len() >= 2);
    assert!(
        shareable(ours).iter().any(|name| name.starts_with("socket:")),
        "it has the connection"
    );
    // Another one takes longer than an idle connection has at a stop.
    gates.upgrade();
    let new = gates.reigning;
    let answer = held.ask("GET / HTTP/1.1\r\nHost: g\r\n\r\n").await.unwrap();
    assert_eq!((answer.status, answer.header("connection")), (401, Some("close")));
    drop(held);
    eventually("the old one ends", || async { has_ended(ours).then_some(()) }).await;
    let environment = std::fs::read_to_string(format!("/proc/{new}/environ")).unwrap();
    assert!(!environment.contains("LISTEN_"), "{environment}");
    assert_eq!(std::fs::read_link(format!("/proc/{new}/fd/0")).unwrap(), Path::new("/dev/null"));
}

#[tokio::test]
async fn a_successor_has_the_settings_of_now() {
    let sandbox = Sandbox::with_entries();
    let port = free_port();
    let settings = |ops: u16| {
        format!(
            "[proxy]\nlisten = '127.0.0.1:0'\nupstream = '127.0.0.1:1'\n[api]\nlisten = '127.0.0.1:0'\n\
             [ops]\nlisten = '127.0.0.1:{ops}'\n"
        )
    };
    let mut gates = Dynasty::found(&sandbox, &settings(port)).await;
    let moved = free_port();
    sandbox.write("otpgate.toml", &settings(moved));
    gates.upgrade();
    gates
        .gate
        .wait_for_log(|line| {
            line["message"] == format!("no longer listening on `127.0.0.1:{port}`")
        })
        .unwrap();
    let answer = http().get(format!("http://127.0.0.1:{moved}/readyz")).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    eventually("the old address is closed", || async {
        http().get(format!("http://127.0.0.1:{port}/livez")).send().await.is_err().then_some(())
    })
    .await;
    let call = gates.gate.call("/", "alice", "shop", &token(ALICE)).send().await.unwrap();
    assert_eq!(call.status(), 502, "let through");
}

/// Who has failed too often before is refused after, once the store has told.
#[tokio::test]
async fn an_upgrade_gives_nobody_a_fresh_budget() {
    let sandbox = Sandbox::with_entries();
    let echo = Echo::start().await;
    let settings = format!(
        "[proxy]\nupstream = '{}'\n[throttle]\nper_source = {{ failures = 5, per = '1h' }}\n",
        echo.address
    );
    let gates = Dynasty::found(&sandbox, &settings).await;
    let gate = &gates.gate;
    let wrong = crate::harness::wrong_token(ALICE);
    let fail = async || gate.call("/", "alice", "shop", &wrong).send().await.unwrap().status();
    for _ in 0..5 {
        assert_eq!(fail().await, 401);
    }
    assert_eq!(fail().await, 429);
    let old = gates.reigning;
    // Borrowed above.
    gates.signal(libc::SIGUSR2);
    let new = gates.next_of("another process serves now: draining");
    gates.successors.lock().unwrap().push(new);
    eventually("the old one ends", || async { has_ended(old).then_some(()) }).await;
    // What the old process counted comes back with the first failure that the new one shares.
    assert_eq!(fail().await, 401);
    eventually("the failure is shared", || async {
        let metrics = http().get(format!("{}/metrics", gate.ops)).send().await.unwrap();
        let closed = metrics.text().await.unwrap();
        closed
            .contains("otpgate_store_operation_duration_seconds_count{operation=\"count_failures\"")
            .then_some(())
    })
    .await;
    eventually("it is refused unseen", || async { (fail().await == 429).then_some(()) }).await;
    let metrics = http().get(format!("{}/metrics", gate.ops)).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    let looked_at = metrics.lines().find(|line| line.contains("reason=\"wrong_token\"")).unwrap();
    let looked_at: f64 = looked_at.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(looked_at < 4.0, "{looked_at} of 5 that a fresh budget would allow");
}

/// How long something takes at most that waits for nothing.
const AT_ONCE: Duration = PATIENCE;

/// A program of its own, as an installation has it, that can be replaced.
fn installed(sandbox: &Sandbox, settings: &str) -> Gate {
    let program = sandbox.path("otpgate");
    std::fs::copy(env!("CARGO_BIN_EXE_otpgate"), &program).unwrap();
    let config = sandbox.write("otpgate.toml", settings);
    let mut command = std::process::Command::new(&program);
    command
        .env_clear()
        .args(["serve", "--log-format", "json"])
        .args(["--api", "127.0.0.1:0", "--ops", "127.0.0.1:0", "--proxy", "127.0.0.1:0"])
        .arg("--config")
        .arg(config);
    Gate::spawn(command).unwrap_or_else(|output| panic!("{}", crate::harness::stderr(&output)))
}
