//! 1 000 callers who read at the same time, more than the store can answer: they are shed, in the
//! words of each protocol, nobody is told of an outage, and orders are placed all the same.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use order_service::proto::{
    GetRequest, ListRequest, PlaceRequest, order_service_client::OrderServiceClient,
};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _};
use tokio::{
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic_types::StatusExt as _;

use crate::{
    postgres::PostgresServer,
    slow_reads::slow_on_postgres,
    support::{PATIENCE, Process, database_in, scrape_until},
};

/// A table without an index, so that every read goes through all of its rows.
const SLOW_ON_SQLITE: &str = "ALTER TABLE orders RENAME TO kept; \
    CREATE TABLE orders (id BLOB, product_id TEXT NOT NULL, quantity INTEGER NOT NULL, \
    idempotency_key TEXT, placed_at INTEGER NOT NULL); \
    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000) \
    INSERT INTO orders SELECT zeroblob(16), 'book', 1, NULL, 0 FROM n; \
    INSERT INTO orders SELECT * FROM kept";

/// Callers of each protocol at the same time.
const CALLERS: usize = 500;

/// How many calls were answered in which way, by protocol.
type Answers = BTreeMap<(&'static str, String), usize>;

/// What all callers share.
#[derive(Clone, Default)]
struct Calls {
    answers: Arc<Mutex<Answers>>,
    over: CancellationToken,
}

impl Calls {
    fn count(&self, protocol: &'static str, how: String) {
        *self.answers.lock().unwrap().entry((protocol, how)).or_default() += 1;
    }

    /// A caller who was refused comes back later, as it was told to; so much later that the machine
    /// of the test has time for those in line.
    async fn pause(&self, advised: Option<Duration>) {
        let pause = advised.unwrap_or_default() + Duration::from_secs(2);
        let _ = timeout(pause, self.over.cancelled()).await;
    }

    async fn read_http(self, http: reqwest::Client, url: String) {
        while !self.over.is_cancelled() {
            let response = http.get(&url).send().await.unwrap();
            let (status, headers) = (response.status(), response.headers().clone());
            let body = response.text().await.unwrap();
            if status == 200 {
                self.count("http", "200".to_owned());
                continue;
            }
            let problem: serde_json::Value = serde_json::from_str(&body).unwrap();
            let advice = headers.get("retry-after").map(|after| after.to_str().unwrap());
            let told = advice.is_some();
            self.count("http", format!("{} {}, {told}", status.as_u16(), problem["detail"]));
            self.pause(advice.map(|after| Duration::from_secs(after.parse().unwrap()))).await;
        }
    }

    async fn read_grpc(self, mut grpc: OrderServiceClient<Channel>, get: Option<String>) {
        while !self.over.is_cancelled() {
            let read = match get.clone() {
                Some(order_id) => grpc.get(GetRequest { order_id }).await.map(drop),
                None => {
                    let request = ListRequest { page_size: 1, ..Default::default() };
                    grpc.list(request).await.map(drop)
                }
            };
            let Err(status) = read else {
                self.count("grpc", "Ok".to_owned());
                continue;
            };
            let advice = status.get_details_retry_info().and_then(|info| info.retry_delay);
            let told = advice.is_some();
            self.count("grpc", format!("{:?} {:?}, {told}", status.code(), status.message()));
            self.pause(advice).await;
        }
    }
}

/// Each takes all of a machine that shares its cores with other tests.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// 1 000 callers who read over both protocols until some of each were answered and some refused,
/// while orders are placed; the service's word on all that must be theirs.
async fn a_thousand_readers(server: &Process, id: &str) {
    let _alone = ONE_AT_A_TIME.lock().await;
    rlimit::increase_nofile_limit(8192).unwrap();
    let before = server.scrape().await;
    // Answered, or refused for overload with advice when to retry.
    let busy = "\"too many reads are waiting; nothing was done, try again later\", true";
    let ways = [
        ("grpc", "Ok".to_owned()),
        ("grpc", format!("ResourceExhausted {busy}")),
        ("http", "200".to_owned()),
        ("http", format!("503 {busy}")),
    ];
    let calls = Calls::default();
    let mut callers: JoinSet<()> = JoinSet::new();
    let http = reqwest::Client::new();
    for caller in 0..CALLERS {
        let path =
            if caller % 2 == 0 { format!("/orders/{id}") } else { "/orders?page_size=1".into() };
        callers.spawn(calls.clone().read_http(http.clone(), server.url(&path)));
    }
    for connection in 0..10 {
        let grpc = server.grpc().await;
        let get = (connection % 2 == 0).then(|| id.to_owned());
        for _ in 0..CALLERS / 10 {
            callers.spawn(calls.clone().read_grpc(grpc.clone(), get.clone()));
        }
    }

    let mut grpc = server.grpc().await;
    let mut placed = 0.0;
    let begun = Instant::now();
    loop {
        let order = PlaceRequest { product_id: "book".into(), ..Default::default() };
        grpc.place(order).await.unwrap();
        placed += 1.0;
        let readyz = reqwest::get(format!("http://{}/readyz", server.admin)).await.unwrap();
        assert_eq!((readyz.status().as_u16(), readyz.text().await.unwrap()), (200, "ok\n".into()));
        let answers = calls.answers.lock().unwrap();
        assert!(begun.elapsed() < PATIENCE, "{answers:?}");
        let often = |way: &_| answers.get(way).is_some_and(|number| *number >= 10);
        if ways.iter().all(often) && placed >= 10.0 {
            break;
        }
    }
    calls.over.cancel();
    while let Some(caller) = callers.join_next().await {
        caller.unwrap();
    }

    let answers = std::mem::take(&mut *calls.answers.lock().unwrap());
    println!("{placed} orders placed; {answers:?}");
    assert!(answers.keys().eq(&ways), "{answers:?}");
    let page = scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 0.0).await;
    let more = |name: &str, labels: &[&str]| page.sum(name, labels) - before.sum(name, labels);
    let calls_of = |code: &str| {
        ["Get", "List"].map(|method| {
            let labels = [format!("grpc_method=\"{method}\""), format!("grpc_code=\"{code}\"")];
            more("grpc_server_handled_total", &[&labels[0], &labels[1]])
        })
    };
    let sum = |calls: [f64; 2]| calls[0] + calls[1];
    let requests = |code| more("http_requests_total_with_path", &[code]);
    let recorded = [
        sum(calls_of("OK")),
        sum(calls_of("ResourceExhausted")),
        requests("code=\"200\""),
        requests("code=\"503\""),
    ];
    assert_eq!(recorded.to_vec(), answers.values().map(|n| *n as f64).collect::<Vec<_>>());
    for (protocol, refused) in [("protocol=\"grpc\"", 1), ("protocol=\"http\"", 3)] {
        let busy = ["reason=\"readers_busy\"", protocol];
        assert_eq!(more("requests_shed_total", &busy), recorded[refused]);
        assert_eq!(more("requests_shed_total", &[protocol]), recorded[refused]);
    }
    assert_eq!(more("product_order_total", &[]), placed);
    assert_eq!(more("order_store_errors_total", &[]), 0.0);
    // No outage began, and none ended.
    assert_eq!(server.log().len(), 1, "{:?}", server.log());
}

/// The id of an order that is placed.
async fn placed(server: &Process) -> String {
    let order = PlaceRequest { product_id: "book".into(), ..Default::default() };
    let placed = server.grpc().await.place(order).await.unwrap().into_inner();
    placed.order.unwrap().order_id
}

/// Beyond the thousand there is room for those who place orders.
const ROOM: [&str; 2] = ["--max-in-flight", "4096"];

async fn a_thousand_readers_of_postgres(pool: &str) {
    let postgres = PostgresServer::start().await;
    let args = [&ROOM[..], &["--database-pool", pool]].concat();
    let server = Process::start(&postgres.url(), &args).await;
    let id = placed(&server).await;
    postgres.connect().await.execute(AssertSqlSafe(slow_on_postgres(0.02))).await.unwrap();
    a_thousand_readers(&server, &id).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_thousand_readers_of_postgres_are_shed_and_orders_go_on() {
    a_thousand_readers_of_postgres("4").await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_thousand_readers_who_share_one_connection_with_the_writers_are_shed_and_orders_go_on() {
    a_thousand_readers_of_postgres("1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_readers_of_sqlite_are_shed_and_orders_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::start_in(dir.path(), &ROOM).await;
    let id = placed(&server).await;
    let mut connection = sqlx::SqliteConnection::connect(&database_in(dir.path())).await.unwrap();
    connection.execute(SLOW_ON_SQLITE).await.unwrap();
    connection.close().await.unwrap();
    a_thousand_readers(&server, &id).await;
}
