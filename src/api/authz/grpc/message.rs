//! Answers as `CheckResponse`s.

use std::future::ready;

use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use bytes::{BufMut as _, BytesMut};
use envoy_types::ext_authz::v3::pb::{
    CheckResponse, DeniedHttpResponse, HeaderAppendAction, HeaderValue, HeaderValueOption,
    HttpResponse, HttpStatus, OkHttpResponse,
};
use envoy_types::pb::google::rpc::Status;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, StatusCode};
use http_body_util::{BodyExt as _, Full};
use prost::Message as _;

use super::PREFIX_BYTES;
use crate::api::Api;
use crate::api::edge::REQUEST_ID;
use crate::decision::identity;
use crate::entry::Principal;

/// Codes of `google.rpc.Status`, which are also gRPC's.
const OK: i32 = 0;
const PERMISSION_DENIED: i32 = 7;
const UNAUTHENTICATED: i32 = 16;
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// Headers of a refusal that the request's sender gets.
const SHOWN: [HeaderName; 6] =
    [CONTENT_TYPE, CACHE_CONTROL, REQUEST_ID, WWW_AUTHENTICATE, RETRY_AFTER, ALLOW];
/// More than any refusal says.
const MAX_BODY_BYTES: usize = 64 << 10;

/// What Envoy is to make of the headers of a request that passes: an extension of its answer.
#[derive(Clone, Debug)]
pub(super) struct Allowed(OkHttpResponse);

impl Allowed {
    /// Names who is proven, and removes what else would say so, and credentials.
    pub(super) fn new(api: &Api, who: Option<&Principal>) -> Self {
        let names = api.decider.names();
        let set_all = who.into_iter().flat_map(|who| identity(names, who));
        let unproven = names.identity().filter(|_| who.is_none());
        let remove = api.headers_to_remove().chain(unproven);
        Self(OkHttpResponse {
            headers: set_all.map(|(name, value)| set(name, value.into_owned())).collect(),
            headers_to_remove: remove.map(HeaderName::to_string).collect(),
            ..OkHttpResponse::default()
        })
    }
}

/// Lets a request pass.
pub(super) fn allowance(Allowed(allowed): &Allowed) -> CheckResponse {
    response(OK, HttpResponse::OkResponse(allowed.clone()))
}

/// Refuses a request with this answer.
pub(super) async fn denial(status: StatusCode, headers: &HeaderMap, body: Body) -> CheckResponse {
    let code = match status {
        StatusCode::UNAUTHORIZED => UNAUTHENTICATED,
        _ => PERMISSION_DENIED,
    };
    // Envoy takes nothing below 200, and 200 would look like the upstream's.
    let status = if status.is_success() { StatusCode::FORBIDDEN } else { status };
    let shown = headers.iter().filter(|(name, _)| SHOWN.contains(name));
    let shown = shown.filter_map(|(name, value)| Some(set(name, value.to_str().ok()?.to_owned())));
    let body = axum::body::to_bytes(body, MAX_BODY_BYTES).await.unwrap_or_default();
    let denied = DeniedHttpResponse {
        status: Some(HttpStatus { code: i32::from(status.as_u16()) }),
        headers: shown.collect(),
        body: String::from_utf8_lossy(&body).into_owned(),
    };
    response(code, HttpResponse::DeniedResponse(denied))
}

fn response(code: i32, http: HttpResponse) -> CheckResponse {
    CheckResponse {
        status: Some(Status { code, ..Status::default() }),
        http_response: Some(http),
        ..CheckResponse::default()
    }
}

/// One header, instead of any that are there. Envoy reads `value`, never `raw_value`.
fn set(name: &HeaderName, value: String) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(HeaderValue { key: name.to_string(), value, raw_value: Vec::new() }),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
        ..HeaderValueOption::default()
    }
}

/// The one message of an answer, and the status that ends it.
pub(super) fn framed(message: &CheckResponse) -> Response {
    let message = message.encode_to_vec();
    let mut data = BytesMut::with_capacity(PREFIX_BYTES + message.len());
    data.put_u8(0);
    data.put_u32(u32::try_from(message.len()).expect("headers and body are bounded"));
    data.put_slice(&message);
    let trailers = HeaderMap::from_iter([(GRPC_STATUS, OK.into())]);
    let body = Full::new(data.freeze()).with_trailers(ready(Some(Ok(trailers))));
    ([(CONTENT_TYPE, "application/grpc")], Body::new(body)).into_response()
}
