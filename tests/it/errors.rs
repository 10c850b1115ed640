//! Every row of the error table, over both protocols.

use std::time::Duration;

use order_service::proto::{GetRequest, ListRequest, PlaceRequest, PlaceResponse};
use reqwest::{Client, Method, Response};
use serde_json::{Value, json};
use sqlx::{Connection as _, SqliteConnection};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};
use tonic::{Code, Request, Status, transport::Channel};
use tonic_prost::ProstCodec;
use tonic_types::StatusExt as _;

use crate::{
    database::lock_file_in,
    logs::TRACE,
    support::{Process, channel, database_in, framed, scrape_until},
};

fn place(product: &str, quantity: Option<u32>, key: &str) -> PlaceRequest {
    PlaceRequest { product_id: product.into(), quantity, idempotency_key: key.into() }
}

/// Checks that a response is a problem of this status, and returns it.
async fn problem(response: Response, status: u16) -> Value {
    assert_eq!(response.status(), status);
    assert_eq!(response.headers()["content-type"], "application/problem+json");
    for header in ["x-request-id", "x-served-by"] {
        assert!(response.headers().contains_key(header), "{header}");
    }
    let problem: Value = response.json().await.unwrap();
    assert_eq!(problem["status"], status);
    for member in ["type", "title", "detail"] {
        assert!(problem[member].as_str().is_some_and(|text| !text.is_empty()), "{problem}");
    }
    problem
}

fn fields(problem: &Value) -> Vec<&str> {
    problem["errors"].as_array().unwrap().iter().map(|e| e["field"].as_str().unwrap()).collect()
}

async fn post(server: &Process, body: impl Into<reqwest::Body>) -> Response {
    let request = Client::new().post(server.url("/product"));
    request.header("content-type", "application/json").body(body).send().await.unwrap()
}

#[tokio::test]
async fn every_bad_field_is_named() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let long = "k".repeat(256);

    let status = server.grpc().await.place(place("a b", Some(0), &long)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let details = status.get_error_details();
    let violations = &details.bad_request().unwrap().field_violations;
    let named: Vec<_> = violations.iter().map(|violation| violation.field.as_str()).collect();
    assert_eq!(named, ["product_id", "quantity", "idempotency_key"]);
    assert!(violations[0].description.contains("\"a b\""), "{violations:?}");
    assert!(violations[1].description.contains("from 1 to 10000"), "{violations:?}");

    let body = json!({"product_id": "a b", "quantity": 10_001}).to_string();
    let request = Client::new().post(server.url("/product")).header("idempotency-key", &long);
    let request = request.header("content-type", "application/json; charset=utf-8").body(body);
    let problem = problem(request.send().await.unwrap(), 422).await;
    assert_eq!(fields(&problem), ["product_id", "quantity", "idempotency_key"]);
    assert_eq!(server.scrape().await.value("product_order_total", &[]), 0.0);
}

