//! A request's head, checked before anything is decided on it: what could be read in two ways is
//! refused, whatever the mode.

use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, HOST, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderValue, Version, uri};
use pingora::http::RequestHeader;

use crate::config::Limits;
use crate::net::framing::{Unclear, content_length};
use crate::policy::{Authority, PathError, Policy, RequestPath};

/// Longest method name; the longest registered one has 18 characters.
const MAX_METHOD_CHARS: usize = 32;
/// `Allow` of a 405: all other methods pass too, but these are the ones that clients ask about.
pub(super) const ALLOW: &str = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";

/// What an exchange looks like, as far as time-outs go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Kind {
    /// A request and its answer.
    #[default]
    Plain,
    /// It asks for a WebSocket. Other upgrades are not passed on, so they are plain requests.
    WebSocket,
    /// It asks for server-sent events.
    Events,
    /// gRPC: even the answer's head may be long in coming.
    Grpc,
}

impl Kind {
    pub(super) fn of(request: &RequestHeader) -> Self {
        let begins = |text: &[u8], what: &str| {
            let start = text.trim_ascii_start().get(..what.len());
            start.is_some_and(|start| start.eq_ignore_ascii_case(what.as_bytes()))
        };
        let accepts = request.headers.get_all(ACCEPT).iter();
        let mut accepts = accepts.flat_map(|list| list.as_bytes().split(|byte| *byte == b','));
        let content = request.headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
        // As pingora decides whether to pass an upgrade on.
        let upgrade = request.headers.get(UPGRADE).map(HeaderValue::as_bytes);
        let websocket = upgrade.is_some_and(|to| to.eq_ignore_ascii_case(b"websocket"));
        if websocket && request.version == Version::HTTP_11 {
            Self::WebSocket
        } else if content.is_some_and(|content| begins(content, "application/grpc")) {
            Self::Grpc
        } else if accepts.any(|accepted| begins(accepted, "text/event-stream")) {
            Self::Events
        } else {
            Self::Plain
        }
    }
}

/// What decisions are made on, and what is forwarded.
#[derive(Clone, Debug)]
pub(super) struct Head {
    /// The path, in one reading only or as it came.
    pub(super) path: RequestPath,
    /// `?` and the query, as received, or nothing.
    pub(super) query: String,
    /// `Host` or `:authority`, in the one spelling that is also forwarded.
    pub(super) authority: Authority,
    /// Bytes of the body that the head announces.
    pub(super) content_length: Option<u64>,
}

/// Why a head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadHead {
    /// TRACE, CONNECT: 405.
    Method,
    /// A method of unreasonable length, or not all in capitals: methods are case-sensitive, but some
    /// upstreams take `delete` for `DELETE`, which another route may govern.
    OddMethod,
    /// No, several or malformed hosts.
    Host,
    /// A target that is neither a path nor an absolute URI of this host; also `*`, which no route
    /// can govern.
    Target,
    /// A path that servers read differently.
    Path(PathError),
    /// Body framing that servers read differently.
    Framing,
    /// A line that ends in a bare LF.
    LineEnd,
    /// Too many headers: 431.
    Headers,
}

impl From<Unclear> for BadHead {
    fn from(unclear: Unclear) -> Self {
        match unclear {
            Unclear::Fragment => Self::Target,
            Unclear::Framing => Self::Framing,
            Unclear::LineEnd => Self::LineEnd,
        }
    }
}

impl BadHead {
    /// A bounded word for logs and metrics.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Method => "method",
            Self::OddMethod => "odd_method",
            Self::Host => "bad_host",
            Self::Target => "bad_target",
            Self::Path(_) => "bad_path",
            Self::Framing => "bad_framing",
            Self::LineEnd => "bad_line_end",
            Self::Headers => "too_many_headers",
        }
    }
}

impl Head {
    /// Checks `request`, which pingora has parsed. `policy` says which paths are taken as they come.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn check(
        request: &RequestHeader,
        limits: &Limits,
        policy: &Policy,
    ) -> Result<Self, BadHead> {
        let method = request.method.as_str();
        if matches!(method, "TRACE" | "CONNECT" | "TRACK") {
            return Err(BadHead::Method);
        }
        let is_capital = |byte: u8| byte.is_ascii_uppercase() || byte == b'-';
        if method.len() > MAX_METHOD_CHARS || !method.bytes().all(is_capital) {
            return Err(BadHead::OddMethod);
        }
        if request.headers.len() > limits.max_headers {
            return Err(BadHead::Headers);
        }
        let content_length = content_length(&request.headers)?;
        let authority = Authority::parse(authority(request)?).ok_or(BadHead::Host)?;
        let target = target(request)?;
        let (path, query) = match target.split_once('?') {
            Some((path, _)) => (path, &target[path.len()..]),
            None => (target, ""),
        };
        Ok(Self {
            path: policy.read(method, authority.host(), path).map_err(BadHead::Path)?,
            query: query.to_owned(),
            authority,
            content_length,
        })
    }
}

/// Whether an HTTP/1.1 request announces a body.
pub(super) fn has_body(request: &RequestHeader) -> bool {
    let length = request.headers.get(CONTENT_LENGTH);
    request.headers.contains_key(TRANSFER_ENCODING) || length.is_some_and(|length| length != "0")
}

