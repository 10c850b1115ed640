//! PostgreSQL, shared by many replicas; nothing here that CockroachDB or YugabyteDB lacks.

use std::time::Duration;

use sqlx::{
    Row as _,
    error::DatabaseError,
    postgres::{PgConnection, PgRow},
};
use tokio::time::timeout;
use uuid::Uuid;

use self::{connections::Connections, opening::Tables, servers::Servers};
use super::{
    NewOrder, StoreHealth,
    engine::{Failure, Outcome, Purpose},
    rows::{Stored, millis, resolve},
};
use crate::{
    config::{Migrations, PostgresUrl},
    metrics::StoreErrorKind,
    order::{IdempotencyKey, Order, OrderId},
};

mod connections;
mod opening;
mod servers;

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

/// A statement of its own, and with it a new snapshot: the first one cannot see the rows that it
/// conflicted with. The columns are named, here and below, because the server refuses a prepared
/// `SELECT *` once a newer version has added one.
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
}

impl Postgres {
    pub(super) async fn open(
        url: &PostgresUrl,
        pool: usize,
        migrations: Migrations,
        health: &StoreHealth,
    ) -> Result<Self, String> {
        let servers = Servers::new(url);
        // Without the time limits: a migration of a large table takes what it takes.
        opening::wait_until_ready(&servers, Tables::Serve(migrations), health).await?;
        let servers = servers.map(|options| options.options([STATEMENT_TIMEOUT, LOCK_TIMEOUT]));
        Ok(Self { connections: Connections::new(servers, pool, WRITERS) })
    }

    /// Applies the pending migrations and returns their versions.
    pub(super) async fn migrate(url: &PostgresUrl) -> Result<Vec<i64>, String> {
        let health = StoreHealth::new();
        opening::wait_until_ready(&Servers::new(url), Tables::Migrate, &health).await
    }

    pub(super) async fn commit(&self, batch: &[NewOrder]) -> Result<Vec<Outcome>, Failure> {
        let ids: Vec<Uuid> = batch.iter().map(|new| uuid(new.order.id)).collect();
        let products: Vec<&str> = batch.iter().map(|new| new.order.product_id.as_str()).collect();
        let quantities: Vec<i32> =
            batch.iter().map(|new| new.order.quantity.get().into()).collect();
        let keys: Vec<Option<&str>> =
            batch.iter().map(|new| new.key.as_ref().map(IdempotencyKey::as_str)).collect();
        let placed: Vec<i64> = batch.iter().map(|new| millis(new.order.placed_at)).collect();

        self.attempt(Purpose::Write, async |connection| {
            let insert = sqlx::query(INSERT)
                .bind(&ids)
                .bind(&products)
                .bind(&quantities)
                .bind(&keys)
                .bind(&placed);
            let inserted =
                insert.fetch_all(&mut *connection).await.map_err(|error| failure(&error))?;
            if inserted.len() == batch.len() {
                return Ok(vec![Outcome::New; batch.len()]);
            }
            let query = sqlx::query(RESOLVE).bind(&ids).bind(&keys);
            // The others of the batch are committed, whatever becomes of this statement.
            let unknown = |error: &sqlx::Error| Failure { outcome_unknown: true, ..failure(error) };
            let rows = query.fetch_all(connection).await.map_err(|error| unknown(&error))?;
            let rows = rows.iter().map(stored_row).collect::<Result<Vec<_>, _>>();
            Ok(resolve(batch, rows.map_err(|error| unknown(&error))?))
        })
        .await
    }

    /// A read that meets a broken connection is tried once more, on a new one: after a restart of
    /// the server every idle connection is broken.
    pub(super) async fn get(
        &self,
        id: OrderId,
        purpose: Purpose,
    ) -> Result<Option<Order>, Failure> {
        match self.try_get(id, purpose).await {
            Err(failure) if failure.is_of_connection() => self.try_get(id, purpose).await,
            read => read,
        }
    }

    /// As [`Self::get`].
    pub(super) async fn list(
        &self,
        before: Option<OrderId>,
        limit: u32,
    ) -> Result<Vec<Order>, Failure> {
        match self.try_list(before, limit).await {
            Err(failure) if failure.is_of_connection() => self.try_list(before, limit).await,
            read => read,
        }
    }

    async fn try_get(&self, id: OrderId, purpose: Purpose) -> Result<Option<Order>, Failure> {
        self.attempt(purpose, async |connection| {
            let row = sqlx::query(GET).bind(uuid(id)).fetch_optional(connection).await;
            let row = row.map_err(|error| failure(&error))?;
            row.as_ref().map(order_of_row).transpose()
        })
        .await
    }

    async fn try_list(&self, before: Option<OrderId>, limit: u32) -> Result<Vec<Order>, Failure> {
        self.attempt(Purpose::Read, async |connection| {
            let query = sqlx::query(if before.is_some() { NEXT_PAGE } else { FIRST_PAGE });
            let query = query.bind(i64::from(limit));
            let query = match before {
                Some(before) => query.bind(uuid(before)),
                None => query,
            };
            let rows = query.fetch_all(connection).await.map_err(|error| failure(&error))?;
            rows.iter().map(order_of_row).collect()
        })
        .await
    }

    /// Runs statements on one connection within the time limits. Only a connection on which they
    /// are known to be over is used again: a server that hangs would take the next attempt with it.
    async fn attempt<T>(
        &self,
        purpose: Purpose,
        statements: impl AsyncFnOnce(&mut PgConnection) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut taken = self.connections.take(purpose).await?;
        match timeout(ATTEMPT, statements(taken.connection())).await {
            Ok(Ok(read)) => {
                taken.keep();
                Ok(read)
            }
            Ok(Err(failure)) => {
                if failure.read_only {
                    self.connections.leave(&taken);
                } else if failure.kind == StoreErrorKind::Unavailable {
                    self.connections.distrust();
                } else {
                    // The server refused, and the transaction is over.
                    taken.keep();
                }
                Err(failure)
            }
            Err(_) => {
                self.connections.distrust();
                let cause = "no answer of the server within 1 s";
                Err(Failure::unknown(StoreErrorKind::Timeout, cause))
            }
        }
    }

    pub(super) async fn close(&self) {
        self.connections.close().await;
    }
}

fn uuid(id: OrderId) -> Uuid {
    Uuid::from_bytes(*id.as_bytes())
}

fn stored_row(row: &PgRow) -> Result<Stored, sqlx::Error> {
    let id: Uuid = row.try_get("id")?;
    let product_id: String = row.try_get("product_id")?;
    let quantity: i32 = row.try_get("quantity")?;
    let (key, placed_at) = (row.try_get("idempotency_key")?, row.try_get("placed_at")?);
    Ok(Stored::new(id.into_bytes(), &product_id, quantity.into(), key, placed_at))
}

fn order_of_row(row: &PgRow) -> Result<Order, Failure> {
    stored_row(row).map_err(|error| failure(&error))?.into_order()
}

fn failure(error: &sqlx::Error) -> Failure {
    Failure::new(error, of_database)
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
