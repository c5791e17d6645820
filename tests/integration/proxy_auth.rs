//! Who passes the gate, with which identity, and what everybody else hears.

use std::time::Duration;

use otpgate::config::HeaderNames;
use otpgate::entry::{Principal, Realm};
use otpgate::policy::{Access, Grant, Mode, Route};

use crate::log_lines::{Lines, collect};
use crate::peers::echo::Echo;
use crate::peers::gate::{Gate, Setup, plain};
use crate::peers::until;
use crate::peers::wire::{Answer, Connection, ask, header};

fn realm(name: &str) -> Access {
    Access::Allow(vec![Grant::Realm(Realm::parse(name).unwrap())])
}

async fn started() -> (Echo, Gate) {
    let echo = Echo::start().await;
    let gate = Setup::to(plain(echo.address)).start().await;
    (echo, gate)
}

fn assert_refused(answer: &Answer, status: u16) {
    assert_eq!(answer.status, status, "{}", answer.head);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    assert!(answer.header("date").is_some());
    assert_eq!(answer.header("server"), None);
    let json = answer.json();
    assert!(json["detail"].as_str().is_some_and(|detail| !detail.is_empty()));
    assert_eq!(json["request_id"].as_str(), answer.header("x-request-id"));
    assert_eq!(json["request_id"].as_str().map(str::len), Some(32));
}

#[tokio::test]
async fn a_proven_principal_passes_with_its_identity_and_without_its_token() {
    let (_echo, gate) = started().await;
    let answer = ask(gate.tcp(), gate.get("/%61?q=/../x")).await;
    assert_eq!(answer.status, 200);
    let seen = answer.text();
    assert!(seen.starts_with("GET /a?q=/../x HTTP/1.1\r\n"), "{seen}");
    assert_eq!(header(&seen, "host"), Some("gate"));
    assert_eq!(header(&seen, "x-auth-name"), Some("alice"));
    assert_eq!(header(&seen, "x-auth-realm"), Some("staff"));
    assert_eq!(header(&seen, "x-auth-token"), None);
    assert!(!seen.contains(&gate.token(&gate.alice)));
    assert_eq!(header(&seen, "x-forwarded-for"), Some("127.0.0.1"));
    assert_eq!(header(&seen, "x-forwarded-proto"), Some("http"));
    assert_eq!(header(&seen, "x-forwarded-host"), Some("gate"));
    assert_eq!(header(&seen, "forwarded"), Some("for=127.0.0.1;proto=http;host=\"gate\""));
    assert_eq!(header(&seen, "x-request-id"), answer.header("x-request-id"));
    assert_eq!(answer.header("keep-alive"), None, "the upstream's own connection");
    assert_eq!(
        gate.metric(
            r#"otpgate_requests_total{listener="proxy",outcome="allowed",route="protected"}"#
        ),
        1.0
    );
}

#[tokio::test]
async fn upstreams_get_other_headers_as_they_came_but_for_the_case_of_their_names() {
    let (_echo, gate) = started().await;
    let own = "X-CamelCase: VaLue\r\nX-Twice: a\r\nAccept: */*\r\nX-Twice: B\r\n\
               content-type: x/y\r\n\r\n";
    let request = gate.get("/").replace("\r\n\r\n", &format!("\r\n{own}"));
    let seen = ask(gate.tcp(), request).await.text();
    let lines: Vec<_> = seen.lines().collect();
    for line in ["Host: gate", "x-camelcase: VaLue", "accept: */*", "Content-Type: x/y"] {
        assert_eq!(lines.iter().filter(|other| **other == line).count(), 1, "{line}: {seen}");
    }
    let twice: Vec<_> = lines.iter().filter(|line| line.starts_with("x-twice")).collect();
    assert_eq!(twice, [&"x-twice: a", &"x-twice: B"]);
}

