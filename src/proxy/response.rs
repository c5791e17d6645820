//! Heads of upstreams' answers, made fit for the client's connection.

use http::header::{CONNECTION, CONTENT_LENGTH, PROXY_AUTHENTICATE, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderName, Version};
use pingora::http::ResponseHeader;
use pingora::proxy::Session;
use pingora::{Error, ErrorType};

use super::Gate;
use super::access::Exchange;
use super::headers::REQUEST_ID;
use super::request::Kind;

/// An upstream connection's own headers, besides those that it nominates.
static OF_CONNECTION: [HeaderName; 4] = [
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    UPGRADE,
];

impl Gate {
    /// Adapts the head of a final answer, or of a 101.
    ///
    /// # Errors
    /// If it is a 101 that nobody asked for.
    pub(super) fn adapt(
        session: &mut Session,
        response: &mut ResponseHeader,
        exchange: &mut Exchange,
    ) -> pingora::Result<()> {
        let upgraded = response.status == 101;
        let may_upgrade =
            exchange.survey.kind == Kind::WebSocket && response.version == Version::HTTP_11;
        if upgraded && !may_upgrade {
            let unasked = "a 101 that was not asked for";
            return Err(Error::explain(ErrorType::InvalidHTTPHeader, unasked).into_up());
        }
        exchange.upstream_status = Some(response.status.as_u16());
        if let Some(connection) = &exchange.connection {
            connection.answered();
        }
        Self::close_if_stopping(session, exchange);
        if upgraded {
            // A tunnel is silent for as long as the upstream's side may be.
            session.set_read_timeout(Some(exchange.regime.timeouts.stream_idle));
        } else {
            strip_hop_by_hop(response);
            // The version is that of this connection, not the upstream's (RFC 9110 section 2.5).
            response.set_version(Version::HTTP_11);
            frame(session, response);
        }
        response.insert_header(REQUEST_ID, exchange.request_id.header())
    }
}

/// Takes chunks from those who do not know them: HTTP/2 frames by itself, and for HTTP/1.0 the end of
/// the connection ends the body.
fn frame(session: &mut Session, response: &mut ResponseHeader) {
    let version = session.req_header().version;
    if matches!(version, Version::HTTP_2 | Version::HTTP_10)
        && response.remove_header(&TRANSFER_ENCODING).is_some()
        && version == Version::HTTP_10
    {
        session.set_keepalive(None);
    }
}

/// Removes the upstream connection's own headers from a response (RFC 9110 section 7.6.1); pingora
/// sets `Connection` for the client's connection afterwards.
fn strip_hop_by_hop(response: &mut ResponseHeader) {
    let mut unwanted = nominated(response);
    unwanted.extend(response.headers.keys().filter(|name| OF_CONNECTION.contains(name)).cloned());
    for name in unwanted {
        response.remove_header(&name);
    }
}

/// What `Connection` nominates, but for what says where the body ends.
fn nominated(response: &ResponseHeader) -> Vec<HeaderName> {
    let values = response.headers.get_all(CONNECTION).iter();
    // Said most often, and removed anyway.
    let values = values.filter(|value| *value != "keep-alive");
    let names = values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
    let names = names.filter_map(|name| name.trim().parse().ok());
    names.filter(|name| *name != CONTENT_LENGTH && *name != TRANSFER_ENCODING).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn responses_lose_what_belongs_to_the_connection() {
        let mut response = ResponseHeader::build(200, None).unwrap();
        for (name, value) in [
            ("connection", "close, x-hop, content-length"),
            ("x-hop", "1"),
            ("keep-alive", "timeout=5"),
            ("content-length", "3"),
            ("server", "upstream"),
            ("upgrade", "h2c"),
            ("Proxy-Connection", "keep-alive"),
            ("proxy-authenticate", "Basic"),
        ] {
            response.append_header(name, value).unwrap();
        }
        strip_hop_by_hop(&mut response);
        for gone in ["x-hop", "keep-alive", "upgrade", "proxy-connection", "proxy-authenticate"] {
            assert!(!response.headers.contains_key(gone), "{gone}");
        }
        assert_eq!(response.headers["content-length"], "3");
        assert_eq!(response.headers["server"], "upstream");
    }
}
