//! Maintains a database file in the background: checks its files once a second, and truncates a long
//! write-ahead log (WAL).
//!
//! SQLite restarts the WAL only while no reader needs it. Reads that overlap never leave it such a
//! moment, so the maintainer holds new reads back while it copies the WAL into the database.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use sqlx::{Row as _, SqlitePool, sqlite::SqliteRow};
use tokio::{
    sync::{Mutex, Notify},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use super::files::Files;
use crate::store::{StoreHealth, readers::Readers};

/// Length in bytes beyond which the WAL is truncated. Twice the length at which SQLite begins to
/// copy it by itself (1000 pages), so that a database without readers never reaches it.
pub(super) const WAL_LIMIT: u64 = 8 << 20;

/// Between two checks, and after a truncation that another program's reader prevented.
const PERIOD: Duration = Duration::from_secs(1);

/// How long a truncation waits for the writer, and then, holding the writer, for the reads under way.
const WAIT: Duration = Duration::from_millis(500);

/// The background task of one database file. Dropping it ends the task.
#[derive(Debug)]
pub(super) struct Maintainer {
    wal: Arc<Wal>,
    /// One task.
    task: Mutex<JoinSet<()>>,
}

#[derive(Debug)]
struct Wal {
    path: PathBuf,
    is_long: Notify,
}

impl Wal {
    fn is_long(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|file| file.len() > WAL_LIMIT)
    }
}

impl Maintainer {
    pub(super) fn start(
        files: Arc<Files>,
        writer: SqlitePool,
        turns: Arc<Readers>,
        health: StoreHealth,
    ) -> Self {
        let wal = Arc::new(Wal { path: files.wal().clone(), is_long: Notify::new() });
        let mut task = JoinSet::new();
        task.spawn(run(files, wal.clone(), writer, turns, health));
        Self { wal, task: Mutex::new(task) }
    }

    /// Must be called after each commit. Wakes the task if the WAL is too long, and does not wait
    /// for it.
    pub(super) fn committed(&self) {
        if self.wal.is_long() {
            self.wal.is_long.notify_one();
        }
    }

    /// Ends the task, and with it its share of the lock.
    pub(super) async fn stop(&self) {
        self.task.lock().await.shutdown().await;
    }
}

async fn run(
    files: Arc<Files>,
    wal: Arc<Wal>,
    writer: SqlitePool,
    turns: Arc<Readers>,
    health: StoreHealth,
) {
    let mut period = interval(PERIOD);
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut files_lost, mut prevented) = (false, false);
    loop {
        tokio::select! {
            _ = period.tick() => match files.check().await {
                Ok(()) => {
                    if std::mem::take(&mut files_lost) {
                        health.answered();
                    }
                }
                Err(cause) => {
                    files_lost = true;
                    health.failed(cause);
                }
            },
            () = wal.is_long.notified(), if !prevented => {}
        }
        prevented = !files_lost && wal.is_long() && !truncate(&writer, &turns).await;
    }
}

/// Returns whether the WAL was truncated. Another program's reader, such as a backup, prevents it.
async fn truncate(writer: &SqlitePool, turns: &Readers) -> bool {
    // The writer first: no read is held back while a commit hangs.
    let Ok(Ok(mut writer)) = timeout(WAIT, writer.acquire()).await else { return false };
    let Ok(_turns) = turns.acquire_all(Instant::now() + WAIT).await else { return false };
    // Copies without waiting. What it cannot copy a reader still needs; waiting for that reader would
    // delay orders.
    let copied = sqlx::query("PRAGMA wal_checkpoint(PASSIVE)").fetch_one(&mut *writer).await;
    let all_copied = |row: SqliteRow| {
        let (frames, copied): (i64, i64) = (row.try_get(1)?, row.try_get(2)?);
        Ok(frames == copied)
    };
    if !copied.and_then(all_copied).unwrap_or(false) {
        return false;
    }
    let truncated = sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").fetch_one(&mut *writer).await;
    truncated.and_then(|row| row.try_get::<i64, _>(0)).is_ok_and(|busy| busy == 0)
}
