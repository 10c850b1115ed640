//! A URL with several PostgreSQL servers: a login goes through them until one takes writes, and a
//! failover needs no proxy.

use std::{collections::HashMap, time::Duration};

use rustix::process::{Signal, kill_process};
use sqlx::Executor as _;
use tokio::time::Instant;

use order_service::{
    metrics::StoreErrorKind,
    store::{StoreError, StoreStatus},
};

use crate::{
    database::{Database, Opened, later, new, taken, until},
    postgres::{PASSWORD, PostgresServer},
    proxy::{Proxy, Traffic},
    support::{PATIENCE, Process},
};

/// How soon after a promotion orders are placed again: a login past a server that hangs, and what
/// the machine may add to it.
const SOON: Duration = Duration::from_secs(5);

/// A primary with a standby that holds each commit.
async fn pair() -> (PostgresServer, PostgresServer) {
    let primary = PostgresServer::start().await;
    let standby = primary.attach_standby().await;
    (primary, standby)
}

/// The URL of servers in this order.
fn url(servers: [&PostgresServer; 2], parameters: &str) -> String {
    let [a, b] = servers.map(|server| server.port);
    format!("postgres://postgres:{PASSWORD}@127.0.0.1:{a},127.0.0.1:{b}/postgres{parameters}")
}

/// Keys with the ids of their orders.
type Acknowledged = HashMap<String, String>;

async fn place(opened: &Opened, key: &str) -> Result<String, StoreError> {
    let placed = opened.store.place(new("book", Some(key)), later()).await?;
    Ok(placed.order.id.to_string())
}

async fn place_all(opened: &Opened, keys: std::ops::Range<usize>) -> Acknowledged {
    let mut acknowledged = Acknowledged::new();
    for key in keys.map(|key| format!("key-{key}")) {
        let id = place(opened, &key).await.unwrap();
        acknowledged.insert(key, id);
    }
    acknowledged
}

