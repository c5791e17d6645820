//! Envoy's external authorization over gRPC, asked by tonic's client as Envoy asks.

use std::time::Duration;

use bytes::Bytes;
use envoy_types::ext_authz::v3::pb::{
    Address, CheckRequest, CheckResponse, DeniedHttpResponse, HeaderAppendAction,
    HeaderValueOption, HttpResponse, OkHttpResponse,
};
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::service::auth::v3::AttributeContext;
use envoy_types::pb::envoy::service::auth::v3::attribute_context::{HttpRequest, Peer, Request};
use envoy_types::pb::envoy::service::auth::v3::authorization_client::AuthorizationClient;
use futures_util::future::join_all;
use h2::client::SendRequest;
use serde_json::Value;
use tokio::net::TcpStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use crate::authz::ROUTES;
use crate::harness::{ALICE, BOB, Gate, Sandbox, address, http, token, wrong_token};
use crate::peers::echo::Echo;
use crate::peers::tls::Pki;
use crate::peers::wire::ask;
use crate::peers::{LIMIT, bounded, h2peer};

const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";
const TRUSTING: &str = "trusted_proxies = ['127.0.0.1']";
const CALM: &str = "[throttle]\nenabled = false\n";

/// A gate that believes what this machine's proxies tell.
struct Rig {
    gate: Gate,
    _echo: Echo,
    _sandbox: Sandbox,
}

impl Rig {
    async fn new() -> Self {
        Self::with(TRUSTING, CALM).await
    }

    async fn with(api: &str, more: &str) -> Self {
        let (sandbox, echo) = (Sandbox::with_entries(), Echo::start().await);
        let settings =
            format!("[proxy]\nupstream = '{}'\n[api]\n{api}\n{more}\n{ROUTES}", echo.address);
        let gate = sandbox.serve(&settings).ready().await;
        Self { gate, _echo: echo, _sandbox: sandbox }
    }

    async fn client(&self) -> AuthorizationClient<Channel> {
        client(&self.gate).await
    }

    /// The API's connections, as bytes of HTTP/2.
    async fn wire(&self) -> SendRequest<Bytes> {
        h2peer::client(TcpStream::connect(address(&self.gate.api)).await.unwrap()).await
    }
}

async fn client(gate: &Gate) -> AuthorizationClient<Channel> {
    AuthorizationClient::connect(gate.api.clone()).await.unwrap()
}

/// A request that Envoy asks about.
#[derive(Clone, Debug)]
struct About {
    method: &'static str,
    host: &'static str,
    target: &'static str,
    headers: Vec<(&'static str, String)>,
}

impl About {
    fn get(target: &'static str) -> Self {
        Self { method: "GET", host: "shop.example", target, headers: Vec::new() }
    }

    fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }

    fn proof(self, name: &str, realm: &str, token: &str) -> Self {
        self.header("x-auth-name", name).header("x-auth-realm", realm).header("x-auth-token", token)
    }

    fn alice(self) -> Self {
        self.proof("alice", "shop", &token(ALICE))
    }

    fn http(&self) -> HttpRequest {
        HttpRequest {
            id: "1".into(),
            method: self.method.into(),
            host: self.host.into(),
            path: self.target.into(),
            scheme: "https".into(),
            protocol: "HTTP/1.1".into(),
            size: -1,
            ..HttpRequest::default()
        }
    }

