//! The metrics as a scraper sees them: every request is recorded once, at its end, and not before.

use std::{collections::HashSet, convert::Infallible, net::SocketAddr, time::Duration};

use axum::{Router, body::Body, routing::get};
use bytes::Bytes;
use futures_util::StreamExt as _;
use http::{Method, Request, StatusCode};
use order_service::{
    api::Extra,
    app::{self, Ended, Inputs, Signals},
    config::Settings,
    layers::ServedBy,
    metrics::layer::Route,
    proto::{GetRequest, PlaceRequest, PlaceResponse, order_service_client::OrderServiceClient},
};
use proptest::{
    strategy::{Strategy as _, ValueTree as _},
    test_runner::TestRunner,
};
use prost::Message as _;
use prost_types::{
    FileDescriptorProto, FileDescriptorSet, MethodDescriptorProto, ServiceDescriptorProto,
};
use reqwest::Client;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
};
use tonic::{Code, Status, Streaming, transport::Channel};
use tonic_prost::ProstCodec;

use crate::support::{Page, Process, channel, scrape_until};

/// A server in this process, with routes of the test's own beside the program's.
struct InProcess {
    api: SocketAddr,
    admin: SocketAddr,
    signals: Signals,
    task: JoinHandle<anyhow::Result<Ended>>,
}

impl InProcess {
    async fn start(args: &[&str]) -> Self {
        let bind = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (api, admin) = (bind().await, bind().await);
        let addresses = (api.local_addr().unwrap(), admin.local_addr().unwrap());
        let args = [&["order-service", "--database-url", "sqlite::memory:"], args].concat();
        let settings = Settings::read(args.iter().map(Into::into)).unwrap();
        let signals = Signals::default();
        let inputs = Inputs {
            api,
            admin,
            tls: None,
            served_by: ServedBy::new("test", 1),
            revision: "test",
            signals: signals.clone(),
        };
        let task = tokio::spawn(async move { app::run(&settings, inputs, extra()).await });
        let server = Self { api: addresses.0, admin: addresses.1, signals, task };
        let ready = format!("http://{}/readyz", server.admin);
        while reqwest::get(&ready).await.unwrap().status() != 200 {}
        server
    }

    async fn grpc(&self) -> OrderServiceClient<Channel> {
        OrderServiceClient::new(channel(self.api).await)
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.api)
    }

    async fn scrape(&self) -> Page {
        Page::scrape(self.admin).await
    }

    async fn stop(self) {
        self.signals.drain.cancel();
        assert_eq!(self.task.await.unwrap().unwrap(), Ended::Drained);
    }

    /// Runs an action that is one request, and checks that it is recorded once, under these labels,
    /// in the right family, and nothing else is.
    async fn records(&self, name: &str, labels: &[&str], action: impl Future) {
        let before = self.scrape().await;
        action.await;
        let ended = |page: &Page| handled(page) == handled(&before) + 1.0 && in_flight(page) == 0.0;
        let after = scrape_until(self.admin, ended).await;
        let (was, is) = (before.value(name, labels), after.value(name, labels));
        assert_eq!(is, was + 1.0, "{name} {labels:?}");
        assert_at_rest(&after);
        assert_eq!(after.count(), before.count());
    }

    async fn records_grpc(&self, method: &str, code: &str, action: impl Future) {
        let labels = [format!("grpc_method=\"{method}\""), format!("grpc_code=\"{code}\"")];
        let labels: Vec<_> = labels.iter().map(String::as_str).collect();
        self.records("grpc_server_handled_total", &labels, action).await;
    }

    async fn records_http(&self, url: &str, method: &str, code: &str, action: impl Future) {
        let labels =
            [format!("url=\"{url}\""), format!("method=\"{method}\""), format!("code=\"{code}\"")];
        let labels: Vec<_> = labels.iter().map(String::as_str).collect();
        self.records("http_requests_total_with_path", &labels, action).await;
    }
}

fn handled(page: &Page) -> f64 {
    page.sum("grpc_server_handled_total", &[]) + page.sum("http_requests_total_with_path", &[])
}

fn in_flight(page: &Page) -> f64 {
    page.sum("requests_in_flight", &[])
}

fn assert_at_rest(page: &Page) {
    let calls = page.sum("grpc_server_handled_total", &[]);
    assert_eq!(page.sum("grpc_server_started_total", &[]), calls);
    assert_eq!(page.sum("grpc_server_handling_seconds_count", &[]), calls);
    let requests = page.sum("http_requests_total_with_path", &[]);
    assert_eq!(page.sum("http_request_duration_seconds_count", &[]), requests);
}

const STREAM: &str = "/test.v1.Streams/Count";

