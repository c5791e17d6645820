//! No secret leaves the program where it was not promised, whatever is sent to it and whatever fails.

use bytes::Bytes;
use otpgate::clock::{Clock as _, SystemClock};
use otpgate::entry::{Algorithm, Seed};
use otpgate::otp::{Generator, TokenParams};
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::harness::{
    ADMIN, ALICE, Gate, Sandbox, VERIFIER, address, free_port, http, otpgate, stderr, stdout,
};
use crate::peers::echo::Echo;
use crate::peers::h2peer;
use crate::peers::wire::Connection;

/// Secrets that are no seeds of entries: what people mistype, or put where it does not belong.
const JUNK_SEED: &str = "S3CR3TSEED!0189";
const PASSWORD: &str = "hunter2-p4ssw0rd";

/// The token of a seed some steps from now, with eight digits: six turn up by chance.
fn token(seed: &str, steps: i64) -> String {
    let params = TokenParams { algorithm: Algorithm::Sha1, digits: 8, step_seconds: 30 };
    let generator = Generator::new(&Seed::parse(seed).unwrap(), params);
    generator.token_at(SystemClock.now().unix.saturating_add_signed(steps * 30))
}

/// Everything secret that a test sends or stores.
struct Secrets(Vec<String>);

impl Secrets {
    fn of(sandbox: &Sandbox) -> Self {
        let key = std::fs::read_to_string(sandbox.path("otpgate.db.key")).unwrap();
        let mut all = vec![key.trim().to_owned(), JUNK_SEED.into(), PASSWORD.into()];
        for seed in [ADMIN, ALICE, VERIFIER] {
            all.push(seed.to_owned());
            // Wrong ones too, and those of a step that begins during the test.
            all.extend([-20, -1, 0, 1, 2].map(|steps| token(seed, steps)));
        }
        Self(all)
    }

    #[track_caller]
    fn are_not_in(&self, what: &str, text: &str) {
        for secret in &self.0 {
            assert!(!text.contains(secret.as_str()), "{what}: {secret} in {text}");
        }
    }
}

/// Sends bytes, and gives what comes back, if anything.
async fn raw(to: &str, bytes: impl AsRef<[u8]>) -> String {
    let answer = Connection::to(address(to)).await.ask(bytes).await;
    answer.map(|answer| format!("{}\n{}", answer.head, answer.text())).unwrap_or_default()
}

/// Good, wrong and broken requests to the proxy, over HTTP/1.1 and HTTP/2; what came back.
async fn call_the_proxy(gate: &Gate) -> Vec<String> {
    let mut answers = Vec::new();
    let send = h2peer::client(TcpStream::connect(address(&gate.proxy)).await.unwrap()).await;
    for token in [token(ALICE, 0), token(ALICE, -20), ALICE.into(), format!("{} ", token(ALICE, 0))]
    {
        for (name, more) in [
            ("alice", ""),
            ("nobody", ""),
            ("alice", "X-Auth-Name: bob\r\n"),
            ("alice", "X_Auth_Token: 1\r\n"),
            ("alice", "Content-Length: 1\r\nContent-Length: 2\r\n"),
            ("alice", "Bad Header\r\n"),
            ("alice", "Bad: a\0b\r\n"),
            ("alice", "Transfer-Encoding: nonsense\r\n"),
        ] {
            let head = format!(
                "GET /a?token={token} HTTP/1.1\r\nHost: gate\r\nX-Auth-Name: {name}\r\n\
                 X-Auth-Realm: shop\r\nX-Auth-Token: {token}\r\n{more}\r\n"
            );
            let answer = raw(&gate.proxy, head).await;
            // The upstream shows the query that it got, and that is the caller's own matter.
            answers.push(answer.replace(&format!("?token={token}"), ""));
        }
        let request = http::Request::get("http://gate/a")
            .header("x-auth-name", "alice")
            .header("x-auth-realm", "shop")
            .header("x-auth-token", &token);
        let (head, body) = h2peer::ask(&send, request.body(()).unwrap()).await;
        answers.push(format!("{head:?} {:?}", Bytes::from(body)));
    }
    answers
}

