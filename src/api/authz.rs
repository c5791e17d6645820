//! Answers other proxies that ask whether a request may pass: nginx, Traefik, Caddy, HAProxy, Envoy.
//!
//! What they tell of it is believed only from the peers in `api.trusted_proxies`, and only in one reading.
//! The decision is the one that the gate's own proxy would make; the query has no part in it. Whoever is
//! not told that a request passes hears no identity either.

use std::net::IpAddr;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, StatusCode, request};
use tracing::{Level, enabled};

use super::Api;
use super::edge::{Note, Outcome, RequestId, named_host};
use crate::credentials::{Ambiguous, one_of_each, spells};
use crate::decision::{Asked, BadHead, Head, MethodName, Passage, Refusal, Unclear};
use crate::decision::{identity, split_url};
use crate::entry::Principal;
use crate::logging::ACCESS;
use crate::net::{Connection, client_address, is_trusted, refusal_body};
use crate::verifier::Permit;

pub(super) mod grpc;

/// Below it, [`Dialect::ExtAuthz`] finds the path that it is asked about.
pub(super) const EXT_AUTHZ: &str = "/authz/ext-authz";

const ORIGINAL_METHOD: HeaderName = HeaderName::from_static("x-original-method");
const ORIGINAL_URL: HeaderName = HeaderName::from_static("x-original-url");
const ORIGINAL_URI: HeaderName = HeaderName::from_static("x-original-uri");
const FORWARDED_METHOD: HeaderName = HeaderName::from_static("x-forwarded-method");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_URI: HeaderName = HeaderName::from_static("x-forwarded-uri");
const HEADERS_TO_REMOVE: HeaderName = HeaderName::from_static("x-envoy-auth-headers-to-remove");
/// Tells nginx, which hears only 401 and 403, which status the gate's own proxy would answer with.
const STATUS: HeaderName = HeaderName::from_static("x-otpgate-status");

/// As many as an answer has.
const ANSWER_HEADERS: usize = 8;

/// How a proxy asks, and what it takes for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    /// nginx's `auth_request`: `X-Original-Method`, and `X-Original-URL`, or `X-Original-URI` with
    /// `X-Forwarded-Host`. Refuses with 401 and 403 alone: all else is an error to nginx.
    AuthRequest,
    /// Traefik's `forwardAuth`, Caddy's `forward_auth`, HAProxy: `X-Forwarded-Method`, `-Host`, `-Uri`.
    ForwardAuth,
    /// Envoy's `ext_authz` over HTTP: the request's own method and host, its path below [`EXT_AUTHZ`].
    ExtAuthz,
}

/// What a proxy tells of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Told<'a> {
    pub(super) method: &'a str,
    /// Host and port.
    pub(super) authority: &'a str,
    /// Path and query.
    pub(super) target: &'a str,
    pub(super) headers: &'a HeaderMap,
    /// Where it came from last, the proxy itself if that does not say; `X-Forwarded-For` goes on from there.
    /// `None`: a Unix socket.
    pub(super) sender: Option<IpAddr>,
}

/// What was asked about: for the access line.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    /// Where it comes from; `None`: a Unix socket.
    pub(super) client: Option<IpAddr>,
    pub(super) method: String,
    pub(super) host: String,
    /// Without its query, in its one reading.
    pub(super) path: String,
}

/// Why a proxy gets no permission.
#[derive(Clone, Copy, Debug)]
pub(super) enum Denied {
    /// It is not in `api.trusted_proxies`.
    Untrusted,
    /// It does not tell what must be known.
    Missing,
    /// What it tells has more than one reading.
    Unclear,
    /// The request has more headers than allowed.
    TooManyHeaders,
    /// The request may not pass.
    Refused(Refusal),
}

impl From<Refusal> for Denied {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<BadHead> for Denied {
    fn from(bad: BadHead) -> Self {
        Self::Refused(bad.into())
    }
}

impl From<Ambiguous> for Denied {
    fn from(_: Ambiguous) -> Self {
        Self::Unclear
    }
}

impl Denied {
    pub(super) fn status(self) -> StatusCode {
        match self {
            Self::Untrusted => StatusCode::FORBIDDEN,
            Self::Missing | Self::Unclear => StatusCode::BAD_REQUEST,
            Self::TooManyHeaders => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::Refused(refusal) => refusal.status(),
        }
    }

    pub(super) fn detail(self) -> &'static str {
        match self {
            Self::Untrusted => "Only proxies in `api.trusted_proxies` may ask.",
            Self::Missing => "The proxy does not tell method, host and path of the request.",
            Self::Unclear => "The proxy tells of the request in more than one way.",
            Self::TooManyHeaders => "The request has too many headers.",
            Self::Refused(refusal) => refusal.detail(),
        }
    }

