//! A PostgreSQL server that fails under load: nothing acknowledged is lost, nothing is doubled, no call
//! hangs, and the service is back by itself.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicUsize, Ordering},
    sync::{Arc, Mutex},
    time::Duration,
};

use order_service::{
    proto::{PlaceRequest, order_service_client::OrderServiceClient},
    store::StoreError,
};
use rustix::process::{Signal, kill_process};
use sqlx::Executor as _;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, transport::Channel};

use crate::{
    database::{Opened, later, new, taken, until},
    postgres::PostgresServer,
    support::{PATIENCE, Process, scrape_until},
};

/// The service's time limit of a call, and what the machine may add to it.
const DEADLINE: Duration = Duration::from_secs(2);
const SLACK: Duration = Duration::from_secs(2);

/// How soon the service serves again once its server does.
const RECOVERY: Duration = Duration::from_secs(2);

/// Callers that place orders, each with a key of its own, one after the other.
struct Load {
    stop: CancellationToken,
    callers: JoinSet<()>,
    tally: Arc<Mutex<Tally>>,
}

#[derive(Default)]
struct Tally {
    /// Order ids by key.
    acknowledged: HashMap<String, String>,
    /// Keys whose caller was told UNAVAILABLE.
    unavailable: Vec<String>,
    slowest: Duration,
    last_success: Option<Instant>,
}

impl Load {
    async fn start(service: &Process, callers: usize) -> Self {
        let (stop, tally) = (CancellationToken::new(), Arc::new(Mutex::default()));
        let next = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        for _ in 0..callers {
            let grpc = service.grpc().await;
            tasks.spawn(call_on(grpc, next.clone(), stop.clone(), tally.clone()));
        }
        Self { stop, callers: tasks, tally }
    }

