//! With a synchronous standby, an order is acknowledged once the standby has it: also an order that
//! an earlier attempt stored on the primary alone, in whichever way the wait for the standby ended.

use std::{collections::HashMap, time::Duration};

use order_service::proto::{PlaceRequest, order_service_client::OrderServiceClient};
use sqlx::{AssertSqlSafe, Executor as _};
use tokio::{
    task::{JoinHandle, JoinSet},
    time::timeout,
};
use tonic::{Code, transport::Channel};

use crate::{
    postgres::PostgresServer,
    support::{PATIENCE, Process, scrape_until},
};

/// Orders of one outage.
const KEYS: usize = 20;

/// Order ids by key, of the orders that were acknowledged.
type Acknowledged = HashMap<String, String>;

async fn place(mut grpc: OrderServiceClient<Channel>, key: String) -> Option<(String, String)> {
    let request =
        PlaceRequest { product_id: "book".into(), quantity: Some(1), idempotency_key: key.clone() };
    match grpc.place(request).await {
        Ok(placed) => Some((key, placed.into_inner().order.unwrap().order_id)),
        Err(status) => {
            assert_eq!(status.code(), Code::Unavailable, "{status:?}");
            None
        }
    }
}

/// Places an order for each key, all at once.
async fn place_all(service: &Process) -> Acknowledged {
    let grpc = service.grpc().await;
    let calls: JoinSet<_> =
        (0..KEYS).map(|key| place(grpc.clone(), format!("key-{key}"))).collect();
    calls.join_all().await.into_iter().flatten().collect()
}

/// Order ids by key, as a server has them.
async fn rows(server: &PostgresServer) -> Acknowledged {
    let query = "SELECT idempotency_key, CAST(id AS TEXT) FROM orders";
    sqlx::query_as::<_, (String, String)>(query)
        .fetch_all(&mut server.connect().await)
        .await
        .unwrap()
        .into_iter()
        .collect()
}

/// Ends every wait for the standby, by this function, for as long as the task lives.
async fn end_waits(server: &PostgresServer, function: &str) -> JoinHandle<()> {
    let statement = format!(
        "SELECT {function}(pid) FROM pg_stat_activity \
         WHERE wait_event = 'SyncRep' AND application_name = 'order-service'"
    );
    let mut connection = server.connect().await;
    tokio::spawn(async move {
        loop {
            let ended = sqlx::query(AssertSqlSafe(statement.clone())).execute(&mut connection);
            ended.await.unwrap();
        }
    })
}

/// Waits until the server has a row that nobody else has yet.
async fn until_one_is_stored(server: &PostgresServer) {
    let stored = async { while rows(server).await.is_empty() {} };
    timeout(PATIENCE, stored).await.expect("the primary stores it");
}