    /// A word for metrics and a finer one for logs.
    pub(super) fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Untrusted => ("untrusted", "untrusted_proxy"),
            Self::Missing => ("malformed", "metadata_missing"),
            Self::Unclear => ("malformed", "metadata_unclear"),
            Self::TooManyHeaders => ("malformed", "too_many_headers"),
            Self::Refused(refusal) => (refusal.class(), refusal.reason()),
        }
    }

    pub(super) fn retry_after(self) -> Option<u64> {
        match self {
            Self::Refused(refusal) => refusal.retry_after(),
            _ => None,
        }
    }
}

impl Api {
    /// Answers in `dialect`.
    pub(super) async fn authorize(&self, dialect: Dialect, request: Request) -> Response {
        let (head, _) = request.into_parts();
        let mut note = Note { action: "authz", ..Note::default() };
        let id = head.extensions.get::<RequestId>().cloned();
        let id = id.as_ref().map_or("", RequestId::as_str);
        let told = self.check_asker(&head).and_then(|()| dialect.read(&head));
        let ruled = match told {
            Ok(told) => self.rule(told, id, &mut note).await,
            Err(denied) => Err(denied),
        };
        let mut response = match ruled {
            Ok((permit, outcome)) => {
                let mut response = self.allow(dialect, permit.as_ref().map(Permit::principal));
                note.caller = permit.map(Permit::into_principal);
                response.extensions_mut().insert(Outcome(outcome));
                response
            }
            Err(denied) => deny(dialect, denied, id, &mut note),
        };
        response.extensions_mut().insert(note);
        response
    }

    /// Only proxies that are listed may tell of requests of others.
    pub(super) fn check_asker(&self, head: &request::Parts) -> Result<(), Denied> {
        if is_trusted(peer_of(head), &self.config.trusted_proxies) {
            Ok(())
        } else {
            Err(Denied::Untrusted)
        }
    }

    /// Decides about the request that a trusted proxy tells of. Returns the permit, `None` if it passes as
    /// nobody, and a word for metrics.
    pub(super) async fn rule(
        &self,
        told: Told<'_>,
        request_id: &str,
        note: &mut Note,
    ) -> Result<(Option<Permit>, &'static str), Denied> {
        let at = self.clock.now();
        let method = MethodName::parse(told.method)?;
        let head = Head::read(&self.policy, method, told.authority, told.target)?;
        let client = client_address(told.headers, told.sender, &self.config.trusted_proxies);
        // Copied for the access line alone.
        note.asked = enabled!(target: ACCESS, Level::INFO).then(|| {
            Box::new(Subject {
                client,
                method: told.method.to_owned(),
                host: head.authority.host().to_owned(),
                path: head.path.shown().into_owned(),
            })
        });
        self.check_aliases(told.headers)?;
        let asked = Asked { method, head: &head, headers: told.headers, client, request_id, at };
        let decided = self.decider.decide(&self.policy, asked).await.outcome;
        let took = self.clock.monotonic().saturating_duration_since(at.monotonic);
        self.metrics.gate_duration.observe(took.as_secs_f64());
        match decided {
            Ok(Passage::Proven(permit)) => Ok((Some(permit), "allowed")),
            Ok(Passage::Public) => Ok((None, "public")),
            Ok(Passage::Reported(refusal)) => {
                note.reason = Some(refusal.reason());
                Ok((None, "reported"))
            }
            Err(refused) => {
                note.caller = refused.permit.map(Permit::into_principal);
                Err(refused.why.into())
            }
        }
    }

    /// The gate's own proxy removes other spellings of protected headers, on public routes too; proxies that
    /// ask us set only the exact ones.
    fn check_aliases(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let is_alias = |name: &HeaderName| {
            let mut protected = self.decider.names().protected();
            let mut exact = self.decider.names().protected();
            protected.any(|p| spells(name, p)) && !exact.any(|p| p == name)
        };
        match headers.keys().any(is_alias) {
            true => Err(Unclear::Ambiguous(Ambiguous::Alias).into()),
            false => Ok(()),
        }
    }

