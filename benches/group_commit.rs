//! Durable orders per second: the store's group commit against one transaction for each order, and
//! two replicas on one PostgreSQL against one; by turns in one run, on the same machine and disk, all
//! with full durability.
//!
//! `cargo bench --bench group_commit`; PostgreSQL's part starts a server of its own where Debian's
//! programs are installed.

#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark that cannot go on has failed")]

use std::{
    path::Path,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use order_service::{
    config::Migrations,
    metrics::Metrics,
    order::{Order, OrderIds, Quantity},
    store::{NewOrder, Store, StoreHealth, Writers},
};
use sqlx::{
    PgPool, SqlitePool,
    postgres::PgPoolOptions,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tokio::{task::JoinSet, time::Instant};

#[allow(dead_code, reason = "the tests use all of it")]
#[path = "../tests/it/postgres.rs"]
mod postgres;

/// Length of a turn, and turns of each side.
const TURN: Duration = Duration::from_secs(2);
const TURNS: usize = 3;

fn new_order() -> NewOrder {
    static IDS: LazyLock<OrderIds> = LazyLock::new(OrderIds::new);
    NewOrder { order: Order::new("book".parse().unwrap(), Quantity::ONE, &IDS), key: None }
}

/// Runs a call over and over, this many at a time, for one turn; returns calls per second.
async fn rate<F>(callers: usize, call: impl Fn() -> F + Clone + Send + Sync + 'static) -> f64
where
    F: Future<Output = ()> + Send,
{
    let begun = Instant::now();
    let (done, until) = (Arc::new(AtomicU64::new(0)), begun + TURN);
    let mut tasks = JoinSet::new();
    for _ in 0..callers {
        let (call, done) = (call.clone(), done.clone());
        tasks.spawn(async move {
            while Instant::now() < until {
                call().await;
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    tasks.join_all().await;
    done.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64()
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

/// A replica's store, and what it records.
struct Replica {
    store: Store,
    writers: Writers,
    metrics: Metrics,
}

impl Replica {
    async fn open(url: &str) -> Self {
        let metrics = Metrics::new("bench", "bench").unwrap();
        let (url, health) = (url.parse().unwrap(), StoreHealth::new());
        let opened = Store::open(url, 4, Migrations::Apply, metrics.store.clone(), health).await;
        let (store, writers) = opened.unwrap();
        Self { store, writers, metrics }
    }

    /// Orders in a batch on average, over all that it has committed.
    fn mean_batch(&self) -> f64 {
        let batches = &self.metrics.store.batch_orders;
        batches.get_sample_sum() / batches.get_sample_count() as f64
    }

    async fn close(self) {
        drop(self.store);
        self.writers.finished().await.expect("every order is settled");
    }
}

/// Places orders through these stores, by turns, with this many callers in all.
async fn grouped_rate(stores: &[&Store], callers: usize) -> f64 {
    let stores: Arc<[Store]> = stores.iter().copied().cloned().collect();
    let turn = Arc::new(AtomicU64::new(0));
    let place = move || {
        let turn = turn.fetch_add(1, Ordering::Relaxed) as usize;
        let store = stores[turn % stores.len()].clone();
        async move {
            let deadline = Instant::now() + Duration::from_secs(30);
            store.place(new_order(), deadline).await.unwrap();
        }
    };
    rate(callers, place).await
}

/// Both sides by turns; prints a line.
async fn compare<F>(
    engine: &str,
    url: &str,
    callers: usize,
    one_by_one: impl Fn() -> F + Clone + Send + Sync + 'static,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let replica = Replica::open(url).await;
    let (mut grouped, mut single) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        single.push(rate(callers, one_by_one.clone()).await);
        grouped.push(grouped_rate(&[&replica.store], callers).await);
    }
    let mean_batch = replica.mean_batch();
    let (grouped, single) = (median(grouped), median(single));
    println!(
        "{engine:<10} {callers:>7} {single:>12.0} {grouped:>13.0} {:>6.1}x {mean_batch:>11.1}",
        grouped / single
    );
    replica.close().await;
}

/// One replica and two on one server, by turns, with as many callers in all; prints a line.
async fn compare_replicas(url: &str, callers: usize) {
    let (first, second) = (Replica::open(url).await, Replica::open(url).await);
    let (mut one, mut two) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        one.push(grouped_rate(&[&first.store], callers).await);
        two.push(grouped_rate(&[&first.store, &second.store], callers).await);
    }
    let (one, two) = (median(one), median(two));
    println!("{callers:>7} {one:>12.0} {two:>13.0} {:>6.2}x", two / one);
    first.close().await;
    second.close().await;
}

/// New orders and replays by turns; prints a line. A replay is answered after a commit of its own,
/// one for each batch.
async fn compare_replays(url: &str, callers: usize) {
    let replica = Replica::open(url).await;
    let placed = NewOrder { key: Some("bench".parse().unwrap()), ..new_order() };
    let replay = {
        let store = replica.store.clone();
        move || {
            let (store, order) = (store.clone(), new_order().order);
            let again = NewOrder { order, ..placed.clone() };
            async move {
                let deadline = Instant::now() + Duration::from_secs(30);
                store.place(again, deadline).await.unwrap();
            }
        }
    };
    let (mut new, mut replays) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        new.push(grouped_rate(&[&replica.store], callers).await);
        replays.push(rate(callers, replay.clone()).await);
    }
    let (new, replays) = (median(new), median(replays));
    println!("{callers:>7} {new:>12.0} {replays:>13.0} {:>6.2}x", replays / new);
    replica.close().await;
}

const TABLE: &str = "CREATE TABLE one_by_one (id BLOB PRIMARY KEY, product_id TEXT NOT NULL, \
    quantity INTEGER NOT NULL, idempotency_key TEXT UNIQUE, placed_at INTEGER NOT NULL)";
const INSERT: &str =
    "INSERT INTO one_by_one (id, product_id, quantity, placed_at) VALUES ($1, $2, $3, $4)";

async fn sqlite_one_by_one(path: &Path) -> SqlitePool {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full);
    // One writer is all that SQLite has.
    let pool = SqlitePoolOptions::new().max_connections(1);
    let pool = pool.acquire_timeout(Duration::from_secs(60)).connect_with(options).await.unwrap();
    sqlx::query(TABLE).execute(&pool).await.unwrap();
    pool
}

async fn postgres_one_by_one(url: &str) -> PgPool {
    // As many connections as the store has, and no ping before each use.
    let pool = PgPoolOptions::new().max_connections(4).test_before_acquire(false);
    let pool = pool.acquire_timeout(Duration::from_secs(60)).connect(url).await.unwrap();
    let table = "CREATE TABLE one_by_one (id BYTEA PRIMARY KEY, product_id TEXT NOT NULL, \
        quantity INT4 NOT NULL, idempotency_key TEXT UNIQUE, placed_at INT8 NOT NULL)";
    sqlx::query(table).execute(&pool).await.unwrap();
    pool
}

#[tokio::main]
async fn main() {
    println!("durable orders/s: one transaction each, group commit, ratio, mean batch");
    println!(
        "{:<10} {:>7} {:>12} {:>13} {:>7} {:>11}",
        "engine", "callers", "one by one", "group commit", "ratio", "mean batch"
    );
    let dir = tempfile::tempdir().unwrap();
    let pool = sqlite_one_by_one(&dir.path().join("one.db")).await;
    let url = format!("sqlite://{}", dir.path().join("orders.db").display());
    for callers in [64, 256, 1024] {
        let pool = pool.clone();
        let insert = move || {
            let pool = pool.clone();
            async move {
                let NewOrder { order, .. } = new_order();
                let query = sqlx::query(INSERT).bind(order.id.as_bytes().to_vec());
                let query = query.bind(order.product_id.as_str()).bind(1_i64).bind(0_i64);
                query.execute(&pool).await.unwrap();
            }
        };
        compare("SQLite", &url, callers, insert).await;
    }
    if !Path::new("/usr/lib/postgresql").exists() {
        println!("PostgreSQL: not measured, its server programs are not installed");
        return;
    }
    let server = postgres::PostgresServer::start().await;
    let pool = postgres_one_by_one(&server.url()).await;
    for callers in [64, 256, 1024] {
        let pool = pool.clone();
        let insert = move || {
            let pool = pool.clone();
            async move {
                let NewOrder { order, .. } = new_order();
                let query = sqlx::query(INSERT).bind(order.id.as_bytes().to_vec());
                let query = query.bind(order.product_id.as_str()).bind(1_i32).bind(0_i64);
                query.execute(&pool).await.unwrap();
            }
        };
        compare("PostgreSQL", &server.url(), callers, insert).await;
    }
    println!("\nPostgreSQL, one replica (2 writers) against two, with as many callers in all");
    println!("{:>7} {:>12} {:>13} {:>7}", "callers", "one replica", "two replicas", "ratio");
    for callers in [64, 256, 1024] {
        compare_replicas(&server.url(), callers).await;
    }
    println!("\nPostgreSQL, new orders against replays");
    println!("{:>7} {:>12} {:>13} {:>7}", "callers", "new", "replays", "ratio");
    for callers in [1, 64, 256] {
        compare_replays(&server.url(), callers).await;
    }
}