/// RFC 9110 section 7.6.1. Each alone, since it is looked for whether there is any.
#[tokio::test]
async fn headers_of_the_clients_connection_stay_behind() {
    let (_echo, gate) = started().await;
    let proof = gate.proof();
    let sent = async |line: &str| {
        let request = format!("POST / HTTP/1.1\r\nHost: gate\r\nX-Hop: 1\r\n{line}\r\n{proof}\r\n");
        let body = if line.starts_with("Transfer") { "0\r\n\r\n" } else { "" };
        let answer = ask(gate.tcp(), request + body).await;
        assert_eq!(answer.status, 200, "{line}");
        answer.text()
    };
    for line in [
        "Keep-Alive: 5",
        "Proxy-Connection: keep-alive",
        "Proxy-Authenticate: Basic",
        "Proxy-Authorization: Basic YTpi",
        "TE: trailers",
        "Trailer: X-Last",
        "Upgrade: h2c",
        "HTTP2-Settings: AAMAAABkAAQAAP__",
        "Connection: keep-alive",
        "Connection: close, X-Hop",
    ] {
        let seen = sent(line).await;
        let (name, nominates) = (line.split(':').next().unwrap(), line.ends_with("X-Hop"));
        assert_eq!(header(&seen, name), None, "{line}");
        assert_eq!(header(&seen, "x-hop").is_none(), nominates, "{line}");
    }
    assert_eq!(header(&sent("Transfer-Encoding: chunked").await, "x-hop"), Some("1"));
}

#[tokio::test]
async fn every_401_is_the_same_and_keeps_the_connection() {
    let (echo, gate) = started().await;
    let lines = |name: &str, realm: &str, token: &str| {
        format!("X-Auth-Name: {name}\r\nX-Auth-Realm: {realm}\r\nX-Auth-Token: {token}\r\n")
    };
    let good = gate.token(&gate.alice);
    let wrong = if good == "000000" { "000001" } else { "000000" };
    let mut connection = Connection::to(gate.tcp()).await;
    let mut details = Vec::new();
    for credentials in [
        String::new(),
        "X-Auth-Name: alice\r\n".to_owned(),
        format!("X-Auth-Token: {good}\r\n"),
        lines("alice", "staff", wrong),
        lines("alice", "staff", "12345"),
        lines("alice", "staff", &format!("{good}0")),
        lines("alice", "guests", &good),
        lines("nobody", "staff", &good),
        lines("Alice", "staff", &good),
    ] {
        let request = format!("GET / HTTP/1.1\r\nHost: gate\r\n{credentials}\r\n");
        let answer = connection.ask(request).await.expect("the connection is kept");
        assert_refused(&answer, 401);
        assert_eq!(answer.header("www-authenticate"), Some("OTP realm=\"otpgate\""));
        assert_eq!(answer.header("connection"), Some("keep-alive"));
        details.push(answer.json()["detail"].clone());
    }
    details.dedup();
    assert_eq!(details.len(), 1);
    assert_eq!(connection.ask(gate.get("/")).await.unwrap().status, 200);
    assert_eq!(echo.seen(), 1);
}

