//! PostgreSQL, shared by many replicas; nothing here that CockroachDB or YugabyteDB lacks.

use std::time::Duration;

use sqlx::{Execute, Executor as _, postgres::PgRow};
use tokio::time::{Instant, timeout};

use self::{
    confirmation::{CONFIRMATION, RESOLVE_CONFIRMED, UNCONFIRMED},
    connections::{Connections, Taken},
    errors::failure,
    opening::{Opened, Tables},
    rows::{ids, insert, keys, stored_row, uuid},
    servers::Servers,
    session::{Backend, LeftBehind, Session},
};
use super::{
    NewOrder, StoreHealth,
    engine::{Failure, Outcome, Purpose, Remedy},
    rows::{Stored, resolve},
};
use crate::{
    config::{Migrations, PostgresUrl},
    metrics::{StoreErrorKind, StoreMetrics},
    order::{Order, OrderId},
};

mod confirmation;
mod connections;
mod dry_run;
mod durability;
mod errors;
mod opening;
mod rows;
mod servers;
mod session;
mod warnings;

/// Batches at a time: one's fills while the other's is flushed. Two were faster than one and than
/// four.
pub(super) const WRITERS: usize = 2;

/// How long to wait for the answer of the server. Its own limits, which are longer, end what nobody
/// waits for any more.
const ATTEMPT: Duration = Duration::from_secs(1);

const STATEMENT_TIMEOUT: (&str, &str) = ("statement_timeout", "2s");
const LOCK_TIMEOUT: (&str, &str) = ("lock_timeout", "1500ms");

/// Sorted by the key: two writers whose batches share keys would otherwise wait for each other.
const INSERT: &str = "INSERT INTO orders (id, product_id, quantity, idempotency_key, placed_at) \
    SELECT * FROM UNNEST($1::UUID[], $2::TEXT[], $3::INT4[], $4::TEXT[], $5::INT8[]) \
    AS new (id, product_id, quantity, idempotency_key, placed_at) \
    ORDER BY idempotency_key ON CONFLICT DO NOTHING RETURNING id";

/// Reads the rows of a batch: its own, and those of its keys. A statement of its own, and with it a
/// new snapshot: the first one cannot see the rows that it conflicted with. The columns are named,
/// here and below, because the server refuses a prepared `SELECT *` once a newer version has added
/// one.
const RESOLVE: &str = "SELECT id, product_id, quantity, idempotency_key, placed_at \
    FROM orders WHERE id = ANY($1::UUID[]) \
    UNION ALL SELECT id, product_id, quantity, idempotency_key, placed_at \
    FROM orders WHERE idempotency_key = ANY($2::TEXT[])";

const GET: &str =
    "SELECT id, product_id, quantity, idempotency_key, placed_at FROM orders WHERE id = $1";
const FIRST_PAGE: &str = "SELECT id, product_id, quantity, idempotency_key, placed_at \
    FROM orders ORDER BY id DESC LIMIT $1";
const NEXT_PAGE: &str = "SELECT id, product_id, quantity, idempotency_key, placed_at \
    FROM orders WHERE id < $2 ORDER BY id DESC LIMIT $1";

#[derive(Debug)]
pub(super) struct Postgres {
    connections: Connections,
    resolve: &'static str,
    metrics: StoreMetrics,
}

impl Postgres {
    pub(super) async fn open(
        url: &PostgresUrl,
        pool: usize,
        migrations: Migrations,
        metrics: StoreMetrics,
        health: &StoreHealth,
    ) -> Result<Self, String> {
        let servers = Servers::new(url);
        // Migrations run without the time limits: one of a large table takes what it takes.
        let limited = limited(url);
        let tables = Tables::Serve(migrations);
        let Opened { confirms, waiting, .. } =
            opening::wait_until_ready(&servers, &limited, tables, health).await?;
        let resolve = if confirms { RESOLVE_CONFIRMED } else { RESOLVE };
        let opened =
            Self { connections: Connections::new(limited, pool, WRITERS), resolve, metrics };
        // The start does not wait for a standby that is down: orders can be read meanwhile.
        if let Some(backend) = waiting {
            let _ = opened.terminate(&[backend]).await;
            health.failed(UNCONFIRMED.to_owned());
        }
        Ok(opened)
    }

    /// Applies the pending migrations and returns their versions.
    pub(super) async fn migrate(url: &PostgresUrl) -> Result<Vec<i64>, String> {
        let health = StoreHealth::new();
        let servers = Servers::new(url);
        let limited = limited(url);
        let opened = opening::wait_until_ready(&servers, &limited, Tables::Migrate, &health);
        Ok(opened.await?.tables.pending)
    }

    /// A prepared statement that is outdated is tried once more: see [`is_stale_statement`].
    pub(super) async fn commit(&self, batch: &[NewOrder]) -> Result<Vec<Outcome>, Failure> {
        match self.try_commit(batch).await {
            Err(failure) if failure.stale_statement => {
                // The first attempt may have committed what the second one finds refused.
                self.try_commit(batch).await.map_err(|again| Failure {
                    outcome_unknown: again.outcome_unknown || failure.outcome_unknown,
                    ..again
                })
            }
            committed => committed,
        }
    }

