//! How the store is, for readiness and for the log: an outage is told at its begin and at its end,
//! not by every call that it fails.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use prometheus::IntGauge;
use tokio::{sync::Notify, time::Instant};

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
    /// A read succeeded in an outage that it does not end by itself.
    may_be_over: Arc<Notify>,
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
    /// When a commit ended last, either way.
    last_commit: Instant,
    /// How many batches are with a writer.
    commits_under_way: usize,
    /// Whether the disk is full: a probe writes nothing, so that only a commit ends that.
    full: bool,
    /// `order_store_up`.
    up: Option<IntGauge>,
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
            last_commit: Instant::now(),
            commits_under_way: 0,
            full: false,
            up: None,
        };
        Self { noted: Arc::new(Mutex::new(noted)), may_be_over: Arc::default() }
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

    /// Shows from now on in the gauge whether the store is up.
    pub(super) fn show(&self, up: IntGauge) {
        let mut noted = self.lock();
        up.set(i64::from(noted.status == StoreStatus::Up));
        noted.up = Some(up);
    }

    /// When a commit ended last, whether it succeeded or failed.
    pub(super) fn last_commit(&self) -> Instant {
        self.lock().last_commit
    }

    /// A writer has a batch until this is dropped, between its attempts as well.
    pub(super) fn commit_begun(&self) -> CommitUnderWay<'_> {
        self.lock().commits_under_way += 1;
        CommitUnderWay(self)
    }

    /// A commit succeeded, or the opening.
    pub(super) fn answered(&self) {
        let mut noted = self.lock();
        noted.last_commit = Instant::now();
        noted.full = false;
        noted.answered();
    }

    /// Waits until a read succeeds in an outage that it does not end by itself.
    pub(super) async fn may_be_over(&self) {
        self.may_be_over.notified().await;
    }

    /// A probe succeeded. While a commit is under way, that commit decides whether an outage of
    /// writing is over.
    pub(super) fn probed(&self) {
        let mut noted = self.lock();
        let commit_decides = noted.commits_under_way > 0 && !noted.reads_alone;
        if !noted.full && !commit_decides {
            noted.answered();
        }
    }

    /// A probe failed.
    pub(super) fn probe_failed(&self, why: String) {
        let mut noted = self.lock();
        noted.reads_alone = false;
        noted.failed(why);
    }

    /// A commit failed for lack of room.
    pub(super) fn full(&self, why: String) {
        self.lock().full = true;
        self.failed(why);
    }

    /// A read succeeded.
    pub(super) fn read_answered(&self) {
        let mut noted = self.lock();
        if noted.reads_alone {
            noted.answered();
        } else if matches!(noted.status, StoreStatus::Failing { .. }) {
            self.may_be_over.notify_one();
        }
    }

    /// A commit failed.
    pub(super) fn failed(&self, why: String) {
        let mut noted = self.lock();
        noted.last_commit = Instant::now();
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

/// See [`StoreHealth::commit_begun`].
pub(super) struct CommitUnderWay<'h>(&'h StoreHealth);

impl Drop for CommitUnderWay<'_> {
    fn drop(&mut self) {
        self.0.lock().commits_under_way -= 1;
    }
}

impl Noted {
    fn answered(&mut self) {
        self.reads_alone = false;
        let before = std::mem::replace(&mut self.status, StoreStatus::Up);
        self.up.iter().for_each(|up| up.set(1));
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
        self.up.iter().for_each(|up| up.set(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_probe_ends_an_outage_unless_the_disk_is_full() {
        let up = IntGauge::new("up", "up").unwrap();
        let health = StoreHealth::new();
        health.show(up.clone());
        assert_eq!(up.get(), 0);
        health.answered();
        assert_eq!(up.get(), 1);
        health.probe_failed("away".to_owned());
        assert_eq!(up.get(), 0);
        health.probed();
        assert_eq!((health.status(), up.get()), (StoreStatus::Up, 1));

        health.full("no room".to_owned());
        health.probed();
        assert_eq!(health.status(), StoreStatus::Failing { why: "no room".to_owned() });
        health.answered();
        health.failed("away".to_owned());
        health.probed();
        assert_eq!(health.status(), StoreStatus::Up);
    }

    #[tokio::test]
    async fn a_probe_ends_no_outage_while_a_commit_is_under_way() {
        let health = StoreHealth::new();
        health.answered();
        let under_way = health.commit_begun();
        health.failed("away".to_owned());
        health.probed();
        assert_eq!(health.status(), StoreStatus::Failing { why: "away".to_owned() });
        drop(under_way);
        health.probed();
        assert_eq!(health.status(), StoreStatus::Up);
    }
}
