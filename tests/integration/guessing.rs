//! Wrong tokens against the real program: who has to wait, what they are told, and where it counts.

use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{
    ADMIN, ALICE, BOB, Gate, Sandbox, VERIFIER, eventually, http, token, wrong_token,
};
use crate::peers::echo::Echo;

/// Three wrong tokens, then one a minute.
const QUOTA: &str = "[throttle]\nper_source = { failures = 3, per = '3m' }\n";

async fn start(sandbox: &Sandbox, echo: &Echo, proxy: &str, rest: &str) -> Gate {
    let upstream = format!("[proxy]\nupstream = '{}'\n{proxy}", echo.address);
    sandbox.serve(&format!("{upstream}{rest}")).ready().await
}

/// An answer without what differs in every one.
async fn answer(request: reqwest::RequestBuilder) -> (u16, Option<u64>, Vec<String>, Value) {
    let answer = request.send().await.unwrap();
    let retry = answer.headers().get("retry-after").map(|v| v.to_str().unwrap().parse().unwrap());
    let header = |(name, value): (&http::HeaderName, &http::HeaderValue)| match name.as_str() {
        "date" | "x-request-id" | "retry-after" => name.to_string(),
        _ => format!("{name}: {value:?}"),
    };
    let (status, headers) =
        (answer.status().as_u16(), answer.headers().iter().map(header).collect());
    let mut body: Value = answer.json().await.unwrap_or(Value::Null);
    if let Some(body) = body.as_object_mut() {
        body.remove("request_id");
    }
    (status, retry, headers, body)
}

async fn metric(gate: &Gate, line: &str) -> Option<f64> {
    let metrics = http().get(format!("{}/metrics", gate.ops)).send().await.unwrap();
    let text = metrics.text().await.unwrap();
    text.lines().find_map(|l| l.strip_prefix(line)?.trim().parse().ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn guessing_is_stopped_and_looks_the_same_for_every_name() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let gate = start(&sandbox, &echo, "", QUOTA).await;
    let mut told = Vec::new();
    for name in ["alice", "nobody"] {
        let mut answers = Vec::new();
        for _ in 0..3 {
            answers.push(answer(gate.call("/", name, "shop", &wrong_token(ALICE))).await);
        }
        for token in [wrong_token(ALICE), token(ALICE), "x".to_owned()] {
            // Right or wrong, nobody looks at it.
            let (status, retry, headers, body) = answer(gate.call("/", name, "shop", &token)).await;
            assert_eq!(status, 429);
            assert!((30..=60).contains(&retry.unwrap()), "{retry:?}");
            assert_eq!(body, json!({ "detail": "Too many failed attempts." }));
            answers.push((status, None, headers, body));
        }
        assert!(answers[..3].iter().all(|answer| answer.0 == 401));
        told.push(answers);
    }
    assert_eq!(told[0], told[1]);
    assert_eq!(echo.seen(), 0, "nothing reached the upstream");
    // Others at the same address are not concerned.
    let other = gate.call("/", "bob", "lab", &token(BOB)).send().await.unwrap();
    assert_eq!(other.status(), 200);
    assert_eq!(metric(&gate, "otpgate_throttled_total{by=\"source\"}").await, Some(6.0));
    eventually("the gauge says so", || async {
        (metric(&gate, "otpgate_throttled{by=\"source\"}").await == Some(2.0)).then_some(())
    })
    .await;
    let event = gate.wait_for_log(|line| line["action"] == "throttle").unwrap();
    assert_eq!((&event["name"], &event["client"]), (&json!("alice"), &json!("127.0.0.1")));
    assert!(!gate.log_text().contains("\"nobody\""), "names that prove nothing are not logged");
}

/// One event each time a bucket closes; names that do not exist are in none.
#[tokio::test(flavor = "multi_thread")]
async fn the_trail_tells_which_bucket_closed() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let quotas = "[throttle]\nper_source = { failures = 2, per = '1h' }\n\
                  per_entry = { failures = 3, per = '1h' }\nper_address = { failures = 4, per = '1h' }\n";
    let gate = start(&sandbox, &echo, "trusted_proxies = ['127.0.0.1']\n", quotas).await;
    for (name, from) in [
        ("alice", "192.0.2.1"),
        ("alice", "192.0.2.1"),
        ("alice", "192.0.2.2"),
        ("alice", "192.0.2.3"),
        ("nobody", "192.0.2.4"),
        ("nobody", "192.0.2.4"),
        ("no-one", "192.0.2.4"),
        ("no-one", "192.0.2.4"),
    ] {
        let call = gate.call("/", name, "shop", &wrong_token(ALICE));
        answer(call.header("X-Forwarded-For", from)).await;
    }
    gate.signal(libc::SIGTERM);
    gate.wait_for_log(|line| line["outcome"] == "stopped").unwrap();
    let log = gate.log_text();
    let told: Vec<_> = log
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|line| line["action"] == "throttle")
        .map(|e| {
            ["reason", "client", "name"].map(|field| e[field].as_str().unwrap_or("-").to_owned())
        })
        .collect();
    let expected = [
        ["source", "192.0.2.1", "alice"],
        ["entry", "192.0.2.2", "alice"],
        ["address", "192.0.2.4", "-"],
    ];
    assert_eq!(told, expected, "{log}");
}

