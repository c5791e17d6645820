//! `otpgate serve` on stores in trouble, what it counts and logs about them, and whether `otpgate check`
//! foretells how it starts.

use std::path::Path;
use std::time::Duration;

use otpgate::clock::{Clock as _, SystemClock};
use otpgate::seal::Sealer;
use serde_json::{Value, json};

use crate::harness::{
    ADMIN, ALICE, Gate, Sandbox, eventually, free_port, http, otpgate, shows_token, stderr, stdout,
    token, wrong_token,
};
use crate::redis_server::{Options, RedisServer};

/// Longest time in which a write must be answered, whatever the store does.
const BOUND: Duration = Duration::from_secs(12);

/// An upstream that is not there: who passes the gate gets 502.
fn nobody() -> String {
    format!("[proxy]\nupstream = '127.0.0.1:{}'\n", free_port())
}

async fn status(gate: &Gate, token: &str) -> u16 {
    gate.call("/x", "alice", "shop", token).send().await.unwrap().status().as_u16()
}

/// Creates an entry through the API.
async fn create(gate: &Gate, admin: &str, name: &str) -> (u16, Value) {
    let body = json!({
        "auth_name": "admin", "auth_realm": "ungleich-admin", "auth_token": token(admin),
        "name": name, "realm": "shop",
    });
    let url = format!("{}/ungleichotp/", gate.api);
    let answer = http().post(url).json(&body).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

/// The value of a metric with these labels; 0 if it is not there.
async fn metric(gate: &Gate, line: &str) -> f64 {
    let text = http().get(format!("{}/metrics", gate.ops)).send().await.unwrap();
    let text = text.text().await.unwrap();
    let value = text.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(' '));
    value.map_or(0.0, |value| value.parse().unwrap())
}

#[tokio::test]
async fn operations_of_the_store_are_counted_and_timed() {
    let sandbox = Sandbox::with_entries();
    let gate = sandbox.serve(&nobody()).ready().await;
    let timed = |operation: &str| {
        format!(
            "otpgate_store_operation_duration_seconds_count{{operation=\"{operation}\",store=\"sqlite\"}}"
        )
    };
    assert_eq!(metric(&gate, &timed("commit")).await, 0.0);
    assert_eq!(create(&gate, ADMIN, "new").await.0, 201);
    for operation in ["init", "reserve_id", "commit"] {
        assert_eq!(metric(&gate, &timed(operation)).await, 1.0, "{operation}");
    }
    assert_eq!(metric(&gate, "otpgate_directory_changes_total").await, 1.0);
    assert_eq!(metric(&gate, "otpgate_directory_full_loads_total").await, 1.0);
    assert_eq!(metric(&gate, "otpgate_directory_apply_lag_seconds_count").await, 1.0);

    // A failure is counted once, and timed like a success.
    assert_eq!(create(&gate, ADMIN, "new").await.0, 400);
    let conflict =
        "otpgate_store_errors_total{cause=\"conflict\",operation=\"commit\",store=\"sqlite\"}";
    assert_eq!(metric(&gate, conflict).await, 1.0);
    assert_eq!(metric(&gate, &timed("commit")).await, 2.0);
    let text = http().get(format!("{}/metrics", gate.ops)).send().await.unwrap();
    let text = text.text().await.unwrap();
    let errors: Vec<_> =
        text.lines().filter(|l| l.starts_with("otpgate_store_errors_total{")).collect();
    assert_eq!(errors.len(), 1, "{errors:?}");
}

#[tokio::test]
async fn a_locked_file_fails_writes_in_bounded_time_and_disturbs_nobody_else() {
    let sandbox = Sandbox::with_entries();
    let unthrottled = format!("{}[throttle]\nenabled = false\n", nobody());
    let gate = sandbox.serve(&unthrottled).ready().await;
    let lock = rusqlite::Connection::open(sandbox.path("otpgate.db")).unwrap();
    lock.execute_batch("BEGIN EXCLUSIVE").unwrap();
    let start = SystemClock.now().monotonic;
    // Far more writes than threads that could wait for the lock.
    let writes = (0..40).map(|i| {
        let gate = &gate;
        async move { create(gate, ADMIN, &format!("n{i}")).await.0 }
    });
    let writes = futures_util::future::join_all(writes);
    let calls = async {
        for _ in 0..20 {
            assert_eq!(status(&gate, &token(ALICE)).await, 502, "let through");
            assert_eq!(status(&gate, &wrong_token(ALICE)).await, 401);
            let ready = http().get(format!("{}/readyz", gate.ops)).send().await.unwrap();
            assert_eq!(ready.status(), 200);
        }
        start.elapsed()
    };
    let (writes, calls) = tokio::join!(writes, calls);
    assert!(writes.iter().all(|status| *status == 503), "{writes:?}");
    assert!(start.elapsed() < BOUND, "{:?}", start.elapsed());
    // Forty of them, one after another: if each waited for the lock, they would take minutes.
    assert!(calls < Duration::from_secs(20), "callers wait for nobody: {calls:?}");
    lock.execute_batch("ROLLBACK").unwrap();
    assert_eq!(create(&gate, ADMIN, "after").await.0, 201);
}