#[tokio::test]
async fn routes_say_who_may_pass() {
    let echo = Echo::start().await;
    let only_alice = Grant::Principal(Principal::parse("alice", "staff").unwrap());
    let mut read_only = Route::new("/read", realm("guests"));
    read_only.methods = vec!["GET".into()];
    let mut setup = Setup::to(plain(echo.address));
    setup.routes = vec![
        Route::new("/staff/", realm("staff")),
        Route::new("/alice", Access::Allow(vec![only_alice])),
        Route::new("/health", Access::Public),
        read_only,
    ];
    let gate = setup.start().await;
    let request = |method: &str, path: &str, proof: String| {
        format!("{method} {path} HTTP/1.1\r\nHost: gate\r\n{proof}\r\n")
    };
    let (alice, bob) = (gate.proof(), gate.proof_of(&gate.bob));
    for (method, path, proof, status) in [
        ("GET", "/staff", &alice, 200),
        ("GET", "/staff/x", &alice, 200),
        ("GET", "/staff", &bob, 403),
        ("GET", "/s%74aff/x", &bob, 403),
        ("GET", "/alice", &bob, 403),
        ("GET", "/alice", &alice, 200),
        ("GET", "/read", &bob, 200),
        ("POST", "/read", &bob, 403),
        ("GET", "/elsewhere", &alice, 403),
        ("GET", "/staff;x/y", &alice, 400),
    ] {
        let answer = ask(gate.tcp(), request(method, path, proof.clone())).await;
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.text());
        if status != 200 {
            assert_refused(&answer, status);
        }
    }
    let unproven = ask(gate.tcp(), request("GET", "/elsewhere", String::new())).await;
    assert_refused(&unproven, 401);
    let public = ask(gate.tcp(), request("GET", "/health", alice.clone())).await;
    assert_eq!(public.status, 200);
    assert!(!public.text().to_lowercase().contains("x-auth"), "public routes bear no identity");
}

/// Upstreams take `A.example.` for the virtual host `a.example`, or do not: no spelling may be decided
/// on as one and served as the other.
#[tokio::test]
async fn no_spelling_of_a_host_leads_to_another_route() {
    let echo = Echo::start().await;
    let mut special = Route::new("/", realm("guests"));
    special.hosts = vec!["a.example".into()];
    let mut setup = Setup::to(plain(echo.address));
    setup.routes = vec![Route::new("/", Access::Public), special];
    let gate = setup.start().await;
    let request = |host: &str, proof: &str| {
        format!("GET / HTTP/1.1\r\nHost: {host}\r\n{proof}Connection: close\r\n\r\n")
    };
    let bob = gate.proof_of(&gate.bob);
    for host in ["a.example", "A.Example", "a.example.", "A.EXAMPLE.:8080", "a.example:443"] {
        assert_refused(&ask(gate.tcp(), request(host, "")).await, 401);
        let seen = ask(gate.tcp(), request(host, &bob)).await.text();
        let forwarded = header(&seen, "host").unwrap();
        assert_eq!(forwarded.split(':').next(), Some("a.example"), "{host}");
        assert_eq!(header(&seen, "x-forwarded-host"), Some(forwarded));
    }
    for host in ["a.example..", ".a.example", "a..example", "a.example:+80", "a.example:1:2"] {
        assert_refused(&ask(gate.tcp(), request(host, &bob)).await, 400);
    }
    assert_eq!(ask(gate.tcp(), request("b.example.", "")).await.status, 200);
}

/// Some upstreams take `delete` for `DELETE`.
#[tokio::test]
async fn no_spelling_of_a_method_leads_to_another_route() {
    let echo = Echo::start().await;
    let mut delete = Route::new("/", realm("guests"));
    delete.methods = vec!["DELETE".into()];
    let mut setup = Setup::to(plain(echo.address));
    setup.routes = vec![delete, Route::new("/", realm("staff"))];
    let gate = setup.start().await;
    for (method, status) in [("DELETE", 403), ("delete", 400), ("Delete", 400), ("trace", 400)] {
        let request = format!("{method} / HTTP/1.1\r\nHost: g\r\n{}\r\n", gate.proof());
        assert_refused(&ask(gate.tcp(), request).await, status);
    }
    assert_eq!(echo.seen(), 0);
}

