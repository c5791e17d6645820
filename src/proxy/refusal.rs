//! Answers of the gate itself: little for the client, the reason for logs and metrics.

use bytes::Bytes;
use http::{Method, StatusCode, header};
use pingora::http::ResponseHeader;
use pingora::proxy::Session;

use super::headers::{REQUEST_ID, RequestId};
use crate::decision::{self, BadHead};
use crate::net::framing::Unclear;
use crate::net::refusal_body;

/// Why a request gets no answer of the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It may not pass.
    Decided(decision::Refusal),
    /// Where its head or body ends is unclear.
    Framing(Unclear),
    /// Too many headers.
    TooManyHeaders,
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
            Self::Decided(refusal) => refusal.status(),
            Self::Framing(_) | Self::Malformed => StatusCode::BAD_REQUEST,
            Self::TooManyHeaders => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::BadUpstream => StatusCode::BAD_GATEWAY,
            Self::SlowUpstream => StatusCode::GATEWAY_TIMEOUT,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// What the client hears.
    fn detail(self) -> &'static str {
        match self {
            Self::Decided(refusal) => refusal.detail(),
            Self::Framing(_) | Self::Malformed => "The request can be read in more than one way.",
            Self::TooManyHeaders => "The request has too many headers.",
            Self::BodyTooLarge => "The request's body is too large.",
            Self::BodyTooSlow => "The request's body took too long.",
            Self::BadUpstream => "The service cannot be reached.",
            Self::SlowUpstream => "The service did not answer in time.",
            Self::Internal => "Internal error.",
        }
    }

    /// What it means for an operator: a bounded word for metrics.
    pub(super) fn class(self) -> &'static str {
        match self {
            Self::Decided(refusal) => refusal.class(),
            _ => "malformed",
        }
    }

    /// Whether it is unclear where the request ends.
    pub(super) fn is_of_head(self) -> bool {
        matches!(
            self,
            Self::Framing(_) | Self::TooManyHeaders | Self::Decided(decision::Refusal::Head(_))
        )
    }

    /// A bounded word for logs.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Decided(refusal) => refusal.reason(),
            Self::Framing(Unclear::Fragment) => "bad_target",
            Self::Framing(Unclear::Framing) => "bad_framing",
            Self::Framing(Unclear::LineEnd) => "bad_line_end",
            Self::TooManyHeaders => "too_many_headers",
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
        request_id: &RequestId,
    ) -> pingora::Result<()> {
        let body = Bytes::from(refusal_body(self.detail(), request_id.as_str()));
        let mut response = ResponseHeader::build(self.status(), Some(8))?;
        response.insert_header(header::CONTENT_TYPE, "application/json")?;
        response.insert_header(header::CONTENT_LENGTH, body.len())?;
        response.insert_header(header::CACHE_CONTROL, "no-store")?;
        response.insert_header(REQUEST_ID, request_id.header())?;
        match self.status() {
            StatusCode::UNAUTHORIZED => {
                response.insert_header(header::WWW_AUTHENTICATE, decision::Refusal::CHALLENGE)?;
            }
            StatusCode::METHOD_NOT_ALLOWED => {
                response.insert_header(header::ALLOW, decision::Refusal::ALLOW)?;
            }
            _ => {}
        }
        if let Self::Decided(refusal) = self
            && let Some(seconds) = refusal.retry_after()
        {
            response.insert_header(header::RETRY_AFTER, seconds.to_string())?;
        }
        if session.req_header().method == Method::HEAD {
            return session.write_response_header(Box::new(response), true).await;
        }
        session.write_response_header(Box::new(response), false).await?;
        session.write_response_body(Some(body), true).await
    }
}

impl From<decision::Refusal> for Refusal {
    fn from(refusal: decision::Refusal) -> Self {
        Self::Decided(refusal)
    }
}

impl From<BadHead> for Refusal {
    fn from(bad: BadHead) -> Self {
        Self::Decided(bad.into())
    }
}

impl From<Unclear> for Refusal {
    fn from(unclear: Unclear) -> Self {
        Self::Framing(unclear)
    }
}
