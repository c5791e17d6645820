//! A request's head, checked before anything is decided on it: what could be read in two ways is
//! refused, whatever the mode.

use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, HOST, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderValue, Version, uri};
use pingora::http::RequestHeader;

use super::refusal::Refusal;
use crate::config::Limits;
use crate::decision::{BadHead, Head, MethodName, split_url};
use crate::net::framing::content_length;
use crate::policy::{PathError, Policy};

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

/// Reads the head of `request`, which pingora has parsed; also the length of its body, if it is announced.
///
/// # Errors
/// What is wrong with it.
pub(super) fn read<'r>(
    request: &'r RequestHeader,
    limits: &Limits,
    policy: &Policy,
) -> Result<(MethodName<'r>, Head<'r>, Option<u64>), Refusal> {
    let method = MethodName::parse(request.method.as_str())?;
    if request.headers.len() > limits.max_headers {
        return Err(Refusal::TooManyHeaders);
    }
    let length = content_length(&request.headers)?;
    let head = Head::read(policy, method, authority(request)?, target(request)?)?;
    Ok((method, head, length))
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
    Ok(split_url(raw)?.1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decision::KeptHead;

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
    ) -> Result<KeptHead, Refusal> {
        let policy = Policy::new(Vec::new());
        let request = request(method, target, headers);
        read(&request, &Limits::default(), &policy).map(|(_, head, _)| head.keep())
    }

    fn bad(head: BadHead) -> Refusal {
        Refusal::Decided(head.into())
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
            assert_eq!(head.target(), format!("{path}{query}"), "{target}");
        }
    }

    #[test]
    fn unclear_targets_are_refused() {
        for (method, target) in [("OPTIONS", "*"), ("GET", "ftp://h/x"), ("GET", "http://h?x")] {
            assert_eq!(check(method, target, &[("Host", "h")]).unwrap_err(), bad(BadHead::Target));
        }
    }

    #[test]
    fn exactly_one_host_is_needed() {
        let no_host = bad(BadHead::Host);
        assert_eq!(check("GET", "/", &[]).unwrap_err(), no_host);
        assert_eq!(check("GET", "/", &[("Host", "a"), ("Host", "a")]).unwrap_err(), no_host);
        assert_eq!(check("GET", "/", &[("Host", "a b")]).unwrap_err(), no_host);
    }

    #[test]
    fn a_method_is_refused_whatever_its_target_is() {
        let refused = check("CONNECT", "h:443", &[("Host", "h")]).unwrap_err();
        assert_eq!(refused, bad(BadHead::Method));
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
        assert_eq!(check("GET", "/", &many).unwrap_err(), Refusal::TooManyHeaders);
        assert!(check("GET", "/", &many[..100]).is_ok());
    }
}
