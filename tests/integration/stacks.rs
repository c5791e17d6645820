//! nginx, Caddy and HAProxy in front of a service, configured by the very files that `deploy/` ships, ask the gate about
//! every request. What holds behind the gate's own proxy holds behind them.

mod front;

use std::net::SocketAddr;

use futures_util::{SinkExt as _, StreamExt as _};
use ring::digest::{SHA256, digest};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::{self, Message};

use crate::attack::frames::{END_HEADERS, END_STREAM, End, HEADERS, block, frame, send};
use crate::attack::paths::{DETOURS, assert_not_admin, readings};
use crate::attack::recorder::{Recorder, Seen};
use crate::attack::rig::summary;
use crate::harness::{ALICE, free_port, shows_token, token, wrong_token};
use crate::peers::bounded;
use crate::peers::wire::{Answer, Connection, ask};
use front::{Front, Make, Stack, alice, bob, gate, proof};

/// Each scenario with each proxy.
macro_rules! with_each {
    ($($scenario:ident),* $(,)?) => {
        with_each!(nginx Nginx $($scenario)*);
        with_each!(caddy Caddy $($scenario)*);
        with_each!(haproxy HaProxy $($scenario)*);
    };
    ($module:ident $make:ident $($scenario:ident)*) => {
        mod $module {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $scenario() {
                super::$scenario(super::Make::$make).await;
            })*
        }
    };
}

with_each!(
    who_is_proven_passes_with_identity_alone,
    methods_are_decided_on_as_they_are_forwarded,
    nothing_of_a_clients_own_reaches_the_service,
    paths_are_decided_on_as_they_are_forwarded,
    what_is_told_of_a_request_is_the_proxys_own,
    the_same_holds_over_http2,
    websockets_pass_and_no_other_upgrade,
    large_uploads_stream_through,
    without_the_gates_word_nothing_passes,
    a_gate_that_hangs_lets_nothing_pass_and_nobody_wait,
    who_guesses_is_told_to_wait,
);

fn get(path: &str, lines: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: shop.example\r\n{lines}\r\n")
}

/// A service that writes down all that it gets, behind a proxy.
struct Recorded {
    stack: Stack,
    service: Recorder,
}

impl Recorded {
    async fn start(make: Make) -> Self {
        let service = Recorder::start().await;
        Self { stack: Stack::start(make, service.address).await, service }
    }

    /// The answer to a request, and what the service saw of it.
    async fn ask(&self, request: &str) -> (Answer, Vec<Seen>) {
        let answer = ask(self.stack.front.address, request).await;
        let (seen, bytes) = self.service.take().await;
        let text = String::from_utf8_lossy(&bytes);
        assert!(
            !shows_token(&text, &token(ALICE)) && !text.contains("evil"),
            "{request:?}: {text}"
        );
        // What it names there is for one hop: further ones would drop the identity.
        let named = |seen: &Seen| seen.values("connection").join(",").to_ascii_lowercase();
        assert!(!seen.iter().any(|seen| named(seen).contains("x-auth")), "{request:?}: {text}");
        (answer, seen)
    }

    /// Its status and what the service saw, as `alice GET /x`.
    async fn brief(&self, request: &str) -> (u16, Vec<String>) {
        let (answer, seen) = self.ask(request).await;
        (answer.status, seen.iter().map(summary).collect())
    }
}

