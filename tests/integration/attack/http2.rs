//! The same over HTTP/2, where fields have no line ends to hide behind but names and pseudo-headers of
//! their own.

use super::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, End, HEADERS, PADDED, PING, RST_STREAM, SETTINGS,
    block, frame, send,
};
use super::rig::{Rig, summary};
use crate::peers::h2peer;
use http::Request;
use tokio::net::TcpStream;

type Fields = Vec<(Vec<u8>, Vec<u8>)>;

/// What comes of it.
#[derive(Clone, Copy, Debug)]
enum Expected {
    /// The upstream gets this.
    Passes(&'static str),
    /// This status, nothing at the upstream.
    Status(u16),
    /// The stream or the connection ends without an answer (RFC 9113 section 8.1.1), nothing at the
    /// upstream.
    Broken,
}
use Expected::{Broken, Passes, Status};

fn fields(list: &[(&str, &str)]) -> Fields {
    list.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())).collect()
}

const PSEUDO: &[(&str, &str)] =
    &[(":method", "GET"), (":scheme", "http"), (":authority", "gate"), (":path", "/x")];

/// Pseudo-headers with one of them replaced.
fn pseudo(name: &str, value: &str) -> Fields {
    let mut all = fields(PSEUDO);
    let place = all.iter_mut().find(|(other, _)| other == name.as_bytes()).unwrap();
    place.1 = value.as_bytes().to_vec();
    all
}

/// Pseudo-headers without one of them.
fn without(name: &str) -> Fields {
    fields(PSEUDO).into_iter().filter(|(other, _)| other != name.as_bytes()).collect()
}

/// A `GET` with more fields.
fn with(list: &[(&str, &str)]) -> Fields {
    fields(PSEUDO).into_iter().chain(fields(list)).collect()
}

/// A `GET` with one more field of any bytes.
fn odd(name: &[u8], value: &[u8]) -> Fields {
    fields(PSEUDO).into_iter().chain([(name.to_vec(), value.to_vec())]).collect()
}