/// A sandbox whose store is in Redis, with the settings for it, and the admin's seed.
struct OnRedis {
    sandbox: Sandbox,
    server: RedisServer,
    settings: String,
    admin: String,
    key: String,
}

const PASSWORD: &str = "r3dis-p4ssw0rd";

impl OnRedis {
    fn new() -> Self {
        let options = Options { aof: true, password: Some(PASSWORD.into()), ..Options::default() };
        let server = RedisServer::start(options);
        let sandbox = Sandbox::new();
        let key = Sealer::random_key().to_string();
        let key_file = sandbox.write("sealing.key", &key);
        let url = sandbox.write("url", &format!("redis://:{PASSWORD}@127.0.0.1:{}\n", server.port));
        let settings = format!(
            "{}[store]\nurl_file = '{}'\nkey_file = '{}'\nmax_stale = '2s'\n",
            nobody(),
            url.display(),
            key_file.display()
        );
        let config = sandbox.write("bootstrap.toml", &settings);
        let mut command = otpgate();
        command.args(["store", "bootstrap", "--json", "--config"]).arg(config);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let made: Value = serde_json::from_str(&stdout(&output)).unwrap();
        let admin = made["seed"].as_str().unwrap().to_owned();
        Self { sandbox, server, settings, admin, key }
    }

