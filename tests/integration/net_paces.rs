//! Clients that trickle, stall or flood within one connection.

use std::num::NonZeroU32;
use std::time::Duration;

use bytes::Bytes;
use h2::Reason;
use http::Request;
use otpgate::config::Limits;
use otpgate::policy::{Access, Grant, Route};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep};

use crate::peers::echo::Echo;
use crate::peers::gate::{Gate, Setup, plain};
use crate::peers::h2peer;
use crate::peers::wire::Connection;
use crate::peers::{bounded, until};

const SHORT: Duration = Duration::from_millis(400);
const STEP: Duration = Duration::from_millis(50);

/// A gate whose bodies must come and go at a pace.
async fn paced(change: impl FnOnce(&mut Setup)) -> (Echo, Gate) {
    let echo = Echo::start().await;
    let mut setup = Setup::to(plain(echo.address));
    setup.h2c = true;
    setup.limits = Limits {
        body_timeout: SHORT,
        write_timeout: SHORT,
        min_body_rate: NonZeroU32::new(300),
        ..Limits::default()
    };
    change(&mut setup);
    (echo, setup.start().await)
}

/// Sends the same bytes again and again until there is an answer, and tells after how long.
async fn trickle(connection: &mut Connection<TcpStream>, bytes: &[u8]) -> (u16, Duration) {
    let started = Instant::now();
    let mut answer = Vec::new();
    while answer.is_empty() {
        assert!(started.elapsed() < Duration::from_secs(10), "no end");
        let _ = connection.stream.write_all(bytes).await;
        let _ = tokio::time::timeout(STEP, connection.stream.read_buf(&mut answer)).await;
    }
    let status = String::from_utf8_lossy(&answer[9..12]).parse().unwrap();
    (status, started.elapsed())
}

#[tokio::test]
async fn a_trickling_body_gets_408() {
    let (_echo, gate) = paced(|_| {}).await;
    let start = format!("POST / HTTP/1.1\r\nHost: gate\r\n{}", gate.proof());
    for (framing, more, drop) in [
        ("Content-Length: 100000", "", "a"),
        ("Transfer-Encoding: chunked", "", "1\r\na\r\n"),
        // Not even data: the head of a chunk that never begins.
        ("Transfer-Encoding: chunked", "", "0"),
        // Who asks for a stream still has to send the body.
        ("Content-Length: 100000", "Accept: text/event-stream\r\n", "a"),
        ("Content-Length: 100000", "Content-Type: application/grpc\r\n", "a"),
        ("Content-Length: 100000", "Upgrade: websocket\r\nConnection: upgrade\r\n", "a"),
    ] {
        let mut connection = Connection::to(gate.tcp()).await;
        connection.send(format!("{start}{framing}\r\n{more}\r\n")).await;
        let (status, took) = trickle(&mut connection, drop.as_bytes()).await;
        assert_eq!(status, 408, "{framing} {more}");
        assert!(took >= SHORT / 2 && took < 10 * SHORT, "{framing} {more}: {took:?}");
    }
}

#[tokio::test]
async fn bodies_above_the_least_rate_and_waits_for_the_upstream_pass() {
    let (_echo, gate) = paced(|_| {}).await;
    // Ten times as fast, lest a busy machine makes it slower; `Pace` has its own tests.
    let length = 200 * 40;
    let mut connection = Connection::to(gate.tcp()).await;
    for _ in 0..2 {
        let head = format!(
            "POST / HTTP/1.1\r\nHost: gate\r\nContent-Length: {length}\r\n{}\r\n",
            gate.proof()
        );
        connection.send(head).await;
        for _ in 0..40 {
            connection.send([b'a'; 200]).await;
            sleep(STEP).await;
        }
        let answer = connection.answer().await.unwrap();
        assert_eq!(answer.status, 200);
        assert!(answer.text().ends_with(&format!("\n\n{length}")));
    }
    // An upstream that reads nothing for a while: the client has sent what it could.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut setup = Setup::to(plain(listener.local_addr().unwrap()));
    setup.limits = Limits { body_timeout: SHORT, ..Limits::default() };
    let gate = setup.start().await;
    let length = 32 << 20;
    let head = format!(
        "POST / HTTP/1.1\r\nHost: gate\r\nContent-Length: {length}\r\n{}\r\n",
        gate.proof()
    );
    let (mut reading, mut writing) = TcpStream::connect(gate.tcp()).await.unwrap().into_split();
    writing.write_all(head.as_bytes()).await.unwrap();
    let sending = tokio::spawn(async move { writing.write_all(&vec![0; length]).await });
    let (upstream, _) = bounded("the request", listener.accept()).await.unwrap();
    sleep(3 * SHORT).await;
    let mut upstream = Connection::over(upstream);
    let (_, body) = bounded("the body", upstream.request()).await.unwrap();
    assert_eq!(body.len(), length);
    sending.await.unwrap().unwrap();
    // Nor does the client have to say anything while it waits for the answer.
    sleep(3 * SHORT).await;
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
    let mut answer = [0; 12];
    bounded("the answer", reading.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
}

/// A gate before an upstream that answers with as much as anybody takes.
async fn endless(change: impl FnOnce(&mut Setup)) -> Gate {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut setup = Setup::to(plain(listener.local_addr().unwrap()));
    setup.h2c = true;
    change(&mut setup);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut upstream = Connection::over(stream);
                upstream.request_head().await;
                let (_, mut upstream) = upstream.into_parts();
                let _ = upstream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
                while upstream.write_all(&[0; 64 << 10]).await.is_ok() {}
            });
        }
    });
    setup.start().await
}

