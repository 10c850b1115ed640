//! PostgreSQL, shared by many replicas; nothing here that CockroachDB or YugabyteDB lacks.

use std::{str::FromStr as _, time::Duration};

use rand::RngExt as _;
use sqlx::{
    ConnectOptions as _, PgPool, Row as _,
    error::DatabaseError,
    migrate::MigrateError,
    pool::PoolConnection,
    postgres::{PgConnectOptions, PgPoolOptions, PgRow, Postgres as Pg},
};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use super::{
    NewOrder, StoreHealth,
    engine::Failure,
    migrate,
    rows::{Stored, millis, resolve},
};
use crate::{
    metrics::StoreErrorKind,
    order::{IdempotencyKey, Order, OrderId},
};

/// How long to wait for a connection, and for the server's answer on it. The server's own limits end
/// what nobody waits for any more.
const ACQUIRE: Duration = Duration::from_secs(1);
const ATTEMPT: Duration = Duration::from_secs(1);
const STATEMENT_TIMEOUT: (&str, &str) = ("statement_timeout", "2s");
const LOCK_TIMEOUT: (&str, &str) = ("lock_timeout", "1500ms");

/// How long a server that is not up yet is waited for.
const OPENING: Duration = Duration::from_secs(30);

/// Sorted by the key: two writers whose batches share keys would otherwise wait for each other.
const INSERT: &str = "INSERT INTO orders (id, product_id, quantity, idempotency_key, placed_at) \
    SELECT * FROM UNNEST($1::UUID[], $2::TEXT[], $3::INT4[], $4::TEXT[], $5::INT8[]) \
    AS new (id, product_id, quantity, idempotency_key, placed_at) \
    ORDER BY idempotency_key ON CONFLICT DO NOTHING RETURNING id";

/// A statement of its own, and with it a new snapshot: the first one cannot see the rows that it
/// conflicted with.
const RESOLVE: &str = "SELECT * FROM orders WHERE id = ANY($1::UUID[]) \
    UNION ALL SELECT * FROM orders WHERE idempotency_key = ANY($2::TEXT[])";

#[derive(Debug)]
pub(super) struct Postgres {
    pool: PgPool,
}

impl Postgres {
    pub(super) async fn open(
        url: String,
        pool: usize,
        health: &StoreHealth,
    ) -> Result<Self, String> {
        // The parser's words may hold a part of the URL, and that of the password.
        let options = PgConnectOptions::from_str(&url)
            .map_err(|_| "expected postgres://USER:PASSWORD@HOST:PORT/DATABASE".to_owned())?
            .application_name("order-service")
            .options([STATEMENT_TIMEOUT, LOCK_TIMEOUT])
            // Durations are in the metrics, failures in our own lines.
            .disable_statement_logging();
        let pool = PgPoolOptions::new()
            .max_connections(pool.try_into().unwrap_or(u32::MAX))
            .acquire_timeout(ACQUIRE)
            // A ping before each use would cost a round trip; a broken connection costs a retry.
            .test_before_acquire(false)
            .connect_lazy_with(options);
        let until = Instant::now() + OPENING;
        loop {
            let why = match Self::prepare(&pool).await {
                Ok(()) => return Ok(Self { pool }),
                Err(NotReady::Never(why)) => return Err(why),
                Err(NotReady::NotYet(why)) => why,
            };
            if Instant::now() >= until {
                let seconds = OPENING.as_secs();
                return Err(format!("it did not answer within {seconds} s: {why}"));
            }
            health.not_open_yet(why);
            let pause = rand::rng().random_range(200..600);
            sleep(Duration::from_millis(pause)).await;
        }
    }

    /// Connects and brings the tables up to date.
    async fn prepare(pool: &PgPool) -> Result<(), NotReady> {
        let connecting = timeout(Duration::from_secs(5), pool.acquire());
        let mut connection = match connecting.await {
            Ok(connected) => connected.map_err(|error| NotReady::of_connecting(&error))?,
            Err(_) => return Err(NotReady::NotYet("no answer within 5 s".to_owned())),
        };
        let migrator = migrate::postgres();
        // `Migrator::run` on a connection makes a future that is not `Send`; sqlx has this for it.
        let migrating = migrator.run_direct(None, &mut *connection, false);
        let migrating = timeout(Duration::from_secs(10), migrating).await;
        let Ok(migrated) = migrating else {
            drop(connection.detach());
            return Err(NotReady::NotYet("its tables were not made within 10 s".to_owned()));
        };
        migrated.map_err(|error| match error {
            MigrateError::VersionMissing(version) => NotReady::Never(format!(
                "its tables were made by a newer version of this program (migration {version})"
            )),
            MigrateError::VersionMismatch(version) => {
                NotReady::Never(format!("its migration {version} is not this program's"))
            }
            // Replicas that start together get into each other's way once.
            other => NotReady::NotYet(format!("its tables: {other}")),
        })
    }

