//! Orders that may have been committed although nobody was told: they are found and counted, once,
//! whatever became of their callers.

use std::time::Duration;

use order_service::{
    metrics::StoreErrorKind,
    order::{Order, OrderId, Placed},
    store::{NewOrder, StoreError, StoreStatus},
};
use sqlx::{AssertSqlSafe, Executor as _};
use tokio::time::Instant;

use crate::{
    database::{Database, Opened, later, new, taken, until},
    postgres::PostgresServer,
    proxy::{Proxy, Traffic},
    slow_reads::{read_all_the_time, slow_on_postgres},
    support::PATIENCE,
};

/// A store that talks to its server through a proxy.
struct Proxied {
    server: PostgresServer,
    proxy: Proxy,
    opened: Opened,
}

impl Proxied {
    /// One order has been placed: a connection is open.
    async fn start() -> Self {
        let server = PostgresServer::start().await;
        let proxy = Proxy::start(server.port).await;
        let opened = Opened::new(&server.url_at(proxy.port)).await.unwrap();
        opened.store.place(new("first", None), later()).await.unwrap();
        Self { server, proxy, opened }
    }

    /// Places an order whose commit succeeds while its answer is held back.
    async fn commits_unanswered(
        &self,
        order: NewOrder,
        deadline: Instant,
    ) -> tokio::task::JoinHandle<Result<Placed, StoreError>> {
        self.proxy.set(Traffic::AnswersAreHeld);
        let id = order.order.id;
        let call = taken(&self.opened, order, deadline).await;
        self.server.until_stored(id).await;
        call
    }

