//! Requests that two servers could read in two ways, byte by byte.

use crate::peers::bounded;
use crate::peers::echo::Echo;
use crate::peers::gate::{Gate, Setup, plain};
use crate::peers::h2peer;
use crate::peers::wire::{Answer, Connection, ask, header};
use http::Request;
use tokio::net::TcpStream;

async fn started() -> (Echo, Gate) {
    let echo = Echo::start().await;
    let gate = Setup::to(plain(echo.address)).start().await;
    (echo, gate)
}

/// A whole request: request line, further header lines with alice's proof, body.
async fn send(gate: &Gate, line: &str, headers: &str, body: &str) -> Answer {
    let request = format!("{line}\r\n{headers}{}\r\n{body}", gate.proof());
    ask(gate.tcp(), request).await
}

#[tokio::test]
async fn unclear_requests_are_refused_though_proven() {
    let (echo, gate) = started().await;
    let host = "Host: gate\r\n";
    let get = "GET / HTTP/1.1";
    for (line, headers, status) in [
        // Credentials
        (get, "Host: gate\r\nX-Auth-Name: alice\r\n", 400),
        (get, "Host: gate\r\nX-Auth-Realm: staff\r\n", 400),
        (get, "Host: gate\r\nX-Auth-Token: 123456\r\n", 400),
        (get, "Host: gate\r\nx_auth_name: root\r\n", 400),
        (get, "Host: gate\r\nX.Auth.Name: root\r\n", 400),
        (get, "Host: gate\r\nx-auth_Realm: root\r\n", 400),
        (get, "Host: gate\r\nX_AUTH_TOKEN: 1\r\n", 400),
        // Host
        (get, "", 400),
        ("GET / HTTP/1.0", "", 400),
        (get, "Host: a\r\nHost: b\r\n", 400),
        (get, "Host: gate\r\nHost: gate\r\n", 400),
        (get, "Host: a b\r\n", 400),
        (get, "Host: \r\n", 400),
        (get, "Host: u@gate\r\n", 400),
        ("GET http://other/ HTTP/1.1", host, 400),
        ("GET http://u@gate/ HTTP/1.1", host, 400),
        // Paths
        ("GET /a/../b HTTP/1.1", host, 400),
        ("GET /a/%2e%2e/b HTTP/1.1", host, 400),
        ("GET /%252e%252e/b HTTP/1.1", host, 400),
        ("GET //b HTTP/1.1", host, 400),
        ("GET /a%2fb HTTP/1.1", host, 400),
        ("GET /a%5cb HTTP/1.1", host, 400),
        ("GET /a\\b HTTP/1.1", host, 400),
        ("GET /a%00 HTTP/1.1", host, 400),
        ("GET /a%zz HTTP/1.1", host, 400),
        ("GET /%ff HTTP/1.1", host, 400),
        ("GET /..;/b HTTP/1.1", host, 400),
        ("OPTIONS * HTTP/1.1", host, 400),
        ("GET gate HTTP/1.1", host, 400),
        ("GET /a#/../b HTTP/1.1", host, 400),
        ("GET /?#/b HTTP/1.1", host, 400),
        ("GET http://gate#x HTTP/1.1", host, 400),
        // Methods
        ("TRACE / HTTP/1.1", host, 405),
        ("CONNECT gate:80 HTTP/1.1", "Host: gate:80\r\n", 405),
        ("MMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMMM / HTTP/1.1", host, 400),
        // Framing
        ("POST / HTTP/1.1", "Host: gate\r\nContent-Length: 0\r\nContent-Length: 0\r\n", 400),
        ("POST / HTTP/1.1", "Host: gate\r\nContent-Length: 0, 0\r\n", 400),
        ("POST / HTTP/1.1", "Host: gate\r\nContent-Length: 0\r\nContent-Length: 5\r\n", 400),
        ("POST / HTTP/1.1", "Host: gate\r\nContent-Length: +0\r\n", 400),
        ("POST / HTTP/1.1", "Host: gate\r\nContent-Length: 0x0\r\n", 400),
        ("POST / HTTP/1.1", "Host: gate\r\nTransfer-Encoding: gzip, chunked\r\n", 400),
        ("POST / HTTP/1.1", "Host: gate\r\nTransfer-Encoding: chunked, gzip\r\n", 400),
        ("POST / HTTP/1.1", "Host: gate\r\nTransfer-Encoding: xchunked\r\n", 400),
        ("POST / HTTP/1.0", "Host: gate\r\nTransfer-Encoding: chunked\r\n", 400),
        // Syntax
        (get, "Host: gate\r\nX-Space : a\r\n", 400),
        (get, "Host: gate\r\nX-Fold: a\r\n b\r\n", 400),
        (get, "Host: gate\r\nX-Nul: a\0b\r\n", 400),
        (get, "Host: gate\r\nno colon\r\n", 400),
        // Nominations that pingora refuses
        (get, "Host: gate\r\nConnection: Host\r\n", 400),
    ] {
        let answer = send(&gate, line, headers, "").await;
        assert_eq!(answer.status, status, "{line} {headers:?}: {}", answer.head);
        assert_eq!(answer.header("server"), None, "{line} {headers:?}");
        assert_eq!(answer.header("content-type"), Some("application/json"), "{line} {headers:?}");
        assert!(answer.json()["request_id"].is_string());
        assert!(!answer.text().contains(&gate.token(&gate.alice)));
    }
    assert_eq!(echo.seen(), 0);
}

