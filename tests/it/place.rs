//! Placing orders and reading them back, over both protocols.

use std::collections::HashSet;

use order_service::proto::{GetRequest, ListRequest, Order, PlaceRequest};
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tonic::Code;
use uuid::Uuid;

use crate::support::{Process, channel};

fn place(product: &str, quantity: Option<u32>, key: &str) -> PlaceRequest {
    PlaceRequest { product_id: product.into(), quantity, idempotency_key: key.into() }
}

#[tokio::test]
async fn an_order_placed_over_grpc_is_read_over_both_protocols() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut grpc = server.grpc().await;
    let placed = grpc.place(place("book", None, "")).await.unwrap().into_inner();
    let order = placed.order.unwrap();
    assert!(!placed.replayed);
    assert_eq!((order.product_id.as_str(), order.quantity), ("book", 1));
    let id: Uuid = order.order_id.parse().unwrap();
    assert_eq!((id.get_version_num(), id.to_string()), (7, order.order_id.clone()));

    let request = GetRequest { order_id: order.order_id.clone() };
    assert_eq!(grpc.get(request).await.unwrap().into_inner().order.as_ref(), Some(&order));

    let url = server.url(&format!("/orders/{}", order.order_id));
    let response = reqwest::get(url).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "application/json");
    let json: Value = response.json().await.unwrap();
    assert_eq!((&json["order_id"], &json["quantity"]), (&json!(order.order_id), &json!(1)));
    let placed_at: prost_types::Timestamp = json["placed_at"].as_str().unwrap().parse().unwrap();
    assert_eq!(order.placed_at, Some(placed_at));
    assert!(json["placed_at"].as_str().unwrap().ends_with('Z'));
}

#[tokio::test]
async fn get_product_places_an_order() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let response = reqwest::get(server.url("/product")).await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/plain"));
    assert_eq!(response.headers()["cache-control"], "no-store");
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    assert_eq!(response.text().await.unwrap(), "Order placed!");
    let order: Value = reqwest::get(server.url(&location)).await.unwrap().json().await.unwrap();
    assert_eq!((&order["product_id"], &order["quantity"]), (&json!("book"), &json!(1)));

    let response = reqwest::get(server.url("/product?product_id=pen&quantity=3&colour=red")).await;
    let location = response.unwrap().headers()["location"].to_str().unwrap().to_owned();
    let order: Value = reqwest::get(server.url(&location)).await.unwrap().json().await.unwrap();
    assert_eq!((&order["product_id"], &order["quantity"]), (&json!("pen"), &json!(3)));
}

#[tokio::test]
async fn post_product_returns_the_order_and_replays_it() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let send = |body: Value| {
        let request = Client::new().post(server.url("/product")).header("idempotency-key", "k1");
        request.json(&body).send()
    };
    let first = send(json!({"product_id": "book", "quantity": 2, "unknown": [1]})).await.unwrap();
    assert_eq!(first.status(), StatusCode::CREATED);
    assert!(!first.headers().contains_key("idempotency-replayed"));
    let location = first.headers()["location"].to_str().unwrap().to_owned();
    let order: Value = first.json().await.unwrap();
    assert_eq!(location, format!("/orders/{}", order["order_id"].as_str().unwrap()));

    let again = send(json!({"product_id": "book", "quantity": 2})).await.unwrap();
    assert_eq!(again.status(), StatusCode::OK);
    assert_eq!(again.headers()["idempotency-replayed"], "true");
    assert_eq!(again.headers()["location"], location.as_str());
    assert_eq!(again.json::<Value>().await.unwrap(), order);

    // The same key on the other routes and the other protocol is the same key.
    let request = Client::new().get(server.url("/product?quantity=2"));
    let shim = request.header("idempotency-key", "k1").send().await.unwrap();
    assert_eq!(
        (shim.status().as_u16(), &shim.headers()["idempotency-replayed"]),
        (200, &"true".parse().unwrap())
    );
    let placed =
        server.grpc().await.place(place("book", Some(2), "k1")).await.unwrap().into_inner();
    assert!(placed.replayed);
    assert_eq!(json!(placed.order.unwrap().order_id), order["order_id"]);
    assert_eq!(server.scrape().await.value("product_order_total", &[]), 1.0);
}

#[tokio::test]
async fn a_key_with_another_order_is_refused() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut grpc = server.grpc().await;
    grpc.place(place("book", Some(2), "k")).await.unwrap();
    for other in [place("pen", Some(2), "k"), place("book", Some(3), "k"), place("book", None, "k")]
    {
        let status = grpc.place(other).await.unwrap_err();
        assert_eq!(status.code(), Code::AlreadyExists);
    }
    assert_eq!(server.scrape().await.value("product_order_total", &[]), 1.0);
}

