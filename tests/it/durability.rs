//! What was acknowledged is kept: through kill -9, through SIGTERM under load, and by one process at
//! a time.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use order_service::proto::{
    GetRequest, ListRequest, PlaceRequest, order_service_client::OrderServiceClient,
};
use reqwest::Client;
use rustix::process::Signal;
use sqlx::{Connection as _, SqliteConnection};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::{
    database::lock_file_in,
    support::{PATIENCE, Process, database_in, scrape_until, server_command},
};

fn place(key: &str) -> PlaceRequest {
    PlaceRequest { product_id: "book".into(), quantity: Some(2), idempotency_key: key.into() }
}

/// Places orders with keys of their own until a call fails; returns the acknowledged ones by key, and
/// the key of the failed call.
async fn load(
    mut grpc: OrderServiceClient<Channel>,
    name: usize,
) -> (HashMap<String, String>, String) {
    let mut acknowledged = HashMap::new();
    for i in 0.. {
        let key = format!("{name}-{i}");
        match grpc.place(place(&key)).await {
            Ok(placed) => acknowledged.insert(key, placed.into_inner().order.unwrap().order_id),
            Err(_) => return (acknowledged, key),
        };
    }
    unreachable!("the loop has no end")
}

/// Every stored order's id.
async fn stored(mut grpc: OrderServiceClient<Channel>) -> Vec<String> {
    let mut ids = Vec::new();
    let mut page_token = String::new();
    loop {
        let page =
            grpc.list(ListRequest { page_size: 1000, page_token }).await.unwrap().into_inner();
        ids.extend(page.orders.into_iter().map(|order| order.order_id));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return ids;
        }
    }
}

#[tokio::test]
async fn kill_9_under_load_loses_no_acknowledged_order_and_doubles_none() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = HashMap::new();
    let mut unanswered = Vec::new();
    for round in 0..3 {
        let server = Process::start_in(dir.path(), &[]).await;
        let mut callers = JoinSet::new();
        for caller in 0..32 {
            callers.spawn(load(server.grpc().await, round * 32 + caller));
        }
        let enough = (round + 1) as f64 * 300.0;
        scrape_until(server.admin, |page| page.value("product_order_total", &[]) >= enough).await;
        server.kill_9().await;
        for (orders, key) in callers.join_all().await {
            acknowledged.extend(orders);
            unanswered.push(key);
        }
    }

    let server = Process::start_in(dir.path(), &[]).await;
    let mut grpc = server.grpc().await;
    for (key, order_id) in &acknowledged {
        let order = grpc.get(GetRequest { order_id: order_id.clone() }).await.unwrap().into_inner();
        assert_eq!(order.order.unwrap().quantity, 2, "{key}");
    }
    // A retry tells whether the order was placed; either way it is placed once.
    for key in &unanswered {
        let id = grpc.place(place(key)).await.unwrap().into_inner().order.unwrap().order_id;
        acknowledged.insert(key.clone(), id);
    }
    let stored = stored(grpc).await;
    let ids: HashSet<_> = acknowledged.values().cloned().collect();
    assert_eq!(stored.len(), acknowledged.len());
    assert_eq!(ids, stored.into_iter().collect());
}

/// Rows that the killed process had written may be in the page cache alone. Whoever replays one must
/// not be answered before it is flushed, as a checkpoint does.
#[tokio::test]
async fn what_a_killed_process_left_is_flushed_before_it_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::start_in(dir.path(), &[]).await;
    let mut grpc = server.grpc().await;
    for key in ["a", "b", "c"] {
        grpc.place(place(key)).await.unwrap();
    }
    server.kill_9().await;
    let _server = Process::start_in(dir.path(), &[]).await;
    // The database file without its WAL.
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(dir.path().join("orders.db"), copy.path().join("orders.db")).unwrap();
    let mut connection = SqliteConnection::connect(&database_in(copy.path())).await.unwrap();
    let rows: (i64,) =
        sqlx::query_as("SELECT COUNT(*) FROM orders").fetch_one(&mut connection).await.unwrap();
    assert_eq!(rows.0, 3);
}

