//! Why a request may not pass, and what its sender hears of it: little, the reason is for logs and
//! metrics.

use http::StatusCode;

use super::claim::Unclear;
use super::head::BadHead;
use crate::verifier::Refusal as Unproven;

/// Where nobody knows how long it takes.
const RETRY_AFTER_SECONDS: u64 = 5;

/// Why a request may not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
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
}

impl Refusal {
    /// `WWW-Authenticate` of a 401.
    pub const CHALLENGE: &str = r#"OTP realm="otpgate""#;
    /// `Allow` of a 405: all other methods pass too, but these are the ones that clients ask about.
    pub const ALLOW: &str = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";

    /// The status of the answer.
    #[must_use]
    pub fn status(self) -> StatusCode {
        match self {
            Self::Head(BadHead::Method) => StatusCode::METHOD_NOT_ALLOWED,
            Self::Head(_) | Self::Credentials(_) | Self::AmbiguousRoute => StatusCode::BAD_REQUEST,
            Self::Missing | Self::Unproven(Unproven::Denied(_)) => StatusCode::UNAUTHORIZED,
            Self::Unproven(Unproven::Throttled(_)) => StatusCode::TOO_MANY_REQUESTS,
            Self::Unproven(Unproven::Unavailable(_) | Unproven::NoMarks) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Forbidden | Self::NoRoute => StatusCode::FORBIDDEN,
        }
    }

    /// What the client hears; the same for all reasons of a 401.
    #[must_use]
    pub fn detail(self) -> &'static str {
        match self {
            Self::Head(BadHead::Method) => "Method not allowed.",
            Self::Head(_) | Self::AmbiguousRoute => "The request can be read in more than one way.",
            Self::Credentials(_) => "The credentials can be read in more than one way.",
            Self::Missing | Self::Unproven(Unproven::Denied(_)) => {
                "Valid authentication credentials are needed."
            }
            Self::Unproven(Unproven::Throttled(_)) => "Too many failed attempts.",
            Self::Unproven(Unproven::Unavailable(_) | Unproven::NoMarks) => {
                "Authentication is not available right now."
            }
            Self::Forbidden | Self::NoRoute => "You do not have permission to perform this action.",
        }
    }

    /// Seconds after which trying again may help.
    #[must_use]
    pub fn retry_after(self) -> Option<u64> {
        match self {
            Self::Unproven(Unproven::Throttled(throttled)) => Some(throttled.retry_after_seconds()),
            _ if self.status() == StatusCode::SERVICE_UNAVAILABLE => Some(RETRY_AFTER_SECONDS),
            _ => None,
        }
    }

    /// What it means for an operator: a bounded word for metrics.
    #[must_use]
    pub fn class(self) -> &'static str {
        match self.status() {
            StatusCode::UNAUTHORIZED => "unauthenticated",
            StatusCode::FORBIDDEN => "forbidden",
            StatusCode::TOO_MANY_REQUESTS => "throttled",
            StatusCode::SERVICE_UNAVAILABLE => "unavailable",
            _ => "malformed",
        }
    }

    /// A bounded word for logs.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Head(bad) => bad.reason(),
            Self::Credentials(unclear) => unclear.reason(),
            Self::AmbiguousRoute => "ambiguous_route",
            Self::Missing => "credentials_missing",
            Self::Unproven(unproven) => unproven.reason(),
            Self::Forbidden => "forbidden",
            Self::NoRoute => "no_route",
        }
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
