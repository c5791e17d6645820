//! Health, metrics and logs, as kubelet, Prometheus and operators see them.

use std::process::Command;
use std::time::Duration;

use otpgate::metrics::Metrics;
use otpgate::otp::MatchedStep;
use otpgate::store::StoreError;
use serde_json::Value;

use crate::harness::{
    ALICE, Gate, Sandbox, Server, eventually, free_port, http, run_with_input, shows_token, stderr,
    stdout, token, wrong_token,
};

async fn get(gate: &Gate, path: &str) -> (u16, String) {
    let answer = http().get(format!("{}{path}", gate.ops)).send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

#[tokio::test]
async fn health_is_green_while_serving_and_nothing_else_is_there() {
    let sandbox = Sandbox::with_entries();
    let gate = sandbox.serve("").ready().await;
    for path in ["/livez", "/healthz", "/readyz", "/startupz"] {
        assert_eq!(get(&gate, path).await, (200, r#"{"status":"ok"}"#.to_owned()), "{path}");
    }
    for path in ["/", "/ungleichotp/", "/verify", "/metrics/", "//metrics", "/LIVEZ"] {
        assert_eq!(
            get(&gate, path).await,
            (404, r#"{"detail":"Not found."}"#.to_owned()),
            "{path}"
        );
    }
    let post = http().post(format!("{}/metrics", gate.ops)).send().await.unwrap();
    assert_eq!(
        (post.status(), &post.headers()["allow"]),
        (405.try_into().unwrap(), &"GET,HEAD".parse().unwrap())
    );
}

#[tokio::test]
async fn an_unreachable_store_is_red_and_named_and_fails_closed() {
    let sandbox = Sandbox::new();
    let port = free_port();
    let gate = sandbox
        .serve(&format!("[store]\nurl = 'redis://:hunter2@127.0.0.1:{port}'\nsealing = 'off'\n"));
    eventually("the reason shows", || async {
        let (status, body) = get(&gate, "/readyz").await;
        (status == 503 && body.contains("cannot be reached")).then_some(())
    })
    .await;
    assert_eq!(get(&gate, "/livez").await.0, 200);
    assert_eq!(get(&gate, "/startupz").await.0, 503);
    let answer = gate.call("/", "alice", "shop", &token(ALICE)).send().await.unwrap();
    assert_eq!(answer.status(), 503);
    assert!(answer.headers().contains_key("retry-after"));
    let body: Value = answer.json().await.unwrap();
    assert!(body["request_id"].is_string(), "{body}");
    assert!(!gate.log_text().contains("hunter2"));
}

#[tokio::test]
async fn a_file_that_is_no_store_is_red_and_named_and_left_alone() {
    let sandbox = Sandbox::new();
    let text = "these are not the bytes that you are looking for\n".repeat(100);
    let file = sandbox.write("otpgate.db", &text);
    let gate = sandbox.serve("[store]\nsealing = 'off'\n");
    eventually("the reason shows", || async {
        let (status, body) = get(&gate, "/readyz").await;
        (status == 503 && body.contains("unusable")).then_some(())
    })
    .await;
    assert_eq!(std::fs::read_to_string(file).unwrap(), text);
}

#[tokio::test]
async fn a_gate_waits_for_the_folder_of_its_store() {
    let sandbox = Sandbox::new();
    let folder = sandbox.path("later");
    let url = format!("sqlite:{}", folder.join("otpgate.db").display());
    let gate = sandbox.serve(&format!("[store]\nurl = '{url}'\nsealing = 'off'\n"));
    eventually("the reason shows", || async {
        let (status, body) = get(&gate, "/readyz").await;
        (status == 503 && !body.contains("not answered yet")).then_some(())
    })
    .await;
    std::fs::create_dir(&folder).unwrap();
    gate.ready().await;
}

#[tokio::test]
async fn promtool_finds_nothing_to_complain_about() {
    let sandbox = Sandbox::with_entries();
    let gate = sandbox.serve("[realms.shop]\nskew = 1\n").ready().await;
    // Every kind of label shows up before the check.
    let _ = gate.call("/", "alice", "shop", &token(ALICE)).send().await.unwrap();
    let _ = gate.call("/", "alice", "shop", &wrong_token(ALICE)).send().await.unwrap();
    let _ = gate.call("/", "nobody", "nowhere", "123456").send().await.unwrap();
    let (status, text) = get(&gate, "/metrics").await;
    assert_eq!(status, 200);
    for expected in [
        r#"otpgate_verifications_total{realm="shop",reason="ok"} 1"#,
        r#"otpgate_verifications_total{realm="shop",reason="wrong_token"} 1"#,
        r#"otpgate_verifications_total{realm="other",reason="unknown_principal"} 1"#,
        "otpgate_directory_entries 4",
        "otpgate_build_info{version=",
        "process_resident_memory_bytes",
    ] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
    for secret in ["alice", "nobody", "nowhere", ALICE] {
        assert!(!text.contains(secret), "{secret}");
    }
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]);
    let checked = run_with_input(promtool, &text);
    assert!(checked.status.success(), "{}{}", stdout(&checked), stderr(&checked));
    assert_eq!(stderr(&checked) + &stdout(&checked), "");
}

/// Every metric that is declared, as in `r.counter("name", "help")`, whether or not a short run brings it
/// out.
fn declared_metrics() -> Vec<String> {
    let source =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/src/metrics.rs")).unwrap();
    let names = source
        .split(" r")
        .filter_map(|rest| rest.trim_start().strip_prefix('.')?.split_once('('))
        .filter_map(|(_, rest)| rest.trim_start().strip_prefix('"')?.split_once('"'))
        .map(|(name, _)| format!("otpgate_{name}"))
        .collect::<Vec<_>>();
    assert!(names.len() > 20, "{names:?}");
    names
}

#[test]
fn every_metric_is_in_the_docs() {
    let docs = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/operations.md"))
        .unwrap();
    let declared = declared_metrics();
    for name in &declared {
        assert!(docs.contains(&format!("`{name}`")), "{name} is not in the docs");
    }
    for name in docs.split('`').filter(|word| word.starts_with("otpgate_")) {
        let name = name.split(['{', ' ']).next().unwrap();
        assert!(declared.iter().any(|d| d == name), "{name} is only in the docs");
    }
}

/// Every metric with all its labels, also those that a short run does not bring out, as Prometheus gets them.
pub(crate) fn every_metric() -> String {
    let metrics = Metrics::new(["shop".to_owned()]);
    metrics.request("proxy", "public", "allowed");
    metrics.verified("shop", Some(MatchedStep { counter: 1, offset: 0 }));
    metrics.refused("x", "wrong_token");
    metrics.previous_seed("shop");
    metrics.directory_fetched("found");
    metrics.throttled("source");
    metrics.set_throttled("source", 1);
    metrics.upstream(200, Duration::from_millis(1));
    metrics.upstream_failure("connect");
    metrics.upstream_backends.with_label_values(&["healthy"]).set(1);
    metrics.store_operation("sqlite", "get", Duration::from_millis(1));
    metrics.store_error("sqlite", "get", &StoreError::Conflict);
    metrics.remote_question("claim", "ok", Duration::from_millis(1));
    metrics.open_connections("proxy").set(1);
    metrics.connection_refused("proxy", "limit");
    metrics.certificate_expiry.with_label_values(&["proxy"]).set(1.0);
    let text = String::from_utf8(metrics.render()).unwrap();
    for name in declared_metrics() {
        assert!(text.contains(&format!("# HELP {name} ")), "{name} is not in {text}");
    }
    text
}

#[test]
fn promtool_likes_every_metric() {
    let text = every_metric();
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]);
    let checked = run_with_input(promtool, &text);
    assert_eq!(stderr(&checked) + &stdout(&checked), "");
    assert!(checked.status.success());
}

