//! Where orders are kept: the queue and the group commit (`batcher`), and the two engines. The only
//! SQL of the service is in this module's children.
//!
//! Knows [`mod@crate::order`], the handles of [`crate::metrics`] and the database URL; nothing of
//! the protocols.

use std::sync::Arc;

use tokio::{
    task::JoinSet,
    time::{Instant, timeout_at},
};
use tokio_util::task::AbortOnDropHandle;

use self::{
    batcher::Queue,
    engine::{Engine, Failure, Remedy},
    rows::Stored,
    unreadable::Unreadable,
};
use crate::{
    config::{DatabaseUrl, Migrations},
    metrics::StoreMetrics,
    order::{IdempotencyKey, Order, OrderId, Placed},
};

mod batcher;
mod dry_run;
mod engine;
mod foreign_tables;
mod health;
mod idle_probe;
mod migrate;
mod postgres;
mod readers;
mod replies;
mod rows;
mod sqlite;
mod unreadable;

pub use self::health::{StoreHealth, StoreStatus};

/// An order on its way to the store.
#[derive(Debug, Clone)]
pub struct NewOrder {
    /// The order, with the id that it will have if it is new.
    pub order: Order,
    /// The caller's key, if it wants to be able to retry.
    pub key: Option<IdempotencyKey>,
}

/// Why the store did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The queue is full: nothing was done.
    #[error("the store's queue is full")]
    QueueFull,
    /// More reads wait than can have their turn in time: nothing was done.
    #[error("the store's readers are busy")]
    ReadersBusy,
    /// The idempotency key names an order with another product or quantity.
    #[error("the idempotency key was used for another order")]
    KeyReused,
    /// The store cannot be reached or is full; a placed order's outcome may be unknown.
    #[error("the store is unavailable")]
    Unavailable,
    /// The caller's deadline passed first; nothing was done, and nothing will be.
    #[error("the deadline passed")]
    DeadlineExceeded,
    /// A failure that no retry mends, with its cause, which is for the log alone.
    #[error("the store failed: {0}")]
    Internal(String),
}

/// Why a store could not be opened: one line, without a password.
#[derive(Debug, thiserror::Error)]
#[error("--database-url {url}: {cause}")]
pub struct OpenError {
    url: String,
    cause: String,
}

/// A page of the stored orders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The orders, newest first.
    pub orders: Vec<Order>,
    /// Where the next page begins: below this id. `None` on the last page.
    pub next: Option<OrderId>,
}

/// A store of orders. A clone is cheap; each holds the queue open.
#[derive(Debug, Clone)]
pub struct Store {
    engine: Arc<Engine>,
    queue: Queue,
    health: StoreHealth,
    unreadable: Arc<Unreadable>,
}

impl Store {
    /// Opens a database, and applies pending migrations if `migrations` allows it. Waits at most
    /// 30 s for a PostgreSQL server that is not up yet; `health` says why meanwhile. `pool` is the
    /// number of connections to it, at least 1.
    ///
    /// # Errors
    /// If the database cannot be reached, is locked by another process or refuses the login, or its
    /// tables lack migrations that must not be applied, or have newer ones that are not additive.
    pub async fn open(
        url: DatabaseUrl,
        pool: usize,
        migrations: Migrations,
        metrics: StoreMetrics,
        health: StoreHealth,
    ) -> Result<(Self, Writers), OpenError> {
        let opened = match &url {
            DatabaseUrl::SqliteFile(path) => {
                sqlite::Sqlite::open_file(path, migrations, &health).await.map(Engine::Sqlite)
            }
            DatabaseUrl::SqliteMemory => sqlite::Sqlite::open_memory().await.map(Engine::Sqlite),
            DatabaseUrl::Postgres(url) => {
                let opened =
                    postgres::Postgres::open(url, pool, migrations, metrics.clone(), &health);
                opened.await.map(Engine::Postgres)
            }
        };
        let engine = opened.map_err(|cause| OpenError { url: url.to_string(), cause })?;
        let engine = Arc::new(engine);
        health.show(metrics.up.clone());
        if !health.is_failing() {
            health.answered();
        }
        let unreadable = Arc::new(Unreadable::new(metrics.clone()));
        let idle_probe = idle_probe::start(engine.clone(), health.clone());
        let (queue, tasks) = batcher::start(&engine, metrics, &health);
        let writers = Writers { tasks, idle_probe, engine: engine.clone() };
        Ok((Self { engine, queue, health, unreadable }, writers))
    }

