//! An attempt that is delayed on its way to the server, and arrives after the order was refused: its
//! caller is never told that the order failed while it can still be stored.

use std::time::Duration;

use order_service::{
    metrics::StoreErrorKind,
    order::Placed,
    store::{NewOrder, StoreError},
};
use rustix::process::Pid;
use sqlx::{Executor as _, PgConnection};
use tokio::{task::JoinHandle, time::Instant};

use crate::{
    database::{Database, Opened, later, new, taken, until},
    postgres::PostgresServer,
    proxy::{Proxy, Traffic},
    support::PATIENCE,
};

/// An order whose first attempt is held on its way, and whose second attempt the database refused.
struct Delayed {
    server: PostgresServer,
    proxy: Proxy,
    opened: Opened,
    order: NewOrder,
    call: JoinHandle<Result<Placed, StoreError>>,
    /// The process of the server that the first attempt has to reach.
    backend: Pid,
    /// Beside the service's.
    connection: PgConnection,
}

impl Delayed {
    async fn start(time_limit: Duration) -> Self {
        let server = PostgresServer::start().await;
        let proxy = Proxy::start(server.port).await;
        let opened = Opened::new(&server.url_at(proxy.port)).await.unwrap();
        opened.store.place(new("first", None), later()).await.unwrap();
        let connection = server.connect().await;
        let backend = server.backends().await[0];
        Database::refuse_product(&server.url(), "book").await;
        proxy.set(Traffic::RequestsAreHeld);
        let order = new("book", Some("k"));
        let call = taken(&opened, order.clone(), Instant::now() + time_limit).await;
        let refused = |opened: &Opened| opened.metrics.store.errors(StoreErrorKind::Other).get();
        until(|| refused(&opened) > 0).await;
        Self { server, proxy, opened, order, call, backend, connection }
    }

    async fn stored(&mut self) -> i64 {
        let query = "SELECT COUNT(*) FROM orders WHERE product_id = 'book'";
        sqlx::query_as::<_, (i64,)>(query).fetch_one(&mut self.connection).await.unwrap().0
    }

    /// The first attempt arrives, and the database refuses it no longer.
    async fn arrives(&mut self) {
        self.connection.execute("DROP TRIGGER refuse ON orders").await.unwrap();
        self.proxy.set(Traffic::Passes);
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn an_order_that_arrives_late_is_acknowledged_and_counted() {
    let mut delayed = Delayed::start(PATIENCE).await;
    assert!(!delayed.call.is_finished(), "the first attempt is still under way");
    delayed.arrives().await;
    let order = delayed.order.order.clone();
    assert_eq!((&mut delayed.call).await.unwrap(), Ok(Placed { order, replayed: false }));
    assert_eq!((delayed.stored().await, delayed.opened.placed()), (1, 2));
    delayed.opened.close().await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn an_order_that_arrives_after_its_caller_left_is_counted() {
    let mut delayed = Delayed::start(PATIENCE).await;
    delayed.call.abort();
    delayed.arrives().await;
    let placed = delayed.opened.metrics.store.placed.clone();
    until(|| placed.get() == 2).await;
    assert_eq!(delayed.stored().await, 1);
    delayed.opened.close().await;
    assert_eq!(placed.get(), 2);
}

/// However long it is delayed: the process that it has to reach is ended first.
#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn an_order_whose_caller_was_told_that_it_failed_never_arrives() {
    let mut delayed = Delayed::start(PATIENCE).await;
    // While it is open, other orders are placed.
    delayed.opened.store.place(new("first", None), later()).await.unwrap();
    let told = (&mut delayed.call).await.unwrap();
    assert!(matches!(told, Err(StoreError::Internal(ref cause)) if cause.contains("the cause")));
    let running = delayed.server.backends().await;
    assert!(!running.contains(&delayed.backend), "{running:?}");
    delayed.arrives().await;
    delayed.opened.store.place(new("first", None), later()).await.unwrap();
    assert_eq!(delayed.stored().await, 0);
    assert_eq!(delayed.opened.placed(), 3);
    delayed.opened.close().await;
}

/// Its callers are told UNAVAILABLE, and the drain waits for it.
#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn the_drain_waits_until_it_is_known_whether_an_order_arrives() {
    let mut delayed = Delayed::start(Duration::from_secs(2)).await;
    assert_eq!((&mut delayed.call).await.unwrap(), Err(StoreError::Unavailable));
    delayed.arrives().await;
    let placed = delayed.opened.metrics.store.placed.clone();
    delayed.opened.close().await;
    let query = "SELECT COUNT(*) FROM orders WHERE product_id = 'book'";
    let stored: (i64,) = sqlx::query_as(query).fetch_one(&mut delayed.connection).await.unwrap();
    assert_eq!(placed.get(), 1 + u64::try_from(stored.0).unwrap());
}
