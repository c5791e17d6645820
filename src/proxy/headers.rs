//! Headers that the gate answers for: identity, forwarding, and those that make upstreams see another
//! request than the one that was decided on.

use std::net::IpAddr;

use bytes::Bytes;
use http::header::{COOKIE, FORWARDED, HOST, InvalidHeaderValue};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::config::{HeaderNames, TrustedPeer};
use crate::credentials::{folded, spells};
use crate::decision::identity;
use crate::entry::Principal;
use crate::net::{client_address, is_trusted, new_request_id};

/// Carries the id that links an answer, a log line and the upstream's own logs.
///
/// It is no [`HeaderName`]: pingora keeps the spelling of an answer's names, and would copy it.
pub(super) const REQUEST_ID: &str = "x-request-id";
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// Removed always, in any spelling: they would change the method, host or path that was decided on.
const OVERRIDES: &[&str] = &[
    "x-http-method-override",
    "x-http-method",
    "x-method-override",
    "x-http-host-override",
    "x-override-url",
];
/// The same, for all names that begin so.
const OVERRIDE_PREFIXES: &[&str] = &["x-original-", "x-rewrite-"];
/// Removed, in any spelling, unless a trusted proxy sent them.
const FORWARDING: &[&str] = &[
    "forwarded",
    "forwarded-for",
    "x-forwarded",
    "x-real-ip",
    "x-client-ip",
    "x-cluster-client-ip",
    "client-ip",
    "true-client-ip",
    "cf-connecting-ip",
    "x-request-id",
];
/// The same, for all names that begin so.
const FORWARDING_PREFIX: &str = "x-forwarded-";
/// Longest request id that is kept.
const MAX_REQUEST_ID: usize = 128;

/// A bit for the length of a name; the last one is for all that are longer.
fn length_bit(name: &str) -> u64 {
    1 << name.len().min(63)
}

fn begins(name: &str, folded_prefix: &str) -> bool {
    name.len() >= folded_prefix.len()
        && name.bytes().zip(folded_prefix.bytes()).all(|(a, b)| folded(a) == b)
}

fn spells_any(name: &str, list: &[&str]) -> bool {
    list.iter().any(|other| name.len() == other.len() && begins(name, other))
}

/// Names a request to the upstream, to the client and in logs. As a header it is one that HTTP/2 must not index: its
/// table would hold nothing but ids, and each new one would be compared with all of them.
#[derive(Clone, Debug)]
pub(super) struct RequestId(HeaderValue);

impl RequestId {
    /// Of a request that nobody has looked at.
    pub(super) const NONE: Self = Self(HeaderValue::from_static(""));

    /// A new one.
    pub(super) fn random() -> Self {
        let value = HeaderValue::from_maybe_shared(Bytes::from(new_request_id()));
        Self::of(value.expect("hexadecimal digits"))
    }

    fn of(mut value: HeaderValue) -> Self {
        value.set_sensitive(true);
        Self(value)
    }

    pub(super) fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }

    pub(super) fn header(&self) -> HeaderValue {
        self.0.clone()
    }
}

/// What is known of where a request came from.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    /// The peer's address; `None` on a Unix socket.
    pub(super) peer: Option<IpAddr>,
    /// The same as it stands in headers.
    pub(super) peer_text: Option<HeaderValue>,
    /// Whether the peer's forwarding headers are believed.
    pub(super) trusted: bool,
    /// Whether the connection is encrypted.
    pub(super) tls: bool,
}

/// Makes the headers that go upstream.
pub(super) struct HeaderRules {
    names: HeaderNames,
    /// Credential and identity headers.
    protected: Vec<HeaderName>,
    /// By first byte, the lengths, as bits, of names that may be unwanted: of most names nothing else is looked
    /// at.
    suspects: [u64; 256],
    trusted_proxies: Vec<TrustedPeer>,
}