async fn who_is_proven_passes_with_identity_alone(make: Make) {
    let rig = Recorded::start(make).await;
    let nothing = Vec::<String>::new;
    for (request, status, seen) in [
        (get("/x?y=%2e", &alice()), 200, vec!["alice GET /x?y=%2e".to_owned()]),
        // Byte for byte as it came.
        (get("/%78/a%2Bb%c3%bc/?", &alice()), 200, vec!["alice GET /%78/a%2Bb%c3%bc/?".into()]),
        (get("/admin/x", &bob()), 200, vec!["bob GET /admin/x".into()]),
        (get("/public", ""), 200, vec!["nobody GET /public".into()]),
        // As the gate's own proxy: nobody is asked there, so nobody is named.
        (get("/public", &alice()), 200, vec!["nobody GET /public".into()]),
        (get("/admin/x", &alice()), 403, nothing()),
        (get("/x", ""), 401, nothing()),
        (get("/x", &proof("alice", "shop", &wrong_token(ALICE))), 401, nothing()),
        (get("/x", &proof("evil", "shop", &token(ALICE))), 401, nothing()),
        // The proof counts for its request alone.
        (get("/x", ""), 401, nothing()),
    ] {
        assert_eq!(rig.brief(&request).await, (status, seen), "{request}");
    }
    let post = format!(
        "POST /x HTTP/1.1\r\nHost: shop.example\r\nContent-Length: 3\r\n{}\r\nabc",
        alice()
    );
    assert_eq!(rig.brief(&post).await, (200, vec!["alice POST /x".to_owned()]));
    let (refused, _) = rig.ask(&get("/x", "")).await;
    assert_eq!(refused.header("www-authenticate"), Some("OTP realm=\"otpgate\""));
    // Where it comes from and for whom it is, in the proxy's words.
    let (_, seen) = rig.ask(&get("/x", &alice())).await;
    let told =
        ["host", "x-forwarded-for", "x-forwarded-host"].map(|name| seen[0].values(name).join(","));
    assert_eq!(told, ["shop.example", "127.0.0.1", "shop.example"]);
}

async fn methods_are_decided_on_as_they_are_forwarded(make: Make) {
    let rig = Recorded::start(make).await;
    for (method, status) in [("POST", 200), ("PUT", 200), ("DELETE", 403), ("GET", 403)] {
        let request = get("/methods", &(alice() + "Content-Length: 0\r\n")).replace("GET", method);
        let passes = (status == 200).then(|| format!("alice {method} /methods"));
        assert_eq!(rig.brief(&request).await, (status, passes.into_iter().collect()), "{request}");
    }
}

/// Headers that make services see another client, host, path or method: all that the gate's own proxy removes,
/// and some of those that it removes by the beginning of their names.
pub(crate) fn telling() -> Vec<String> {
    let source = crate::docs::read("src/proxy/headers.rs");
    let (_, lists) = source.split_once("const OVERRIDES:").unwrap();
    let (lists, _) = lists.split_once("const FORWARDING_PREFIX:").unwrap();
    let listed = lists.split('"').skip(1).step_by(2).filter(|name| !name.ends_with('-'));
    let begun = ["x-forwarded-method", "x-forwarded-prefix", "x-forwarded-uri", "x-original-host"]
        .into_iter()
        .chain(["x-original-method", "x-original-uri", "x-original-url", "x-rewrite-url"]);
    // The last one names requests in logs alone.
    listed.chain(begun).filter(|name| *name != "x-request-id").map(str::to_owned).collect()
}