/// The one authority of the request. pingora has checked that `:authority`, an absolute target and
/// `Host` agree.
fn authority(request: &RequestHeader) -> Result<&str, BadHead> {
    let mut hosts = request.headers.get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().map_err(|_| BadHead::Host),
        (None, _) if request.version == Version::HTTP_2 => {
            request.uri.authority().map(uri::Authority::as_str).ok_or(BadHead::Host)
        }
        _ => Err(BadHead::Host),
    }
}

/// The path and query of the target, in origin form.
fn target(request: &RequestHeader) -> Result<&str, BadHead> {
    let raw =
        std::str::from_utf8(request.raw_path()).map_err(|_| BadHead::Path(PathError::NotUtf8))?;
    if raw.starts_with('/') {
        return Ok(raw);
    }
    let rest = ["http://", "https://"].iter().find_map(|scheme| {
        raw.get(..scheme.len())?.eq_ignore_ascii_case(scheme).then(|| &raw[scheme.len()..])
    });
    let rest = rest.ok_or(BadHead::Target)?;
    match rest.find(['/', '?', '#', '\\']) {
        Some(at) if rest[at..].starts_with('/') => Ok(&rest[at..]),
        None => Ok("/"),
        Some(_) => Err(BadHead::Target),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: &str, target: &str, headers: &[(&'static str, &str)]) -> RequestHeader {
        let mut request = RequestHeader::build(method, target.as_bytes(), None).unwrap();
        request.set_version(Version::HTTP_11);
        for (name, value) in headers {
            request.append_header(*name, *value).unwrap();
        }
        request
    }

    fn check(
        method: &str,
        target: &str,
        headers: &[(&'static str, &str)],
    ) -> Result<Head, BadHead> {
        let policy = Policy::new(Vec::new());
        Head::check(&request(method, target, headers), &Limits::default(), &policy)
    }

    #[test]
    fn targets_become_a_path_and_a_query() {
        for (target, path, query) in [
            ("/", "/", ""),
            ("/a?b=/../c?d", "/a", "?b=/../c?d"),
            ("/%61?", "/a", "?"),
            ("http://h/x?y", "/x", "?y"),
            ("HTTP://h", "/", ""),
        ] {
            let head = check("GET", target, &[("Host", "h")]).unwrap();
            assert_eq!((head.path.forwarded(), head.query.as_str()), (path, query), "{target}");
        }
    }

    #[test]
    fn unclear_targets_are_refused() {
        for (method, target) in [("OPTIONS", "*"), ("GET", "ftp://h/x"), ("GET", "http://h?x")] {
            assert_eq!(check(method, target, &[("Host", "h")]).unwrap_err(), BadHead::Target);
        }
        assert!(matches!(
            check("GET", "/a/../b", &[("Host", "h")]),
            Err(BadHead::Path(PathError::DotSegment))
        ));
        assert!(matches!(
            check("GET", "//h/x", &[("Host", "h")]),
            Err(BadHead::Path(PathError::EmptySegment))
        ));
    }

    #[test]
    fn exactly_one_valid_host_is_needed() {
        let head = check("GET", "/", &[("Host", "H.Example.:80")]).unwrap();
        assert_eq!(head.authority.as_str(), "h.example:80");
        assert_eq!(check("GET", "/", &[]).unwrap_err(), BadHead::Host);
        assert_eq!(check("GET", "/", &[("Host", "a"), ("Host", "a")]).unwrap_err(), BadHead::Host);
        for bad in ["", "a b", "u@h", "h:", "a..b"] {
            assert_eq!(check("GET", "/", &[("Host", bad)]).unwrap_err(), BadHead::Host, "{bad}");
        }
    }

    #[test]
    fn methods_that_a_gate_must_not_pass_are_refused() {
        for bad in ["TRACE", "CONNECT", "TRACK"] {
            assert_eq!(check(bad, "/", &[("Host", "h")]).unwrap_err(), BadHead::Method);
        }
        let long = "M".repeat(33);
        for odd in [&long, "get", "delete", "Trace", "connect", "G_T", "G#T", "GET2"] {
            assert_eq!(check(odd, "/", &[("Host", "h")]).unwrap_err(), BadHead::OddMethod);
        }
        for good in ["PROPFIND", "M-SEARCH"] {
            assert!(check(good, "/", &[("Host", "h")]).is_ok());
        }
    }

    #[test]
    fn streams_are_told_from_plain_requests() {
        let kind = |headers: &[_]| Kind::of(&request("GET", "/", headers));
        for (header, expected) in [
            (("Upgrade", "WebSocket"), Kind::WebSocket),
            (("Upgrade", "h2c"), Kind::Plain),
            (("Upgrade", "h2c, websocket"), Kind::Plain),
            (("Accept", "text/event-stream"), Kind::Events),
            (("Accept", "application/json, Text/Event-Stream;q=1"), Kind::Events),
            (("Accept", "*/*"), Kind::Plain),
            (("Content-Type", "application/grpc+proto"), Kind::Grpc),
            (("Content-Type", "text/event-stream"), Kind::Plain),
        ] {
            assert_eq!(kind(&[header]), expected, "{header:?}");
        }
        let mut old = request("GET", "/", &[("Upgrade", "websocket")]);
        old.set_version(Version::HTTP_10);
        assert_eq!(Kind::of(&old), Kind::Plain);
    }

    #[test]
    fn headers_are_counted() {
        let many: Vec<_> = std::iter::once(("Host", "h")).chain([("x", "y"); 100]).collect();
        assert_eq!(check("GET", "/", &many).unwrap_err(), BadHead::Headers);
        assert!(check("GET", "/", &many[..100]).is_ok());
    }
}