#[tokio::test]
async fn numbers_that_are_no_quantity_are_invalid_fields() {
    let server = Process::start("sqlite::memory:", &[]).await;
    for quantity in ["0", "-1", "10001", "1.5", "1e9", "99999999999999999999999"] {
        let body = format!(r#"{{"product_id":"book","quantity":{quantity}}}"#);
        let problem = problem(post(&server, body).await, 422).await;
        assert_eq!(fields(&problem), ["quantity"], "{quantity}");
    }
    for query in
        ["quantity=0", "quantity=two", "quantity=", "quantity=1.0", "product_id=", "product_id=%00"]
    {
        let response = reqwest::get(server.url(&format!("/product?{query}"))).await.unwrap();
        let problem = problem(response, 422).await;
        assert_eq!(fields(&problem), [query.split_once('=').unwrap().0], "{query}");
    }
    problem(post(&server, r#"{"quantity":1}"#).await, 422).await;
}

#[tokio::test]
async fn bad_pages_are_invalid_fields() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut grpc = server.grpc().await;
    let list = ListRequest { page_size: -1, page_token: "?".into() };
    let status = grpc.list(list).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let details = status.get_error_details();
    let named: Vec<_> =
        details.bad_request().unwrap().field_violations.iter().map(|v| v.field.clone()).collect();
    assert_eq!(named, ["page_size", "page_token"]);

    for query in ["page_size=-1", "page_size=ten", "page_token=x", "page_token=AAAA"] {
        let response = reqwest::get(server.url(&format!("/orders?{query}"))).await.unwrap();
        let problem = problem(response, 422).await;
        assert_eq!(fields(&problem), [query.split_once('=').unwrap().0]);
    }
}

#[tokio::test]
async fn malformed_json_and_wrong_types_are_400() {
    let server = Process::start("sqlite::memory:", &[]).await;
    for body in ["", "{", "[]", "7", r#"{"product_id":7}"#, r#"{"product_id":"a","quantity":"1"}"#]
    {
        problem(post(&server, body).await, 400).await;
    }
}

#[tokio::test]
async fn another_content_type_is_415() {
    let server = Process::start("sqlite::memory:", &[]).await;
    for content_type in ["text/plain", "application/x-www-form-urlencoded", "application/jsonx"] {
        let request =
            Client::new().post(server.url("/product")).header("content-type", content_type);
        problem(request.body("{\"product_id\":\"book\"}").send().await.unwrap(), 415).await;
    }
    let none = Client::new().post(server.url("/product")).body(Vec::new());
    problem(none.send().await.unwrap(), 415).await;
    // gRPC's paths in plain HTTP.
    let plain = Client::new().post(server.url("/orders.v1.OrderService/Place"));
    problem(plain.json(&json!({})).send().await.unwrap(), 415).await;
}

#[tokio::test]
async fn a_body_over_64_kib_is_413_and_the_answer_arrives() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let order = |length: usize| {
        let mut body = r#"{"product_id":"book","padding":""#.to_owned();
        body.push_str(&"x".repeat(length - body.len() - 2));
        body + "\"}"
    };
    assert_eq!(post(&server, order(65_536)).await.status(), 201);
    problem(post(&server, order(65_537)).await, 413).await;
    problem(post(&server, order(6_000_000)).await, 413).await;
    let chunks = (0..3000).map(|_| Ok::<_, std::io::Error>("x".repeat(1000)));
    let streamed = reqwest::Body::wrap_stream(tokio_stream::iter(chunks));
    problem(post(&server, streamed).await, 413).await;

    let big = place(&"x".repeat(70_000), None, "");
    let status = server.grpc().await.place(big).await.unwrap_err();
    assert!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status:?}");
}

#[tokio::test]
async fn a_client_that_asks_first_is_refused_before_it_sends() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut stream = TcpStream::connect(server.api).await.unwrap();
    let head = "POST /product HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                content-length: 9000000000\r\nexpect: 100-continue\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
}

#[tokio::test]
async fn a_reused_key_is_told_with_its_reason() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut grpc = server.grpc().await;
    grpc.place(place("book", None, "k")).await.unwrap();
    let status = grpc.place(place("pen", None, "k")).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    let details = status.get_error_details();
    assert_eq!(details.error_info().unwrap().reason, "IDEMPOTENCY_KEY_REUSED");

    let request = Client::new().post(server.url("/product")).header("idempotency-key", "k");
    let problem =
        problem(request.json(&json!({"product_id": "pen"})).send().await.unwrap(), 422).await;
    assert!(problem["type"].as_str().unwrap().contains("idempotency-key-reused"));
    assert!(problem.get("errors").is_none());
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut grpc = server.grpc().await;
    for id in ["", "x", "01890a5d-ac96-774b-bcce-b302099a8057"] {
        let status = grpc.get(GetRequest { order_id: id.into() }).await.unwrap_err();
        assert_eq!(status.code(), Code::NotFound, "{id}");
        if !id.is_empty() {
            let response = reqwest::get(server.url(&format!("/orders/{id}"))).await.unwrap();
            problem(response, 404).await;
        }
    }
    for path in [
        "/",
        "/nowhere",
        "/product/",
        "/orders/",
        "/orders/x/y",
        "/orders.v1.Other/Place",
        "/orders.v1.OrderService",
        "/orders.v1.OrderService/",
    ] {
        problem(reqwest::get(server.url(path)).await.unwrap(), 404).await;
    }
}