/// `evil` reaches nobody, whatever comes of the request.
async fn nothing_of_a_clients_own_reaches_the_service(make: Make) {
    let rig = Recorded::start(make).await;
    let mut passed = 0;
    let told: String = telling().iter().map(|name| format!("{name}: evil\r\n")).collect();
    for lines in [
        &format!("X-Forwarded-Ssl: evil\r\n{told}"),
        "X-Auth-Name: evil\r\nX-Auth-Realm: evil\r\n",
        "x-auth-name: evil\r\nX-AUTH-REALM: evil\r\nX-Auth-Token: evil\r\n",
        "X_Auth_Name: evil\r\n",
        "X-Auth_Name: evil\r\n",
        "X.Auth.Realm: evil\r\n",
        "X_AUTH_TOKEN: evil\r\n",
        "X-Auth-Name: evil\r\nConnection: X-Auth-Name\r\n",
        "Connection: close, x-auth-name, x-auth-realm\r\n",
        "Connection: X-Forwarded-Uri, X-Original-URI, X-Forwarded-Host, X-Forwarded-Method\r\n",
        "X-Forwarded-Uri: /evil\r\nX-Forwarded-Method: EVIL\r\nX-Forwarded-Host: evil\r\n",
        "X_Forwarded_Uri: /evil\r\nX_Forwarded_For: evil\r\nX_Original_URI: /evil\r\n",
        "X-Original-URI: /evil\r\nX-Original-URL: http://evil/\r\nX-Original-Method: EVIL\r\n",
        "X-Rewrite-URL: /evil\r\nX-HTTP-Method-Override: evil\r\n",
        "Forwarded: for=evil;host=evil\r\nX-Real-IP: evil\r\nX-Forwarded-For: evil\r\n",
        "X-Otpgate-Status: evil\r\nX-Envoy-Auth-Headers-To-Remove: host, evil\r\n",
        // Servers that make variables of names take these for the end of the body.
        "Content_Length: evil\r\n",
        "Transfer.Encoding: evil\r\n",
    ] {
        for (path, proof, expected) in
            [("/public", "", "nobody GET /public"), ("/x", &alice(), "alice GET /x")]
        {
            // What no setting speaks of may pass as it is.
            let lines = lines.replace("X-Otpgate-Status: evil", "X-Otpgate-Status: 200");
            let lines = lines.replace("host, evil", "host");
            let request = get(path, &format!("{proof}{lines}"));
            let (answer, seen) = rig.ask(&request).await;
            let seen: Vec<_> = seen.iter().map(summary).collect();
            // Proxies write these themselves, or take them away.
            let spoils_nothing = lines.starts_with("X-Forwarded-")
                || lines.starts_with("X_Forwarded")
                || lines.starts_with("X-Original")
                || lines.starts_with("Forwarded");
            assert!(answer.status == 200 || !spoils_nothing, "{request}: {}", answer.head);
            match answer.status {
                200 => assert_eq!(seen, [expected], "{request}"),
                400 | 401 | 403 => assert_eq!(seen, [""; 0], "{request}"),
                other => panic!("{other}: {request}"),
            }
            passed += usize::from(answer.status == 200);
        }
    }
    assert!(passed > 10, "only {passed} passed: this shows nothing");
    // A second credential is none.
    let twice = format!("{}X-Auth-Name: bob\r\n", alice());
    let (answer, seen) = rig.ask(&get("/x", &twice)).await;
    assert!([400, 401, 403].contains(&answer.status) && seen.is_empty(), "{}", answer.head);
}

/// Whatever way a path is spelled and read, it does not lead where it was not decided to lead.
async fn paths_are_decided_on_as_they_are_forwarded(make: Make) {
    let rig = Recorded::start(make).await;
    let mut passed = 0;
    let absolute =
        ["http://shop.example/admin", "http://shop.example/public", "http://shop.example//admin"];
    for path in DETOURS.iter().chain(&absolute) {
        for proof in [String::new(), alice()] {
            let host = "Host: shop.example\r\nConnection: close\r\n";
            let request = format!("GET {path} HTTP/1.1\r\n{host}{proof}\r\n");
            let Some(answer) = Connection::to(rig.stack.front.address).await.ask(&request).await
            else {
                panic!("no answer: {path:?}")
            };
            let (seen, _) = rig.service.take().await;
            assert!(
                [200, 400, 401, 403, 404].contains(&answer.status),
                "{path:?}: {}",
                answer.head
            );
            assert_eq!(seen.len(), usize::from(answer.status == 200), "{path:?}: {seen:?}");
            for seen in seen {
                passed += 1;
                let received = seen.line().strip_prefix("GET ").unwrap().split('?').next().unwrap();
                assert!(received.starts_with('/'), "{path:?}: {received}");
                assert_not_admin(received);
                if proof.is_empty() {
                    let is_public = |path: &String| path == "public" || path.starts_with("public/");
                    assert!(readings(received).iter().all(is_public), "{path:?}: {received}");
                }
                assert_eq!(seen.values("host"), ["shop.example"], "{path:?}");
            }
        }
    }
    assert!(passed > 8, "only {passed} passed: this shows nothing");
}

