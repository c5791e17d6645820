//! What a stop and an upgrade mean for what lasts: WebSockets, event streams, gRPC, and requests in flight.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Request;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::{AT_ONCE, Dynasty, addresses, has_ended, tcp};
use crate::harness::{ALICE, Sandbox, address, eventually, http, token};
use crate::peers::bounded;
use crate::peers::h2peer::{self, EchoH2};
use crate::peers::wire::Connection;

/// How long streams live on, in these tests.
const STREAMS: Duration = Duration::from_secs(2);
/// A close frame with status 1001, not masked.
const GOING_AWAY: &[u8] = b"\x88\x02\x03\xe9";

fn proof() -> String {
    format!("X-Auth-Name: alice\r\nX-Auth-Realm: shop\r\nX-Auth-Token: {}\r\n", token(ALICE))
}

/// An upstream that switches to an echo, begins a stream of events, or waits for a whole body.
async fn upstream() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(Connection::over(stream)));
        }
    });
    address
}

async fn answer(mut connection: Connection<TcpStream>) {
    let Some(head) = connection.request_head().await else { return };
    let head = head.to_lowercase();
    if head.contains("upgrade: websocket") {
        let switched = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\
                        Upgrade: websocket\r\n\r\n";
        connection.send(switched).await;
        let (_, mut stream) = connection.into_parts();
        let mut part = [0; 512];
        while let Ok(n @ 1..) = stream.read(&mut part).await {
            let _ = stream.write_all(&part[..n]).await;
        }
    } else if head.contains("text/event-stream") {
        let begun = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\
                     Transfer-Encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n";
        connection.send(begun).await;
        std::future::pending::<()>().await;
    } else {
        let (mut body, mut stream) = connection.into_parts();
        while body.len() < 4 && matches!(stream.read_buf(&mut body).await, Ok(1..)) {}
        if body.len() == 4 {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        }
    }
}

async fn found(sandbox: &Sandbox, grpc: &EchoH2, grace: &str, more: &str) -> Dynasty {
    let settings = format!(
        "[proxy]\nupstream = '{}'\nlisten = [{{ address = '127.0.0.1:0', h2c = true }}]\n\
         [shutdown]\nstreams = '2s'\ngrace = '{grace}'\n{more}\n[[route]]\npath = '/'\nallow = ['*']\n\
         [[route]]\npath = '/grpc'\nallow = ['*']\nupstream = 'h2c://{}'\n",
        upstream().await,
        grpc.address
    );
    Dynasty::found(sandbox, &settings).await
}

/// One of each, open.
struct Open {
    tunnel: TcpStream,
    events: TcpStream,
    call: h2peer::Exchange,
    /// A request of which half the body was sent.
    request: Connection<TcpStream>,
}

impl Open {
    async fn at(address: std::net::SocketAddr) -> Self {
        let mut tunnel = Connection::to(address).await;
        let upgrade =
            "GET /ws HTTP/1.1\r\nHost: g\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n";
        assert_eq!(tunnel.ask(format!("{upgrade}{}\r\n", proof())).await.unwrap().status, 101);
        let (_, mut tunnel) = tunnel.into_parts();
        echoes(&mut tunnel).await;
        let mut events = TcpStream::connect(address).await.unwrap();
        let asked =
            format!("GET / HTTP/1.1\r\nHost: g\r\nAccept: text/event-stream\r\n{}\r\n", proof());
        events.write_all(asked.as_bytes()).await.unwrap();
        let mut begun = Vec::new();
        while !begun.ends_with(b"data: 1\n\n\r\n") {
            assert!(bounded("events", events.read_buf(&mut begun)).await.unwrap() > 0);
        }
        let send = h2peer::client(TcpStream::connect(address).await.unwrap()).await;
        let request = Request::post("http://g/grpc")
            .header("content-type", "application/grpc")
            .header("x-auth-name", "alice")
            .header("x-auth-realm", "shop")
            .header("x-auth-token", token(ALICE))
            .body(())
            .unwrap();
        let mut call = h2peer::open(&send, request).await;
        call.body.send_data(Bytes::from_static(b"one"), false).unwrap();
        assert_eq!(h2peer::data(call.response.body_mut()).await.unwrap(), "one");
        let mut request = Connection::to(address).await;
        request
            .send(format!("POST / HTTP/1.1\r\nHost: g\r\nContent-Length: 4\r\n{}\r\nab", proof()))
            .await;
        Self { tunnel, events, call, request }
    }