#[tokio::test]
async fn another_method_is_405_and_head_places_nothing() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let client = Client::new();
    for (method, path, allowed) in [
        (Method::HEAD, "/product", "GET, POST"),
        (Method::PUT, "/product", "GET, POST"),
        (Method::DELETE, "/orders/x", "GET, HEAD"),
        (Method::POST, "/orders", "GET, HEAD"),
    ] {
        let response = client.request(method.clone(), server.url(path)).send().await.unwrap();
        assert_eq!(response.headers()["allow"], allowed, "{method} {path}");
        if method == Method::HEAD {
            assert_eq!(response.status(), 405);
        } else {
            problem(response, 405).await;
        }
    }
    assert_eq!(client.head(server.url("/orders")).send().await.unwrap().status(), 200);
    assert_eq!(server.scrape().await.value("product_order_total", &[]), 0.0);
}

/// A unary call of any path, with `PlaceRequest` and `PlaceResponse`.
async fn call(channel: Channel, path: &'static str) -> Status {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let codec = ProstCodec::<PlaceRequest, PlaceResponse>::default();
    let path = http::uri::PathAndQuery::from_static(path);
    grpc.unary(Request::new(PlaceRequest::default()), path, codec).await.unwrap_err()
}

#[tokio::test]
async fn grpc_on_an_unknown_path_is_unimplemented() {
    let server = Process::start("sqlite::memory:", &[]).await;
    for path in ["/orders.v1.OrderService/Cancel", "/some.Stranger/Call", "/product", "/orders/x"] {
        let status = call(channel(server.api).await, path).await;
        assert_eq!(status.code(), Code::Unimplemented, "{path}: {status:?}");
    }
    assert_eq!(server.scrape().await.value("product_order_total", &[]), 0.0);
}

#[tokio::test]
async fn too_many_in_flight_are_shed_with_advice_to_retry() {
    let args = ["--max-in-flight", "1", "--processing-delay", "60s", "--request-timeout", "60s"];
    let server = Process::start("sqlite::memory:", &args).await;
    let mut grpc = server.grpc().await;
    let mut holding = server.grpc().await;
    let held = tokio::spawn(async move { holding.place(place("book", None, "")).await });
    scrape_until(server.admin, |page| {
        page.value("requests_in_flight", &["protocol=\"grpc\""]) == 1.0
    })
    .await;

    let status = grpc.place(place("book", None, "")).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    let delay = status.get_error_details().retry_info().unwrap().retry_delay.unwrap();
    assert!(delay > Duration::ZERO && delay < Duration::from_secs(5), "{delay:?}");
    let response = reqwest::get(server.url("/product")).await.unwrap();
    let seconds: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..5).contains(&seconds));
    problem(response, 503).await;
    let http2 = Client::builder().http2_prior_knowledge().build().unwrap();
    for client in [Client::new(), http2] {
        let response = client.head(server.url("/orders")).send().await.unwrap();
        assert_eq!(
            (response.status(), response.bytes().await.unwrap().len()),
            (503.try_into().unwrap(), 0)
        );
    }
    // Health is never shed.
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel(server.api).await);
    health.check(tonic_health::pb::HealthCheckRequest::default()).await.unwrap();

    held.abort();
    let page = scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 0.0).await;
    for (protocol, shed) in [("protocol=\"grpc\"", 1.0), ("protocol=\"http\"", 3.0)] {
        assert_eq!(page.value("requests_shed_total", &[protocol, "reason=\"in_flight\""]), shed);
    }
    assert_eq!(page.value("product_order_total", &[]), 0.0);
}

