//! Addresses of upstream servers: DNS names looked up in the background, the last good answer kept.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::join_all;
use pingora::lb::discovery::ServiceDiscovery;
use pingora::lb::{Backend, Extensions};
use pingora::protocols::l4::socket::SocketAddr as BackendAddress;
use tokio::net::lookup_host;
use tokio::time::timeout;
use tracing::warn;

use crate::config::Target;

/// Longest wait for DNS.
const DNS_LIMIT: Duration = Duration::from_secs(5);

/// Finds the addresses of targets, and keeps the last good answer for each.
pub(super) struct Discovery {
    targets: Vec<Target>,
    known: Mutex<HashMap<usize, Vec<SocketAddr>>>,
}

impl Discovery {
    pub(super) fn new(targets: Vec<Target>) -> Self {
        Self { targets, known: Mutex::default() }
    }

    /// Takes over what `other` knows of the same names.
    pub(super) fn learn_from(&self, other: &Self) {
        let theirs = other.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, target) in self.targets.iter().enumerate() {
            let place = other.targets.iter().position(|other| other == target);
            if let Some(addresses) = place.and_then(|place| theirs.get(&place)) {
                known.entry(index).or_insert_with(|| addresses.clone());
            }
        }
    }

    /// Whether there is nothing to look up, ever.
    pub(super) fn is_static(&self) -> bool {
        !self
            .targets
            .iter()
            .any(|target| matches!(target, Target::Host(host, _) if ip(host).is_none()))
    }

    /// Whether every name has been resolved at least once.
    pub(super) fn all_known(&self) -> bool {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).values().all(|a| !a.is_empty())
    }

    async fn look_up(&self, index: usize, host: &str, port: u16) -> Vec<SocketAddr> {
        let answer = timeout(DNS_LIMIT, lookup_host((host, port))).await;
        let failure = match answer {
            Ok(Ok(addresses)) => {
                let addresses: Vec<_> = addresses.collect();
                if !addresses.is_empty() {
                    let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
                    known.insert(index, addresses.clone());
                    return addresses;
                }
                "no address".to_owned()
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer in time".to_owned(),
        };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let last = known.entry(index).or_default().clone();
        warn!(host, failure, kept = last.len(), "cannot resolve the name of an upstream server");
        last
    }
}

fn ip(host: &str) -> Option<std::net::IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// What pingora's balancer asks.
pub(super) struct Shared(pub(super) Arc<Discovery>);

#[async_trait]
impl ServiceDiscovery for Shared {
    async fn discover(&self) -> pingora::Result<(BTreeSet<Backend>, HashMap<u64, bool>)> {
        let found = join_all(self.0.targets.iter().enumerate().map(async |(index, target)| {
            match target {
                Target::Unix(path) => std::os::unix::net::SocketAddr::from_pathname(path)
                    .map(|address| vec![BackendAddress::Unix(address)])
                    .unwrap_or_default(),
                Target::Host(host, port) => match ip(host) {
                    Some(ip) => vec![BackendAddress::Inet(SocketAddr::new(ip, *port))],
                    None => {
                        let found = self.0.look_up(index, host, *port).await;
                        found.into_iter().map(BackendAddress::Inet).collect()
                    }
                },
            }
        }));
        let backends = found
            .await
            .into_iter()
            .flatten()
            .map(|addr| Backend { addr, weight: 1, ext: Extensions::new() })
            .collect();
        Ok((backends, HashMap::new()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_known_of_a_name_is_not_forgotten() {
        let target = |host: &str, port| Target::Host(host.to_owned(), port);
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        let old = Discovery::new(vec![target("a", 1), target("b", 1), target("c", 1)]);
        let known = [(0, vec![address("192.0.2.1:1")]), (1, vec![address("192.0.2.2:1")])];
        old.known.lock().unwrap().extend(known);
        let new = Discovery::new(vec![target("b", 1), target("a", 2), target("c", 1)]);
        new.learn_from(&old);
        let learned = new.known.lock().unwrap();
        assert_eq!(*learned, HashMap::from([(0, vec![address("192.0.2.2:1")])]));
    }
}
