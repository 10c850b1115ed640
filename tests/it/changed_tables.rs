//! What others do to the table while the service runs: a changed column and a row that is no order
//! harm no other call.

use std::collections::HashSet;

use order_service::proto::{ListRequest, Order, PlaceRequest};
use sqlx::{AssertSqlSafe, Executor as _};
use tokio::task::JoinSet;
use tonic::Code;

use crate::{
    database::Database,
    postgres::PostgresServer,
    support::{Page, Process, scrape_until},
};

fn place(key: &str) -> PlaceRequest {
    PlaceRequest { product_id: "book".into(), quantity: Some(1), idempotency_key: key.into() }
}

fn other_errors(page: &Page) -> f64 {
    page.value("order_store_errors_total", &["kind=\"other\""])
}

/// Reads and replays at once, over each connection that there is.
async fn use_every_statement(service: &Process, order_id: &str) {
    let mut calls = JoinSet::new();
    for _ in 0..20 {
        let (list, get) = (service.url("/orders"), service.url(&format!("/orders/{order_id}")));
        calls.spawn(async move {
            for url in [list, get] {
                let answer = reqwest::get(&url).await.unwrap();
                assert_eq!(answer.status(), 200, "{url}: {:?}", answer.text().await);
            }
        });
        let mut grpc = service.grpc().await;
        calls.spawn(async move {
            assert!(grpc.place(place("k")).await.unwrap().into_inner().replayed);
        });
    }
    calls.join_all().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_column_that_gets_another_type_fails_no_call() {
    let server = PostgresServer::start().await;
    let service = Process::start(&server.url(), &["--max-connection-age", "0s"]).await;
    let placed = service.grpc().await.place(place("k")).await.unwrap().into_inner();
    let id = placed.order.unwrap().order_id;
    use_every_statement(&service, &id).await;
    for (change, expected) in [
        ("ALTER TABLE orders ALTER product_id TYPE VARCHAR(64)", 1.0),
        ("ALTER TABLE orders ALTER quantity TYPE INT8", 2.0),
    ] {
        server.connect().await.execute(change).await.unwrap();
        use_every_statement(&service, &id).await;
        let counted = other_errors(&service.scrape().await);
        assert!(counted >= expected, "{change}: {counted}");
    }
    service.grpc().await.place(place("new")).await.unwrap();
    let page = service.scrape().await;
    assert_eq!(page.value("product_order_total", &[]), 2.0);
    assert_eq!(page.value("order_store_up", &[]), 1.0);
}

/// As behind a pooler that gives a connection another server process: its prepared statements are
/// gone.
#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_prepared_statement_that_is_gone_fails_no_call() {
    let server = PostgresServer::start().await;
    let service = Process::start(&server.url(), &[]).await;
    let forget = "CREATE FUNCTION forget() RETURNS trigger LANGUAGE plpgsql AS \
                  $$ BEGIN EXECUTE 'DEALLOCATE ALL'; RETURN NULL; END $$; \
                  CREATE TRIGGER forget AFTER INSERT ON orders \
                  FOR EACH STATEMENT EXECUTE FUNCTION forget();";
    server.connect().await.execute(forget).await.unwrap();
    let mut grpc = service.grpc().await;
    for i in 0..10 {
        let placed = grpc.place(place(&format!("k{i}"))).await.unwrap().into_inner();
        assert!(!placed.replayed);
        let again = grpc.place(place(&format!("k{i}"))).await.unwrap().into_inner();
        assert!(again.replayed);
        assert_eq!(reqwest::get(service.url("/orders")).await.unwrap().status(), 200);
    }
    let page = service.scrape().await;
    assert!(other_errors(&page) >= 10.0, "{}", other_errors(&page));
    assert_eq!(page.value("product_order_total", &[]), 10.0);
}

/// All pages, of two orders each.
async fn pages(service: &Process) -> Vec<Order> {
    let (mut grpc, mut orders, mut page_token) = (service.grpc().await, Vec::new(), String::new());
    loop {
        let request = ListRequest { page_size: 2, page_token };
        let page = grpc.list(request).await.unwrap().into_inner();
        orders.extend(page.orders);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return orders;
        }
    }
}

async fn rows_that_are_no_orders_are_left_out(database: Database, spoil: &[&str]) {
    let service = Process::start(&database.url(), &[]).await;
    let mut grpc = service.grpc().await;
    let mut connection = database.connect().await;
    let (mut spoilt, mut sound) = (Vec::new(), Vec::new());
    // The newest and the oldest, and two that make a page, are no orders.
    let at = [0, 3, 4, 9];
    for i in 0..10 {
        let placed = grpc.place(place(&format!("k{i}"))).await.unwrap().into_inner();
        let id = placed.order.unwrap().order_id;
        match at.iter().position(|spoilt| *spoilt == i) {
            Some(n) => {
                let update = format!(
                    "UPDATE orders SET {} WHERE idempotency_key = 'k{i}'",
                    spoil[n % spoil.len()]
                );
                connection.execute(AssertSqlSafe(update)).await.unwrap();
                spoilt.push(id);
            }
            None => sound.push(id),
        }
    }
    sound.reverse();
    for _ in 0..3 {
        let listed: Vec<_> = pages(&service).await.into_iter().map(|o| o.order_id).collect();
        assert_eq!(listed, sound);
    }
    let page = scrape_until(service.admin, |page| other_errors(page) >= 4.0).await;
    assert_eq!(other_errors(&page), 4.0, "each once");
    let lines: Vec<_> = service.log().iter().map(ToString::to_string).collect();
    for id in &spoilt {
        let told = lines.iter().filter(|line| line.contains(id.as_str())).count();
        assert_eq!(told, 1, "{id}: {lines:?}");
    }
    let refused = grpc
        .get(order_service::proto::GetRequest { order_id: spoilt[0].clone() })
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Internal);
    assert_eq!(sound.iter().collect::<HashSet<_>>().len(), 6);
}

#[tokio::test]
async fn sqlite_rows_that_are_no_orders_are_left_out_of_their_pages() {
    let spoil = [
        "quantity = 0",
        "placed_at = -1",
        "product_id = CAST(x'ff' AS TEXT)",
        "placed_at = 1 << 60",
    ];
    rows_that_are_no_orders_are_left_out(Database::file(), &spoil).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn postgres_rows_that_are_no_orders_are_left_out_of_their_pages() {
    let spoil =
        ["quantity = 10001", "placed_at = -1", "product_id = 'a b'", "placed_at = 1::INT8 << 60"];
    rows_that_are_no_orders_are_left_out(Database::postgres().await, &spoil).await;
}