#[tokio::test]
async fn a_real_prometheus_scrapes_it() {
    let sandbox = Sandbox::with_entries();
    let gate = sandbox.serve("").ready().await;
    let port = free_port();
    let config = sandbox.write(
        "prometheus.yml",
        &format!(
            "scrape_configs:\n- job_name: otpgate\n  scrape_interval: 200ms\n  scrape_timeout: 200ms\n  \
             static_configs:\n  - targets: ['{}']\n",
            gate.ops.trim_start_matches("http://")
        ),
    );
    let mut command = Command::new("prometheus");
    command
        .arg(format!("--config.file={}", config.display()))
        .arg(format!("--storage.tsdb.path={}", sandbox.path("tsdb").display()))
        .arg(format!("--web.listen-address=127.0.0.1:{port}"));
    let _prometheus = Server::spawn(&mut command, &sandbox.path("prometheus.log"));
    let query = format!("http://127.0.0.1:{port}/api/v1/query?query=otpgate_directory_entries");
    let value = eventually("Prometheus has scraped the gate", || async {
        let answer: Value = http().get(&query).send().await.ok()?.json().await.ok()?;
        answer["data"]["result"][0]["value"][1].as_str().map(str::to_owned)
    })
    .await;
    assert_eq!(value, "4");
}