    pub(super) async fn commit(&self, batch: &[NewOrder]) -> Result<Vec<Option<Order>>, Failure> {
        let ids: Vec<Uuid> = batch.iter().map(|new| uuid(new.order.id)).collect();
        let products: Vec<&str> = batch.iter().map(|new| new.order.product_id.as_str()).collect();
        let quantities: Vec<i32> =
            batch.iter().map(|new| new.order.quantity.get().into()).collect();
        let keys: Vec<Option<&str>> =
            batch.iter().map(|new| new.key.as_ref().map(IdempotencyKey::as_str)).collect();
        let placed: Vec<i64> = batch.iter().map(|new| millis(new.order.placed_at)).collect();

        self.attempt(async |connection| {
            let insert = sqlx::query(INSERT)
                .bind(&ids)
                .bind(&products)
                .bind(&quantities)
                .bind(&keys)
                .bind(&placed);
            let inserted = insert.fetch_all(&mut **connection).await?;
            if inserted.len() == batch.len() {
                return Ok(Ok(vec![None; batch.len()]));
            }
            let query = sqlx::query(RESOLVE).bind(&ids).bind(&keys);
            let rows = query.fetch_all(&mut **connection).await?;
            let rows = rows.iter().map(stored_row).collect::<Result<Vec<_>, _>>()?;
            Ok(resolve(batch, rows))
        })
        .await?
        .map_err(|cause| Failure::unknown(StoreErrorKind::Conflict, cause))
    }

    pub(super) async fn get(&self, id: OrderId) -> Result<Option<Order>, Failure> {
        self.attempt(async |connection| {
            let query = sqlx::query("SELECT * FROM orders WHERE id = $1").bind(uuid(id));
            let row = query.fetch_optional(&mut **connection).await?;
            row.map(|row| Ok(stored_row(&row)?.order)).transpose()
        })
        .await
    }

    pub(super) async fn list(
        &self,
        before: Option<OrderId>,
        limit: u32,
    ) -> Result<Vec<Order>, Failure> {
        self.attempt(async |connection| {
            let first = "SELECT * FROM orders ORDER BY id DESC LIMIT $1";
            let next = "SELECT * FROM orders WHERE id < $2 ORDER BY id DESC LIMIT $1";
            let query = sqlx::query(if before.is_some() { next } else { first });
            let query = query.bind(i64::from(limit));
            let query = match before {
                Some(before) => query.bind(uuid(before)),
                None => query,
            };
            let rows = query.fetch_all(&mut **connection).await?;
            rows.iter().map(|row| Ok(stored_row(row)?.order)).collect()
        })
        .await
    }

    /// Runs statements on one connection within the time limits. A connection on which that fails
    /// other than by an answer of the server is closed: sqlx would ping it for ever before its next
    /// use.
    async fn attempt<T>(
        &self,
        statements: impl AsyncFnOnce(&mut PoolConnection<Pg>) -> Result<T, sqlx::Error>,
    ) -> Result<T, Failure> {
        let acquired = timeout(ACQUIRE, self.pool.acquire()).await;
        let connection = match acquired {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => {
                return Err(Failure { outcome_unknown: false, ..failure(&error) });
            }
            Err(_) => {
                let cause = "no connection within 1 s";
                return Err(Failure::nothing_done(StoreErrorKind::Unavailable, cause));
            }
        };
        let mut held = Unsure(Some(connection));
        let connection = held.0.as_mut().expect("put there above");
        match timeout(ATTEMPT, statements(connection)).await {
            Ok(Ok(read)) => {
                held.keep();
                Ok(read)
            }
            Ok(Err(error)) => {
                if matches!(error, sqlx::Error::Database(_)) {
                    held.keep();
                }
                Err(failure(&error))
            }
            Err(_) => {
                let cause = "no answer of the server within 1 s";
                Err(Failure::unknown(StoreErrorKind::Timeout, cause))
            }
        }
    }

    pub(super) async fn close(&self) {
        // A hung connection must not hold the end of the process.
        let _ = timeout(ATTEMPT, self.pool.close()).await;
    }
}

/// A connection with statements under way: unless they are known to be over, it is closed rather
/// than returned to the pool, also when the caller hangs up.
struct Unsure(Option<PoolConnection<Pg>>);

impl Unsure {
    fn keep(&mut self) {
        drop(self.0.take());
    }
}

impl Drop for Unsure {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(connection.detach());
        }
    }
}

enum NotReady {
    /// It may become ready.
    NotYet(String),
    /// It never will by itself.
    Never(String),
}

impl NotReady {
    fn of_connecting(error: &sqlx::Error) -> Self {
        match error {
            // Wrong password (28), no such database (3D), no privilege (42).
            sqlx::Error::Database(refusal)
                if refusal.code().is_some_and(|code| {
                    ["28", "3D", "42"].iter().any(|class| code.starts_with(class))
                }) =>
            {
                Self::Never(refusal.message().to_owned())
            }
            sqlx::Error::Configuration(_) | sqlx::Error::Tls(_) => Self::Never(error.to_string()),
            _ => Self::NotYet(error.to_string()),
        }
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
    Stored::new(id.into_bytes(), &product_id, quantity.into(), key, placed_at)
        .map_err(|wrong| sqlx::Error::Decode(wrong.into()))
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
        // Too many connections; a server that is a replica at present.
        Some("53300" | "25006") => (StoreErrorKind::Unavailable, false),
        // The server stops or starts; it does not know the outcome itself.
        Some("57P01" | "57P02" | "57P03" | "40003") => (StoreErrorKind::Unavailable, true),
        Some("53100") => (StoreErrorKind::Full, false),
        // The connection failed.
        Some(code) if code.starts_with("08") => (StoreErrorKind::Unavailable, true),
        Some(code) if code.starts_with("23") => (StoreErrorKind::Constraint, false),
        _ => (StoreErrorKind::Other, false),
    }
}