/// A service of streams, and HTTP routes, that end in every way there is.
fn extra() -> Extra {
    let stream = tower::service_fn(async |request: Request<Body>| {
        let codec = ProstCodec::<PlaceResponse, PlaceRequest>::default();
        let count = tower::service_fn(async |request: tonic::Request<PlaceRequest>| {
            let end = request.into_inner().product_id;
            match end.as_str() {
                "panic" => panic!("the handler panics"),
                "hang" => std::future::pending().await,
                _ => {}
            }
            let message = || Ok(PlaceResponse::default());
            let rest = futures_util::stream::once(async move {
                // So that what came before is sent by then.
                tokio::task::yield_now().await;
                match end.as_str() {
                    "fails-third" => Err(Status::data_loss("the third message")),
                    "panics-third" => panic!("the body panics"),
                    "hangs-third" => std::future::pending().await,
                    _ => message(),
                }
            });
            let messages = tokio_stream::iter([message(), message()]).chain(rest);
            Ok(tonic::Response::new(messages))
        });
        let mut grpc = tonic::server::Grpc::new(codec);
        Ok::<_, Infallible>(grpc.server_streaming(count, request).await.map(Body::new))
    });
    let method = MethodDescriptorProto {
        name: Some("Count".to_owned()),
        server_streaming: Some(true),
        ..Default::default()
    };
    let service = ServiceDescriptorProto {
        name: Some("Streams".to_owned()),
        method: vec![method],
        options: None,
    };
    let file = FileDescriptorProto {
        package: Some("test.v1".to_owned()),
        service: vec![service],
        ..Default::default()
    };
    let chunks = || tokio_stream::iter([Ok::<_, Infallible>("one"), Ok("two")]);
    let routes = Router::new()
        .route_service("/test.v1.Streams/{*rest}", stream)
        .route("/test/panic", get(async || panic!("the handler panics") as &str))
        .route("/test/chunked", get(async move || Body::from_stream(chunks())))
        .route(
            "/test/length",
            get(async move || ([("content-length", "6")], Body::from_stream(chunks()))),
        )
        .route(
            "/test/panic-body",
            get(async || {
                let rest = futures_util::stream::once(async {
                    tokio::task::yield_now().await;
                    panic!("the body panics")
                });
                Body::from_stream(tokio_stream::iter([Ok::<_, Infallible>("one")]).chain(rest))
            }),
        )
        .route("/test/empty", get(async || StatusCode::NO_CONTENT));
    let ok: &'static [u16] = &[200, 204];
    let paths = ["/test/panic", "/test/chunked", "/test/length", "/test/panic-body", "/test/empty"];
    Extra {
        routes,
        descriptors: FileDescriptorSet { file: vec![file] }.encode_to_vec(),
        http: paths.map(|path| Route::new(path, &[(Method::GET, ok)])).to_vec(),
    }
}

fn place(product: &str) -> PlaceRequest {
    PlaceRequest { product_id: product.into(), ..Default::default() }
}

/// Opens the stream that ends as its product says.
async fn count(server: &InProcess, end: &str) -> Result<Streaming<PlaceResponse>, Status> {
    let mut grpc = tonic::client::Grpc::new(channel(server.api).await);
    grpc.ready().await.unwrap();
    let codec = ProstCodec::<PlaceRequest, PlaceResponse>::default();
    let path = http::uri::PathAndQuery::from_static(STREAM);
    let stream = grpc.server_streaming(tonic::Request::new(place(end)), path, codec).await?;
    Ok(stream.into_inner())
}

#[tokio::test]
async fn unary_calls_are_recorded_by_their_status() {
    let server = InProcess::start(&["--request-timeout", "500ms"]).await;
    let mut grpc = server.grpc().await;
    let keyed = |product: &str| PlaceRequest { idempotency_key: "k".into(), ..place(product) };
    server.records_grpc("Place", "OK", grpc.place(keyed("book"))).await;
    server.records_grpc("Place", "OK", grpc.place(keyed("book"))).await;
    server.records_grpc("Place", "AlreadyExists", grpc.place(keyed("pen"))).await;
    server.records_grpc("Place", "InvalidArgument", grpc.place(place(""))).await;
    server.records_grpc("Place", "OutOfRange", grpc.place(place(&"x".repeat(70_000)))).await;
    server.records_grpc("Get", "NotFound", grpc.get(GetRequest::default())).await;
    let page = server.scrape().await;
    assert_eq!(page.value("product_order_total", &[]), 1.0);
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
    let too_late = async {
        let mut request = tonic::Request::new(place("book"));
        request.set_timeout(Duration::from_millis(50));
        server.grpc().await.place(request).await.unwrap_err();
    };
    server.records_grpc("Place", "DeadlineExceeded", too_late).await;
    assert_eq!(server.scrape().await.value("product_order_total", &[]), 0.0);
    server.stop().await;
}