impl HeaderRules {
    pub(super) fn new(names: HeaderNames, trusted_proxies: Vec<TrustedPeer>) -> Self {
        let protected: Vec<_> = names.protected().cloned().collect();
        let exact = [OVERRIDES, FORWARDING].concat().into_iter();
        let exact = exact.chain(protected.iter().map(HeaderName::as_str));
        let exact = exact.map(|name| (name, length_bit(name)));
        let prefixes = OVERRIDE_PREFIXES.iter().chain([&FORWARDING_PREFIX]);
        let prefixes = prefixes.map(|prefix| (*prefix, !(length_bit(prefix) - 1)));
        let known: Vec<_> = exact.chain(prefixes).collect();
        let suspects = std::array::from_fn(|byte| {
            let begins =
                |name: &str| name.bytes().next().map(folded) == u8::try_from(byte).ok().map(folded);
            known.iter().filter(|(name, _)| begins(name)).fold(0, |all, (_, lengths)| all | lengths)
        });
        Self { names, protected, suspects, trusted_proxies }
    }

    /// Whether `peer` may speak for others; `None`: a Unix socket's.
    pub(super) fn trusts(&self, peer: Option<IpAddr>) -> bool {
        is_trusted(peer, &self.trusted_proxies)
    }

    /// The address of the client: the last one of `X-Forwarded-For` that is not a trusted proxy's,
    /// if the peer is one; else the peer's.
    pub(super) fn client(&self, headers: &HeaderMap, origin: &Origin) -> Option<IpAddr> {
        client_address(headers, origin.peer, &self.trusted_proxies)
    }

    /// The request id that a trusted proxy sent, if it is fit for logs.
    pub(super) fn request_id(&self, headers: &HeaderMap, origin: &Origin) -> Option<RequestId> {
        if !origin.trusted {
            return None;
        }
        let mut ids = headers.get_all(REQUEST_ID).iter();
        let (Some(id), None) = (ids.next(), ids.next()) else { return None };
        let text = id.to_str().ok()?;
        let good = |c: char| c.is_ascii_alphanumeric() || "-._~+/=:".contains(c);
        let is_good = (1..=MAX_REQUEST_ID).contains(&text.len()) && text.chars().all(good);
        is_good.then(|| RequestId::of(id.clone()))
    }

    /// Makes `headers` say who `who` is, the proven principal if there is one, and nothing else that only
    /// the gate may say, whoever sent it and however it is spelled.
    ///
    /// # Errors
    /// If a value cannot stand in a header; names cannot contain such characters.
    pub(super) fn vouch(
        &self,
        headers: &mut HeaderMap,
        origin: &Origin,
        who: Option<&Principal>,
    ) -> Result<(), InvalidHeaderValue> {
        // What is replaced below need not be removed before.
        let is_replaced =
            |name: &HeaderName| who.is_some() && self.names.identity().any(|other| other == name);
        let unwanted =
            headers.keys().filter(|name| self.is_unwanted(name, origin) && !is_replaced(name));
        for name in unwanted.cloned().collect::<Vec<_>>() {
            headers.remove(name);
        }
        match who {
            Some(who) => self.identify(headers, who),
            None => Ok(()),
        }
    }

    fn is_unwanted(&self, name: &HeaderName, origin: &Origin) -> bool {
        let text = name.as_str();
        let lengths = text.bytes().next().map_or(0, |first| self.suspects[usize::from(first)]);
        if lengths & length_bit(text) == 0 {
            return false;
        }
        if self.protected.iter().any(|protected| spells(name, protected))
            || spells_any(text, OVERRIDES)
            || OVERRIDE_PREFIXES.iter().any(|prefix| begins(text, prefix))
        {
            return true;
        }
        let forwarding = spells_any(text, FORWARDING) || begins(text, FORWARDING_PREFIX);
        let exact = text.bytes().all(|byte| folded(byte) == byte);
        forwarding && !(origin.trusted && exact)
    }