/// Method and host are those that the service sees.
async fn what_is_told_of_a_request_is_the_proxys_own(make: Make) {
    let rig = Recorded::start(make).await;
    for (request, statuses) in [
        (
            format!("get /public HTTP/1.1\r\nHost: shop.example\r\n{}\r\n", ""),
            &[400, 403, 405, 501][..],
        ),
        ("TRACE /public HTTP/1.1\r\nHost: shop.example\r\n\r\n".to_owned(), &[400, 403, 405]),
        ("G_T /public HTTP/1.1\r\nHost: shop.example\r\n\r\n".to_owned(), &[400, 403, 405]),
        (
            "GET /public HTTP/1.1\r\nHost: shop.example\r\nHost: evil\r\n\r\n".to_owned(),
            &[400, 403],
        ),
        ("GET /public HTTP/1.1\r\nHost: shop.example, evil\r\n\r\n".to_owned(), &[400, 403]),
        ("GET /public HTTP/1.1\r\nHost: evil@shop.example\r\n\r\n".to_owned(), &[400, 403]),
        ("GET /public HTTP/1.1\r\n\r\n".to_owned(), &[400, 403]),
        ("GET /public HTTP/1.0\r\n\r\n".to_owned(), &[400, 403, 404]),
        // Caddy says 200 to that by itself.
        ("OPTIONS * HTTP/1.1\r\nHost: shop.example\r\n\r\n".to_owned(), &[200, 400, 403, 405]),
    ] {
        let (answer, seen) = rig.ask(&request).await;
        assert!(statuses.contains(&answer.status), "{request:?}: {}", answer.head);
        assert!(seen.is_empty(), "{request:?}: {seen:?}");
    }
    // Two hosts in one request: it may pass as one of the host that alice may go to, not of the other.
    for (target, host) in
        [("http://shop.example", "lab.example"), ("http://lab.example", "shop.example")]
    {
        let request = format!("GET {target}/x HTTP/1.1\r\nHost: {host}\r\n{}\r\n", alice());
        let (answer, seen) = rig.ask(&request).await;
        assert_eq!(seen.len(), usize::from(answer.status == 200), "{request}: {seen:?}");
        assert!(seen.iter().all(|seen| seen.values("host") == ["shop.example"]), "{seen:?}");
    }
    assert_eq!(rig.brief(&get("/x", &alice()).replace("shop.", "lab.")).await.0, 403);
    // The body belongs to its request, and what follows is another one.
    let inner = "GET /admin HTTP/1.1\r\nHost: shop.example\r\n\r\n";
    let next = get("/admin", "Connection: close\r\n");
    let length = inner.len();
    let post = "POST /public HTTP/1.1\r\nHost: shop.example\r\n";
    let smuggled = format!("{post}Content-Length: {length}\r\n\r\n{inner}{next}");
    let mut client = Connection::to(rig.stack.front.address).await;
    client.send(smuggled).await;
    let statuses = [client.answer().await.unwrap().status, client.answer().await.unwrap().status];
    assert_eq!(statuses, [200, 401]);
    let (seen, _) = rig.service.take().await;
    assert_eq!(seen.iter().map(summary).collect::<Vec<_>>(), ["nobody POST /public"]);
}

