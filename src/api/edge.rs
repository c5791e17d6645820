//! What every request passes on its way in and out: host and origin checks, request id, common
//! headers, caught panics, one access line and one count.

use std::borrow::Cow;
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt as _;
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Uri};
use percent_encoding::{CONTROLS, utf8_percent_encode};

use super::audit::{self, Subject};
use super::authz;
use super::error::ApiError;
use super::{Api, Resource};
use crate::entry::Principal;
use crate::logging::{ACCESS, millis};
use crate::net::{Connection, client_address, new_request_id};
use crate::policy::Authority;

/// Carries the id of a request.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Names a request in logs and in its answer.
#[derive(Clone, Debug)]
pub(super) struct RequestId(Arc<str>);

impl RequestId {
    /// The id.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// A response's bounded word for metrics and logs; without it the request was done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outcome(pub(super) &'static str);

/// What a handler learnt about its request: an extension of its response.
#[derive(Clone, Debug, Default)]
pub(super) struct Note {
    /// What was asked for: a bounded word.
    pub(super) action: &'static str,
    /// Who proved itself.
    pub(super) caller: Option<Principal>,
    /// Why a claim was refused: callers are not told.
    pub(super) reason: Option<&'static str>,
    /// Which entry it manages.
    pub(super) subject: Subject,
    /// What another proxy asks about.
    pub(super) asked: Option<Box<authz::Subject>>,
}

/// Wraps every route. `resource` is what the route leads to.
pub(super) async fn edge<R: Future<Output = Response>>(
    api: Arc<Api>,
    resource: Option<Resource>,
    mut request: Request,
    handle: impl FnOnce(Arc<Api>, Request) -> R,
) -> Response {
    let start = api.clock.now();
    let id = RequestId(new_request_id().into());
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let client = client_of(&api, &request);
    request.extensions_mut().insert(id.clone());
    let management = resource.and_then(|resource| audit::management(resource, &method));

    let answered = match check(&api, &request) {
        Err(refusal) => Ok(refusal.into_response()),
        Ok(()) => AssertUnwindSafe(handle(api.clone(), request)).catch_unwind().await,
    };
    // The panic hook counts and logs it.
    let mut response = answered.unwrap_or_else(|_| ApiError::Panic.into_response());

    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let mut shown_id = HeaderValue::from_str(id.as_str()).expect("hexadecimal digits");
    // HTTP/2 is not to keep it for later answers: there is none with the same.
    shown_id.set_sensitive(true);
    headers.insert(REQUEST_ID, shown_id);

    let note = response.extensions_mut().remove::<Note>().unwrap_or_default();
    let action = if note.action.is_empty() { "other" } else { note.action };
    let outcome = response.extensions().get::<Outcome>().map_or("ok", |outcome| outcome.0);
    let took = api.clock.monotonic().saturating_duration_since(start.monotonic);
    api.metrics.request("api", action, outcome);
    if let Some(action) = management {
        audit::log(action, &note, outcome, &id, client);
    }
    // A proxy's question may say more than its head.
    let client = note.asked.as_ref().map_or(client, |asked| asked.client);
    tracing::info!(
        target: ACCESS,
        listener = "api",
        request_id = id.as_str(),
        client = client.map(tracing::field::display),
        method = method.as_str(),
        path = &*shown(uri.path()),
        status = response.status().as_u16(),
        action,
        outcome,
        reason = note.reason,
        asked_method = note.asked.as_ref().map(|asked| asked.method.as_str()),
        asked_host = note.asked.as_ref().map(|asked| asked.host.as_str()),
        asked_path = note.asked.as_ref().map(|asked| asked.path.as_str()),
        realm = note.caller.as_ref().map(|caller| caller.realm.as_str()),
        name = note.caller.as_ref().map(|caller| caller.name.as_str()),
        duration_ms = millis(took),
    );
    response
}

/// A path for the access line: nothing but ASCII, as the proxy shows paths, since others hide or reorder text.
fn shown(path: &str) -> Cow<'_, str> {
    match path {
        // The rest is what is asked about.
        path if path.starts_with(authz::EXT_AUTHZ) => authz::EXT_AUTHZ.into(),
        path => utf8_percent_encode(path, CONTROLS).into(),
    }
}

/// Where a request comes from, behind trusted proxies; `None`: a Unix socket.
fn client_of(api: &Api, request: &Request) -> Option<IpAddr> {
    let connection = request.extensions().get::<Arc<Connection>>();
    let peer = connection.and_then(|connection| connection.peer());
    client_address(request.headers(), peer, &api.config.trusted_proxies)
}

/// Refuses names of other hosts, and pages of other hosts in a browser. No page has business here: there
/// is no CORS, and programs send neither `Origin` nor `Sec-Fetch-Site`. (Other `Sec-Fetch-` headers count
/// for nothing, since some programs do send them.)
///
/// The decision endpoints answer proxies alone, whose requests bear what the browsers behind them sent.
fn check(api: &Api, request: &Request) -> Result<(), ApiError> {
    let path = request.uri().path();
    if path.starts_with("/authz/") || path == authz::grpc::CHECK {
        return Ok(());
    }
    let headers = request.headers();
    let host = match named_host(request.uri(), headers) {
        None => None,
        Some(text) => Some(Authority::parse(text).ok_or_else(unserved)?),
    };
    let allowed = &api.config.allowed_hosts;
    let is_allowed = host.as_ref().is_some_and(|host| allowed.iter().any(|a| a == host.host()));
    if !allowed.is_empty() && !is_allowed {
        return Err(unserved());
    }
    // A name may be made to lead here by whoever owns it (DNS rebinding), and then a page of that name is
    // of the same origin.
    let is_sure = || is_allowed || host.as_ref().is_some_and(is_address);
    let same = |origin: &HeaderValue| {
        let origin = origin.to_str().unwrap_or_default();
        let authority = origin.strip_prefix("http://").or(origin.strip_prefix("https://"));
        is_sure() && host.is_some() && authority.and_then(Authority::parse) == host
    };
    let known = |site: &HeaderValue| match site.as_bytes() {
        // Typed in, or a bookmark.
        b"none" => true,
        b"same-origin" => is_sure(),
        _ => false,
    };
    let is_own = headers.get_all(header::ORIGIN).iter().all(same)
        && headers.get_all(SEC_FETCH_SITE).iter().all(known);
    if is_own { Ok(()) } else { Err(ApiError::ForeignOrigin) }
}

fn unserved() -> ApiError {
    ApiError::Malformed("This host is not served here.".into())
}

/// Whether no DNS server has a say in where it leads.
fn is_address(host: &Authority<'_>) -> bool {
    let host = host.host();
    host == "localhost" || host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok()
}

pub(super) fn named_host<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> Option<&'a str> {
    match uri.authority() {
        Some(authority) => Some(authority.as_str()),
        None => headers.get(header::HOST).map(|host| host.to_str().unwrap_or_default()),
    }
}

/// Host and port that a request names, in their one spelling.
pub(super) fn host_of<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> Option<Authority<'a>> {
    named_host(uri, headers).and_then(Authority::parse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_told_from_names() {
        for (host, expected) in [
            ("127.0.0.1:8081", true),
            ("[::1]:80", true),
            ("LOCALHOST", true),
            ("localhost.example", false),
            ("otp.example", false),
            ("127.1", false),
            ("2130706433", false),
        ] {
            assert_eq!(is_address(&Authority::parse(host).unwrap()), expected, "{host}");
        }
    }
}
