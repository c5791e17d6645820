//! What went wrong after the decision, and who is told what.

use pingora::proxy::{FailToProxy, Session};
use pingora::{Error, ErrorSource, ErrorType};
use tracing::warn;

use super::Gate;
use super::access::{Exchange, Outcome};
use super::refusal::Refusal;
use crate::net::BodyTooSlow;
#[cfg(doc)]
use crate::net::Connection;

/// A bounded word for what an upstream failed at.
pub(super) fn cause(error: &Error) -> &'static str {
    match error.etype() {
        ErrorType::ConnectTimedout | ErrorType::TLSHandshakeTimedout => "connect_timeout",
        ErrorType::ConnectRefused => "refused",
        ErrorType::ConnectNoRoute | ErrorType::ConnectError | ErrorType::SocketError => "connect",
        ErrorType::TLSHandshakeFailure | ErrorType::InvalidCert => "tls",
        ErrorType::ReadTimedout => "read_timeout",
        ErrorType::WriteTimedout => "write_timeout",
        ErrorType::ConnectionClosed | ErrorType::ReadError | ErrorType::WriteError => "closed",
        ErrorType::InvalidHTTPHeader | ErrorType::H1Error | ErrorType::H2Error => "protocol",
        _ => "other",
    }
}

/// Whether the client's guard ended the wait for an answer: see [`Connection::await_answer`].
fn is_late(error: &Error) -> bool {
    let cause = error.root_cause().downcast_ref::<std::io::Error>();
    *error.etype() == ErrorType::ReadError
        && error.esource() == &ErrorSource::Downstream
        && cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::TimedOut)
}

/// Whether the client's guard broke its body off: see [`Connection::await_body`].
fn is_slow(error: &Error) -> bool {
    let cause = error.root_cause().downcast_ref::<std::io::Error>();
    cause.and_then(std::io::Error::get_ref).is_some_and(|cause| cause.is::<BodyTooSlow>())
}

/// What the client is told; `None`: it is gone.
fn verdict(error: &Error, body_is_done: bool) -> Option<Refusal> {
    match (error.esource(), error.etype()) {
        _ if is_slow(error) => Some(Refusal::BodyTooSlow),
        _ if is_late(error) => Some(Refusal::SlowUpstream),
        (_, ErrorType::HTTPStatus(413)) => Some(Refusal::BodyTooLarge),
        (ErrorSource::Downstream, ErrorType::ReadTimedout) => Some(Refusal::BodyTooSlow),
        (
            ErrorSource::Downstream,
            ErrorType::WriteError
            | ErrorType::WriteTimedout
            | ErrorType::ReadError
            | ErrorType::ConnectionClosed
            | ErrorType::H2Error,
        ) => None,
        (ErrorSource::Downstream, _) => Some(Refusal::Malformed),
        // The upstream waits for the rest of a body that does not come.
        (ErrorSource::Upstream, ErrorType::ReadTimedout) if !body_is_done => {
            Some(Refusal::BodyTooSlow)
        }
        (
            ErrorSource::Upstream,
            ErrorType::ReadTimedout
            | ErrorType::WriteTimedout
            | ErrorType::ConnectTimedout
            | ErrorType::TLSHandshakeTimedout,
        ) => Some(Refusal::SlowUpstream),
        (ErrorSource::Upstream, _) => Some(Refusal::BadUpstream),
        (ErrorSource::Internal | ErrorSource::Unset, _) => Some(Refusal::Internal),
    }
}

impl Gate {
    /// Answers a request that could not be forwarded or whose answer broke off.
    pub(super) async fn answer_failure(
        &self,
        session: &mut Session,
        error: &Error,
        exchange: &mut Exchange,
    ) -> FailToProxy {
        let verdict = verdict(error, session.as_mut().is_body_done());
        self.note_failure(error, exchange);
        exchange.outcome = verdict.map_or(Outcome::ClientGone, Outcome::Failed);
        let answered =
            session.response_written().is_some_and(|response| !response.status.is_informational());
        let mut error_code = 0;
        if let Some(refusal) = verdict
            && !answered
        {
            // The connection may hold the rest of a body, or of a broken answer.
            session.set_keepalive(None);
            error_code = refusal.status().as_u16();
            // The client may be gone by now; the log line says so.
            if refusal.answer(session, &exchange.request_id).await.is_err() {
                exchange.outcome = Outcome::ClientGone;
            }
        }
        FailToProxy { error_code, can_reuse_downstream: false }
    }

    fn note_failure(&self, error: &Error, exchange: &Exchange) {
        let request_id = exchange.request_id.as_str();
        match error.esource() {
            ErrorSource::Upstream => {
                // Failures to connect were counted one by one.
                if exchange.sent_at.is_some() {
                    self.metrics.upstream_failure(cause(error));
                }
                warn!(request_id, %error, "the upstream failed");
            }
            ErrorSource::Downstream if is_late(error) && !is_slow(error) => {
                self.metrics.upstream_failure("read_timeout");
                warn!(request_id, "the upstream does not begin to answer");
            }
            ErrorSource::Downstream => {}
            // What a client sent may stand in the error's text: the type is enough.
            ErrorSource::Internal | ErrorSource::Unset => {
                warn!(
                    request_id,
                    error = error.etype().as_str(),
                    "a request could not be forwarded"
                );
            }
        }
    }
}