    /// 200 and the headers that the proxy sets on the request. Those of nobody are there too, and empty: a
    /// proxy that copies them replaces what a client may have sent.
    fn allow(&self, dialect: Dialect, who: Option<&Principal>) -> Response {
        let mut response = Response::new(Body::empty());
        let headers = response.headers_mut();
        // Those of the edge too.
        headers.reserve(ANSWER_HEADERS);
        let names = self.decider.names();
        let empty = || HeaderValue::from_static("");
        for name in names.identity().filter(|_| who.is_none()) {
            headers.insert(name.clone(), empty());
        }
        for (name, text) in who.into_iter().flat_map(|who| identity(names, who)) {
            // No name can hold what a header's value cannot.
            let value = HeaderValue::from_bytes(text.as_bytes()).unwrap_or_else(|_| empty());
            headers.insert(name.clone(), value);
        }
        if dialect == Dialect::ExtAuthz {
            let removed = self.headers_to_remove().map(HeaderName::as_str).collect::<Vec<_>>();
            let removed = HeaderValue::from_str(&removed.join(",")).expect("names of headers");
            headers.insert(HEADERS_TO_REMOVE, removed);
        }
        response
    }

    /// Credential headers that do not also say who is proven: upstreams must not see them.
    pub(super) fn headers_to_remove(&self) -> impl Iterator<Item = &HeaderName> {
        let names = self.decider.names();
        let is_identity = |name: &&HeaderName| names.identity().any(|other| other == *name);
        names.credentials().into_iter().filter(move |name| !is_identity(name))
    }
}

impl Dialect {
    /// What the asking request tells.
    fn read(self, head: &request::Parts) -> Result<Told<'_>, Denied> {
        let headers = &head.headers;
        let (method, authority, target) = match self {
            Self::AuthRequest => {
                let names = [&ORIGINAL_METHOD, &ORIGINAL_URL, &ORIGINAL_URI];
                let [method, url, uri] = one_of_each(headers, names)?;
                let (authority, target) = match (url, uri) {
                    (Some(url), None) => split_url(text(url)?)?,
                    (None, Some(uri)) => {
                        let names = [&FORWARDED_HOST, &ORIGINAL_URL, &ORIGINAL_URI];
                        let [host, ..] = one_of_each(headers, names)?;
                        (text(host.ok_or(Denied::Missing)?)?, text(uri)?)
                    }
                    (Some(_), Some(_)) => return Err(Denied::Unclear),
                    (None, None) => return Err(Denied::Missing),
                };
                (text(method.ok_or(Denied::Missing)?)?, authority, target)
            }
            Self::ForwardAuth => {
                let names = [&FORWARDED_METHOD, &FORWARDED_HOST, &FORWARDED_URI];
                let [Some(method), Some(host), Some(uri)] = one_of_each(headers, names)? else {
                    return Err(Denied::Missing);
                };
                (text(method)?, text(host)?, text(uri)?)
            }
            Self::ExtAuthz => {
                let target = head.uri.path_and_query().map_or("", |target| target.as_str());
                let target = target.strip_prefix(EXT_AUTHZ).ok_or(Denied::Missing)?;
                let host = named_host(&head.uri, headers).ok_or(Denied::Missing)?;
                (head.method.as_str(), host, target)
            }
        };
        Ok(Told { method, authority, target, headers, sender: peer_of(head) })
    }
}

/// Who asks; `None`: somebody on a Unix socket.
fn peer_of(head: &request::Parts) -> Option<IpAddr> {
    head.extensions.get::<Arc<Connection>>().and_then(|connection| connection.peer())
}

fn text(value: &HeaderValue) -> Result<&str, Denied> {
    std::str::from_utf8(value.as_bytes()).map_err(|_| Denied::Unclear)
}

fn deny(dialect: Dialect, denied: Denied, request_id: &str, note: &mut Note) -> Response {
    let status = denied.status();
    let (outcome, reason) = denied.words();
    note.reason = Some(reason);
    let mut response = Response::new(Body::from(refusal_body(denied.detail(), request_id)));
    response.extensions_mut().insert(Outcome(outcome));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if status == StatusCode::UNAUTHORIZED {
        let challenge = HeaderValue::from_static(Refusal::CHALLENGE);
        headers.insert(header::WWW_AUTHENTICATE, challenge);
    }
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(header::ALLOW, HeaderValue::from_static(Refusal::ALLOW));
    }
    if let Some(seconds) = denied.retry_after() {
        headers.insert(header::RETRY_AFTER, seconds.into());
    }
    *response.status_mut() = match dialect {
        Dialect::AuthRequest => {
            response.headers_mut().insert(STATUS, status.as_u16().into());
            if status == StatusCode::UNAUTHORIZED { status } else { StatusCode::FORBIDDEN }
        }
        Dialect::ForwardAuth | Dialect::ExtAuthz => status,
    };
    response
}
