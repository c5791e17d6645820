//! What stands around the gate in tests: clients that send exact bytes, upstreams that tell what they
//! got, and the gate itself on free ports.

pub mod directory;
pub mod echo;
pub mod gate;
pub mod h2peer;
pub mod nginx;
pub mod tls;
pub mod wire;

use std::future::Future;
use std::time::Duration;

/// Longest time that anything in a test may take.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Waits until `condition` holds.
pub async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(LIMIT, waiting).await.is_ok(), "never happened: {what}");
}

/// Fails the test if `work` takes too long.
pub async fn bounded<T>(what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(LIMIT, work).await {
        Ok(done) => done,
        Err(_) => panic!("took too long: {what}"),
    }
}