#[tokio::test]
async fn http_requests_are_recorded_by_route_method_and_code() {
    let server = InProcess::start(&["--request-timeout", "300ms"]).await;
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

#[tokio::test]
async fn every_series_exists_at_0_after_the_start() {
    let server = Process::start("sqlite::memory:", &["--max-in-flight", "77"]).await;
    let page = server.scrape().await;
    assert_eq!(page.value("product_order_total", &[]), 0.0);
    assert_eq!(page.value("requests_in_flight_limit", &[]), 77.0);
    let build = ["version=\"0.1.0\"", "revision="];
    assert_eq!(page.value("order_service_build_info", &build), 1.0);
    for method in ["Place", "Get", "List", "other"] {
        let label = format!("grpc_method=\"{method}\"");
        let codes = page.series("grpc_server_handled_total", &[&label]).count();
        assert_eq!(codes, 17, "{method}");
        for name in
            ["started_total", "msg_received_total", "msg_sent_total", "handling_seconds_count"]
        {
            assert_eq!(page.value(&format!("grpc_server_{name}"), &[&label]), 0.0);
        }
    }
    for (url, method, codes) in [
        ("/product", "GET", &["200", "422", "499", "500", "503", "504"][..]),
        (
            "/product",
            "POST",
            &["200", "201", "400", "413", "415", "422", "499", "500", "503", "504"],
        ),
        ("/product", "HEAD", &["405"]),
        ("/orders", "GET", &["200", "422", "499", "500", "503", "504"]),
        ("/orders/{order_id}", "GET", &["200", "404", "499", "500", "503", "504"]),
        ("unmatched", "GET", &["404", "499"]),
        ("unmatched", "OTHER", &["404"]),
    ] {
        let (url, method) = (format!("url=\"{url}\""), format!("method=\"{method}\""));
        for code in codes {
            let code = format!("code=\"{code}\"");
            assert_eq!(page.value("http_requests_total_with_path", &[&url, &method, &code]), 0.0);
        }
    }
    for protocol in ["protocol=\"grpc\"", "protocol=\"http\""] {
        assert_eq!(page.value("requests_in_flight", &[protocol]), 0.0);
        assert_eq!(page.value("request_panics_total", &[protocol]), 0.0);
        for reason in ["reason=\"in_flight\"", "reason=\"queue_full\""] {
            assert_eq!(page.value("requests_shed_total", &[protocol, reason]), 0.0);
        }
    }
    for reason in ["limit", "read_timeout", "tls"] {
        let reason = format!("reason=\"{reason}\"");
        assert_eq!(page.value("connections_refused_total", &[&reason]), 0.0);
    }
    for kind in ["unavailable", "timeout", "conflict", "constraint", "full", "other"] {
        assert_eq!(page.value("order_store_errors_total", &[&format!("kind=\"{kind}\"")]), 0.0);
    }
    for name in [
        "connections_open",
        "connections_accepted_total",
        "order_store_queue_orders",
        "order_store_commit_duration_seconds_count",
        "order_store_batch_orders_count",
    ] {
        assert_eq!(page.value(name, &[]), 0.0, "{name}");
    }
}

#[tokio::test]
async fn the_process_tells_what_it_takes() {
    let server = Process::start("sqlite::memory:", &["--worker-threads", "3"]).await;
    let page = server.scrape().await;
    assert_eq!(page.value("tokio_workers", &[]), 3.0);
    assert!(page.value("process_threads", &[]) >= 4.0);
    let megabytes = page.value("process_resident_memory_bytes", &[]) / 1e6;
    assert!((1.0..500.0).contains(&megabytes), "{megabytes}");
    let fds = page.value("process_open_fds", &[]);
    assert!(fds >= 5.0 && fds < page.value("process_max_fds", &[]));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let age = now.as_secs_f64() - page.value("process_start_time_seconds", &[]);
    // The kernel tells the boot time in whole seconds.
    assert!((-1.5..60.0).contains(&age), "{age}");

    // Work for less than a second shows, since fractions are counted.
    let cpu = page.value("process_cpu_seconds_total", &[]);
    let more =
        scrape_until(server.admin, |page| page.value("process_cpu_seconds_total", &[]) > cpu).await;
    let took = more.value("process_cpu_seconds_total", &[]) - cpu;
    assert!(took < 1.0, "{took}");
}

/// Callers that hang up at any moment: what is counted is what is stored.
#[tokio::test]
async fn what_is_counted_is_what_is_stored_whoever_hangs_up() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::start_in(dir.path(), &[]).await;
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
    let page = scrape_until(server.admin, |page| {
        in_flight(page) == 0.0 && page.value("order_store_queue_orders", &[]) == 0.0
    })
    .await;
    assert_at_rest(&page);
    // Flushed by the drain, counted again by the next process's list.
    let counted = scrape_until(server.admin, |later| {
        later.value("order_store_batch_orders_sum", &[]) == later.value("product_order_total", &[])
    })
    .await
    .value("product_order_total", &[]);
    assert_eq!(server.terminate().await, Some(0));
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
    for caller in 0..12 {
        let (channel, client) = (channel(api).await, Client::new());
        mix.spawn(async move {
            for i in 0..60 {
                match (caller + i) % 6 {
                    0 => drop(OrderServiceClient::new(channel.clone()).place(place("book")).await),
                    1 => drop(OrderServiceClient::new(channel.clone()).place(place("")).await),
                    2 => drop(client.get(format!("http://{api}/product")).send().await),
                    3 => drop(client.get(format!("http://{api}/test/panic")).send().await),
                    4 => drop(client.post(format!("http://{api}/some")).send().await),
                    _ => {
                        let mut grpc = OrderServiceClient::new(channel.clone());
                        let at_once = Duration::from_micros(200);
                        let _ = tokio::time::timeout(at_once, grpc.place(place("book"))).await;
                    }
                }
            }
        });
    }
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
            if page.value("product_order_total", &[]) >= 100.0 && scrapes > 20 {
                return;
            }
        }
    });
    mix.join_all().await;
    scraping.await.unwrap();
    let page = scrape_until(admin, |page| in_flight(page) == 0.0).await;
    assert_at_rest(&page);
    server.stop().await;
}

