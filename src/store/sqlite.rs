//! SQLite: a file that one process has for itself, or memory.

use std::{fs, path::Path, sync::Arc, time::Duration};

use serde_json::json;
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Row as _, SqliteConnection, SqlitePool,
    error::DatabaseError,
    sqlite::{
        SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
    },
};
use tokio::{sync::SemaphorePermit, time::Instant};

use self::{
    files::Files,
    lock::Lock,
    maintainer::{Maintainer, WAL_LIMIT},
};
use super::{
    NewOrder, StoreHealth, dry_run,
    engine::{Failure, Outcome},
    foreign_tables,
    migrate::{self, Applied, REMEDY},
    readers::{self, Readers},
    rows::{Stored, millis, resolve},
};
use crate::{
    config::Migrations,
    metrics::StoreErrorKind,
    order::{IdempotencyKey, Order, OrderId},
};

mod files;
mod lock;
mod maintainer;
mod opening;

/// How long an attempt waits for another program that holds the database.
const BUSY_TIMEOUT: Duration = Duration::from_millis(100);

/// Connections that read, beside the one that writes: reading is done on threads of their own.
const READERS: u32 = 4;

/// What surrounds the rows of a batch. They are one statement, because each statement goes to
/// SQLite's thread and back: row by row costs 2.4 times as much. As one parameter of JSON they cost
/// a tenth of the whole call more.
const INSERT: (&str, &str) = (
    "INSERT INTO orders (id, product_id, quantity, idempotency_key, placed_at) \
    SELECT column1, column2, column3, column4, column5 FROM (VALUES ",
    ") WHERE column1 IS NOT NULL ON CONFLICT DO NOTHING",
);

const RESOLVE: &str = "SELECT id, product_id, quantity, idempotency_key, placed_at FROM orders \
    WHERE id IN (SELECT unhex(value ->> 0) FROM json_each(?1)) \
    UNION ALL SELECT id, product_id, quantity, idempotency_key, placed_at FROM orders \
    WHERE idempotency_key IN (SELECT value ->> 1 FROM json_each(?1) WHERE value ->> 1 IS NOT NULL)";

const GET: &str =
    "SELECT id, product_id, quantity, idempotency_key, placed_at FROM orders WHERE id = ?1";
const PAGE: &str = "SELECT id, product_id, quantity, idempotency_key, placed_at FROM orders \
    WHERE id < ?1 ORDER BY id DESC LIMIT ?2";

#[derive(Debug)]
pub(super) struct Sqlite {
    writer: SqlitePool,
    readers: SqlitePool,
    /// As many turns as there are connections to read with, so that none of them is waited for, and
    /// the writer never waits behind more than one read where it shares its connection.
    turns: Arc<Readers>,
    /// `None` in memory.
    file: Option<(Arc<Files>, Maintainer)>,
}

impl Sqlite {
    /// `health` learns why it takes so long while another program holds the database.
    pub(super) async fn open_file(
        path: &Path,
        migrations: Migrations,
        health: &StoreHealth,
    ) -> Result<Self, String> {
        if migrations == Migrations::Check {
            refuse_empty(path)?;
        }
        let lock = Lock::take(path)?;
        let options = file_options(&lock);
        let writer = open(SqlitePoolOptions::new().max_connections(1), &options, migrations).await;
        let (writer, _) = writer?;
        let files = Arc::new(Files::open(lock, &options).await?);
        let readers = SqlitePoolOptions::new().max_connections(READERS);
        let readers = readers.connect_lazy_with(options.create_if_missing(false));
        let turns = Arc::new(Readers::new(READERS as usize));
        let (writer_pool, readers_turns) = (writer.clone(), turns.clone());
        let maintainer =
            Maintainer::start(files.clone(), writer_pool, readers_turns, health.clone());
        let opened = Self { writer, readers, turns, file: Some((files, maintainer)) };
        opening::wait_until_ready(&opened, health).await?;
        Ok(opened)
    }

    /// Does what placing an order and reading one does; nothing of it is kept.
    async fn dry_run(&self) -> Result<(), sqlx::Error> {
        let mut transaction = self.writer.begin_with("BEGIN IMMEDIATE").await?;
        let new = dry_run::order();
        match insert(&mut transaction, std::slice::from_ref(&new)).await {
            // A constraint or a trigger of the administrator's, which other orders may pass.
            Err(error) if failure(&error).kind == StoreErrorKind::Constraint => {}
            inserted => drop(inserted?),
        }
        transaction.rollback().await?;
        let read = sqlx::query(GET).bind(&new.order.id.as_bytes()[..]);
        read.fetch_optional(&self.readers).await.map(drop)
    }

