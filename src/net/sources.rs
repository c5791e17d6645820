//! How many connections each source holds.
//!
//! A source is an IPv4 address, or the IPv6 network of 64 bits that one subscriber gets. Only sources
//! with open connections are kept, so there are never more of them than connections.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The part of an IPv6 address that tells subscribers apart.
const SUBSCRIBER: u128 = !0 << 64;

/// The connections of a listener, by source.
#[derive(Default)]
pub(super) struct Sources {
    open: Mutex<HashMap<IpAddr, usize>>,
}

impl Sources {
    /// Counts a connection of `peer`, if it has an address that counts, as long as what is returned lives.
    /// `None`: its source has `most` already.
    pub(super) fn admit(
        self: &Arc<Self>,
        peer: Option<IpAddr>,
        most: Option<usize>,
    ) -> Option<Held> {
        let Some(peer) = peer else { return Some(Held(None)) };
        let source = source_of(peer);
        let mut open = self.open();
        let count = open.get(&source).copied().unwrap_or_default();
        if most.is_some_and(|most| count >= most) {
            return None;
        }
        open.insert(source, count + 1);
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
        let sources = Arc::new(Sources::default());
        let admit = |peer| sources.admit(ip(peer), Some(2));
        let held = ["2001:db8::1", "2001:db8::2:3:4:5"].map(|a| admit(a).unwrap());
        assert!(admit("2001:db8::ffff:6").is_none());
        assert!(admit("2001:db8:0:1::1").is_some());
        let mapped = ["::ffff:10.0.0.1", "10.0.0.1"].map(|a| admit(a).unwrap());
        assert!(admit("10.0.0.1").is_none());
        assert!(admit("10.0.0.2").is_some());
        assert_eq!(sources.open().len(), 2);
        drop((held, mapped));
        assert_eq!(sources.open().len(), 0);
    }

    #[test]
    fn those_without_an_address_are_not_counted_and_the_cap_may_change() {
        let sources = Arc::new(Sources::default());
        let _none = sources.admit(None, Some(1)).unwrap();
        assert!(sources.admit(None, Some(1)).is_some());
        let open: Vec<_> = (0..3).map(|_| sources.admit(ip("192.0.2.1"), None).unwrap()).collect();
        assert!(sources.admit(ip("192.0.2.1"), Some(3)).is_none());
        assert!(sources.admit(ip("192.0.2.1"), Some(4)).is_some());
        drop(open);
        assert!(sources.admit(ip("192.0.2.1"), Some(1)).is_some());
    }

    #[test]
    fn the_count_is_exact_under_concurrency() {
        let sources = Arc::new(Sources::default());
        let most = std::sync::atomic::AtomicUsize::new(0);
        let now = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..2_000 {
                        use std::sync::atomic::Ordering::SeqCst;
                        let Some(held) = sources.admit(ip("192.0.2.1"), Some(7)) else { continue };
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
