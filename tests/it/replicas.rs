//! Replicas and connections that come and go under the load of Go's clients, without one failed call.

use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::{
    support::{PATIENCE, Page, Process, scrape_until},
    traffic::{Balancer, Steady},
};

const BOTH: [&str; 2] = ["grpc", "http"];

fn placed(page: &Page) -> f64 {
    page.value("product_order_total", &[])
}

/// One server of many: a database file of its own, and time for its clients to go.
async fn start(dir: &TempDir, name: usize) -> Process {
    let database = format!("sqlite://{}", dir.path().join(format!("{name}.db")).display());
    Process::start(&database, &["--drain-delay", "1s", "--max-connection-age", "2s"]).await
}

/// Waits until these many orders more have been placed at a server.
async fn serves(server: &Process, orders: f64) {
    let before = placed(&server.scrape().await);
    scrape_until(server.admin, |page| placed(page) >= before + orders).await;
}

#[tokio::test]
#[ignore = "needs steady; run by make test"]
async fn connections_grow_old_by_the_hundred_and_no_call_fails() {
    let args = ["--max-connection-age", "500ms", "--processing-delay", "20ms"];
    let server = Process::start("sqlite::memory:", &args).await;
    let api = server.api.to_string();
    let steady = Steady::start(&["-grpc", &api, "-http", &api, "-rate", "250", "-callers", "16"]);
    let connections = |page: &Page| page.value("connections_accepted_total", &[]);
    scrape_until(server.admin, |page| connections(page) >= 300.0).await;
    let sent = steady.none_failed(&BOTH).await;
    assert_eq!(placed(&server.scrape().await), sent as f64);
}

#[tokio::test]
#[ignore = "needs steady; run by make test"]
async fn twenty_rounds_of_new_for_old_fail_no_call() {
    let dir = tempfile::tempdir().unwrap();
    let balancer = Balancer::start().await;
    let mut old = start(&dir, 0).await;
    balancer.add(old.api);
    let target = balancer.address.to_string();
    let steady = Steady::start(&["-grpc", &target, "-http", &target, "-rate", "100"]);
    for round in 1..=20 {
        let new = start(&dir, round).await;
        balancer.add(new.api);
        serves(&old, 20.0).await;
        // As on Kubernetes: the signal first, and the balancer learns of it a little later.
        old.signal(Signal::TERM);
        old.logged("draining: no longer ready").await;
        balancer.remove(old.api);
        // Its clients have come over.
        serves(&new, 20.0).await;
        assert_eq!(old.ended().await, Some(0));
        old = new;
    }
    let sent = steady.none_failed(&BOTH).await;
    println!("20 drains: {sent} calls, 0 failed");
    assert_eq!(orders_in(&dir, 20).await, sent);
}

#[tokio::test]
#[ignore = "needs steady; run by make test"]
async fn two_hundred_requests_a_second_on_kept_connections_survive_sigterm() {
    let dir = tempfile::tempdir().unwrap();
    let balancer = Balancer::start().await;
    let (old, new) = (start(&dir, 0).await, start(&dir, 1).await);
    balancer.add(old.api);
    let target = balancer.address.to_string();
    let steady = Steady::start(&["-http", &target, "-rate", "200", "-callers", "40"]);
    serves(&old, 400.0).await;
    balancer.add(new.api);
    balancer.remove(old.api);
    let terminated = tokio::time::timeout(PATIENCE, old.terminate());
    assert_eq!(terminated.await.expect("the drain ends"), Some(0));
    serves(&new, 200.0).await;
    let sent = steady.none_failed(&["http"]).await;
    assert_eq!(orders_in(&dir, 1).await, sent);
}

/// How many orders the database files of these servers hold.
async fn orders_in(dir: &TempDir, last: usize) -> u64 {
    let mut orders = 0;
    for name in 0..=last {
        let options = sqlx::sqlite::SqliteConnectOptions::new()
            .filename(dir.path().join(format!("{name}.db")))
            .busy_timeout(Duration::from_secs(10));
        let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
        let count: i64 =
            sqlx::query_scalar("SELECT count(*) FROM orders").fetch_one(&pool).await.unwrap();
        orders += u64::try_from(count).unwrap();
        pool.close().await;
    }
    orders
}
