//! The files of a database, which must stay at their paths while it is served: the database file, its
//! lock, and its write-ahead log (WAL).
//!
//! A connection that is never used for orders stays open as long as the store. SQLite removes the WAL
//! only when the last connection of all programs closes, so that while this one is open, a WAL with
//! another identity is always the work of somebody else.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
};

use rustix::fs::OFlags;
use sqlx::{ConnectOptions as _, Connection as _, Row as _, SqliteConnection, sqlite};
use tokio::sync::Mutex;

use super::{
    lock::{FileId, Lock},
    opening,
};

#[derive(Debug)]
pub(super) struct Files {
    /// Held for the life of the store.
    lock: Lock,
    wal: PathBuf,
    /// `None` where the file system allows no WAL, and SQLite uses a rollback journal.
    wal_id: Option<FileId>,
    /// `None` once it is closed.
    connection: Mutex<Option<SqliteConnection>>,
}

impl Files {
    /// Opens the connection that keeps the WAL, and flushes what the WAL holds.
    ///
    /// A process that was killed between the write and the flush of a commit leaves rows that can be
    /// read and are on no disk; an answer that rests on one would be lost with the power. Later no row
    /// is visible before its own flush.
    pub(super) async fn open(
        lock: Lock,
        options: &sqlite::SqliteConnectOptions,
    ) -> Result<Self, String> {
        let failed = |error: sqlx::Error| format!("its WAL: {}", opening::cause(&error));
        let mut connection = options.connect().await.map_err(failed)?;
        // The first read opens the WAL.
        let read = sqlx::query("SELECT COUNT(*) FROM sqlite_schema").execute(&mut connection).await;
        read.map_err(failed)?;
        let wal = lock.wal();
        let path = wal.clone();
        let wal_id = tokio::task::spawn_blocking(move || flush(path)).await;
        let wal_id = wal_id.map_err(io::Error::from).flatten();
        let wal_id = wal_id.map_err(|error| format!("its WAL cannot be flushed: {error}"))?;
        // Frees the WAL as well. Beside another program's reader it may copy and flush nothing.
        let copied = sqlx::query("PRAGMA wal_checkpoint(PASSIVE)").execute(&mut connection).await;
        copied.map_err(failed)?;
        Ok(Self { lock, wal, wal_id, connection: Mutex::new(Some(connection)) })
    }

    /// The path of the WAL.
    pub(super) fn wal(&self) -> &PathBuf {
        &self.wal
    }

    /// Checks that an order that is stored now is found later: see [`Lock::check`], and the WAL must
    /// still be at its path. If it is not, copies what it holds into the database file.
    ///
    /// # Errors
    /// One line with the cause.
    pub(super) async fn check(&self) -> Result<(), String> {
        self.lock.check()?;
        let Err(cause) = self.wal_is_in_place() else { return Ok(()) };
        let saved = match self.save().await {
            Ok(()) => "all orders are in the database file".to_owned(),
            Err(error) => format!("orders in it are not saved ({error})"),
        };
        Err(format!("{cause}; {saved}; restart the service"))
    }

    /// Makes sure that what was committed is found after a restart. A commit may meet the removal of
    /// the WAL after its check.
    ///
    /// # Errors
    /// If the WAL is not at its path and cannot be copied into the database file.
    pub(super) async fn save_committed(&self) -> Result<(), String> {
        let Err(cause) = self.wal_is_in_place() else { return Ok(()) };
        self.save().await.map_err(|error| format!("{cause}; orders in it are not saved ({error})"))
    }

    /// Must be called before the last other connection closes.
    pub(super) async fn close(&self) {
        if let Some(connection) = self.connection.lock().await.take() {
            // What cannot be closed ends with the process.
            drop(connection.close().await);
        }
    }

    fn wal_is_in_place(&self) -> Result<(), String> {
        let Some(id) = self.wal_id else { return Ok(()) };
        match fs::metadata(&self.wal) {
            Ok(file) if FileId::of(&file) == id => Ok(()),
            Ok(_) => Err("the WAL was replaced by another file".to_owned()),
            Err(error) => Err(format!("the WAL is not at its path: {error}")),
        }
    }

    /// Copies all of the open WAL, which may have no name any more, into the database file.
    async fn save(&self) -> Result<(), String> {
        let mut connection = self.connection.lock().await;
        let Some(connection) = connection.as_mut() else {
            return Err("the store is closed".to_owned());
        };
        let copied = sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").fetch_one(connection).await;
        let frames =
            copied.and_then(|row| Ok((row.try_get::<i64, _>(1)?, row.try_get::<i64, _>(2)?)));
        // A reader may prevent the truncation of what was copied and flushed.
        match frames.map_err(|error| error.to_string())? {
            (all, copied) if all >= 0 && all == copied => Ok(()),
            _ => Err("another connection uses it".to_owned()),
        }
    }
}

/// Flushes a WAL to the disk and returns its identity. SQLite holds no lock on a WAL, so closing it
/// releases none.
fn flush(path: PathBuf) -> io::Result<Option<FileId>> {
    // A named pipe must not make it wait.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    match File::options().read(true).custom_flags(flags).open(path) {
        Ok(file) => {
            file.sync_all()?;
            Ok(Some(FileId::of(&file.metadata()?)))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