    /// Waits for a call that succeeds from now on; returns how long that took.
    async fn succeeds_again(&self) -> Duration {
        let begun = Instant::now();
        let waiting = async {
            while self.tally.lock().unwrap().last_success.is_none_or(|last| last <= begun) {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, waiting).await.expect("calls succeed again");
        begun.elapsed()
    }

    async fn stop(mut self) -> Tally {
        self.stop.cancel();
        while let Some(caller) = self.callers.join_next().await {
            caller.unwrap();
        }
        std::mem::take(&mut *self.tally.lock().unwrap())
    }
}

async fn call_on(
    mut grpc: OrderServiceClient<Channel>,
    next: Arc<AtomicUsize>,
    stop: CancellationToken,
    tally: Arc<Mutex<Tally>>,
) {
    while !stop.is_cancelled() {
        let key = format!("key-{}", next.fetch_add(1, Ordering::Relaxed));
        let begun = Instant::now();
        let answer = timeout(DEADLINE + SLACK, grpc.place(place(&key))).await;
        let answer = answer.expect("no call hangs past its deadline");
        let mut tally = tally.lock().unwrap();
        tally.slowest = tally.slowest.max(begun.elapsed());
        match answer {
            Ok(placed) => {
                tally.acknowledged.insert(key, placed.into_inner().order.unwrap().order_id);
                tally.last_success = Some(Instant::now());
            }
            Err(status) => {
                assert_eq!(status.code(), Code::Unavailable, "{status:?}");
                tally.unavailable.push(key);
            }
        }
    }
}

fn place(key: &str) -> PlaceRequest {
    PlaceRequest { product_id: "book".into(), quantity: Some(1), idempotency_key: key.into() }
}

/// The service under load through an outage; `begin` and `end` are what happens to the server. Returns
/// how many calls were told UNAVAILABLE.
async fn survives(
    length: Duration,
    begin: impl AsyncFnOnce(&PostgresServer),
    end: impl FnOnce(&PostgresServer),
) -> usize {
    let server = PostgresServer::start().await;
    let service = Process::start(&server.url(), &["--request-timeout", "2s"]).await;
    let load = Load::start(&service, 64).await;
    scrape_until(service.admin, |page| page.value("product_order_total", &[]) > 200.0).await;

    begin(&server).await;
    scrape_until(service.admin, |page| page.sum("order_store_errors_total", &[]) > 0.0).await;
    let (status, body) = readyz(&service).await;
    assert_eq!(status, 200, "{body}: the others' pods fail alike");
    // The outage's length.
    sleep(length).await;
    end(&server);
    let recovery = load.succeeds_again().await;

    // A while of ordinary service, in which the writers resolve what was unknown.
    let before = service.scrape().await.value("product_order_total", &[]);
    scrape_until(service.admin, |page| page.value("product_order_total", &[]) > before + 300.0)
        .await;
    let Tally { mut acknowledged, unavailable, slowest, .. } = load.stop().await;
    let (answered, failed) = (acknowledged.len(), unavailable.len());

    // Who was told UNAVAILABLE tries again with the same key, as the README says.
    let mut grpc = service.grpc().await;
    let mut stored_before = 0;
    for key in unavailable {
        let placed = grpc.place(place(&key)).await.unwrap().into_inner();
        stored_before += usize::from(placed.replayed);
        acknowledged.insert(key, placed.order.unwrap().order_id);
    }
    let rows: Vec<(String, String)> =
        sqlx::query_as("SELECT idempotency_key, CAST(id AS TEXT) FROM orders")
            .fetch_all(&mut server.connect().await)
            .await
            .unwrap();
    println!(
        "{answered} acknowledged, {failed} UNAVAILABLE (of which {stored_before} stored), {} rows; \
         slowest answer {slowest:?}; back after {recovery:?}",
        rows.len()
    );
    assert_eq!(rows.len(), acknowledged.len());
    assert_eq!(rows.into_iter().collect::<HashMap<_, _>>(), acknowledged);
    assert!(recovery <= RECOVERY, "{recovery:?}");

    let page = service.scrape().await;
    assert_eq!(page.value("product_order_total", &[]), acknowledged.len() as f64);
    assert!(page.sum("order_store_errors_total", &[]) > 0.0);
    assert_eq!(readyz(&service).await, (200, "ok\n".to_owned()));
    // Told once, not by every call.
    let lines: Vec<_> =
        service.log().into_iter().filter(|line| line["message"] != "serving").collect();
    let told: Vec<_> = lines.iter().map(|line| line["message"].as_str().unwrap()).collect();
    let once = ["the store fails; it is tried again until it answers", "the store answers again"];
    assert_eq!(told, once, "{lines:?}");
    assert!(!format!("{lines:?}").contains(crate::postgres::PASSWORD));
    failed
}

async fn readyz(service: &Process) -> (u16, String) {
    let answer = reqwest::get(format!("http://{}/readyz", service.admin)).await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_server_that_crashes_and_comes_back_loses_and_doubles_nothing() {
    survives(Duration::from_secs(5), async |server| server.stop_immediately(), PostgresServer::run)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_server_whose_processes_freeze_loses_and_doubles_nothing() {
    let frozen = Mutex::new(Vec::new());
    survives(
        Duration::from_secs(7),
        async |server| {
            let backends = server.backends().await;
            for pid in &backends {
                kill_process(*pid, Signal::STOP).unwrap();
            }
            *frozen.lock().unwrap() = backends;
        },
        |_| {
            for pid in frozen.lock().unwrap().iter() {
                // One that noticed meanwhile that its client is gone may have ended.
                let _ = kill_process(*pid, Signal::CONT);
            }
        },
    )
    .await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_server_without_a_connection_left_is_an_outage_that_says_so() {
    let mut server = PostgresServer::make();
    server.set(&["max_connections=8"]);
    server.run();
    let service = Process::start(&server.url(), &["--request-timeout", "2s"]).await;
    let mut hogged = server.hog().await;
    let mut grpc = service.grpc().await;
    assert_eq!(grpc.place(place("k")).await.unwrap_err().code(), Code::Unavailable);
    let (status, body) = readyz(&service).await;
    assert!(status == 200 && body.contains("too many clients"), "{status} {body}");
    let failed = service.scrape().await;
    assert!(failed.value("order_store_errors_total", &["kind=\"unavailable\""]) > 0.0);

    // With a single one it serves.
    drop(hogged.pop());
    let placed = async {
        while let Err(status) = grpc.place(place("k")).await {
            assert_eq!(status.code(), Code::Unavailable);
        }
    };
    timeout(PATIENCE, placed).await.expect("one connection is enough");
    assert_eq!(service.scrape().await.value("product_order_total", &[]), 1.0);
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn reads_tell_of_an_outage_and_do_not_fail_after_a_restart() {
    let server = PostgresServer::start().await;
    let service = Process::start(&server.url(), &[]).await;
    let read = async || reqwest::get(service.url("/orders")).await.unwrap().status().as_u16();
    assert_eq!(read().await, 200);
    server.stop_immediately();
    server.run();
    assert_eq!(read().await, 200, "the idle connections are broken, and nobody is told");

    server.stop_immediately();
    assert_eq!(read().await, 503);
    let (status, body) = readyz(&service).await;
    assert_eq!(status, 200);
    assert!(body.starts_with("ok, but the store fails: "), "{body}");
    server.run();
    assert_eq!(read().await, 200);
    // At once, or after a probe if one has failed meanwhile.
    let ok = async { while readyz(&service).await.1 != "ok\n" {} };
    timeout(PATIENCE, ok).await.expect("the outage is over");
}

/// No call of the service holds a row for longer than its statement; another program may.
#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_key_that_another_transaction_holds_keeps_one_writer_and_the_other_serves() {
    let server = PostgresServer::start().await;
    let opened = Opened::new(&server.url()).await.unwrap();
    let mut other = server.connect().await;
    other
        .execute("BEGIN; INSERT INTO orders VALUES (gen_random_uuid(), 'book', 1, 'held', 0)")
        .await
        .unwrap();
    let soon = Instant::now() + Duration::from_secs(3);
    let held = taken(&opened, new("book", Some("held")), soon).await;
    for _ in 0..50 {
        opened.store.place(new("book", None), later()).await.unwrap();
    }
    assert_eq!(held.await.unwrap(), Err(StoreError::Unavailable));
    assert_eq!(opened.placed(), 50);
    other.execute("ROLLBACK").await.unwrap();
    until(|| opened.placed() == 51).await;
    assert_eq!(opened.all().await.len(), 51);
    opened.close().await;
}