    async fn try_commit(&self, batch: &[NewOrder]) -> Result<Vec<Outcome>, Failure> {
        let mut taken = self.connections.take(Purpose::Write).await?;
        let session = taken.session();
        let insert = insert(&mut session.connection, batch);
        let inserted = within(ATTEMPT, session.warnings.during(insert)).await;
        // Not to be taken for the next statement's.
        let warned = !session.warnings.take().is_empty();
        match inserted {
            Ok(inserted) if inserted == batch.len() && !warned => {
                taken.keep();
                Ok(vec![Outcome::New; batch.len()])
            }
            // Some were there before; or the wait for the standby may have been cancelled.
            Ok(_) => self.resolve(taken, batch).await,
            Err(failure) => Err(self.failed(taken, failure)),
        }
    }

    /// Finds out what became of the orders of a batch, and stores none.
    pub(super) async fn look_up(&self, batch: &[NewOrder]) -> Result<Vec<Outcome>, Failure> {
        let mut taken = self.connections.take(Purpose::Write).await?;
        if let Err(failure) = self.require_primary(taken.session()).await {
            return Err(self.failed(taken, failure));
        }
        match self.resolve(taken, batch).await {
            Err(failure) if failure.stale_statement => {
                let taken = self.connections.take(Purpose::Write).await?;
                self.resolve(taken, batch).await
            }
            looked_up => looked_up,
        }
    }

    /// Does what placing does, with no order: the same statement, which takes the same locks and
    /// rights and leaves nothing behind. Then waits for the synchronous standby, if there is one.
    pub(super) async fn probe(&self) -> Result<(), Failure> {
        self.commit(&[]).await?;
        if self.resolve == RESOLVE_CONFIRMED {
            let taken = self.connections.take(Purpose::Write).await?;
            self.confirm(taken, sqlx::raw_sql(confirmation::PROBE)).await?;
        }
        Ok(())
    }

    /// Whatever fails here, orders of the batch may be committed.
    async fn resolve(&self, taken: Taken<'_>, batch: &[NewOrder]) -> Result<Vec<Outcome>, Failure> {
        let read = sqlx::query(self.resolve).bind(ids(batch)).bind(keys(batch));
        let rows = self.confirm(taken, read).await?;
        let rows = rows.iter().map(stored_row).collect::<Result<_, _>>();
        let rows = rows.map_err(|error| Failure { outcome_unknown: true, ..failure(&error) })?;
        Ok(resolve(batch, rows))
    }

