//! What only shows on a socket: framing, unread bodies, kept-alive and pipelined requests, HTTP/2.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::api_harness::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// Sends bytes and reads until the server closes.
async fn exchange(gate: &Gate, sent: &str) -> String {
    let mut stream = TcpStream::connect(gate.address).await.unwrap();
    stream.write_all(sent.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    tokio::time::timeout(PATIENCE, read).await.expect("the server closes").unwrap();
    String::from_utf8(answer).unwrap()
}

/// Reads until `end` has come.
async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut text = String::new();
    while !text.contains(end) {
        let mut buffer = [0; 4096];
        let read = tokio::time::timeout(PATIENCE, stream.read(&mut buffer)).await;
        let n = read.unwrap_or_else(|_| panic!("waiting for {end}: {text}")).unwrap();
        assert!(n > 0, "closed before {end}: {text}");
        text.push_str(std::str::from_utf8(&buffer[..n]).unwrap());
    }
    text
}

#[tokio::test]
async fn answers_are_framed() {
    let gate = Gate::start().await;
    let body = body_of(ADMIN, json!({})).to_string();
    let ask = |method: &str, path: &str| {
        format!(
            "{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let shown = exchange(&gate, &ask("GET", "/ungleichotp/3/")).await;
    assert!(shown.starts_with("HTTP/1.1 200") && shown.contains("Content-Length: "), "{shown}");
    let head = exchange(&gate, &ask("HEAD", "/ungleichotp/3/")).await;
    assert!(head.ends_with("\r\n\r\n") && head.contains("Content-Length: "), "{head}");
    let list = exchange(&gate, &ask("GET", "/ungleichotp/")).await;
    assert!(list.to_lowercase().contains("transfer-encoding: chunked"), "{list}");
    assert!(list.ends_with("0\r\n\r\n"), "{list}");
    let gone = exchange(&gate, &ask("DELETE", "/ungleichotp/3/")).await;
    assert!(gone.starts_with("HTTP/1.1 204") && gone.ends_with("\r\n\r\n"), "{gone}");
    assert!(!gone.to_lowercase().contains("content-length"), "{gone}");
}

#[tokio::test]
async fn chunked_bodies_are_read() {
    let gate = Gate::start().await;
    let body = body_of(ADMIN, json!({})).to_string();
    let (a, b) = body.split_at(20);
    let head = "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n";
    let chunked = format!("{:x}\r\n{a}\r\n{:x}\r\n{b}\r\n0\r\n\r\n", a.len(), b.len());
    let answer =
        exchange(&gate, &format!("{head}Content-Type: application/json\r\n\r\n{chunked}")).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let answer = exchange(&gate, &format!("{head}Content-Type: text/plain\r\n\r\n{chunked}")).await;
    assert!(answer.starts_with("HTTP/1.1 415"), "{answer}");
    let answer = exchange(&gate, &format!("{head}Content-Type: text/plain\r\n\r\n0\r\n\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 403"), "no body, no type: {answer}");
    let broken = format!("{head}Content-Type: application/json\r\n\r\nxyz\r\n\r\n");
    let answer = exchange(&gate, &broken).await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
}

#[tokio::test]
async fn a_connection_outlives_an_unread_body() {
    let gate = Gate::start().await;
    let mut stream = TcpStream::connect(gate.address).await.unwrap();
    let refused = "POST /verify HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\n";
    let long = "x".repeat(1 << 20);
    let first = format!("{refused}Content-Length: {}\r\n\r\n{long}", long.len());
    stream.write_all(first.as_bytes()).await.unwrap();
    let answer = read_until(&mut stream, "in request.\"}").await;
    assert!(answer.starts_with("HTTP/1.1 415"), "{answer}");
    // Two pipelined requests on the same connection, each answered in turn.
    let body = body_of(USER, json!({})).to_string();
    let ask = |path: &str| {
        format!(
            "GET {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let two = ask("/") + &ask("/ungleichotp/");
    stream.write_all(two.as_bytes()).await.unwrap();
    let answers = read_until(&mut stream, FORBIDDEN).await;
    assert!(answers.starts_with("HTTP/1.1 200"), "{answers}");
    assert_eq!(answers.matches("HTTP/1.1 ").count(), 2, "{answers}");
}

#[tokio::test]
async fn a_body_is_asked_for_only_if_it_is_wanted() {
    let gate = Gate::start().await;
    let body = body_of(USER, json!({})).to_string();
    let head = |kind: &str| {
        format!(
            "GET / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )
    };
    let mut stream = TcpStream::connect(gate.address).await.unwrap();
    stream.write_all(head("application/json").as_bytes()).await.unwrap();
    read_until(&mut stream, "HTTP/1.1 100 Continue\r\n\r\n").await;
    stream.write_all(body.as_bytes()).await.unwrap();
    let answer = read_until(&mut stream, "/ungleichotp/\"}").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    // Refused without asking; the connection cannot be used again, and says so.
    let refused = exchange(&gate, &head("text/plain")).await;
    assert!(refused.starts_with("HTTP/1.1 415"), "{refused}");
    assert!(refused.to_lowercase().contains("connection: close"), "{refused}");
}

#[tokio::test]
async fn odd_requests_are_answered_in_json() {
    let gate = Gate::start().await;
    for (sent, status) in [
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        ("CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nConnection: close\r\n\r\n", 405),
        ("OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 404),
        ("nonsense X-Auth-Token: 123456\r\n\r\n", 400),
        ("GET / HTTP/1.0\r\n\r\n", 403),
        ("GET / HTTP/1.0\r\nHost: a b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost:\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    ] {
        let answer = exchange(&gate, sent).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{sent:?}: {answer:?}");
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        assert!(body.starts_with("{\"detail\":\"") && !body.contains("123456"), "{sent:?}: {body}");
        assert!(answer.to_lowercase().contains("cache-control: no-store"), "{answer}");
    }
    let many = "X: y\r\n".repeat(150);
    let answer = exchange(&gate, &format!("GET / HTTP/1.1\r\nHost: a\r\n{many}\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
}

/// What follows a body whose end is unknown is no request.
#[tokio::test]
async fn nothing_is_smuggled_behind_a_broken_body() {
    let gate = Gate::start().await;
    let head = "POST /verify HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n\
                Transfer-Encoding: chunked\r\n\r\n";
    let next = "GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n";
    for broken in ["zz\r\n", "fffffffffffffffff\r\n{}\r\n0\r\n\r\n"] {
        let answers = exchange(&gate, &format!("{head}{broken}{next}")).await;
        assert!(answers.starts_with("HTTP/1.1 400"), "{answers}");
        assert!(answers.to_lowercase().contains("connection: close"), "{answers}");
        assert_eq!(answers.matches("HTTP/1.1").count(), 1, "{answers}");
    }
}

/// As on the proxy: see `attack/framing.rs` for all of them.
#[tokio::test]
async fn requests_that_end_in_two_places_are_refused() {
    let gate = Gate::start().await;
    let next = "GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n";
    let post =
        |lines: &str| format!("POST /verify HTTP/1.1\r\nHost: a\r\n{lines}\r\n0\r\n\r\n{next}");
    for sent in [
        post("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"),
        post("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"),
        post("Content-Length: 5\r\nContent-Length: 5\r\n"),
        post("Content-Length: 5, 5\r\n"),
        post("Content-Length: 5\r\nContent_Length: 0\r\n"),
        post("Content-Length: 5\nX: y\r\n"),
        format!("GET / HTTP/1.1\nHost: a\r\n\r\n{next}"),
        format!("GET /openapi.json#x HTTP/1.1\r\nHost: a\r\n\r\n{next}"),
    ] {
        let answers = exchange(&gate, &sent).await;
        assert!(answers.starts_with("HTTP/1.1 400"), "{sent:?}: {answers}");
        assert!(answers.to_lowercase().contains("connection: close"), "{answers}");
        assert_eq!(answers.matches("HTTP/1.1").count(), 1, "{answers}");
    }
}

#[tokio::test]
async fn bodies_come_as_they_are() {
    let gate = Gate::start().await;
    let body = body_of(USER, json!({})).to_string();
    let send = async |headers: &str| {
        let head = "GET / HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n";
        let length = body.len();
        exchange(
            &gate,
            &format!("{head}{headers}Connection: close\r\nContent-Length: {length}\r\n\r\n{body}"),
        )
        .await
    };
    assert!(send("Content-Encoding: identity\r\n").await.starts_with("HTTP/1.1 200"));
    assert!(send("Content-Encoding: gzip\r\n").await.starts_with("HTTP/1.1 415"));
    assert!(send("Content-Encoding: identity, gzip\r\n").await.starts_with("HTTP/1.1 415"));
    assert!(send("Transfer-Encoding: gzip, chunked\r\n").await.starts_with("HTTP/1.1 400"));
}

#[tokio::test]
async fn a_body_in_drops_is_cut_off() {
    let mut setup = Setup::default();
    setup.api.limits.body_timeout = Duration::from_millis(500);
    let gate = Gate::start_with(setup).await;
    let mut stream = TcpStream::connect(gate.address).await.unwrap();
    let head = "POST /verify HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n\
                Content-Length: 99999\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let (mut read, mut write) = stream.split();
    let mut answer = [0; 12];
    let drops = async {
        loop {
            write.write_all(b" ").await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        () = drops => {}
        read = tokio::time::timeout(PATIENCE, read.read_exact(&mut answer)) => { read.unwrap().unwrap(); }
    }
    assert_eq!(&answer, b"HTTP/1.1 408");
}

#[tokio::test]
async fn a_stalled_body_is_cut_off() {
    let mut setup = Setup::default();
    setup.api.limits.body_timeout = Duration::from_millis(200);
    let gate = Gate::start_with(setup).await;
    let head = "POST /verify HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{";
    let answer = exchange(&gate, head).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
}

#[tokio::test]
async fn http2_is_served_alike() {
    let gate = Gate::start().await;
    let stream = TcpStream::connect(gate.address).await.unwrap();
    let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let body = body_of(ADMIN, json!({})).to_string();
    for (method, path, status) in [
        ("GET", "/ungleichotp/", 200),
        ("HEAD", "/ungleichotp/3/", 200),
        ("DELETE", "/ungleichotp/3/", 204),
    ] {
        let request = http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", gate.base))
            .header("content-type", "application/json")
            .body(())
            .unwrap();
        client = client.ready().await.unwrap();
        let (response, mut stream) = client.send_request(request, false).unwrap();
        stream.send_data(body.clone().into(), true).unwrap();
        let response = tokio::time::timeout(PATIENCE, response).await.unwrap().unwrap();
        assert_eq!(response.status(), status, "{method} {path}");
        let mut data = Vec::new();
        let mut stream = response.into_body();
        while let Some(part) = stream.data().await {
            data.extend_from_slice(&part.unwrap());
        }
        assert_eq!(data.first() == Some(&b'['), method == "GET", "{method} {path}");
    }
}
