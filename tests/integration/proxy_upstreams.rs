//! Upstream servers of every kind, and what callers hear when they fail.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use otpgate::config::{HealthCheck, Target, Upstream, UpstreamHttp, UpstreamTimeouts, UpstreamTls};
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinHandle;

use crate::peers::echo::{self, Echo};
use crate::peers::gate::{Setup, plain};
use crate::peers::nginx::Nginx;
use crate::peers::tls::Pki;
use crate::peers::until;
use crate::peers::wire::{Connection, ask, header};

const SHORT: Duration = Duration::from_millis(300);

/// An address where nothing listens, and nothing will as long as the socket is kept: it is bound,
/// but never told to listen.
fn nothing() -> (TcpSocket, SocketAddr) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

fn group(targets: &[SocketAddr]) -> Upstream {
    let targets = targets.iter().map(|a| Target::Host(a.ip().to_string(), a.port())).collect();
    Upstream { targets, http: UpstreamHttp::Http1, tls: None }
}

fn over_tls(address: SocketAddr, pki: Option<&Pki>, server_name: &str) -> Upstream {
    Upstream {
        targets: vec![Target::Host("localhost".into(), address.port())],
        http: UpstreamHttp::Http1,
        tls: Some(UpstreamTls {
            server_name: server_name.into(),
            ca_file: pki.map(|pki| pki.ca_file.clone()),
        }),
    }
}

#[tokio::test]
async fn an_upstream_that_is_down_is_a_502() {
    let (_held, address) = nothing();
    let gate = Setup::to(plain(address)).start().await;
    let answer = ask(gate.tcp(), gate.get("/")).await;
    assert_eq!(answer.status, 502);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(answer.header("server"), None);
    assert_eq!(answer.json()["request_id"].as_str(), answer.header("x-request-id"));
    assert_eq!(gate.metric(r#"otpgate_upstream_failures_total{cause="refused"}"#), 1.0);
}

#[tokio::test]
async fn an_upstream_that_hangs_is_a_504() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut setup = Setup::to(plain(listener.local_addr().unwrap()));
    setup.timeouts = UpstreamTimeouts { read: SHORT, ..UpstreamTimeouts::default() };
    let gate = setup.start().await;
    let answer = ask(gate.tcp(), gate.get("/")).await;
    assert_eq!(answer.status, 504);
    assert!(answer.json()["detail"].is_string());
    assert_eq!(gate.metric(r#"otpgate_upstream_failures_total{cause="read_timeout"}"#), 1.0);
}

#[tokio::test]
async fn an_upstream_that_talks_nonsense_is_a_502() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let mut connection = Connection::over(stream);
            connection.request().await;
            connection.send("what?\r\n\r\n").await;
        }
    });
    let gate = Setup::to(plain(address)).start().await;
    assert_eq!(ask(gate.tcp(), gate.get("/")).await.status, 502);
    server.abort();
}

#[tokio::test]
async fn with_one_of_two_down_the_other_answers_every_request() {
    let echo = Echo::start().await;
    let (_held, address) = nothing();
    for check in [None, Some(Duration::from_millis(50))] {
        let mut setup = Setup::to(group(&[address, echo.address]));
        setup.health = HealthCheck { interval: check, ..HealthCheck::default() };
        let gate = setup.start().await;
        for method in ["GET", "POST", "GET", "POST", "GET", "POST"] {
            let request = format!(
                "{method} / HTTP/1.1\r\nHost: g\r\nContent-Length: 2\r\n{}\r\nhi",
                gate.proof()
            );
            let answer = ask(gate.tcp(), request).await;
            assert_eq!(answer.status, 200);
            assert_eq!(header(&answer.text(), "x-auth-name"), Some("alice"));
        }
        if check.is_some() {
            let unhealthy = r#"otpgate_upstream_backends{state="unhealthy"}"#;
            until("the check tells", || async { gate.metric(unhealthy) == 1.0 }).await;
            let refused = r#"otpgate_upstream_failures_total{cause="refused"}"#;
            let before = gate.metric(refused);
            for _ in 0..4 {
                assert_eq!(ask(gate.tcp(), gate.get("/")).await.status, 200);
            }
            assert_eq!(gate.metric(refused), before, "an unhealthy one is not asked");
        }
    }
}

#[tokio::test]
async fn equal_servers_take_turns() {
    let (a, b) = (Echo::named("a").await, Echo::named("b").await);
    let gate = Setup::to(group(&[a.address, b.address])).start().await;
    for _ in 0..10 {
        assert_eq!(ask(gate.tcp(), gate.get("/")).await.status, 200);
    }
    assert_eq!((a.seen(), b.seen()), (5, 5));
}