/// The standby goes, orders are placed and stored on the primary alone, in a way of `store_alone`;
/// then they are retried, without the standby and with it.
async fn nothing_is_acknowledged_alone(store_alone: impl AsyncFnOnce(&PostgresServer, &Process)) {
    let primary = PostgresServer::start().await;
    let standby = primary.attach_standby().await;
    let service = Process::start(&primary.url(), &["--request-timeout", "2s"]).await;
    let count = async || service.scrape().await.value("product_order_total", &[]);
    standby.stop_immediately();
    store_alone(&primary, &service).await;
    until_one_is_stored(&primary).await;

    let alone = place_all(&service).await;
    assert_eq!(alone, Acknowledged::new(), "acknowledged with no standby attached");
    assert_eq!(count().await, 0.0, "counted with no standby attached");
    // What retries left behind on the server is bounded.
    let waiting: (i64,) =
        sqlx::query_as("SELECT COUNT(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
            .fetch_one(&mut primary.connect().await)
            .await
            .unwrap();
    assert!(waiting.0 <= 8, "{} backends wait for the standby", waiting.0);

    standby.run();
    primary.until_replicated().await;
    let acknowledged = place_all(&service).await;
    assert_eq!(acknowledged.len(), KEYS);
    scrape_until(service.admin, |page| page.value("product_order_total", &[]) == KEYS as f64).await;
    primary.stop_immediately();
    standby.promote();
    let kept = rows(&standby).await;
    let lost = acknowledged.iter().filter(|(key, id)| kept.get(*key) != Some(*id)).count();
    println!("{lost} of {} lost after the promotion", acknowledged.len());
    assert_eq!(lost, 0);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_restart_of_the_primary_acknowledges_nothing_that_the_standby_lacks() {
    nothing_is_acknowledged_alone(async |primary, service| {
        assert_eq!(place_all(service).await, Acknowledged::new());
        primary.stop_immediately();
        primary.run();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_terminated_backend_acknowledges_nothing_that_the_standby_lacks() {
    nothing_is_acknowledged_alone(async |primary, service| {
        let ending = end_waits(primary, "pg_terminate_backend").await;
        assert_eq!(place_all(service).await, Acknowledged::new());
        ending.abort();
    })
    .await;
}

/// The commit reports success, with a warning.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_cancelled_wait_acknowledges_nothing_that_the_standby_lacks() {
    nothing_is_acknowledged_alone(async |primary, service| {
        let ending = end_waits(primary, "pg_cancel_backend").await;
        assert_eq!(place_all(service).await, Acknowledged::new());
        ending.abort();
    })
    .await;
}

/// How far the server's WAL has grown.
async fn wal_bytes(server: &PostgresServer) -> i64 {
    let query = "SELECT CAST(pg_current_wal_insert_lsn() - '0/0' AS INT8)";
    sqlx::query_as::<_, (i64,)>(query).fetch_one(&mut server.connect().await).await.unwrap().0
}

/// A read that waits for nothing would write nothing.
#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_batch_of_replays_writes_one_short_commit() {
    let mut server = PostgresServer::make();
    // Nothing else writes WAL meanwhile.
    server.set(&["autovacuum=off", "bgwriter_lru_maxpages=0", "checkpoint_timeout=1h"]);
    server.run();
    let service = Process::start(&server.url(), &[]).await;
    assert_eq!(place_all(&service).await.len(), KEYS);
    place_all(&service).await;
    let before = wal_bytes(&server).await;
    assert_eq!(place_all(&service).await.len(), KEYS);
    let written = wal_bytes(&server).await - before;
    // A message and a commit record for each of 1 to 20 batches.
    assert!((50..=KEYS as i64 * 200).contains(&written), "{written} bytes");
    assert_eq!(service.scrape().await.value("product_order_total", &[]), KEYS as f64);
}

/// The standby answers more slowly than an attempt may take: orders are placed all the same.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_standby_that_takes_seconds_delays_orders_and_refuses_none() {
    use rustix::process::{Signal, kill_process};

    let primary = PostgresServer::start().await;
    let standby = primary.attach_standby().await;
    let service = Process::start(&primary.url(), &["--request-timeout", "30s"]).await;
    let receiver = standby.wal_receiver().await;
    let slow = tokio::spawn(async move {
        loop {
            kill_process(receiver, Signal::STOP).unwrap();
            // The fault's length.
            tokio::time::sleep(Duration::from_millis(1500)).await;
            kill_process(receiver, Signal::CONT).unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    for _ in 0..3 {
        assert_eq!(place_all(&service).await.len(), KEYS);
    }
    slow.abort();
    let _ = slow.await;
    kill_process(receiver, Signal::CONT).unwrap();
}

/// The plans that `auto_explain` sends with each statement are warnings, and cancel no wait.
#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn warnings_of_auto_explain_keep_no_order_from_being_placed() {
    for with_standby in [false, true] {
        let mut primary = PostgresServer::make();
        primary.set(&[
            "session_preload_libraries=auto_explain",
            "auto_explain.log_min_duration=0",
            "auto_explain.log_level=warning",
        ]);
        primary.run();
        let standby = if with_standby { Some(primary.attach_standby().await) } else { None };
        let service = Process::start(&primary.url(), &[]).await;
        let acknowledged = place_all(&service).await;
        assert_eq!(acknowledged.len(), KEYS);
        assert_eq!(place_all(&service).await, acknowledged);
        assert_eq!(service.scrape().await.value("product_order_total", &[]), KEYS as f64);
        assert_eq!(service.terminate().await, Some(0));
        drop(standby);
    }
}

/// A warning of one line without a number, which each SELECT of orders brings.
#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn an_unknown_warning_of_reads_keeps_no_order_from_being_placed() {
    let primary = PostgresServer::start().await;
    let service = Process::start(&primary.url(), &[]).await;
    let warning = "CREATE FUNCTION warn() RETURNS BOOLEAN LANGUAGE plpgsql VOLATILE AS \
                   $$ BEGIN RAISE WARNING 'mind the gap'; RETURN true; END $$; \
                   ALTER TABLE orders RENAME TO kept; \
                   CREATE VIEW orders AS SELECT * FROM kept WHERE (SELECT warn())";
    primary.connect().await.execute(warning).await.unwrap();
    let acknowledged = place_all(&service).await;
    assert_eq!(acknowledged.len(), KEYS);
    assert_eq!(place_all(&service).await, acknowledged);
}