    fn pseudo(&self) -> [(&'static str, String); 4] {
        let [method, host, target] = [self.method, self.host, self.target].map(str::to_owned);
        [(":method", method), (":authority", host), (":path", target), (":scheme", "https".into())]
    }

    /// As Envoy does unless told otherwise: values of one name are joined.
    fn joined(&self) -> HttpRequest {
        let mut http = self.http();
        for (name, value) in self.pseudo().into_iter().chain(self.headers.clone()) {
            let joined = http.headers.entry(name.to_owned()).or_default();
            let comma = if joined.is_empty() { "" } else { "," };
            *joined = format!("{joined}{comma}{value}");
        }
        http
    }

    /// As Envoy does with `encode_raw_headers`.
    fn raw(&self) -> HttpRequest {
        let all = self.pseudo().into_iter().chain(self.headers.clone());
        let headers = all.map(|(name, value)| core::HeaderValue {
            key: name.into(),
            raw_value: value.into_bytes(),
            ..core::HeaderValue::default()
        });
        let header_map = Some(core::HeaderMap { headers: headers.collect() });
        HttpRequest { header_map, ..self.http() }
    }

    /// What the gate's own proxy answers.
    async fn pass(&self, gate: &Gate) -> u16 {
        let Self { method, host, target, headers } = self;
        let lines = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n"));
        let lines = lines.collect::<String>();
        let request = format!(
            "{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{lines}\r\n"
        );
        ask(address(&gate.proxy), request).await.status
    }
}

/// Who sends requests to Envoy, at an address.
fn peer(address: &str) -> Peer {
    let socket = core::SocketAddress { address: address.into(), ..core::SocketAddress::default() };
    let address = Some(core::Address { address: Some(Address::SocketAddress(socket)) });
    Peer { address, ..Peer::default() }
}

fn call_from(source: Option<Peer>, http: HttpRequest) -> CheckRequest {
    let request = Some(Request { http: Some(http), ..Request::default() });
    CheckRequest {
        attributes: Some(AttributeContext { source, request, ..AttributeContext::default() }),
    }
}

fn call(http: HttpRequest) -> CheckRequest {
    call_from(Some(peer("192.0.2.7")), http)
}

/// The answer to a call; no error, whatever is asked.
async fn check(client: &AuthorizationClient<Channel>, call: CheckRequest) -> CheckResponse {
    bounded("a call", client.clone().check(call)).await.unwrap().into_inner()
}

#[track_caller]
fn allowed(response: CheckResponse) -> OkHttpResponse {
    match (response.status.unwrap().code, response.http_response) {
        (0, Some(HttpResponse::OkResponse(ok))) => ok,
        other => panic!("not allowed: {other:?}"),
    }
}

#[track_caller]
fn denied(response: CheckResponse) -> (u16, DeniedHttpResponse) {
    match (response.status.unwrap().code, response.http_response) {
        (code, Some(HttpResponse::DeniedResponse(denied))) => {
            let status = u16::try_from(denied.status.unwrap().code).unwrap();
            assert_eq!(code, if status == 401 { 16 } else { 7 });
            (status, denied)
        }
        other => panic!("not denied: {other:?}"),
    }
}

fn status(response: CheckResponse) -> u16 {
    if response.status.as_ref().unwrap().code == 0 {
        allowed(response);
        return 200;
    }
    denied(response).0
}

/// Names and values, all of which replace what is there.
fn pairs(options: &[HeaderValueOption]) -> Vec<(&str, &str)> {
    let pair = |option: &HeaderValueOption| {
        let action = HeaderAppendAction::OverwriteIfExistsOrAdd;
        assert_eq!(option.append_action, i32::from(action));
    };
    options.iter().for_each(pair);
    let headers = options.iter().map(|option| option.header.as_ref().unwrap());
    headers.map(|header| (header.key.as_str(), header.value.as_str())).collect()
}

fn value<'a>(denied: &'a DeniedHttpResponse, name: &str) -> Option<&'a str> {
    pairs(&denied.headers).into_iter().find(|(key, _)| *key == name).map(|(_, value)| value)
}