#[tokio::test]
async fn report_mode_forwards_everything_and_says_what_would_be_refused() {
    let echo = Echo::start().await;
    let mut setup = Setup::to(plain(echo.address));
    setup.mode = Mode::Report;
    setup.routes = vec![Route::new("/staff", realm("staff"))];
    let gate = setup.start().await;
    let spoofed = "X-Auth-Name: alice\r\nX-Auth-Realm: staff\r\nx_auth_name: root\r\n".to_owned();
    for (path, proof) in [
        ("/staff", String::new()),
        ("/staff", spoofed),
        ("/staff", gate.proof_of(&gate.bob)),
        ("/elsewhere", gate.proof()),
    ] {
        let request = format!("GET {path} HTTP/1.1\r\nHost: gate\r\n{proof}\r\n");
        let answer = ask(gate.tcp(), request).await;
        assert_eq!(answer.status, 200);
        let seen = answer.text().to_lowercase();
        assert!(!seen.contains("auth"), "{seen}");
    }
    let line = r#"otpgate_requests_total{listener="proxy",outcome="reported",route="protected"}"#;
    assert_eq!(gate.metric(line), 3.0);
    let proven = ask(gate.tcp(), gate.get("/staff")).await;
    assert_eq!(header(&proven.text(), "x-auth-name"), Some("alice"));
    // What the upstream would read differently is refused all the same.
    let unclear = ask(gate.tcp(), gate.get("/a/../staff")).await;
    assert_refused(&unclear, 400);
}

#[tokio::test]
async fn a_stale_directory_closes_the_gate_until_the_store_is_back() {
    let echo = Echo::start().await;
    let mut setup = Setup::to(plain(echo.address));
    // Longer than a follower needs to say that nothing happened.
    setup.max_stale = Duration::from_secs(2);
    setup.routes = vec![Route::new("/", realm("staff")), Route::new("/health", Access::Public)];
    let mut gate = setup.start().await;
    until("200", || async { ask(gate.tcp(), gate.get("/")).await.status == 200 }).await;
    gate.store.stop();
    until("503", || async { ask(gate.tcp(), gate.get("/")).await.status == 503 }).await;
    let answer = ask(gate.tcp(), gate.get("/")).await;
    assert_refused(&answer, 503);
    assert!(answer.header("retry-after").is_some());
    let unknown = "X-Auth-Name: x\r\nX-Auth-Realm: y\r\nX-Auth-Token: 123456\r\n";
    let unknown = format!("GET / HTTP/1.1\r\nHost: gate\r\n{unknown}\r\n");
    assert_refused(&ask(gate.tcp(), unknown).await, 503);
    assert_eq!(ask(gate.tcp(), gate.get("/health")).await.status, 200);
    gate.store.start();
    until("200", || async { ask(gate.tcp(), gate.get("/")).await.status == 200 }).await;
}

#[tokio::test]
async fn identity_headers_may_have_other_names() {
    let echo = Echo::start().await;
    let mut setup = Setup::to(plain(echo.address));
    let name = http::HeaderName::from_static;
    setup.headers = HeaderNames {
        identity_name: name("remote-user"),
        identity_realm: name("remote-realm"),
        identity_principal: Some(name("remote-principal")),
        ..HeaderNames::default()
    };
    let gate = setup.start().await;
    let spoof = "Remote-User: root\r\nRemote_User: root\r\nREMOTE.REALM: root\r\n\
                 Remote-Principal: root\r\nRemote_Principal: root\r\n";
    let request = format!("GET / HTTP/1.1\r\nHost: gate\r\n{}{spoof}\r\n", gate.proof());
    let seen = ask(gate.tcp(), request).await.text();
    assert_eq!(header(&seen, "remote-user"), Some("alice"));
    assert_eq!(header(&seen, "remote-realm"), Some("staff"));
    assert_eq!(header(&seen, "remote-principal"), Some("alice@staff"));
    assert!(!seen.contains("root"), "{seen}");
    assert!(!seen.to_lowercase().contains("x-auth-"), "{seen}");
}

#[tokio::test]
async fn a_head_request_is_refused_without_a_body() {
    let (_echo, gate) = started().await;
    let mut connection = Connection::to(gate.tcp()).await;
    connection.send("HEAD / HTTP/1.1\r\nHost: gate\r\n\r\n").await;
    let answer = connection.answer_to_head().await.unwrap();
    assert_eq!(answer.status, 401);
    // The next answer begins right behind the head.
    assert_eq!(connection.ask(gate.get("/")).await.unwrap().status, 200);
}

