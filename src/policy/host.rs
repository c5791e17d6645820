//! Hosts of requests: brought into one spelling, so that the policy decides on what the upstream
//! receives.

use std::borrow::Cow;
use std::net::Ipv6Addr;

/// A `Host` or `:authority` in its one spelling: lower case, without the dot of the DNS root, with the
/// port as received. Servers differ in whether they take `A.example.` for `a.example`; this way none
/// of them can take another virtual host than the one that was decided on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authority<'a> {
    /// Borrowed, if it came so.
    text: Cow<'a, str>,
    host_len: usize,
}

impl<'a> Authority<'a> {
    /// Parses a host with an optional port. `None`: empty labels, userinfo, a port that is no number,
    /// characters that no host name has.
    #[must_use]
    pub fn parse(raw: &'a str) -> Option<Self> {
        let host_end = match raw.strip_prefix('[') {
            Some(rest) => rest.find(']')? + 2,
            None => raw.bytes().position(|byte| byte == b':').unwrap_or(raw.len()),
        };
        let (host, port) = raw.split_at(host_end);
        let host = host.strip_suffix('.').unwrap_or(host);
        let good_port = port.is_empty()
            || port.strip_prefix(':').is_some_and(|port| {
                port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok()
            });
        if !good_port {
            return None;
        }
        let host = spell(host)?;
        let host_len = host.len();
        let text = match host {
            Cow::Borrowed(host) if host.len() == host_end => Cow::Borrowed(raw),
            host => Cow::Owned(host.into_owned() + port),
        };
        Some(Self { text, host_len })
    }

    /// Host and port, as they are forwarded.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The host without port, which routes match on.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.text[..self.host_len]
    }
}

/// A host in its one spelling, if it is one.
fn spell(host: &str) -> Option<Cow<'_, str>> {
    if let Some(ip) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        // An IPv6 address has many.
        return ip.parse::<Ipv6Addr>().ok().map(|ip| Cow::Owned(format!("[{ip}]")));
    }
    let (mut before, mut is_lower) = (b'.', true);
    for byte in host.bytes() {
        match byte {
            b'.' if before == b'.' => return None,
            b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' => {}
            b'A'..=b'Z' => is_lower = false,
            _ => return None,
        }
        before = byte;
    }
    let spelled = || if is_lower { host.into() } else { host.to_ascii_lowercase().into() };
    (before != b'.').then(spelled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn hosts_have_one_spelling() {
        for (raw, host, text) in [
            ("h", "h", "h"),
            ("H.Example:8080", "h.example", "h.example:8080"),
            ("a.example.", "a.example", "a.example"),
            ("A.example.:80", "a.example", "a.example:80"),
            ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
            ("[::1]:80", "[::1]", "[::1]:80"),
            ("[2001:DB8::1]", "[2001:db8::1]", "[2001:db8::1]"),
            ("[2001:0db8:0:0::1]:80", "[2001:db8::1]", "[2001:db8::1]:80"),
            ("a_b-c.d", "a_b-c.d", "a_b-c.d"),
        ] {
            let got = Authority::parse(raw).unwrap();
            assert_eq!((got.host(), got.as_str()), (host, text), "{raw}");
        }
    }

    #[test]
    fn what_is_no_host_is_refused() {
        for bad in [
            "",
            ".",
            "..",
            ".a",
            "a..",
            "a..b",
            ":80",
            "a b",
            "u@h",
            "h:",
            "h:x",
            "h:+1",
            "h:-1",
            "h:99999",
            "h:1:2",
            "a/b",
            "h%41",
            "a,b",
            "h#x",
            "[::1",
            "[]",
            "[x]",
            "[::1]x",
            "[::1].",
            "[fe80::1%25eth0]",
            "::1",
            "\u{fc}.example",
            "a\\b",
            "a*",
            "a'",
        ] {
            assert_eq!(Authority::parse(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn one_spelling_stays_itself(raw in "[a-zA-Z0-9._:\\[\\]-]{0,24}") {
            if let Some(once) = Authority::parse(&raw) {
                prop_assert_eq!(&Authority::parse(once.as_str()).unwrap(), &once);
            }
        }
    }
}
