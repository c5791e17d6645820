//! Answers of the gate itself: little for the client, the reason for logs and metrics.

use bytes::Bytes;
use http::{Method, StatusCode, header};
use pingora::http::ResponseHeader;
use pingora::proxy::Session;

use super::credentials::Unclear;
use super::headers::REQUEST_ID;
use super::request::{ALLOW, BadHead};
use crate::net::refusal_body;
use crate::verifier::Refusal as Unproven;

/// Where nobody knows how long it takes.
const RETRY_AFTER_SECONDS: u64 = 5;
const CHALLENGE: &str = r#"OTP realm="otpgate""#;

/// Why a request gets no answer of the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The head is unclear.
    Head(BadHead),
    /// The credentials are unclear.
    Credentials(Unclear),
    /// Two routes may govern the path.
    AmbiguousRoute,
    /// No credentials.
    Missing,
    /// Not proven, or nobody can say.
    Unproven(Unproven),
    /// Proven, but the route is not open to the principal.
    Forbidden,
    /// Proven, but no route governs the request.
    NoRoute,
    /// The body is larger than allowed.
    BodyTooLarge,
    /// The client sends its body too slowly.
    BodyTooSlow,
    /// The client's bytes make no sense.
    Malformed,
    /// No upstream server can be reached, or it answers nonsense.
    BadUpstream,
    /// The upstream did not answer in time.
    SlowUpstream,
    /// A bug.
    Internal,
}

impl Refusal {
    pub(super) fn status(self) -> StatusCode {
        match self {
            Self::Head(BadHead::Method) => StatusCode::METHOD_NOT_ALLOWED,
            Self::Head(BadHead::Headers) => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::Head(_) | Self::Credentials(_) | Self::AmbiguousRoute | Self::Malformed => {
                StatusCode::BAD_REQUEST
            }
            Self::Missing | Self::Unproven(Unproven::Denied(_)) => StatusCode::UNAUTHORIZED,
            Self::Unproven(Unproven::Throttled(_)) => StatusCode::TOO_MANY_REQUESTS,
            Self::Unproven(Unproven::Unavailable(_) | Unproven::NoMarks) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Forbidden | Self::NoRoute => StatusCode::FORBIDDEN,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::BadUpstream => StatusCode::BAD_GATEWAY,
            Self::SlowUpstream => StatusCode::GATEWAY_TIMEOUT,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// What the client hears; the same for all reasons of a 401.
    fn detail(self) -> &'static str {
        match self {
            Self::Head(BadHead::Method) => "Method not allowed.",
            Self::Head(BadHead::Headers) => "The request has too many headers.",
            Self::Head(_) | Self::AmbiguousRoute | Self::Malformed => {
                "The request can be read in more than one way."
            }
            Self::Credentials(_) => "The credentials can be read in more than one way.",
            Self::Missing | Self::Unproven(Unproven::Denied(_)) => {
                "Valid authentication credentials are needed."
            }
            Self::Unproven(Unproven::Throttled(_)) => "Too many failed attempts.",
            Self::Unproven(Unproven::Unavailable(_) | Unproven::NoMarks) => {
                "Authentication is not available right now."
            }
            Self::Forbidden | Self::NoRoute => "You do not have permission to perform this action.",
            Self::BodyTooLarge => "The request's body is too large.",
            Self::BodyTooSlow => "The request's body took too long.",
            Self::BadUpstream => "The service cannot be reached.",
            Self::SlowUpstream => "The service did not answer in time.",
            Self::Internal => "Internal error.",
        }
    }

    /// Seconds after which trying again may help.
    fn retry_after(self) -> Option<u64> {
        match self {
            Self::Unproven(Unproven::Throttled(throttled)) => Some(throttled.retry_after_seconds()),
            _ if self.status() == StatusCode::SERVICE_UNAVAILABLE => Some(RETRY_AFTER_SECONDS),
            _ => None,
        }
    }

    /// A bounded word for logs.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Head(bad) => bad.reason(),
            Self::Credentials(unclear) => unclear.reason(),
            Self::AmbiguousRoute => "ambiguous_route",
            Self::Missing => "credentials_missing",
            Self::Unproven(unproven) => unproven.reason(),
            Self::Forbidden => "forbidden",
            Self::NoRoute => "no_route",
            Self::BodyTooLarge => "body_too_large",
            Self::BodyTooSlow => "body_too_slow",
            Self::Malformed => "malformed",
            Self::BadUpstream => "bad_upstream",
            Self::SlowUpstream => "slow_upstream",
            Self::Internal => "internal",
        }
    }

    /// Writes the answer.
    ///
    /// # Errors
    /// If the client is gone.
    pub(super) async fn answer(
        self,
        session: &mut Session,
        request_id: &str,
    ) -> pingora::Result<()> {
        let body = Bytes::from(refusal_body(self.detail(), request_id));
        let mut response = ResponseHeader::build(self.status(), Some(8))?;
        response.insert_header(header::CONTENT_TYPE, "application/json")?;
        response.insert_header(header::CONTENT_LENGTH, body.len())?;
        response.insert_header(header::CACHE_CONTROL, "no-store")?;
        response.insert_header(REQUEST_ID, request_id)?;
        match self.status() {
            StatusCode::UNAUTHORIZED => {
                response.insert_header(header::WWW_AUTHENTICATE, CHALLENGE)?;
            }
            StatusCode::METHOD_NOT_ALLOWED => response.insert_header(header::ALLOW, ALLOW)?,
            _ => {}
        }
        if let Some(seconds) = self.retry_after() {
            response.insert_header(header::RETRY_AFTER, seconds.to_string())?;
        }
        if session.req_header().method == Method::HEAD {
            return session.write_response_header(Box::new(response), true).await;
        }
        session.write_response_header(Box::new(response), false).await?;
        session.write_response_body(Some(body), true).await
    }
}

impl From<BadHead> for Refusal {
    fn from(bad: BadHead) -> Self {
        Self::Head(bad)
    }
}

impl From<Unclear> for Refusal {
    fn from(unclear: Unclear) -> Self {
        Self::Credentials(unclear)
    }
}
