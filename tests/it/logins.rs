//! Logins to PostgreSQL that take longer than anybody waits for one, that hang, or that are refused.

use std::time::Duration;

use order_service::store::{StoreError, StoreStatus};
use sqlx::Executor as _;
use tokio::time::{Instant, sleep};

use crate::{
    database::{Opened, later, new, taken},
    postgres::{PASSWORD, PostgresServer},
    proxy::{Proxy, Traffic},
};

/// Longer than an attempt waits for a connection.
const SLOW: Duration = Duration::from_millis(1500);

/// A store whose connections to its server pass a proxy, and none of which is open.
async fn proxied(traffic: Traffic) -> (PostgresServer, Proxy, Opened) {
    let server = PostgresServer::start().await;
    let proxy = Proxy::start(server.port).await;
    proxy.set(traffic);
    let opened = Opened::new(&server.url_at(proxy.port)).await.unwrap();
    (server, proxy, opened)
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_server_whose_logins_are_slow_is_written_to() {
    let (_server, _proxy, opened) = proxied(Traffic::BeginsAfter(SLOW)).await;
    for _ in 0..10 {
        opened.store.place(new("book", None), later()).await.unwrap();
    }
    assert_eq!((opened.placed(), opened.all().await.len()), (10, 10));
    opened.close().await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_server_whose_logins_are_slow_is_read_by_who_asks_again() {
    let (_server, _proxy, opened) = proxied(Traffic::BeginsAfter(SLOW)).await;
    let list = || opened.store.list(None, 1, later());
    assert_eq!(list().await, Err(StoreError::Unavailable));
    assert!(matches!(opened.health.status(), StoreStatus::Failing { .. }));
    // The login that the first one began.
    assert_eq!(list().await.map(|page| page.orders), Ok(Vec::new()));
    assert_eq!(opened.health.status(), StoreStatus::Up);
    opened.close().await;
}

/// What a balancer does that sends connections to a server which is gone.
#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn logins_that_hang_do_not_keep_from_a_server_that_is_back() {
    let (_server, proxy, opened) = proxied(Traffic::Passes).await;
    opened.store.place(new("book", None), later()).await.unwrap();
    proxy.set(Traffic::BeginsAfter(Duration::from_secs(3600)));
    proxy.cut();
    // Two writers and two readers at once begin as many logins as may be under way.
    let mut calls = Vec::new();
    for _ in 0..2 {
        calls.push(taken(&opened, new("book", None), later()).await);
    }
    let list = || opened.store.list(None, 1, later());
    let _ = tokio::join!(list(), list());
    // The rest of the outage, shorter than a login may take.
    sleep(Duration::from_secs(1)).await;
    proxy.set(Traffic::Passes);
    let back = Instant::now();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert!(back.elapsed() < Duration::from_secs(2), "{:?}", back.elapsed());
    assert_eq!((opened.placed(), opened.all().await.len()), (3, 3));
    opened.close().await;
}

/// A password that changes before the service's does, a standby with other rules: no order is to blame.
#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn logins_that_are_refused_are_an_outage() {
    let server = PostgresServer::start().await;
    let opened = Opened::new(&server.url()).await.unwrap();
    opened.store.place(new("book", None), later()).await.unwrap();
    let mut other = server.connect().await;
    let change = "ALTER ROLE postgres PASSWORD 'another'; \
        SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
        WHERE application_name = 'order-service'";
    other.execute(change).await.unwrap();
    let soon = Instant::now() + Duration::from_secs(1);
    let placed = opened.store.place(new("book", None), soon).await;
    assert_eq!(placed, Err(StoreError::Unavailable));
    assert_eq!(opened.store.list(None, 1, later()).await, Err(StoreError::Unavailable));
    let status = opened.health.status();
    let StoreStatus::Failing { why } = status else { panic!("{status:?}") };
    assert!(why.contains("password authentication failed"), "{why}");
    assert!(!why.contains(PASSWORD), "{why}");

    let back = format!("ALTER ROLE postgres PASSWORD '{PASSWORD}'");
    other.execute(sqlx::AssertSqlSafe(back)).await.unwrap();
    opened.store.place(new("book", None), later()).await.unwrap();
    assert_eq!(opened.health.status(), StoreStatus::Up);
    assert_eq!(opened.all().await.len() as u64, opened.placed());
    opened.close().await;
}