#[tokio::test]
async fn a_proof_is_answered_with_identity() {
    let rig = Rig::new().await;
    let client = rig.client().await;
    let about = About { method: "POST", ..About::get("/x?y=/../z") }.alice();
    for http in [about.joined(), about.raw()] {
        let ok = allowed(check(&client, call(http)).await);
        assert_eq!(pairs(&ok.headers), [("x-auth-name", "alice"), ("x-auth-realm", "shop")]);
        assert_eq!(ok.headers_to_remove, ["x-auth-token"]);
        let nothing = OkHttpResponse {
            headers: ok.headers.clone(),
            headers_to_remove: ok.headers_to_remove.clone(),
            ..OkHttpResponse::default()
        };
        assert_eq!(ok, nothing);
    }
    let line = rig.gate.wait_for_log(|line| line["action"] == "authz").unwrap();
    for (field, expected) in [
        ("outcome", "allowed"),
        ("client", "192.0.2.7"),
        ("name", "alice"),
        ("asked_method", "POST"),
        ("asked_host", "shop.example"),
        ("asked_path", "/x"),
    ] {
        assert_eq!(line[field], expected, "{line}");
    }
    let metrics = http().get(format!("{}/metrics", rig.gate.ops)).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    let counted =
        "otpgate_requests_total{listener=\"api\",outcome=\"allowed\",route=\"authz\"} 2\n";
    assert!(metrics.contains(counted), "{metrics}");
}

#[tokio::test]
async fn nobody_is_no_identity() {
    let rig = Rig::new().await;
    let client = rig.client().await;
    for (about, outcome) in [
        (About::get("/public/x"), "public"),
        (About::get("/public").alice(), "public"),
        (About::get("/watched"), "reported"),
        (About::get("/watched").alice(), "reported"),
    ] {
        let ok = allowed(check(&client, call(about.joined())).await);
        assert_eq!(pairs(&ok.headers), []);
        assert_eq!(ok.headers_to_remove, ["x-auth-token", "x-auth-name", "x-auth-realm"]);
        rig.gate.wait_for_log(|line| line["action"] == "authz" && line["outcome"] == outcome);
    }
}

#[tokio::test]
async fn identity_has_the_headers_that_are_set_for_it() {
    let headers = "[headers]\nidentity_name = 'Remote-User'\nidentity_realm = 'Remote-Realm'\n\
                   identity_principal = 'Remote-Principal'\n";
    let rig = Rig::with(TRUSTING, headers).await;
    let client = rig.client().await;
    let ok = allowed(check(&client, call(About::get("/").alice().joined())).await);
    let identity =
        [("remote-user", "alice"), ("remote-realm", "shop"), ("remote-principal", "alice@shop")];
    assert_eq!(pairs(&ok.headers), identity);
    let credentials = ["x-auth-name", "x-auth-realm", "x-auth-token"];
    assert_eq!(ok.headers_to_remove, credentials);
    let forged = About::get("/public").header("remote-user", "root");
    let ok = allowed(check(&client, call(forged.joined())).await);
    assert_eq!(ok.headers_to_remove[..3], credentials);
    assert_eq!(ok.headers_to_remove[3..], identity.map(|(name, _)| name));
    let alias = About::get("/public").header("remote_user", "root");
    assert_eq!(status(check(&client, call(alias.joined())).await), 400);
}