/// Bodies of every kind, good, wrong and broken, to every endpoint of the API; what came back.
async fn call_the_api(gate: &Gate) -> Vec<String> {
    let mut answers = Vec::new();
    for (seed, name, realm) in [
        (ADMIN, "admin", "ungleich-admin"),
        (VERIFIER, "verifier", "ungleich-auth"),
        (ALICE, "x", "y"),
    ] {
        for token in [token(seed, 0), token(seed, -20)] {
            let fields = [
                ("auth_name", name),
                ("auth_realm", realm),
                ("auth_token", &token),
                ("name", "alice"),
                ("realm", "shop"),
                ("token", ALICE),
                ("seed", JUNK_SEED),
                ("digits", PASSWORD),
                ("expires_at", ALICE),
            ];
            let json =
                Value::Object(fields.map(|(k, v)| (k.to_owned(), json!(v))).into_iter().collect());
            let json = json.to_string();
            let form = fields.map(|(k, v)| format!("{k}={v}")).join("&");
            let part = |(k, v)| {
                format!("--B\r\nContent-Disposition: form-data; name=\"{k}\"\r\n\r\n{v}\r\n")
            };
            let multipart = format!("{}--B--\r\n", fields.map(part).concat());
            let bodies = [
                ("application/json", json.clone()),
                ("application/json", json[..json.len() - 1].to_owned()),
                ("application/json", json.replace(':', "=")),
                ("application/json", format!("{json}{json}")),
                ("application/json", format!("[{json}]")),
                ("application/json", json.replace("\"name\"", "\"auth_token\"")),
                ("application/json; charset=utf-16", json.clone()),
                ("application/json; charset=nonsense", json.clone()),
                ("application/x-www-form-urlencoded", form.clone()),
                ("application/x-www-form-urlencoded", format!("{form}&{form}")),
                ("multipart/form-data; boundary=B", multipart.clone()),
                ("multipart/form-data; boundary=B", multipart[..multipart.len() - 9].to_owned()),
                ("multipart/form-data; boundary=C", multipart.clone()),
                ("text/plain", json.clone()),
                ("", json),
            ];
            for (method, path) in [
                ("GET", "/ungleichotp/"),
                ("POST", "/ungleichotp/"),
                ("PUT", "/ungleichotp/3/"),
                ("PATCH", "/ungleichotp/99/"),
                ("DELETE", "/ungleichotp/x/"),
                ("TRACE", "/ungleichotp/"),
                ("POST", "/verify"),
                ("GET", "/verify"),
                ("POST", "/nonsense"),
            ] {
                for (kind, body) in &bodies {
                    let head = format!(
                        "{method} {path}?token={token} HTTP/1.1\r\nHost: gate\r\nContent-Type: {kind}\r\n\
                         X-Auth-Token: {token}\r\nContent-Length: {}\r\n\r\n{body}",
                        body.len()
                    );
                    let answer = raw(&gate.api, head).await;
                    // Admins are promised seeds: of lists and of what they make.
                    let promised = method == "GET" || answer.contains("201 Created");
                    if !(seed == ADMIN && promised && answer.contains("\"seed\"")) {
                        answers.push(answer);
                    }
                }
            }
        }
    }
    let broken = format!("GET /\0 HTTP/9\r\nX-Auth-Token: {}\r\nbroken\r\n\r\n", token(ALICE, 0));
    for listener in [&gate.proxy, &gate.api, &gate.ops] {
        answers.push(raw(listener, &broken).await);
    }
    answers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gate_tells_no_secret_at_any_level() {
    let sandbox = Sandbox::with_entries();
    let secrets = Secrets::of(&sandbox);
    let echo = Echo::start().await;
    let audit = sandbox.path("audit.json");
    let settings = format!(
        "[proxy]\nupstream = '{}'\nh2c = true\n[totp]\ndigits = 8\n[log]\nlevel = 'trace'\naudit = 'file:{}'\n[throttle]\nenabled = false\n",
        echo.address,
        audit.display()
    );
    let gate = sandbox.serve(&settings).ready().await;
    let mut answers = call_the_proxy(&gate).await;
    assert!(echo.seen() >= 2, "some were let through");
    answers.extend(call_the_api(&gate).await);
    assert!(answers.len() > 300);
    for answer in &answers {
        secrets.are_not_in("an answer", answer);
    }
    let metrics = http().get(format!("{}/metrics", gate.ops)).send().await.unwrap();
    secrets.are_not_in("the metrics", &metrics.text().await.unwrap());
    let arguments = std::fs::read(format!("/proc/{}/cmdline", gate.pid())).unwrap();
    secrets.are_not_in("the process list", &String::from_utf8_lossy(&arguments));
    gate.signal(libc::SIGTERM);
    gate.wait_for_log(|line| line["message"] == "stopped").unwrap();
    let log = gate.log_text();
    assert!(log.matches("otpgate::access").count() > 300, "{log}");
    secrets.are_not_in("the log", &log);
    let trail = std::fs::read_to_string(audit).unwrap();
    assert!(trail.matches("wrong_token").count() > 10 && trail.contains("\"done\""));
    secrets.are_not_in("the audit trail", &trail);
}

#[test]
fn commands_that_fail_tell_no_secret() {
    let sandbox = Sandbox::with_entries();
    let secrets = Secrets::of(&sandbox);
    let port = free_port();
    let store = sandbox.store();
    let redis = format!("redis://:{PASSWORD}@127.0.0.1:{port}");
    let server = format!("http://127.0.0.1:{port}");
    let file = |name: &str, text: String| sandbox.write(name, &text).display().to_string();
    let junk = file("junk", format!("{JUNK_SEED}\n"));
    let key = file("key", std::fs::read_to_string(sandbox.path("otpgate.db.key")).unwrap());
    let record = |seed: &str| {
        json!([{ "model": "otpauth.otpseed", "pk": 7, "fields": { "name": "n", "realm": "r", "seed": seed } }])
            .to_string()
    };
    let clash = json!([{ "model": "otpauth.otpseed", "pk": 3, "fields": { "name": "q", "realm": "r", "seed": ALICE } }]);
    let dumps = [
        file("a.json", record(JUNK_SEED)),
        file("b.json", record(ALICE).replace("\"pk\"", "pk")),
        file("c.json", format!("{}{PASSWORD}", record(ALICE))),
        file("d.json", clash.to_string()),
        file("e.json", record(ALICE).replace("\"n\"", "5")),
    ];
    let configs = [
        file(
            "a.toml",
            format!("[store]\nurl = '{redis}x'\npassword = '{PASSWORD}'\nkey_file = '{junk}'\n"),
        ),
        file("b.toml", format!("[store]\nurl = 'redis:{PASSWORD}@h'\n")),
        file("c.toml", format!("[store]\npassword = '{PASSWORD}\n")),
        file(
            "d.toml",
            format!("[store]\npassword = ['{PASSWORD}']\nkey_file = '{junk}'\nurl = 'redis://h'\n"),
        ),
        file("e.toml", format!("[proxy]\nupstream = 'http://u:{PASSWORD}@h'\n")),
    ];
    let client = ["client", "--server-url", &server, "--auth-name", "a", "--auth-realm", "b"];
    let client =
        |more: &[&str]| [&client[..], more].concat().into_iter().map(str::to_owned).collect();
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let mut calls: Vec<Vec<String>> = vec![
        words(&["token", "--seed-file", &junk]),
        words(&["token"]),
        client(&["list", "--auth-seed", JUNK_SEED]),
        client(&["list", "--auth-seed", ALICE]),
        client(&["list", "--auth-seed-file", &junk]),
        client(&["list", "--auth-token", &token(ALICE, 0)]),
        client(&["list", "--auth-token", &token(ALICE, 0), "--auth-seed", ALICE]),
        client(&[
            "verify",
            "--name",
            "a",
            "--realm",
            "b",
            "--seed",
            JUNK_SEED,
            "--auth-seed",
            ALICE,
        ]),
        client(&["list"]),
        words(&["store", "bootstrap", "--name", "z", "--store", &store, "--seed-file", &junk]),
        words(&["store", "init", "--store", &redis, "--key-file", &key]),
        words(&["store", "init", "--store", &redis, "--key-file", &junk]),
        words(&["store", "init", "--store", &format!("redis:{PASSWORD}@h"), "--key-file", &key]),
    ];
    calls.extend(dumps.iter().map(|dump| words(&["store", "import", "--store", &store, dump])));
    for config in &configs {
        calls.extend(["check", "serve"].map(|command| words(&[command, "--config", config])));
        calls.push(words(&["check", "--json", "--config", config]));
    }
    for args in calls {
        let mut command = otpgate();
        command.args(&args).env("OTPGATE_SEED", JUNK_SEED).env("UNGLEICHOTPSEED", JUNK_SEED);
        let output = command.output().unwrap();
        assert!(!output.status.success(), "{args:?}");
        let said = format!("{}{}", stdout(&output), stderr(&output));
        assert!(!said.is_empty(), "{args:?}");
        secrets.are_not_in(&format!("{args:?}"), &said);
    }
}