    /// Says who the proven principal is. Names are UTF-8, which header values may carry (RFC 9110
    /// section 5.5, `obs-text`): they go out as these very bytes.
    fn identify(&self, headers: &mut HeaderMap, who: &Principal) -> Result<(), InvalidHeaderValue> {
        for (name, text) in identity(&self.names, who) {
            // Often the claim's own headers say it already, now that it is proven.
            if said(headers, name, &text).is_none() {
                headers.insert(name.clone(), HeaderValue::from_bytes(text.as_bytes())?);
            }
        }
        Ok(())
    }

    /// Sets the forwarding headers; what is still there came from a trusted proxy and is continued.
    ///
    /// # Errors
    /// If a value cannot stand in a header; authorities cannot contain such characters.
    pub(super) fn forward(
        &self,
        headers: &mut HeaderMap,
        origin: &Origin,
        authority: &str,
        request_id: &RequestId,
    ) -> Result<(), InvalidHeaderValue> {
        let proto = if origin.tls { "https" } else { "http" };
        let peer = origin.peer_text.as_ref();
        let element = forwarded_element(peer, proto, authority);
        if let Some(list) = continued(headers, &FORWARDED_FOR, origin, peer.cloned()) {
            headers.insert(FORWARDED_FOR, list);
        }
        let element = HeaderValue::from_maybe_shared(Bytes::from(element)).ok();
        if let Some(list) = continued(headers, &FORWARDED, origin, element) {
            headers.insert(FORWARDED, list);
        }
        let host = match said(headers, &HOST, authority) {
            Some(host) => host.clone(),
            None => {
                let host = HeaderValue::from_str(authority)?;
                headers.insert(HOST, host.clone());
                host
            }
        };
        // A trusted proxy nearer to the client knows better, if it says one thing only.
        let is_known = |name| origin.trusted && headers.get_all(name).iter().count() == 1;
        let (knows_proto, knows_host) = (is_known(&FORWARDED_PROTO), is_known(&FORWARDED_HOST));
        if !knows_proto {
            headers.insert(FORWARDED_PROTO, HeaderValue::from_static(proto));
        }
        if !knows_host {
            headers.insert(FORWARDED_HOST, host);
        }
        headers.insert(HeaderName::from_static(REQUEST_ID), request_id.header());
        Ok(())
    }
}

/// What `name` says, if that is once and is `text`.
fn said<'h>(headers: &'h HeaderMap, name: &HeaderName, text: &str) -> Option<&'h HeaderValue> {
    let mut values = headers.get_all(name).iter();
    let first = values.next().filter(|value| value.as_bytes() == text.as_bytes());
    first.filter(|_| values.next().is_none())
}

/// The values of a list header, which are left of a trusted proxy alone, with `more` at their end; `None`:
/// nothing to set.
fn continued(
    headers: &HeaderMap,
    name: &HeaderName,
    origin: &Origin,
    more: Option<HeaderValue>,
) -> Option<HeaderValue> {
    if !origin.trusted {
        return more;
    }
    let parts = headers.get_all(name).iter().chain(&more).map(HeaderValue::as_bytes);
    let parts: Vec<_> = parts.filter(|part| !part.is_empty()).collect();
    let list = (!parts.is_empty()).then(|| parts.join(&b", "[..]))?;
    HeaderValue::from_maybe_shared(Bytes::from(list)).ok()
}

/// RFC 7239 section 4.
fn forwarded_element(peer: Option<&HeaderValue>, proto: &str, authority: &str) -> String {
    let peer = peer.and_then(|peer| peer.to_str().ok());
    let (before, peer, after) = match peer {
        None => ("", "unknown", ""),
        Some(v6) if v6.contains(':') => ("\"[", v6, "]\""),
        Some(v4) => ("", v4, ""),
    };
    let parts = ["for=", before, peer, after, ";proto=", proto, ";host=\"", authority, "\""];
    let mut element = String::with_capacity(parts.map(str::len).iter().sum());
    parts.iter().for_each(|part| element.push_str(part));
    element
}

