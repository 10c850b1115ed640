//! The README's client, over connections that grow old much faster than any should.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use order_service::proto::PlaceRequest;
use tokio::{task::JoinSet, time::timeout};

use self::place::place;
use crate::support::{PATIENCE, Process};

#[path = "../../examples/place.rs"]
mod place;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_readme_s_client_retries_what_tonic_loses_and_places_each_order_once() {
    let args = ["--max-connection-age", "100ms"];
    let server = Process::start("sqlite::memory:", &args).await;
    let client = server.grpc().await;
    let retries = Arc::new(AtomicU32::new(0));
    let mut callers = JoinSet::new();
    for _ in 0..16 {
        let (mut client, retries) = (client.clone(), retries.clone());
        callers.spawn(async move {
            let mut placed = 0_u32;
            // Until GOAWAYs have taken down a few calls.
            while retries.load(Ordering::Relaxed) < 20 {
                let order = PlaceRequest { product_id: "book".into(), ..Default::default() };
                let (response, attempts) = place(&mut client, order).await.unwrap();
                assert!(response.order.is_some());
                retries.fetch_add(attempts - 1, Ordering::Relaxed);
                placed += 1;
            }
            placed
        });
    }
    let placed = timeout(PATIENCE, callers.join_all()).await.expect("calls are lost at GOAWAY");
    let placed: u32 = placed.iter().sum();
    println!("{placed} orders, {} attempts lost, 0 orders", retries.load(Ordering::Relaxed));
    let page = server.scrape().await;
    assert_eq!(page.value("product_order_total", &[]), f64::from(placed));
}
