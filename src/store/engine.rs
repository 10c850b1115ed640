//! What the batcher and the reads want of a database, and how each failure of one is to be taken.

use std::time::Duration;

use sqlx::error::DatabaseError;
use tokio::time::Instant;

use super::{
    NewOrder, StoreError,
    postgres::{self, Postgres},
    rows::Stored,
    sqlite::Sqlite,
};
use crate::{
    metrics::StoreErrorKind,
    order::{Order, OrderId},
};

/// What a connection is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Committing, and what a writer has to know for it.
    Write,
    /// Answering a read.
    Read,
}

/// The two databases.
#[derive(Debug)]
pub(super) enum Engine {
    Sqlite(Sqlite),
    Postgres(Postgres),
}

impl Engine {
    /// How many batches it takes at a time: SQLite has one writer.
    pub(super) fn writers(&self) -> usize {
        match self {
            Self::Sqlite(_) => 1,
            Self::Postgres(_) => postgres::WRITERS,
        }
    }

    /// Commits a batch with full durability, and tells what became of each order. Sending the same
    /// orders again is safe, whatever became of the first attempt.
    pub(super) async fn commit(&self, batch: &[NewOrder]) -> Result<Vec<Outcome>, Failure> {
        match self {
            Self::Sqlite(engine) => engine.commit(batch).await,
            Self::Postgres(engine) => engine.commit(batch).await,
        }
    }

    /// Finds out whether an order could be committed now, and stores none.
    pub(super) async fn probe(&self) -> Result<(), Failure> {
        match self {
            Self::Sqlite(engine) => engine.commit(&[]).await.map(drop),
            Self::Postgres(engine) => engine.probe().await,
        }
    }

    /// Finds out what became of orders that were sent before, and sends none. What it finds is as
    /// durable as what it commits.
    pub(super) async fn look_up(&self, batch: &[NewOrder]) -> Result<Vec<Outcome>, Failure> {
        match self {
            Self::Sqlite(engine) => engine.look_up(batch).await,
            Self::Postgres(engine) => engine.look_up(batch).await,
        }
    }

    /// Whether nothing that was sent before `until` can arrive at the database any more. Only then
    /// is an order that is not found not stored.
    pub(super) async fn earlier_attempts_are_over(&self, until: Instant) -> Result<bool, Failure> {
        match self {
            // An attempt is over when it returns.
            Self::Sqlite(_) => Ok(true),
            Self::Postgres(engine) => engine.earlier_attempts_are_over(until).await,
        }
    }

    pub(super) async fn get(&self, id: OrderId) -> Result<Option<Order>, Failure> {
        match self {
            Self::Sqlite(engine) => engine.get(id).await,
            Self::Postgres(engine) => engine.get(id).await,
        }
    }

    pub(super) async fn list(
        &self,
        before: Option<OrderId>,
        limit: u32,
    ) -> Result<Vec<Stored>, Failure> {
        match self {
            Self::Sqlite(engine) => engine.list(before, limit).await,
            Self::Postgres(engine) => engine.list(before, limit).await,
        }
    }

    pub(super) async fn close(&self) {
        match self {
            Self::Sqlite(engine) => engine.close().await,
            Self::Postgres(engine) => engine.close().await,
        }
    }
}

/// What became of one order of a batch that was committed.
#[derive(Debug, Clone)]
pub(super) enum Outcome {
    /// It is stored under the id that it came with.
    New,
    /// Its key had placed this order before.
    Earlier(Order),
    /// Its key had placed an order before that cannot be read: the cause.
    Unreadable(String),
    /// It is not stored, nor is another of its key: that one was deleted, or its key pruned,
    /// between the two statements. It is to be sent again.
    Missing,
}