fn heads() -> Vec<(&'static str, Fields, Expected)> {
    let mut table = vec![
        ("a request", fields(PSEUDO), Passes("alice GET /x")),
        // Pseudo-headers
        ("no method", without(":method"), Broken),
        ("no path", without(":path"), Broken),
        ("no scheme", without(":scheme"), Broken),
        ("no authority and no host", without(":authority"), Status(400)),
        ("two methods", with(&[(":method", "DELETE")]), Broken),
        ("two paths", with(&[(":path", "/evil")]), Broken),
        ("two authorities", with(&[(":authority", "evil")]), Broken),
        ("two schemes", with(&[(":scheme", "https")]), Broken),
        ("a pseudo-header behind others", with(&[("accept", "x"), (":path", "/evil")]), Broken),
        ("an unknown pseudo-header", with(&[(":evil", "x")]), Broken),
        ("a status", with(&[(":status", "200")]), Broken),
        ("a pseudo-header in capitals", odd(b":Path", b"/evil"), Broken),
        ("extended CONNECT unasked", with(&[(":protocol", "websocket")]), Broken),
        ("CONNECT", pseudo(":method", "CONNECT"), Broken),
        (
            "CONNECT as it is meant",
            fields(&[(":method", "CONNECT"), (":authority", "evil:80")]),
            Status(405),
        ),
        ("TRACE", pseudo(":method", "TRACE"), Status(405)),
        ("a method in lower case", pseudo(":method", "get"), Status(400)),
        ("a method with a space", pseudo(":method", "GET /evil"), Broken),
        ("an empty method", pseudo(":method", ""), Broken),
        ("an empty path", pseudo(":path", ""), Broken),
        ("a path without slash", pseudo(":path", "evil"), Broken),
        ("an absolute URL as path", pseudo(":path", "http://evil/"), Broken),
        ("an asterisk", pseudo(":path", "*"), Status(400)),
        ("a dot segment", pseudo(":path", "/public/../admin"), Status(400)),
        ("an encoded one", pseudo(":path", "/public/%2e%2e/admin"), Status(400)),
        ("two slashes", pseudo(":path", "//admin"), Status(400)),
        ("an encoded slash", pseudo(":path", "/public%2fadmin"), Status(400)),
        ("a path with a space", pseudo(":path", "/a b"), Broken),
        ("a request line in the path", pseudo(":path", "/a HTTP/1.1\r\nX: evil\r\n"), Broken),
        ("a tab in the path", pseudo(":path", "/a\tb"), Broken),
        ("a NUL in the path", pseudo(":path", "/a\0b"), Broken),
        // The parser drops it before anybody sees it: neither decided on nor forwarded.
        ("a fragment in the path", pseudo(":path", "/x#evil"), Passes("alice GET /x")),
        ("an odd scheme", pseudo(":scheme", "ht tp"), Broken),
        ("an authority with userinfo", pseudo(":authority", "evil@gate"), Status(400)),
        ("an authority with a path", pseudo(":authority", "gate/evil"), Broken),
        ("an authority with a space", pseudo(":authority", "ga te"), Broken),
        ("an empty authority", pseudo(":authority", ""), Broken),
        // Hosts
        ("a host that agrees", with(&[("host", "gate")]), Passes("alice GET /x")),
        ("a host that differs", with(&[("host", "evil")]), Status(400)),
        ("two hosts", with(&[("host", "gate"), ("host", "gate")]), Status(400)),
        // Fields of HTTP/1 connections (RFC 9113 section 8.2.2)
        ("connection", with(&[("connection", "x-auth-name")]), Broken),
        ("keep-alive", with(&[("keep-alive", "x")]), Broken),
        ("proxy-connection", with(&[("proxy-connection", "x-auth-name")]), Broken),
        ("transfer-encoding", with(&[("transfer-encoding", "chunked")]), Broken),
        ("upgrade", with(&[("upgrade", "websocket")]), Broken),
        ("te with other than trailers", with(&[("te", "gzip")]), Broken),
        ("te with trailers", with(&[("te", "trailers")]), Passes("alice GET /x")),
        ("a length with nothing behind it", with(&[("content-length", "5")]), Broken),
        ("a length that is none", with(&[("content-length", "+0")]), Broken),
        // Claims
        ("a name twice", with(&[("x-auth-name", "evil")]), Status(400)),
        ("an alias", with(&[("x_auth_name", "evil")]), Status(400)),
        ("an alias with a dot", with(&[("x.auth.realm", "evil")]), Status(400)),
    ];
    for name in [
        &b"X-Upper"[..],
        b"X-Auth-Name",
        b"x y",
        b"x-auth-name ",
        b" x-auth-name",
        b"x:y",
        b"x-auth-name:",
        b"",
        b"x\0y",
        b"x\ry",
        b"x\ny",
        b"x\ty",
        b"x\x7fy",
        b"x\xe9y",
        b"x/y",
        b"x(y",
    ] {
        table.push(("a name with what no name has", odd(name, b"evil"), Broken));
    }
    for value in
        [&b"a\r\nx-auth-name: evil"[..], b"a\nevil", b"a\revil", b"a\0evil", b"\x01", b"a\x7fevil"]
    {
        table.push(("a value with what no value has", odd(b"x-a", value), Broken));
    }
    table
}

/// The fields that prove alice, as `fill` makes them.
fn proof(rig: &Rig) -> Fields {
    let token = String::from_utf8(rig.fill(b"{token}")).unwrap();
    fields(&[("x-auth-name", "alice"), ("x-auth-realm", "shop"), ("x-auth-token", &token)])
}