fn open_connections(gate: &Gate) -> f64 {
    gate.metric(r#"otpgate_connections{listener="proxy"}"#)
}

/// Takes an answer sip by sip, for so long at most; why it came to an end, if it did.
async fn sip(gate: &Gate, limit: Duration) -> Option<std::io::ErrorKind> {
    let started = Instant::now();
    let mut client = TcpStream::connect(gate.tcp()).await.unwrap();
    client.write_all(gate.get("/").as_bytes()).await.unwrap();
    let mut sip = vec![0; 64 << 10];
    while started.elapsed() < limit {
        match client.read(&mut sip).await {
            Ok(read) => assert!(read > 0, "an orderly end"),
            Err(error) => return Some(error.kind()),
        }
        // Often enough for the gate to be rid of something all the time.
        sleep(Duration::from_millis(5)).await;
    }
    None
}

#[tokio::test]
async fn a_client_that_takes_an_answer_in_a_trickle_is_cut() {
    const PATIENT: Duration = Duration::from_secs(2);
    let before = async |min_body_rate| {
        let limits = Limits { write_timeout: PATIENT, min_body_rate, ..Limits::default() };
        endless(|setup| setup.limits = limits).await
    };
    let gate = before(NonZeroU32::new(1 << 30)).await;
    // What the kernel held for it is gone, too.
    assert_eq!(sip(&gate, 10 * PATIENT).await, Some(std::io::ErrorKind::ConnectionReset));
    until("it is closed", || async { open_connections(&gate) == 0.0 }).await;
    let gate = before(None).await;
    assert_eq!(sip(&gate, 2 * PATIENT).await, None);
}

/// Faster than asked for, but slower than a full kernel makes room: that takes it megabytes.
#[tokio::test]
async fn a_client_that_takes_an_answer_slowly_is_not_cut() {
    let gate = endless(|setup| {
        setup.limits = Limits { write_timeout: 2 * SHORT, ..Limits::default() };
    })
    .await;
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    // So that the gate's kernel, not the client's, holds what is not taken.
    socket.set_recv_buffer_size(64 << 10).unwrap();
    let mut client = socket.connect(gate.tcp()).await.unwrap();
    client.write_all(gate.get("/").as_bytes()).await.unwrap();
    let mut sip = vec![0; 16 << 10];
    for _ in 0..100 {
        assert!(client.read(&mut sip).await.unwrap() > 0);
        sleep(STEP).await;
    }
}

fn post(gate: &Gate) -> Request<()> {
    Request::post("http://gate/")
        .header("x-auth-name", "alice")
        .header("x-auth-realm", "staff")
        .header("x-auth-token", gate.token(&gate.alice))
        .body(())
        .unwrap()
}

#[tokio::test]
async fn a_stalled_or_trickling_http2_body_ends_and_its_siblings_live() {
    let (echo, gate) = paced(|_| {}).await;
    let send = h2peer::client(TcpStream::connect(gate.tcp()).await.unwrap()).await;
    for bytes in [0, 1] {
        let mut ready = bounded("a stream", send.clone().ready()).await.unwrap();
        let (answer, mut body) = ready.send_request(post(&gate), false).unwrap();
        let started = Instant::now();
        let trickle = async {
            loop {
                sleep(STEP).await;
                let _ = body.send_data(Bytes::from(vec![0; bytes]), false);
            }
        };
        let answer = tokio::select! {
            answer = bounded("the end", answer) => answer,
            () = trickle, if bytes > 0 => unreachable!(),
        };
        assert!(answer.unwrap_err().is_reset());
        let took = started.elapsed();
        assert!(took >= SHORT / 2 && took < 10 * SHORT, "{bytes}: {took:?}");
        // The connection lives, and a body that comes is taken.
        let mut ready = bounded("a stream", send.clone().ready()).await.unwrap();
        let (answer, mut body) = ready.send_request(post(&gate), false).unwrap();
        for _ in 0..20 {
            body.send_data(Bytes::from(vec![0; 200]), false).unwrap();
            sleep(STEP).await;
        }
        body.send_data(Bytes::new(), true).unwrap();
        assert_eq!(bounded("the answer", answer).await.unwrap().status(), 200);
    }
    let line = r#"otpgate_connections_refused_total{cause="body_too_slow",listener="proxy"}"#;
    assert_eq!(gate.metric(line), 2.0);
    assert_eq!(echo.seen(), 2);
}

/// An upload that its upstream does not take keeps what it was granted, not what the others need.
#[tokio::test]
async fn uploads_that_are_not_taken_leave_room_for_others_of_their_connection() {
    const STALLED: usize = 4;
    let echo = Echo::start().await;
    // The kernel takes connections there, and nobody reads.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut setup = Setup::to(plain(echo.address));
    setup.upstreams.push(plain(listener.local_addr().unwrap()));
    let anybody = Access::Allow(vec![Grant::Anybody]);
    let stuck = Route { upstream: Some(1), ..Route::new("/stuck", Access::Public) };
    setup.routes = vec![Route::new("/", anybody), stuck];
    setup.h2c = true;
    let gate = setup.start().await;
    let send = h2peer::client(TcpStream::connect(gate.tcp()).await.unwrap()).await;
    let mut stuck = Vec::new();
    for _ in 0..STALLED {
        let mut ready = bounded("a stream", send.clone().ready()).await.unwrap();
        let request = Request::post("http://gate/stuck").body(()).unwrap();
        let (_, mut body) = ready.send_request(request, false).unwrap();
        // As much as anybody takes, until nothing is granted any more.
        loop {
            body.reserve_capacity(1 << 16);
            let granted = std::future::poll_fn(|cx| body.poll_capacity(cx));
            match tokio::time::timeout(2 * SHORT, granted).await {
                Ok(granted) => {
                    let bytes = granted.unwrap().unwrap();
                    body.send_data(Bytes::from(vec![0; bytes]), false).unwrap();
                }
                Err(_) => break,
            }
        }
        stuck.push(body);
    }
    let mut ready = bounded("a stream", send.clone().ready()).await.unwrap();
    let (answer, mut body) = ready.send_request(post(&gate), false).unwrap();
    body.send_data(Bytes::from(vec![0; 60_000]), true).unwrap();
    assert_eq!(bounded("the answer", answer).await.unwrap().status(), 200);
    assert_eq!(echo.seen(), 1);
}

#[tokio::test]
async fn an_http2_stream_whose_window_stays_shut_is_cut_and_its_siblings_live() {
    let gate = endless(|setup| {
        setup.limits = Limits { write_timeout: SHORT, ..Limits::default() };
    })
    .await;
    let tcp = TcpStream::connect(gate.tcp()).await.unwrap();
    let mut builder = h2::client::Builder::new();
    let handshake = builder.initial_window_size(0).handshake::<_, Bytes>(tcp);
    let (send, connection) = bounded("the handshake", handshake).await.unwrap();
    tokio::spawn(connection);
    for _ in 0..2 {
        let mut ready = bounded("a stream", send.clone().ready()).await.unwrap();
        let (answer, _) = ready.send_request(post(&gate), true).unwrap();
        let answer = bounded("the head", answer).await.unwrap();
        assert_eq!(answer.status(), 200);
        let started = Instant::now();
        let end = bounded("the end", answer.into_body().data()).await.unwrap();
        assert!(end.unwrap_err().is_reset());
        assert!(started.elapsed() < 10 * SHORT);
    }
}

/// A client that opens requests and resets them once they are being worked on: pingora and h2 no longer
/// count them, and the upstream does not notice.
#[tokio::test]
async fn reset_requests_are_bounded_while_they_end() {
    // Nobody accepts there, so that connecting takes its time.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let full = socket_full(&listener).await;
    let mut setup = Setup::to(plain(listener.local_addr().unwrap()));
    setup.h2c = true;
    // Nothing ends while this test lasts.
    setup.timeouts.connect = Duration::from_secs(600);
    let gate = setup.start().await;
    let send = h2peer::client(TcpStream::connect(gate.tcp()).await.unwrap()).await;
    let count = "otpgate_gate_duration_seconds_count";
    let mut refused = 0;
    for sent in 1..=300 {
        let mut ready = bounded("a stream", send.clone().ready()).await.unwrap();
        let (answer, mut body) = ready.send_request(post(&gate), false).unwrap();
        let seen = async || gate.metric(count) + gate.metric(REFUSED) == f64::from(sent);
        until("it is seen", seen).await;
        body.send_reset(Reason::CANCEL);
        drop(answer);
        refused = gate.metric(REFUSED) as u32;
    }
    assert_eq!(refused, 100);
    drop(full);
}

const REFUSED: &str = r#"otpgate_connections_refused_total{cause="streams",listener="proxy"}"#;

/// Connections that fill the queue of a listener.
async fn socket_full(listener: &std::net::TcpListener) -> Vec<TcpStream> {
    let address = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(Ok(stream)) =
        tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(address)).await
    {
        queued.push(stream);
    }
    queued
}
