//! What is asked for: method, host and path, each in one reading only, whoever tells them.

use std::borrow::Cow;

use memchr::{memchr, memchr2};

use crate::policy::{Authority, PathError, Policy, RequestPath, path};

/// Longest method name; the longest registered one has 18 characters.
const MAX_METHOD_CHARS: usize = 32;

/// A method that a gate may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MethodName<'a>(&'a str);

impl<'a> MethodName<'a> {
    /// Checks a method.
    ///
    /// # Errors
    /// [`BadHead::Method`] or [`BadHead::OddMethod`].
    pub fn parse(method: &'a str) -> Result<Self, BadHead> {
        if matches!(method, "TRACE" | "CONNECT" | "TRACK") {
            return Err(BadHead::Method);
        }
        let is_capital = |byte: u8| byte.is_ascii_uppercase() || byte == b'-';
        let is_plain = (1..=MAX_METHOD_CHARS).contains(&method.len());
        if !is_plain || !method.bytes().all(is_capital) {
            return Err(BadHead::OddMethod);
        }
        Ok(Self(method))
    }

    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'a str {
        self.0
    }
}

/// What decisions are made on, and what is forwarded. It borrows what came in its one reading already.
#[derive(Clone, Debug)]
pub struct Head<'a> {
    /// The path, in one reading only or as it came.
    pub path: RequestPath<'a>,
    /// `?` and the query, as received, or nothing. No decision looks at it.
    pub query: &'a str,
    /// Host and port, in the one spelling that is also forwarded.
    pub authority: Authority<'a>,
}

/// What is kept of a [`Head`] for as long as its request lasts: what is forwarded, all in one text.
#[derive(Clone, Debug)]
pub struct KeptHead {
    /// Authority, path, query.
    text: Box<str>,
    host_end: usize,
    authority_end: usize,
    path_end: usize,
}

impl KeptHead {
    /// The host without its port.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.text[..self.host_end]
    }

    /// Host and port.
    #[must_use]
    pub fn authority(&self) -> &str {
        &self.text[..self.authority_end]
    }

    /// Path and query.
    #[must_use]
    pub fn target(&self) -> &str {
        &self.text[self.authority_end..]
    }

    /// The path, as logs show it: nothing but ASCII.
    #[must_use]
    pub fn shown_path(&self) -> Cow<'_, str> {
        path::shown(&self.text[self.authority_end..self.path_end])
    }
}

/// Why a head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadHead {
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
}

impl BadHead {
    /// A bounded word for logs and metrics.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Method => "method",
            Self::OddMethod => "odd_method",
            Self::Host => "bad_host",
            Self::Target => "bad_target",
            Self::Path(_) => "bad_path",
        }
    }
}

impl<'a> Head<'a> {
    /// Reads `authority` (host and port) and `target`, a path that may have a query. `policy` says which
    /// paths are taken as they come.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn read(
        policy: &Policy,
        method: MethodName<'_>,
        authority: &'a str,
        target: &'a str,
    ) -> Result<Self, BadHead> {
        let authority = Authority::parse(authority).ok_or(BadHead::Host)?;
        let path_end = memchr2(b'?', b'#', target.as_bytes()).unwrap_or(target.len());
        let (path, query) = target.split_at(path_end);
        if !path.starts_with('/') || memchr(b'#', query.as_bytes()).is_some() {
            return Err(BadHead::Target);
        }
        let path = policy.read(method.as_str(), authority.host(), path).map_err(BadHead::Path)?;
        Ok(Self { path, query, authority })
    }

    /// What is needed later.
    #[must_use]
    pub fn keep(&self) -> KeptHead {
        let (authority, path) = (self.authority.as_str(), self.path.forwarded());
        let mut text = String::with_capacity(authority.len() + path.len() + self.query.len());
        [authority, path, self.query].iter().for_each(|part| text.push_str(part));
        KeptHead {
            host_end: self.authority.host().len(),
            authority_end: authority.len(),
            path_end: authority.len() + path.len(),
            text: text.into(),
        }
    }
}