/// As browsers and gRPC speak.
async fn the_same_holds_over_http2(make: Make) {
    let service = Recorder::start().await;
    let (gate, _sandbox) = gate("").await;
    let api = crate::harness::address(&gate.api);
    let front = Front::start_with(make, api, service.address, Some(make.h2c())).await;
    let proof =
        [("x-auth-name", "alice"), ("x-auth-realm", "shop"), ("x-auth-token", &token(ALICE))];
    let ask = async |path: &str, authority: &str, more: &[(&str, &str)]| {
        let pseudo =
            [(":method", "GET"), (":scheme", "http"), (":authority", authority), (":path", path)];
        let fields = pseudo.iter().chain(more);
        let fields: Vec<_> = fields
            .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()))
            .collect();
        let frames = frame(HEADERS, END_STREAM | END_HEADERS, 1, &block(&fields));
        let end = send(front.address, &frames).await;
        let (seen, bytes) = service.take().await;
        assert!(!String::from_utf8_lossy(&bytes).contains("evil"), "{path} {more:?}: {seen:?}");
        assert_eq!(seen.len(), usize::from(end == End::Status(200)), "{path} {more:?}: {end:?}");
        assert!(seen.iter().all(|seen| seen.values("host") == ["shop.example"]), "{seen:?}");
        (end, seen.iter().map(summary).collect::<Vec<_>>())
    };
    let mut passed = 0;
    for path in DETOURS {
        for seen in ask(path, "shop.example", &proof).await.1 {
            passed += 1;
            let received = seen.strip_prefix("alice GET ").or(seen.strip_prefix("nobody GET "));
            assert_not_admin(received.unwrap().split('?').next().unwrap());
        }
    }
    assert!(passed > 4, "only {passed} passed: this shows nothing");
    for more in [
        &[("x-auth-name", "evil")] as &[_],
        &[("x_auth_name", "evil")],
        &[("x.auth.realm", "evil")],
        &[("x-forwarded-uri", "/evil"), ("x-original-uri", "/evil"), ("x_forwarded_uri", "/evil")],
        &[("forwarded", "for=evil"), ("x-real-ip", "evil"), ("x-forwarded-host", "evil")],
        &[("host", "lab.example")],
    ] {
        let public = ask("/public", "shop.example", more).await;
        assert!(public.1.iter().all(|seen| seen == "nobody GET /public"), "{more:?}: {public:?}");
        let own = ask("/x", "shop.example", &[&proof[..], more].concat()).await;
        assert!(own.1.iter().all(|seen| seen == "alice GET /x"), "{more:?}: {own:?}");
    }
    assert_eq!(ask("/x", "shop.example", &[]).await, (End::Status(401), vec![]));
    assert_eq!(ask("/x", "lab.example", &proof).await, (End::Status(403), vec![]));
    let lied = [&proof[..], &[("host", "shop.example")]].concat();
    assert_ne!(ask("/x", "lab.example", &lied).await.0, End::Status(200));
}

/// A server that switches to whatever it is asked for, and sends back what it gets: WebSocket as WebSocket.
async fn eager() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(switch(stream));
        }
    });
    address
}

async fn switch(stream: TcpStream) {
    let mut connection = Connection::over(stream);
    while let Some((head, _)) = connection.request().await {
        let header = |name| crate::peers::wire::header(&head, name);
        let Some(protocol) = header("upgrade") else {
            connection.send("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nno\n").await;
            continue;
        };
        let key = header("sec-websocket-key").unwrap_or_default();
        let accept = tungstenite::handshake::derive_accept_key(key.as_bytes());
        let switched = format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\
             Sec-WebSocket-Accept: {accept}\r\n\r\n"
        );
        connection.send(switched).await;
        let (_, stream) = connection.into_parts();
        let role = tungstenite::protocol::Role::Server;
        let mut socket =
            tokio_tungstenite::WebSocketStream::from_raw_socket(stream, role, None).await;
        while let Some(Ok(message)) = socket.next().await {
            if message.is_close() || socket.send(message).await.is_err() {
                break;
            }
        }
        return;
    }
}