/// RFC 9113 section 8.2.3: HTTP/2 may split `Cookie`; HTTP/1.1 has one.
pub(super) fn join_cookies(headers: &mut HeaderMap) {
    let cookies = headers.get_all(COOKIE);
    if cookies.iter().nth(1).is_none() {
        return;
    }
    let cookies: Vec<_> = cookies.iter().map(HeaderValue::as_bytes).collect();
    let joined = cookies.join(&b"; "[..]);
    headers.insert(COOKIE, pingora::http::header_value_from_raw(joined));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credentials::fold;
    use proptest::prelude::*;

    fn rules(trusted: &[&str]) -> HeaderRules {
        let names = HeaderNames {
            identity_name: HeaderName::from_static("remote-user"),
            identity_realm: HeaderName::from_static("remote-realm"),
            identity_principal: Some(HeaderName::from_static("remote_principal")),
            ..HeaderNames::default()
        };
        HeaderRules::new(
            names,
            trusted.iter().map(|net| TrustedPeer::Network(net.parse().unwrap())).collect(),
        )
    }

    fn request(headers: &[(&str, &str)]) -> HeaderMap {
        let parsed = headers.iter().map(|(name, value)| {
            (HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap())
        });
        parsed.collect()
    }

    fn origin(trusted: bool) -> Origin {
        let peer = "192.0.2.1";
        let peer_text = Some(HeaderValue::from_static(peer));
        Origin { peer: peer.parse().ok(), peer_text, trusted, tls: true }
    }

    fn id() -> RequestId {
        RequestId::of(HeaderValue::from_static("id"))
    }

    fn value<'a>(request: &'a HeaderMap, name: &str) -> Option<&'a str> {
        request.get(name).map(|value| value.to_str().unwrap())
    }

    #[test]
    fn no_spelling_of_a_protected_header_stays() {
        let unwanted = [
            "X-Auth-Name",
            "x_auth_name",
            "X.Auth.Realm",
            "x-auth_token",
            "Remote-User",
            "remote_user",
            "REMOTE.REALM",
            "remote-principal",
            "Remote_Principal",
            "X-HTTP-Method-Override",
            "x_http_method_override",
            "X-HTTP-Method",
            "X-Method-Override",
            "X-Original-URL",
            "x_original_uri",
            "X-Rewrite-URL",
            "X-Original-Method",
        ];
        for trusted in [false, true] {
            for name in unwanted {
                let mut request = request(&[(name, "evil"), ("accept", "x")]);
                rules(&[]).vouch(&mut request, &origin(trusted), None).unwrap();
                assert_eq!(request.len(), 1, "{name}");
            }
        }
        let mut kept = request(&[("x-auth-names", "a"), ("x-author", "b"), ("remote-users", "c")]);
        rules(&[]).vouch(&mut kept, &origin(false), None).unwrap();
        assert_eq!(kept.len(), 3);
    }

    #[test]
    fn forwarding_headers_of_strangers_are_replaced() {
        let mut request = request(&[
            ("X-Forwarded-For", "6.6.6.6"),
            ("X_Forwarded_For", "6.6.6.6"),
            ("X-Forwarded-User", "root"),
            ("Forwarded", "for=6.6.6.6"),
            ("X-Real-IP", "6.6.6.6"),
            ("X-Forwarded-Proto", "http"),
        ]);
        let (rules, origin) = (rules(&[]), origin(false));
        rules.vouch(&mut request, &origin, None).unwrap();
        rules.forward(&mut request, &origin, "h:1", &id()).unwrap();
        assert_eq!(value(&request, "x-forwarded-for"), Some("192.0.2.1"));
        assert_eq!(value(&request, "x-forwarded-proto"), Some("https"));
        assert_eq!(value(&request, "x-forwarded-host"), Some("h:1"));
        assert_eq!(value(&request, "forwarded"), Some("for=192.0.2.1;proto=https;host=\"h:1\""));
        assert_eq!(value(&request, "x-request-id"), Some("id"));
        for gone in ["x_forwarded_for", "x-forwarded-user", "x-real-ip"] {
            assert_eq!(value(&request, gone), None);
        }
    }

    #[test]
    fn forwarding_headers_of_trusted_proxies_are_continued() {
        let mut request = request(&[
            ("X-Forwarded-For", "198.51.100.7"),
            ("X-Forwarded-For", "203.0.113.9"),
            ("X_Forwarded_For", "6.6.6.6"),
            ("X-Forwarded-Proto", "http"),
            ("X-Forwarded-Host", "a"),
            ("X-Forwarded-Host", "b"),
            ("Forwarded", "for=198.51.100.7"),
        ]);
        let (rules, origin) = (rules(&[]), origin(true));
        rules.vouch(&mut request, &origin, None).unwrap();
        rules.forward(&mut request, &origin, "h", &id()).unwrap();
        let all = "198.51.100.7, 203.0.113.9, 192.0.2.1";
        assert_eq!(value(&request, "x-forwarded-for"), Some(all));
        assert_eq!(value(&request, "x-forwarded-proto"), Some("http"));
        assert_eq!(value(&request, "x-forwarded-host"), Some("h"));
        assert!(
            value(&request, "forwarded").unwrap().starts_with("for=198.51.100.7, for=192.0.2.1;")
        );
        assert_eq!(value(&request, "x_forwarded_for"), None);
    }

    #[test]
    fn forwarding_twice_from_the_same_request_gives_the_same() {
        let (rules, origin) = (rules(&[]), origin(true));
        let first = request(&[("X-Forwarded-For", "1.2.3.4"), ("X-Auth-Name", "evil")]);
        let make = || {
            let mut attempt = first.clone();
            let who = Principal::parse("alice", "staff").unwrap();
            rules.vouch(&mut attempt, &origin, Some(&who)).unwrap();
            rules.forward(&mut attempt, &origin, "h", &id()).unwrap();
            attempt
        };
        assert_eq!(make(), make());
    }

    #[test]
    fn identity_is_sent_as_utf8_bytes() {
        let mut request = request(&[]);
        let who = Principal::parse("\u{fc}nal", "staff").unwrap();
        rules(&[]).vouch(&mut request, &origin(false), Some(&who)).unwrap();
        assert_eq!(request["remote-user"].as_bytes(), "\u{fc}nal".as_bytes());
        assert_eq!(request["remote-realm"].as_bytes(), b"staff");
        assert_eq!(request["remote_principal"].as_bytes(), "\u{fc}nal@staff".as_bytes());
    }

    #[test]
    fn a_proven_claim_stays_only_as_it_was_proven() {
        let rules = HeaderRules::new(HeaderNames::default(), Vec::new());
        let alice = Principal::parse("alice", "staff").unwrap();
        let says = |headers: &[(&str, &str)], who: Option<&Principal>| {
            let mut request = request(headers);
            rules.vouch(&mut request, &origin(false), who).unwrap();
            let name = request.get_all("x-auth-name").iter();
            name.map(|name| name.to_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        let (name, other) = (("X-Auth-Name", "alice"), ("x-auth-name", "root"));
        for headers in [&[name][..], &[other], &[name, other], &[name, name], &[]] {
            assert_eq!(says(headers, Some(&alice)), ["alice"], "{headers:?}");
            assert!(says(headers, None).is_empty(), "{headers:?}");
        }
        let mut request = request(&[name, ("X-Auth-Realm", "staff"), ("X-Auth-Token", "123456")]);
        rules.vouch(&mut request, &origin(false), Some(&alice)).unwrap();
        assert_eq!(request.len(), 2);
    }

    #[test]
    fn request_ids_are_kept_if_trusted_and_well_formed() {
        let rules = rules(&[]);
        let id = |headers: &[(&str, &str)], trusted| {
            let id = rules.request_id(&request(headers), &origin(trusted));
            id.map(|id| id.as_str().to_owned())
        };
        let name = "x-request-id";
        assert_eq!(id(&[(name, "a-1")], true).as_deref(), Some("a-1"));
        assert_eq!(id(&[(name, "a-1")], false), None);
        assert_eq!(id(&[(name, "a-1"), (name, "a-1")], true), None);
        assert_eq!(id(&[(name, "a b")], true), None);
        assert_eq!(id(&[(name, "a\"b")], true), None);
        assert_eq!(id(&[(name, &"a".repeat(129))], true), None);
        assert_eq!(id(&[(name, "")], true), None);
    }

    #[test]
    fn cookies_are_joined() {
        let mut request = request(&[("cookie", "a=1"), ("cookie", "b=2"), ("cookie", "c=3")]);
        join_cookies(&mut request);
        assert_eq!(value(&request, "cookie"), Some("a=1; b=2; c=3"));
        assert_eq!(request.get_all("cookie").iter().count(), 1);
    }

    /// Longer than there are bits for lengths, and with a first byte that has other spellings.
    const LONG: &str =
        "_principal-of-whom-the-gate-has-seen-with-its-own-eyes-that-the-token-is-right";

    /// Names that the gate answers for, and others, in all spellings.
    fn names() -> impl Strategy<Value = String> {
        let own = [
            "x-auth-name",
            "x-auth-realm",
            "x-auth-token",
            "remote_user",
            "x-forwarded-user",
            LONG,
        ];
        let others = [FORWARDING_PREFIX, "accept", "x", "host"];
        let all = [OVERRIDES, OVERRIDE_PREFIXES, FORWARDING, &own, &others].concat();
        let separators = prop_oneof![Just(String::new()), "[-_.~]{20}"];
        let name = (proptest::sample::select(all), separators, "(|||s|url)");
        name.prop_map(|(name, separators, more)| {
            let mut separators = separators.chars();
            let respell =
                |c: char| if c.is_alphanumeric() { c } else { separators.next().unwrap_or(c) };
            name.chars().map(respell).collect::<String>() + &more
        })
    }

    /// All that is unwanted goes, whatever follows; then the identity is said.
    fn vouch_one_by_one(
        rules: &HeaderRules,
        request: &mut HeaderMap,
        origin: &Origin,
        who: Option<&Principal>,
    ) {
        let is_unwanted = |name: &HeaderName| {
            let text = fold(name);
            let begins = |prefix: &&str| text.starts_with(*prefix);
            let is_forwarding = FORWARDING.contains(&&*text) || begins(&FORWARDING_PREFIX);
            rules.protected.iter().any(|protected| fold(protected) == text)
                || OVERRIDES.contains(&&*text)
                || OVERRIDE_PREFIXES.iter().any(begins)
                || is_forwarding && !(origin.trusted && name.as_str() == text)
        };
        let unwanted: Vec<_> = request.keys().filter(|name| is_unwanted(name)).cloned().collect();
        for name in unwanted {
            request.remove(name);
        }
        for (name, text) in who.into_iter().flat_map(|who| identity(&rules.names, who)) {
            request.insert(name.clone(), HeaderValue::from_bytes(text.as_bytes()).unwrap());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// Whatever is sent, by whomever, in whichever spelling, and whatever the names are.
        #[test]
        fn upstreams_are_told_what_the_gate_says_and_nothing_else(
            sent in proptest::collection::vec((names(), "(alice|staff|alice@staff|root|)"), 0..8),
            is_proven in any::<bool>(),
            trusted in any::<bool>(),
            apart in any::<bool>(),
        ) {
            let names = HeaderNames::default();
            let names = match apart {
                false => names,
                true => HeaderNames {
                    identity_name: HeaderName::from_static("remote_user"),
                    identity_realm: HeaderName::from_static("x-forwarded-user"),
                    identity_principal: Some(HeaderName::from_static(LONG)),
                    ..names
                },
            };
            let (rules, origin) = (HeaderRules::new(names, Vec::new()), origin(trusted));
            let who = Principal::parse("alice", "staff").unwrap();
            let who = is_proven.then_some(&who);
            let mut fast = request(&[]);
            for (name, value) in sent {
                fast.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
            }
            let mut slow = fast.clone();
            rules.vouch(&mut fast, &origin, who).unwrap();
            vouch_one_by_one(&rules, &mut slow, &origin, who);
            prop_assert_eq!(&fast, &slow);
        }
    }
}
