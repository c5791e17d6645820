//! Gates that hold no seeds and ask another server: both of them the real program.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use otpgate::clock::{Clock as _, SystemClock};
use otpgate::entry::Seed;
use otpgate::otp::{Generator, TokenParams};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use tokio::net::TcpListener;

use crate::harness::{
    ADMIN, ALICE, BOB, Gate, Sandbox, VERIFIER, eventually, free_port, http, otpgate, stderr,
    token, wrong_token,
};
use crate::peers::echo::Echo;
use crate::peers::tls::Pki;
use crate::peers::wire::Connection;

/// Time steps that do not end within a test, on either side.
const LONG_STEPS: &str = "[totp]\nperiod = 3600\n";

fn now() -> u64 {
    SystemClock.now().unix
}

/// The token of now with steps of so many seconds, so many steps away.
fn token_of(seed: &str, step_seconds: u32, steps: i64) -> String {
    let params = TokenParams { step_seconds, ..TokenParams::default() };
    let at = now().saturating_add_signed(i64::from(step_seconds) * steps);
    Generator::new(&Seed::parse(seed).unwrap(), params).token_at(at)
}

/// A gate with the entries of [`Sandbox::with_entries`], and no proxy.
fn central(sandbox: &Sandbox, more: &str) -> Gate {
    sandbox.serve(&format!("[proxy]\nlisten = 'off'\n{more}"))
}

/// A gate that asks `url` as verifier@ungleich-auth.
fn sidecar(sandbox: &Sandbox, echo: &Echo, url: &str, more: &str) -> Gate {
    sidecar_as(sandbox, echo, url, "verifier", more)
}

fn sidecar_as(sandbox: &Sandbox, echo: &Echo, url: &str, name: &str, more: &str) -> Gate {
    sandbox.serve(&(settings(sandbox, echo, url, name) + more))
}

/// Those of a gate that asks `url`, up to the end of `[remote]`.
fn settings(sandbox: &Sandbox, echo: &Echo, url: &str, name: &str) -> String {
    let seed = sandbox.write("gate.seed", VERIFIER);
    format!(
        "[proxy]\nupstream = '{}'\n[remote]\nurl = '{url}'\nname = '{name}'\nseed_file = '{}'\n\
         max_stale = '2s'\ntimeout = '1s'\n",
        echo.address,
        seed.display()
    )
}

async fn status(gate: &Gate, name: &str, realm: &str, token: &str) -> u16 {
    gate.call("/", name, realm, token).send().await.unwrap().status().as_u16()
}

/// The value of a metric with these labels; 0 if it is not there.
async fn metric(gate: &Gate, line: &str) -> f64 {
    let text = http().get(format!("{}/metrics", gate.ops)).send().await.unwrap();
    let text = text.text().await.unwrap();
    let value = text.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(' '));
    value.map_or(0.0, |value| value.parse().unwrap())
}

/// How often the server was asked about claims.
async fn asked(gate: &Gate, outcome: &str) -> f64 {
    let line = format!("otpgate_remote_questions_total{{about=\"claim\",outcome=\"{outcome}\"}}");
    metric(gate, &line).await
}

async fn readiness(gate: &Gate) -> (u16, String) {
    let answer = http().get(format!("{}/readyz", gate.ops)).send().await.unwrap();
    let status = answer.status().as_u16();
    let body: Value = answer.json().await.unwrap();
    (status, body["reason"].as_str().unwrap_or_default().to_owned())
}

