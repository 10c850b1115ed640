//! The metrics as a scraper sees them: every request is recorded once, at its end, and not before.

use std::{collections::HashSet, time::Duration};

use http::Method;
use order_service::proto::{
    GetRequest, PlaceRequest, PlaceResponse, order_service_client::OrderServiceClient,
};
use proptest::{
    strategy::{Strategy as _, ValueTree as _},
    test_runner::TestRunner,
};
use reqwest::Client;
use rustix::process::Signal;
use tokio::{io::AsyncWriteExt as _, net::TcpStream, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic_prost::ProstCodec;

use crate::{
    in_process::{
        InProcess, STREAM, call_panicking, count, count_on, in_flight, is_at_rest, place,
    },
    support::{Page, Process, channel, exchange, framed, scrape_until},
};

#[tokio::test]
async fn unary_calls_are_recorded_by_their_status() {
    let server = InProcess::start(&[]).await;
    let mut grpc = server.grpc().await;
    let keyed = |product: &str| PlaceRequest { idempotency_key: "k".into(), ..place(product) };
    server.records_grpc("Place", "OK", grpc.place(keyed("book"))).await;
    server.records_grpc("Place", "OK", grpc.place(keyed("book"))).await;
    server.records_grpc("Place", "AlreadyExists", grpc.place(keyed("pen"))).await;
    server.records_grpc("Place", "InvalidArgument", grpc.place(place(""))).await;
    server.records_grpc("Place", "OutOfRange", grpc.place(place(&"x".repeat(70_000)))).await;
    server.records_grpc("Get", "NotFound", grpc.get(GetRequest::default())).await;
    let panicking = async {
        let status = call_panicking(channel(server.api).await).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::Internal, "internal error"));
    };
    server.records_grpc("Panic", "Internal", panicking).await;
    let page = server.scrape().await;
    assert_eq!(page.value("product_order_total", &[]), 1.0);
    assert_eq!(page.value("request_panics_total", &["protocol=\"grpc\""]), 1.0);
    let place = ["grpc_method=\"Place\"", "grpc_type=\"unary\""];
    assert_eq!(page.value("grpc_server_started_total", &place), 5.0);
    assert_eq!(page.value("grpc_server_msg_sent_total", &place), 2.0);
    // The message that was too long was given up at its length.
    assert_eq!(page.value("grpc_server_msg_received_total", &place), 4.0);
    server.stop().await;
}

#[tokio::test]
async fn streams_are_recorded_at_their_end() {
    let server = InProcess::start(&[]).await;
    let read_all = async |end: &str| {
        let mut stream = count(&server, end).await.unwrap();
        let mut messages = 0;
        loop {
            match stream.message().await {
                Ok(Some(_)) => messages += 1,
                Ok(None) => return (messages, Code::Ok),
                Err(status) => return (messages, status.code()),
            }
        }
    };
    server
        .records_grpc("Count", "OK", async { assert_eq!(read_all("ends").await, (3, Code::Ok)) })
        .await;
    let failing = async { assert_eq!(read_all("fails-third").await, (2, Code::DataLoss)) };
    server.records_grpc("Count", "DataLoss", failing).await;
    let panicking = async { assert_eq!(read_all("panics-third").await, (2, Code::Internal)) };
    server.records_grpc("Count", "Internal", panicking).await;
    let panicking = async {
        let status = count(&server, "panic").await.unwrap_err();
        assert_eq!(status.code(), Code::Internal);
    };
    server.records_grpc("Count", "Internal", panicking).await;
    let page = server.scrape().await;
    assert_eq!(page.value("request_panics_total", &["protocol=\"grpc\""]), 2.0);
    let labels = ["grpc_method=\"Count\"", "grpc_type=\"server_stream\""];
    assert_eq!(page.value("grpc_server_msg_sent_total", &labels), 7.0);
    assert_eq!(page.value("grpc_server_msg_received_total", &labels), 4.0);
    server.stop().await;
}

