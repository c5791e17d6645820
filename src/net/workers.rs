//! The threads that serve connections. Each has a runtime of its own, and what a connection begins stays there: no
//! request wakes another thread, and what is ready at once is answered at once, which spares the other side
//! wake-ups as well.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// Threads that serve connections; they end when this is dropped, and what is left on them with them.
pub struct Workers(Vec<Worker>);

struct Worker {
    runtime: Handle,
    connections: AtomicUsize,
    /// Dropped to end the thread; `None`: it is the caller's.
    _until: Option<oneshot::Sender<()>>,
}

impl Workers {
    /// The caller's own runtime, which must be there.
    #[must_use]
    pub fn here() -> Arc<Self> {
        let worker =
            Worker { runtime: Handle::current(), connections: AtomicUsize::new(0), _until: None };
        Arc::new(Self(vec![worker]))
    }

    /// So many. A single one is the caller's own: nobody has to hand connections over.
    ///
    /// # Errors
    /// If the system allows no more threads or files.
    pub fn start(threads: usize) -> io::Result<Arc<Self>> {
        if threads <= 1 {
            return Ok(Self::here());
        }
        Ok(Arc::new(Self((0..threads).map(Worker::start).collect::<io::Result<_>>()?)))
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Gives a connection to the one that has the fewest.
    pub(super) fn assign(self: &Arc<Self>) -> Assigned {
        let load = |worker: &Worker| worker.connections.load(Ordering::Relaxed);
        let least = self.0.iter().enumerate().min_by_key(|(_, worker)| load(worker));
        let index = least.map_or(0, |(index, _)| index);
        self.0[index].connections.fetch_add(1, Ordering::Relaxed);
        Assigned { workers: self.clone(), index }
    }
}

impl Worker {
    fn start(index: usize) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (until, ended) = oneshot::channel();
        thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
            // Nothing is ever sent.
            let _ = runtime.block_on(ended);
            runtime.shutdown_background();
        })?;
        Ok(Self { runtime: handle, connections: AtomicUsize::new(0), _until: Some(until) })
    }
}

/// A connection's worker, which counts it meanwhile.
pub(super) struct Assigned {
    workers: Arc<Workers>,
    /// Of the worker.
    pub(super) index: usize,
}

impl Assigned {
    /// Where the connection's task belongs.
    pub(super) fn runtime(&self) -> Handle {
        self.workers.0[self.index].runtime.clone()
    }
}

impl Drop for Assigned {
    fn drop(&mut self) {
        self.workers.0[self.index].connections.fetch_sub(1, Ordering::Relaxed);
    }
}
