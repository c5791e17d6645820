//! pingora without a gate: a proxy that says where requests go and decides nothing, with the pool of idle
//! connections and the number of threads that the gate has when it is measured.

use std::mem;
use std::net::SocketAddr;

use async_trait::async_trait;
use http::header::{FORWARDED, HeaderName, HeaderValue};
use http::request::Parts;
use otpgate::config::{Limits, UpstreamTimeouts};
use otpgate::net::{Connection, new_request_id};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::prelude::HttpPeer;
use pingora::proxy::{ProxyHttp, Session};
use pingora::server::configuration::ServerConf;
use serde::{Deserialize, Serialize};

/// As `src/proxy.rs` has it.
const UPSTREAM_POOL: usize = 1024;

/// The settings.
pub(crate) fn conf(threads: usize) -> ServerConf {
    let upstream_keepalive_pool_size = UPSTREAM_POOL;
    ServerConf { threads, upstream_keepalive_pool_size, ..ServerConf::default() }
}

/// What a proxy does besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Does {
    /// Nothing.
    Nothing,
    /// It is on the gate's own listener, whose guard it tells when a head is read, as it must.
    OurListener,
    /// That, and all that any gate in front of such an upstream asks of pingora: time-outs, the token taken away,
    /// the forwarding headers, an id of the request. The headers' values cost nothing here.
    OurDuties,
}

/// The proxy.
pub(crate) struct Bare {
    pub(crate) upstream: SocketAddr,
    pub(crate) does: Does,
}

impl Bare {
    fn has_duties(&self) -> bool {
        self.does == Does::OurDuties
    }
}

#[async_trait]
impl ProxyHttp for Bare {
    /// The request's id.
    type CTX = String;

    fn new_ctx(&self) -> String {
        String::new()
    }

    async fn early_request_filter(
        &self,
        session: &mut Session,
        id: &mut String,
    ) -> pingora::Result<()> {
        if self.does != Does::Nothing
            && let Some(connection) = Connection::of(session.as_downstream())
        {
            connection.head_done();
        }
        if self.has_duties() {
            *id = new_request_id();
            let limits = Limits::default();
            session.set_read_timeout(Some(limits.body_timeout));
            session.set_total_drain_timeout(Some(limits.body_timeout));
            session.set_pipelining_enabled(true);
        }
        Ok(())
    }

    async fn upstream_peer(
        &self,
        _: &mut Session,
        _: &mut String,
    ) -> pingora::Result<Box<HttpPeer>> {
        let mut peer = Box::new(HttpPeer::new(self.upstream, false, String::new()));
        if self.has_duties() {
            let timeouts = UpstreamTimeouts::default();
            let options = &mut peer.options;
            options.connection_timeout = Some(timeouts.connect);
            options.total_connection_timeout = Some(timeouts.connect);
            options.read_timeout = Some(timeouts.read);
            options.write_timeout = Some(timeouts.write);
            options.idle_timeout = Some(timeouts.idle);
        }
        Ok(peer)
    }

    async fn upstream_request_filter(
        &self,
        _: &mut Session,
        request: &mut RequestHeader,
        id: &mut String,
    ) -> pingora::Result<()> {
        if self.has_duties() {
            let nothing = RequestHeader::from(http::Request::new(()).into_parts().0);
            let mut parts = Parts::from(mem::replace(request, nothing));
            let name = HeaderName::from_static;
            parts.headers.remove(name("x-auth-token"));
            for (name, value) in [
                (name("x-forwarded-for"), "127.0.0.1"),
                (FORWARDED, "for=127.0.0.1;proto=http;host=\"127.0.0.1\""),
                (name("x-forwarded-proto"), "http"),
                (name("x-forwarded-host"), "127.0.0.1"),
            ] {
                parts.headers.insert(name, HeaderValue::from_static(value));
            }
            let id = HeaderValue::from_str(id).expect("hexadecimal digits");
            parts.headers.insert(name("x-request-id"), id);
            *request = RequestHeader::from(parts);
        }
        Ok(())
    }

    async fn response_filter(
        &self,
        _: &mut Session,
        response: &mut ResponseHeader,
        id: &mut String,
    ) -> pingora::Result<()> {
        if self.has_duties() {
            let mut id = HeaderValue::from_str(id).expect("hexadecimal digits");
            // As the gate has it, for HTTP/2.
            id.set_sensitive(true);
            response.insert_header("x-request-id", id)?;
        }
        Ok(())
    }
}
