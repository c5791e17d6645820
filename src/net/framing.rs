//! Where a request's head and body end: in one reading, on every listener. pingora's parser takes more than
//! that, as it may; a server in front or behind may then see other requests.

use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderValue};
use memchr::{memchr, memchr_iter};
use pingora::protocols::http::ServerSession;
use pingora::protocols::http::v1::server::HttpSession;

use crate::credentials::one_of_each;

/// What servers may read differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unclear {
    /// A line that ends in a bare LF.
    LineEnd,
    /// A fragment in the target.
    Fragment,
    /// The end of the body.
    Framing,
}

/// Refuses what only the bytes of the head show, since pingora's parser passes over it: fragments,
/// which it drops; lines that end in a bare LF, which others read on; and a length beside a transfer
/// coding, of which it drops the length. (Over HTTP/2 there are no such bytes, and what the parser drops
/// of a path is neither decided on nor forwarded.)
///
/// # Errors
/// What is wrong.
pub fn check_bytes(session: &ServerSession) -> Result<(), Unclear> {
    match session.as_http1().map(HttpSession::get_headers_raw_bytes) {
        Some(head) => check_raw_head(&head),
        None => Ok(()),
    }
}

fn check_raw_head(head: &[u8]) -> Result<(), Unclear> {
    // Where the request line begins: blank lines may come before it.
    let begin = head.len() - head.trim_ascii_start().len();
    let (mut start, mut has_fragment, mut has_length, mut has_coding) = (0, false, false, false);
    for end in memchr_iter(b'\n', head) {
        if !head[..end].ends_with(b"\r") {
            return Err(Unclear::LineEnd);
        }
        let line = &head[start..end];
        if start > begin {
            has_length |= is_named(line, b"content-length");
            has_coding |= is_named(line, b"transfer-encoding");
        } else {
            has_fragment |= memchr(b'#', line).is_some();
        }
        start = end + 1;
    }
    match () {
        () if start < head.len() => Err(Unclear::LineEnd),
        () if has_fragment => Err(Unclear::Fragment),
        () if has_length && has_coding => Err(Unclear::Framing),
        () => Ok(()),
    }
}

/// Whether a line of a head is a header of that name.
fn is_named(line: &[u8], name: &[u8]) -> bool {
    line.get(name.len()) == Some(&b':') && line[..name.len()].eq_ignore_ascii_case(name)
}

/// The length of the body, if the head names one. `Transfer-Encoding` is exactly `chunked`,
/// `Content-Length` a single number, and neither is there under another spelling, which an upstream may
/// take for it. pingora takes more: it drops the names of other codings, and passes `5, 5` on.
///
/// # Errors
/// If the framing has more than one reading.
pub fn content_length(headers: &HeaderMap) -> Result<Option<u64>, Unclear> {
    let found = one_of_each(headers, [&CONTENT_LENGTH, &TRANSFER_ENCODING]);
    let [length, coding] = found.map_err(|_| Unclear::Framing)?;
    length_of(length, coding)
}

/// The same of the values of `Content-Length` and `Transfer-Encoding`, that have no second one.
///
/// # Errors
/// As there.
pub fn length_of(
    length: Option<&HeaderValue>,
    coding: Option<&HeaderValue>,
) -> Result<Option<u64>, Unclear> {
    if coding.is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"chunked")) {
        return Err(Unclear::Framing);
    }
    let Some(length) = length else { return Ok(None) };
    if !length.as_bytes().iter().all(u8::is_ascii_digit) {
        return Err(Unclear::Framing);
    }
    let number = length.to_str().ok().and_then(|text| text.parse().ok());
    number.map(Some).ok_or(Unclear::Framing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn framing_has_one_reading() {
        let framed = |headers: &[(&str, &str)]| {
            let pairs = headers.iter().map(|(name, value)| {
                (name.to_ascii_lowercase().parse().unwrap(), value.parse().unwrap())
            });
            content_length(&pairs.collect::<HeaderMap>())
        };
        assert_eq!(framed(&[]), Ok(None));
        assert_eq!(framed(&[("Content-Length", "5")]), Ok(Some(5)));
        assert_eq!(framed(&[("Transfer-Encoding", "Chunked")]), Ok(None));
        for bad in [
            &[("Content-Length", "5"), ("Content-Length", "5")][..],
            &[("Content-Length", "5, 5")],
            &[("Content-Length", "+5")],
            &[("Content-Length", "")],
            &[("Content-Length", "99999999999999999999999")],
            &[("Transfer-Encoding", "gzip, chunked")],
            &[("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "chunked")],
            &[("Transfer-Encoding", "chunked, identity")],
            &[("Content_Length", "5")],
            &[("Content-Length", "5"), ("Content.Length", "5")],
            &[("Transfer_Encoding", "chunked")],
        ] {
            assert_eq!(framed(bad), Err(Unclear::Framing), "{bad:?}");
        }
    }

    #[test]
    fn bytes_show_what_the_parser_passes_over() {
        for (head, expected) in [
            ("GET / HTTP/1.1\r\nHost: h\r\n\r\n", Ok(())),
            ("\r\nGET / HTTP/1.1\r\nHost: h#\r\n\r\n", Ok(())),
            ("\r\nGET /#a HTTP/1.1\r\n\r\n", Err(Unclear::Fragment)),
            ("GET / HTTP/1.1\nHost: h\r\n\r\n", Err(Unclear::LineEnd)),
            ("GET / HTTP/1.1\r\nHost: h\r\n\n", Err(Unclear::LineEnd)),
            ("\nGET / HTTP/1.1\r\n\r\n", Err(Unclear::LineEnd)),
            ("POST / HTTP/1.1\r\ncontent-length: 1\r\nHost: h\r\n\r\n", Ok(())),
            (
                "POST / HTTP/1.1\r\nCONTENT-LENGTH: 1\r\nTransfer-encoding: chunked\r\n\r\n",
                Err(Unclear::Framing),
            ),
        ] {
            assert_eq!(check_raw_head(head.as_bytes()), expected, "{head:?}");
        }
    }

    /// Line by line.
    fn look_at_lines(head: &[u8]) -> Result<(), Unclear> {
        let mut lines = head.split_inclusive(|byte| *byte == b'\n');
        if !lines.all(|line| line.ends_with(b"\r\n")) {
            return Err(Unclear::LineEnd);
        }
        let mut lines = head.trim_ascii_start().split(|byte| *byte == b'\n');
        if lines.next().is_some_and(|request_line| request_line.contains(&b'#')) {
            return Err(Unclear::Fragment);
        }
        let (mut length, mut coding) = (false, false);
        for line in lines {
            let name = line.split(|byte| *byte == b':').next().unwrap_or_default();
            length |= name.eq_ignore_ascii_case(b"content-length");
            coding |= name.eq_ignore_ascii_case(b"transfer-encoding");
        }
        if length && coding { Err(Unclear::Framing) } else { Ok(()) }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn one_pass_sees_what_each_line_shows(
            head in "(\r\n|\r\n|\r\n|\n|\r| |#|:|GET /|Content-Length|content-length:|transfer-Encoding:|Transfer-Encoding: chunked\r\n|Content-Length: 1\r\n){0,8}(\r\n|)",
        ) {
            prop_assert_eq!(check_raw_head(head.as_bytes()), look_at_lines(head.as_bytes()));
        }
    }
}
