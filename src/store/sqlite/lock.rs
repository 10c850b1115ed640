//! The lock that keeps a second process from a database file. It is on `PATH.lock`, where PATH is the
//! canonical path of the database, so that a symbolic link leads to the same lock.
//!
//! The lock must never be on the database file itself: closing any descriptor of that file would
//! release SQLite's own locks.

use std::{
    ffi::OsString,
    fs::{self, File, Metadata, OpenOptions, TryLockError},
    io,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::fs::OFlags;

/// What may be neither the database file nor its lock.
const NO_FILE: &str = "expected a regular file";

/// Attempts to lock a file that somebody removes at the same time.
const ATTEMPTS: usize = 10;

/// Held until it is dropped.
#[derive(Debug)]
pub(super) struct Lock {
    /// The canonical path.
    database: PathBuf,
    database_id: FileId,
    path: PathBuf,
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    /// Closing it releases the lock.
    _file: File,
    id: FileId,
}

/// Device and inode, which identify a file whatever its name is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileId(u64, u64);

impl Lock {
    /// Locks a database file, and creates it if it is missing.
    ///
    /// # Errors
    /// If another process holds the lock, or the file has a second hard link, which another process
    /// could lock as well.
    pub(super) fn take(path: &Path) -> Result<Self, String> {
        let shown = |what: &str, error: io::Error| format!("cannot {what} it: {error}");
        // SQLite has not opened a missing file, so closing it here releases no lock of SQLite.
        if fs::metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            let created = options().mode(0o644).open(path);
            created.map_err(|error| {
                format!("{}; this user must be able to write its directory", shown("create", error))
            })?;
        }
        let database = fs::canonicalize(path).map_err(|error| shown("open", error))?;
        let metadata = fs::metadata(&database).map_err(|error| shown("open", error))?;
        if !metadata.is_file() {
            return Err(NO_FILE.to_owned());
        }
        let links = metadata.nlink();
        if links > 1 {
            return Err(format!(
                "expected a file with one hard link, it has {links}: another process could use it by \
                 another name"
            ));
        }
        let path = beside(&database, ".lock");
        let held = Mutex::new(lock_file(&path)?);
        Ok(Self { database, database_id: FileId::of(&metadata), path, held })
    }

    /// The canonical path of the database file.
    pub(super) fn database(&self) -> &Path {
        &self.database
    }

    /// The path of the write-ahead log.
    pub(super) fn wal(&self) -> PathBuf {
        beside(&self.database, "-wal")
    }

    /// Checks that both files are still at their paths. If the lock file was removed or replaced,
    /// locks the new one.
    ///
    /// # Errors
    /// If another process holds the new lock, or the database file was moved, removed or replaced: an
    /// order that is stored in it now would not be found later.
    pub(super) fn check(&self) -> Result<(), String> {
        match fs::metadata(&self.database) {
            Ok(file) if FileId::of(&file) == self.database_id => {}
            Ok(_) => return Err("the database file was replaced by another".to_owned()),
            Err(error) => return Err(format!("the database file is not at its path: {error}")),
        }
        let mut held = self.held();
        if fs::metadata(&self.path).is_ok_and(|file| FileId::of(&file) == held.id) {
            return Ok(());
        }
        *held = lock_file(&self.path)?;
        tracing::warn!(path = %self.path.display(), "lock file removed or replaced: locked again");
        Ok(())
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // No code can panic while it holds the lock.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FileId {
    pub(super) fn of(file: &Metadata) -> Self {
        Self(file.dev(), file.ino())
    }
}

/// Opening a named pipe must not wait for its other end.
fn options() -> OpenOptions {
    let mut options = File::options();
    options.create(true).append(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed());
    options
}

fn beside(database: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(database);
    name.push(suffix);
    PathBuf::from(name)
}

/// Creates and locks a file. The file must still be at its path once it is locked.
fn lock_file(path: &Path) -> Result<Held, String> {
    let name = path.display();
    let failed = |what: &str, error: io::Error| format!("cannot {what} {name}: {error}");
    for _ in 0..ATTEMPTS {
        if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
            return Err(format!("{NO_FILE} at {name}"));
        }
        let file = options().open(path);
        let file = file.map_err(|error| {
            format!(
                "{}; this user must be able to write it and its directory",
                failed("open", error)
            )
        })?;
        let metadata = file.metadata();
        let metadata = metadata.map_err(|error| failed("read the metadata of", error))?;
        if !metadata.is_file() {
            return Err(format!("{NO_FILE} at {name}"));
        }
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(format!("another process uses it (it holds the lock on {name})"));
            }
            Err(TryLockError::Error(error)) => return Err(failed("lock", error)),
        }
        let id = FileId::of(&metadata);
        if fs::metadata(path).is_ok_and(|found| FileId::of(&found) == id) {
            return Ok(Held { _file: file, id });
        }
    }
    Err(format!("cannot lock {name}: it was removed {ATTEMPTS} times meanwhile"))
}