async fn check(rig: &Rig, says: &str, frames: &[u8], expected: Expected) -> Option<String> {
    let end = send(rig.address(), frames).await;
    let seen: Vec<_> = rig.seen().await.iter().map(summary).collect();
    let good = match expected {
        Passes(request) => end == End::Status(200) && seen == [request],
        Status(status) => end == End::Status(status) && seen.is_empty(),
        Broken => end == End::Broken && seen.is_empty(),
    };
    (!good).then(|| format!("{says}: wanted {expected:?}, got {end:?}, the upstream saw {seen:?}"))
}

#[tokio::test]
async fn heads_over_http2_have_one_reading() {
    let rig = Rig::normal().await;
    let mut wrong = Vec::new();
    for (says, mut fields, expected) in heads() {
        fields.extend(proof(&rig));
        let frames = frame(HEADERS, END_STREAM | END_HEADERS, 1, &block(&fields));
        wrong.extend(check(&rig, says, &frames, expected).await);
    }
    assert!(wrong.is_empty(), "{} cases:\n{}", wrong.len(), wrong.join("\n"));
}

#[tokio::test]
async fn unproven_identity_over_http2_does_not_arrive() {
    let rig = Rig::normal().await;
    let spoofed = [("x-auth-name", "evil"), ("x_auth_realm", "evil"), ("x.auth.token", "evil")];
    let mut wrong = Vec::new();
    for (path, expected) in [
        ("/public", Passes("nobody GET /public")),
        ("/watched", Passes("nobody GET /watched")),
        ("/x", Status(400)),
    ] {
        let mut all = pseudo(":path", path);
        all.extend(fields(&spoofed));
        let frames = frame(HEADERS, END_STREAM | END_HEADERS, 1, &block(&all));
        wrong.extend(check(&rig, path, &frames, expected).await);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn bodies_and_blocks_over_http2_end_where_they_end() {
    let rig = Rig::normal().await;
    let mut post = pseudo(":method", "POST");
    post.extend(proof(&rig));
    let [get, head] = ["GET", "HEAD"].map(|method| {
        let mut all = pseudo(":method", method);
        all.extend(proof(&rig));
        block(&all)
    });
    let announced = |length: &str| {
        let mut all = post.clone();
        all.extend(fields(&[("content-length", length)]));
        frame(HEADERS, END_HEADERS, 1, &block(&all))
    };
    let open = frame(HEADERS, END_HEADERS, 1, &block(&post));
    let body = frame(DATA, END_STREAM, 1, b"abc");
    let trailers =
        |list: &[(&str, &str)]| frame(HEADERS, END_STREAM | END_HEADERS, 1, &block(&fields(list)));
    let whole = block(&post);
    let (first, second) = whole.split_at(whole.len() / 2);
    let split = [frame(HEADERS, END_STREAM, 1, first), frame(CONTINUATION, END_HEADERS, 1, second)];
    let interrupted = [
        frame(HEADERS, END_STREAM, 1, first),
        frame(DATA, 0, 1, b"x"),
        frame(CONTINUATION, END_HEADERS, 1, second),
    ];
    let end = END_STREAM | END_HEADERS;
    let table = [
        ("a body", [open.clone(), body.clone()].concat(), Passes("alice POST /x")),
        (
            "a body of the announced length",
            [announced("3"), body.clone()].concat(),
            Passes("alice POST /x"),
        ),
        (
            "trailers are dropped",
            [
                open.clone(),
                frame(DATA, 0, 1, b"abc"),
                trailers(&[("x-auth-name", "evil"), ("x_auth_realm", "evil")]),
            ]
            .concat(),
            Passes("alice POST /x"),
        ),
        (
            "a body has one end, however it comes",
            [
                open.clone(),
                frame(DATA, 0, 1, b"ab"),
                frame(DATA, 0, 1, b""),
                frame(DATA, 0, 1, b"c"),
                frame(DATA, END_STREAM, 1, b""),
            ]
            .concat(),
            Passes("alice POST /x"),
        ),
        (
            "also with its length",
            [announced("3"), frame(DATA, 0, 1, b"abc"), frame(DATA, END_STREAM, 1, b"")].concat(),
            Passes("alice POST /x"),
        ),
        (
            "also with a length of nothing",
            [announced("0"), frame(DATA, END_STREAM, 1, b"")].concat(),
            Passes("alice POST /x"),
        ),
        (
            "also before trailers",
            [open.clone(), frame(DATA, 0, 1, b""), trailers(&[("x-a", "evil")])].concat(),
            Passes("alice POST /x"),
        ),
        (
            "also with its length, before trailers",
            [announced("3"), frame(DATA, 0, 1, b"abc"), trailers(&[("x-a", "evil")])].concat(),
            Passes("alice POST /x"),
        ),
        (
            "padding is none of it",
            [open.clone(), frame(DATA, END_STREAM | PADDED, 1, b"\x04abcevil")].concat(),
            Passes("alice POST /x"),
        ),
        (
            "a body of GET",
            [frame(HEADERS, END_HEADERS, 1, &get), body.clone()].concat(),
            Passes("alice GET /x"),
        ),
        (
            "an answer to HEAD",
            frame(HEADERS, END_STREAM | END_HEADERS, 1, &head),
            Passes("alice HEAD /x"),
        ),
        (
            "nor has an empty one two",
            [open.clone(), frame(DATA, END_STREAM, 1, b"")].concat(),
            Passes("alice POST /x"),
        ),
        (
            "trailers that are none are dropped as well",
            [open.clone(), frame(DATA, 0, 1, b"abc"), trailers(&[(":path", "/evil")])].concat(),
            Passes("alice POST /x"),
        ),
        ("a block in two frames", split.concat(), Passes("alice POST /x")),
        ("a frame within a block", interrupted.concat(), Broken),
        ("a continuation of nothing", frame(CONTINUATION, END_HEADERS, 1, &whole), Broken),
        ("a stream of an even number", frame(HEADERS, end, 2, &whole), Broken),
        ("stream zero", frame(HEADERS, end, 0, &whole), Broken),
        ("data for no stream", body.clone(), Broken),
        ("an index of nothing", frame(HEADERS, end, 1, &[0xff, 0x80, 0x80, 0x01]), Broken),
        ("index zero", frame(HEADERS, end, 1, &[0x80]), Broken),
        (
            "a string longer than its block",
            frame(HEADERS, end, 1, &[0x10, 0x7f, 0x00, b'x']),
            Broken,
        ),
        (
            "an integer without end",
            frame(HEADERS, end, 1, &[&[0x10_u8, 0x7f][..], &[0xff; 12]].concat()),
            Broken,
        ),
        (
            "a wrong Huffman code",
            frame(HEADERS, end, 1, &[0x10, 0x84, 0xff, 0xff, 0xff, 0xff, 0x00]),
            Broken,
        ),
        (
            "a table larger than allowed",
            frame(HEADERS, end, 1, &[0x3f, 0xff, 0xff, 0xff, 0x07]),
            Broken,
        ),
        ("settings of odd length", frame(SETTINGS, 0, 0, &[0, 1, 2]), Broken),
    ];
    let mut wrong = Vec::new();
    for (says, frames, expected) in &table {
        wrong.extend(check(&rig, says, frames, *expected).await);
    }
    // The head of these may have been forwarded before their body was seen to be broken: it is alice's,
    // and the upstream never sees its end.
    for (says, frames) in [
        (
            "more padding than frame",
            [open.clone(), frame(DATA, END_STREAM | PADDED, 1, b"\x09abcevil")].concat(),
        ),
        ("less than announced", [announced("5"), body.clone()].concat()),
        ("more than announced", [announced("2"), body.clone()].concat()),
        (
            "reset within the body",
            [announced("5"), frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]), frame(PING, 0, 0, &[0; 8])]
                .concat(),
        ),
    ] {
        let end = send(rig.address(), &frames).await;
        assert!(!matches!(end, End::Status(200..400)), "{says}: {end:?}");
        for seen in rig.seen().await {
            assert_eq!((summary(&seen).as_str(), seen.whole), ("alice POST /x", false), "{says}");
        }
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), table.len(), wrong.join("\n"));
}

