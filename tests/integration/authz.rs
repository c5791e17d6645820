//! What other proxies are answered, asked as nginx, Traefik, Caddy and Envoy do.

use std::net::SocketAddr;

use tokio::net::UnixStream;

use crate::harness::{ALICE, BOB, Gate, Sandbox, address, http, token, wrong_token};
use crate::peers::echo::Echo;
use crate::peers::wire::{Answer, Connection, ask};

/// Who may pass where.
pub(crate) const ROUTES: &str = r#"
[[route]]
path = "/"
allow = ["*"]
[[route]]
path = "/public"
public = true
[[route]]
path = "/admin"
allow = ["lab"]
[[route]]
path = "/read"
methods = ["GET", "HEAD"]
allow = ["shop"]
[[route]]
path = "/watched"
allow = ["lab"]
mode = "report"
[[route]]
path = "/"
hosts = ["lab.example"]
allow = ["lab"]
"#;

/// A gate that believes what this machine's proxies tell.
struct Rig {
    gate: Gate,
    echo: Echo,
    _sandbox: Sandbox,
}

/// A request that a proxy asks about.
#[derive(Clone, Copy, Debug)]
struct About<'a> {
    method: &'a str,
    host: &'a str,
    target: &'a str,
    /// Further header lines.
    lines: &'a str,
}

const DIALECTS: [&str; 4] = ["url", "uri", "forward-auth", "ext-authz"];

/// How a proxy asks about it.
fn question(dialect: &str, about: About<'_>) -> String {
    let About { method, host, target, lines } = about;
    let (line, told) = match dialect {
        "url" => (
            "GET /authz/auth-request".to_owned(),
            format!("X-Original-Method: {method}\r\nX-Original-URL: http://{host}{target}\r\n"),
        ),
        "uri" => (
            "GET /authz/auth-request".to_owned(),
            format!(
                "X-Original-Method: {method}\r\nX-Original-URI: {target}\r\n\
                 X-Forwarded-Host: {host}\r\n"
            ),
        ),
        "forward-auth" => (
            "GET /authz/forward-auth".to_owned(),
            format!(
                "X-Forwarded-Method: {method}\r\nX-Forwarded-Proto: https\r\n\
                 X-Forwarded-Host: {host}\r\nX-Forwarded-Uri: {target}\r\n\
                 X-Forwarded-For: 192.0.2.7\r\n"
            ),
        ),
        "ext-authz" => (format!("{method} /authz/ext-authz{target}"), String::new()),
        _ => unreachable!(),
    };
    let own = if dialect == "ext-authz" { host } else { "gate" };
    format!("{line} HTTP/1.1\r\nHost: {own}\r\nConnection: close\r\n{told}{lines}\r\n")
}

fn proof(name: &str, realm: &str, token: &str) -> String {
    format!("X-Auth-Name: {name}\r\nX-Auth-Realm: {realm}\r\nX-Auth-Token: {token}\r\n")
}

impl Rig {
    async fn new() -> Self {
        Self::with("trusted_proxies = ['127.0.0.1']", "").await
    }

    async fn with(api: &str, more: &str) -> Self {
        let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
        let settings = format!(
            "[proxy]\nupstream = '{}'\n[api]\n{api}\n[throttle]\nenabled = false\n{more}\n{ROUTES}",
            echo.address
        );
        let gate = sandbox.serve(&settings).ready().await;
        Self { gate, echo, _sandbox: sandbox }
    }

    fn api(&self) -> SocketAddr {
        // The first of its addresses.
        address(self.gate.api.split(',').next().unwrap())
    }

    async fn ask(&self, dialect: &str, about: About<'_>) -> Answer {
        ask(self.api(), question(dialect, about)).await
    }

    /// What the gate's own proxy answers.
    async fn pass(&self, about: About<'_>) -> u16 {
        let About { method, host, target, lines } = about;
        let request = format!(
            "{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{lines}\r\n"
        );
        ask(address(&self.gate.proxy), request).await.status
    }
}

/// The status that an answer stands for.
fn meant(dialect: &str, answer: &Answer) -> u16 {
    match dialect {
        "url" | "uri" if answer.status != 200 => {
            let meant = answer.header("x-otpgate-status").unwrap().parse().unwrap();
            assert_eq!(answer.status, if meant == 401 { 401 } else { 403 });
            meant
        }
        _ => answer.status,
    }
}

fn assert_no_identity(answer: &Answer) {
    for name in ["x-auth-name", "x-auth-realm", "x-auth-token"] {
        assert_eq!(answer.header(name), None, "{}", answer.head);
    }
    assert!(!answer.text().contains("alice"), "{}", answer.text());
}

