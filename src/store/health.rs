//! How the store is, for readiness and for the log: an outage is told at its begin and at its end,
//! not by every call that it fails.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How the store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreStatus {
    /// It has not answered yet.
    Opening {
        /// Why not, once that is known.
        why: Option<String>,
    },
    /// It answered last time.
    Up,
    /// It failed last time.
    Failing {
        /// How.
        why: String,
    },
}

/// What the store's tasks note and others ask for; it does not hold the store open.
#[derive(Debug, Clone)]
pub struct StoreHealth {
    status: Arc<Mutex<StoreStatus>>,
}

impl Default for StoreHealth {
    fn default() -> Self {
        Self::new()
    }
}

impl StoreHealth {
    /// Of a store that is being opened.
    pub fn new() -> Self {
        Self { status: Arc::new(Mutex::new(StoreStatus::Opening { why: None })) }
    }

    /// How the store is now.
    pub fn status(&self) -> StoreStatus {
        self.lock().clone()
    }

    pub(super) fn is_failing(&self) -> bool {
        matches!(*self.lock(), StoreStatus::Failing { .. })
    }

    pub(super) fn not_open_yet(&self, why: String) {
        tracing::warn!(cause = why, "the store does not answer yet");
        *self.lock() = StoreStatus::Opening { why: Some(why) };
    }

    pub(super) fn answered(&self) {
        let before = std::mem::replace(&mut *self.lock(), StoreStatus::Up);
        if let StoreStatus::Failing { .. } = before {
            tracing::info!("the store answers again");
        }
    }

    pub(super) fn failed(&self, why: String) {
        let mut status = self.lock();
        if !matches!(*status, StoreStatus::Failing { .. }) {
            tracing::warn!(cause = why, "the store fails; it is tried again until it answers");
        }
        *status = StoreStatus::Failing { why };
    }

    fn lock(&self) -> MutexGuard<'_, StoreStatus> {
        // No code can panic while it holds the lock.
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