    /// Places an order, or finds the one that its key has already placed.
    ///
    /// A caller that drops this future before its order was sent to the database places nothing;
    /// one that drops it later may have placed it.
    ///
    /// # Errors
    /// Any [`StoreError`].
    pub async fn place(&self, order: NewOrder, deadline: Instant) -> Result<Placed, StoreError> {
        self.queue.place(order, deadline).await
    }

    /// Reads one order.
    ///
    /// # Errors
    /// `ReadersBusy`, `Unavailable`, `DeadlineExceeded` or `Internal`.
    pub async fn get(&self, id: OrderId, deadline: Instant) -> Result<Option<Order>, StoreError> {
        self.read(self.engine.get(id), deadline).await
    }

    /// Reads a page of at most `size` orders, newest first, beginning below `before`. A stored row
    /// that cannot be read as an order is left out, and reported once.
    ///
    /// # Errors
    /// `ReadersBusy`, `Unavailable`, `DeadlineExceeded` or `Internal`.
    pub async fn list(
        &self,
        before: Option<OrderId>,
        size: u32,
        deadline: Instant,
    ) -> Result<Listed, StoreError> {
        // One more than the page holds tells whether there is a next one.
        let limit = size.saturating_add(1);
        let mut rows = self.read(self.engine.list(before, limit), deadline).await?;
        let more = rows.len() > size as usize;
        rows.truncate(size as usize);
        let next = rows.last().filter(|_| more).map(Stored::id);
        Ok(Listed { orders: self.unreadable.leave_out(rows), next })
    }

    async fn read<T>(
        &self,
        reading: impl Future<Output = Result<T, Failure>>,
        deadline: Instant,
    ) -> Result<T, StoreError> {
        let begun = Instant::now();
        match timeout_at(deadline, reading).await {
            Ok(Ok(read)) => {
                self.health.read_answered();
                Ok(read)
            }
            // To be in line is no failure, and tells of an outage only if there is one.
            Ok(Err(failure)) if failure.had_no_turn => {
                let outage = self.health.is_failing();
                Err(if outage { StoreError::Unavailable } else { StoreError::ReadersBusy })
            }
            Ok(Err(failure)) => {
                if failure.remedy() != Remedy::OneByOne {
                    self.health.read_failed(failure.cause.clone());
                }
                Err(failure.for_caller())
            }
            Err(_) if self.health.failed_since(begun) => Err(StoreError::Unavailable),
            Err(_) => Err(StoreError::DeadlineExceeded),
        }
    }
}

/// Applies the pending migrations of a database and returns their versions, without a time limit for
/// their statements. Waits for a PostgreSQL server as [`Store::open`] does.
///
/// # Errors
/// As [`Store::open`].
pub async fn migrate(url: &DatabaseUrl) -> Result<Vec<i64>, OpenError> {
    let applied = match url {
        DatabaseUrl::SqliteFile(path) => sqlite::Sqlite::migrate_file(path).await,
        // Its tables end with the process.
        DatabaseUrl::SqliteMemory => Ok(Vec::new()),
        DatabaseUrl::Postgres(url) => postgres::Postgres::migrate(url).await,
    };
    applied.map_err(|cause| OpenError { url: url.to_string(), cause })
}

/// The writing half of a store.
#[derive(Debug)]
pub struct Writers {
    tasks: JoinSet<()>,
    idle_probe: AbortOnDropHandle<()>,
    engine: Arc<Engine>,
}

/// A writer that ended before its work did: a bug.
#[derive(Debug, thiserror::Error)]
#[error("a writer of the store ended by itself: {0}")]
pub struct WriterEnded(String);

impl Writers {
    /// Waits for a writer to end by itself, which none does while there is a clone of the store.
    pub async fn failed(&mut self) -> WriterEnded {
        match self.tasks.join_next().await {
            Some(Err(error)) => WriterEnded(error.to_string()),
            Some(Ok(())) => WriterEnded("no call can reach it any more".to_owned()),
            None => std::future::pending().await,
        }
    }

    /// Waits until every clone of the store is gone and every order that was queued is settled;
    /// then closes the database.
    ///
    /// # Errors
    /// If a writer ended before its orders were settled.
    pub async fn finished(mut self) -> Result<(), WriterEnded> {
        let mut result = Ok(());
        while let Some(ended) = self.tasks.join_next().await {
            if let Err(error) = ended {
                result = Err(WriterEnded(error.to_string()));
            }
        }
        // Awaited, since it holds the engine, and that the lock of a file.
        self.idle_probe.abort();
        let _ = self.idle_probe.await;
        self.engine.close().await;
        result
    }
}