    /// One connection for all: each has a memory of its own, and it ends with its connection. The
    /// tables are new, so they are always made here.
    pub(super) async fn open_memory() -> Result<Self, String> {
        let one = SqlitePoolOptions::new().max_connections(1).idle_timeout(None).max_lifetime(None);
        // A caller that goes while its connection is tested takes that connection with it.
        let one = one.test_before_acquire(false);
        let options = SqliteConnectOptions::new().in_memory(true);
        let (pool, _) = open(one, &options, Migrations::Apply).await?;
        Ok(Self {
            writer: pool.clone(),
            readers: pool,
            turns: Arc::new(Readers::new(1)),
            file: None,
        })
    }

    /// Applies the pending migrations and returns their versions.
    pub(super) async fn migrate_file(path: &Path) -> Result<Vec<i64>, String> {
        let lock = Lock::take(path)?;
        let one = SqlitePoolOptions::new().max_connections(1);
        let (pool, applied) = open(one, &file_options(&lock), Migrations::Apply).await?;
        pool.close().await;
        Ok(applied)
    }

    pub(super) async fn commit(&self, batch: &[NewOrder]) -> Result<Vec<Outcome>, Failure> {
        if let Some((files, _)) = &self.file {
            let checked = files.check().await;
            checked.map_err(|cause| Failure::nothing_done(StoreErrorKind::Unavailable, cause))?;
        }
        let inserted = async { insert(&mut *self.writer.acquire().await?, batch).await }.await;
        let inserted = inserted.map_err(|error| failure(&error))?;
        self.save_committed().await?;
        if let Some((_, maintainer)) = &self.file {
            maintainer.committed();
        }
        if inserted == batch.len() as u64 {
            return Ok(vec![Outcome::New; batch.len()]);
        }
        // Those that were there already: sent before, or named by a key before.
        self.look_up(batch).await
    }

    /// Whatever fails here, orders of the batch may be committed.
    pub(super) async fn look_up(&self, batch: &[NewOrder]) -> Result<Vec<Outcome>, Failure> {
        let unknown = |error: &sqlx::Error| Failure { outcome_unknown: true, ..failure(error) };
        let names = batch
            .iter()
            .map(|new| json!([hex(new.order.id), new.key.as_ref().map(IdempotencyKey::as_str)]));
        let names = serde_json::Value::from_iter(names).to_string();
        let stored = sqlx::query(RESOLVE).bind(names).fetch_all(&self.writer).await;
        let stored = stored.map_err(|error| unknown(&error))?;
        self.save_committed().await?;
        let stored = stored.iter().map(stored_row).collect::<Result<Vec<_>, _>>();
        Ok(resolve(batch, stored.map_err(|error| unknown(&error))?))
    }

    /// What was committed must be found after a restart before it is acknowledged.
    async fn save_committed(&self) -> Result<(), Failure> {
        let Some((files, _)) = &self.file else { return Ok(()) };
        let saved = files.save_committed().await;
        saved.map_err(|cause| Failure::unknown(StoreErrorKind::Unavailable, cause))
    }

    pub(super) async fn get(&self, id: OrderId) -> Result<Option<Order>, Failure> {
        let _turn = self.turn().await?;
        let row = sqlx::query(GET).bind(&id.as_bytes()[..]).fetch_optional(&self.readers).await;
        let row = row.map_err(|error| failure(&error))?;
        row.as_ref().map(order_of_row).transpose()
    }

    pub(super) async fn list(
        &self,
        before: Option<OrderId>,
        limit: u32,
    ) -> Result<Vec<Stored>, Failure> {
        let _turn = self.turn().await?;
        // SQLite orders blobs by their bytes, and no 16 bytes sort after 17 of the highest.
        let before = before.map_or(vec![0xff; 17], |id| id.as_bytes().to_vec());
        let query = sqlx::query(PAGE).bind(before).bind(limit);
        let rows = query.fetch_all(&self.readers).await.map_err(|error| failure(&error))?;
        rows.iter().map(stored_row).collect::<Result<_, _>>().map_err(|error| failure(&error))
    }

    async fn turn(&self) -> Result<SemaphorePermit<'_>, Failure> {
        self.turns.turn(Instant::now() + readers::WAIT).await
    }

    pub(super) async fn close(&self) {
        if let Some((_, maintainer)) = &self.file {
            maintainer.stop().await;
        }
        self.turns.close();
        self.readers.close().await;
        if let Some((files, _)) = &self.file {
            files.close().await;
        }
        self.writer.close().await;
    }
}

/// Refuses a file that `--migrations check` must not make or write; opening an empty one would write
/// its first page.
fn refuse_empty(path: &Path) -> Result<(), String> {
    let Ok(file) = fs::metadata(path) else {
        return Err(format!("no such file, and --migrations check makes none: {REMEDY}"));
    };
    if !file.is_file() || file.len() > 0 {
        return Ok(());
    }
    migrate::compare(&migrate::sqlite(), &[])?.refusal().map_or(Ok(()), Err)
}

