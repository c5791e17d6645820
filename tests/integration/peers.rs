//! What stands around the gate in tests: clients that send exact bytes, upstreams that tell what they
//! got, and the gate itself on free ports.

pub(crate) mod directory;
pub(crate) mod echo;
pub(crate) mod gate;
pub(crate) mod h2peer;
pub(crate) mod nginx;
pub(crate) mod tls;
pub(crate) mod wire;

use std::future::Future;
use std::time::Duration;

/// Longest time that anything in a test may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// Waits until `condition` holds.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(LIMIT, waiting).await.is_ok(), "never happened: {what}");
}

/// Fails the test if `work` takes too long.
pub(crate) async fn bounded<T>(what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(LIMIT, work).await {
        Ok(done) => done,
        Err(_) => panic!("took too long: {what}"),
    }
}