#[tokio::test]
async fn what_is_forwarded_has_one_reading() {
    let (_echo, gate) = started().await;
    for (line, headers, seen_line) in [
        ("GET /%61%2b?x=%2e%2e&x HTTP/1.1", "Host: gate\r\n", "GET /a%2B?x=%2e%2e&x HTTP/1.1"),
        ("GET http://gate/p?q HTTP/1.1", "Host: gate\r\n", "GET /p?q HTTP/1.1"),
        ("GET /\u{fc} HTTP/1.1", "Host: gate\r\n", "GET /%C3%BC HTTP/1.1"),
        ("GET / HTTP/1.0", "Host: gate\r\n", "GET / HTTP/1.1"),
    ] {
        let answer = send(&gate, line, headers, "").await;
        assert_eq!(answer.status, 200, "{line}: {}", answer.text());
        assert_eq!(answer.text().lines().next(), Some(seen_line));
    }
    let overrides = "Host: gate\r\nX-HTTP-Method-Override: DELETE\r\nX_HTTP_Method: PUT\r\n\
                     X-Original-URL: /admin\r\nX-Rewrite-URL: /admin\r\nX_Original_Uri: /admin\r\n";
    let seen = send(&gate, "GET / HTTP/1.1", overrides, "").await.text();
    assert!(
        !seen.contains("/admin") && !seen.contains("DELETE") && !seen.contains("PUT"),
        "{seen}"
    );
}

#[tokio::test]
async fn connection_never_nominates_identity_away() {
    let (_echo, gate) = started().await;
    for nominated in [
        "X-Auth-Name",
        "x-auth-name, X-Auth-Realm, x-auth-token",
        "close, X-Auth-Name",
        ", x-auth-realm",
    ] {
        let headers =
            format!("Host: gate\r\nConnection: {nominated}\r\nConnection: X-Auth-Realm\r\n");
        let answer = send(&gate, "GET / HTTP/1.1", &headers, "").await;
        assert_eq!(answer.status, 200, "{nominated}");
        let seen = answer.text();
        assert_eq!(header(&seen, "x-auth-name"), Some("alice"), "{nominated}");
        assert_eq!(header(&seen, "x-auth-realm"), Some("staff"), "{nominated}");
        assert_eq!(header(&seen, "x-auth-token"), None);
    }
}

#[tokio::test]
async fn a_length_beside_chunks_is_dropped_and_the_connection_closed() {
    let (echo, gate) = started().await;
    let mut connection = Connection::to(gate.tcp()).await;
    let smuggled = "GET /smuggled HTTP/1.1\r\nHost: gate\r\n\r\n";
    let request = format!(
        "POST / HTTP/1.1\r\nHost: gate\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n{}\r\n\
         0\r\n\r\n{smuggled}",
        gate.proof()
    );
    let answer = connection.ask(request).await.unwrap();
    assert_eq!((answer.status, answer.header("connection")), (200, Some("close")));
    assert_eq!(header(&answer.text(), "content-length"), None);
    assert!(connection.ends().await);
    assert_eq!(echo.seen(), 1);
}

#[tokio::test]
async fn request_trailers_bring_no_identity() {
    let (_echo, gate) = started().await;
    let mut connection = Connection::to(gate.tcp()).await;
    let head = format!(
        "POST / HTTP/1.1\r\nHost: gate\r\nTransfer-Encoding: chunked\r\nTrailer: X-Auth-Name\r\n{}\r\n",
        gate.proof()
    );
    let body = "3\r\nabc\r\n0\r\nX-Auth-Name: root\r\nx_auth_realm: root\r\n\r\n";
    let answer = connection.ask(format!("{head}{body}")).await.unwrap();
    let seen = answer.text();
    assert!(seen.ends_with("\n\n3"), "{seen}");
    assert_eq!(header(&seen, "x-auth-name"), Some("alice"));
    assert!(!seen.contains("root"), "{seen}");
    // The trailers belonged to that request: the next one is read where it begins.
    assert_eq!(connection.ask(gate.get("/")).await.unwrap().status, 200);
}