/// After the time that was told, the next token is looked at.
#[tokio::test(flavor = "multi_thread")]
async fn waiting_as_long_as_told_is_enough() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let quota = "[throttle]\nper_source = { failures = 2, per = '4s' }\n";
    let gate = start(&sandbox, &echo, "", quota).await;
    let retry = loop {
        if let (429, retry, ..) = answer(gate.call("/", "alice", "shop", &wrong_token(ALICE))).await
        {
            break retry.unwrap();
        }
    };
    assert!((1..=2).contains(&retry), "{retry}");
    tokio::time::sleep(Duration::from_secs(retry)).await;
    let call = gate.call("/", "alice", "shop", &token(ALICE)).send().await.unwrap();
    assert_eq!(call.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_are_those_that_trusted_proxies_name() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let trusting = "trusted_proxies = ['127.0.0.1']\n";
    let gate = start(&sandbox, &echo, trusting, QUOTA).await;
    let guess = async |gate: &Gate, from: &str| {
        let call = gate.call("/", "alice", "shop", &wrong_token(ALICE));
        answer(call.header("X-Forwarded-For", from)).await.0
    };
    for _ in 0..3 {
        assert_eq!(guess(&gate, "203.0.113.1").await, 401);
    }
    assert_eq!(guess(&gate, "203.0.113.1").await, 429);
    // What a client writes in front of its own address changes nothing.
    assert_eq!(guess(&gate, "198.51.100.1, 203.0.113.1").await, 429);
    assert_eq!(guess(&gate, "::ffff:203.0.113.1").await, 429);
    assert_eq!(guess(&gate, "203.0.113.2").await, 401);
    // A network of IPv6 is one source.
    for i in 1..=3 {
        assert_eq!(guess(&gate, &format!("2001:db8::{i}")).await, 401);
    }
    assert_eq!(guess(&gate, "2001:db8::ffff:1").await, 429);
    assert_eq!(guess(&gate, "2001:db8:0:1::1").await, 401);

    let sandbox = Sandbox::with_entries();
    let gate = start(&sandbox, &echo, "", QUOTA).await;
    for i in 0..3 {
        assert_eq!(guess(&gate, &format!("203.0.113.{i}")).await, 401);
    }
    assert_eq!(guess(&gate, "203.0.113.9").await, 429, "nobody is trusted");
}

