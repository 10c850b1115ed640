//! Readers in any number do not keep orders from being placed.

use order_service::{metrics::StoreErrorKind, store::StoreStatus};
use sqlx::Executor as _;
use tokio::task::JoinSet;

use crate::{
    database::{Opened, later, new, until},
    postgres::PostgresServer,
};

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn orders_are_placed_while_slow_reads_wait_in_line() {
    let server = PostgresServer::start().await;
    let opened = Opened::new(&server.url()).await.unwrap();
    opened.store.place(new("book", None), later()).await.unwrap();
    // Whoever reads a row waits; whoever inserts one, and is told its id, does not.
    let slow = "ALTER TABLE orders RENAME TO kept; \
        CREATE FUNCTION slow() RETURNS BOOLEAN LANGUAGE plpgsql VOLATILE AS \
        $$ BEGIN PERFORM pg_sleep(0.5); RETURN true; END $$; \
        CREATE VIEW orders AS SELECT * FROM kept WHERE slow()";
    server.connect().await.execute(slow).await.unwrap();
    let mut reads: JoinSet<()> = JoinSet::new();
    for _ in 0..200 {
        let store = opened.store.clone();
        reads.spawn(async move {
            loop {
                let _ = store.list(None, 1, later()).await;
            }
        });
    }
    // One had to give up: more of them wait than can have their turn in time.
    until(|| matches!(opened.health.status(), StoreStatus::Failing { .. })).await;
    for _ in 0..20 {
        opened.store.place(new("book", None), later()).await.unwrap();
    }
    for kind in [StoreErrorKind::Unavailable, StoreErrorKind::Timeout] {
        assert_eq!(opened.metrics.store.errors(kind).get(), 0, "{kind:?}");
    }
    assert_eq!(opened.placed(), 21);
    reads.shutdown().await;
    opened.close().await;
}