/// Splits an `http` or `https` URL into its authority and its path with query.
///
/// # Errors
/// [`BadHead::Target`] if it is none, or if it is unclear where its path begins.
pub fn split_url(url: &str) -> Result<(&str, &str), BadHead> {
    let rest = ["http://", "https://"].iter().find_map(|scheme| {
        url.get(..scheme.len())?.eq_ignore_ascii_case(scheme).then(|| &url[scheme.len()..])
    });
    let rest = rest.ok_or(BadHead::Target)?;
    match rest.find(['/', '?', '#', '\\']) {
        Some(at) if rest[at..].starts_with('/') => Ok(rest.split_at(at)),
        None => Ok((rest, "/")),
        Some(_) => Err(BadHead::Target),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<'a>(authority: &'a str, target: &'a str) -> Result<Head<'a>, BadHead> {
        let method = MethodName::parse("GET").unwrap();
        Head::read(&Policy::new(Vec::new()), method, authority, target)
    }

    #[test]
    fn methods_that_a_gate_must_not_pass_are_refused() {
        for bad in ["TRACE", "CONNECT", "TRACK"] {
            assert_eq!(MethodName::parse(bad), Err(BadHead::Method));
        }
        let long = "M".repeat(33);
        for odd in [&long, "", "get", "delete", "Trace", "connect", "G_T", "G#T", "GET2"] {
            assert_eq!(MethodName::parse(odd), Err(BadHead::OddMethod), "{odd}");
        }
        for good in ["PROPFIND", "M-SEARCH"] {
            assert!(MethodName::parse(good).is_ok());
        }
    }

    #[test]
    fn targets_are_a_path_and_a_query() {
        for (target, path, query) in
            [("/", "/", ""), ("/a?b=/../c?d", "/a", "?b=/../c?d"), ("/%61?", "/a", "?")]
        {
            let head = read("h", target).unwrap();
            assert_eq!((head.path.forwarded(), head.query), (path, query), "{target}");
        }
        for bad in ["", "*", "a", "?a", "http://h/", "/#", "/a?b#c"] {
            assert_eq!(read("h", bad).unwrap_err(), BadHead::Target, "{bad}");
        }
        for (bad, why) in [("/a/../b", PathError::DotSegment), ("//h/x", PathError::EmptySegment)] {
            assert_eq!(read("h", bad).unwrap_err(), BadHead::Path(why), "{bad}");
        }
    }

    #[test]
    fn what_is_kept_is_what_is_forwarded() {
        for (authority, target, expected) in [
            ("h", "/", ["h", "h", "/", "/"]),
            ("H.:80", "/%61?b=/c", ["h", "h:80", "/a?b=/c", "/a"]),
            ("[::1]:80", "/\u{fc}?", ["[::1]", "[::1]:80", "/%C3%BC?", "/%C3%BC"]),
        ] {
            let kept = read(authority, target).unwrap().keep();
            let path = kept.shown_path();
            assert_eq!([kept.host(), kept.authority(), kept.target(), &path], expected);
        }
    }

    #[test]
    fn urls_are_an_authority_and_a_target() {
        for (url, expected) in [
            ("http://h", ("h", "/")),
            ("HTTPS://h:1/", ("h:1", "/")),
            ("http://u@h/a?b=http://x/", ("u@h", "/a?b=http://x/")),
        ] {
            assert_eq!(split_url(url), Ok(expected), "{url}");
        }
        for bad in [
            "",
            "/",
            "h/",
            "//h/",
            "ftp://h/",
            "http:/h",
            "http://h?x",
            "http://h\\/",
            "http://h#/",
        ] {
            assert_eq!(split_url(bad), Err(BadHead::Target), "{bad}");
        }
    }

    #[test]
    fn hosts_have_one_spelling() {
        assert_eq!(read("H.Example.:80", "/").unwrap().authority.as_str(), "h.example:80");
        for bad in ["", "a b", "u@h", "h:", "a..b", "a, b"] {
            assert_eq!(read(bad, "/").unwrap_err(), BadHead::Host, "{bad}");
        }
    }
}