#[tokio::test]
async fn a_full_queue_sheds_too() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["--max-in-flight", "20000", "--request-timeout", "60s"];
    let server = Process::start_in(dir.path(), &args).await;
    let locked = lock_file_in(dir.path()).await;
    // One batch is with the writer, 4096 wait.
    let mut calls = JoinSet::new();
    for _ in 0..24 {
        let grpc = server.grpc().await;
        for _ in 0..250 {
            let mut grpc = grpc.clone();
            calls.spawn(async move { grpc.place(place("book", None, "")).await });
        }
    }
    let full = ["reason=\"queue_full\"", "protocol=\"grpc\""];
    scrape_until(server.admin, |page| page.value("requests_shed_total", &full) > 0.0).await;
    let response = reqwest::get(server.url("/product")).await.unwrap();
    assert!(response.headers().contains_key("retry-after"));
    problem(response, 503).await;
    locked.close().await.unwrap();

    let results = calls.join_all().await;
    let placed = results.iter().filter(|result| result.is_ok()).count();
    let shed = results.iter().filter_map(|result| result.as_ref().err());
    for status in shed {
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    }
    let page = server.scrape().await;
    assert_eq!(page.value("product_order_total", &[]), placed as f64);
    // On a busy machine some are shed earlier: too many have not arrived whole.
    let shed = page.sum("requests_shed_total", &["protocol=\"grpc\""]);
    assert_eq!(shed, (results.len() - placed) as f64);
}

#[tokio::test]
async fn a_store_that_cannot_be_written_is_unavailable() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::start_in(dir.path(), &["--request-timeout", "1s"]).await;
    let mut grpc = server.grpc().await;
    let locked = lock_file_in(dir.path()).await;

    let status = grpc.place(place("book", None, "k")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.get_error_details().retry_info().is_some());
    let response = reqwest::get(server.url("/product")).await.unwrap();
    assert!(response.headers().contains_key("retry-after"));
    problem(response, 503).await;

    locked.close().await.unwrap();
    let placed = grpc.place(place("book", None, "k")).await.unwrap().into_inner();
    assert_eq!(placed.order.unwrap().product_id, "book");
}

#[tokio::test]
async fn a_deadline_that_passes_is_told_and_nothing_is_placed() {
    let args = ["--processing-delay", "30s", "--request-timeout", "100ms"];
    let server = Process::start("sqlite::memory:", &args).await;
    let status = server.grpc().await.place(place("book", None, "")).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    problem(reqwest::get(server.url("/product")).await.unwrap(), 504).await;

    let args = ["--processing-delay", "30s", "--request-timeout", "30s"];
    let server = Process::start("sqlite::memory:", &args).await;
    // A gRPC client would keep its timeout by itself; this one waits for the server's answer.
    let message = framed(&place("book", None, ""));
    let client = Client::builder().http2_prior_knowledge().build().unwrap();
    let request = client.post(server.url("/orders.v1.OrderService/Place")).body(message);
    let request = request.header("content-type", "application/grpc").header("grpc-timeout", "100m");
    let response = request.header("te", "trailers").send().await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "4");
    assert!(response.headers().contains_key("x-served-by"), "{response:?}");
    assert_eq!(server.scrape().await.value("product_order_total", &[]), 0.0);
}

#[tokio::test]
async fn a_failure_inside_is_logged_once_and_not_sent() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start_in(dir.path(), &[]).await;
    let mut connection = SqliteConnection::connect(&database_in(dir.path())).await.unwrap();
    let trigger = "CREATE TRIGGER poison BEFORE INSERT ON orders WHEN NEW.product_id = 'poison' \
                   BEGIN SELECT RAISE(ABORT, 'the secret cause'); END";
    sqlx::query(trigger).execute(&mut connection).await.unwrap();

    let mut grpc = server.grpc().await;
    let mut request = Request::new(place("poison", None, ""));
    request.metadata_mut().insert("x-request-id", "poisoned-1".parse().unwrap());
    request.metadata_mut().insert("traceparent", TRACE.parse().unwrap());
    let status = grpc.place(request).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    assert!(!format!("{status:?}").contains("secret"), "{status:?}");
    let response = reqwest::get(server.url("/product?product_id=poison")).await.unwrap();
    let problem = problem(response, 500).await;
    assert!(!problem.to_string().contains("secret"), "{problem}");
    grpc.place(place("book", None, "")).await.unwrap();

    server.logged("request failed").await;
    let lines = server.log();
    let of_request: Vec<_> =
        lines.iter().filter(|line| line["request_id"] == "poisoned-1").collect();
    assert_eq!(of_request.len(), 1, "{lines:?}");
    assert!(of_request[0]["cause"].as_str().unwrap().contains("the secret cause"));
    assert_eq!(of_request[0]["traceparent"], TRACE);
    assert_eq!(of_request[0]["level"], "ERROR");
}
