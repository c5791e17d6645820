//! Upgrades, refused ones, and others that wait for a stream.

use std::net::SocketAddr;
use std::time::Duration;

use otpgate::config::{Limits, Target, Upstream, UpstreamHttp, UpstreamTimeouts, UpstreamTls};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio_rustls::TlsAcceptor;

use crate::peers::bounded;
use crate::peers::gate::{Gate, Setup, plain};
use crate::peers::h2peer::EchoH2;
use crate::peers::tls::Pki;
use crate::peers::wire::{Connection, ask};

const SHORT: Duration = Duration::from_millis(300);
const SWITCHED: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\
                        Upgrade: websocket\r\n\r\n";

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// The upstream's side of the next request, its head read.
async fn asked(listener: &TcpListener) -> (String, Connection<TcpStream>) {
    let (stream, _) = bounded("the upstream is asked", listener.accept()).await.unwrap();
    let mut upstream = Connection::over(stream);
    let head = bounded("the head", upstream.request_head()).await.unwrap();
    (head, upstream)
}

fn upgrade(gate: &Gate) -> String {
    format!(
        "GET /ws HTTP/1.1\r\nHost: g\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n{}\r\n",
        gate.proof()
    )
}

fn events(gate: &Gate) -> String {
    format!("GET / HTTP/1.1\r\nHost: g\r\nAccept: text/event-stream\r\n{}\r\n", gate.proof())
}

async fn impatient(address: SocketAddr) -> Gate {
    let mut setup = Setup::to(plain(address));
    setup.timeouts = UpstreamTimeouts { read: SHORT, ..UpstreamTimeouts::default() };
    setup.start().await
}

/// Switches at once, then sends four bytes back.
async fn switch<S: AsyncRead + AsyncWrite + Unpin>(stream: S) {
    let mut upstream = Connection::over(stream);
    if upstream.request_head().await.is_none() {
        return;
    }
    upstream.send(SWITCHED).await;
    let (_, mut stream) = upstream.into_parts();
    let mut four = [0; 4];
    if stream.read_exact(&mut four).await.is_ok() {
        let _ = stream.write_all(&four).await;
        let _ = stream.flush().await;
    }
}

async fn tunnels(gate: &Gate, count: usize) {
    for round in 0..count {
        let mut client = Connection::to(gate.tcp()).await;
        assert_eq!(client.ask(upgrade(gate)).await.unwrap().status, 101);
        client.send("ping").await;
        let mut echoed = [0; 4];
        let read = bounded("the echo", client.stream.read_exact(&mut echoed)).await;
        assert!(read.is_ok(), "round {round}");
    }
}

/// Both sides at once is what makes the order of their events random.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_never_ends_as_it_begins() {
    let (listener, address) = listener().await;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            switch(stream).await;
        }
    });
    tunnels(&Setup::to(plain(address)).start().await, 200).await;
}

#[tokio::test]
async fn tunnels_pass_tls_and_unix_sockets() {
    let (listener, address) = listener().await;
    let pki = Pki::new();
    let acceptor = TlsAcceptor::from(pki.server(&[]));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            switch(acceptor.accept(stream).await.unwrap()).await;
        }
    });
    let over_tls = Upstream {
        targets: vec![Target::Host("127.0.0.1".into(), address.port())],
        http: UpstreamHttp::Auto,
        tls: Some(UpstreamTls {
            server_name: "localhost".into(),
            ca_file: Some(pki.ca_file.clone()),
        }),
    };
    tunnels(&Setup::to(over_tls).start().await, 3).await;

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("upstream");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            switch(stream).await;
        }
    });
    let targets = vec![Target::Unix(path)];
    let on_unix = Upstream { targets, http: UpstreamHttp::Http1, tls: None };
    tunnels(&Setup::to(on_unix).start().await, 3).await;
}

#[tokio::test]
async fn a_tunnel_to_nowhere_is_a_502_and_other_servers_are_tried() {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let nowhere = socket.local_addr().unwrap();
    let gate = Setup::to(plain(nowhere)).start().await;
    assert_eq!(ask(gate.tcp(), upgrade(&gate)).await.status, 502);
    assert_eq!(gate.metric(r#"otpgate_upstream_failures_total{cause="refused"}"#), 1.0);

    let (listener, address) = listener().await;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            switch(stream).await;
        }
    });
    let mut both = plain(nowhere);
    both.targets.extend(plain(address).targets);
    tunnels(&Setup::to(both).start().await, 2).await;
}

#[tokio::test]
async fn bytes_behind_a_refused_upgrade_are_a_request_of_their_own() {
    let (listener, address) = listener().await;
    let gate = Setup::to(plain(address)).start().await;
    let mut client = Connection::to(gate.tcp()).await;
    let smuggled = "GET /admin HTTP/1.1\r\nHost: g\r\nX-Auth-Name: root\r\n\r\n";
    client.send(upgrade(&gate) + smuggled).await;
    let (_, mut upstream) = asked(&listener).await;
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno").await;
    assert_eq!(client.answer().await.unwrap().text(), "no");
    assert_eq!(client.answer().await.unwrap().status, 401);
    drop(client);
    // The upstream got no further byte.
    assert!(upstream.ends().await);
}

