//! Where a request begins and ends: one reading, or none.

use super::rig::{Case, Rig, answers, broken, get_with, passes, refused};

/// A `POST` by alice with these header lines and this body.
fn post(lines: &str, body: &str) -> String {
    format!("POST /x HTTP/1.1\r\nHost: gate\r\n{{alice}}{lines}\r\n{body}")
}

fn chunked(body: &str) -> String {
    post("Transfer-Encoding: chunked\r\n", body)
}

/// A chunked body that turns out to be broken; its head may have gone on by then.
fn broken_chunks(says: &'static str, body: &str) -> Case {
    let request = format!(
        "POST /broken HTTP/1.1\r\nHost: gate\r\n{{alice}}Transfer-Encoding: chunked\r\n\r\n{body}"
    );
    broken(says, request, "alice POST /broken")
}

const SMUGGLED: &str = "GET /evil HTTP/1.1\r\nHost: gate\r\n\r\n";

fn lengths() -> Vec<Case> {
    let mut table: Vec<Case> = vec![
        passes("a length is a number", post("Content-Length: 3\r\n", "abc"), &["alice POST /x"]),
        passes("a length of nothing", post("Content-Length: 0\r\n", ""), &["alice POST /x"]),
        passes(
            "zeros in front of it mean nothing",
            post("Content-Length: 003\r\n", "abc"),
            &["alice POST /x"],
        ),
        passes(
            "a GET may have a body, which is no request",
            "GET /x HTTP/1.1\r\nHost: gate\r\n{alice}Content-Length: 5\r\n\r\nabcde",
            &["alice GET /x"],
        ),
        answers(
            "a length of zero leaves the rest to be a request of its own",
            post("Content-Length: 0\r\n", "GET /1 HTTP/1.1\r\nHost: gate\r\n\r\n"),
            &[200, 401],
            &["alice POST /x"],
        ),
        broken(
            "a body shorter than its length is never whole",
            "POST /broken HTTP/1.1\r\nHost: gate\r\n{alice}Content-Length: 10\r\n\r\nabc",
            "alice POST /broken",
        ),
    ];
    table.extend(
        [
            ("twice the same", "Content-Length: 3\r\nContent-Length: 3\r\n"),
            ("twice, differing", "Content-Length: 3\r\nContent-Length: 30\r\n"),
            ("a list of the same", "Content-Length: 3, 3\r\n"),
            ("a list", "Content-Length: 3, 30\r\n"),
            ("with a sign", "Content-Length: +3\r\n"),
            ("negative", "Content-Length: -3\r\n"),
            ("hexadecimal", "Content-Length: 0x3\r\n"),
            ("with a fraction", "Content-Length: 3.0\r\n"),
            ("with an exponent", "Content-Length: 3e0\r\n"),
            ("with a unit", "Content-Length: 3 bytes\r\n"),
            ("with a space in it", "Content-Length: 3 0\r\n"),
            ("with a vertical tab", "Content-Length: \x0b3\r\n"),
            ("in quotes", "Content-Length: \"3\"\r\n"),
            ("empty", "Content-Length:\r\n"),
            ("empty and not", "Content-Length:\r\nContent-Length: 3\r\n"),
            ("beyond 64 bits", "Content-Length: 18446744073709551619\r\n"),
            ("folded", "Content-Length:\r\n 3\r\n"),
            (
                "under another spelling beside the right one",
                "Content-Length: 3\r\nContent_Length: 30\r\n",
            ),
        ]
        .map(|(says, lines)| refused(says, post(lines, "abc"), 400)),
    );
    table
}