/// Waits until the gate is not ready for a reason that holds `words`.
async fn unready(gate: &Gate, words: &str) -> String {
    eventually(words, || async {
        let (status, reason) = readiness(gate).await;
        (status == 503 && reason.contains(words)).then_some(reason)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_are_checked_by_another_gate() {
    let (home, echo) = (Sandbox::with_entries(), Echo::start().await);
    let server = central(&home, LONG_STEPS).ready().await;
    let sandbox = Sandbox::new();
    let route = "[api]\ntrusted_proxies = ['127.0.0.1']\nlisten = '127.0.0.1:0'\n\
                 [[route]]\npath = '/'\nallow = ['shop']\n";
    let gate = sidecar(&sandbox, &echo, &server.api, &format!("{LONG_STEPS}{route}")).ready().await;
    let right = token_of(ALICE, 3600, 0);

    let passed = gate.call("/x", "alice", "shop", &right).send().await.unwrap();
    assert_eq!(passed.status(), 200);
    let seen = passed.text().await.unwrap();
    assert!(seen.contains("alice") && seen.contains("shop") && !seen.contains(&right), "{seen}");
    // Whatever is wrong, the answer is the same.
    let mut answers = Vec::new();
    for (name, realm, token) in [
        ("alice", "shop", token_of(ALICE, 3600, 7)),
        ("nobody", "shop", right.clone()),
        ("alice", "elsewhere", right.clone()),
        ("alice", "shop", "12345".to_owned()),
    ] {
        let refused = gate.call("/", name, realm, &token).send().await.unwrap();
        assert_eq!(refused.status(), 401, "{name} {realm}");
        let mut body: Value = refused.json().await.unwrap();
        body.as_object_mut().unwrap().remove("request_id");
        answers.push(body);
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    assert_eq!(status(&gate, "bob", "lab", &token_of(BOB, 3600, 0)).await, 403, "another realm");
    assert_eq!(echo.seen(), 1);
    // What has the wrong form is no question.
    assert_eq!((asked(&gate, "ok").await, asked(&gate, "denied").await), (2.0, 3.0));

    // Confirmed once is confirmed for the time step; a refusal is not remembered.
    for _ in 0..3 {
        assert_eq!(status(&gate, "alice", "shop", &right).await, 200);
        assert_eq!(status(&gate, "nobody", "shop", &right).await, 401);
    }
    assert_eq!((asked(&gate, "ok").await, asked(&gate, "denied").await), (2.0, 6.0));
    assert_eq!(metric(&gate, "otpgate_remote_remembered_total").await, 3.0);
    assert!(metric(&gate, "otpgate_remote_staleness_seconds").await <= 2.0);
    assert_eq!(metric(&gate, "otpgate_directory_staleness_seconds").await, 0.0);

    // Other proxies are answered; nothing is managed or verified here.
    let ask = |token: &str| {
        http()
            .get(format!("{}/authz/forward-auth", gate.api))
            .header("X-Auth-Name", "alice")
            .header("X-Auth-Realm", "shop")
            .header("X-Auth-Token", token)
            .header("X-Forwarded-Method", "GET")
            .header("X-Forwarded-Host", "shop.example")
            .header("X-Forwarded-Uri", "/orders")
            .send()
    };
    assert_eq!(ask(&right).await.unwrap().status(), 200);
    assert_eq!(ask(&token_of(ALICE, 3600, 7)).await.unwrap().status(), 401);
    for path in ["/verify", "/ungleichotp/", "/ungleichotp/1/", "/"] {
        let body = json!({
            "auth_name": "admin", "auth_realm": "ungleich-admin",
            "auth_token": token_of(ADMIN, 3600, 0),
        });
        let url = format!("{}{path}", gate.api);
        assert_eq!(http().post(url).json(&body).send().await.unwrap().status(), 404, "{path}");
    }
    let directory = http().get(format!("{}/directory", gate.ops)).send().await.unwrap();
    assert_eq!(directory.status(), 404);
    assert!(!sandbox.path("otpgate.db").exists());
    let log = gate.log_text();
    assert!(!log.contains(VERIFIER) && !log.contains(&right), "{log}");
}

/// At the latest when the step ends in which it was confirmed; a token that was not confirmed at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_entry_is_out_when_the_step_ends() {
    const STEPS: &str = "[totp]\nperiod = 5\n[throttle]\nenabled = false\n";
    let (home, echo) = (Sandbox::with_entries(), Echo::start().await);
    let server = central(&home, STEPS).ready().await;
    let sandbox = Sandbox::new();
    let gate = sidecar(&sandbox, &echo, &server.api, STEPS).ready().await;
    // Not in the last moments of a step.
    eventually("a step begins", || async { now().is_multiple_of(5).then_some(()) }).await;
    let (step, confirmed) = (now() / 5, token_of(ALICE, 5, 0));
    assert_eq!(status(&gate, "alice", "shop", &confirmed).await, 200);
    let body = json!({
        "auth_name": "admin", "auth_realm": "ungleich-admin", "auth_token": token_of(ADMIN, 5, 0),
    });
    let entry = format!("{}/ungleichotp/3/", server.api);
    assert_eq!(http().delete(entry).json(&body).send().await.unwrap().status(), 204);
    assert_eq!(status(&gate, "alice", "shop", &token_of(ALICE, 5, 1)).await, 401);
    let remembered = status(&gate, "alice", "shop", &confirmed).await;
    assert!(remembered == 200 || now() / 5 > step, "{remembered}");
    eventually("the step is over", || async { (now() / 5 > step).then_some(()) }).await;
    // A skew of 1 would accept it still.
    assert_eq!(status(&gate, "alice", "shop", &confirmed).await, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_server_the_gate_closes_and_opens_again() {
    let (home, echo) = (Sandbox::with_entries(), Echo::start().await);
    let listen = format!("[api]\nlisten = '127.0.0.1:{}'\n{LONG_STEPS}", free_port());
    let server = central(&home, &listen).ready().await;
    let sandbox = Sandbox::new();
    let gate = sidecar(&sandbox, &echo, &server.api, LONG_STEPS).ready().await;
    let (alice, bob) = (token_of(ALICE, 3600, 0), token_of(BOB, 3600, 0));
    assert_eq!(status(&gate, "alice", "shop", &alice).await, 200);

    // The server hangs: what it confirmed in this step passes, nothing else, and nobody waits long.
    server.signal(libc::SIGSTOP);
    let begin = SystemClock.now().monotonic;
    let closed = gate.call("/", "bob", "lab", &bob).send().await.unwrap();
    assert_eq!(closed.status(), 503);
    assert!(closed.headers().contains_key("retry-after"));
    let waited = SystemClock.now().monotonic - begin;
    assert!(waited >= Duration::from_secs(1) && waited < Duration::from_secs(3), "{waited:?}");
    assert_eq!(status(&gate, "alice", "shop", &alice).await, 200);
    assert!(gate.wait_for_log(|line| line["reason"] == "remote_timeout").is_some());
    unready(&gate, "the remote server was last heard").await;
    server.signal(libc::SIGCONT);
    let gate = gate.ready().await;
    assert_eq!(status(&gate, "bob", "lab", &bob).await, 200, "no failure is remembered");

    // It is gone: refused at once. A right token that was not confirmed yet is no wrong one.
    server.signal(libc::SIGKILL);
    server.wait();
    let other = token_of(BOB, 3600, 1);
    assert_eq!(status(&gate, "bob", "lab", &other).await, 503);
    assert!(gate.wait_for_log(|line| line["reason"] == "remote_unreachable").is_some());
    unready(&gate, "cannot be reached").await;
    assert_eq!(status(&gate, "alice", "shop", &alice).await, 200);
    let live = http().get(format!("{}/livez", gate.ops)).send().await.unwrap();
    assert_eq!(live.status(), 200);
    let server = central(&home, &listen).ready().await;
    let gate = gate.ready().await;
    assert_eq!(status(&gate, "bob", "lab", &other).await, 200);
    drop(server);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gate_that_may_not_verify_says_so_and_lets_nobody_pass() {
    let (home, echo) = (Sandbox::with_entries(), Echo::start().await);
    let server = central(&home, "").ready().await;
    home.import(&[(7, "plain", "shop", VERIFIER)]);

    // A name that the server does not have, until it has.
    let sandbox = Sandbox::new();
    let gate = sidecar_as(&sandbox, &echo, &server.api, "late", "");
    let reason = unready(&gate, "refuses this gate: `remote.name`, `remote.realm` or").await;
    assert!(!reason.contains(VERIFIER), "{reason}");
    let startup = http().get(format!("{}/startupz", gate.ops)).send().await.unwrap();
    assert_eq!(startup.status(), 503);
    assert!(
        gate.wait_for_log(|l| l["message"].as_str().unwrap_or("").contains("refuses")).is_some()
    );
    for (name, token) in [("alice", token(ALICE)), ("alice", wrong_token(ALICE))] {
        assert_eq!(status(&gate, name, "shop", &token).await, 503);
    }
    assert_eq!(asked(&gate, "refused").await, 0.0, "nobody is asked in vain");
    home.import(&[(8, "late", "ungleich-auth", VERIFIER)]);
    let gate = gate.ready().await;
    assert_eq!(status(&gate, "alice", "shop", &token(ALICE)).await, 200);
    assert!(!gate.log_text().contains(VERIFIER));

    // A realm that may not verify: to every claim the server would say no.
    let sandbox = Sandbox::new();
    let gate = sidecar_as(&sandbox, &echo, &server.api, "plain", "realm = 'shop'\n");
    unready(&gate, "does not let `remote.realm` verify").await;
    assert_eq!(status(&gate, "alice", "shop", &token(ALICE)).await, 503);
    assert_eq!(echo.seen(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_time_tokens_are_counted_by_the_server() {
    let (home, echo) = (Sandbox::with_entries(), Echo::start().await);
    let once = "[realms.shop]\nreuse = 'once'\n";
    let server = central(&home, once).ready().await;
    let (one, other, third) = (Sandbox::new(), Sandbox::new(), Sandbox::new());
    let gates = [
        sidecar(&one, &echo, &server.api, once).ready().await,
        // The server says so itself.
        sidecar(&third, &echo, &server.api, "").ready().await,
        // By a route, whatever the realm says.
        sidecar(
            &other,
            &echo,
            &server.api,
            "[[route]]\npath = '/'\nallow = ['*']\nreuse = 'once'\n",
        )
        .ready()
        .await,
    ];
    for (step, first) in (-1..=1).zip(&gates) {
        let right = token_of(ALICE, 30, step);
        assert_eq!(status(first, "alice", "shop", &right).await, 200);
        for gate in &gates {
            assert_eq!(status(gate, "alice", "shop", &right).await, 401);
        }
        assert_eq!(metric(first, "otpgate_remote_remembered_total").await, 0.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_is_reached_by_tls_and_by_unix_sockets() {
    let (home, echo, pki) = (Sandbox::with_entries(), Echo::start().await, Pki::new());
    let socket = home.path("api.sock");
    let files = |files: &otpgate::config::TlsFiles| {
        format!(
            "tls_cert_file = '{}'\ntls_key_file = '{}'\n",
            files.cert_file.display(),
            files.key_file.display()
        )
    };
    let ca = pki.ca_file.display();
    let listen = format!(
        "[api]\nlisten = ['unix:{}', {{ address = '127.0.0.1:0', tls_client_ca_file = '{ca}', \
         tls_cert_file = '{}', tls_key_file = '{}' }}]\n",
        socket.display(),
        pki.files.cert_file.display(),
        pki.files.key_file.display()
    );
    let server = central(&home, &listen).ready().await;
    let port = server.api.rsplit(':').next().unwrap().to_owned();
    let url = format!("https://localhost:{port}");
    let trusted = format!("ca_file = '{ca}'\n{}", files(&pki.identity("gate")));
    for (url, more) in [(format!("unix:{}", socket.display()), ""), (url.clone(), &trusted)] {
        let sandbox = Sandbox::new();
        let gate = sidecar(&sandbox, &echo, &url, more).ready().await;
        assert_eq!(status(&gate, "alice", "shop", &token(ALICE)).await, 200, "{url}");
    }
    // Another CA, and no certificate of our own.
    let stranger = Pki::new();
    let wrong = format!("ca_file = '{}'\n", stranger.ca_file.display());
    for more in [&wrong, &format!("ca_file = '{ca}'\n")] {
        let sandbox = Sandbox::new();
        let gate = sidecar(&sandbox, &echo, &url, more);
        unready(&gate, "cannot be reached").await;
        assert_eq!(status(&gate, "alice", "shop", &token(ALICE)).await, 503);
    }
    assert_eq!(echo.seen(), 2);
}

/// A name with two addresses, of which one swallows what it is sent.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_address_does_not_hide_a_living_one() {
    let (home, echo) = (Sandbox::with_entries(), Echo::start().await);
    let port = free_port();
    for (alive, dead) in [("127.0.0.2", "127.0.0.3"), ("127.0.0.3", "127.0.0.2")] {
        let _server = central(&home, &format!("[api]\nlisten = '{alive}:{port}'\n")).ready().await;
        let _full = Full::at(format!("{dead}:{port}").parse().unwrap());
        let sandbox = Sandbox::new();
        let hosts = format!("127.0.0.1 localhost\n{dead} otp.test\n{alive} otp.test\n");
        let hosts = sandbox.write("hosts", &hosts);
        let settings = settings(&sandbox, &echo, &format!("http://otp.test:{port}"), "verifier");
        let settings = settings.replace("[proxy]\n", "[proxy]\nlisten = '127.0.0.1:0'\n");
        let config = sandbox.write("otpgate.toml", &(settings + "[ops]\nlisten = '127.0.0.1:0'\n"));
        let gate = Gate::with_hosts(&hosts, &config).ready().await;
        assert_eq!(status(&gate, "alice", "shop", &token(ALICE)).await, 200, "{alive}");
    }
}

/// A listener whose queue is full: nobody else is let in, nor told so.
struct Full {
    _listener: Socket,
    _waits: std::net::TcpStream,
}

impl Full {
    fn at(address: SocketAddr) -> Self {
        let listener = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
        listener.bind(&address.into()).unwrap();
        listener.listen(0).unwrap();
        let waits = std::net::TcpStream::connect(address).unwrap();
        let another = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(100));
        assert!(another.is_err(), "the queue is not full");
        Self { _listener: listener, _waits: waits }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_of_one_token_share_a_question() {
    let (home, echo) = (Sandbox::with_entries(), Echo::start().await);
    let server = central(&home, LONG_STEPS).ready().await;
    let sandbox = Sandbox::new();
    let gate = sidecar(&sandbox, &echo, &server.api, LONG_STEPS).ready().await;
    let right = token_of(ALICE, 3600, 0);
    let calls = (0..100).map(|_| gate.call("/", "alice", "shop", &right).send());
    let answers = futures_util::future::join_all(calls).await;
    assert!(answers.into_iter().all(|answer| answer.unwrap().status() == 200));
    assert_eq!(asked(&gate, "ok").await, 1.0);
    assert_eq!(metric(&gate, "otpgate_remote_remembered_total").await, 99.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_are_bounded() {
    let (home, echo) = (Sandbox::with_entries(), Echo::start().await);
    let server = central(&home, LONG_STEPS).ready().await;
    let sandbox = Sandbox::new();
    let more = format!("max_in_flight = 2\ncache_entries = 0\n{LONG_STEPS}");
    let gate = sidecar(&sandbox, &echo, &server.api, &more).ready().await;
    let right = token_of(ALICE, 3600, 0);
    for _ in 0..2 {
        assert_eq!(status(&gate, "alice", "shop", &right).await, 200);
    }
    assert_eq!(asked(&gate, "ok").await, 2.0, "nothing is remembered");
    server.signal(libc::SIGSTOP);
    let calls = (0..20).map(|_| gate.call("/", "alice", "shop", &right).send());
    let answers = futures_util::future::join_all(calls).await;
    assert!(answers.into_iter().all(|answer| answer.unwrap().status() == 503));
    let (open, busy) = (asked(&gate, "timeout").await, asked(&gate, "busy").await);
    assert!(open + busy == 20.0 && open >= 2.0 && busy >= 1.0, "{open} {busy}");
    let about_itself = "otpgate_remote_questions_total{about=\"self\",outcome=\"busy\"}";
    assert_eq!(metric(&gate, about_itself).await, 0.0, "claims do not keep the gate from asking");
    server.signal(libc::SIGCONT);
    let gate = gate.ready().await;
    assert_eq!(status(&gate, "alice", "shop", &right).await, 200);
}

/// Answers what it was told to say: about the gate itself OK, unless told otherwise.
struct Scripted {
    url: String,
    of_gate: Arc<Mutex<String>>,
    answer: Arc<Mutex<String>>,
    asked: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

const OK: &str = "200 OK\r\nContent-Type: application/json\r\n\r\n{\"status\":\"OK\"}";

impl Scripted {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let [of_gate, answer] = [OK, OK].map(|ok| Arc::new(Mutex::new(ok.to_owned())));
        let asked = Arc::default();
        let said = [of_gate.clone(), answer.clone()];
        let task = tokio::spawn(Self::serve(listener, said, Arc::clone(&asked)));
        Self { url, of_gate, answer, asked, task }
    }

    async fn serve(
        listener: TcpListener,
        [of_gate, answer]: [Arc<Mutex<String>>; 2],
        asked: Arc<AtomicUsize>,
    ) {
        while let Ok((stream, _)) = listener.accept().await {
            let mut connection = Connection::over(stream);
            let Some((_, body)) = connection.request().await else { continue };
            let body: Value = serde_json::from_slice(&body).unwrap();
            let said = if body["name"] == "verifier" {
                of_gate.lock().unwrap().clone()
            } else {
                asked.fetch_add(1, Ordering::SeqCst);
                answer.lock().unwrap().clone()
            };
            let said = said.replacen("\r\n", "\r\nConnection: close\r\n", 1);
            connection.send(format!("HTTP/1.1 {said}")).await;
        }
    }

    fn say(&self, answer: &str) {
        *self.answer.lock().unwrap() = answer.to_owned();
    }
}

/// What ungleich-otp answers, and what no server should.
#[tokio::test(flavor = "multi_thread")]
async fn only_a_plain_yes_is_one() {
    let (server, echo) = (Scripted::start().await, Echo::start().await);
    let elsewhere = Scripted::start().await;
    let sandbox = Sandbox::new();
    let more = "cache_entries = 100\n[throttle]\nenabled = false\n";
    let gate = sidecar(&sandbox, &echo, &server.url, more).ready().await;
    let json = |status: &str, body: &str| {
        format!("{status}\r\nContent-Type: application/json\r\nAllow: POST, OPTIONS\r\n\r\n{body}")
    };
    let redirect = format!("307 Moved\r\nLocation: {}/ungleichotp/verify/\r\n\r\n", elsewhere.url);
    for (n, (answer, expected)) in [
        (
            json(
                "403 Forbidden",
                r#"{"detail":"You do not have permission to perform this action."}"#,
            ),
            401,
        ),
        (json("403 Forbidden", r#"{"detail":"Incorrect authentication credentials."}"#), 503),
        (json("403 Forbidden", r#"{"detail":"Requests of foreign pages are refused."}"#), 503),
        ("403 Forbidden\r\n\r\n<html>".to_owned(), 503),
        (json("200 OK", r#"{"status":"NO"}"#), 503),
        (json("200 OK", r#"["OK"]"#), 503),
        (json("200 OK", r#"{"status":["OK"]}"#), 503),
        (json("200 OK", ""), 503),
        ("200 OK\r\nContent-Length: 15\r\n\r\n{\"status\":\"O".to_owned(), 503),
        ("200 OK\r\n\r\n<html>OK</html>".to_owned(), 503),
        (format!("200 OK\r\n\r\n{{\"status\":\"OK\",\"x\":\"{}\"}}", "x".repeat(2 << 20)), 503),
        (json("204 No Content", ""), 503),
        (redirect, 503),
        (json("400 Bad Request", r#"{"name":["No."]}"#), 503),
        (json("401 Unauthorized", r#"{"detail":"No."}"#), 503),
        (json("429 Too Many Requests", r#"{"detail":"Wait."}"#), 503),
        (json("500 Oops", ""), 503),
        (json("503 Busy", ""), 503),
        ("garbage".to_owned(), 503),
        (OK.to_owned(), 200),
    ]
    .into_iter()
    .enumerate()
    {
        server.say(&answer);
        let begin = server.asked.load(Ordering::SeqCst);
        let shown = &answer[..answer.len().min(100)];
        // Doubts about the gate itself are settled by a question about itself.
        let got = eventually("an answer", || async {
            let got = status(&gate, &format!("caller{n}"), "shop", "123456").await;
            let is_settled = expected != 401 || got != 503;
            is_settled.then_some(got)
        })
        .await;
        assert_eq!(got, expected, "{shown}");
        assert!(server.asked.load(Ordering::SeqCst) > begin, "{shown}");
    }
    assert_eq!(elsewhere.asked.load(Ordering::SeqCst), 0, "no redirect is followed");
    assert_eq!(echo.seen(), 1);
}

/// To a gate that may not verify, a server says no of everybody.
#[tokio::test(flavor = "multi_thread")]
async fn a_no_counts_once_the_server_has_accepted_the_gate() {
    let (server, echo) = (Scripted::start().await, Echo::start().await);
    *server.of_gate.lock().unwrap() = "500 Oops\r\n\r\n".to_owned();
    server.say(
        "403 Forbidden\r\n\r\n{\"detail\":\"You do not have permission to perform this action.\"}",
    );
    let sandbox = Sandbox::new();
    let gate = sidecar(&sandbox, &echo, &server.url, "");
    unready(&gate, "has not accepted this gate yet: the server refuses with 500").await;
    assert_eq!(status(&gate, "alice", "shop", "123456").await, 503);
    assert!(gate.wait_for_log(|line| line["reason"] == "remote_unchecked").is_some());
    *server.of_gate.lock().unwrap() = OK.to_owned();
    let gate = gate.ready().await;
    assert_eq!(status(&gate, "alice", "shop", "123456").await, 401);
    // A yes says as much as an answer about the gate.
    *server.of_gate.lock().unwrap() = "500 Oops\r\n\r\n".to_owned();
    unready(&gate, "was last heard").await;
    server.say(OK);
    assert_eq!(status(&gate, "alice", "shop", "123456").await, 200);
    assert_eq!(readiness(&gate).await.0, 200);
}

#[tokio::test]
async fn a_gate_has_a_store_or_a_server() {
    let sandbox = Sandbox::new();
    let seed = sandbox.write("gate.seed", VERIFIER);
    let config = sandbox.write(
        "both.toml",
        &format!(
            "[remote]\nurl = 'http://127.0.0.1:1'\nname = 'a'\nseed_file = '{}'\n",
            seed.display()
        ),
    );
    let run = |args: &[&str]| {
        let mut command = otpgate();
        command.args(args).arg("--config").arg(&config).current_dir(sandbox.path(""));
        let output = command.output().unwrap();
        (output.status.code(), stderr(&output))
    };
    assert_eq!(run(&["check", "--strict"]), (Some(0), String::new()));
    let (code, both) = run(&["check", "--store", "sqlite:x.db"]);
    assert_eq!(code, Some(1));
    assert!(both.contains("store.url (--store): [remote] is set too"), "{both}");
    let (code, none) = run(&["store", "init"]);
    assert_eq!(code, Some(2));
    assert!(none.contains("has [remote], and so no store"), "{none}");
    assert!(!sandbox.path("otpgate.db").exists());
    let (code, clash) = run(&["check", "--remote", "http://127.0.0.1:1", "--store", "sqlite:x.db"]);
    assert_eq!(code, Some(2), "{clash}");
}