/// Why an attempt failed.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) kind: StoreErrorKind,
    /// Whether the attempt may have been committed all the same.
    pub(super) outcome_unknown: bool,
    /// Whether it is a read that was in line for all of its time, and never came to the database.
    pub(super) had_no_turn: bool,
    /// Whether the server takes no writes, so that the next attempt must use another server.
    pub(super) read_only: bool,
    /// Whether the database did not answer in time, so that the statement may still run.
    pub(super) no_answer: bool,
    /// Whether a prepared statement was refused that would be accepted if prepared anew.
    pub(super) stale_statement: bool,
    pub(super) cause: String,
}

impl Failure {
    pub(super) fn unknown(kind: StoreErrorKind, cause: impl Into<String>) -> Self {
        Self { outcome_unknown: true, ..Self::nothing_done(kind, cause) }
    }

    pub(super) fn nothing_done(kind: StoreErrorKind, cause: impl Into<String>) -> Self {
        Self {
            kind,
            outcome_unknown: false,
            had_no_turn: false,
            read_only: false,
            no_answer: false,
            stale_statement: false,
            cause: cause.into(),
        }
    }

    /// The database did not answer within this limit.
    pub(super) fn no_answer(limit: Duration) -> Self {
        let cause = format!("no answer of the server within {} s", limit.as_secs());
        Self { no_answer: true, ..Self::unknown(StoreErrorKind::Timeout, cause) }
    }

    /// A read's turn did not come in time.
    pub(super) fn no_turn() -> Self {
        let cause = "no turn among the readers in time";
        Self { had_no_turn: true, ..Self::nothing_done(StoreErrorKind::Unavailable, cause) }
    }

    pub(super) fn closed() -> Self {
        Self::nothing_done(StoreErrorKind::Unavailable, "the store is closed")
    }

    /// An error of sqlx, where `of_database` knows the engine's own codes: the kind, and whether
    /// the outcome is unknown.
    pub(super) fn new(
        error: &sqlx::Error,
        of_database: impl FnOnce(&dyn DatabaseError) -> (StoreErrorKind, bool),
    ) -> Self {
        use sqlx::Error as E;
        let (kind, outcome_unknown) = match error {
            E::Database(error) => of_database(error.as_ref()),
            E::PoolTimedOut => (StoreErrorKind::Unavailable, false),
            // A broken connection, however sqlx met it.
            E::Io(_) | E::Tls(_) | E::Protocol(_) | E::PoolClosed | E::WorkerCrashed => {
                (StoreErrorKind::Unavailable, true)
            }
            _ => (StoreErrorKind::Other, true),
        };
        // PostgreSQL's read_only_sql_transaction; SQLite has no code of five digits like it.
        let read_only =
            matches!(error, E::Database(error) if error.code().as_deref() == Some("25006"));
        Self { outcome_unknown, read_only, ..Self::nothing_done(kind, error.to_string()) }
    }

    /// Whether the connection broke under the statements.
    pub(super) fn is_of_connection(&self) -> bool {
        self.kind == StoreErrorKind::Unavailable && self.outcome_unknown
    }

    /// What is to be done about a failed batch.
    pub(super) fn remedy(&self) -> Remedy {
        match self.kind {
            StoreErrorKind::Unavailable | StoreErrorKind::Timeout | StoreErrorKind::Conflict => {
                Remedy::Retry
            }
            StoreErrorKind::Full => Remedy::GiveUp,
            StoreErrorKind::Constraint | StoreErrorKind::Other => Remedy::OneByOne,
        }
    }

    /// What a reader is told.
    pub(super) fn for_caller(self) -> StoreError {
        match self.remedy() {
            Remedy::Retry | Remedy::GiveUp => StoreError::Unavailable,
            Remedy::OneByOne => StoreError::Internal(self.cause),
        }
    }
}

/// What is to be done about a failed batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Remedy {
    /// Try it again.
    Retry,
    /// Answer its callers: trying again is no use while the disk is full.
    GiveUp,
    /// Find the order that is to blame, so that the others are placed.
    OneByOne,
}