    /// Runs a statement whose commit waits for the synchronous standby.
    async fn confirm<'q>(
        &self,
        mut taken: Taken<'_>,
        statement: impl Execute<'q, sqlx::Postgres> + 'q,
    ) -> Result<Vec<PgRow>, Failure> {
        let session = taken.session();
        let backend = session.backend;
        let run = session.connection.fetch_all(statement);
        let rows = within(CONFIRMATION, session.warnings.during(run)).await;
        let warned = session.warnings.take();
        let rows = match rows {
            Ok(rows) => self.confirmed(session, &warned).await.map(|()| rows),
            Err(failure) => Err(failure),
        };
        match rows {
            Ok(rows) => {
                taken.keep();
                Ok(rows)
            }
            Err(failure) if failure.no_answer => {
                let failure = Failure { cause: UNCONFIRMED.to_owned(), ..failure };
                let failure = self.failed(taken, failure);
                // It would wait until the standby is back, and each retry adds another one.
                let _ = self.terminate(&[backend]).await;
                Err(failure)
            }
            Err(failure) => Err(self.failed(taken, Failure { outcome_unknown: true, ..failure })),
        }
    }

    /// Fails on a standby, which may lack what the primary has and runs none of its processes. It
    /// must never have the last word on an order, and is left for the next server.
    async fn require_primary(&self, session: &mut Session) -> Result<(), Failure> {
        // Servers of other kinds have no standbys.
        if self.resolve == RESOLVE || !within(ATTEMPT, session.is_standby()).await? {
            return Ok(());
        }
        let cause = "it is a standby, which may lack what the primary has";
        let failure = Failure::nothing_done(StoreErrorKind::Unavailable, cause);
        Err(Failure { read_only: true, ..failure })
    }

    /// Fails unless the commit with these warnings waited for the synchronous standby.
    async fn confirmed(&self, session: &mut Session, warned: &[String]) -> Result<(), Failure> {
        // A plain read commits nothing.
        if warned.is_empty() || self.resolve == RESOLVE {
            return Ok(());
        }
        match within(ATTEMPT, confirmation::doubt(session, warned)).await? {
            None => Ok(()),
            Some(cause) => Err(Failure::unknown(StoreErrorKind::Unavailable, cause)),
        }
    }

    /// Whether no attempt whose connection was closed before `until` can store an order any more:
    /// its process on the server is gone, and with it whatever the network still has to deliver.
    /// Processes that outlive the time limit of their statement are terminated.
    ///
    /// Behind a pooler, the process may be another client's by then. Therefore the limit must be
    /// over in any case. On a server that refuses the question it is all there is.
    pub(super) async fn earlier_attempts_are_over(&self, until: Instant) -> Result<bool, Failure> {
        let left = self.connections.left_behind(until);
        if !left.iter().all(LeftBehind::statement_is_over) {
            return Ok(false);
        }
        if left.is_empty() {
            return Ok(true);
        }
        let left: Vec<Backend> = left.iter().map(|left| left.backend).collect();
        let running = match self.terminate(&left).await {
            Err(failure) if failure.remedy() == Remedy::OneByOne => Vec::new(),
            running => running?,
        };
        let over: Vec<Backend> =
            left.into_iter().filter(|backend| !running.contains(backend)).collect();
        self.connections.forget(&over);
        Ok(running.is_empty())
    }

    async fn terminate(&self, backends: &[Backend]) -> Result<Vec<Backend>, Failure> {
        self.attempt(Purpose::Write, async |session| {
            self.require_primary(session).await?;
            session.terminate(backends).await.map_err(|error| failure(&error))
        })
        .await
    }

    /// A read that meets a broken connection is tried once more, on a new one: after a restart of
    /// the server every idle connection is broken.
    pub(super) async fn get(&self, id: OrderId) -> Result<Option<Order>, Failure> {
        match self.try_get(id).await {
            Err(failure) if failure.is_of_connection() || failure.stale_statement => {
                self.try_get(id).await
            }
            read => read,
        }
    }

    /// As [`Self::get`].
    pub(super) async fn list(
        &self,
        before: Option<OrderId>,
        limit: u32,
    ) -> Result<Vec<Stored>, Failure> {
        match self.try_list(before, limit).await {
            Err(failure) if failure.is_of_connection() || failure.stale_statement => {
                self.try_list(before, limit).await
            }
            read => read,
        }
    }

    async fn try_get(&self, id: OrderId) -> Result<Option<Order>, Failure> {
        self.attempt(Purpose::Read, async |session| {
            let query = sqlx::query(GET).bind(uuid(id));
            let row = query.fetch_optional(&mut session.connection).await;
            let row = row.map_err(|error| failure(&error))?;
            row.as_ref().map(order_of_row).transpose()
        })
        .await
    }

    async fn try_list(&self, before: Option<OrderId>, limit: u32) -> Result<Vec<Stored>, Failure> {
        self.attempt(Purpose::Read, async |session| {
            let query = sqlx::query(if before.is_some() { NEXT_PAGE } else { FIRST_PAGE });
            let query = query.bind(i64::from(limit));
            let query = match before {
                Some(before) => query.bind(uuid(before)),
                None => query,
            };
            let rows = query.fetch_all(&mut session.connection).await;
            let rows = rows.map_err(|error| failure(&error))?;
            rows.iter().map(stored_row).collect::<Result<_, _>>().map_err(|error| failure(&error))
        })
        .await
    }

    /// Runs statements on one connection within the time limit of an attempt.
    async fn attempt<T>(
        &self,
        purpose: Purpose,
        statements: impl AsyncFnOnce(&mut Session) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut taken = self.connections.take(purpose).await?;
        let done = match timeout(ATTEMPT, statements(taken.session())).await {
            Ok(done) => done,
            Err(_) => Err(Failure::no_answer(ATTEMPT)),
        };
        match done {
            Ok(read) => {
                taken.keep();
                Ok(read)
            }
            Err(failure) => Err(self.failed(taken, failure)),
        }
    }

    /// Only a connection on which the statements are known to be over is used again: a server that
    /// hangs would take the next attempt with it.
    fn failed(&self, taken: Taken<'_>, failure: Failure) -> Failure {
        if failure.read_only {
            self.connections.leave(&taken);
        } else if failure.kind == StoreErrorKind::Unavailable || failure.no_answer {
            self.connections.distrust();
        } else {
            if failure.stale_statement {
                self.metrics.errors(failure.kind).inc();
                self.connections.replace(&taken);
            }
            // The server refused, and the transaction is over.
            taken.keep();
        }
        failure
    }

    pub(super) async fn close(&self) {
        self.connections.close().await;
    }
}

/// The servers with the options of placing orders.
fn limited(url: &PostgresUrl) -> Servers {
    Servers::new(url).map(|options| options.options([STATEMENT_TIMEOUT, LOCK_TIMEOUT]))
}

async fn within<T>(
    limit: Duration,
    statement: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, Failure> {
    match timeout(limit, statement).await {
        Ok(done) => done.map_err(|error| failure(&error)),
        Err(_) => Err(Failure::no_answer(limit)),
    }
}

fn order_of_row(row: &PgRow) -> Result<Order, Failure> {
    stored_row(row).map_err(|error| failure(&error))?.into_order()
}
