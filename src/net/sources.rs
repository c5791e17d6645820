//! How many connections each source holds.
//!
//! A source is an IPv4 address, or the IPv6 network of 64 bits that one subscriber gets. Only sources
//! with open connections are kept, so there are never more of them than connections.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;

use super::is_trusted;

/// The part of an IPv6 address that tells subscribers apart.
const SUBSCRIBER: u128 = !0 << 64;

/// The connections of a listener, by source.
pub(super) struct Sources {
    /// Most connections of one; `None`: nobody counts.
    cap: Option<usize>,
    /// Peers that are not counted.
    exempt: Vec<IpNet>,
    open: Mutex<HashMap<IpAddr, usize>>,
}

impl Sources {
    pub(super) fn new(cap: Option<usize>, exempt: Vec<IpNet>) -> Arc<Self> {
        Arc::new(Self { cap, exempt, open: Mutex::default() })
    }

    /// Counts a connection of `peer`, which has none on a Unix socket, as long as what is returned
    /// lives. `None`: the source has as many as it may.
    pub(super) fn admit(self: &Arc<Self>, peer: Option<IpAddr>) -> Option<Held> {
        let (Some(cap), Some(peer)) = (self.cap, peer) else { return Some(Held(None)) };
        if is_trusted(Some(peer), &self.exempt) {
            return Some(Held(None));
        }
        let source = source_of(peer);
        let mut open = self.open();
        let count = open.entry(source).or_default();
        if *count >= cap {
            return None;
        }
        *count += 1;
        Some(Held(Some((self.clone(), source))))
    }

    fn open(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        // Nothing panics while it is held.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that is counted until this is dropped.
pub(super) struct Held(Option<(Arc<Sources>, IpAddr)>);

impl Drop for Held {
    fn drop(&mut self) {
        let Some((sources, source)) = self.0.take() else { return };
        let mut open = sources.open();
        if let Some(count) = open.get_mut(&source) {
            *count -= 1;
            if *count == 0 {
                open.remove(&source);
            }
        }
    }
}

/// What one client is known by: an IPv4 address, or the network of its IPv6 address.
#[must_use]
pub fn source_of(client: IpAddr) -> IpAddr {
    match client.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & SUBSCRIBER).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn an_ipv6_network_is_one_source_and_a_mapped_address_is_ipv4() {
        let sources = Sources::new(Some(2), Vec::new());
        let held = ["2001:db8::1", "2001:db8::2:3:4:5"].map(|a| sources.admit(ip(a)).unwrap());
        assert!(sources.admit(ip("2001:db8::ffff:6")).is_none());
        assert!(sources.admit(ip("2001:db8:0:1::1")).is_some());
        let mapped = ["::ffff:10.0.0.1", "10.0.0.1"].map(|a| sources.admit(ip(a)).unwrap());
        assert!(sources.admit(ip("10.0.0.1")).is_none());
        assert!(sources.admit(ip("10.0.0.2")).is_some());
        assert_eq!(sources.open().len(), 2);
        drop((held, mapped));
        assert_eq!(sources.open().len(), 0);
    }

    #[test]
    fn those_who_are_exempt_or_have_no_address_are_not_counted() {
        let sources = Sources::new(Some(1), vec!["10.0.0.0/8".parse().unwrap()]);
        let _one = sources.admit(ip("192.0.2.1")).unwrap();
        assert!(sources.admit(ip("192.0.2.1")).is_none());
        for free in [ip("10.1.2.3"), None] {
            let _one = sources.admit(free).unwrap();
            assert!(sources.admit(free).is_some());
        }
        let open = Sources::new(None, Vec::new());
        let _one = open.admit(ip("192.0.2.1")).unwrap();
        assert!(open.admit(ip("192.0.2.1")).is_some());
    }

    #[test]
    fn the_count_is_exact_under_concurrency() {
        let sources = Sources::new(Some(7), Vec::new());
        let most = std::sync::atomic::AtomicUsize::new(0);
        let now = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..2_000 {
                        use std::sync::atomic::Ordering::SeqCst;
                        let Some(held) = sources.admit(ip("192.0.2.1")) else { continue };
                        most.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
                        std::thread::yield_now();
                        now.fetch_sub(1, SeqCst);
                        drop(held);
                    }
                });
            }
        });
        assert!(most.into_inner() <= 7);
        assert!(sources.open().is_empty());
    }
}
