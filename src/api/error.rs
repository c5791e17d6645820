//! What the API refuses, and the one function that makes answers of it.
//!
//! Callers hear little; the log hears the cause.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::{ALLOW, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use serde_json::{Value, json};

use super::edge::Outcome;
use crate::entry::Overlapping;
use crate::store::StoreError;

/// Messages by field, as Django REST framework gives them.
pub(super) type FieldErrors = BTreeMap<&'static str, Vec<String>>;

/// Why a request is not done.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    /// Not a request that can be understood; the text is for the caller and quotes no body.
    #[error("{0}")]
    Malformed(String),
    /// Bad fields.
    #[error("bad fields")]
    Fields(FieldErrors),
    /// The authenticating triple is missing, malformed or not proven.
    #[error("not authenticated")]
    Unproven,
    /// Proven, but without the capability; or the token to be verified is not proven.
    #[error("not permitted")]
    Forbidden,
    /// An admin asks for a seed where they are hidden.
    #[error("seeds are hidden")]
    SeedsHidden,
    /// A browser's request from a page of another host.
    #[error("request of a foreign page")]
    ForeignOrigin,
    /// No such path, or an id that is no number.
    #[error("no such resource")]
    NotFound,
    /// No such entry.
    #[error("no such entry")]
    NoEntry,
    /// The resource is there, but has no such method; these it has.
    #[error("method not allowed")]
    Method(http::Method, &'static str),
    /// gRPC over HTTP/1.1.
    #[error("HTTP/2 needed")]
    Http2Needed,
    /// The caller takes none of the types that there are.
    #[error("not acceptable")]
    NotAcceptable,
    /// The body is of no known type.
    #[error("unsupported media type")]
    MediaType(String),
    /// The body is compressed, or whatever else `Content-Encoding` says.
    #[error("encoded body")]
    Encoded,
    /// The body is larger than the limit.
    #[error("body too large")]
    TooLarge,
    /// Too many large bodies are being read at once.
    #[error("too many large bodies")]
    Busy,
    /// The body did not come in time.
    #[error("body too slow")]
    TooSlow,
    /// The entry keeps being changed by others.
    #[error("conflict")]
    Conflict,
    /// Too many tokens were wrong; for so many seconds.
    #[error("throttled")]
    Throttled(u64),
    /// A rotation that would drop a seed which callers may use.
    #[error(transparent)]
    Overlapping(#[from] Overlapping),
    /// Nobody can say whether the claim is proven: fail closed.
    #[error("entries are unavailable")]
    Unavailable,
    /// The store did not do what was asked.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A bug.
    #[error("panic")]
    Panic,
}

impl ApiError {
    /// One field with one message.
    pub(super) fn field(name: &'static str, message: &str) -> Self {
        Self::Fields(FieldErrors::from([(name, vec![message.to_owned()])]))
    }

    /// Status, bounded word for metrics, body.
    fn parts(&self) -> (StatusCode, &'static str, Value) {
        use StatusCode as S;
        let detail = |text: &str| json!({ "detail": text });
        match self {
            Self::Malformed(text) => (S::BAD_REQUEST, "malformed", detail(text)),
            Self::Fields(errors) => (S::BAD_REQUEST, "invalid", json!(errors)),
            Self::Unproven => {
                (S::FORBIDDEN, "unproven", detail("Incorrect authentication credentials."))
            }
            Self::Forbidden => (
                S::FORBIDDEN,
                "forbidden",
                detail("You do not have permission to perform this action."),
            ),
            Self::SeedsHidden => (
                S::FORBIDDEN,
                "seeds_hidden",
                detail(
                    "Seeds are not shown here (`api.reveal_seeds` is off), only by the answer that \
                     creates or rotates the entry.",
                ),
            ),
            Self::ForeignOrigin => {
                (S::FORBIDDEN, "foreign_origin", detail("Requests of foreign pages are refused."))
            }
            Self::NotFound => (S::NOT_FOUND, "not_found", detail("Not found.")),
            Self::NoEntry => {
                (S::NOT_FOUND, "not_found", detail("No OTPSeed matches the given query."))
            }
            Self::Method(method, _) => (
                S::METHOD_NOT_ALLOWED,
                "method",
                detail(&format!("Method \"{method}\" not allowed.")),
            ),
            Self::Http2Needed => (
                S::HTTP_VERSION_NOT_SUPPORTED,
                "http_version",
                detail("gRPC needs HTTP/2: over TLS, or without where `h2c` is on."),
            ),
            Self::NotAcceptable => (
                S::NOT_ACCEPTABLE,
                "not_acceptable",
                detail("Could not satisfy the request Accept header."),
            ),
            Self::MediaType(of) => (
                S::UNSUPPORTED_MEDIA_TYPE,
                "media_type",
                detail(&format!("Unsupported media type \"{of}\" in request.")),
            ),
            Self::Encoded => (
                S::UNSUPPORTED_MEDIA_TYPE,
                "media_type",
                detail("Content-Encoding is not supported: send the body as it is."),
            ),
            Self::TooLarge => {
                (S::BAD_REQUEST, "too_large", detail("The request's body is too large."))
            }
            Self::Busy => (
                S::SERVICE_UNAVAILABLE,
                "busy",
                detail("Too many large requests at once, try again later."),
            ),
            Self::TooSlow => {
                (S::REQUEST_TIMEOUT, "too_slow", detail("The request's body came too slowly."))
            }
            Self::Conflict | Self::Store(StoreError::Conflict) => (
                S::CONFLICT,
                "conflict",
                detail("The entry is being changed by somebody else, try again."),
            ),
            Self::Throttled(seconds) => {
                let text =
                    format!("Request was throttled. Expected available in {seconds} seconds.");
                (S::TOO_MANY_REQUESTS, "throttled", detail(&text))
            }
            Self::Overlapping(_) => (
                S::CONFLICT,
                "overlapping",
                detail(
                    "An earlier rotation still overlaps: say with `keep` whether callers use the \
                     `current` seed already or still the `previous` one, or give an `overlap` of 0.",
                ),
            ),
            Self::Store(StoreError::Unknown(_)) => (
                S::SERVICE_UNAVAILABLE,
                "unknown_outcome",
                detail("Whether this was done is unknown: look before trying again."),
            ),
            Self::Unavailable | Self::Store(_) => (
                S::SERVICE_UNAVAILABLE,
                "unavailable",
                detail("Entries are not available right now, try again later."),
            ),
            Self::Panic => {
                (S::INTERNAL_SERVER_ERROR, "panic", detail("An internal error has happened."))
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, outcome, body) = self.parts();
        let mut response = json_response(status, &body);
        response.extensions_mut().insert(Outcome(outcome));
        match self {
            Self::Method(_, allow) => {
                response.headers_mut().insert(ALLOW, HeaderValue::from_static(allow));
            }
            Self::Throttled(seconds) => {
                response.headers_mut().insert(RETRY_AFTER, seconds.into());
            }
            _ => {}
        }
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

/// A JSON answer.
pub(super) fn json_response(status: StatusCode, body: &Value) -> Response {
    json_text(status, body.to_string())
}

/// As [`json_response`], of JSON that is written already.
pub(super) fn json_text(status: StatusCode, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}
