//! The line in which reads wait for their turn. There are as many reads as there are requests:
//! without it they would take every connection and the line before it, and no writer would have its
//! turn within its time.
//!
//! A read that waits in vain has met overload, unless the store fails.

use std::time::Duration;

use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, timeout_at},
};

use super::engine::Failure;

/// How long a read waits for its turn. Longer than an attempt may take: when the store hangs,
/// whoever had a turn has failed by then, so that it is known to fail.
pub(super) const WAIT: Duration = Duration::from_millis(1250);

#[derive(Debug)]
pub(super) struct Readers {
    turns: Semaphore,
    most: u32,
}

impl Readers {
    /// At most so many reads have their turn at a time.
    pub(super) fn new(most: usize) -> Self {
        let most = u32::try_from(most).unwrap_or(u32::MAX);
        Self { turns: Semaphore::new(most as usize), most }
    }

    /// Waits for a turn, which lasts as long as what it returns.
    ///
    /// # Errors
    /// If it does not come in time.
    pub(super) async fn turn(&self, until: Instant) -> Result<SemaphorePermit<'_>, Failure> {
        self.acquire(1, until).await
    }

    /// Waits until every read that has its turn is done. No other read begins while the returned
    /// permit is held.
    ///
    /// # Errors
    /// If they are not done in time.
    pub(super) async fn acquire_all(&self, until: Instant) -> Result<SemaphorePermit<'_>, Failure> {
        self.acquire(self.most, until).await
    }

    async fn acquire(&self, turns: u32, until: Instant) -> Result<SemaphorePermit<'_>, Failure> {
        match timeout_at(until, self.turns.acquire_many(turns)).await {
            Ok(Ok(turns)) => Ok(turns),
            Ok(Err(_)) => Err(Failure::closed()),
            Err(_) => Err(Failure::no_turn()),
        }
    }

    /// Refuses whoever waits and whoever comes.
    pub(super) fn close(&self) {
        self.turns.close();
    }
}