/// Whoever asks, in whichever form: what the gate's own proxy would answer.
#[tokio::test]
async fn decisions_are_those_of_the_proxy() {
    let rig = Rig::new().await;
    let client = rig.client().await;
    let method = |method, about| About { method, ..about };
    let at_lab = About { host: "lab.example", ..About::get("/") };
    let bob = |about: About| about.proof("bob", "lab", &token(BOB));
    for (about, expected) in [
        (About::get("/").alice(), 200),
        (About::get("/"), 401),
        (About::get("/").proof("alice", "shop", &wrong_token(ALICE)), 401),
        (About::get("/").proof("alice", "lab", &token(ALICE)), 401),
        (About::get("/").proof("alice", "shop", "12345"), 401),
        (About::get("/").proof("nobody", "shop", &token(ALICE)), 401),
        (About::get("/").header("x-auth-name", "alice"), 401),
        (About::get("/admin").alice(), 403),
        (About::get("/admin/x?/public"), 401),
        (bob(About::get("/admin/x")), 200),
        (at_lab.clone().alice(), 403),
        (About { host: "LAB.example.:80", ..at_lab.clone() }.alice(), 403),
        (bob(at_lab), 200),
        (method("TRACE", About::get("/public")), 405),
        (method("get", About::get("/public")), 400),
        (About { host: "a b", ..About::get("/public") }, 400),
        (About::get("/public/../admin"), 400),
        (About::get("/public/%2e%2e/admin"), 400),
        (About::get("/public//admin"), 400),
        (About::get("/public/..;/admin"), 400),
        (About::get("/public%2f..%2fadmin"), 400),
        (About::get("/public/%zz"), 400),
        (About::get("/ADMIN").alice(), 400),
        (About::get("/").alice().header("x-auth-name", "alice"), 400),
        (About::get("/").alice().header("x-auth-token", "1"), 400),
        (About::get("/").alice().header("x-auth-realm", ""), 400),
        (About::get("/").alice().header("x_auth_name", "bob"), 400),
        (About::get("/").alice().header("x.auth.token", "1"), 400),
        (About::get("/").proof("\u{a0}alice", "shop", &token(ALICE)), 400),
        (About::get("/public").header("cookie", "a=1,b=2"), 200),
    ] {
        for http in [about.joined(), about.raw()] {
            assert_eq!(status(check(&client, call(http)).await), expected, "{about:?}");
        }
        assert_eq!(about.pass(&rig.gate).await, expected, "{about:?}");
    }
}

/// Joined, it may be two names.
#[tokio::test]
async fn a_comma_in_a_credential_is_plain_only_in_raw_headers() {
    let rig = Rig::new().await;
    let client = rig.client().await;
    let about = About::get("/").proof("alice, bob", "shop", &token(ALICE));
    assert_eq!(status(check(&client, call(about.joined())).await), 400);
    assert_eq!(status(check(&client, call(about.raw())).await), 401);
}

#[tokio::test]
async fn refusals_look_like_the_proxys() {
    let rig = Rig::new().await;
    let client = rig.client().await;
    for (about, code, challenge) in [
        (About::get("/"), 401, Some("OTP realm=\"otpgate\"")),
        (About::get("/admin").alice(), 403, None),
        (About { method: "TRACE", ..About::get("/") }, 405, None),
    ] {
        let (status, denied) = denied(check(&client, call(about.joined())).await);
        assert_eq!(status, code);
        assert_eq!(value(&denied, "content-type"), Some("application/json"));
        assert_eq!(value(&denied, "cache-control"), Some("no-store"));
        assert_eq!(value(&denied, "www-authenticate"), challenge);
        assert_eq!(value(&denied, "allow").is_some(), code == 405);
        let body: Value = serde_json::from_str(&denied.body).unwrap();
        assert!(body["detail"].is_string() && !denied.body.contains("alice"), "{body}");
        let id = body["request_id"].as_str().unwrap();
        assert_eq!(value(&denied, "x-request-id"), Some(id));
        let line =
            rig.gate.wait_for_log(|line| line["request_id"] == id && line["action"] == "authz");
        assert_eq!(line.unwrap()["status"], code);
    }
}

/// Tokens are tried in the name of the client that Envoy names, or of one further behind.
#[tokio::test]
async fn clients_are_throttled_by_their_address() {
    let api = "trusted_proxies = ['127.0.0.1', '10.0.0.0/8']";
    let rig = Rig::with(api, "[throttle]\nper_source = { failures = 2, per = '1h' }\n").await;
    let client = rig.client().await;
    let guess = || About::get("/").proof("alice", "shop", &wrong_token(ALICE));
    let ask = async |source: &str, about: About| {
        check(&client, call_from(Some(peer(source)), about.joined())).await
    };
    let mut last = 401;
    for _ in 0..20 {
        let response = ask("192.0.2.7", guess()).await;
        let (status, denied) = denied(response);
        assert_eq!(value(&denied, "retry-after").is_some(), status == 429);
        last = status;
    }
    assert_eq!(last, 429);
    assert_eq!(status(ask("192.0.2.7", About::get("/").alice()).await), 429);
    assert_eq!(status(ask("::ffff:192.0.2.7", About::get("/").alice()).await), 429);
    assert_eq!(status(ask("192.0.2.8", About::get("/").alice()).await), 200);
    let behind = |client| About::get("/").alice().header("x-forwarded-for", client);
    assert_eq!(status(ask("10.1.1.1", behind("192.0.2.7")).await), 429);
    assert_eq!(status(ask("192.0.2.8", behind("192.0.2.7")).await), 200);
}

