//! A request's head, checked before anything is decided on it: what could be read in two ways is
//! refused, whatever the mode.

use http::header::HOST;
use http::{Version, uri};
use pingora::http::RequestHeader;

use super::refusal::Refusal;
use super::survey::Survey;
use crate::config::Limits;
use crate::decision::{BadHead, Head, MethodName, split_url};
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

/// A request to take the place of one that is being changed.
pub(super) fn nothing() -> RequestHeader {
    RequestHeader::from(http::Request::new(()).into_parts().0)
}

/// Lets go of how names of headers were spelled (RFC 9110 section 5.1: case does not matter); they go upstream in
/// lower case, but for some that pingora titles. It keeps spellings in a second map, which would be copied for
/// the upstream, and which each change would have to change as well.
pub(super) fn forget_spellings(request: &mut RequestHeader) {
    let path = request.uri.path_and_query().map(|path| path.as_str().as_bytes());
    // Targets of other forms would be forgotten, too.
    if path == Some(request.raw_path()) {
        let parts = http::request::Parts::from(std::mem::replace(request, nothing()));
        *request = RequestHeader::from(parts);
    }
}

/// Reads the head of `request`, which pingora has parsed; `seen` of its headers.
///
/// # Errors
/// What is wrong with it.
pub(super) fn read<'r>(
    request: &'r RequestHeader,
    seen: &Survey,
    limits: &Limits,
    policy: &Policy,
) -> Result<(MethodName<'r>, Head<'r>), Refusal> {
    let method = MethodName::parse(request.method.as_str())?;
    if request.headers.len() > limits.max_headers {
        return Err(Refusal::TooManyHeaders);
    }
    seen.length?;
    let head = Head::read(policy, method, authority(request, seen.hosts)?, target(request)?)?;
    Ok((method, head))
}

/// The one authority of the request. pingora has checked that `:authority`, an absolute target and
/// `Host` agree.
fn authority(request: &RequestHeader, hosts: usize) -> Result<&str, BadHead> {
    match (request.headers.get(HOST), hosts) {
        (Some(host), 1) => host.to_str().map_err(|_| BadHead::Host),
        (None, 0) if request.version == Version::HTTP_2 => {
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
        let seen = Survey::of(&request);
        read(&request, &seen, &Limits::default(), &policy).map(|(_, head)| head.keep())
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
    fn spellings_are_forgotten_and_nothing_else() {
        for target in ["/", "/a?b", "http://h/x?y", "*", "/\u{fc}"] {
            let mut forgetful =
                request("GET", target, &[("HOST", "h"), ("x-A", "1"), ("X-a", "2")]);
            let before = forgetful.clone();
            forget_spellings(&mut forgetful);
            assert_eq!(forgetful.raw_path(), before.raw_path());
            assert_eq!(forgetful.raw_path_is_utf8(), before.raw_path_is_utf8());
            assert_eq!((&forgetful.uri, forgetful.version), (&before.uri, before.version));
            assert_eq!((&forgetful.headers, &forgetful.method), (&before.headers, &before.method));
        }
        let mut lossy = RequestHeader::build("GET", b"/\xff", None).unwrap();
        forget_spellings(&mut lossy);
        assert_eq!(lossy.raw_path(), b"/\xff");
    }

    #[test]
    fn headers_are_counted() {
        let many: Vec<_> = std::iter::once(("Host", "h")).chain([("x", "y"); 100]).collect();
        assert_eq!(check("GET", "/", &many).unwrap_err(), Refusal::TooManyHeaders);
        assert!(check("GET", "/", &many[..100]).is_ok());
    }
}