#[tokio::test]
async fn a_proof_is_answered_with_identity() {
    let rig = Rig::new().await;
    let lines = proof("alice", "shop", &token(ALICE));
    let about = About { method: "POST", host: "shop.example", target: "/x?y=/../z", lines: &lines };
    for dialect in DIALECTS {
        let answer = rig.ask(dialect, about).await;
        assert_eq!(answer.status, 200, "{dialect}: {}", answer.text());
        assert_eq!(answer.header("x-auth-name"), Some("alice"));
        assert_eq!(answer.header("x-auth-realm"), Some("shop"));
        assert_eq!(answer.header("content-length"), Some("0"));
        assert_eq!(answer.header("cache-control"), Some("no-store"));
        assert_eq!(answer.header("x-auth-token"), None);
        let removed = (dialect == "ext-authz").then_some("x-auth-token");
        assert_eq!(answer.header("x-envoy-auth-headers-to-remove"), removed, "{dialect}");
    }
    // The access line says what was asked about, without its query.
    let line = rig.gate.wait_for_log(|line| line["asked_path"] == "/x").unwrap();
    assert_eq!(
        (&line["asked_method"], &line["asked_host"]),
        (&"POST".into(), &"shop.example".into())
    );
    assert_eq!((&line["outcome"], &line["name"]), (&"allowed".into(), &"alice".into()));
    assert!(!rig.gate.log_text().contains("y="), "{}", rig.gate.log_text());
    let metrics = http().get(format!("{}/metrics", rig.gate.ops)).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    let counted = r#"otpgate_requests_total{listener="api",outcome="allowed",route="authz"} 4"#;
    assert!(metrics.contains(counted), "{metrics}");
}

#[tokio::test]
async fn nobody_passes_with_empty_identity() {
    let rig = Rig::new().await;
    for target in ["/public", "/watched"] {
        let lines = "X-Auth-Name: root\r\nX-Auth-Realm: ungleich-admin\r\n";
        let about = About { method: "GET", host: "h", target, lines };
        for dialect in DIALECTS {
            let answer = rig.ask(dialect, about).await;
            assert_eq!(answer.status, 200, "{dialect}");
            assert_eq!(answer.header("x-auth-name"), Some(""));
            assert_eq!(answer.header("x-auth-realm"), Some(""));
        }
    }
}

/// Whatever is asked about, all dialects say what the gate's own proxy does.
#[tokio::test]
async fn decisions_are_those_of_the_proxy() {
    let rig = Rig::new().await;
    let (alice, bob) = (proof("alice", "shop", &token(ALICE)), proof("bob", "lab", &token(BOB)));
    let wrong = proof("alice", "shop", &wrong_token(ALICE));
    let twice = format!("{alice}X-Auth-Name: alice\r\n");
    let malformed = "X-Auth-Name: \r\nX-Auth-Realm: shop\r\nX-Auth-Token: 123456\r\n".to_owned();
    let alias = format!("{alice}X_Auth_Token: 123456\r\n");
    let missing = String::new();
    let callers = [&alice, &bob, &wrong, &twice, &malformed, &alias, &missing];
    let targets = [
        "/",
        "/x",
        "/public",
        "/public/x",
        "/admin",
        "/admin/x?public",
        "/watched/x",
        "/read",
        "/public/../admin",
        "/public/%2e%2e/admin",
        "/public//admin",
        "//public",
        "/public%2Fx",
        "/%61dmin",
        "/%2561dmin",
        "/admin;x",
        "/Admin",
        "/admin.",
        "/public;/../admin",
        "/admin%00",
        "/public\\..\\admin",
        "/a%zz",
        "/x?a=%00&b=../..",
        "/\u{fc}",
    ];
    let mut statuses = std::collections::BTreeSet::new();
    for lines in callers {
        for target in targets {
            for (method, host) in [("GET", "h"), ("DELETE", "H.:80"), ("GET", "lab.example")] {
                let about = About { method, host, target, lines };
                let expected = rig.pass(about).await;
                statuses.insert(expected);
                for dialect in DIALECTS {
                    let answer = rig.ask(dialect, about).await;
                    // The proxy removes other spellings; proxies that ask cannot.
                    let removable = lines == &alias && expected == 200;
                    let expected = if removable { 400 } else { expected };
                    assert_eq!(meant(dialect, &answer), expected, "{dialect} {about:?}");
                    if expected != 200 {
                        assert_no_identity(&answer);
                        assert!(answer.json()["detail"].is_string());
                        assert!(answer.json()["request_id"].is_string());
                    }
                }
            }
        }
    }
    assert_eq!(statuses.into_iter().collect::<Vec<_>>(), [200, 400, 401, 403]);
    assert!(rig.echo.seen() > 10);
}

