//! What every request passes on its way in and out: host and origin checks, request id, common
//! headers, caught panics, one access line and one count.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt as _;
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Uri};

use super::Api;
use super::audit::{self, Subject};
use super::error::ApiError;
use crate::entry::Principal;
use crate::logging::{ACCESS, millis};
use crate::net::{Connection, new_request_id};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Names a request in logs and in its answer.
#[derive(Clone, Debug)]
pub(super) struct RequestId(String);

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
}

/// Wraps every route.
pub(super) async fn edge(
    State(api): State<Arc<Api>>,
    mut request: Request,
    next: Next,
) -> Response {
    let start = api.clock.now();
    let id = RequestId(new_request_id());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let peer = request.extensions().get::<Arc<Connection>>().and_then(|c| c.peer());
    request.extensions_mut().insert(id.clone());
    let management = audit::management(&request);

    let answered = match check(&api, &request) {
        Err(refusal) => Ok(refusal.into_response()),
        Ok(()) => AssertUnwindSafe(next.run(request)).catch_unwind().await,
    };
    // The panic hook counts and logs it.
    let mut response = answered.unwrap_or_else(|_| ApiError::Panic.into_response());

    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REQUEST_ID, HeaderValue::from_str(id.as_str()).expect("hexadecimal digits"));

    let note = response.extensions().get::<Note>().cloned().unwrap_or_default();
    let action = if note.action.is_empty() { "other" } else { note.action };
    let outcome = response.extensions().get::<Outcome>().map_or("ok", |outcome| outcome.0);
    let took = api.clock.now().monotonic.saturating_duration_since(start.monotonic);
    api.metrics.request("api", action, outcome);
    if let Some(action) = management {
        audit::log(action, &note, outcome, &id, peer);
    }
    tracing::info!(
        target: ACCESS,
        listener = "api",
        request_id = id.as_str(),
        client = peer.map(tracing::field::display),
        method = method.as_str(),
        path,
        status = response.status().as_u16(),
        action,
        outcome,
        reason = note.reason,
        realm = note.caller.as_ref().map(|caller| caller.realm.as_str()),
        name = note.caller.as_ref().map(|caller| caller.name.as_str()),
        duration_ms = millis(took),
    );
    response
}

/// Refuses names of other hosts (DNS rebinding) and pages of other hosts in a browser.
fn check(api: &Api, request: &Request) -> Result<(), ApiError> {
    let host = host_of(request.uri(), request.headers());
    let allowed = &api.config.allowed_hosts;
    if !allowed.is_empty() {
        let named = host.map(|host| without_port(host).to_ascii_lowercase());
        if !named.is_some_and(|host| allowed.contains(&host)) {
            return Err(ApiError::Malformed("This host is not served here.".into()));
        }
    }
    let mut origins = request.headers().get_all(header::ORIGIN).iter();
    let same = |origin: &HeaderValue| {
        let origin = origin.to_str().ok()?;
        let authority = origin.strip_prefix("http://").or(origin.strip_prefix("https://"))?;
        host.map(|host| host.eq_ignore_ascii_case(authority))
    };
    if origins.any(|origin| same(origin) != Some(true)) {
        return Err(ApiError::ForeignOrigin);
    }
    Ok(())
}

/// Host and port that a request names.
pub(super) fn host_of<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> Option<&'a str> {
    uri.authority()
        .map(http::uri::Authority::as_str)
        .or_else(|| headers.get(header::HOST)?.to_str().ok())
        .filter(|host| host.parse::<http::uri::Authority>().is_ok())
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !name.is_empty() => name,
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_cut_off() {
        for (host, name) in [
            ("otp.example:8081", "otp.example"),
            ("otp.example", "otp.example"),
            ("[::1]:80", "[::1]"),
            ("[::1]", "[::1]"),
            ("127.0.0.1:1", "127.0.0.1"),
        ] {
            assert_eq!(without_port(host), name);
        }
    }
}
