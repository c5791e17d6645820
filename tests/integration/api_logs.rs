//! What the API logs: access lines, audit events, never a secret.

use serde_json::{Value, json};

use crate::api_harness::*;
use crate::log_lines::{Lines, collect};
use crate::peers::wire::Connection;

#[tokio::test]
async fn every_request_leaves_a_line_and_no_secret() {
    let lines = Lines::default();
    let subscriber = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_max_level(tracing::Level::TRACE)
        // Its digits could look like a token.
        .without_time()
        .with_writer(lines.writer())
        .finish();
    let _guard = collect(subscriber);
    let gate = Gate::start().await;
    let made = gate.create(json!({"name": "x", "realm": "users"})).await;
    let path = format!("/ungleichotp/{}/", made["id"]);
    let renamed = gate.call(ADMIN, "PATCH", &path, json!({"name": "y"})).await;
    gate.call(ADMIN, "DELETE", &path, json!({})).await;
    gate.call(USER, "DELETE", "/ungleichotp/3/", json!({})).await;
    gate.send("GET", "/?token=424242", &json!({"auth_token": "13579"})).await;

    let text = lines.text();
    let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of =
        |target: &str| events.iter().filter(|e| e["target"] == target).cloned().collect::<Vec<_>>();
    let mut audit = of("otpgate::audit");
    // What the directory has to tell of changes comes whenever it follows.
    audit.retain(|event| event["request_id"].is_string());
    let actions: Vec<_> = audit.iter().map(|e| e["action"].as_str().unwrap()).collect();
    assert_eq!(actions, ["create", "update", "delete", "delete"]);
    for event in &audit[..3] {
        assert_eq!(
            (&event["outcome"], &event["caller"]),
            (&json!("done"), &json!("admin@ungleich-admin"))
        );
        assert_eq!((&event["id"], &event["realm"]), (&made["id"], &json!("users")));
        assert_eq!(event["client"], "127.0.0.1");
    }
    assert_eq!(audit[1]["request_id"], renamed.headers["x-request-id"].to_str().unwrap());
    assert_eq!((&audit[1]["name"], &audit[1]["new_name"]), (&json!("x"), &json!("y")));
    assert_eq!(audit[1]["changed"], "name");
    assert_eq!(
        (&audit[3]["outcome"], &audit[3]["reason"], &audit[3]["caller"]),
        (&json!("refused"), &json!("forbidden"), &json!("user@users"))
    );
    let access = of("otpgate::access");
    let outcomes: Vec<_> = access.iter().map(|e| e["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["ok", "ok", "ok", "forbidden", "unproven"]);
    assert_eq!((&access[4]["reason"], &access[4]["path"]), (&json!("malformed"), &json!("/")));
    assert_eq!((&access[3]["name"], &access[3]["realm"]), (&json!("user"), &json!("users")));
    for secret in [
        made["seed"].as_str().unwrap(),
        ADMIN_SEED,
        USER_SEED,
        &token(ADMIN_SEED),
        "13579",
        "424242",
    ] {
        assert!(!text.contains(secret), "a secret is in the log");
    }
    let metrics = String::from_utf8(gate.metrics.render()).unwrap();
    assert!(
        metrics.contains(r#"otpgate_requests_total{listener="api",outcome="ok",route="create"} 1"#)
    );
    assert!(metrics.contains(r#"outcome="forbidden",route="delete"} 1"#), "{metrics}");
}

/// One event for each request that would manage entries, whatever became of it, and none for others.
#[tokio::test]
async fn the_trail_holds_every_attempt_to_manage() {
    let lines = Lines::default();
    let subscriber =
        tracing_subscriber::fmt().json().flatten_event(true).with_writer(lines.writer()).finish();
    let _guard = collect(subscriber);
    let gate = Gate::start().await;
    let all = "/ungleichotp/";
    let alice = json!({"name": "alice", "realm": "shop"});
    let made = gate.create(alice.clone()).await;
    let one = format!("/ungleichotp/{}", made["id"]);
    gate.call(ADMIN, "POST", all, alice).await;
    gate.call(ADMIN, "GET", all, json!({})).await;
    gate.call(ADMIN, "GET", &one, json!({})).await;
    gate.call(ADMIN, "PATCH", &one, json!({"enabled": false, "comment": "left"})).await;
    gate.call(ADMIN, "PATCH", &one, json!({"enabled": false})).await;
    gate.call(ADMIN, "PUT", &one, json!({"digits": 5})).await;
    gate.call(ADMIN, "DELETE", "/ungleichotp/999/", json!({})).await;
    gate.call(AUTH, "GET", all, json!({})).await;
    gate.send("DELETE", &one, &json!({})).await;
    let mut wrong = body_of(ADMIN, json!({}));
    wrong["auth_token"] = json!("000");
    gate.send("GET", all, &wrong).await;
    let foreign = gate.request("GET", all).header("Origin", "http://evil.example");
    assert_eq!(foreign.json(&body_of(ADMIN, json!({}))).send().await.unwrap().status(), 403);
    gate.call(ADMIN, "POST", &one, json!({})).await;
    // Not management.
    gate.call(ADMIN, "OPTIONS", all, json!({})).await;
    gate.call(ADMIN, "GET", "/", json!({})).await;
    gate.verify("user", "users", USER_SEED).await;
    gate.call(ADMIN, "GET", "/nonsense", json!({})).await;

    let text = lines.text();
    let events: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|event: &Value| event["target"] == "otpgate::audit")
        // What the directory has to tell of changes comes whenever it follows.
        .filter(|event| event["request_id"].is_string())
        .collect();
    let short = |event: &Value| {
        ["action", "outcome", "reason", "caller", "id", "name", "changed", "seeds"]
            .map(|field| match &event[field] {
                Value::Null => "-".to_owned(),
                Value::String(text) => text.clone(),
                other => other.to_string(),
            })
            .join("|")
    };
    let admin = "admin@ungleich-admin";
    let id = &made["id"];
    let expected = [
        format!("create|done|-|{admin}|{id}|alice|-|true"),
        format!("create|refused|invalid|{admin}|-|alice|-|-"),
        format!("list|done|-|{admin}|-|-|-|true"),
        format!("show|done|-|{admin}|{id}|alice|-|true"),
        format!("update|done|-|{admin}|{id}|alice|enabled=false comment|true"),
        format!("update|done|-|{admin}|{id}|alice|-|true"),
        format!("update|refused|invalid|{admin}|{id}|alice|-|-"),
        format!("delete|refused|not_found|{admin}|999|-|-|-"),
        "list|refused|forbidden|auth@ungleich-auth|-|-|-|-".to_owned(),
        "delete|refused|malformed|-|-|-|-|-".to_owned(),
        "list|refused|wrong_token|-|-|-|-|-".to_owned(),
        "list|refused|foreign_origin|-|-|-|-|-".to_owned(),
        format!("show|refused|method|{admin}|-|-|-|-"),
    ];
    assert_eq!(events.iter().map(short).collect::<Vec<_>>(), expected);
    let ids: std::collections::HashSet<_> =
        events.iter().map(|event| event["request_id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), events.len());
    assert!(events.iter().all(|event| event["client"] == "127.0.0.1"));
}

/// Whatever a name or a path holds, a line of text stays one line, and its fields are ours.
#[tokio::test]
async fn lines_of_text_cannot_be_forged() {
    let lines = Lines::default();
    let subscriber =
        tracing_subscriber::fmt().with_ansi(false).with_writer(lines.writer()).finish();
    let _guard = collect(subscriber);
    let gate = Gate::start().await;
    let name = r#"x outcome=done" id=7 \"#;
    let made = gate.create(json!({"name": name, "realm": "ungleich-admin"})).await;
    let seed = made["seed"].as_str().unwrap().to_owned();
    let triple = json!({
        "auth_name": name, "auth_realm": "ungleich-admin", "auth_token": token(&seed),
        "name": "z", "realm": "r",
    });
    assert_eq!(gate.send("POST", "/ungleichotp/", &triple).await.status, 201);
    gate.send("GET", "/ungleichotp/a\"outcome=ok%0a%1b[2J", &triple).await;

    let text = lines.text();
    let ours: Vec<_> = text.lines().filter(|line| line.contains("otpgate::a")).collect();
    assert_eq!(ours.len(), 8, "{text}");
    for line in ours {
        // Outside of quoted texts each field stands once.
        let mut plain = String::new();
        let (mut quoted, mut escaped) = (false, false);
        for c in line.chars() {
            match c {
                _ if escaped => escaped = false,
                '\\' if quoted => escaped = true,
                '"' => quoted = !quoted,
                _ if quoted => {}
                c => plain.push(c),
            }
        }
        assert_eq!(plain.matches(" outcome=").count(), 1, "{line}");
        assert!(plain.matches(" id=").count() <= 1 && !line.contains('\u{1b}'), "{line}");
    }
}

/// JSON leaves characters as they are that hide or reorder what a reader sees; paths may hold any.
#[tokio::test]
async fn lines_show_paths_in_plain_characters() {
    let lines = Lines::default();
    let subscriber =
        tracing_subscriber::fmt().json().flatten_event(true).with_writer(lines.writer()).finish();
    let _guard = collect(subscriber);
    let gate = Gate::start().await;
    let path = "/\u{2028}\u{9b}2J\u{202e}ü\u{feff}";
    let head = format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", gate.address);
    let answer = Connection::to(gate.address).await.ask(head).await.unwrap();
    assert_eq!(answer.status, 404);
    let text = lines.text();
    let line = text.lines().find(|line| line.contains("otpgate::access")).unwrap();
    assert!(line.contains(r#""path":"/%E2%80%A8%C2%9B2J%E2%80%AE%C3%BC%EF%BB%BF""#), "{line}");
    assert!(line.is_ascii(), "{line}");
}

#[tokio::test]
async fn lines_name_the_client_behind_a_trusted_proxy() {
    for (trusted, shown) in [("127.0.0.0/8", "192.0.2.7"), ("10.0.0.0/8", "127.0.0.1")] {
        let lines = Lines::default();
        let subscriber = tracing_subscriber::fmt()
            .json()
            .flatten_event(true)
            .with_writer(lines.writer())
            .finish();
        let _guard = collect(subscriber);
        let mut setup = Setup::default();
        setup.api.trusted_proxies =
            vec![otpgate::config::TrustedPeer::Network(trusted.parse().unwrap())];
        let gate = Gate::start_with(setup).await;
        let list = gate.request("GET", "/ungleichotp/").header("X-Forwarded-For", "192.0.2.7");
        assert_eq!(list.json(&body_of(ADMIN, json!({}))).send().await.unwrap().status(), 200);
        let text = lines.text();
        let ours: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .filter(|line: &Value| line["request_id"].is_string())
            .collect();
        assert_eq!(ours.len(), 2, "an audit event and an access line: {text}");
        assert!(ours.iter().all(|line| line["client"] == shown), "{text}");
    }
}
