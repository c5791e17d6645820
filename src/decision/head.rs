//! What is asked for: method, host and path, each in one reading only, whoever tells them.

use crate::policy::{Authority, PathError, Policy, RequestPath};

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

/// What decisions are made on, and what is forwarded.
#[derive(Clone, Debug)]
pub struct Head {
    /// The path, in one reading only or as it came.
    pub path: RequestPath,
    /// `?` and the query, as received, or nothing. No decision looks at it.
    pub query: String,
    /// Host and port, in the one spelling that is also forwarded.
    pub authority: Authority,
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

impl Head {
    /// Reads `authority` (host and port) and `target`, a path that may have a query. `policy` says which
    /// paths are taken as they come.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn read(
        policy: &Policy,
        method: MethodName<'_>,
        authority: &str,
        target: &str,
    ) -> Result<Self, BadHead> {
        let authority = Authority::parse(authority).ok_or(BadHead::Host)?;
        if !target.starts_with('/') || target.contains('#') {
            return Err(BadHead::Target);
        }
        let (path, query) = match target.split_once('?') {
            Some((path, _)) => (path, &target[path.len()..]),
            None => (target, ""),
        };
        Ok(Self {
            path: policy.read(method.as_str(), authority.host(), path).map_err(BadHead::Path)?,
            query: query.to_owned(),
            authority,
        })
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

    fn read(authority: &str, target: &str) -> Result<Head, BadHead> {
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
            assert_eq!((head.path.forwarded(), head.query.as_str()), (path, query), "{target}");
        }
        for bad in ["", "*", "a", "?a", "http://h/", "/#", "/a?b#c"] {
            assert_eq!(read("h", bad).unwrap_err(), BadHead::Target, "{bad}");
        }
        for (bad, why) in [("/a/../b", PathError::DotSegment), ("//h/x", PathError::EmptySegment)] {
            assert_eq!(read("h", bad).unwrap_err(), BadHead::Path(why), "{bad}");
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