#[tokio::test]
async fn pipelined_requests_are_decided_one_by_one() {
    let (echo, gate) = started().await;
    let mut connection = Connection::to(gate.tcp()).await;
    let unproven = "GET /2 HTTP/1.1\r\nHost: gate\r\n\r\n";
    let post =
        format!("POST /3 HTTP/1.1\r\nHost: gate\r\nContent-Length: 3\r\n{}\r\nabc", gate.proof());
    connection.send(format!("{}{unproven}{post}{}", gate.get("/1"), gate.get("/4"))).await;
    for (status, line) in [(200, "GET /1"), (401, ""), (200, "POST /3"), (200, "GET /4")] {
        let answer = connection.answer().await.expect("an answer to each");
        assert_eq!(answer.status, status);
        assert!(status != 200 || answer.text().starts_with(line), "{}", answer.text());
    }
    assert_eq!(echo.seen(), 3);
}

#[tokio::test]
async fn the_same_holds_over_http2() {
    let echo = Echo::start().await;
    let mut setup = Setup::to(plain(echo.address));
    setup.h2c = true;
    let gate = setup.start().await;
    let send = h2peer::client(TcpStream::connect(gate.tcp()).await.unwrap()).await;
    let request = |path: &str, extra: &[(&str, &str)]| {
        let mut request = Request::builder()
            .uri(format!("http://gate{path}"))
            .header("x-auth-name", "alice")
            .header("x-auth-realm", "staff")
            .header("x-auth-token", gate.token(&gate.alice));
        for (name, value) in extra {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    };
    for (path, extra, status) in [
        ("/x?q", &[][..], 200),
        ("/x", &[("x-auth-name", "root")], 400),
        ("/x", &[("x_auth_name", "root")], 400),
        ("/x", &[("x.auth.realm", "root")], 400),
        ("/a/%2e%2e/b", &[], 400),
        ("//b", &[], 400),
        ("/a%2fb", &[], 400),
        ("/x", &[("host", "other")], 400),
    ] {
        let (answer, body) = h2peer::ask(&send, request(path, extra)).await;
        assert_eq!(answer.status(), status, "{path} {extra:?}");
        assert_eq!(answer.headers().get("server"), None);
        let body = String::from_utf8(body).unwrap();
        if status == 200 {
            assert!(body.starts_with("GET /x?q HTTP/1.1\r\n"), "{body}");
            assert_eq!(header(&body, "host"), Some("gate"));
            assert_eq!(header(&body, "x-auth-name"), Some("alice"));
            assert_eq!(header(&body, "x-auth-token"), None);
        }
    }
    let cookies = request("/", &[("cookie", "a=1"), ("cookie", "b=2")]);
    let (_, body) = h2peer::ask(&send, cookies).await;
    assert_eq!(header(&String::from_utf8(body).unwrap(), "cookie"), Some("a=1; b=2"));
}

/// A body over HTTP/2 may end with a frame of its own that holds nothing: one end, not two, or the second
/// would be the beginning of the next request on the upstream's connection.
#[tokio::test]
async fn an_http2_body_has_one_end_upstream() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut setup = Setup::to(plain(listener.local_addr().unwrap()));
    setup.h2c = true;
    let gate = setup.start().await;
    let client = h2peer::client(TcpStream::connect(gate.tcp()).await.unwrap()).await;
    let post = Request::post("http://gate/")
        .header("x-auth-name", "alice")
        .header("x-auth-realm", "staff")
        .header("x-auth-token", gate.token(&gate.alice))
        .body(())
        .unwrap();
    let mut ready = client.clone().ready().await.unwrap();
    let (answer, mut body) = ready.send_request(post, false).unwrap();
    for (data, end) in [("ab", false), ("", false), ("cd", false), ("", true)] {
        body.send_data(data.into(), end).unwrap();
    }
    let (stream, _) = bounded("the request", listener.accept()).await.unwrap();
    let mut upstream = Connection::over(stream);
    let (_, received) = bounded("the body", upstream.request()).await.unwrap();
    assert_eq!(received, b"abcd");
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(bounded("the answer", answer).await.unwrap().status(), 200);
    // The next request comes on the same connection, with nothing before it.
    let next = gate.get("/next");
    let asking = tokio::spawn(async move { ask(gate.tcp(), next).await });
    let head = bounded("the next request", upstream.request_head()).await.unwrap();
    assert!(head.starts_with("GET /next HTTP/1.1\r\n"), "{head}");
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(asking.await.unwrap().status, 200);
}