#[tokio::test]
async fn servers_that_a_check_calls_unhealthy_are_asked_if_there_is_no_other() {
    let echo = Echo::start().await;
    let unix = tempfile::tempdir().unwrap();
    let mut setup = Setup::to(Upstream {
        targets: vec![Target::Unix(unix.path().join("later"))],
        http: UpstreamHttp::Http1,
        tls: None,
    });
    setup.health = HealthCheck { interval: Some(SHORT), ..HealthCheck::default() };
    let gate = setup.start().await;
    let unhealthy = r#"otpgate_upstream_backends{state="unhealthy"}"#;
    until("the check tells", || async { gate.metric(unhealthy) == 1.0 }).await;
    assert_eq!(ask(gate.tcp(), gate.get("/")).await.status, 502);
    let server = echo::on_unix(&unix.path().join("later"));
    // Not one request waits for the next check.
    assert_eq!(ask(gate.tcp(), gate.get("/")).await.status, 200);
    until("the check tells", || async { gate.metric(unhealthy) == 0.0 }).await;
    server.abort();
    drop(echo);
}

#[tokio::test]
async fn checks_may_ask_for_a_path() {
    let nginx = Nginx::start(
        "location = /healthy { return 204; } location = /sick { return 500; } \
         location / { return 200 ok; }",
    )
    .await;
    for (path, state) in [("/healthy", "healthy"), ("/sick", "unhealthy")] {
        let mut setup = Setup::to(Upstream {
            targets: vec![Target::Unix(nginx.socket.clone())],
            http: UpstreamHttp::Http1,
            tls: None,
        });
        setup.health = HealthCheck {
            interval: Some(Duration::from_millis(50)),
            path: Some(path.into()),
            ..HealthCheck::default()
        };
        let gate = setup.start().await;
        let line = format!("otpgate_upstream_backends{{state=\"{state}\"}}");
        until("the check tells", || async { gate.metric(&line) == 1.0 }).await;
        assert_eq!(ask(gate.tcp(), gate.get("/")).await.text(), "ok");
    }
}

#[tokio::test]
async fn nginx_behind_the_gate_gets_identity_and_serves() {
    let nginx = Nginx::start(
        "location / { return 200 '$http_x_auth_name|$http_x_auth_realm|$http_x_auth_token|$request_uri|$host'; } \
         location /missing { return 404; }",
    )
    .await;
    let gate = Setup::to(Upstream {
        targets: vec![Target::Unix(nginx.socket.clone())],
        http: UpstreamHttp::Http1,
        tls: None,
    })
    .start()
    .await;
    let mut connection = Connection::to(gate.tcp()).await;
    for _ in 0..3 {
        let answer = connection.ask(gate.get("/%61?b=c")).await.unwrap();
        assert_eq!(answer.text(), "alice|staff||/a?b=c|gate");
        assert!(answer.header("server").unwrap().starts_with("nginx"));
        assert!(answer.header("x-request-id").is_some());
    }
    assert_eq!(connection.ask(gate.get("/missing")).await.unwrap().status, 404);
}

#[tokio::test]
async fn an_upstream_over_tls_is_checked() {
    let (pki, other) = (Pki::new(), Pki::new());
    let echo = Echo::over_tls(pki.server(&[])).await;
    for (ca, name, status) in [
        (Some(&pki), "localhost", 200),
        (Some(&other), "localhost", 502),
        (Some(&pki), "elsewhere.example", 502),
        (None, "localhost", 502),
    ] {
        let gate = Setup::to(over_tls(echo.address, ca, name)).start().await;
        assert_eq!(ask(gate.tcp(), gate.get("/")).await.status, status, "{name}");
    }
    // Groups do not share connections that one of them has checked.
    let mut setup = Setup::to(over_tls(echo.address, Some(&pki), "localhost"));
    setup.upstreams.push(over_tls(echo.address, Some(&other), "localhost"));
    let any = otpgate::policy::Access::Allow(vec![otpgate::policy::Grant::Anybody]);
    for (path, upstream) in [("", 0), ("/other", 1)] {
        let mut route = otpgate::policy::Route::new(path, any.clone());
        route.upstream = Some(upstream);
        setup.routes.push(route);
    }
    let gate = setup.start().await;
    for _ in 0..3 {
        assert_eq!(ask(gate.tcp(), gate.get("/")).await.status, 200);
        assert_eq!(ask(gate.tcp(), gate.get("/other")).await.status, 502);
    }
}

