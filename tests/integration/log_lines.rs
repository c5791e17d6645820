//! Collects what one test's thread logs.

use std::sync::{Arc, Mutex};

use tracing::Dispatch;
use tracing::subscriber::DefaultGuard;
use tracing_subscriber::registry;

/// What was written so far.
#[derive(Clone, Default)]
pub(crate) struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    /// For `with_writer`.
    pub(crate) fn writer(&self) -> impl Fn() -> Self + Send + Sync + 'static {
        let lines = self.clone();
        move || lines.clone()
    }
}

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Sends this thread's events to `subscriber` as long as the result lives.
///
/// With only one dispatcher, tracing asks that of the thread which happens to come first whether a
/// line is wanted at all; other tests' threads have none. Hence a second one.
pub(crate) fn collect(subscriber: impl Into<Dispatch>) -> (Dispatch, DefaultGuard) {
    let second = Dispatch::new(registry());
    (second, tracing::dispatcher::set_default(&subscriber.into()))
}