#[tokio::test]
async fn cancelled_calls_are_recorded() {
    let server = InProcess::start(&["--processing-delay", "60s", "--request-timeout", "60s"]).await;
    let in_flight_is = async |calls: f64| {
        scrape_until(server.admin, |page| in_flight(page) == calls).await;
    };
    let before_the_head = async {
        let mut grpc = server.grpc().await;
        let call = tokio::spawn(async move { grpc.place(place("book")).await });
        in_flight_is(1.0).await;
        assert_eq!(server.scrape().await.sum("grpc_server_handled_total", &[]), 0.0);
        call.abort();
    };
    server.records_grpc("Place", "Canceled", before_the_head).await;
    let in_the_middle = async {
        let mut stream = count(&server, "hangs-third").await.unwrap();
        stream.message().await.unwrap().unwrap();
        stream.message().await.unwrap().unwrap();
        in_flight_is(1.0).await;
    };
    server.records_grpc("Count", "Canceled", in_the_middle).await;
    let connection_lost = async {
        let mut stream = TcpStream::connect(server.api).await.unwrap();
        stream.write_all(b"GET /product HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        in_flight_is(1.0).await;
    };
    server.records_http("/product", "GET", "499", connection_lost).await;
    // By clients that leave it to the server to keep the time: tonic's would hang up by its own clock,
    // which may be the sooner.
    let client = Client::builder().http2_prior_knowledge().build().unwrap();
    let asking = |path: &str, product: &str| {
        let request = client.post(server.url(path)).header("content-type", "application/grpc");
        let request = request.header("te", "trailers").header("grpc-timeout", "50m");
        request.body(framed(&place(product))).send()
    };
    let too_late = async {
        let response = asking("/orders.v1.OrderService/Place", "book").await.unwrap();
        assert_eq!(response.headers()["grpc-status"], "4");
    };
    server.records_grpc("Place", "DeadlineExceeded", too_late).await;
    let dropped_too_late = async {
        let mut stream = asking(STREAM, "hangs-third").await.unwrap();
        stream.chunk().await.unwrap();
        // The call began before its head came, so its time is up.
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    server.records_grpc("Count", "DeadlineExceeded", dropped_too_late).await;
    assert_eq!(server.scrape().await.value("product_order_total", &[]), 0.0);
    server.stop().await;
}

#[tokio::test]
async fn http_requests_are_recorded_by_route_method_and_code() {
    let server = InProcess::start(&[]).await;
    let client = Client::new();
    let send = |method: Method, path: &str| client.request(method, server.url(path)).send();
    let post = |body: String| {
        let request = client.post(server.url("/product"));
        request.header("content-type", "application/json").body(body).send()
    };
    let order = "{\"product_id\":\"book\"}".to_owned();
    for (url, method, code, request) in [
        ("/product", Method::GET, "200", "/product"),
        ("/product", Method::HEAD, "405", "/product"),
        ("/product", Method::PATCH, "405", "/product"),
        ("/product", Method::GET, "422", "/product?quantity=0"),
        ("/orders", Method::GET, "200", "/orders"),
        ("/orders", Method::HEAD, "200", "/orders"),
        ("/orders/{order_id}", Method::GET, "404", "/orders/some"),
        ("/orders/{order_id}", Method::HEAD, "404", "/orders/some"),
        ("unmatched", Method::GET, "404", "/nowhere"),
        ("unmatched", Method::POST, "404", "/"),
        ("unmatched", Method::GET, "415", "/orders.v1.OrderService/Place"),
        ("/test/chunked", Method::GET, "200", "/test/chunked"),
        ("/test/length", Method::GET, "200", "/test/length"),
        ("/test/empty", Method::GET, "204", "/test/empty"),
        ("/test/panic", Method::GET, "500", "/test/panic"),
    ] {
        let label = if method == Method::PATCH { "OTHER" } else { method.as_str() }.to_owned();
        let read = async { send(method, request).await.unwrap().bytes().await.unwrap() };
        server.records_http(url, &label, code, read).await;
    }
    let broken =
        async { send(Method::GET, "/test/panic-body").await.unwrap().bytes().await.unwrap_err() };
    server.records_http("/test/panic-body", "GET", "500", broken).await;
    for (code, body) in [
        ("201", order.clone()),
        ("400", "{".to_owned()),
        ("413", "x".repeat(70_000)),
        ("422", "{}".to_owned()),
    ] {
        server.records_http("/product", "POST", code, post(body)).await;
    }
    let plain = client.post(server.url("/product")).body(order).send();
    server.records_http("/product", "POST", "415", plain).await;
    let page = server.scrape().await;
    assert_eq!(page.value("request_panics_total", &["protocol=\"http\""]), 2.0);
    assert_eq!(page.value("product_order_total", &[]), 2.0);
    server.stop().await;
}

/// The layer is outside of the router and decides by itself which route a path is of: what the router
/// answers shows which one it took.
#[tokio::test]
async fn the_layer_and_the_router_take_a_path_for_the_same_route() {
    let server = InProcess::start(&[]).await;
    for (path, url, code) in [
        ("/product", "/product", "200"),
        ("/product?x=/orders", "/product", "200"),
        ("/product/", "unmatched", "404"),
        ("//product", "unmatched", "404"),
        ("/product/x", "unmatched", "404"),
        ("/PRODUCT", "unmatched", "404"),
        ("/%70roduct", "unmatched", "404"),
        ("/product%2F", "unmatched", "404"),
        ("/orders", "/orders", "200"),
        ("/orders/", "unmatched", "404"),
        ("/orders//", "unmatched", "404"),
        ("/orders/x", "/orders/{order_id}", "404"),
        ("/orders/%2F", "/orders/{order_id}", "404"),
        ("/orders/%ff", "/orders/{order_id}", "404"),
        ("/orders/x%00", "/orders/{order_id}", "404"),
        ("/orders/x/", "unmatched", "404"),
        ("/orders/x/y", "unmatched", "404"),
        ("/orders/{order_id}", "/orders/{order_id}", "404"),
        ("*", "unmatched", "404"),
        ("http://x/product", "/product", "200"),
        ("/orders.v1.OrderService", "unmatched", "404"),
    ] {
        let request = async {
            let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
            let answer = exchange(server.api, request.as_bytes()).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {code} ")), "{path}: {answer}");
            if code == "404" {
                let kind = if url == "unmatched" { "no-such-route" } else { "no-such-order" };
                assert!(answer.contains(kind), "{path}: {answer}");
            }
        };
        server.records_http(url, "GET", code, request).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn a_panic_harms_no_other_call_on_its_connection() {
    let server = InProcess::start(&[]).await;
    let channel = channel(server.api).await;
    let mut others = JoinSet::new();
    for _ in 0..20 {
        let mut grpc = OrderServiceClient::new(channel.clone());
        others.spawn(async move { grpc.place(place("book")).await.unwrap() });
        let mut grpc = tonic::client::Grpc::new(channel.clone());
        grpc.ready().await.unwrap();
        let codec = ProstCodec::<PlaceRequest, PlaceResponse>::default();
        let path = http::uri::PathAndQuery::from_static(STREAM);
        let panicking = grpc.server_streaming(tonic::Request::new(place("panic")), path, codec);
        assert_eq!(panicking.await.unwrap_err().code(), Code::Internal);
    }
    others.join_all().await;
    assert_eq!(server.scrape().await.value("product_order_total", &[]), 20.0);
    server.stop().await;
}

#[tokio::test]
async fn strangers_leave_the_number_of_series_unchanged() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let before = server.scrape().await;
    let client = Client::new();
    for i in 0..1000 {
        let method = Method::from_bytes(format!("METHOD{i}").as_bytes()).unwrap();
        let request = client.request(method, server.url(&format!("/stranger/{i}?q={i}")));
        let response = request.header("host", format!("host{i}.example")).send().await.unwrap();
        assert_eq!(response.status(), 404);
        let call = client.post(server.url(&format!("/stranger.v{i}.S/Call{i}")));
        let call = call.header("content-type", "application/grpc").send().await.unwrap();
        assert_eq!(call.headers()["grpc-status"], "12");
    }
    let after = server.scrape().await;
    assert_eq!(names(&after), names(&before));
    let unmatched = ["url=\"unmatched\"", "method=\"OTHER\"", "code=\"404\""];
    assert_eq!(after.value("http_requests_total_with_path", &unmatched), 1000.0);
    let other = ["grpc_method=\"other\"", "grpc_code=\"Unimplemented\""];
    assert_eq!(after.value("grpc_server_handled_total", &other), 1000.0);
    assert_eq!(before.sum("http_requests_total_with_path", &[]), 0.0);
}

/// The names and labels of every series.
fn names(page: &Page) -> HashSet<&str> {
    let series = page.0.lines().filter(|line| !line.starts_with('#'));
    series.map(|line| line.rsplit_once(' ').unwrap().0).collect()
}

/// Callers that hang up at any moment: what is counted is what is stored.
#[tokio::test]
async fn what_is_counted_is_what_is_stored_whoever_hangs_up() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start_in(dir.path(), &["--final-scrape-timeout", "60s"]).await;
    let mut runner = TestRunner::default();
    for _ in 0..20 {
        let mut calls = JoinSet::new();
        for _ in 0..20 {
            let mut grpc = server.grpc().await;
            let micros = (0..5000_u64).new_tree(&mut runner).unwrap().current();
            calls.spawn(async move {
                let hang_up = Duration::from_micros(micros);
                let _ = tokio::time::timeout(hang_up, grpc.place(place("book"))).await;
            });
        }
        calls.join_all().await;
    }
    scrape_until(server.admin, is_at_rest).await;
    // A batch whose callers are gone may still be at its commit: the figures are final after the flush.
    server.signal(Signal::TERM);
    server.logged("draining: waiting for the final scrape").await;
    let page = server.scrape().await;
    assert!(is_at_rest(&page), "{}", page.0);
    let counted = page.value("product_order_total", &[]);
    assert_eq!(page.value("order_store_batch_orders_sum", &[]), counted);
    assert_eq!(server.ended().await, Some(0));
    let server = Process::start_in(dir.path(), &[]).await;
    let url = server.url("/orders?page_size=1000");
    let page: serde_json::Value = reqwest::get(url).await.unwrap().json().await.unwrap();
    assert_eq!(page["orders"].as_array().unwrap().len() as f64, counted);
    assert!(counted > 0.0);
}

#[tokio::test]
async fn a_random_mix_never_shows_more_ends_than_starts() {
    let server = InProcess::start(&["--max-in-flight", "8"]).await;
    let (api, admin) = (server.api, server.admin);
    let mut mix = JoinSet::new();
    let mut runner = TestRunner::default();
    for _ in 0..12 {
        let (channel, client) = (channel(api).await, Client::new());
        let each = (0..12_usize, 0..2000_u64);
        let calls = proptest::collection::vec(each, 60).new_tree(&mut runner).unwrap().current();
        mix.spawn(async move {
            for (kind, micros) in calls {
                let http = |method, path| client.request(method, format!("http://{api}{path}"));
                let mut grpc = OrderServiceClient::new(channel.clone());
                match kind {
                    0 | 1 => drop(grpc.place(place("book")).await),
                    2 => drop(grpc.place(place("")).await),
                    3 => drop(http(Method::GET, "/product").send().await),
                    4 => drop(http(Method::HEAD, "/product").send().await),
                    5 => drop(http(Method::GET, "/test/panic").send().await),
                    6 => drop(http(Method::GET, "/test/panic-body").send().await),
                    7 => drop(http(Method::POST, "/some").send().await),
                    8 => {
                        // Hangs up at any moment.
                        let hang_up = Duration::from_micros(micros);
                        let _ = tokio::time::timeout(hang_up, grpc.place(place("book"))).await;
                    }
                    kind => {
                        let end = ["ends", "fails-third", "panics-third"][kind - 9];
                        let Ok(mut stream) = count_on(channel.clone(), end).await else { continue };
                        // Some streams are dropped in the middle.
                        for _ in 0..micros % 5 {
                            let _ = stream.message().await;
                        }
                    }
                }
            }
        });
    }
    let mixed = CancellationToken::new();
    let done = mixed.clone();
    let scraping = tokio::spawn(async move {
        let mut scrapes = 0;
        loop {
            let page = Page::scrape(admin).await;
            for method in ["Place", "Get", "List", "other", "Count"] {
                let label = format!("grpc_method=\"{method}\"");
                let handled = page.sum("grpc_server_handled_total", &[&label]);
                assert!(handled <= page.value("grpc_server_started_total", &[&label]));
            }
            scrapes += 1;
            if done.is_cancelled() && scrapes > 20 {
                return;
            }
        }
    });
    mix.join_all().await;
    mixed.cancel();
    scraping.await.unwrap();
    let page = scrape_until(admin, is_at_rest).await;
    for label in ["grpc_code=\"OK\"", "grpc_code=\"Canceled\"", "grpc_code=\"Internal\""] {
        assert!(page.sum("grpc_server_handled_total", &[label]) > 0.0, "{label}");
    }
    server.stop().await;
}
