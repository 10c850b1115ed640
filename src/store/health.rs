//! How the store is, for readiness and for the log: an outage is told at its begin and at its end,
//! not by every call that it fails.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

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

/// What the store's calls note and others ask for; it does not hold the store open.
#[derive(Debug, Clone)]
pub struct StoreHealth {
    noted: Arc<Mutex<Noted>>,
}

/// Outages that begin so soon after another was logged belong to it: replicas that fight for a
/// server's last connections fail and succeed by turns.
const SAME_OUTAGE: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Noted {
    status: StoreStatus,
    /// Whether only reads have failed: a read that succeeds ends that, and not an outage of writing.
    reads_alone: bool,
    /// When the begin of an outage was logged last.
    logged: Option<Instant>,
    /// Whether its end is yet to be logged.
    end_is_due: bool,
    /// When a commit or a read failed last.
    failed: Option<Instant>,
}

impl Default for StoreHealth {
    fn default() -> Self {
        Self::new()
    }
}

impl StoreHealth {
    /// Of a store that is being opened.
    pub fn new() -> Self {
        let noted = Noted {
            status: StoreStatus::Opening { why: None },
            reads_alone: false,
            logged: None,
            end_is_due: false,
            failed: None,
        };
        Self { noted: Arc::new(Mutex::new(noted)) }
    }

    /// How the store is now.
    pub fn status(&self) -> StoreStatus {
        self.lock().status.clone()
    }

    pub(super) fn is_failing(&self) -> bool {
        matches!(self.lock().status, StoreStatus::Failing { .. })
    }

    /// Whether the store has failed since a call began: then that is why its time is up.
    pub(super) fn failed_since(&self, begun: Instant) -> bool {
        let noted = self.lock();
        matches!(noted.status, StoreStatus::Failing { .. })
            || noted.failed.is_some_and(|failed| failed >= begun)
    }

    /// Each new reason is logged once.
    pub(super) fn not_open_yet(&self, why: String) {
        let mut noted = self.lock();
        let known =
            matches!(&noted.status, StoreStatus::Opening { why: Some(known) } if *known == why);
        if !known {
            tracing::warn!(cause = why, "the store does not answer yet");
        }
        noted.status = StoreStatus::Opening { why: Some(why) };
    }

    /// A commit succeeded, or the opening.
    pub(super) fn answered(&self) {
        self.lock().answered();
    }

    /// A read succeeded.
    pub(super) fn read_answered(&self) {
        let mut noted = self.lock();
        if noted.reads_alone {
            noted.answered();
        }
    }

    /// A commit failed.
    pub(super) fn failed(&self, why: String) {
        let mut noted = self.lock();
        noted.reads_alone = false;
        noted.failed(why);
    }

    /// A read failed.
    pub(super) fn read_failed(&self, why: String) {
        let mut noted = self.lock();
        noted.reads_alone |= noted.status == StoreStatus::Up;
        if noted.reads_alone {
            noted.failed(why);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Noted> {
        // No code can panic while it holds the lock.
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Noted {
    fn answered(&mut self) {
        self.reads_alone = false;
        let before = std::mem::replace(&mut self.status, StoreStatus::Up);
        if let StoreStatus::Failing { .. } = before
            && std::mem::take(&mut self.end_is_due)
        {
            tracing::info!("the store answers again");
        }
    }

    fn failed(&mut self, why: String) {
        let begins = !matches!(self.status, StoreStatus::Failing { .. });
        if begins && self.logged.is_none_or(|logged| logged.elapsed() >= SAME_OUTAGE) {
            tracing::warn!(cause = why, "the store fails; it is tried again until it answers");
            self.logged = Some(Instant::now());
            self.end_is_due = true;
        }
        self.failed = Some(Instant::now());
        self.status = StoreStatus::Failing { why };
    }
}