/// Streams share a connection, and a table of fields that were sent before, but no proof.
#[tokio::test]
async fn a_proof_is_good_for_one_stream() {
    let rig = Rig::normal().await;
    let client = h2peer::client(TcpStream::connect(rig.address()).await.unwrap()).await;
    let token = String::from_utf8(rig.fill(b"{token}")).unwrap();
    let request = |path: &str, proven: bool| {
        let request = Request::builder().uri(format!("http://gate{path}"));
        let request = match proven {
            true => request
                .header("x-auth-name", "alice")
                .header("x-auth-realm", "shop")
                .header("x-auth-token", &token),
            false => request,
        };
        request.body(()).unwrap()
    };
    for (path, proven, status, seen) in [
        ("/1", true, 200, Some("alice GET /1")),
        ("/2", false, 401, None),
        ("/public", true, 200, Some("nobody GET /public")),
        ("/3", true, 200, Some("alice GET /3")),
        ("/public", false, 200, Some("nobody GET /public")),
        ("/admin", true, 403, None),
    ] {
        let (answer, _) = h2peer::ask(&client, request(path, proven)).await;
        assert_eq!(answer.status(), status, "{path}");
        let got: Vec<_> = rig.seen().await.iter().map(summary).collect();
        assert_eq!(got, seen.into_iter().collect::<Vec<_>>(), "{path}");
    }
    // All at once: the answers come in any order, each stream gets its own.
    let asked = (0..40).map(|i| h2peer::ask(&client, request(&format!("/many/{i}"), i % 2 == 0)));
    let answers = futures_util::future::join_all(asked).await;
    for (i, (answer, _)) in answers.iter().enumerate() {
        assert_eq!(answer.status(), if i % 2 == 0 { 200 } else { 401 });
    }
    let mut got: Vec<_> = rig.seen().await.iter().map(summary).collect();
    got.sort();
    let mut expected: Vec<_> = (0..40).step_by(2).map(|i| format!("alice GET /many/{i}")).collect();
    expected.sort();
    assert_eq!(got, expected);
}