async fn websockets_pass_and_no_other_upgrade(make: Make) {
    let stack = Stack::start(make, eager().await).await;
    let at = stack.front.address;
    let request = |proof: bool| {
        let url = format!("ws://{at}/socket");
        let mut request = tungstenite::client::IntoClientRequest::into_client_request(url).unwrap();
        for (name, value) in [("name", "alice"), ("realm", "shop"), ("token", &token(ALICE))] {
            let name = http::HeaderName::try_from(format!("x-auth-{name}")).unwrap();
            if proof {
                request.headers_mut().insert(name, value.parse().unwrap());
            }
        }
        request
    };
    let stream = TcpStream::connect(at).await.unwrap();
    let refused = tokio_tungstenite::client_async(request(false), stream).await;
    assert!(matches!(refused, Err(tungstenite::Error::Http(answer)) if answer.status() == 401));
    let stream = TcpStream::connect(at).await.unwrap();
    let upgrade = tokio_tungstenite::client_async(request(true), stream);
    let (mut socket, _) = bounded("the upgrade", upgrade).await.unwrap();
    for message in [Message::text("one"), Message::binary(vec![7; 1 << 20])] {
        socket.send(message.clone()).await.unwrap();
        assert_eq!(bounded("echo", socket.next()).await.unwrap().unwrap(), message);
    }
    // Behind another protocol, requests would pass that nobody decided on.
    for lines in [
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
        "Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n",
        "Connection: Upgrade\r\nUpgrade: h2c\r\nUpgrade: websocket\r\n",
        "Connection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n",
        "Connection: Upgrade\r\nUpgrade: TLS/1.0\r\n",
    ] {
        let key = "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
        let answer = ask(at, get("/x", &format!("{}{key}{lines}", alice()))).await;
        let switched = answer.status == 101 && answer.header("upgrade") == Some("websocket");
        assert!(switched || [200, 400].contains(&answer.status), "{lines}: {}", answer.head);
    }
}

/// A server that answers a request with the digest of its body, and tells of each head when it has come.
async fn digester() -> (SocketAddr, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (told, heads) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let told = told.clone();
            tokio::spawn(async move {
                let mut connection = Connection::over(stream);
                while let Some(head) = connection.request_head().await {
                    let _ = told.send(head.clone());
                    let Some(body) = connection.body_of(&head).await else { return };
                    let digest = data_encoding::HEXLOWER.encode(digest(&SHA256, &body).as_ref());
                    let length = digest.len();
                    let answer =
                        format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{digest}");
                    connection.send(answer).await;
                }
            });
        }
    });
    (address, heads)
}

async fn large_uploads_stream_through(make: Make) {
    let (service, mut heads) = digester().await;
    let stack = Stack::start(make, service).await;
    let body: Vec<u8> = (0..64_u32 << 20).map(|n| (n ^ (n >> 11)) as u8).collect();
    let expected = data_encoding::HEXLOWER.encode(digest(&SHA256, &body).as_ref());
    for chunked in [false, true] {
        let framing = match chunked {
            false => format!("Content-Length: {}", body.len()),
            true => "Transfer-Encoding: chunked".to_owned(),
        };
        let head = format!("PUT /x HTTP/1.1\r\nHost: shop.example\r\n{framing}\r\n{}\r\n", alice());
        let (mut client, mut sender) =
            TcpStream::connect(stack.front.address).await.unwrap().into_split();
        sender.write_all(head.as_bytes()).await.unwrap();
        let mut parts = body.chunks(1 << 20);
        send_part(&mut sender, parts.next().unwrap(), chunked).await;
        // The service has it before the rest is sent: nobody keeps it whole.
        let seen = bounded("the head at the service", heads.recv()).await.unwrap();
        assert!(seen.starts_with("PUT /x "), "{seen}");
        for part in parts {
            send_part(&mut sender, part, chunked).await;
        }
        if chunked {
            sender.write_all(b"0\r\n\r\n").await.unwrap();
        }
        let mut answer = Vec::new();
        while !String::from_utf8_lossy(&answer).contains(&expected) {
            let read = bounded("the digest", client.read_buf(&mut answer)).await.unwrap();
            assert!(read > 0, "{make:?}: {}", String::from_utf8_lossy(&answer));
        }
    }
}

async fn send_part(to: &mut (impl tokio::io::AsyncWrite + Unpin), part: &[u8], chunked: bool) {
    if chunked {
        to.write_all(format!("{:x}\r\n", part.len()).as_bytes()).await.unwrap();
    }
    to.write_all(part).await.unwrap();
    if chunked {
        to.write_all(b"\r\n").await.unwrap();
    }
}

