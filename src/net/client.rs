//! Where a request comes from, behind trusted proxies.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName};
use ipnet::IpNet;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Whether one of `trusted` contains `peer`. A Unix socket's peer has no address to list.
#[must_use]
pub fn is_trusted(peer: Option<IpAddr>, trusted: &[IpNet]) -> bool {
    peer.is_some_and(|peer| trusted.iter().any(|net| net.contains(&peer)))
}

/// The address of the client: if `peer` is trusted, the last one of `X-Forwarded-For` that is not;
/// else the peer's.
#[must_use]
pub fn client_address(
    headers: &HeaderMap,
    peer: Option<IpAddr>,
    trusted: &[IpNet],
) -> Option<IpAddr> {
    if !is_trusted(peer, trusted) {
        return peer;
    }
    let mut client = peer;
    let listed = headers.get_all(FORWARDED_FOR).iter().collect::<Vec<_>>();
    let hops = listed.iter().rev().flat_map(|value| {
        value.to_str().unwrap_or_default().rsplit(',').map(|hop| {
            let hop = hop.trim().parse::<IpAddr>();
            hop.map(|hop| hop.to_canonical()).ok()
        })
    });
    for hop in hops {
        // What cannot be read ends the chain of trust.
        let Some(hop) = hop else { break };
        client = Some(hop);
        if !is_trusted(client, trusted) {
            break;
        }
    }
    client
}
