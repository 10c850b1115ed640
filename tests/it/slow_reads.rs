//! More reads than the store can answer: that is overload and no outage, and orders are placed all
//! the same.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use order_service::{
    metrics::StoreErrorKind,
    store::{StoreError, StoreStatus},
};
use rustix::process::{Pid, Signal, kill_process};
use sqlx::{AssertSqlSafe, Executor as _};
use tokio::{task::JoinSet, time::timeout};

use crate::{
    database::{Database, Opened, later, new, until},
    postgres::PostgresServer,
    proxy::{Proxy, Traffic},
    support::PATIENCE,
};

/// Whoever reads a row waits this long; whoever inserts one, and is told its id, does not.
pub fn slow_on_postgres(seconds: f64) -> String {
    format!(
        "ALTER TABLE orders RENAME TO kept; \
         CREATE FUNCTION slow() RETURNS BOOLEAN LANGUAGE plpgsql VOLATILE AS \
         $$ BEGIN PERFORM pg_sleep({seconds}); RETURN true; END $$; \
         CREATE VIEW orders AS SELECT * FROM kept WHERE slow()"
    )
}

/// Reads for ever, by many callers.
pub fn read_all_the_time(opened: &Opened, callers: usize, limit: u32) -> (JoinSet<()>, Arc<Tally>) {
    let tally = Arc::new(Tally::default());
    let mut reads = JoinSet::new();
    for _ in 0..callers {
        let (store, tally) = (opened.store.clone(), tally.clone());
        reads.spawn(async move {
            loop {
                tally.count(&store.list(None, limit, later()).await);
            }
        });
    }
    (reads, tally)
}

/// What became of reads.
#[derive(Default)]
pub struct Tally {
    answered: AtomicUsize,
    busy: AtomicUsize,
    others: Mutex<Vec<StoreError>>,
}

impl Tally {
    fn count<T>(&self, read: &Result<T, StoreError>) {
        match read {
            Ok(_) => drop(self.answered.fetch_add(1, Ordering::Relaxed)),
            Err(StoreError::ReadersBusy) => drop(self.busy.fetch_add(1, Ordering::Relaxed)),
            Err(other) => self.others.lock().unwrap().push(other.clone()),
        }
    }

    /// Waits until reads are answered and refused, and checks that this is all that they are.
    async fn overload(&self, opened: &Opened) {
        let seen = |of: &AtomicUsize| of.load(Ordering::Relaxed) >= 10;
        until(|| seen(&self.answered) && seen(&self.busy)).await;
        assert_eq!(opened.health.status(), StoreStatus::Up);
        assert_eq!(*self.others.lock().unwrap(), []);
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn orders_are_placed_while_slow_reads_wait_in_line() {
    let server = PostgresServer::start().await;
    let opened = Opened::new(&server.url()).await.unwrap();
    opened.store.place(new("book", None), later()).await.unwrap();
    server.connect().await.execute(AssertSqlSafe(slow_on_postgres(0.2))).await.unwrap();
    let (mut reads, tally) = read_all_the_time(&opened, 200, 1);
    tally.overload(&opened).await;
    for _ in 0..20 {
        opened.store.place(new("book", None), later()).await.unwrap();
    }
    tally.overload(&opened).await;
    for kind in [StoreErrorKind::Unavailable, StoreErrorKind::Timeout] {
        assert_eq!(opened.metrics.store.errors(kind).get(), 0, "{kind:?}");
    }
    assert_eq!(opened.placed(), 21);
    reads.shutdown().await;
    opened.close().await;
}

/// The writer has a connection of its own, or shares it with one read at a time.
async fn orders_are_placed_while_large_reads_wait_in_line(database: Database) {
    const ORDERS: u32 = 5000;
    let opened = database.open().await;
    let mut calls = JoinSet::new();
    for _ in 0..ORDERS {
        let store = opened.store.clone();
        calls.spawn(async move { store.place(new("book", None), later()).await });
        if calls.len() >= 1000 {
            calls.join_next().await.unwrap().unwrap().unwrap();
        }
    }
    while let Some(call) = calls.join_next().await {
        call.unwrap().unwrap();
    }
    let (mut reads, tally) = read_all_the_time(&opened, 1000, ORDERS);
    tally.overload(&opened).await;
    for _ in 0..20 {
        opened.store.place(new("book", None), later()).await.unwrap();
    }
    tally.overload(&opened).await;
    assert_eq!(opened.placed(), u64::from(ORDERS) + 20);
    reads.shutdown().await;
    opened.close().await;
}

#[tokio::test]
async fn orders_are_placed_while_large_reads_of_a_file_wait_in_line() {
    orders_are_placed_while_large_reads_wait_in_line(Database::file()).await;
}

#[tokio::test]
async fn orders_are_placed_while_large_reads_of_the_memory_wait_in_line() {
    orders_are_placed_while_large_reads_wait_in_line(Database::memory()).await;
}

/// All processes of a server, stopped for as long as this lives.
struct Frozen(Vec<Pid>);

impl Frozen {
    async fn new(server: &PostgresServer) -> Self {
        let mut pids = server.backends().await;
        pids.push(server.postmaster());
        for pid in &pids {
            kill_process(*pid, Signal::STOP).unwrap();
        }
        Self(pids)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _ = kill_process(*pid, Signal::CONT);
        }
    }
}

/// The first of them, too: whoever has a turn fails before those in line give up.
#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn reads_in_line_before_a_server_that_hangs_are_told_of_the_outage() {
    let server = PostgresServer::start().await;
    let opened = Opened::new(&server.url()).await.unwrap();
    opened.store.place(new("book", None), later()).await.unwrap();
    opened.all().await;
    let frozen = Frozen::new(&server).await;
    for round in ["before it is known", "once it is known"] {
        let mut reads = JoinSet::new();
        for _ in 0..200 {
            let store = opened.store.clone();
            reads.spawn(async move { store.list(None, 1, later()).await.map(drop) });
        }
        let reads = reads.join_all().await;
        assert!(
            reads.iter().all(|read| *read == Err(StoreError::Unavailable)),
            "{round}: {reads:?}"
        );
        assert!(matches!(opened.health.status(), StoreStatus::Failing { .. }));
    }
    drop(frozen);
    let answered = async { while opened.store.list(None, 1, later()).await.is_err() {} };
    timeout(PATIENCE, answered).await.expect("it answers again");
    opened.close().await;
}

/// Who has waited in line for most of a second, and more, has all the time that others have for a
/// login.
#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn connections_that_break_make_no_outage_of_an_overload() {
    let server = PostgresServer::start().await;
    let proxy = Proxy::start(server.port).await;
    let opened = Opened::new(&server.url_at(proxy.port)).await.unwrap();
    opened.store.place(new("book", None), later()).await.unwrap();
    server.connect().await.execute(AssertSqlSafe(slow_on_postgres(0.2))).await.unwrap();
    let (mut reads, tally) = read_all_the_time(&opened, 200, 1);
    tally.overload(&opened).await;
    proxy.set(Traffic::BeginsAfter(Duration::from_millis(500)));
    proxy.cut();
    let answered = tally.answered.load(Ordering::Relaxed);
    until(|| tally.answered.load(Ordering::Relaxed) >= answered + 20).await;
    tally.overload(&opened).await;
    reads.shutdown().await;
    opened.close().await;
}
