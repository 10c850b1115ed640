//! Many processes on one PostgreSQL: each key is placed once, whoever asks for it, and nobody waits in
//! a circle.

use order_service::proto::{PlaceRequest, order_service_client::OrderServiceClient};
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::{postgres::PostgresServer, support::Process};

const KEYS: usize = 20_000;
const CALLERS: usize = 128;

/// Places every key, in an order of this process's own; returns how many were new.
async fn place_all(grpc: OrderServiceClient<Channel>, process: usize) -> usize {
    let mut callers = JoinSet::new();
    for caller in 0..CALLERS {
        let mut grpc = grpc.clone();
        callers.spawn(async move {
            let mut new = 0;
            for i in (caller..KEYS).step_by(CALLERS) {
                // Upwards, downwards, and from the middle on, so that batches cross.
                let i = if process.is_multiple_of(2) { i } else { KEYS - 1 - i };
                let key = (i + process / 2 * KEYS / 2) % KEYS;
                let request = PlaceRequest {
                    product_id: "book".into(),
                    quantity: Some(1 + key as u32 % 10_000),
                    idempotency_key: format!("key-{key}"),
                };
                let placed = grpc.place(request).await.expect("no call fails").into_inner();
                assert_eq!(placed.order.unwrap().quantity, 1 + key as u32 % 10_000);
                new += usize::from(!placed.replayed);
            }
            new
        });
    }
    callers.join_all().await.into_iter().sum()
}

async fn share(processes: usize) {
    let server = PostgresServer::start().await;
    let mut services = Vec::new();
    for _ in 0..processes {
        // This client counts a connection that is asked to go as a failed call.
        let args = ["--request-timeout", "60s", "--max-connection-age", "0s"];
        services.push(Process::start(&server.url(), &args).await);
    }
    let mut placing = JoinSet::new();
    for (i, service) in services.iter().enumerate() {
        placing.spawn(place_all(service.grpc().await, i));
    }
    let new: usize = placing.join_all().await.into_iter().sum();

    let mut connection = server.connect().await;
    let counts: (i64, i64) =
        sqlx::query_as("SELECT COUNT(*), COUNT(DISTINCT idempotency_key) FROM orders")
            .fetch_one(&mut connection)
            .await
            .unwrap();
    assert_eq!((new, counts), (KEYS, (KEYS as i64, KEYS as i64)));
    let mut counted = 0.0;
    for service in &services {
        let page = service.scrape().await;
        counted += page.value("product_order_total", &[]);
        for kind in ["conflict", "constraint", "full", "other"] {
            let kind = format!("kind=\"{kind}\"");
            assert_eq!(page.value("order_store_errors_total", &[&kind]), 0.0, "{kind}");
        }
    }
    assert_eq!(counted, KEYS as f64);
    let deadlocks: (i64,) = sqlx::query_as("SELECT SUM(deadlocks)::INT8 FROM pg_stat_database")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert_eq!(deadlocks.0, 0);
    for service in services {
        assert_eq!(service.terminate().await, Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn two_processes_place_the_same_keys_once() {
    share(2).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn four_processes_place_the_same_keys_once() {
    share(4).await;
}