    async fn serve(&self, more: &str) -> Gate {
        self.sandbox.serve(&format!("{}{more}", self.settings)).ready().await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_redis_disturbs_callers_only_after_max_stale() {
    let redis = tokio::task::block_in_place(OnRedis::new);
    let gate = redis.serve("").await;
    let (code, alice) = create(&gate, &redis.admin, "alice").await;
    assert_eq!(code, 201);
    let alice = alice["seed"].as_str().unwrap().to_owned();
    assert_eq!(status(&gate, &token(&alice)).await, 502, "let through");

    redis.server.signal(libc::SIGSTOP);
    assert_eq!(status(&gate, &token(&alice)).await, 502, "still let through");
    let start = SystemClock.now().monotonic;
    let (code, answer) = create(&gate, &redis.admin, "bob").await;
    assert_eq!(code, 503, "{answer}");
    assert!(start.elapsed() < BOUND, "{:?}", start.elapsed());
    eventually("the gate closes", || async {
        (status(&gate, &token(&alice)).await == 503).then_some(())
    })
    .await;
    assert_eq!(status(&gate, &wrong_token(&alice)).await, 503, "nobody can say");
    let ready = http().get(format!("{}/readyz", gate.ops)).send().await.unwrap();
    assert_eq!(ready.status(), 503);
    let live = http().get(format!("{}/livez", gate.ops)).send().await.unwrap();
    assert_eq!(live.status(), 200);

    redis.server.signal(libc::SIGCONT);
    eventually("the gate opens again", || async {
        (status(&gate, &token(&alice)).await == 502).then_some(())
    })
    .await;
    assert_eq!(create(&gate, &redis.admin, "carol").await.0, 201);
    assert_eq!(metric(&gate, "otpgate_directory_full_loads_total").await, 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_is_written_at_any_level() {
    let mut redis = tokio::task::block_in_place(OnRedis::new);
    let gate = redis.serve("[log]\nlevel = 'trace'\n").await;
    let (code, alice) = create(&gate, &redis.admin, "alice").await;
    assert_eq!(code, 201);
    let alice = alice["seed"].as_str().unwrap().to_owned();
    let (good, bad) = (token(&alice), wrong_token(&alice));
    assert_eq!(status(&gate, &good).await, 502);
    assert_eq!(status(&gate, &bad).await, 401);
    // An entry that does not open, a server that is away and one that wants another password.
    redis.server.run::<()>(&["SET", "{otpgate}:e:shop/alice", "9:2:junk"]);
    redis.server.change_password("0ther-p4ssw0rd");
    eventually("the refusal is logged", || async {
        gate.log_text().contains("refuses access").then_some(())
    })
    .await;
    let list = json!({
        "auth_name": "admin", "auth_realm": "ungleich-admin", "auth_token": token(&redis.admin),
    });
    let url = format!("{}/ungleichotp/", gate.api);
    let _ = http().get(url).json(&list).send().await.unwrap();
    gate.signal(libc::SIGTERM);
    gate.wait_for_log(|line| line["message"] == "stopped").unwrap();

    let log = gate.log_text();
    let key = redis.key.trim_end_matches('=');
    for secret in [PASSWORD, "0ther-p4ssw0rd", key, &redis.admin, &alice] {
        assert!(!log.contains(secret), "{secret} in {log}");
    }
    for token in [&good, &bad, &token(&redis.admin)] {
        assert!(!shows_token(&log, token), "{token} in {log}");
    }
    assert!(log.contains(":***@127.0.0.1"), "the URL is shown without its password: {log}");
}

/// What `command` says about the settings, if it refuses them.
fn refusal(sandbox: &Sandbox, command: &str, settings: &Path) -> Option<String> {
    let mut program = otpgate();
    program.args([command, "--config"]).arg(settings).current_dir(sandbox.path(""));
    if command == "check" {
        let output = program.output().unwrap();
        return (!output.status.success()).then(|| stderr(&output));
    }
    program.args(["--log-format", "json"]);
    Gate::spawn(program).err().map(|output| stderr(&output))
}

#[test]
fn check_refuses_what_serve_refuses() {
    let listen = "listen = '127.0.0.1:0'\n";
    let base = |proxy: &str, api: &str, store: &str| {
        format!("[ops]\n{listen}[proxy]\n{listen}{proxy}\n[api]\n{listen}{api}\n[store]\n{store}\n")
    };
    let lost = Sandbox::with_entries();
    std::fs::remove_file(lost.path("otpgate.db.key")).unwrap();
    let with_junk = || {
        let sandbox = Sandbox::new();
        sandbox.write("junk", "s3cr3t");
        sandbox
    };
    let redis = "url = 'redis://h'\nsealing = 'off'\n";
    for (sandbox, settings, expected) in [
        (lost, base("", "", ""), Some("is missing, though the database")),
        (with_junk(), base("", "", "key_file = 'junk'"), Some("is not a sealing key")),
        (with_junk(), base("", "", "key_file = 'absent'"), Some("No such file")),
        (
            with_junk(),
            base("", "", "old_key_files = ['junk']\nkey_file = 'junk'"),
            Some("is not a"),
        ),
        (with_junk(), base("", "", "url = 'sqlite:absent/o.db'"), Some("No such file")),
        (with_junk(), base("", "", &format!("{redis}username = 'u'")), Some("without a password")),
        (
            with_junk(),
            base("", "", "url = 'rediss://h'\nsealing = 'off'\nca_file = 'junk'"),
            Some("`store.ca_file` holds no certificate"),
        ),
        (
            with_junk(),
            base("upstream = { url = 'https://h', ca_file = 'junk' }", "", ""),
            Some("`junk`"),
        ),
        (with_junk(), base("", "tls_cert_file = 'junk'\ntls_key_file = 'junk'", ""), Some("junk")),
        (with_junk(), base("", "", ""), None),
        (with_junk(), base("", "", redis), None),
    ] {
        let file = sandbox.write("otpgate.toml", &settings);
        let checked = refusal(&sandbox, "check", &file);
        let served = refusal(&sandbox, "serve", &file);
        assert_eq!(checked.is_some(), served.is_some(), "{settings}\n{checked:?}\n{served:?}");
        assert_eq!(checked.is_some(), expected.is_some(), "{settings}\n{checked:?}");
        let (Some(expected), Some(checked), Some(served)) = (expected, checked, served) else {
            continue;
        };
        for said in [checked, served] {
            assert!(said.contains(expected), "{expected}\nin {said}");
            assert!(!said.contains("s3cr3t"), "{said}");
        }
    }
}