/// A gate that answers whatever it is asked with these bytes.
async fn stub(answer: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let mut connection = Connection::over(stream);
            if connection.request_head().await.is_some() {
                connection.send(answer).await;
            }
        }
    });
    address
}

async fn without_the_gates_word_nothing_passes(make: Make) {
    let service = Recorder::start().await;
    for answer in [
        "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 403 Forbidden\r\nX-Otpgate-Status: 503\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 500 Oops\r\nX-Auth-Name: evil\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 302 Found\r\nLocation: /public\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 2",
        "200 OK\r\n\r\n",
        "",
    ] {
        let front = Front::start(make, stub(answer).await, service.address).await;
        for request in [get("/public", ""), get("/x", &alice())] {
            let answered = ask(front.address, &request).await;
            assert!(answered.status >= 300, "{answer:?}: {}", answered.head);
            assert!(service.take().await.0.is_empty(), "{answer:?}");
            // Each makes that of it which callers understand: nginx by the header that is for it.
            let is_told = if make == Make::Nginx { "Status: 503" } else { "HTTP/1.1 503" };
            if answer.contains(is_told) {
                assert_eq!(answered.status, 503, "{answer:?}: {}", answered.head);
                assert_eq!(answered.header("retry-after"), Some("5"), "{answer:?}");
            }
        }
    }
    // Nobody there any longer, and back again.
    let port = format!("listen = '127.0.0.1:{}'", free_port());
    let (before, _sandbox) = gate(&port).await;
    let front = Front::start(make, crate::harness::address(&before.api), service.address).await;
    assert_eq!(ask(front.address, get("/public", "")).await.status, 200);
    assert_eq!(service.take().await.0.len(), 1);
    drop(before);
    for request in [get("/public", ""), get("/x", &alice())] {
        let answered = ask(front.address, request).await;
        assert!(answered.status >= 500, "{}", answered.head);
        assert!(service.take().await.0.is_empty());
    }
    let (_after, _sandbox) = gate(&port).await;
    assert_eq!(ask(front.address, get("/x", &alice())).await.status, 200);
}

async fn a_gate_that_hangs_lets_nothing_pass_and_nobody_wait(make: Make) {
    let service = Recorder::start().await;
    // The kernel takes connections, and nobody reads them.
    let hanging = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let api = hanging.local_addr().unwrap();
    let front = Front::start_with(make, api, service.address, Some(make.waits())).await;
    for request in [get("/public", ""), get("/x", &alice())] {
        let answer = bounded("the refusal", ask(front.address, &request)).await;
        assert!([500, 504].contains(&answer.status), "{}", answer.head);
        assert!(service.take().await.0.is_empty());
    }
}

/// What a service answers makes nginx ask it for nothing else: nobody would have decided on that.
#[tokio::test]
async fn an_answer_for_nginx_leads_nowhere() {
    let answer = "HTTP/1.1 200 OK\r\nX-Accel-Redirect: /admin\r\nContent-Length: 0\r\n\r\n";
    let service = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let stack = Stack::start(Make::Nginx, service.local_addr().unwrap()).await;
    let (seen, mut heads) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = service.accept().await {
            let mut connection = Connection::over(stream);
            while let Some(head) = connection.request_head().await {
                let _ = seen.send(head);
                connection.send(answer).await;
            }
        }
    });
    assert_eq!(ask(stack.front.address, get("/public", "")).await.status, 200);
    assert!(heads.recv().await.unwrap().starts_with("GET /public "));
    assert!(heads.try_recv().is_err());
}

async fn who_guesses_is_told_to_wait(make: Make) {
    let rig = Recorded::start(make).await;
    let wrong = proof("alice", "shop", &wrong_token(ALICE));
    let wrong = get("/x", &format!("X-Forwarded-For: 203.0.113.9\r\n{wrong}"));
    let waits = async {
        loop {
            let answer = ask_from("127.0.0.2", rig.stack.front.address, &wrong).await;
            assert!(rig.service.take().await.0.is_empty());
            match answer.status {
                401 => continue,
                429 => return answer,
                other => panic!("{other}"),
            }
        }
    };
    let answer = bounded("the throttle", waits).await;
    let seconds: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!(seconds > 0);
    // The gate counts callers, not the proxy in front of them, and not who they say that they are.
    let told = rig.stack.gate.wait_for_log(|line| line["action"] == "throttle").unwrap();
    assert_eq!(told["client"], "127.0.0.2");
    assert_eq!(rig.brief(&get("/x", &alice())).await.0, 200);
}