#[tokio::test]
async fn sigterm_drains_and_exits_with_0() {
    let sandbox = Sandbox::with_entries();
    let gate = sandbox.serve("").ready().await;
    gate.signal(libc::SIGTERM);
    assert!(gate.wait_for_log(|line| line["message"] == "stopped").is_some());
    assert_eq!(gate.wait().code(), Some(0));
}

#[tokio::test]
async fn access_lines_tell_the_outcome_but_no_secret() {
    let sandbox = Sandbox::with_entries();
    let gate = sandbox.serve("[log]\nlevel = 'trace'\n").ready().await;
    let bad = wrong_token(ALICE);
    let path = "/x?password=hunter2";
    let answer = gate.call(path, "alice", "shop", &bad).send().await.unwrap();
    assert_eq!(answer.status(), 401);
    let id = answer.json::<Value>().await.unwrap()["request_id"].as_str().unwrap().to_owned();
    let good = token(ALICE);
    let _ = gate.call(path, "alice", "shop", &good).send().await.unwrap();
    let line = gate
        .wait_for_log(|l| l["target"] == "otpgate::access" && l["request_id"] == id.as_str())
        .unwrap();
    assert_eq!(line["status"], 401);
    assert_eq!(
        (&line["outcome"], &line["reason"]),
        (&"unauthenticated".into(), &"wrong_token".into())
    );
    assert_eq!(line["path"], "/x");
    gate.wait_for_log(|l| l["target"] == "otpgate::access" && l["name"] == "alice").unwrap();
    let log = gate.log_text();
    for secret in ["hunter2", ALICE] {
        assert!(!log.contains(secret), "{secret} in {log}");
    }
    for token in [&bad, &good] {
        assert!(!shows_token(&log, token), "{token} in {log}");
    }
}

/// Also a request that no application gets to see is in the log, under the id that its answer names.
#[tokio::test]
async fn refused_heads_leave_a_line_too() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let sandbox = Sandbox::with_entries();
    let gate = sandbox.serve("").ready().await;
    for base in [&gate.proxy, &gate.api, &gate.ops] {
        let address = base.trim_start_matches("http://");
        for head in ["nonsense\r\n\r\n", "GET / HTTP/1.1\r\nConnection: close\r\n\r\n"] {
            let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
            stream.write_all(head.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
            let body: Value =
                serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
            let line = gate
                .wait_for_log(|l| {
                    l["target"] == "otpgate::access" && l["request_id"] == body["request_id"]
                })
                .unwrap();
            assert_eq!((&line["status"], &line["outcome"]), (&400.into(), &"malformed".into()));
        }
    }
}

#[test]
fn two_gates_cannot_share_an_address_and_say_so() {
    let sandbox = Sandbox::with_entries();
    let gate = sandbox.serve("");
    let taken = gate.ops.trim_start_matches("http://");
    let Err(output) = sandbox.try_serve(&format!("[ops]\nlisten = '{taken}'\n")) else {
        panic!("it serves")
    };
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    let expected = format!("`ops.listen`: cannot listen on `{taken}`: Address already in use");
    assert!(said.contains(&expected) && said.contains("give another address"), "{said}");
}
