//! pingora without a gate: a proxy that says where requests go and nothing else, with the pool of idle
//! connections and the number of threads that the gate has when it is measured.

use std::net::SocketAddr;

use async_trait::async_trait;
use otpgate::net::Connection;
use pingora::prelude::HttpPeer;
use pingora::proxy::{ProxyHttp, Session};
use pingora::server::configuration::ServerConf;

/// As `src/proxy.rs` has it.
const UPSTREAM_POOL: usize = 1024;

/// The settings.
pub(crate) fn conf() -> ServerConf {
    ServerConf { threads: 1, upstream_keepalive_pool_size: UPSTREAM_POOL, ..ServerConf::default() }
}

/// The proxy. On the gate's own listener (`OURS`) it tells the guard when a head is read, as it must.
pub(crate) struct Bare<const OURS: bool> {
    pub(crate) upstream: SocketAddr,
}

#[async_trait]
impl<const OURS: bool> ProxyHttp for Bare<OURS> {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn early_request_filter(
        &self,
        session: &mut Session,
        (): &mut (),
    ) -> pingora::Result<()> {
        if OURS && let Some(connection) = Connection::of(session.as_downstream()) {
            connection.head_done();
        }
        Ok(())
    }

    async fn upstream_peer(&self, _: &mut Session, (): &mut ()) -> pingora::Result<Box<HttpPeer>> {
        Ok(Box::new(HttpPeer::new(self.upstream, false, String::new())))
    }
}