#[tokio::test]
async fn tls_without_a_name_or_with_a_bad_ca_is_refused_at_start() {
    let folder = tempfile::tempdir().unwrap();
    let ca_file = folder.path().join("ca.pem");
    std::fs::write(&ca_file, "nothing").unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], 1));
    let mut bad_ca = over_tls(address, None, "x");
    bad_ca.tls.as_mut().unwrap().ca_file = Some(ca_file);
    for (upstream, said) in [(over_tls(address, None, ""), "server name"), (bad_ca, "ca.pem")] {
        let config = otpgate::config::ProxyConfig {
            listen: Vec::new(),
            upstreams: vec![upstream],
            mode: otpgate::policy::Mode::Enforce,
            similar_paths: otpgate::policy::SimilarPaths::Refuse,
            trusted_proxies: Vec::new(),
            limits: otpgate::config::Limits::default(),
            timeouts: UpstreamTimeouts::default(),
            health: HealthCheck::default(),
            threads: None,
        };
        let metrics = Arc::new(otpgate::metrics::Metrics::new([]));
        let error = otpgate::proxy::Upstreams::new(&config, metrics).err().unwrap();
        assert!(error.to_string().contains(said), "{error}");
    }
}

/// Answers the first request of each connection, and hangs up in the middle of the second.
async fn forgetful(heads: Arc<std::sync::Mutex<Vec<String>>>) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let heads = heads.clone();
            tokio::spawn(async move {
                let mut connection = Connection::over(stream);
                for _ in 0..2 {
                    let Some((head, _)) = connection.request().await else { return };
                    let first = heads.lock().unwrap().len() != 1;
                    heads.lock().unwrap().push(head);
                    if !first {
                        return;
                    }
                    connection.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
                }
            });
        }
    });
    (address, task)
}

#[tokio::test]
async fn identity_is_the_same_on_every_attempt() {
    let heads = Arc::new(std::sync::Mutex::new(Vec::new()));
    let (address, server) = forgetful(heads.clone()).await;
    let gate = Setup::to(plain(address)).start().await;
    for _ in 0..2 {
        assert_eq!(ask(gate.tcp(), gate.get("/")).await.status, 200);
    }
    let heads = heads.lock().unwrap().clone();
    assert_eq!(heads.len(), 3, "the second request was tried twice");
    let token = gate.token(&gate.alice);
    for head in &heads {
        assert_eq!(header(head, "x-auth-name"), Some("alice"));
        assert_eq!(header(head, "x-auth-realm"), Some("staff"));
        assert_eq!(head.matches("alice").count(), 1);
        assert!(!head.contains(&token));
    }
    assert_eq!(heads[1], heads[2]);
    server.abort();
}

#[tokio::test]
async fn requests_that_may_have_been_done_are_not_sent_twice() {
    let heads = Arc::new(std::sync::Mutex::new(Vec::new()));
    let (address, server) = forgetful(heads.clone()).await;
    let gate = Setup::to(plain(address)).start().await;
    assert_eq!(ask(gate.tcp(), gate.get("/")).await.status, 200);
    let post =
        format!("POST / HTTP/1.1\r\nHost: gate\r\nContent-Length: 2\r\n{}\r\nhi", gate.proof());
    assert_eq!(ask(gate.tcp(), post).await.status, 502);
    assert_eq!(heads.lock().unwrap().len(), 2);
    server.abort();
}

#[tokio::test]
async fn names_are_resolved_without_a_request_waiting() {
    let echo = Echo::start().await;
    let gate = Setup::to(Upstream {
        targets: vec![
            Target::Host("localhost".into(), echo.address.port()),
            Target::Host("no-such-host.invalid".into(), 1),
        ],
        http: UpstreamHttp::Http1,
        tls: None,
    })
    .start()
    .await;
    for _ in 0..4 {
        assert_eq!(ask(gate.tcp(), gate.get("/")).await.status, 200);
    }
    let unknown = Upstream {
        targets: vec![Target::Host("no-such-host.invalid".into(), 1)],
        http: UpstreamHttp::Http1,
        tls: None,
    };
    let gate = Setup::to(unknown).start().await;
    assert_eq!(ask(gate.tcp(), gate.get("/")).await.status, 502);
}

#[tokio::test]
async fn a_broken_off_answer_breaks_off_for_the_client_too() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let served = Arc::new(AtomicUsize::new(0));
    let count = served.clone();
    let server = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let mut connection = Connection::over(stream);
            connection.request().await;
            count.fetch_add(1, Ordering::SeqCst);
            connection.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345").await;
        }
    });
    let gate = Setup::to(plain(address)).start().await;
    let mut connection = Connection::to(gate.tcp()).await;
    assert!(connection.ask(gate.get("/")).await.is_none(), "no whole answer");
    assert_eq!(served.load(Ordering::SeqCst), 1);
    server.abort();
}
