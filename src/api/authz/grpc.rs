//! Envoy's external authorization over gRPC: `envoy.service.auth.v3.Authorization/Check`.
//!
//! A call passes two places. [`Api::check`], inside the edge, decides and answers as for the other
//! dialects, so that log and metrics are theirs. [`pack`], outside of it, makes a `CheckResponse` of any
//! answer, whoever gave it. So whatever is wrong with a call is a denial, never an error of gRPC or HTTP:
//! Envoy's `failure_mode_allow` lets requests pass whose check has failed, and most of a check is what the
//! request's sender wrote.

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse as _, Response};
use envoy_types::ext_authz::v3::pb::CheckRequest;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Method, StatusCode, Version, request};
use prost::Message as _;

use super::{Denied, Dialect, deny};
use crate::api::edge::{Note, Outcome};
use crate::api::error::ApiError;
use crate::api::{Api, body, request_id};
use crate::verifier::Permit;

mod message;
mod told;

use message::{Allowed, allowance, denial, framed};
use told::Description;
#[cfg(any(test, fuzzing))]
pub use told::fuzz;

/// The method's path.
pub(in crate::api) const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";
/// Bytes that a message may have beyond those of the head that it describes: certificates of both ends,
/// metadata, what operators add.
const MESSAGE_BYTES: usize = 64 << 10;
/// A flag (compressed or not) and the message's length.
const PREFIX_BYTES: usize = 5;

/// Why a call gets no permission.
enum Wrong {
    /// It is no call that can be read.
    Call(ApiError),
    /// What it asks for is denied.
    Denied(Denied),
}

impl From<ApiError> for Wrong {
    fn from(error: ApiError) -> Self {
        Self::Call(error)
    }
}

impl From<Denied> for Wrong {
    fn from(denied: Denied) -> Self {
        Self::Denied(denied)
    }
}

/// Answers calls in gRPC. Wraps the edge.
pub(in crate::api) async fn pack<R: Future<Output = Response>>(
    request: Request,
    next: impl FnOnce(Request) -> R,
) -> Response {
    let kind = request.headers().get(CONTENT_TYPE);
    if explain(request.method(), request.version(), kind).is_err() {
        return next(request).await;
    }
    let (head, body) = next(request).await.into_parts();
    match head.extensions.get::<Allowed>().filter(|_| head.status == StatusCode::OK) {
        Some(allowed) => framed(&allowance(allowed)),
        None => framed(&denial(head.status, &head.headers, body).await),
    }
}

impl Api {
    /// Decides about the request that a call describes.
    pub(in crate::api) async fn check(&self, request: Request) -> Response {
        let mut note = Note { action: "authz", ..Note::default() };
        let (head, body) = request.into_parts();
        let mut response = match self.pass(&head, body, &mut note).await {
            Ok((allowed, outcome)) => {
                let mut response = StatusCode::OK.into_response();
                response.extensions_mut().insert(allowed);
                response.extensions_mut().insert(Outcome(outcome));
                response
            }
            Err(Wrong::Call(error)) => error.into_response(),
            Err(Wrong::Denied(denied)) => {
                deny(Dialect::ExtAuthz, denied, request_id(&head), &mut note)
            }
        };
        response.extensions_mut().insert(note);
        response
    }

    async fn pass(
        &self,
        head: &request::Parts,
        body: Body,
        note: &mut Note,
    ) -> Result<(Allowed, &'static str), Wrong> {
        explain(&head.method, head.version, head.headers.get(CONTENT_TYPE))?;
        self.check_asker(head)?;
        let request = self.read_call(body).await?;
        let names = self.decider.names();
        let described = Description::read(&request, names, self.config.limits.max_headers)?;
        let (permit, outcome) = self.rule(described.told(), request_id(head), note).await?;
        let allowed = Allowed::new(self, permit.as_ref().map(Permit::principal));
        note.caller = permit.map(Permit::into_principal);
        Ok((allowed, outcome))
    }

    /// Reads the one message of a call.
    async fn read_call(&self, body: Body) -> Result<CheckRequest, ApiError> {
        let limits = &self.config.limits;
        let bytes = PREFIX_BYTES + MESSAGE_BYTES + limits.max_head_bytes;
        let limits = body::Limits { bytes, time: limits.body_timeout };
        let framed = body::read_bytes(body, limits).await?;
        let message = match framed.split_first_chunk::<PREFIX_BYTES>() {
            Some(([1, ..], _)) => return Err(ApiError::Encoded),
            Some(([0, a, b, c, d], message)) => {
                let length = u32::from_be_bytes([*a, *b, *c, *d]);
                Some(message).filter(|message| usize::try_from(length) == Ok(message.len()))
            }
            _ => None,
        };
        let request = message.and_then(|message| CheckRequest::decode(message).ok());
        request.ok_or_else(|| ApiError::Malformed("The call cannot be read.".into()))
    }
}

/// Tells whoever does not speak gRPC what is wrong.
fn explain(
    method: &Method,
    version: Version,
    content_type: Option<&HeaderValue>,
) -> Result<(), ApiError> {
    match content_type.map(HeaderValue::as_bytes) {
        _ if *method != Method::POST => Err(ApiError::Method(method.clone(), "POST")),
        _ if version != Version::HTTP_2 => Err(ApiError::Http2Needed),
        Some(b"application/grpc" | b"application/grpc+proto") => Ok(()),
        other => {
            let other = String::from_utf8_lossy(other.unwrap_or_default());
            Err(ApiError::MediaType(other.chars().take(128).collect()))
        }
    }
}
