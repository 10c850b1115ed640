//! Stores opened in this process, over each database there is.

use std::{path::Path, sync::LazyLock};

use order_service::{
    config::{DatabaseUrl, Migrations},
    metrics::Metrics,
    order::{Order, OrderIds, Placed, Quantity},
    store::{NewOrder, Store, StoreError, StoreHealth, Writers},
};
use sqlx::{AnyConnection, AssertSqlSafe, Connection as _, Executor as _, SqliteConnection};
use tempfile::TempDir;
use tokio::time::Instant;

use crate::{
    postgres::PostgresServer,
    support::{PATIENCE, database_in},
};

/// The SQLite database of a server, held so that nobody else can write to it.
pub async fn lock_file_in(dir: &Path) -> SqliteConnection {
    let mut connection = SqliteConnection::connect(&database_in(dir)).await.unwrap();
    connection.execute("BEGIN IMMEDIATE").await.unwrap();
    connection
}

/// A database of a test's own.
pub enum Database {
    File(TempDir),
    Memory,
    Postgres(PostgresServer),
}

impl Database {
    pub fn file() -> Self {
        Self::File(tempfile::tempdir().unwrap())
    }

    pub fn memory() -> Self {
        Self::Memory
    }

    pub async fn postgres() -> Self {
        Self::Postgres(PostgresServer::start().await)
    }

    pub fn url(&self) -> String {
        match self {
            Self::File(dir) => database_in(dir.path()),
            Self::Memory => "sqlite::memory:".to_owned(),
            Self::Postgres(server) => server.url(),
        }
    }

    /// A connection beside the store's.
    pub async fn connect(&self) -> AnyConnection {
        connect(&self.url()).await
    }

    /// A connection that keeps everybody else from writing.
    pub async fn lock(&self) -> AnyConnection {
        let mut connection = self.connect().await;
        let lock = match self {
            Self::Postgres(_) => "BEGIN; LOCK TABLE orders IN ACCESS EXCLUSIVE MODE",
            _ => "BEGIN IMMEDIATE",
        };
        connection.execute(lock).await.unwrap();
        connection
    }

    /// Makes a database refuse every order of a product, whatever it has of it.
    pub async fn refuse_product(url: &str, product: &str) {
        let trigger = if url.starts_with("postgres") {
            format!(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS \
                 $$ BEGIN RAISE EXCEPTION 'the cause'; END $$; \
                 CREATE TRIGGER refuse BEFORE INSERT ON orders FOR EACH ROW \
                 WHEN (NEW.product_id = '{product}') EXECUTE FUNCTION refuse();"
            )
        } else {
            format!(
                "CREATE TRIGGER refuse BEFORE INSERT ON orders WHEN NEW.product_id = '{product}' \
                 BEGIN SELECT RAISE(ABORT, 'the cause'); END"
            )
        };
        connect(url).await.execute(AssertSqlSafe(trigger)).await.unwrap();
    }

    /// A statement that makes every insert take about half a second.
    pub fn slow_inserts(&self) -> &'static str {
        match self {
            Self::Postgres(_) => {
                "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS \
                 $$ BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END $$; \
                 CREATE TRIGGER slow AFTER INSERT ON orders \
                 FOR EACH STATEMENT EXECUTE FUNCTION slow();"
            }
            _ => {
                "CREATE TRIGGER slow AFTER INSERT ON orders BEGIN \
                 SELECT COUNT(*) FROM (WITH RECURSIVE n(i) AS \
                 (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000000) SELECT i FROM n); END"
            }
        }
    }

    pub async fn open(&self) -> Opened {
        Opened::new(&self.url()).await.unwrap()
    }
}

async fn connect(url: &str) -> AnyConnection {
    sqlx::any::install_default_drivers();
    AnyConnection::connect(url).await.unwrap()
}

/// An open store, its writers, and what it records.
pub struct Opened {
    pub store: Store,
    pub writers: Writers,
    pub metrics: Metrics,
    pub health: StoreHealth,
}

impl Opened {
    pub async fn new(url: &str) -> Result<Self, String> {
        let url: DatabaseUrl = url.parse().unwrap();
        let metrics = Metrics::new("0", "0").unwrap();
        let health = StoreHealth::new();
        let store = metrics.store.clone();
        let opened = Store::open(url, 4, Migrations::Apply, store, health.clone()).await;
        let (store, writers) = opened.map_err(|error| error.to_string())?;
        Ok(Self { store, writers, metrics, health })
    }

    pub fn placed(&self) -> u64 {
        self.metrics.store.placed.get()
    }

    pub async fn all(&self) -> Vec<Order> {
        self.store.list(None, 1_000_000, later()).await.unwrap().orders
    }

    /// Waits until no order waits for a writer.
    pub async fn queue_is_empty(&self) {
        until(|| self.metrics.store.queue_orders.get() == 0).await;
    }

    pub async fn close(self) {
        drop(self.store);
        tokio::time::timeout(PATIENCE, self.writers.finished())
            .await
            .expect("the writers end")
            .unwrap();
    }
}

pub fn new(product: &str, key: Option<&str>) -> NewOrder {
    static IDS: LazyLock<OrderIds> = LazyLock::new(OrderIds::new);
    let order = Order::new(product.parse().unwrap(), Quantity::ONE, &IDS);
    NewOrder { order, key: key.map(|key| key.parse().unwrap()) }
}

pub fn later() -> Instant {
    Instant::now() + PATIENCE
}

/// Waits until a condition holds.
pub async fn until(condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("it comes to that");
}

/// Starts a call, and returns once a writer has its order.
pub async fn taken(
    opened: &Opened,
    order: NewOrder,
    deadline: Instant,
) -> tokio::task::JoinHandle<Result<Placed, StoreError>> {
    let store = opened.store.clone();
    let before = opened.metrics.store.queue_orders.get();
    let (queued, is_queued) = tokio::sync::oneshot::channel();
    let call = tokio::spawn(async move {
        let mut place = std::pin::pin!(store.place(order, deadline));
        // The first poll puts the order into the queue.
        let first = futures_util::poll!(place.as_mut());
        let _ = queued.send(());
        match first {
            std::task::Poll::Ready(result) => result,
            std::task::Poll::Pending => place.await,
        }
    });
    is_queued.await.unwrap();
    until(|| opened.metrics.store.queue_orders.get() <= before).await;
    call
}
