//! What an error of the server means for an attempt.

use sqlx::error::DatabaseError;

use crate::{metrics::StoreErrorKind, store::engine::Failure};

pub(super) fn failure(error: &sqlx::Error) -> Failure {
    Failure { stale_statement: is_stale_statement(error), ..Failure::new(error, of_database) }
}

/// Whether a prepared statement must be prepared anew: the table's columns changed (0A000, which
/// none of the statements causes by itself), or a pooler gave the connection another server
/// process, which does not have the statement (26000) or has one of that name (42P05).
fn is_stale_statement(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(DatabaseError::code);
    matches!(code.as_deref(), Some("0A000" | "26000" | "42P05"))
}

/// By SQLSTATE (PostgreSQL, appendix A).
fn of_database(error: &dyn DatabaseError) -> (StoreErrorKind, bool) {
    match error.code().as_deref() {
        // Serialisation failure, deadlock.
        Some("40001" | "40P01") => (StoreErrorKind::Conflict, false),
        // A statement or lock that took too long: cancelled, and with it undone.
        Some("57014" | "55P03") => (StoreErrorKind::Timeout, false),
        // Out of memory, too many connections, a limit of the server; a server that is a replica at
        // present; an I/O error of its own.
        Some("53200" | "53300" | "53400" | "25006" | "58030") => {
            (StoreErrorKind::Unavailable, false)
        }
        // The server stops or starts, or the database goes; it does not know the outcome itself.
        Some("57P01" | "57P02" | "57P03" | "57P04" | "57P05" | "40003") => {
            (StoreErrorKind::Unavailable, true)
        }
        Some("53100") => (StoreErrorKind::Full, false),
        // The connection failed.
        Some(code) if code.starts_with("08") => (StoreErrorKind::Unavailable, true),
        Some(code) if code.starts_with("23") => (StoreErrorKind::Constraint, false),
        _ => (StoreErrorKind::Other, false),
    }
}