#[tokio::test]
async fn strangers_are_denied() {
    for api in ["", "trusted_proxies = ['192.0.2.0/24']"] {
        let rig = Rig::with(api, CALM).await;
        let client = rig.client().await;
        for about in [About::get("/").alice(), About::get("/public")] {
            let (status, _) = denied(check(&client, call(about.joined())).await);
            assert_eq!(status, 403);
            let line = rig.gate.wait_for_log(|line| line["action"] == "authz").unwrap();
            assert_eq!(line["reason"], "untrusted_proxy", "{line}");
        }
    }
}

#[tokio::test]
async fn what_is_missing_or_contradicts_itself_is_denied() {
    let rig = Rig::new().await;
    let client = rig.client().await;
    let about = About::get("/public");
    let somebody = || Some(peer("192.0.2.7"));
    let empty = AttributeContext::default();
    let no_http = AttributeContext {
        source: somebody(),
        request: Some(Request::default()),
        ..AttributeContext::default()
    };
    let nowhere = Peer { address: Some(core::Address::default()), ..Peer::default() };
    let both = HttpRequest { headers: about.joined().headers, ..about.raw() };
    let other = |http: HttpRequest, name: &str, value: &str| {
        let mut http = http;
        http.headers.insert(name.to_owned(), value.to_owned());
        call(http)
    };
    for (what, call) in [
        ("nothing", CheckRequest::default()),
        ("no attributes", CheckRequest { attributes: Some(empty) }),
        ("no request", CheckRequest { attributes: Some(no_http) }),
        ("no sender", call_from(None, about.joined())),
        ("no address", call_from(Some(nowhere), about.joined())),
        ("a name for an address", call_from(Some(peer("localhost")), about.joined())),
        ("no method", call(HttpRequest { method: String::new(), ..about.joined() })),
        ("no path", call(HttpRequest { path: String::new(), ..about.joined() })),
        ("no host", call(HttpRequest { host: String::new(), ..about.joined() })),
        ("headers twice", call(both)),
        ("another method", other(about.joined(), ":method", "POST")),
        ("another path", other(about.joined(), ":path", "/admin")),
        ("another host", other(about.joined(), "host", "lab.example")),
        ("another authority", other(about.joined(), ":authority", "lab.example")),
        ("a name that is none", other(about.joined(), "x auth", "1")),
        ("a value that is none", other(about.joined(), "x", "1\r\nx-auth-name: bob")),
    ] {
        assert_eq!(denied(check(&client, call).await).0, 400, "{what}");
    }
    assert_eq!(status(check(&client, call(about.joined())).await), 200);
    let mut many = about.joined();
    many.headers.extend((0..100).map(|n| (format!("x-{n}"), "y".to_owned())));
    many.headers.insert("x-101".into(), "y".into());
    many.headers.insert("x-102".into(), "y".into());
    assert_eq!(denied(check(&client, call(many)).await).0, 431);
}

#[tokio::test]
async fn a_pipe_is_a_sender() {
    let rig = Rig::new().await;
    let client = rig.client().await;
    let address = Some(Address::Pipe(core::Pipe { path: "@envoy".into(), mode: 0 }));
    let pipe = Peer { address: Some(core::Address { address }), ..Peer::default() };
    let call = call_from(Some(pipe), About::get("/").alice().joined());
    assert_eq!(status(check(&client, call).await), 200);
}

