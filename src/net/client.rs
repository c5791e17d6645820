//! Where a request comes from, behind trusted proxies.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName};

use crate::config::TrustedPeer;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Whether `peer` is one of `trusted`; `None`: a Unix socket's, which has no address.
#[must_use]
pub fn is_trusted(peer: Option<IpAddr>, trusted: &[TrustedPeer]) -> bool {
    trusted.iter().any(|one| match (one, peer) {
        (TrustedPeer::Network(network), Some(peer)) => network.contains(&peer),
        (TrustedPeer::Unix, None) => true,
        _ => false,
    })
}

/// The address of the client: if `peer` is trusted, the last one of `X-Forwarded-For` that is not;
/// else the peer's.
#[must_use]
pub fn client_address(
    headers: &HeaderMap,
    peer: Option<IpAddr>,
    trusted: &[TrustedPeer],
) -> Option<IpAddr> {
    if !is_trusted(peer, trusted) {
        return peer;
    }
    let mut client = peer;
    let hops = headers.get_all(FORWARDED_FOR).iter().rev().flat_map(|value| {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_is_the_last_untrusted_hop() {
        let network = |net: &str| TrustedPeer::Network(net.parse().unwrap());
        let mut trusted = ["192.0.2.0/24", "10.0.0.0/8"].map(network).to_vec();
        let client = |peer: &str, forwarded: &[&str]| {
            let headers: HeaderMap =
                forwarded.iter().map(|value| (FORWARDED_FOR, value.parse().unwrap())).collect();
            client_address(&headers, Some(peer.parse().unwrap()), &trusted).unwrap().to_string()
        };
        assert_eq!(client("198.51.100.1", &["6.6.6.6"]), "198.51.100.1");
        assert_eq!(client("192.0.2.1", &[]), "192.0.2.1");
        assert_eq!(client("192.0.2.1", &["6.6.6.6, 7.7.7.7, 10.1.1.1"]), "7.7.7.7");
        assert_eq!(client("192.0.2.1", &["6.6.6.6", "7.7.7.7"]), "7.7.7.7");
        assert_eq!(client("192.0.2.1", &["6.6.6.6, what, 10.1.1.1"]), "10.1.1.1");
        assert_eq!(client("192.0.2.1", &["::ffff:10.1.1.1, ::ffff:6.6.6.6"]), "6.6.6.6");
        let headers = HeaderMap::from_iter([(FORWARDED_FOR, "6.6.6.6".parse().unwrap())]);
        assert_eq!(client_address(&headers, None, &trusted), None);
        trusted.push(TrustedPeer::Unix);
        assert_eq!(client_address(&headers, None, &trusted), Some("6.6.6.6".parse().unwrap()));
        assert_eq!(client_address(&HeaderMap::new(), None, &trusted), None);
        assert!(!is_trusted(Some("6.6.6.6".parse().unwrap()), &trusted));
    }
}