#[tokio::test]
async fn odd_methods_and_hosts_are_refused() {
    let rig = Rig::new().await;
    let lines = proof("alice", "shop", &token(ALICE));
    for (method, host, target, expected) in [
        ("get", "h", "/x", 400),
        ("TRACE", "h", "/x", 405),
        ("CONNECT", "h", "/x", 405),
        ("GET", "", "/x", 400),
        ("GET", "a b", "/x", 400),
        ("GET", "a, b", "/x", 400),
        ("GET", "u@h", "/x", 400),
        ("GET", "h", "/x#y", 400),
        ("GET", "h", "/x?y#z", 400),
        ("GET", "h", "?x", 400),
    ] {
        for dialect in DIALECTS {
            // There, these are refused as requests of their own, or are none of ours.
            let about = About { method, host, target, lines: &lines };
            let answer = rig.ask(dialect, about).await;
            if dialect == "ext-authz" {
                assert!((400..500).contains(&answer.status), "{about:?}: {}", answer.status);
            } else {
                assert_eq!(meant(dialect, &answer), expected, "{dialect} {about:?}");
            }
            assert_no_identity(&answer);
        }
    }
}

#[tokio::test]
async fn what_a_proxy_tells_must_have_one_reading() {
    let rig = Rig::new().await;
    let proof = proof("alice", "shop", &token(ALICE));
    let told = |path: &str, lines: &str| {
        format!("GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n{lines}{proof}\r\n")
    };
    let (method, url) = ("X-Original-Method: GET\r\n", "X-Original-URL: http://h/x\r\n");
    let (uri, host) = ("X-Original-URI: /x\r\n", "X-Forwarded-Host: h\r\n");
    let (as_method, as_uri) = ("X-Forwarded-Method: GET\r\n", "X-Forwarded-Uri: /x\r\n");
    let nginx = "/authz/auth-request";
    let traefik = "/authz/forward-auth";
    for (path, parts) in [
        (nginx, &[method, url][..]),
        (nginx, &[method, uri, host]),
        (traefik, &[as_method, as_uri, host]),
    ] {
        assert_eq!(ask(rig.api(), told(path, &parts.concat())).await.status, 200);
        for i in 0..parts.len() {
            // Each one missing, twice, and beside another spelling.
            let without: Vec<_> = parts.iter().enumerate().filter(|(j, _)| *j != i).collect();
            let without: String = without.into_iter().map(|(_, part)| *part).collect();
            let twice = format!("{}{}", parts.concat(), parts[i]);
            let alias = format!("{}{}", parts.concat(), parts[i].replacen('-', "_", 1));
            for lines in [without, twice, alias] {
                let answer = ask(rig.api(), told(path, &lines)).await;
                let meant = meant(if path == nginx { "url" } else { "" }, &answer);
                assert_eq!(meant, 400, "{path} {lines}");
                assert_no_identity(&answer);
            }
        }
    }
    for lines in [
        [method, url, uri, host].concat(),
        [method, "X-Original-URL: /x\r\n"].concat(),
        [method, "X-Original-URL: //h/x\r\n"].concat(),
        [method, "X-Original-URL: ftp://h/x\r\n"].concat(),
        [method, "X-Original-URL: http://h?/x\r\n"].concat(),
        [method, host, "X-Original-URI: http://h/x\r\n"].concat(),
    ] {
        let answer = ask(rig.api(), told(nginx, &lines)).await;
        assert_eq!(meant("url", &answer), 400, "{lines}");
    }
    // Each dialect reads its own headers alone.
    let answer = ask(rig.api(), told(traefik, &[method, url].concat())).await;
    assert_eq!(answer.status, 400);
    let answer = ask(rig.api(), told("/authz/ext-authzx", "")).await;
    assert_eq!(answer.status, 404);
}

#[tokio::test]
async fn only_listed_proxies_may_ask() {
    for api in ["", "trusted_proxies = ['192.0.2.0/24', '::1']"] {
        let rig = Rig::with(api, "").await;
        let lines = proof("alice", "shop", &token(ALICE));
        for target in ["/public", "/x"] {
            let about = About { method: "GET", host: "h", target, lines: &lines };
            for dialect in DIALECTS {
                let answer = rig.ask(dialect, about).await;
                assert_eq!(answer.status, 403, "{dialect}");
                assert!(answer.text().contains("api.trusted_proxies"), "{}", answer.text());
                assert_no_identity(&answer);
            }
        }
        let line = rig.gate.wait_for_log(|line| line["outcome"] == "untrusted").unwrap();
        assert_eq!(line["reason"], "untrusted_proxy");
        assert!(line.get("name").is_none());
    }
}