#[tokio::test]
async fn forwarding_headers_and_request_ids_are_kept_from_trusted_proxies_only() {
    let echo = Echo::start().await;
    let extra = "X-Forwarded-For: 198.51.100.7\r\nX-Forwarded-Proto: https\r\n\
                 X-Request-Id: front-1\r\n";
    for (trusted, chain, proto, id) in [
        (vec![], "127.0.0.1", "http", None),
        (vec!["127.0.0.0/8"], "198.51.100.7, 127.0.0.1", "https", Some("front-1")),
    ] {
        let mut setup = Setup::to(plain(echo.address));
        setup.trusted = trusted;
        let gate = setup.start().await;
        let request = format!("GET / HTTP/1.1\r\nHost: gate\r\n{}{extra}\r\n", gate.proof());
        let answer = ask(gate.tcp(), request).await;
        let seen = answer.text();
        assert_eq!(header(&seen, "x-forwarded-for"), Some(chain));
        assert_eq!(header(&seen, "x-forwarded-proto"), Some(proto));
        let got = answer.header("x-request-id").unwrap();
        assert_eq!(header(&seen, "x-request-id"), Some(got));
        match id {
            Some(id) => assert_eq!(got, id),
            None => assert_ne!(got, "front-1"),
        }
    }
}

#[tokio::test]
async fn one_line_tells_of_a_request_what_may_be_told() {
    let log = Lines::default();
    let subscriber = tracing_subscriber::fmt()
        .json()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(log.writer())
        .finish();
    // The test's runtime has this one thread.
    let _guard = collect(subscriber);
    let (_echo, gate) = started().await;
    let token = gate.token(&gate.alice);
    let answers = [
        ask(gate.tcp(), gate.get("/path?query=secret")).await,
        ask(
            gate.tcp(),
            "GET /path?query=secret HTTP/1.1\r\nHost: g\r\nX-Auth-Name: mallory\r\n\r\n",
        )
        .await,
        ask(gate.tcp(), gate.get("/bad/../path?query=secret")).await,
        ask(gate.tcp(), gate.get("/bad path") + "GET /second?query=secret HTTP/9.9\r\n\r\n").await,
    ];
    let line_of = |answer: &Answer| {
        let id = answer.header("x-request-id").map(ToOwned::to_owned);
        let id = id.unwrap_or_else(|| answer.json()["request_id"].as_str().unwrap().to_owned());
        let text = log.text();
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .filter(|line: &serde_json::Value| {
                line["target"] == "otpgate::access" && line["fields"]["request_id"] == id.as_str()
            })
            .collect();
        assert!(lines.len() < 2, "{lines:?}");
        lines.into_iter().next().map(|line| line["fields"].clone())
    };
    until("the lines are written", || async { line_of(&answers[2]).is_some() }).await;
    let proven = line_of(&answers[0]).unwrap();
    for (field, value) in [
        ("method", "GET"),
        ("path", "/path"),
        ("outcome", "allowed"),
        ("realm", "staff"),
        ("name", "alice"),
        ("client", "127.0.0.1"),
        ("listener", "proxy"),
    ] {
        assert_eq!(proven[field], value, "{field}");
    }
    assert_eq!(proven["status"], 200);
    assert!(proven["duration_ms"].as_f64().unwrap() >= proven["upstream_ms"].as_f64().unwrap());
    let unproven = line_of(&answers[1]).unwrap();
    assert_eq!(unproven["outcome"], "unauthenticated");
    assert_eq!(unproven["reason"], "credentials_missing");
    let unclear = line_of(&answers[2]).unwrap();
    assert_eq!((&unclear["status"], &unclear["reason"]), (&400.into(), &"bad_path".into()));
    let all = log.text();
    for secret in ["secret", "mallory", "..", &token] {
        assert!(!all.contains(secret), "{secret} in {all}");
    }
}