#[tokio::test]
async fn the_admin_routes_answer_as_scrapers_and_probes_expect() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let client = Client::new();
    let url = |path: &str| format!("http://{}{path}", server.admin);
    let page = client.get(url("/metrics")).send().await.unwrap();
    assert_eq!(page.headers()["content-type"], "text/plain; version=0.0.4");
    assert!(!page.headers().contains_key("content-encoding"));
    let plain = page.text().await.unwrap();
    let zipped =
        client.get(url("/metrics")).header("accept-encoding", "gzip").send().await.unwrap();
    assert_eq!(zipped.headers()["content-encoding"], "gzip");
    let zipped: Bytes = zipped.bytes().await.unwrap();
    assert!(zipped.starts_with(&[0x1f, 0x8b]) && zipped.len() * 4 < plain.len());

    for path in ["/livez", "/readyz"] {
        assert_eq!(client.get(url(path)).send().await.unwrap().text().await.unwrap(), "ok\n");
    }
    let root = client.get(url("/")).send().await.unwrap().text().await.unwrap();
    assert!(["/metrics", "/livez", "/readyz"].iter().all(|path| root.contains(path)));
    for path in ["/", "/metrics", "/livez", "/readyz"] {
        assert_eq!(client.head(url(path)).send().await.unwrap().status(), 200);
        let refused = client.post(url(path)).send().await.unwrap();
        assert_eq!(
            (refused.status().as_u16(), &refused.headers()["allow"]),
            (405, &"GET, HEAD".parse().unwrap())
        );
    }
    assert_eq!(client.get(url("/nowhere")).send().await.unwrap().status(), 404);
}

#[tokio::test]
async fn a_stuck_scraper_holds_neither_the_api_nor_the_end() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut stuck = Vec::new();
    for _ in 0..40 {
        let mut stream = TcpStream::connect(server.admin).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        stuck.push(stream);
    }
    let mut silent = TcpStream::connect(server.admin).await.unwrap();
    server.grpc().await.place(place("book")).await.unwrap();
    assert_eq!(server.terminate().await, Some(0));
    assert_eq!(silent.read(&mut [0; 1]).await.unwrap(), 0);
}

#[tokio::test]
async fn the_last_orders_are_seen_by_a_final_scrape() {
    let mut server = Process::start("sqlite::memory:", &["--final-scrape-timeout", "60s"]).await;
    server.grpc().await.place(place("book")).await.unwrap();
    server.signal(rustix::process::Signal::TERM);
    server.logged("draining: waiting for the final scrape").await;
    // Probes and HEAD are no scrapes.
    let client = Client::new();
    let metrics = format!("http://{}/metrics", server.admin);
    let ready = client.get(format!("http://{}/readyz", server.admin)).send().await.unwrap();
    assert_eq!(
        (ready.status().as_u16(), ready.text().await.unwrap()),
        (503, "draining\n".to_owned())
    );
    let live = client.get(format!("http://{}/livez", server.admin)).send().await.unwrap();
    assert_eq!(live.status(), 200);
    client.head(&metrics).send().await.unwrap();
    let page = Page(client.get(&metrics).send().await.unwrap().text().await.unwrap());
    assert_eq!(page.value("product_order_total", &[]), 1.0);
    assert_eq!(server.exited().await.code(), Some(0));
}