/// A proxy on this machine may come in by the Unix socket, whose mode says who may.
#[tokio::test]
async fn proxies_may_ask_over_a_unix_socket() {
    let lines = proof("alice", "shop", &token(ALICE));
    let about = About { method: "GET", host: "h", target: "/x", lines: &lines };
    for (trusted, over_unix, over_tcp) in [("unix", 200, 403), ("127.0.0.1", 403, 200)] {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api.sock");
        let api = format!(
            "listen = ['127.0.0.1:0', 'unix:{}']\ntrusted_proxies = '{trusted}'",
            socket.display()
        );
        let rig = Rig::with(&api, "").await;
        for dialect in DIALECTS {
            let mut unix = Connection::over(UnixStream::connect(&socket).await.unwrap());
            let answer = unix.ask(question(dialect, about)).await.unwrap();
            assert_eq!(answer.status, over_unix, "{dialect}");
            assert_eq!(rig.ask(dialect, about).await.status, over_tcp, "{dialect}");
        }
        // Where the request comes from is taken from the same peers.
        let told = rig
            .gate
            .wait_for_log(|line| line["outcome"] == "allowed" && line["client"] == "192.0.2.7");
        assert!(told.is_some());
    }
}

/// The browser behind a proxy is of the page's origin, not of the gate's; and hosts are not the API's own.
#[tokio::test]
async fn headers_of_browsers_are_not_taken_for_the_proxy_s() {
    let rig =
        Rig::with("trusted_proxies = ['127.0.0.1']\nallowed_hosts = ['gate.internal']", "").await;
    let lines = format!(
        "{}Origin: https://elsewhere.example\r\nSec-Fetch-Site: cross-site\r\n\
         Expect: 100-continue\r\nAccept: text/html\r\n",
        proof("alice", "shop", &token(ALICE))
    );
    let about = About { method: "GET", host: "shop.example", target: "/x", lines: &lines };
    for dialect in DIALECTS {
        assert_eq!(rig.ask(dialect, about).await.status, 200, "{dialect}");
    }
    // Not so elsewhere.
    let request = format!("GET /ungleichotp/ HTTP/1.1\r\nHost: gate.internal\r\n{lines}\r\n");
    assert_eq!(ask(rig.api(), request).await.status, 403);
}

/// Guesses count for the client, not for the proxy that asks for everybody.
#[tokio::test]
async fn clients_behind_a_proxy_are_throttled_one_by_one() {
    let sandbox = Sandbox::with_entries();
    let settings = "[proxy]\nlisten = 'off'\n[api]\ntrusted_proxies = ['127.0.0.1']\n\
                    [throttle]\nper_source = { failures = 2, per = '1h' }\n";
    let gate = sandbox.serve(settings).ready().await;
    let api = address(&gate.api);
    let ask_from = |client: &str, token: String| {
        let lines = proof("alice", "shop", &token);
        let about = About { method: "GET", host: "h", target: "/x", lines: &lines };
        let question = question("forward-auth", about).replace("192.0.2.7", client);
        async move { ask(api, question).await }
    };
    let mut last = 401;
    for _ in 0..20 {
        last = ask_from("198.51.100.1", wrong_token(ALICE)).await.status;
        if last == 429 {
            break;
        }
    }
    assert_eq!(last, 429);
    let throttled = ask_from("198.51.100.1", token(ALICE)).await;
    assert_eq!(throttled.status, 429);
    assert!(throttled.header("retry-after").is_some());
    assert_eq!(ask_from("198.51.100.2", token(ALICE)).await.status, 200);
    // What the client wrote before the proxy's own word counts for nothing.
    let spoofed = ask_from("198.51.100.3, 198.51.100.1", token(ALICE)).await;
    assert_eq!(spoofed.status, 429);
    // nginx hears 403, and what it means.
    let lines =
        format!("{}X-Forwarded-For: 198.51.100.1\r\n", proof("alice", "shop", &token(ALICE)));
    let about = About { method: "GET", host: "h", target: "/x", lines: &lines };
    let answer = ask(api, question("url", about)).await;
    assert_eq!((answer.status, answer.header("x-otpgate-status")), (403, Some("429")));
    assert!(answer.header("retry-after").is_some());
}