/// RFC 9113 section 8.2.3.
#[tokio::test]
async fn crumbs_of_a_cookie_are_one_header_over_http1() {
    let rig = Rig::normal().await;
    let mut fields = with(&[("cookie", "a=1"), ("accept", "x"), ("cookie", "b=2")]);
    fields.extend(proof(&rig));
    let frames = frame(HEADERS, END_STREAM | END_HEADERS, 1, &block(&fields));
    assert_eq!(send(rig.address(), &frames).await, End::Status(200));
    assert_eq!(rig.seen().await[0].values("cookie"), ["a=1; b=2"]);
}

/// An upgrade to HTTP/2 within HTTP/1.1 would carry requests past the gate.
#[tokio::test]
async fn no_upgrade_to_http2_is_passed_on() {
    let rig = Rig::normal().await;
    let sends = "GET /x HTTP/1.1\r\nHost: gate\r\n{alice}Connection: Upgrade, HTTP2-Settings\r\n\
                 Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n";
    assert_eq!(rig.send(&rig.fill(sends.as_bytes())).await, [200]);
    let seen = rig.seen().await;
    assert_eq!(seen.iter().map(summary).collect::<Vec<_>>(), ["alice GET /x"]);
    for name in ["upgrade", "http2-settings", "connection"] {
        assert!(
            seen[0].values(name).iter().all(|value| *value == "keep-alive"),
            "{}",
            seen[0].head
        );
    }
}