/// A gate that cannot know is no reason to let anything pass.
#[tokio::test]
async fn without_entries_everything_is_unavailable() {
    let sandbox = Sandbox::new();
    let store = "[store]\nurl = 'redis://127.0.0.1:1'\nsealing = 'off'";
    let settings = format!("[api]\n{TRUSTING}\n{store}\n{ROUTES}");
    let gate = sandbox.serve(&settings);
    let client = client(&gate).await;
    let (status, denied) = denied(check(&client, call(About::get("/").alice().joined())).await);
    assert_eq!((status, value(&denied, "retry-after")), (503, Some("5")));
    allowed(check(&client, call(About::get("/public").joined())).await);
}

/// Sends bytes as a call's body, or part of one.
async fn send(
    wire: &SendRequest<Bytes>,
    kind: &str,
    body: Vec<u8>,
) -> (u16, Option<String>, Vec<u8>) {
    let request = http::Request::post(format!("http://gate{CHECK}"))
        .header("content-type", kind)
        .header("te", "trailers");
    let mut wire = bounded("a stream", wire.clone().ready()).await.unwrap();
    let (response, mut stream) = wire.send_request(request.body(()).unwrap(), false).unwrap();
    stream.send_data(body.into(), true).unwrap();
    let response = bounded("the answer", response).await.unwrap();
    let status = response.status().as_u16();
    let mut stream = response.into_body();
    let mut data = Vec::new();
    while let Some(part) = h2peer::data(&mut stream).await {
        data.extend_from_slice(&part);
    }
    let trailers = bounded("trailers", stream.trailers()).await.unwrap();
    let status_of =
        |trailers: http::HeaderMap| trailers["grpc-status"].to_str().unwrap().to_owned();
    (status, trailers.map(status_of), data)
}

fn framed(flag: u8, message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[flag][..], &length, message].concat()
}

#[tokio::test]
async fn what_cannot_be_read_is_denied_without_an_error() {
    use prost::Message as _;
    let rig = Rig::new().await;
    let wire = rig.wire().await;
    let good = call(About::get("/public").joined()).encode_to_vec();
    let mut long = framed(0, &good);
    long.extend_from_slice(&framed(0, &good));
    for (what, body, expected) in [
        ("a call", framed(0, &good), 0),
        ("nothing", Vec::new(), 400),
        ("half a prefix", vec![0, 0], 400),
        ("half a message", framed(0, &good)[..good.len()].to_vec(), 400),
        ("two messages", long, 400),
        ("no protobuf", framed(0, b"\xff\xff\xff"), 400),
        ("text that is none", framed(0, b"\x0a\x06\x22\x04\x12\x02\x12\xff"), 400),
        ("compressed", framed(1, &good), 415),
        ("of no kind", framed(2, &good), 400),
        ("much too long", framed(0, &[0; 200 << 10]), 400),
    ] {
        let sent = send(&wire, "application/grpc", body).await;
        assert_eq!((sent.0, sent.1.as_deref()), (200, Some("0")), "{what}");
        let response = CheckResponse::decode(&sent.2[5..]).unwrap();
        match expected {
            0 => drop(allowed(response)),
            code => assert_eq!(denied(response).0, code, "{what}"),
        }
    }
    let (status, trailers, body) = send(&wire, "application/json", framed(0, &good)).await;
    assert_eq!((status, trailers), (415, None), "{}", String::from_utf8_lossy(&body));
}

/// Whatever the sender of a request can make Envoy ask: a check that fails lets it pass, where Envoy is told
/// so.
#[tokio::test]
async fn large_requests_are_denied_without_an_error() {
    let rig = Rig::new().await;
    let client = rig.client().await;
    for length in [60 << 10, 100 << 10, 1 << 20] {
        let about = About::get("/").alice().header("x", &"y".repeat(length));
        let expected = if length < 128 << 10 { 200 } else { 400 };
        assert_eq!(status(check(&client, call(about.joined())).await), expected, "{length}");
    }
}

