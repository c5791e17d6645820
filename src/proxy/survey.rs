//! One look at all headers of a request, for whatever the gate wants to know of them beside claims: each
//! question asked by itself would hash a name and look it up.

use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderName, HeaderValue, Version};
use pingora::http::RequestHeader;

use super::request::Kind;
use crate::credentials::spells;
use crate::net::framing::{Unclear, length_of};

/// What a request's headers say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Survey {
    pub(super) kind: Kind,
    /// The length of the body, if it is announced.
    pub(super) length: Result<Option<u64>, Unclear>,
    /// Whether a body is announced, with or without its length.
    pub(super) has_body: bool,
    /// Whether some concern the client's connection alone, or make others do so (RFC 9110 section 7.6.1).
    pub(super) is_hop_by_hop: bool,
    /// How many `Host` there are.
    pub(super) hosts: usize,
    /// How many `Cookie` there are.
    pub(super) cookies: usize,
}

impl Survey {
    /// Of a request that nobody has looked at: it does not pass.
    pub(super) const NONE: Self = Self {
        kind: Kind::Plain,
        length: Err(Unclear::Framing),
        has_body: true,
        is_hop_by_hop: true,
        hosts: 0,
        cookies: 0,
    };

    pub(super) fn of(request: &RequestHeader) -> Self {
        let (mut length, mut coding) = (None, None);
        let (mut content, mut upgrade) = (None, None);
        let (mut accepts_events, mut is_unclear) = (false, false);
        let mut seen = Self { has_body: false, is_hop_by_hop: false, ..Self::NONE };
        for (name, value) in &request.headers {
            match name.as_str() {
                "host" => seen.hosts += 1,
                "cookie" => seen.cookies += 1,
                "accept" => accepts_events |= accepts(value, "text/event-stream"),
                "content-type" => content = content.or(Some(value)),
                "content-length" => is_unclear |= length.replace(value).is_some(),
                "transfer-encoding" => {
                    is_unclear |= coding.replace(value).is_some();
                    seen.is_hop_by_hop = true;
                }
                "upgrade" => {
                    upgrade = upgrade.or(Some(value));
                    seen.is_hop_by_hop = true;
                }
                // All that pingora looks for, to remove it or what it names.
                "te"
                | "trailer"
                | "connection"
                | "keep-alive"
                | "http2-settings"
                | "proxy-connection"
                | "proxy-authenticate"
                | "proxy-authorization" => {
                    seen.is_hop_by_hop = true;
                }
                _ => is_unclear |= may_frame(name),
            }
        }
        seen.length = if is_unclear { Err(Unclear::Framing) } else { length_of(length, coding) };
        seen.has_body = coding.is_some() || length.is_some_and(|length| length != "0");
        // As pingora decides whether to pass an upgrade on.
        let upgrades = upgrade.is_some_and(|to| to.as_bytes().eq_ignore_ascii_case(b"websocket"));
        seen.kind = if upgrades && request.version == Version::HTTP_11 {
            Kind::WebSocket
        } else if content.is_some_and(|content| begins(content.as_bytes(), "application/grpc")) {
            Kind::Grpc
        } else if accepts_events {
            Kind::Events
        } else {
            Kind::Plain
        };
        seen
    }
}

fn begins(text: &[u8], what: &str) -> bool {
    let start = text.trim_ascii_start().get(..what.len());
    start.is_some_and(|start| start.eq_ignore_ascii_case(what.as_bytes()))
}

fn accepts(list: &HeaderValue, what: &str) -> bool {
    list.as_bytes().split(|byte| *byte == b',').any(|accepted| begins(accepted, what))
}

/// Whether an upstream may take a name, which is none of theirs, for one of those that frame bodies.
fn may_frame(name: &HeaderName) -> bool {
    spells(name, &CONTENT_LENGTH) || spells(name, &TRANSFER_ENCODING)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::framing::content_length;
    use proptest::prelude::*;

    fn request(headers: &[(&str, &str)]) -> RequestHeader {
        let mut request = RequestHeader::build("GET", b"/", None).unwrap();
        request.set_version(Version::HTTP_11);
        for (name, value) in headers {
            request.append_header((*name).to_owned(), *value).unwrap();
        }
        request
    }

    #[test]
    fn what_asks_for_a_stream_is_known() {
        let kind = |headers: &[_]| Survey::of(&request(headers)).kind;
        for (header, expected) in [
            (("Upgrade", "WebSocket"), Kind::WebSocket),
            (("Upgrade", "h2c"), Kind::Plain),
            (("Upgrade", "h2c, websocket"), Kind::Plain),
            (("Accept", "application/json, Text/Event-Stream;q=1"), Kind::Events),
            (("Accept", "text/event-streams;q=1"), Kind::Events),
            (("Accept", "*/*"), Kind::Plain),
            (("Content-Type", "application/grpc+proto"), Kind::Grpc),
            (("Content-Type", "text/event-stream"), Kind::Plain),
        ] {
            assert_eq!(kind(&[header]), expected, "{header:?}");
        }
        let second = [("Accept", "a/b"), ("Accept", "text/event-stream")];
        assert_eq!(kind(&second), Kind::Events);
        // Of what is to be there once, the first one counts.
        let second = [("Content-Type", "a/b"), ("Content-Type", "application/grpc")];
        assert_eq!(kind(&second), Kind::Plain);
        let second = [("Upgrade", "h2c"), ("Upgrade", "websocket")];
        assert_eq!(kind(&second), Kind::Plain);
        let mut old = request(&[("Upgrade", "websocket")]);
        old.set_version(Version::HTTP_10);
        assert_eq!(Survey::of(&old).kind, Kind::Plain);
    }

    #[test]
    fn headers_are_counted_and_bodies_seen() {
        let seen = Survey::of(&request(&[("Host", "a"), ("Cookie", "a"), ("Cookie", "b")]));
        assert_eq!((seen.hosts, seen.cookies), (1, 2));
        for (header, expected) in [
            (("Content-Length", "0"), false),
            (("Content-Length", "1"), true),
            (("Transfer-Encoding", "chunked"), true),
            (("Accept", "a"), false),
        ] {
            assert_eq!(Survey::of(&request(&[header])).has_body, expected, "{header:?}");
        }
    }

    #[test]
    fn what_concerns_a_connection_is_seen() {
        for name in [
            "Connection",
            "Keep-Alive",
            "Proxy-Connection",
            "Proxy-Authenticate",
            "Proxy-Authorization",
            "TE",
            "Trailer",
            "Transfer-Encoding",
            "Upgrade",
            "HTTP2-Settings",
        ] {
            assert!(Survey::of(&request(&[("a", "b"), (name, "x")])).is_hop_by_hop, "{name}");
        }
        let plain = [("Host", "a"), ("Accept", "a"), ("Content-Length", "1"), ("X-TE", "a")];
        assert!(!Survey::of(&request(&plain)).is_hop_by_hop);
    }

    proptest! {
        /// As it is found name by name.
        #[test]
        fn framing_is_as_it_is_elsewhere(
            headers in proptest::collection::vec(
                ("(Content[-_.]Length|Transfer[-_.]Encoding|content-length2|X-A)", "(|0|5|5, 5|chunked|gzip)"),
                0..4,
            ),
        ) {
            let headers: Vec<_> =
                headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            let request = request(&headers);
            prop_assert_eq!(Survey::of(&request).length, content_length(&request.headers));
        }
    }
}