    /// All live on for their bound, and then end as each does; the request is answered.
    async fn end_in_order(mut self, since: Instant) {
        let mut rest = Vec::new();
        let ended = bounded("the tunnel's end", self.tunnel.read_to_end(&mut rest)).await;
        assert_eq!((ended.unwrap(), rest.as_slice()), (4, GOING_AWAY));
        assert!(since.elapsed() >= STREAMS, "{:?}", since.elapsed());
        let mut rest = Vec::new();
        let _ = bounded("the end of the events", self.events.read_to_end(&mut rest)).await;
        assert_eq!(rest, b"");
        let error = bounded("the end of the call", self.call.response.body_mut().data()).await;
        let error = error.unwrap().unwrap_err();
        assert_eq!(error.reason(), Some(h2::Reason::CANCEL), "{error}");
        // It is no stream: it has the whole grace.
        self.request.send("cd").await;
        let answer = self.request.answer().await.expect("the request in flight is answered");
        assert_eq!((answer.status, answer.header("connection")), (200, Some("close")));
    }
}

async fn echoes(tunnel: &mut TcpStream) {
    // A whole frame.
    tunnel.write_all(b"\x82\x04ping").await.unwrap();
    let mut echoed = [0; 6];
    bounded("the echo", tunnel.read_exact(&mut echoed)).await.unwrap();
    assert_eq!(&echoed, b"\x82\x04ping");
}

#[allow(clippy::disallowed_methods, reason = "tests run against real time")]
fn now() -> Instant {
    Instant::now()
}

#[tokio::test]
async fn at_a_stop_requests_finish_and_streams_have_a_bound_of_their_own() {
    let (sandbox, grpc) = (Sandbox::with_entries(), EchoH2::start(None).await);
    let gates = found(&sandbox, &grpc, "15s", "").await;
    let mut open = Open::at(address(&gates.gate.proxy)).await;
    let stopped = now();
    gates.gate.signal(libc::SIGTERM);
    gates.gate.wait_for_log(|line| line["message"] == "SIGTERM: draining").unwrap();
    echoes(&mut open.tunnel).await;
    open.end_in_order(stopped).await;
    let told = gates.gate.wait_for_log(|line| line["streams"] == 3).unwrap();
    assert!(told["message"].as_str().unwrap().contains("ended"), "{told}");
    gates.gate.wait_for_log(|line| line["message"] == "stopped").unwrap();
    let log = gates.gate.log_text();
    assert_eq!(log.matches("\"reason\":\"stopping\"").count(), 3, "{log}");
    assert!(!log.contains("requests still ran"), "{log}");
    let pid = gates.reigning;
    eventually("it ends", || async { has_ended(pid).then_some(()) }).await;
    assert!(stopped.elapsed() < AT_ONCE);
}

#[tokio::test]
async fn at_an_upgrade_what_is_open_stays_with_the_old_process() {
    let (sandbox, grpc) = (Sandbox::with_entries(), EchoH2::start(None).await);
    let mut gates = found(&sandbox, &grpc, "15s", "").await;
    let proxy = tcp(&addresses(&gates.gate, "proxy")[0]);
    let mut open = Open::at(proxy).await;
    let upgraded = now();
    let old = gates.upgrade();
    echoes(&mut open.tunnel).await;
    // The new one serves others meanwhile.
    let mut others = Open::at(proxy).await;
    open.end_in_order(upgraded).await;
    eventually("the old one ends", || async { has_ended(old).then_some(()) }).await;
    echoes(&mut others.tunnel).await;
}