fn codings() -> Vec<Case> {
    let body = "3\r\nabc\r\n0\r\n\r\n";
    let mut table: Vec<Case> = vec![
        passes("chunks", chunked(body), &["alice POST /x"]),
        passes(
            "chunks in capitals",
            post("TRANSFER-ENCODING: CHUNKED\r\n", body),
            &["alice POST /x"],
        ),
        refused(
            "a length and chunks",
            post(
                "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
                &format!("0\r\n\r\n{SMUGGLED}"),
            ),
            400,
        ),
        refused(
            "chunks and a length",
            post(
                "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
                &format!("0\r\n\r\n{SMUGGLED}"),
            ),
            400,
        ),
        refused(
            "both on a public route",
            "POST /public HTTP/1.1\r\nHost: gate\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        refused(
            "HTTP/1.0 has no chunks",
            format!(
                "POST /x HTTP/1.0\r\nHost: gate\r\n{{alice}}Transfer-Encoding: chunked\r\n\r\n{body}"
            ),
            400,
        ),
    ];
    table.extend(
        [
            ("then identity", "Transfer-Encoding: chunked, identity\r\n"),
            ("identity alone", "Transfer-Encoding: identity\r\n"),
            ("identity first", "Transfer-Encoding: identity, chunked\r\n"),
            ("gzip first", "Transfer-Encoding: gzip, chunked\r\n"),
            ("gzip last", "Transfer-Encoding: chunked, gzip\r\n"),
            ("almost chunked", "Transfer-Encoding: xchunked\r\n"),
            ("chunked with more behind", "Transfer-Encoding: chunkedx\r\n"),
            ("chunked with a parameter", "Transfer-Encoding: chunked;q=1\r\n"),
            ("quoted", "Transfer-Encoding: \"chunked\"\r\n"),
            ("twice", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"),
            ("twice in one", "Transfer-Encoding: chunked, chunked\r\n"),
            ("twice, the second unknown", "Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n"),
            ("an empty member", "Transfer-Encoding: , chunked\r\n"),
            ("empty", "Transfer-Encoding:\r\n"),
            ("folded", "Transfer-Encoding:\r\n chunked\r\n"),
            ("a vertical tab in front", "Transfer-Encoding: \x0bchunked\r\n"),
            ("a space before the colon", "Transfer-Encoding : chunked\r\n"),
            ("a space before the name", " Transfer-Encoding: chunked\r\n"),
            ("with a bare CR", "Transfer-Encoding: chunked\rX: y\r\n"),
            ("under another spelling", "Transfer_Encoding: chunked\r\n"),
            (
                "under another spelling beside a length",
                "Content-Length: 13\r\nTransfer.Encoding: chunked\r\n",
            ),
        ]
        .map(|(says, lines)| refused(says, post(lines, body), 400)),
    );
    // White space around a value is none of it (RFC 9110 section 5.5).
    for lines in ["Transfer-Encoding:\tchunked\r\n", "Transfer-Encoding:  chunked \t\r\n"] {
        table.push(passes("space around", post(lines, body), &["alice POST /x"]));
    }
    table
}

fn chunks() -> Vec<Case> {
    let next = "GET /1 HTTP/1.1\r\nHost: gate\r\n\r\n";
    let mut table = vec![
        passes("several chunks", chunked("1\r\na\r\n2\r\nbc\r\n0\r\n\r\n"), &["alice POST /x"]),
        passes(
            "sizes in capitals, zeros in front",
            chunked("00A\r\n0123456789\r\n0\r\n\r\n"),
            &["alice POST /x"],
        ),
        // Extensions are dropped: the upstream gets chunks of the gate's own making.
        passes(
            "extensions are dropped",
            chunked("3;evil=\"x\"\r\nabc\r\n0;evil\r\n\r\n"),
            &["alice POST /x"],
        ),
        answers(
            "a line without a size ends the body; what follows is a request of its own",
            chunked(&format!("\r\n\r\n{next}")),
            &[200, 401],
            &["alice POST /x"],
        ),
        answers(
            "a bare LF in an extension ends no line, there or at the upstream",
            chunked(&format!("3;\nevil\r\nabc\r\n0\r\n\r\n{next}")),
            &[200, 401],
            &["alice POST /x"],
        ),
    ];
    table.extend(
        [
            ("a size beyond 64 bits", "10000000000000003\r\nabc\r\n0\r\n\r\n"),
            ("a size of all bits", "ffffffffffffffff\r\nabc\r\n0\r\n\r\n"),
            ("a size of all bits but the sign", "7fffffffffffffff\r\nabc\r\n0\r\n\r\n"),
            ("a size with a sign", "+3\r\nabc\r\n0\r\n\r\n"),
            ("a negative size", "-3\r\nabc\r\n0\r\n\r\n"),
            ("a size with a prefix", "0x3\r\nabc\r\n0\r\n\r\n"),
            ("a size behind a space", " 3\r\nabc\r\n0\r\n\r\n"),
            ("a size in two parts", "1 0\r\nabc\r\n0\r\n\r\n"),
            ("no hexadecimal digit", "g\r\nabc\r\n0\r\n\r\n"),
            ("a bare LF behind a size", "3\nabc\r\n0\r\n\r\n"),
            ("a bare CR behind a size", "3\rabc\r\n0\r\n\r\n"),
            ("a bare CR in an extension", "3;a\rb\r\nabc\r\n0\r\n\r\n"),
            ("a chunk longer than its size", "3\r\nabcd\r\n0\r\n\r\n"),
            ("a chunk shorter than its size", "4\r\nabc\r\n0\r\n\r\n"),
            ("a bare LF behind a chunk", "3\r\nabc\n0\r\n\r\n"),
            ("no last chunk", "3\r\nabc\r\n"),
            ("a last chunk without its end", "3\r\nabc\r\n0\r\n"),
            ("bare LFs behind the last chunk", "3\r\nabc\r\n0\n\n"),
            ("a trailer with a bare LF", "3\r\nabc\r\n0\r\nX: y\n\r\n"),
            ("an extension without end", &format!("3;{}", "x".repeat(100_000))),
            ("trailers without end", &format!("0\r\n{}", "X-Evil: y\r\n".repeat(20_000))),
        ]
        .map(|(says, body)| broken_chunks(says, body)),
    );
    table
}

/// An upgrade that the upstream does not make is a request like any other.
fn upgrades() -> Vec<Case> {
    let ask = |lines: &str, rest: &str| {
        format!(
            "GET /x HTTP/1.1\r\nHost: gate\r\n{{alice}}Connection: Upgrade\r\nUpgrade: websocket\r\n{lines}\r\n{rest}"
        )
    };
    let next = "GET /1 HTTP/1.1\r\nHost: gate\r\n\r\n";
    [
        ("without a body", "", String::new()),
        ("with a body of nothing", "Content-Length: 0\r\n", String::new()),
        ("with a body", "Content-Length: 3\r\n", "abc".to_owned()),
        ("with chunks", "Transfer-Encoding: chunked\r\n", "3\r\nabc\r\n0\r\n\r\n".to_owned()),
        ("with chunks of nothing", "Transfer-Encoding: chunked\r\n", "0\r\n\r\n".to_owned()),
    ]
    .into_iter()
    .flat_map(|(says, lines, body)| {
        [
            answers(says, ask(lines, &body), &[200], &["alice GET /x"]),
            answers(says, ask(lines, &(body + next)), &[200, 401], &["alice GET /x"]),
        ]
    })
    .chain([
        refused(
            "with both",
            ask("Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"),
            400,
        ),
        refused(
            "unproven",
            "GET /x HTTP/1.1\r\nHost: gate\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            401,
        ),
    ])
    .collect()
}

fn syntax() -> Vec<Case> {
    let mut table = vec![
        passes(
            "leading blank lines are skipped (RFC 9112 section 2.2)",
            format!("\r\n\r\n{}", get_with("")),
            &["alice GET /"],
        ),
        answers(
            "nor do they in a second request",
            format!("{}GET /2 HTTP/1.1\nHost: gate\r\n{{alice}}\r\n", get_with("")),
            &[200, 400],
            &["alice GET /"],
        ),
        answers(
            "nothing is read behind a head that is refused",
            format!("GET / HTTP/1.1\nHost: gate\r\n\r\n{}", get_with("")),
            &[400],
            &[],
        ),
        refused("bare LFs end no line", "GET / HTTP/1.1\nHost: gate\n\n", 400),
        refused(
            "a bare LF behind the request line",
            "GET / HTTP/1.1\nHost: gate\r\n{alice}\r\n",
            400,
        ),
        refused("a bare LF behind a header", get_with("X-A: b\n"), 400),
        refused("a bare LF hides no header", get_with("X-A: b\nX-B: c\r\n"), 400),
        refused("a bare LF at the head's end", "GET / HTTP/1.1\r\nHost: gate\r\n{alice}\n", 400),
        refused("leading bare LFs", format!("\n{}", get_with("")), 400),
        refused("HTTP/0.9", "GET /\r\n\r\n", 400),
        refused("HTTP/2.0 in words", "GET / HTTP/2.0\r\nHost: gate\r\n{alice}\r\n", 400),
        refused("HTTP/1.2", "GET / HTTP/1.2\r\nHost: gate\r\n{alice}\r\n", 400),
        refused("HTTP/1.10", "GET / HTTP/1.10\r\nHost: gate\r\n{alice}\r\n", 400),
        refused("a version in lower case", "GET / http/1.1\r\nHost: gate\r\n{alice}\r\n", 400),
        refused("another protocol", "GET / ICY/1.1\r\nHost: gate\r\n{alice}\r\n", 400),
        passes(
            "a space in the target is one of the path",
            "GET /  HTTP/1.1\r\nHost: gate\r\n{alice}\r\n",
            &["alice GET /%20"],
        ),
        refused(
            "a second version",
            "GET /public HTTP/1.1 HTTP/1.1\r\nHost: gate\r\n{alice}\r\n",
            400,
        ),
        refused("a tab in the request line", "GET\t/\tHTTP/1.1\r\nHost: gate\r\n{alice}\r\n", 400),
        refused(
            "a space in front of the method",
            " GET / HTTP/1.1\r\nHost: gate\r\n{alice}\r\n",
            400,
        ),
        refused("a space behind the version", "GET / HTTP/1.1 \r\nHost: gate\r\n{alice}\r\n", 400),
        refused("a TLS handshake", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        refused("too many headers", get_with(&"A: b\r\n".repeat(300)), 400),
        refused("more headers than allowed", get_with(&"A: b\r\n".repeat(110)), 431),
    ];
    table.extend(
        [
            ("a space before the colon", "X-A : b\r\n"),
            ("a tab before the colon", "X-A\t: b\r\n"),
            ("a folded value", "X-A: b\r\n c\r\n"),
            ("a value folded with a tab", "X-A: b\r\n\tc\r\n"),
            ("no colon", "X-A\r\n"),
            ("no name", ": b\r\n"),
            ("a NUL in a value", "X-A: b\0c\r\n"),
            ("a NUL in a name", "X\0A: b\r\n"),
            ("a bare CR in a value", "X-A: b\rc\r\n"),
            ("a bare CR before the end", "X-A: b\r\r\n"),
            ("a backspace in a value", "X-A: b\x08c\r\n"),
            ("an escape in a value", "X-A: b\x1bc\r\n"),
            ("a DEL in a value", "X-A: b\x7fc\r\n"),
            ("a space in a name", "X A: b\r\n"),
            ("a slash in a name", "X/A: b\r\n"),
            ("an umlaut in a name", "X-\u{fc}: b\r\n"),
            ("a parenthesis in a name", "X(A): b\r\n"),
        ]
        .map(|(says, lines)| refused(says, get_with(lines), 400)),
    );
    table
}

pub(super) fn table() -> Vec<Case> {
    [lengths(), codings(), upgrades(), syntax(), chunks()].into_iter().flatten().collect()
}

#[tokio::test]
async fn requests_end_where_they_end() {
    Rig::normal().await.run(&table()).await;
}

/// What cannot be read in one way is not forwarded because only a report is wanted.
#[tokio::test]
async fn report_mode_forwards_no_unclear_framing() {
    let unclear: Vec<_> = table().into_iter().filter(|case| !case.needs_proof()).collect();
    Rig::reporting().await.run(&unclear).await;
}