#[tokio::test]
async fn whoever_does_not_speak_grpc_is_told() {
    let rig = Rig::new().await;
    let api = address(&rig.gate.api);
    for (line, status, word) in
        [(format!("POST {CHECK}"), 505, "HTTP/2"), (format!("GET {CHECK}"), 405, "GET")]
    {
        let request = format!(
            "{line} HTTP/1.1\r\nHost: gate\r\nContent-Type: application/grpc\r\n\
             Content-Length: 0\r\nConnection: close\r\n\r\n"
        );
        let answer = ask(api, request).await;
        assert_eq!(answer.status, status);
        assert!(answer.text().contains(word), "{}", answer.text());
    }
}

#[tokio::test]
async fn a_thousand_calls_share_a_connection() {
    let rig = Rig::new().await;
    let client = rig.client().await;
    let all = (0..1000).map(|n| {
        let about = if n % 2 == 0 { About::get("/").alice() } else { About::get("/") };
        let client = &client;
        async move { status(check(client, call(about.joined())).await) }
    });
    let statuses = join_all(all).await;
    for (n, status) in statuses.into_iter().enumerate() {
        assert_eq!(status, if n % 2 == 0 { 200 } else { 401 });
    }
}

#[tokio::test]
async fn calls_that_are_given_up_disturb_no_other() {
    let rig = Rig::new().await;
    let wire = rig.wire().await;
    for n in 0..300 {
        let request = http::Request::post(format!("http://gate{CHECK}"))
            .header("content-type", "application/grpc");
        let mut wire = bounded("a stream", wire.clone().ready()).await.unwrap();
        let (response, mut stream) = wire.send_request(request.body(()).unwrap(), false).unwrap();
        if n % 3 > 0 {
            stream.send_data(Bytes::from_static(&[0, 0, 0]), n % 3 == 2).unwrap();
        }
        stream.send_reset(h2::Reason::CANCEL);
        drop(response);
        if n % 10 == 0 {
            use prost::Message as _;
            let call = call(About::get("/").alice().joined()).encode_to_vec();
            let sent = send(&wire, "application/grpc", framed(0, &call)).await;
            allowed(CheckResponse::decode(&sent.2[5..]).unwrap());
        }
    }
    let client = rig.client().await;
    let mut hasty = tonic::Request::new(call(About::get("/").alice().joined()));
    hasty.set_timeout(Duration::from_nanos(1));
    let _ = client.clone().check(hasty).await;
    assert_eq!(status(check(&client, call(About::get("/").alice().joined())).await), 200);
}

#[tokio::test]
async fn calls_come_over_tls_too() {
    let pki = Pki::new();
    let api = format!(
        "{TRUSTING}\ntls_cert_file = '{}'\ntls_key_file = '{}'\n",
        pki.files.cert_file.display(),
        pki.files.key_file.display()
    );
    let rig = Rig::with(&api, CALM).await;
    let ca = Certificate::from_pem(std::fs::read(&pki.ca_file).unwrap());
    let tls = ClientTlsConfig::new().ca_certificate(ca).domain_name("localhost");
    let url = rig.gate.api.replace("http://", "https://");
    let endpoint = Endpoint::from_shared(url).unwrap().tls_config(tls).unwrap();
    let client = AuthorizationClient::new(endpoint.timeout(LIMIT).connect().await.unwrap());
    let ok = allowed(check(&client, call(About::get("/").alice().joined())).await);
    assert_eq!(pairs(&ok.headers)[0], ("x-auth-name", "alice"));
}

/// Envoy names its cluster for a host.
#[tokio::test]
async fn proxies_may_name_any_host() {
    let rig = Rig::with(&format!("{TRUSTING}\nallowed_hosts = ['otp.internal']"), CALM).await;
    let named = Endpoint::from_shared(rig.gate.api.clone()).unwrap();
    let named = named.origin("http://otpgate_cluster".parse().unwrap()).connect().await.unwrap();
    let call = call(About::get("/").alice().joined());
    assert_eq!(status(check(&AuthorizationClient::new(named), call).await), 200);
}