/// Whoever stops the service while the old process drains, as systemd tells all of its processes, cuts nothing.
#[tokio::test]
async fn a_stop_after_an_upgrade_cuts_nobody() {
    let (sandbox, grpc) = (Sandbox::with_entries(), EchoH2::start(None).await);
    let mut gates = found(&sandbox, &grpc, "15s", "").await;
    let mut accepted = Connection::to(tcp(&addresses(&gates.gate, "proxy")[0])).await;
    let half = format!("POST / HTTP/1.1\r\nHost: g\r\nContent-Length: 4\r\n{}\r\nab", proof());
    accepted.send(half).await;
    gates.gate.wait_for_log(|line| line["message"] == "serving");
    let old = gates.upgrade();
    for pid in [old, gates.reigning] {
        // SAFETY: kill takes two integers.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    }
    gates.gate.wait_for_log(|line| line["message"] == "SIGTERM: draining already").unwrap();
    eventually("the new one ends", || async { has_ended(gates.reigning).then_some(()) }).await;
    accepted.send("cd").await;
    assert_eq!(accepted.answer().await.expect("it is answered").status, 200);
    // A second one means now.
    gates.reigning = old;
    gates.signal(libc::SIGTERM);
    eventually("the old one ends", || async { has_ended(old).then_some(()) }).await;
}

/// Kept-alive connections hear of the end with their next answer, already while load balancers have their delay.
#[tokio::test]
async fn a_stop_turns_readiness_red_then_closes_and_a_second_signal_means_now() {
    let (sandbox, grpc) = (Sandbox::with_entries(), EchoH2::start(None).await);
    let gates = found(&sandbox, &grpc, "15s", "delay = '1s'").await;
    let proxy = address(&gates.gate.proxy);
    let mut kept = Connection::to(address(&gates.gate.api)).await;
    let ask = "GET /nothing HTTP/1.1\r\nHost: g\r\n\r\n";
    assert_eq!(kept.ask(ask).await.unwrap().header("connection"), Some("keep-alive"));
    let stopped = now();
    gates.gate.signal(libc::SIGTERM);
    let url = format!("{}/readyz", gates.gate.ops);
    eventually("readiness is red", || async {
        (http().get(&url).send().await.unwrap().status() == 503).then_some(())
    })
    .await;
    assert_eq!(kept.ask(ask).await.unwrap().header("connection"), Some("close"));
    let mut accepted = Connection::to(proxy).await;
    accepted
        .send(format!("POST / HTTP/1.1\r\nHost: g\r\nContent-Length: 4\r\n{}\r\nab", proof()))
        .await;
    eventually("the listener is closed", || async {
        TcpStream::connect(proxy).await.is_err().then_some(())
    })
    .await;
    assert!(stopped.elapsed() >= Duration::from_secs(1), "after the delay");
    let live = http().get(format!("{}/livez", gates.gate.ops)).send().await.unwrap();
    assert_eq!(live.status(), 200, "probes go on");
    gates.gate.signal(libc::SIGTERM);
    gates.gate.wait_for_log(|line| line["message"] == "SIGTERM again: stopping at once").unwrap();
    assert!(accepted.answer().await.is_none());
    let pid = gates.reigning;
    eventually("it ends", || async { has_ended(pid).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_the_grace_says_how_many_were_cut() {
    let (sandbox, grpc) = (Sandbox::with_entries(), EchoH2::start(None).await);
    let gates = found(&sandbox, &grpc, "4s", "").await;
    let open = Open::at(address(&gates.gate.proxy)).await;
    gates.gate.signal(libc::SIGTERM);
    let told = gates.gate.wait_for_log(|line| line["connections"].is_u64()).unwrap();
    assert_eq!(told["connections"], 1, "the request; streams had their end: {told}");
    drop(open);
    gates.gate.wait_for_log(|line| line["message"] == "stopped").unwrap();
}