#[tokio::test]
async fn a_second_process_on_the_same_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let first = Process::start_in(dir.path(), &[]).await;
    let url = database_in(dir.path());
    let ports = ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
    let mut second = server_command(&[&ports[..], &["--database-url", &url]].concat());
    let output = second.stderr(Stdio::piped()).output().await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains("orders.db"), "{stderr}");
    first.grpc().await.place(place("")).await.unwrap();

    // The lock goes with its process, however that ends.
    first.kill_9().await;
    Process::start_in(dir.path(), &[]).await.grpc().await.place(place("")).await.unwrap();
}

/// Calls over HTTP/1 with keep-alive, each on a connection that is open, until told to stop; a
/// connection that was asked to go is not used again. Returns how many were answered.
async fn rest_load(
    server: String,
    stop: CancellationToken,
    placed: Arc<AtomicU64>,
) -> Result<(), String> {
    let client = Client::builder().pool_max_idle_per_host(1).build().unwrap();
    while !stop.is_cancelled() {
        let response = client.get(&server).send().await.map_err(|error| format!("{error:?}"))?;
        if response.status() != 200 {
            return Err(format!("{response:?}"));
        }
        placed.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

#[tokio::test]
async fn sigterm_finishes_what_is_in_flight_and_exits_0() {
    for signal in [Signal::TERM, Signal::INT] {
        let dir = tempfile::tempdir().unwrap();
        let args = ["--request-timeout", "60s", "--drain-timeout", "60s"];
        let mut server = Process::start_in(dir.path(), &args).await;
        // None is answered before all are in flight and the drain has begun.
        let locked = lock_file_in(dir.path()).await;
        let mut calls = JoinSet::new();
        for _ in 0..50 {
            let mut grpc = server.grpc().await;
            calls.spawn(async move {
                grpc.place(place("")).await.map(drop).map_err(|e| format!("{e:?}"))
            });
            let request = reqwest::get(server.url("/product"));
            calls.spawn(async move {
                let response = request.await.map_err(|error| format!("{error:?}"))?;
                (response.status() == 200).then_some(()).ok_or(format!("{response:?}"))
            });
        }
        scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 100.0).await;
        server.signal(signal);
        let line = server.logged("draining: stopped accepting").await;
        assert_eq!(line["requests"], 100);
        locked.close().await.unwrap();
        let failed: Vec<_> = calls.join_all().await.into_iter().filter_map(Result::err).collect();
        assert_eq!(failed, Vec::<String>::new());
        assert_eq!(server.exited().await.code(), Some(0));
        assert_rows(dir.path(), 100).await;
    }
}

/// The file holds this many orders, and nothing is left that needs recovery.
async fn assert_rows(dir: &Path, rows: usize) {
    let server = Process::start_in(dir, &[]).await;
    assert_eq!(stored(server.grpc().await).await.len(), rows);
}

#[tokio::test]
async fn a_drain_delay_lets_steady_clients_leave_without_one_failed_call() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start_in(dir.path(), &["--drain-delay", "5s"]).await;
    let (stop, placed) = (CancellationToken::new(), Arc::new(AtomicU64::new(0)));
    let mut callers = JoinSet::new();
    for _ in 0..8 {
        callers.spawn(rest_load(server.url("/product"), stop.clone(), placed.clone()));
    }
    scrape_until(server.admin, |page| page.value("product_order_total", &[]) > 100.0).await;
    server.signal(Signal::TERM);
    let line = server.logged("draining: no longer ready").await;
    assert_eq!(line["level"], "INFO");
    let ready = reqwest::get(format!("http://{}/readyz", server.admin)).await.unwrap();
    assert_eq!(ready.status(), 503);
    // The load goes on while the replica is taken out of rotation, then moves elsewhere.
    let before = placed.load(Ordering::Relaxed);
    let going_on = async {
        while placed.load(Ordering::Relaxed) < before + 100 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, going_on).await.expect("orders are still taken");
    stop.cancel();
    let failed: Vec<_> = callers.join_all().await.into_iter().filter_map(Result::err).collect();
    assert_eq!(failed, Vec::<String>::new());
    assert_eq!(server.exited().await.code(), Some(0));
    assert_rows(dir.path(), placed.load(Ordering::Relaxed).try_into().unwrap()).await;
}