/// All listeners count in one place, and a restart forgets nothing.
#[tokio::test(flavor = "multi_thread")]
async fn the_api_counts_with_the_proxy() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let gate = start(&sandbox, &echo, "", QUOTA).await;
    let list = |gate: &Gate, token: &str| {
        let body = json!({
            "auth_name": "alice", "auth_realm": "shop", "auth_token": token,
        });
        http().get(format!("{}/ungleichotp/", gate.api)).json(&body)
    };
    assert_eq!(answer(gate.call("/", "alice", "shop", &wrong_token(ALICE))).await.0, 401);
    for _ in 0..2 {
        assert_eq!(answer(list(&gate, &wrong_token(ALICE))).await.0, 403);
    }
    let (status, retry, _, body) = answer(list(&gate, &token(ALICE))).await;
    assert_eq!(status, 429);
    let seconds = retry.unwrap();
    let text = format!("Request was throttled. Expected available in {seconds} seconds.");
    assert_eq!(body, json!({ "detail": text }));
    assert_eq!(answer(gate.call("/", "alice", "shop", &token(ALICE))).await.0, 429);

    gate.signal(libc::SIGTERM);
    assert!(gate.wait().success());
    let gate = start(&sandbox, &echo, "", QUOTA).await;
    // The gate learns with the next failure what was counted before.
    assert_eq!(answer(gate.call("/", "alice", "shop", &wrong_token(ALICE))).await.0, 401);
    eventually("the gate knows", || async {
        (answer(gate.call("/", "alice", "shop", &token(ALICE))).await.0 == 429).then_some(())
    })
    .await;
}

/// A service that asks about its clients says where they are; else it is the source itself.
#[tokio::test(flavor = "multi_thread")]
async fn services_say_for_whom_they_ask() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let gate = start(&sandbox, &echo, "", QUOTA).await;
    let verify = async |source: Option<&str>, asked: &str| {
        let mut body = json!({
            "auth_name": "verifier", "auth_realm": "ungleich-auth", "auth_token": token(VERIFIER),
            "name": "alice", "realm": "shop", "token": asked,
        });
        if let Some(source) = source {
            body["source"] = json!(source);
        }
        answer(http().post(format!("{}/verify", gate.api)).json(&body)).await
    };
    let wrong = wrong_token(ALICE);
    for _ in 0..3 {
        assert_eq!(verify(Some("203.0.113.1"), &wrong).await.0, 403);
    }
    assert_eq!(verify(Some("203.0.113.1"), &token(ALICE)).await.0, 429);
    assert_eq!(verify(Some("203.0.113.2"), &token(ALICE)).await.0, 200);
    for _ in 0..3 {
        assert_eq!(verify(None, &wrong).await.0, 403);
    }
    let (status, retry, ..) = verify(None, &token(ALICE)).await;
    assert_eq!((status, retry.is_some()), (429, true));
    assert_eq!(verify(Some("203.0.113.2"), &token(ALICE)).await.0, 200);
    // The service itself is not held for what its clients do.
    let (status, _, _, body) = verify(Some("somewhere"), &wrong).await;
    assert_eq!(status, 400);
    assert_eq!(body["source"], json!(["Enter a valid IPv4 or IPv6 address."]));
    let lists = json!({
        "auth_name": "admin", "auth_realm": "ungleich-admin", "auth_token": token(ADMIN),
    });
    let list = http().get(format!("{}/ungleichotp/", gate.api)).json(&lists);
    assert_eq!(answer(list).await.0, 200);
}

/// What a service says of its clients concerns nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn services_speak_for_their_own_clients_only() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let gate = start(&sandbox, &echo, "", QUOTA).await;
    let mut told = Vec::new();
    for _ in 0..4 {
        let body = json!({
            "auth_name": "verifier", "auth_realm": "ungleich-auth", "auth_token": token(VERIFIER),
            "name": "alice", "realm": "shop", "token": wrong_token(ALICE), "source": "127.0.0.1",
        });
        let verify = http().post(format!("{}/verify", gate.api)).json(&body);
        told.push(answer(verify).await.0);
    }
    assert_eq!(told, [403, 403, 403, 429]);
    let call = gate.call("/", "alice", "shop", &token(ALICE)).send().await.unwrap();
    assert_eq!(call.status(), 200, "alice herself, from that very address");
    let event = gate.wait_for_log(|line| line["action"] == "throttle").unwrap();
    assert_eq!(event["client"], "127.0.0.1");
    assert!(event["caller"].as_str().unwrap().starts_with("service "), "{event}");
}

#[tokio::test(flavor = "multi_thread")]
async fn throttling_can_be_off() {
    let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
    let gate = start(&sandbox, &echo, "", "[throttle]\nenabled = false\n").await;
    for _ in 0..60 {
        assert_eq!(answer(gate.call("/", "alice", "shop", &wrong_token(ALICE))).await.0, 401);
    }
}