#[tokio::test]
async fn of_64_concurrent_calls_with_one_key_one_places_an_order() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::start_in(dir.path(), &[]).await;
    let mut calls = JoinSet::new();
    for _ in 0..64 {
        let mut grpc = server.grpc().await;
        calls.spawn(
            async move { grpc.place(place("book", None, "one")).await.unwrap().into_inner() },
        );
    }
    let placed = calls.join_all().await;
    let ids: HashSet<_> =
        placed.iter().map(|p| p.order.as_ref().unwrap().order_id.clone()).collect();
    assert_eq!(ids.len(), 1);
    assert_eq!(placed.iter().filter(|placed| !placed.replayed).count(), 1);
    assert_eq!(server.scrape().await.value("product_order_total", &[]), 1.0);
}

#[tokio::test]
async fn pages_are_newest_first_and_stable_while_orders_arrive() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut grpc = server.grpc().await;
    let mut placed = Vec::new();
    for i in 0..25 {
        let order = grpc.place(place(&format!("p{i}"), None, "")).await.unwrap().into_inner().order;
        placed.push(order.unwrap());
    }
    placed.reverse();

    let mut listed: Vec<Order> = Vec::new();
    let mut page_token = String::new();
    let mut sizes = Vec::new();
    loop {
        let page = grpc.list(ListRequest { page_size: 10, page_token }).await.unwrap().into_inner();
        sizes.push(page.orders.len());
        listed.extend(page.orders);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
        grpc.place(place("late", None, "")).await.unwrap();
    }
    assert_eq!(sizes, [10, 10, 5]);
    assert_eq!(listed, placed);

    let url = server.url("/orders?page_size=2");
    let page: Value = reqwest::get(url).await.unwrap().json().await.unwrap();
    assert_eq!(page["orders"].as_array().unwrap().len(), 2);
    assert_eq!(page["orders"][0]["product_id"], "late");
    let token = page["next_page_token"].as_str().unwrap();
    let url = server.url(&format!("/orders?page_size=1000&page_token={token}"));
    let page: Value = reqwest::get(url).await.unwrap().json().await.unwrap();
    assert_eq!(page["orders"].as_array().unwrap().len(), 25);
    assert_eq!(page["next_page_token"], "");
}

#[tokio::test]
async fn a_page_holds_50_by_default_and_1000_at_most() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut calls = JoinSet::new();
    let grpc = server.grpc().await;
    for _ in 0..1001 {
        let mut grpc = grpc.clone();
        calls.spawn(async move { grpc.place(place("book", None, "")).await.unwrap() });
    }
    calls.join_all().await;
    let mut grpc = grpc.clone();
    for (page_size, expected) in [(0, 50), (1, 1), (1000, 1000), (1001, 1000), (i32::MAX, 1000)] {
        let list = ListRequest { page_size, page_token: String::new() };
        let page = grpc.list(list).await.unwrap().into_inner();
        assert_eq!(page.orders.len(), expected);
        assert!(!page.next_page_token.is_empty());
    }
}

#[tokio::test]
async fn both_protocols_and_both_http_versions_share_the_port() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let prior = Client::builder().http2_prior_knowledge().build().unwrap();
    let response = prior.get(server.url("/product")).send().await.unwrap();
    assert_eq!(response.version(), reqwest::Version::HTTP_2);
    assert_eq!(response.text().await.unwrap(), "Order placed!");
    let response = reqwest::get(server.url("/product")).await.unwrap();
    assert_eq!(response.version(), reqwest::Version::HTTP_11);
}

#[tokio::test]
async fn every_response_names_its_request_and_its_process() {
    let server = Process::start_command("sqlite::memory:", &[], |command| {
        command.env("HOSTNAME", "pod-7");
    })
    .await;
    let served_by = format!("pod-7:{}", server.id());
    let client = Client::new();
    for path in ["/product", "/orders/x", "/nowhere"] {
        let response = client.get(server.url(path)).header("x-request-id", "mine").send().await;
        let headers = response.unwrap().headers().clone();
        assert_eq!(
            (&headers["x-request-id"], &headers["x-served-by"]),
            (&"mine".parse().unwrap(), &served_by.parse().unwrap())
        );
    }
    let one =
        client.get(server.url("/product")).send().await.unwrap().headers()["x-request-id"].clone();
    let two =
        client.get(server.url("/product")).send().await.unwrap().headers()["x-request-id"].clone();
    assert!(!one.is_empty() && one != two);

    let mut grpc = server.grpc().await;
    let metadata = grpc.place(place("book", None, "")).await.unwrap().metadata().clone();
    assert_eq!(metadata.get("x-served-by").unwrap().to_str().unwrap(), served_by);
    assert!(metadata.contains_key("x-request-id"));
    let status = grpc.place(place("", None, "")).await.unwrap_err();
    assert_eq!(status.metadata().get("x-served-by").unwrap().to_str().unwrap(), served_by);
}

#[tokio::test]
async fn many_connections_are_served_at_once() {
    let server = Process::start("sqlite::memory:", &["--processing-delay", "50ms"]).await;
    let mut calls = JoinSet::new();
    for _ in 0..50 {
        let mut grpc = order_service::proto::order_service_client::OrderServiceClient::new(
            channel(server.api).await,
        );
        calls.spawn(async move { grpc.place(place("book", None, "")).await.unwrap() });
    }
    calls.join_all().await;
    assert_eq!(server.scrape().await.value("product_order_total", &[]), 50.0);
}
