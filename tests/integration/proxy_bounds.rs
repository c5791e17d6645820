//! Every way in which a client could hold a connection is bounded.

use std::time::Duration;

use otpgate::config::{Address, Limits};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep};

use crate::peers::echo::Echo;
use crate::peers::gate::{Gate, Setup, plain};
use crate::peers::h2peer;
use crate::peers::tls::Pki;
use crate::peers::until;
use crate::peers::wire::{Connection, ask};

const SHORT: Duration = Duration::from_millis(300);

async fn limited(limits: Limits) -> (Echo, Gate) {
    let echo = Echo::start().await;
    let mut setup = Setup::to(plain(echo.address));
    setup.limits = limits;
    (echo, setup.start().await)
}

/// Sends a byte every few milliseconds until the other side has had enough.
async fn drip(stream: &mut TcpStream, bytes: &[u8]) {
    for byte in bytes {
        if stream.write_all(&[*byte]).await.is_err() {
            return;
        }
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_dripping_head_gets_408_within_the_deadline() {
    let (echo, gate) = limited(Limits { head_timeout: SHORT, ..Limits::default() }).await;
    let mut connection = Connection::to(gate.tcp()).await;
    for round in 0..2 {
        let started = Instant::now();
        drip(&mut connection.stream, gate.get("/long/enough/to/take/too/long").as_bytes()).await;
        let answer = connection.answer().await.expect("an answer");
        assert_eq!(answer.status, 408);
        assert_eq!(answer.header("connection"), Some("close"));
        assert!(answer.json()["request_id"].is_string());
        assert!(connection.ends().await);
        assert!(started.elapsed() >= SHORT, "round {round}");
        // The second round: a head on a connection that has served a request.
        connection = Connection::to(gate.tcp()).await;
        assert_eq!(connection.ask(gate.get("/")).await.unwrap().status, 200);
    }
    assert_eq!(echo.seen(), 2);
    let line = r#"otpgate_connections_refused_total{cause="head_too_slow",listener="proxy"}"#;
    assert_eq!(gate.metric(line), 2.0);
}

#[tokio::test]
async fn the_deadline_is_for_each_head_not_for_the_connection_or_the_body() {
    let (_echo, gate) = limited(Limits { head_timeout: SHORT, ..Limits::default() }).await;
    let mut connection = Connection::to(gate.tcp()).await;
    for _ in 0..2 {
        let head =
            format!("POST / HTTP/1.1\r\nHost: gate\r\nContent-Length: 5\r\n{}\r\n", gate.proof());
        // Each half of the head, and each byte of the body, within the deadline; together beyond.
        let (first, second) = head.split_at(20);
        connection.send(first).await;
        sleep(SHORT / 3).await;
        connection.send(second).await;
        for byte in b"12345" {
            connection.send([*byte]).await;
            sleep(SHORT / 3).await;
        }
        let answer = connection.answer().await.unwrap();
        assert_eq!(answer.status, 200);
        assert!(answer.text().ends_with("\n\n5"));
    }
}

#[tokio::test]
async fn an_oversized_head_gets_431() {
    let limits = Limits { max_head_bytes: 8 << 10, ..Limits::default() };
    let (echo, gate) = limited(limits).await;
    let with_padding = |size: usize| {
        let start = format!("GET / HTTP/1.1\r\nHost: gate\r\n{}X-Padding: ", gate.proof());
        format!("{start}{}\r\n\r\n", "p".repeat(size - start.len() - 4))
    };
    let fits = ask(gate.tcp(), with_padding(8 << 10)).await;
    assert_eq!(fits.status, 200);
    for size in [(8 << 10) + 1, 64 << 10, 2 << 20] {
        let answer = ask(gate.tcp(), with_padding(size)).await;
        assert_eq!(answer.status, 431, "{size}");
        assert_eq!(answer.header("connection"), Some("close"));
    }
    assert_eq!(echo.seen(), 1);
    let many = format!("GET / HTTP/1.1\r\nHost: gate\r\n{}\r\n", "A: b\r\n".repeat(101));
    assert_eq!(ask(gate.tcp(), many).await.status, 431);
}

#[tokio::test]
async fn idle_connections_end() {
    let limits = Limits { keepalive_timeout: SHORT, ..Limits::default() };
    let (_echo, gate) = limited(limits).await;
    let mut silent = Connection::to(gate.tcp()).await;
    let started = Instant::now();
    assert!(silent.ends().await);
    assert!(started.elapsed() >= SHORT - Duration::from_millis(50));
    let mut used = Connection::to(gate.tcp()).await;
    for _ in 0..3 {
        assert_eq!(used.ask(gate.get("/")).await.unwrap().status, 200);
        sleep(SHORT / 2).await;
    }
    assert!(used.ends().await);
}

#[tokio::test]
async fn a_stalled_body_gets_408() {
    let limits = Limits { body_timeout: SHORT, ..Limits::default() };
    let (_echo, gate) = limited(limits).await;
    let head =
        format!("POST / HTTP/1.1\r\nHost: gate\r\nContent-Length: 10\r\n{}\r\n12345", gate.proof());
    let answer = ask(gate.tcp(), head).await;
    assert_eq!(answer.status, 408);
    assert_eq!(answer.header("connection"), Some("close"));
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_cut() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut setup = Setup::to(plain(listener.local_addr().unwrap()));
    setup.limits = Limits { write_timeout: SHORT, ..Limits::default() };
    let gate = setup.start().await;
    let mut client = Connection::to(gate.tcp()).await;
    client.send(gate.get("/")).await;
    let (stream, _) = crate::peers::bounded("the request", listener.accept()).await.unwrap();
    let mut upstream = Connection::over(stream);
    upstream.request_head().await.unwrap();
    let (_, mut upstream) = upstream.into_parts();
    upstream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
    let endless = async { while upstream.write_all(&[0; 64 << 10]).await.is_ok() {} };
    crate::peers::bounded("the upstream is let go", endless).await;
    until("the connection is closed", || async {
        gate.metric(r#"otpgate_connections{listener="proxy"}"#) == 0.0
    })
    .await;
    drop(client);
}

#[tokio::test]
async fn without_descriptors_the_gate_waits_and_recovers() {
    let sandbox = crate::harness::Sandbox::with_entries();
    let gate = sandbox.serve("").ready().await;
    let limit = libc::rlimit { rlim_cur: 64, rlim_max: 64 };
    // SAFETY: reads one rlimit; the process is our child and not yet waited for.
    let set = unsafe {
        libc::prlimit(gate.pid(), libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut())
    };
    assert_eq!(set, 0);
    let address = gate.proxy.strip_prefix("http://").unwrap().to_owned();
    let mut held = Vec::new();
    for _ in 0..100 {
        held.push(TcpStream::connect(&address).await.unwrap());
    }
    gate.wait_for_log(|line| line["message"] == "cannot accept connections, trying again").unwrap();
    drop(held);
    let unproven = "GET / HTTP/1.1\r\nHost: g\r\n\r\n";
    assert_eq!(ask(address.parse().unwrap(), unproven).await.status, 401);
}

#[tokio::test]
async fn a_body_beyond_the_limit_gets_413() {
    let limits = Limits { max_body_bytes: Some(10), ..Limits::default() };
    let (echo, gate) = limited(limits).await;
    let post = |framing: &str| {
        format!("POST / HTTP/1.1\r\nHost: gate\r\n{framing}\r\n{}\r\n", gate.proof())
    };
    let fits = ask(gate.tcp(), post("Content-Length: 10") + "0123456789").await;
    assert_eq!(fits.status, 200);
    let announced = ask(gate.tcp(), post("Content-Length: 11")).await;
    assert_eq!(announced.status, 413);
    assert_eq!(echo.seen(), 1);
    let chunked = post("Transfer-Encoding: chunked") + "6\r\n012345\r\n6\r\n012345\r\n0\r\n\r\n";
    assert_eq!(ask(gate.tcp(), chunked).await.status, 413);
}

#[tokio::test]
async fn connections_beyond_the_cap_are_closed_and_a_free_slot_is_used() {
    let (_echo, gate) = limited(Limits { max_connections: 2, ..Limits::default() }).await;
    let mut first = Connection::to(gate.tcp()).await;
    let mut second = Connection::to(gate.tcp()).await;
    assert_eq!(first.ask(gate.get("/")).await.unwrap().status, 200);
    assert_eq!(second.ask(gate.get("/")).await.unwrap().status, 200);
    assert_eq!(gate.metric(r#"otpgate_connections{listener="proxy"}"#), 2.0);
    assert!(Connection::to(gate.tcp()).await.ask(gate.get("/")).await.is_none());
    let line = r#"otpgate_connections_refused_total{cause="limit",listener="proxy"}"#;
    assert_eq!(gate.metric(line), 1.0);
    drop(first);
    until("a slot is free", || async {
        let answer = Connection::to(gate.tcp()).await.ask(gate.get("/")).await;
        answer.is_some_and(|answer| answer.status == 200)
    })
    .await;
    assert_eq!(second.ask(gate.get("/")).await.unwrap().status, 200);
}

#[tokio::test]
async fn half_a_preface_of_http2_is_bounded() {
    let echo = Echo::start().await;
    let mut setup = Setup::to(plain(echo.address));
    setup.h2c = true;
    setup.limits = Limits { head_timeout: SHORT, ..Limits::default() };
    let gate = setup.start().await;
    let mut connection = Connection::to(gate.tcp()).await;
    let started = Instant::now();
    connection.send("PRI * HTTP/2.0\r\n").await;
    let answer = connection.answer().await.expect("an answer");
    assert_eq!(answer.status, 408);
    assert!(started.elapsed() >= SHORT);
    // A short HTTP/1.0 request is not taken for a preface.
    let short = ask(gate.tcp(), "GET / HTTP/1.0\r\n\r\n").await;
    assert_eq!(short.status, 400);
    // Neither is one that begins like it.
    let like = ask(gate.tcp(), "PRIME / HTTP/1.1\r\nHost: gate\r\n\r\n").await;
    assert_eq!(like.status, 401);
    // Without h2c, a preface is no request.
    let mut setup = Setup::to(plain(echo.address));
    setup.h2c = false;
    let gate = setup.start().await;
    let answer = ask(gate.tcp(), "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    assert_eq!(answer.status, 400);
}

#[tokio::test]
async fn a_stalled_handshake_of_tls_is_bounded() {
    let (echo, pki) = (Echo::start().await, Pki::new());
    let mut setup = Setup::to(plain(echo.address));
    setup.tls = Some(pki.files.clone());
    setup.limits = Limits { head_timeout: SHORT, ..Limits::default() };
    let gate = setup.start().await;
    let mut silent = Connection::to(gate.tcp()).await;
    assert!(silent.ends().await);
    // HTTP/2 is negotiated, but its preface never comes.
    let mut mute = Connection::over(h2peer::tls(gate.tcp(), &pki, &["h2"]).await);
    mute.send("PRI * HT").await;
    while mute.answer().await.is_some() {}
    let line = r#"otpgate_connections_refused_total{cause="tls_timeout",listener="proxy"}"#;
    assert_eq!(gate.metric(line), 1.0);
    assert!(gate.metric(r#"otpgate_certificate_expiry_timestamp_seconds{listener="proxy"}"#) > 1e9);
}

#[tokio::test]
async fn stopping_finishes_what_is_in_flight_and_ends_what_is_idle() {
    let (_echo, mut gate) = limited(Limits::default()).await;
    let mut idle = Connection::to(gate.tcp()).await;
    assert_eq!(idle.ask(gate.get("/")).await.unwrap().status, 200);
    let mut busy = Connection::to(gate.tcp()).await;
    let proof = gate.proof();
    busy.send(format!("POST / HTTP/1.1\r\nHost: g\r\nContent-Length: 4\r\n{proof}\r\nab")).await;
    let mut half = Connection::to(gate.tcp()).await;
    half.send("GET / HTTP/1.1\r\nHost: g\r\n").await;
    until("all are open", || async {
        gate.metric(r#"otpgate_connections{listener="proxy"}"#) == 3.0
    })
    .await;
    gate.stop.send(true).unwrap();
    assert!(idle.ends().await);
    until("no listener", || async { TcpStream::connect(gate.tcp()).await.is_err() }).await;
    busy.send("cd").await;
    let answer = busy.answer().await.expect("the request in flight is answered");
    assert_eq!((answer.status, answer.header("connection")), (200, Some("close")));
    half.send(format!("{proof}\r\n")).await;
    let answer = half.answer().await.expect("a head in flight is answered");
    assert_eq!((answer.status, answer.header("connection")), (200, Some("close")));
    drop((idle, busy, half));
    crate::peers::bounded("the drain", &mut gate.running).await.unwrap();
}

#[tokio::test]
async fn a_unix_socket_is_private_replaced_when_stale_and_removed() {
    use std::os::unix::fs::PermissionsExt;
    let echo = Echo::start().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("gate.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let setup = || {
        let mut setup = Setup::to(plain(echo.address));
        setup.listen = Address::Unix(path.clone());
        setup
    };
    let mut gate = setup().start().await;
    assert_eq!(std::fs::metadata(gate.unix()).unwrap().permissions().mode() & 0o777, 0o600);
    let mut connection = Connection::over(UnixStream::connect(gate.unix()).await.unwrap());
    let seen = connection.ask(gate.get("/")).await.unwrap().text();
    assert!(seen.contains("forwarded: for=unknown;proto=http"), "{seen}");
    assert!(!seen.to_lowercase().contains("x-forwarded-for"));
    drop(connection);
    // Another one does not take a living socket over.
    let listen = otpgate::config::Listen::at(gate.address.clone());
    let metrics = gate.metrics.clone();
    let error = otpgate::net::Listener::bind("api", &[listen], Limits::default(), metrics);
    let errors = error.err().unwrap();
    assert!(errors[0].to_string().contains("another process listens"), "{}", errors[0]);
    gate.stop.send(true).unwrap();
    crate::peers::bounded("the drain", &mut gate.running).await.unwrap();
    assert!(!path.exists());
    std::fs::write(&path, "mine").unwrap();
    let listen = otpgate::config::Listen::at(gate.address.clone());
    let metrics = gate.metrics.clone();
    let error = otpgate::net::Listener::bind("api", &[listen], Limits::default(), metrics);
    assert!(error.err().unwrap()[0].to_string().contains("not a socket"));
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}

#[tokio::test]
async fn all_bind_errors_are_told_at_once() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (cert, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
    std::fs::write(&cert, "no certificate").unwrap();
    std::fs::write(&key, "no key").unwrap();
    let tcp = |address| otpgate::config::Listen::at(Address::Tcp(address));
    let free = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let mut bad_tls = tcp(free);
    let files = otpgate::config::TlsFiles { cert_file: cert, key_file: key };
    bad_tls.tls = Some(files.into());
    let places = [tcp(taken.local_addr().unwrap()), tcp(free), bad_tls];
    let metrics = std::sync::Arc::new(otpgate::metrics::Metrics::new([]));
    let listener = otpgate::net::Listener::bind("proxy", &places, Limits::default(), metrics);
    let errors = listener.err().unwrap();
    assert_eq!(errors.len(), 2);
    assert!(errors[0].to_string().contains(&taken.local_addr().unwrap().to_string()));
    assert!(errors[1].to_string().contains("cert.pem"), "{}", errors[1]);
}

#[tokio::test]
async fn http2_is_bounded_and_drained_too() {
    let echo = Echo::start().await;
    let mut setup = Setup::to(plain(echo.address));
    setup.h2c = true;
    setup.timeouts.read = SHORT;
    setup.limits =
        Limits { keepalive_timeout: 3 * SHORT, max_head_bytes: 4 << 10, ..Limits::default() };
    let mut gate = setup.start().await;
    let request = |gate: &Gate, padding: usize| {
        http::Request::post("http://gate/")
            .header("x-auth-name", "alice")
            .header("x-auth-realm", "staff")
            .header("x-auth-token", gate.token(&gate.alice))
            .header("x-padding", "p".repeat(padding))
            .body(())
            .unwrap()
    };
    let connect = async |gate: &Gate| {
        h2::client::handshake(TcpStream::connect(gate.tcp()).await.unwrap()).await.unwrap()
    };
    // A body that stalls.
    let (send, connection) = connect(&gate).await;
    let connection = tokio::spawn(connection);
    let stalled = h2peer::open(&send, request(&gate, 0)).await;
    assert_eq!(stalled.response.status(), 408);
    drop(stalled);
    // Too large a head.
    let (answer, _) = h2peer::ask(&send, request(&gate, 5 << 10)).await;
    assert_eq!(answer.status(), 431);
    assert_eq!(h2peer::ask(&send, request(&gate, 0)).await.0.status(), 200);
    // Idle for too long.
    let ended = crate::peers::bounded("the end", connection).await.unwrap();
    drop(ended);
    drop(send);
    // In flight while stopping.
    let (send, connection) = connect(&gate).await;
    let connection = tokio::spawn(connection);
    let mut ready = send.clone().ready().await.unwrap();
    let (answer, mut body) = ready.send_request(request(&gate, 0), false).unwrap();
    body.send_data("ab".into(), false).unwrap();
    until("it is in flight", || async {
        gate.metric("otpgate_gate_duration_seconds_count") == 3.0
    })
    .await;
    gate.stop.send(true).unwrap();
    until("no listener", || async { TcpStream::connect(gate.tcp()).await.is_err() }).await;
    body.send_data("cd".into(), true).unwrap();
    let answer = crate::peers::bounded("the answer", answer).await.unwrap();
    assert_eq!(answer.status(), 200);
    drop((answer, send, ready, body));
    crate::peers::bounded("the drain", &mut gate.running).await.unwrap();
    connection.abort();
}