#[tokio::test]
async fn a_switch_that_nobody_asked_for_is_a_502() {
    for (answer, asks) in [(SWITCHED.to_owned(), false), (SWITCHED.replace("/1.1", "/1.0"), true)] {
        let (listener, address) = listener().await;
        let gate = Setup::to(plain(address)).start().await;
        let mut client = Connection::to(gate.tcp()).await;
        client.send(if asks { upgrade(&gate) } else { gate.get("/") }).await;
        let (_, mut upstream) = asked(&listener).await;
        upstream.send(answer).await;
        assert_eq!(client.answer().await.unwrap().status, 502);
    }
}

#[tokio::test]
async fn the_wait_for_a_stream_to_begin_is_bounded() {
    let (listener, address) = listener().await;
    let gate = impatient(address).await;
    for request in [upgrade(&gate), events(&gate)] {
        let answer = ask(gate.tcp(), request).await;
        assert_eq!(answer.status, 504);
        assert!(answer.json()["request_id"].is_string());
        let _ = listener.accept().await;
    }
    assert_eq!(gate.metric(r#"otpgate_upstream_failures_total{cause="read_timeout"}"#), 2.0);
}

#[tokio::test]
async fn a_stream_that_has_begun_may_be_silent() {
    let (listener, address) = listener().await;
    let gate = impatient(address).await;
    let mut client = Connection::to(gate.tcp()).await;
    client.send(events(&gate)).await;
    let (_, mut upstream) = asked(&listener).await;
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n").await;
    tokio::time::sleep(3 * SHORT).await;
    upstream.send("late").await;
    assert_eq!(client.answer().await.unwrap().text(), "late");
    // The bound belonged to that request.
    tokio::time::sleep(2 * SHORT).await;
    client.send(gate.get("/")).await;
    let request = bounded("the next request", upstream.request_head()).await;
    assert!(request.unwrap().starts_with("GET / "));
}

#[tokio::test]
async fn who_leaves_before_a_stream_begins_is_not_waited_for() {
    let (listener, address) = listener().await;
    let gate = Setup::to(plain(address)).start().await;
    for request in [upgrade(&gate), events(&gate)] {
        let mut client = Connection::to(gate.tcp()).await;
        client.send(request).await;
        let (_, mut upstream) = asked(&listener).await;
        drop(client);
        assert!(upstream.ends().await);
    }
}

#[tokio::test]
async fn the_bound_on_bodies_is_not_one_on_tunnels() {
    let (listener, address) = listener().await;
    let mut setup = Setup::to(plain(address));
    setup.limits = Limits { max_body_bytes: Some(10), ..Limits::default() };
    let gate = setup.start().await;
    let mut client = Connection::to(gate.tcp()).await;
    client.send(upgrade(&gate)).await;
    let (_, mut upstream) = asked(&listener).await;
    upstream.send(SWITCHED).await;
    assert_eq!(client.answer().await.unwrap().status, 101);
    client.send("more than ten bytes").await;
    let (_, mut stream) = upstream.into_parts();
    let mut got = [0; 19];
    bounded("the bytes", stream.read_exact(&mut got)).await.unwrap();
}

/// Clients such as Java's offer h2c with every first request.
#[tokio::test]
async fn an_offer_of_h2c_changes_nothing() {
    let upstream = EchoH2::start(None).await;
    let gate = Setup::to(Upstream {
        targets: vec![Target::Host("127.0.0.1".into(), upstream.address.port())],
        http: UpstreamHttp::Http2,
        tls: None,
    })
    .start()
    .await;
    let request = format!(
        "GET / HTTP/1.1\r\nHost: g\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\
         HTTP2-Settings: AAMAAABk\r\n{}\r\n",
        gate.proof()
    );
    assert_eq!(ask(gate.tcp(), request).await.status, 200);
    let (_silent, address) = listener().await;
    let gate = impatient(address).await;
    let request = format!(
        "GET / HTTP/1.1\r\nHost: g\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n{}\r\n",
        gate.proof()
    );
    assert_eq!(ask(gate.tcp(), request).await.status, 504);
}

#[tokio::test]
async fn versions_are_those_of_each_connection() {
    let (listener, address) = listener().await;
    let gate = Setup::to(plain(address)).start().await;
    for (old, new, answer) in [
        ("HTTP/1.1", "HTTP/1.0", "HTTP/1.1 200 OK\r\n\r\nhi"),
        (
            "HTTP/1.1",
            "HTTP/1.0",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        ),
        ("HTTP/1.1", "HTTP/1.1", "HTTP/1.0 200 OK\r\n\r\nhi"),
        ("HTTP/1.1", "HTTP/1.1", "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi"),
    ] {
        let mut client = Connection::to(gate.tcp()).await;
        client.send(gate.get("/").replace(old, new)).await;
        let (_, mut upstream) = asked(&listener).await;
        upstream.send(answer).await;
        drop(upstream);
        let got = client.answer().await.unwrap();
        assert!(got.head.starts_with("HTTP/1.1 200"), "{}", got.head);
        assert_eq!(got.text(), "hi");
        // HTTP/1.0 knows no chunks.
        assert!(new == "HTTP/1.1" || got.header("transfer-encoding").is_none(), "{}", got.head);
    }
}