fn file_options(lock: &Lock) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(lock.database())
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        // NORMAL loses acknowledged orders when the machine loses power.
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY_TIMEOUT)
        // The next commit truncates a WAL that a large batch made longer.
        .pragma("journal_size_limit", WAL_LIMIT.to_string())
        // Durations are in the metrics, failures in our own lines.
        .disable_statement_logging()
}

/// Opens the database; returns the migrations that were applied, too.
async fn open(
    pool: SqlitePoolOptions,
    options: &SqliteConnectOptions,
    migrations: Migrations,
) -> Result<(SqlitePool, Vec<i64>), String> {
    let pool = pool.connect_with(options.clone()).await.map_err(|error| opening::cause(&error))?;
    let migrator = migrate::sqlite();
    let orders = "SELECT COUNT(*) > 0 FROM sqlite_schema WHERE name = 'orders'";
    let orders = sqlx::query_scalar(orders).fetch_one(&pool).await;
    let orders: bool = orders.map_err(|error| opening::cause(&error))?;
    let applied = applied(&pool).await.map_err(|error| opening::cause(&error))?;
    foreign_tables::check(orders, &applied)?;
    let difference = migrate::compare(&migrator, &applied)?;
    if let (Migrations::Check, Some(why)) = (migrations, difference.refusal()) {
        return Err(why);
    }
    if !difference.pending.is_empty() {
        migrator.run(&pool).await.map_err(|error| opening::migration_cause(&error))?;
    }
    difference.warn_if_newer();
    Ok((pool, difference.pending))
}

/// The applied migrations; none if nothing was ever applied.
async fn applied(pool: &SqlitePool) -> Result<Vec<Applied>, sqlx::Error> {
    let list = "SELECT 1 FROM sqlite_schema WHERE name = '_sqlx_migrations'";
    if sqlx::query(list).fetch_optional(pool).await?.is_none() {
        return Ok(Vec::new());
    }
    sqlx::query_as(migrate::LIST).fetch_all(pool).await
}

/// Inserts those of a batch that are not there yet; returns how many were inserted.
async fn insert(connection: &mut SqliteConnection, batch: &[NewOrder]) -> Result<u64, sqlx::Error> {
    let mut insert = sqlx::query(AssertSqlSafe(statement(batch.len())));
    for NewOrder { order, key } in batch {
        insert = insert
            .bind(&order.id.as_bytes()[..])
            .bind(order.product_id.as_str())
            .bind(order.quantity.get())
            .bind(key.as_ref().map(IdempotencyKey::as_str))
            .bind(millis(order.placed_at));
    }
    Ok(insert.execute(connection).await?.rows_affected())
}

/// The statement for that many orders. Its rows are a power of two, so that a few statements serve
/// all batches and stay prepared; the rows without an order are not bound, which is NULL.
fn statement(orders: usize) -> String {
    const ROW: &str = "(?,?,?,?,?)";
    let more = format!(",{ROW}").repeat(orders.next_power_of_two() - 1);
    let (before, after) = INSERT;
    format!("{before}{ROW}{more}{after}")
}

fn hex(id: OrderId) -> String {
    format!("{:032x}", u128::from_be_bytes(*id.as_bytes()))
}

fn stored_row(row: &SqliteRow) -> Result<Stored, sqlx::Error> {
    let id: Vec<u8> = row.try_get("id")?;
    let id: [u8; 16] =
        id.try_into().map_err(|_| sqlx::Error::Decode("an id is not 16 bytes".into()))?;
    // STRICT keeps the types, and not the encoding of a text.
    let Ok(product_id) = row.try_get::<String, _>("product_id") else {
        return Ok(Stored::unreadable(id, "product_id"));
    };
    let Ok(key) = row.try_get("idempotency_key") else {
        return Ok(Stored::unreadable(id, "idempotency_key"));
    };
    let (quantity, placed_at) = (row.try_get("quantity")?, row.try_get("placed_at")?);
    Ok(Stored::new(id, &product_id, quantity, key, placed_at))
}

fn order_of_row(row: &SqliteRow) -> Result<Order, Failure> {
    stored_row(row).map_err(|error| failure(&error))?.into_order()
}

fn failure(error: &sqlx::Error) -> Failure {
    Failure::new(error, of_database)
}

/// The primary code is the extended one's last byte (SQLite, "Result and Error Codes").
fn of_database(error: &dyn DatabaseError) -> (StoreErrorKind, bool) {
    let code: Option<u32> = error.code().and_then(|code| code.parse().ok());
    match code.map(|code| code & 0xff) {
        // BUSY, LOCKED: another program holds the database. READONLY, CANTOPEN: somebody changed
        // the file's permissions or moved it.
        Some(5 | 6 | 8 | 14) => (StoreErrorKind::Unavailable, false),
        // IOERR, of which a flush may be: the commit may or may not be on the disk.
        Some(10) => (StoreErrorKind::Unavailable, true),
        Some(13) => (StoreErrorKind::Full, false),
        Some(19) => (StoreErrorKind::Constraint, false),
        _ => (StoreErrorKind::Other, true),
    }
}
