//! The start on a file: an order is tried, and what keeps it from being placed is reported with its
//! remedy.

use std::time::Duration;

use sqlx::migrate::MigrateError;
use tokio::time::{Instant, sleep};

use super::Sqlite;
use crate::store::StoreHealth;

/// How long a file that another program holds is waited for.
const OPENING: Duration = Duration::from_secs(30);

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(250);

/// Returns once an order can be placed and read.
///
/// # Errors
/// One line with the cause and the remedy.
pub(super) async fn wait_until_ready(file: &Sqlite, health: &StoreHealth) -> Result<(), String> {
    let until = Instant::now() + OPENING;
    loop {
        let Err(error) = file.dry_run().await else { return Ok(()) };
        let cause = cause(&error);
        // BUSY, LOCKED: another program holds the file, and may release it.
        if !matches!(primary_code(&error), Some(5 | 6)) {
            return Err(cause);
        }
        if Instant::now() + PAUSE >= until {
            return Err(format!("it was not ready within {} s: {cause}", OPENING.as_secs()));
        }
        health.not_open_yet(cause);
        sleep(PAUSE).await;
    }
}

/// What keeps orders from being placed, and what to do about it.
pub(super) fn cause(error: &sqlx::Error) -> String {
    let remedy = match primary_code(error) {
        // BUSY, LOCKED
        Some(5 | 6) => "another program holds it: end that program's transaction",
        // READONLY
        Some(8) => {
            "this user must be able to write the file, its -wal and -shm and its directory, and the \
             file system must not be read-only"
        }
        // CANTOPEN
        Some(14) => {
            "its directory must exist, and this user must be able to write the file, its -wal and \
             -shm and its directory"
        }
        // NOTADB
        Some(26) => "expected a file of this program, or none",
        // ERROR, as of a column that is missing.
        Some(1) => "its table orders is not as this program made it",
        _ => return error.to_string(),
    };
    format!("{error}: {remedy}")
}

/// As [`cause`].
pub(super) fn migration_cause(error: &MigrateError) -> String {
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)
            if primary_code(error) != Some(1) =>
        {
            format!("its tables: {}", cause(error))
        }
        _ => format!("its tables: {error}"),
    }
}

fn primary_code(error: &sqlx::Error) -> Option<u32> {
    let code = error.as_database_error()?.code()?.parse::<u32>().ok()?;
    Some(code & 0xff)
}