/// Every acknowledged order is on this server, once.
async fn has_all(server: &PostgresServer, acknowledged: &Acknowledged) {
    let query = "SELECT idempotency_key, CAST(id AS TEXT) FROM orders";
    let rows: Vec<(String, String)> =
        sqlx::query_as(query).fetch_all(&mut server.connect().await).await.unwrap();
    assert_eq!(rows.len(), acknowledged.len());
    assert_eq!(&rows.into_iter().collect::<Acknowledged>(), acknowledged);
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_standby_in_the_list_is_passed_over() {
    let (primary, standby) = pair().await;
    let mut acknowledged = Acknowledged::new();
    for (round, parameters) in
        ["", "?target_session_attrs=read-write", "?target_session_attrs=primary"].iter().enumerate()
    {
        let opened = Opened::new(&url([&standby, &primary], parameters)).await.unwrap();
        acknowledged.extend(place_all(&opened, round * 10..(round + 1) * 10).await);
        assert!(!primary.backends().await.is_empty());
        assert!(standby.backends().await.is_empty(), "{parameters}");
        opened.close().await;
    }
    has_all(&primary, &acknowledged).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_failover_is_survived_without_a_proxy() {
    let (primary, standby) = pair().await;
    let hosts = url([&primary, &standby], "?target_session_attrs=read-write");
    let opened = Opened::new(&hosts).await.unwrap();
    let mut acknowledged = place_all(&opened, 0..20).await;

    primary.stop_immediately();
    let soon = Instant::now() + Duration::from_secs(2);
    // Its outcome may be unknown; the same key is placed below.
    let placed = opened.store.place(new("book", Some("key-20")), soon).await;
    assert_eq!(placed, Err(StoreError::Unavailable));
    let StoreStatus::Failing { why } = opened.health.status() else { panic!("it fails") };
    // Each server by its name, with its own reason.
    let (first, second) = why.split_once("; ").unwrap_or_else(|| panic!("{why}"));
    let (refuses, reads) =
        if first.contains("refused") { (first, second) } else { (second, first) };
    assert!(refuses.contains(&format!("127.0.0.1:{}: Connection refused", primary.port)), "{why}");
    assert!(reads.contains(&format!("127.0.0.1:{}: it takes no writes", standby.port)), "{why}");
    assert!(!why.contains(PASSWORD), "{why}");

    standby.promote();
    let promoted = Instant::now();
    acknowledged.extend(place_all(&opened, 20..21).await);
    println!("orders are placed {:?} after the promotion", promoted.elapsed());
    assert!(promoted.elapsed() < SOON, "{:?}", promoted.elapsed());
    acknowledged.extend(place_all(&opened, 21..40).await);
    assert_eq!(opened.health.status(), StoreStatus::Up);
    assert_eq!(opened.placed(), 40);
    has_all(&standby, &acknowledged).await;
    opened.close().await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_server_that_became_read_only_is_left_for_the_next() {
    for parameters in ["", "?target_session_attrs=read-write"] {
        let (primary, standby) = pair().await;
        let hosts = url([&primary, &standby], parameters);
        let opened = Opened::new(&hosts).await.unwrap();
        let mut acknowledged = place_all(&opened, 0..10).await;
        // Reads hold connections of their own.
        let reads = (0..4).map(|_| opened.store.list(None, 10, later()));
        for read in futures_util::future::join_all(reads).await {
            assert_eq!(read.unwrap().orders.len(), 10);
        }
        standby.promote();
        let mut other = primary.connect().await;
        for statement in
            ["ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()"]
        {
            other.execute(statement).await.unwrap();
        }
        until_read_only(&primary).await;

        let left = Instant::now();
        acknowledged.extend(place_all(&opened, 10..30).await);
        println!("20 orders are placed in {:?} on the next server", left.elapsed());
        assert!(left.elapsed() < SOON, "{:?}", left.elapsed());
        has_all(&standby, &acknowledged).await;
        // No read is answered by the server that was left, either.
        assert_eq!(opened.store.list(None, 100, later()).await.unwrap().orders.len(), 30);
        until_left(&primary).await;
        opened.close().await;
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_server_that_is_frozen_is_left_for_the_next() {
    let (primary, standby) = pair().await;
    let hosts = url([&primary, &standby], "?target_session_attrs=primary");
    let opened = Opened::new(&hosts).await.unwrap();
    let mut acknowledged = place_all(&opened, 0..10).await;
    let mut frozen = primary.backends().await;
    frozen.push(primary.postmaster());
    for process in &frozen {
        kill_process(*process, Signal::STOP).unwrap();
    }
    standby.promote();
    let promoted = Instant::now();
    acknowledged.extend(place_all(&opened, 10..11).await);
    println!("orders are placed {:?} after the promotion", promoted.elapsed());
    assert!(promoted.elapsed() < SOON, "{:?}", promoted.elapsed());
    acknowledged.extend(place_all(&opened, 11..30).await);
    has_all(&standby, &acknowledged).await;
    opened.close().await;
    for process in &frozen {
        kill_process(*process, Signal::CONT).unwrap();
    }
}

/// The standby lacks an order that the primary has stored, and whose outcome is yet to be found out.
#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_standby_that_lags_never_says_that_an_order_is_not_stored() {
    let (primary, standby) = pair().await;
    let proxy = Proxy::start(primary.port).await;
    let url = format!(
        "postgres://postgres:{PASSWORD}@127.0.0.1:{},127.0.0.1:{}/postgres?target_session_attrs=any",
        proxy.port, standby.port
    );
    let opened = Opened::new(&url).await.unwrap();
    let first = new("first", None);
    opened.store.place(first.clone(), later()).await.unwrap();
    standby.until_stored(first.order.id).await;
    standby.connect().await.execute("SELECT pg_wal_replay_pause()").await.unwrap();

    proxy.set(Traffic::AnswersAreHeld);
    let order = new("book", None);
    let call = taken(&opened, order.clone(), later()).await;
    primary.until_stored(order.order.id).await;
    Database::refuse_product(&primary.url(), "book").await;
    proxy.set(Traffic::IsCut);
    proxy.set(Traffic::Passes);
    until(|| opened.metrics.store.errors(StoreErrorKind::Other).get() > 0).await;
    // It was refused, and is looked up on the standby alone.
    proxy.set(Traffic::IsCut);
    let standby_was_asked = || match opened.health.status() {
        StoreStatus::Failing { why } => why.contains("it is a standby"),
        _ => false,
    };
    until(|| standby_was_asked() || call.is_finished()).await;
    assert!(!call.is_finished());
    proxy.set(Traffic::Passes);
    let placed = call.await.unwrap().unwrap();
    assert_eq!((placed.order, placed.replayed), (order.order, false));
    assert_eq!(opened.placed(), 2);
    opened.close().await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_start_waits_for_a_server_that_takes_writes() {
    let (primary, standby) = pair().await;
    primary.stop_immediately();
    let hosts = url([&primary, &standby], "?target_session_attrs=read-write");
    let mut service = Process::spawn(&hosts, &[], |_| {});
    let line = service.logged("the store does not answer yet").await;
    assert!(line["cause"].as_str().unwrap().contains("it takes no writes"), "{line}");
    standby.promote();
    service.serving().await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_start_with_nothing_to_migrate_waits_for_a_server_that_takes_writes() {
    let server = PostgresServer::start().await;
    Process::start(&server.url(), &[]).await.terminate().await;
    let set = async |value: &str| {
        let set = format!("ALTER SYSTEM SET default_transaction_read_only = {value}");
        for statement in [set.as_str(), "SELECT pg_reload_conf()"] {
            server
                .connect()
                .await
                .execute(sqlx::AssertSqlSafe(statement.to_owned()))
                .await
                .unwrap();
        }
    };
    set("on").await;
    until_read_only(&server).await;
    let mut service = Process::spawn(&server.url(), &["--migrations", "check"], |_| {});
    let line = service.logged("the store does not answer yet").await;
    assert!(line["cause"].as_str().unwrap().contains("it takes no writes"), "{line}");
    set("off").await;
    service.serving().await;
}

/// Waits until new transactions of a server may not write.
async fn until_read_only(server: &PostgresServer) {
    let query = "SELECT current_setting('transaction_read_only')";
    let waiting = async {
        loop {
            let mut connection = server.connect().await;
            let (now,): (String,) = sqlx::query_as(query).fetch_one(&mut connection).await.unwrap();
            if now == "on" {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("it is read-only");
}

/// Waits until the service has no connection to a server.
async fn until_left(server: &PostgresServer) {
    let waiting = async { while !server.backends().await.is_empty() {} };
    tokio::time::timeout(PATIENCE, waiting).await.expect("it is left");
}
