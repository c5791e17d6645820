//! Streams pass as they come: HTTP/2, gRPC, WebSocket, bodies of any size.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::{HeaderMap, Request};
use otpgate::config::{Limits, Target, Upstream, UpstreamHttp, UpstreamTimeouts, UpstreamTls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::{self, Message};

use crate::peers::bounded;
use crate::peers::echo::Echo;
use crate::peers::gate::{Gate, Setup, plain};
use crate::peers::h2peer::{self, EchoH2};
use crate::peers::tls::Pki;
use crate::peers::wire::{Connection, ask, header};

fn h2(address: SocketAddr, tls: Option<&Pki>, http: UpstreamHttp) -> Upstream {
    let tls = tls.map(|pki| UpstreamTls {
        server_name: "localhost".into(),
        ca_file: Some(pki.ca_file.clone()),
    });
    let targets = vec![Target::Host("127.0.0.1".into(), address.port())];
    Upstream { targets, http, tls }
}

fn proven(gate: &Gate, uri: &str) -> http::request::Builder {
    Request::builder()
        .uri(uri)
        .header("x-auth-name", "alice")
        .header("x-auth-realm", "staff")
        .header("x-auth-token", gate.token(&gate.alice))
}

#[tokio::test]
async fn http1_and_http2_are_negotiated_over_tls() {
    let (echo, pki) = (Echo::start().await, Pki::new());
    let mut setup = Setup::to(plain(echo.address));
    setup.tls = Some(pki.files.clone());
    let gate = setup.start().await;
    let send = h2peer::tls_client(gate.tcp(), &pki).await;
    let request = proven(&gate, "https://localhost/two").body(()).unwrap();
    let (answer, body) = h2peer::ask(&send, request).await;
    assert_eq!(answer.status(), 200);
    let seen = String::from_utf8(body).unwrap();
    assert!(seen.starts_with("GET /two HTTP/1.1"), "{seen}");
    assert_eq!(header(&seen, "x-forwarded-proto"), Some("https"));
    let refused = Request::builder().uri("https://localhost/").body(()).unwrap();
    let (answer, body) = h2peer::ask(&send, refused).await;
    assert_eq!(answer.status(), 401);
    assert!(answer.headers().contains_key("date"));
    assert!(serde_json::from_slice::<serde_json::Value>(&body).unwrap()["request_id"].is_string());
    for alpn in [&["http/1.1"][..], &[]] {
        let stream = h2peer::tls(gate.tcp(), &pki, alpn).await;
        let mut connection = Connection::over(stream);
        for _ in 0..2 {
            assert_eq!(connection.ask(gate.get("/")).await.unwrap().status, 200);
        }
    }
}

#[tokio::test]
async fn a_certificate_is_reloaded_for_new_connections() {
    let (echo, old, new) = (Echo::start().await, Pki::new(), Pki::new());
    let mut setup = Setup::to(plain(echo.address));
    setup.tls = Some(old.files.clone());
    let gate = setup.start().await;
    let before = h2peer::tls_client(gate.tcp(), &old).await;
    std::fs::copy(&new.files.cert_file, &old.files.cert_file).unwrap();
    assert!(gate.renew().is_err(), "the key is not the new certificate's");
    drop(h2peer::tls(gate.tcp(), &old, &[]).await);
    std::fs::copy(&new.files.key_file, &old.files.key_file).unwrap();
    gate.renew().unwrap();
    for connection in [before, h2peer::tls_client(gate.tcp(), &new).await] {
        let request = proven(&gate, "https://localhost/").body(()).unwrap();
        assert_eq!(h2peer::ask(&connection, request).await.0.status(), 200);
    }
}

/// Sends messages one by one, and each comes back before the next is sent.
async fn talk(gate: &Gate, send: &h2::client::SendRequest<Bytes>, uri: &str) -> HeaderMap {
    let request = proven(gate, uri)
        .method("POST")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("x_auth.name", "root");
    let mut refused = h2peer::open(send, request.body(()).unwrap()).await;
    assert_eq!(refused.response.status(), 400);
    let _ = refused.body.send_data(Bytes::new(), true);
    let request = proven(gate, uri)
        .method("POST")
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    let mut exchange = h2peer::open(send, request.body(()).unwrap()).await;
    assert_eq!(exchange.response.status(), 200);
    let seen = exchange.response.headers().clone();
    assert_eq!(seen["seen-x-auth-name"], "alice");
    assert_eq!(seen["seen-x-auth-realm"], "staff");
    assert_eq!(seen["seen-path"], "/pkg.Service/Method");
    assert_eq!(seen["seen-te"], "trailers");
    assert!(!seen.contains_key("seen-x-auth-token"));
    let body = exchange.response.body_mut();
    for message in ["one", "two", "three"] {
        exchange.body.send_data(Bytes::from(message), false).unwrap();
        assert_eq!(h2peer::data(body).await.unwrap(), message);
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("x-auth-name", "root".parse().unwrap());
    exchange.body.send_trailers(trailers).unwrap();
    assert!(h2peer::data(body).await.is_none());
    bounded("trailers", body.trailers()).await.unwrap().unwrap()
}

#[tokio::test]
async fn grpc_streams_pass_both_ways_unbuffered_over_h2c() {
    let upstream = EchoH2::start(None).await;
    let mut setup = Setup::to(h2(upstream.address, None, UpstreamHttp::Http2));
    setup.h2c = true;
    let gate = setup.start().await;
    let send = h2peer::client(TcpStream::connect(gate.tcp()).await.unwrap()).await;
    let trailers = talk(&gate, &send, "http://gate/pkg.Service/Method").await;
    assert_eq!(trailers["grpc-status"], "0");
    assert_eq!(trailers["seen-trailers"], "", "trailers bring no identity");
    // HTTP/1.1 goes on beside it.
    assert_eq!(ask(gate.tcp(), "GET / HTTP/1.1\r\nHost: g\r\n\r\n").await.status, 401);
}

#[tokio::test]
async fn grpc_streams_pass_both_ways_unbuffered_over_tls() {
    let pki = Pki::new();
    let upstream = EchoH2::start(Some(pki.server(&["h2"]))).await;
    for http in [UpstreamHttp::Http2, UpstreamHttp::Auto] {
        let mut setup = Setup::to(h2(upstream.address, Some(&pki), http));
        setup.tls = Some(pki.files.clone());
        let gate = setup.start().await;
        let send = h2peer::tls_client(gate.tcp(), &pki).await;
        let trailers = talk(&gate, &send, "https://localhost/pkg.Service/Method").await;
        assert_eq!(trailers["grpc-status"], "0");
    }
}

#[tokio::test]
async fn a_grpc_stream_may_be_silent_for_longer_than_an_answer() {
    let upstream = EchoH2::start(None).await;
    let mut setup = Setup::to(h2(upstream.address, None, UpstreamHttp::Http2));
    setup.h2c = true;
    setup.timeouts =
        UpstreamTimeouts { read: Duration::from_millis(100), ..UpstreamTimeouts::default() };
    let gate = setup.start().await;
    let send = h2peer::client(TcpStream::connect(gate.tcp()).await.unwrap()).await;
    let request = proven(&gate, "http://gate/x")
        .method("POST")
        .header("content-type", "application/grpc+proto");
    let mut exchange = h2peer::open(&send, request.body(()).unwrap()).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    exchange.body.send_data(Bytes::from("late"), true).unwrap();
    assert_eq!(h2peer::data(exchange.response.body_mut()).await.unwrap(), "late");
}

/// A WebSocket server that echoes.
async fn websocket_echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let Ok(mut socket) = tokio_tungstenite::accept_async(stream).await else { return };
                while let Some(Ok(message)) = socket.next().await {
                    if message.is_close() || socket.send(message).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn websockets_pass_once_proven_and_outlive_the_time_outs_of_requests() {
    let short = Duration::from_millis(100);
    let mut setup = Setup::to(plain(websocket_echo().await));
    setup.timeouts = UpstreamTimeouts { read: short, ..UpstreamTimeouts::default() };
    setup.limits = Limits {
        body_timeout: short,
        head_timeout: short,
        keepalive_timeout: short,
        ..Limits::default()
    };
    let gate = setup.start().await;
    let request = |proof: bool| {
        let mut request = tungstenite::client::IntoClientRequest::into_client_request(format!(
            "ws://{}/socket",
            gate.tcp()
        ))
        .unwrap();
        if proof {
            let headers = request.headers_mut();
            headers.insert("x-auth-name", "alice".parse().unwrap());
            headers.insert("x-auth-realm", "staff".parse().unwrap());
            headers.insert("x-auth-token", gate.token(&gate.alice).parse().unwrap());
        }
        request
    };
    let stream = TcpStream::connect(gate.tcp()).await.unwrap();
    let refused = tokio_tungstenite::client_async(request(false), stream).await;
    assert!(matches!(refused, Err(tungstenite::Error::Http(answer)) if answer.status() == 401));
    let stream = TcpStream::connect(gate.tcp()).await.unwrap();
    let (mut socket, answer) =
        bounded("the upgrade", tokio_tungstenite::client_async(request(true), stream))
            .await
            .unwrap();
    assert_eq!(answer.status(), 101);
    for text in ["one", "two"] {
        socket.send(Message::text(text)).await.unwrap();
        assert_eq!(bounded("echo", socket.next()).await.unwrap().unwrap(), Message::text(text));
        tokio::time::sleep(3 * short).await;
    }
    let large = Message::binary(vec![7; 1 << 20]);
    socket.send(large.clone()).await.unwrap();
    assert_eq!(bounded("echo", socket.next()).await.unwrap().unwrap(), large);
}

#[tokio::test]
async fn other_upgrades_are_not_passed_on() {
    let echo = Echo::start().await;
    let gate = Setup::to(plain(echo.address)).start().await;
    let request = format!(
        "GET / HTTP/1.1\r\nHost: g\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\
         HTTP2-Settings: AAMAAABk\r\n{}\r\n",
        gate.proof()
    );
    let answer = ask(gate.tcp(), request).await;
    assert_eq!(answer.status, 200);
    let seen = answer.text().to_lowercase();
    assert!(!seen.contains("upgrade") && !seen.contains("http2-settings"), "{seen}");
}

/// Reads a body of `size` bytes, then sends as many back.
async fn mirror_of_size(size: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut connection = Connection::over(stream);
                let Some(head) = connection.request_head().await else { return };
                assert_eq!(header(&head, "content-length").unwrap(), size.to_string());
                let (ahead, mut stream) = connection.into_parts();
                let mut buffer = vec![0; 64 << 10];
                let mut left = size - ahead.len();
                while left > 0 {
                    left -= stream.read(&mut buffer).await.unwrap();
                }
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n");
                stream.write_all(head.as_bytes()).await.unwrap();
                for _ in 0..size / buffer.len() {
                    if stream.write_all(&buffer).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// Resident memory of this process, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<usize>().unwrap() << 10
}

#[tokio::test]
async fn large_bodies_pass_both_ways_in_flat_memory() {
    const SIZE: usize = 100 << 20;
    let gate = Setup::to(plain(mirror_of_size(SIZE).await)).start().await;
    let mut stream = TcpStream::connect(gate.tcp()).await.unwrap();
    let head =
        format!("POST / HTTP/1.1\r\nHost: g\r\nContent-Length: {SIZE}\r\n{}\r\n", gate.proof());
    let (mut before, mut most) = (usize::MAX, 0);
    let buffer = vec![0; 64 << 10];
    stream.write_all(head.as_bytes()).await.unwrap();
    for round in 0..SIZE / buffer.len() {
        stream.write_all(&buffer).await.unwrap();
        if round % 64 == 0 {
            before = before.min(resident());
            most = most.max(resident());
        }
    }
    let mut got = 0;
    let mut buffer = buffer;
    while got < SIZE {
        let n = bounded("the mirrored body", stream.read(&mut buffer)).await.unwrap();
        assert_ne!(n, 0, "{got}");
        got += n;
        most = most.max(resident());
    }
    // Client, gate and upstream are this process, other tests run beside.
    assert!(most - before < 60 << 20, "grew by {} MiB", (most - before) >> 20);
}

#[tokio::test]
async fn chunks_reach_the_upstream_as_they_come() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gate = Setup::to(plain(listener.local_addr().unwrap())).start().await;
    let mut client = Connection::to(gate.tcp()).await;
    client
        .send(format!(
            "PUT / HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n{}\r\n3\r\nabc\r\n",
            gate.proof()
        ))
        .await;
    let (stream, _) = bounded("the upstream is asked", listener.accept()).await.unwrap();
    let mut upstream = Connection::over(stream);
    let head = bounded("the head", upstream.request_head()).await.unwrap();
    assert_eq!(header(&head, "transfer-encoding"), Some("chunked"));
    let (ahead, mut stream) = upstream.into_parts();
    let mut seen = ahead;
    while !seen.ends_with(b"abc\r\n") {
        bounded("the first chunk", stream.read_buf(&mut seen)).await.unwrap();
    }
    // The client is not done, but the answer's beginning reaches it.
    stream
        .write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"2\r\nhi\r\n") {
        bounded("the answer", client.stream.read_buf(&mut answer)).await.unwrap();
    }
    client.send("2\r\nde\r\n0\r\n\r\n").await;
    while !seen.ends_with(b"de\r\n0\r\n\r\n") {
        bounded("the rest", stream.read_buf(&mut seen)).await.unwrap();
    }
}

#[tokio::test]
async fn continue_is_asked_of_the_upstream_after_the_decision() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gate = Setup::to(plain(listener.local_addr().unwrap())).start().await;
    let request = |proof: String| {
        format!(
            "PUT / HTTP/1.1\r\nHost: g\r\nContent-Length: 2\r\nExpect: 100-continue\r\n{proof}\r\n"
        )
    };
    let refused = ask(gate.tcp(), request(String::new())).await;
    assert_eq!((refused.status, refused.header("connection")), (401, Some("close")));
    let mut client = Connection::to(gate.tcp()).await;
    client.send(request(gate.proof())).await;
    let (stream, _) = bounded("the upstream is asked", listener.accept()).await.unwrap();
    let mut upstream = Connection::over(stream);
    bounded("the head", upstream.request_head()).await.unwrap();
    upstream.send("HTTP/1.1 100 Continue\r\n\r\n").await;
    assert_eq!(client.answer().await.unwrap().status, 100);
    client.send("hi").await;
    upstream.send("HTTP/1.1 204 No Content\r\n\r\n").await;
    assert_eq!(client.answer().await.unwrap().status, 204);
}

#[tokio::test]
async fn a_client_may_close_its_half_and_wait() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gate = Setup::to(plain(listener.local_addr().unwrap())).start().await;
    let mut client = Connection::to(gate.tcp()).await;
    client.send(gate.get("/")).await;
    client.stream.shutdown().await.unwrap();
    let (stream, _) = bounded("the upstream is asked", listener.accept()).await.unwrap();
    let mut upstream = Connection::over(stream);
    bounded("the head", upstream.request_head()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi").await;
    assert_eq!(client.answer().await.unwrap().text(), "hi");
}
