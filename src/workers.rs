//! The threads that serve connections, each with a runtime of its own.
//!
//! A connection stays on the thread that it was given to, and so does all that belongs to it: its
//! streams, their timers, the answers of the store. No task is stolen, no lock of it is contended, and
//! what one read of the socket brought is answered in one write. The price is that the threads are as
//! evenly loaded as their connections are; each new one goes to where the fewest are.
//!
//! Depends on nothing of ours.

use std::{
    io, iter,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};

/// A clone is cheap; the threads end once the last is dropped, and drop what still runs on them.
#[derive(Debug, Clone)]
pub struct Workers {
    each: Arc<[Worker]>,
    _ended: Arc<DropGuard>,
}

#[derive(Debug)]
struct Worker {
    runtime: Handle,
    connections: Arc<AtomicUsize>,
}

impl Worker {
    fn new(runtime: Handle) -> Self {
        Self { runtime, connections: Arc::default() }
    }
}

impl Workers {
    /// This many threads: the calling one, whose runtime also accepts and has the store's writers, and
    /// as many new ones as are missing. On a runtime of its own a writer would be woken by nearly every
    /// order and take it alone; here it has its turn when the connections have had theirs.
    ///
    /// # Errors
    /// If the system gives no thread, or a runtime cannot be made.
    ///
    /// # Panics
    /// Outside of a runtime.
    pub fn start(threads: usize) -> io::Result<Self> {
        let ended = CancellationToken::new();
        let start = |number| {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let worker = Worker::new(runtime.handle().clone());
            let until = ended.clone();
            thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
                runtime.block_on(until.cancelled());
                // What a blocking call may still wait for is not waited for.
                runtime.shutdown_background();
            })?;
            Ok(worker)
        };
        let here = Ok(Worker::new(Handle::current()));
        let each = iter::once(here).chain((1..threads).map(start)).collect::<io::Result<_>>()?;
        Ok(Self { each, _ended: Arc::new(ended.drop_guard()) })
    }

    /// The calling thread alone.
    ///
    /// # Panics
    /// Outside of a runtime.
    pub fn here() -> Self {
        let ended = Arc::new(CancellationToken::new().drop_guard());
        Self { each: Arc::new([Worker::new(Handle::current())]), _ended: ended }
    }

    /// The runtimes.
    pub fn runtimes(&self) -> impl Iterator<Item = &Handle> {
        self.each.iter().map(|worker| &worker.runtime)
    }

    /// The place of one more connection: the runtime that has the fewest.
    pub(crate) fn place(&self) -> (&Handle, Placed) {
        let fewest = self.each.iter().min_by_key(|it| it.connections.load(Ordering::Relaxed));
        let worker = fewest.expect("there is at least one");
        worker.connections.fetch_add(1, Ordering::Relaxed);
        (&worker.runtime, Placed(worker.connections.clone()))
    }
}

/// A connection's place, until it is dropped.
#[derive(Debug)]
pub(crate) struct Placed(Arc<AtomicUsize>);

impl Drop for Placed {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_goes_to_the_runtime_with_the_fewest() {
        let workers = Workers::start(3).unwrap();
        let place = || {
            let (runtime, placed) = workers.place();
            (runtime.id(), placed)
        };
        let mut placed: Vec<_> = (0..6).map(|_| place()).collect();
        let on = |placed: &[(_, Placed)], id| placed.iter().filter(|(at, _)| *at == id).count();
        let ids: Vec<_> = workers.runtimes().map(Handle::id).collect();
        assert!(ids.iter().all(|id| on(&placed, *id) == 2));
        // Whose connections ended takes the next ones.
        placed.retain(|(at, _)| *at != ids[1]);
        placed.extend((0..2).map(|_| place()));
        assert!(ids.iter().all(|id| on(&placed, *id) == 2));
    }

    #[tokio::test]
    async fn what_runs_on_a_worker_ends_with_the_last_clone() {
        let workers = Workers::start(2).unwrap();
        let other = workers.runtimes().nth(1).unwrap().clone();
        let (held, dropped) = tokio::sync::oneshot::channel::<()>();
        other.spawn(async move {
            std::future::pending::<()>().await;
            drop(held);
        });
        drop(workers.clone());
        other.spawn(async {}).await.unwrap();
        drop(workers);
        assert!(dropped.await.is_err());
    }
}