/// A request from another address of this machine.
async fn ask_from(source: &str, to: SocketAddr, request: &str) -> Answer {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(source.parse().unwrap(), 0)).unwrap();
    let stream = socket.connect(to).await.unwrap();
    Connection::over(stream).ask(request).await.expect("an answer")
}

/// HAProxy goes on where a script fails: the configuration does not.
#[tokio::test]
async fn a_script_of_haproxy_that_fails_lets_nothing_pass() {
    let service = Recorder::start().await;
    let (gate, _sandbox) = gate("").await;
    let api = crate::harness::address(&gate.api);
    for (sound, broken) in [
        ("txn:set_var(\"txn.otpgate\", \"passes\")", "error(\"oops\")"),
        ("local answer = core", "local answer = nothing"),
    ] {
        let front =
            Front::start_with(Make::HaProxy, api, service.address, Some((sound, broken))).await;
        for lines in [String::new(), alice(), proof("alice", "shop", "000000")] {
            let answer = ask(front.address, get("/x", &lines)).await;
            assert!([401, 503].contains(&answer.status), "{broken}: {}", answer.head);
            assert!(service.take().await.0.is_empty(), "{broken}");
        }
    }
}

/// As their documents and sources say that they ask: Debian packages neither.
#[tokio::test]
async fn questions_of_traefik_and_envoy_are_answered() {
    let (gate, _sandbox) = gate("").await;
    let api = crate::harness::address(&gate.api);
    let traefik = |path: &str, proof: &str| {
        format!(
            "GET /authz/forward-auth HTTP/1.1\r\nHost: 127.0.0.1:8081\r\nUser-Agent: Go-http-client/1.1\r\n\
             Accept: */*\r\nAccept-Encoding: gzip\r\nX-Forwarded-For: 192.0.2.7\r\nX-Forwarded-Host: shop.example\r\n\
             X-Forwarded-Method: POST\r\nX-Forwarded-Port: 443\r\nX-Forwarded-Proto: https\r\n\
             X-Forwarded-Server: edge\r\nX-Forwarded-Uri: {path}?x=/admin\r\nX-Real-Ip: 192.0.2.7\r\n{proof}\r\n"
        )
    };
    let envoy = |path: &str, proof: &str| {
        format!(
            "POST /authz/ext-authz{path}?x=/admin HTTP/1.1\r\nhost: shop.example\r\ncontent-length: 0\r\n\
             x-envoy-internal: true\r\nx-forwarded-for: 192.0.2.7\r\nx-forwarded-proto: https\r\n\
             x-request-id: 5d2c\r\nx-envoy-expected-rq-timeout-ms: 1000\r\n{proof}\r\n"
        )
    };
    type Question<'a> = &'a dyn Fn(&str, &str) -> String;
    for question in [&traefik as Question<'_>, &envoy] {
        for (path, proof, status, name) in [
            ("/x", alice(), 200, Some("alice")),
            ("/public", String::new(), 200, Some("")),
            ("/x", String::new(), 401, None),
            ("/admin", alice(), 403, None),
            ("/public/../admin", alice(), 400, None),
        ] {
            let answer = ask(api, question(path, &proof)).await;
            assert_eq!(answer.status, status, "{}", question(path, ""));
            assert_eq!(answer.header("x-auth-name"), name, "{}", answer.head);
            assert_eq!(answer.header("x-auth-token"), None, "{}", answer.head);
        }
    }
    let allowed = ask(api, envoy("/x", &alice())).await;
    assert_eq!(allowed.header("x-envoy-auth-headers-to-remove"), Some("x-auth-token"));
}