    async fn assert_stored_and_counted(self, order: &Order) {
        let placed = self.opened.metrics.store.placed.clone();
        until(|| placed.get() == 2).await;
        let errors = |kind| self.opened.metrics.store.errors(kind).get();
        let lost = errors(StoreErrorKind::Unavailable) + errors(StoreErrorKind::Timeout);
        assert!(lost > 0, "the answer was lost");
        let ids: Vec<OrderId> = self.opened.all().await.iter().map(|order| order.id).collect();
        assert_eq!((ids.len(), ids[0]), (2, order.id));
        self.opened.close().await;
        assert_eq!(placed.get(), 2);
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn an_order_whose_answer_is_lost_is_counted_after_its_caller_was_told_unavailable() {
    let proxied = Proxied::start().await;
    let order = new("book", Some("k"));
    let deadline = Instant::now() + Duration::from_secs(2);
    let call = proxied.commits_unanswered(order.clone(), deadline).await;
    proxied.proxy.set(Traffic::IsCut);
    assert_eq!(call.await.unwrap(), Err(StoreError::Unavailable));
    assert!(Instant::now() >= deadline);
    assert_eq!(proxied.opened.placed(), 1, "nothing is counted before it is known");

    proxied.proxy.set(Traffic::Passes);
    // The caller tries again, as it was told to.
    let again = proxied.opened.store.place(new("book", Some("k")), later()).await.unwrap();
    assert_eq!(again, Placed { order: order.order.clone(), replayed: true });
    proxied.assert_stored_and_counted(&order.order).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn an_order_whose_answer_is_lost_is_counted_after_its_caller_hung_up() {
    let proxied = Proxied::start().await;
    let order = new("book", None);
    let call = proxied.commits_unanswered(order.clone(), later()).await;
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    proxied.proxy.set(Traffic::IsCut);
    proxied.proxy.set(Traffic::Passes);
    proxied.assert_stored_and_counted(&order.order).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn the_drain_resolves_what_is_unknown() {
    let proxied = Proxied::start().await;
    let soon = Instant::now() + Duration::from_millis(500);
    let order = new("book", None);
    let call = proxied.commits_unanswered(order.clone(), soon).await;
    assert_eq!(call.await.unwrap(), Err(StoreError::Unavailable));
    proxied.proxy.set(Traffic::IsCut);
    let placed = proxied.opened.metrics.store.placed.clone();
    let mut closing = Box::pin(proxied.opened.close());
    assert!(futures_util::poll!(closing.as_mut()).is_pending());
    assert_eq!(placed.get(), 1);
    proxied.proxy.set(Traffic::Passes);
    closing.await;
    assert_eq!(placed.get(), 2);
}

/// Those who waited and left are still in the queue when both writers have outcomes to find out.
#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_queue_full_of_callers_who_left_is_an_outage_and_no_overload() {
    let proxied = Proxied::start().await;
    let opened = &proxied.opened;
    let unknown = proxied.commits_unanswered(new("book", None), later()).await;
    let unsent = taken(opened, new("book", None), later()).await;
    proxied.proxy.set(Traffic::IsCut);
    until(|| matches!(opened.health.status(), StoreStatus::Failing { .. })).await;
    for _ in 0..4096 {
        let mut place = Box::pin(opened.store.place(new("left", None), later()));
        assert!(futures_util::poll!(place.as_mut()).is_pending());
    }
    let refused = opened.store.place(new("book", None), later()).await;
    assert_eq!(refused, Err(StoreError::Unavailable));

    proxied.proxy.set(Traffic::Passes);
    unknown.await.unwrap().unwrap();
    unsent.await.unwrap().unwrap();
    opened.store.place(new("book", None), later()).await.unwrap();
    assert_eq!((opened.placed(), opened.all().await.len()), (4, 4));
    proxied.opened.close().await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn an_order_that_is_refused_when_it_is_sent_again_is_looked_up_first() {
    let proxied = Proxied::start().await;
    let order = new("book", None);
    let call = proxied.commits_unanswered(order.clone(), later()).await;
    // From here on the database refuses each such order, also those that it has.
    Database::refuse_product(&proxied.server.url(), "book").await;
    proxied.proxy.set(Traffic::IsCut);
    proxied.proxy.set(Traffic::Passes);
    let placed = call.await.unwrap().unwrap();
    assert_eq!(placed, Placed { order: order.order.clone(), replayed: false });
    proxied.assert_stored_and_counted(&order.order).await;
}

/// The writer looks it up by itself: in line among the readers it would hold up all orders behind
/// it.
#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn an_order_is_looked_up_past_any_number_of_readers() {
    let proxied = Proxied::start().await;
    let order = new("book", None);
    let call = proxied.commits_unanswered(order.clone(), later()).await;
    Database::refuse_product(&proxied.server.url(), "book").await;
    proxied.server.connect().await.execute(AssertSqlSafe(slow_on_postgres(0.2))).await.unwrap();
    // They are in line before the writer tries again.
    let (mut reads, _) = read_all_the_time(&proxied.opened, 200, 1);
    tokio::task::yield_now().await;
    proxied.proxy.set(Traffic::IsCut);
    proxied.proxy.set(Traffic::Passes);
    let placed = tokio::time::timeout(PATIENCE, call).await.expect("it is looked up");
    let expected = Placed { order: order.order.clone(), replayed: false };
    assert_eq!(placed.unwrap().unwrap(), expected);
    // The outage was of the connection; to wait for a turn is none.
    let status = format!("{:?}", proxied.opened.health.status());
    assert!(!status.contains("no turn") && !status.contains("busy"), "{status}");
    reads.shutdown().await;
    proxied.assert_stored_and_counted(&order.order).await;
}

/// A row that another program wrote cannot be read as an order. Whoever has its key is refused; who
/// is committed in the same batch is placed and counted, even if its caller hung up meanwhile.
async fn an_order_beside_an_unreadable_one_is_counted(database: Database) {
    let opened = database.open().await;
    let mut connection = database.connect().await;
    opened.store.place(new("book", Some("spoilt")), later()).await.unwrap();
    connection.execute("UPDATE orders SET quantity = 0").await.unwrap();
    // One batch for each writer that takes so long that its callers can hang up under way.
    connection.execute(database.slow_inserts()).await.unwrap();
    let mut calls = Vec::new();
    let writers = if matches!(database, Database::Postgres(_)) { 2 } else { 1 };
    for _ in 0..writers {
        calls.push(taken(&opened, new("first", None), later()).await);
    }
    // These wait until a writer is free, and make one batch.
    let mut hung_up = Box::pin(opened.store.place(new("hung-up", None), later()));
    let mut spoilt = Box::pin(opened.store.place(new("book", Some("spoilt")), later()));
    assert!(futures_util::poll!(hung_up.as_mut()).is_pending());
    assert!(futures_util::poll!(spoilt.as_mut()).is_pending());
    opened.queue_is_empty().await;
    drop(hung_up);
    let refused = spoilt.await;
    assert!(matches!(refused, Err(StoreError::Internal(ref cause)) if cause.contains("quantity")));
    for call in calls {
        call.await.unwrap().unwrap();
    }
    let stored: (i64,) =
        sqlx::query_as("SELECT COUNT(*) FROM orders").fetch_one(&mut connection).await.unwrap();
    assert_eq!(stored.0, 2 + writers);
    assert_eq!(opened.placed(), 2 + writers as u64);
    opened.close().await;
}

#[tokio::test]
async fn sqlite_an_order_beside_an_unreadable_one_is_counted() {
    an_order_beside_an_unreadable_one_is_counted(Database::file()).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn postgres_an_order_beside_an_unreadable_one_is_counted() {
    an_order_beside_an_unreadable_one_is_counted(Database::postgres().await).await;
}
