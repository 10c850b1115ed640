//! Peers that take more than their share: those that do not read, and those that only reset.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use order_service::proto::{ListRequest, PlaceRequest};
use rustix::process::Signal;
use tokio::time::timeout;
use tonic_health::pb::HealthCheckRequest;
use tonic_types::StatusExt as _;

use crate::{
    logs::{are_apart, times},
    peers::{call, connect, grpc, place, with_window},
    support::{PATIENCE, Page, Process, framed, scrape_until},
};

#[tokio::test]
async fn peers_that_do_not_read_hold_no_permits_and_are_cut_off_at_the_time_limit() {
    // A response may take this and five seconds more.
    let server = Process::start("sqlite::memory:", &["--request-timeout", "5s"]).await;
    let (mut clients, mut answers) = (Vec::new(), Vec::new());
    for _ in 0..4 {
        let mut client = with_window(server.api, 0).await;
        for _ in 0..256 {
            answers.push(call(&mut client, place()).await);
        }
        clients.push(client);
    }
    // Their orders are placed and their heads answered, but nobody reads.
    let placed = scrape_until(server.admin, |page| {
        let placed = page.value("product_order_total", &[]);
        placed + page.sum("requests_shed_total", &[]) == 1024.0
    })
    .await;
    let placed = placed.value("product_order_total", &[]);
    let order = || PlaceRequest { product_id: "book".into(), ..Default::default() };
    server.grpc().await.place(order()).await.unwrap();
    assert!(server.scrape().await.sum("requests_in_flight", &[]) >= placed);

    let freed = scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 0.0).await;
    let cancelled = ["grpc_method=\"Place\"", "grpc_code=\"Canceled\""];
    assert_eq!(freed.value("grpc_server_handled_total", &cancelled), placed);
    assert!(placed >= 768.0, "{placed}");
    let mut cut_off = 0.0;
    for answer in answers {
        // A refusal has no body.
        if let Some(data) = answer.await.unwrap().into_body().data().await {
            assert!(data.unwrap_err().is_reset());
            cut_off += 1.0;
        }
    }
    assert_eq!(cut_off, placed);
}

#[tokio::test]
async fn a_shed_answer_that_nobody_reads_is_reset_and_recorded_too() {
    let args = ["--max-in-flight", "1", "--processing-delay", "60s", "--request-timeout", "60s"];
    let server = Process::start("sqlite::memory:", &args).await;
    let mut holding = with_window(server.api, 65_535).await;
    let held = call(&mut holding, place()).await;
    scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 1.0).await;
    let mut deaf = with_window(server.api, 0).await;
    let request = http::Request::get("http://x/product").body(()).unwrap();
    let answer = call(&mut deaf, (request, Bytes::new())).await.await.unwrap();
    assert_eq!(answer.status(), 503);
    // Far sooner than its connection has to go.
    let end = timeout(PATIENCE, async { answer.into_body().data().await.unwrap() });
    assert!(end.await.expect("the response is cut off").unwrap_err().is_reset());
    scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 1.0).await;
    drop(held);
}

#[tokio::test]
async fn overload_that_comes_and_goes_does_not_fill_the_log() {
    let args = ["--max-in-flight", "2", "--processing-delay", "5ms"];
    let mut server = Process::start("sqlite::memory:", &args).await;
    let mut client = with_window(server.api, 65_535).await;
    for _ in 0..60 {
        let mut calls = Vec::new();
        for _ in 0..4 {
            calls.push(call(&mut client, place()).await);
        }
        // A request returns its permit at the end of its response.
        for answer in calls {
            let mut body = answer.await.unwrap().into_body();
            while body.data().await.is_some() {}
        }
    }
    let shed = server.scrape().await.sum("requests_shed_total", &[]);
    assert!(shed >= 40.0, "{shed}");
    server.signal(Signal::TERM);
    assert_eq!(server.exited().await.code(), Some(0));
    let log = server.log();
    let with = |text| log.iter().filter(move |line| line["message"] == text);
    let begun = times(with("too many requests in flight: shedding begins"));
    let ended = with("requests are no longer shed").count();
    assert!(begun.len() >= 10 && are_apart(&begun, 10), "{log:?}");
    assert!(ended == begun.len() || ended + 1 == begun.len(), "{log:?}");
}

#[tokio::test]
async fn a_stream_that_stays_open_keeps_nothing_of_its_headers() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let memory = |page: &Page| page.value("process_resident_memory_bytes", &[]);
    let mut open = Vec::new();
    let mut watch = async |query: &str, trace: &str| {
        // A client refuses many small messages on one connection.
        let mut clients = Vec::new();
        for _ in 0..10 {
            clients.push(with_window(server.api, 65_535).await);
        }
        for n in 0..250 {
            let client = &mut clients[n % 10];
            let path = format!("/grpc.health.v1.Health/Watch?{n}{query}");
            let (mut request, body) = grpc(&path, &HealthCheckRequest::default());
            request.headers_mut().insert("traceparent", trace.parse().unwrap());
            open.push(call(client, (request, body)).await.await.unwrap());
        }
        memory(&server.scrape().await)
    };
    // The memory of streams without long headers, once buffers are allocated.
    watch("", "").await;
    let plain = -watch("", "").await + watch("", "").await;
    let (query, trace) = ("q".repeat(7_000), "t".repeat(7_000));
    watch(&query, &trace).await;
    let long = -watch(&query, &trace).await + watch(&query, &trace).await;
    let each = (long - plain) / 250.0;
    println!("{each} bytes of headers of each stream: {plain}, {long}");
    assert!(each < 4_096.0, "{each} bytes of headers of each stream: {plain}, {long}");
}

/// Clients that are refused together must not come back together.
#[tokio::test]
async fn the_advice_when_to_retry_is_spread_at_random() {
    let args = ["--max-in-flight", "1", "--processing-delay", "60s", "--request-timeout", "60s"];
    let server = Process::start("sqlite::memory:", &args).await;
    let mut holding = with_window(server.api, 65_535).await;
    let held = call(&mut holding, place()).await;
    scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 1.0).await;
    let mut grpc = server.grpc().await;
    let (mut delays, mut seconds) = (BTreeSet::new(), BTreeSet::new());
    for _ in 0..40 {
        let order = PlaceRequest { product_id: "book".into(), ..Default::default() };
        let status = grpc.place(order).await.unwrap_err();
        delays.insert(status.get_details_retry_info().unwrap().retry_delay.unwrap());
        let response = reqwest::get(server.url("/product")).await.unwrap();
        seconds.insert(response.headers()["retry-after"].to_str().unwrap().to_owned());
    }
    let range = Duration::from_millis(250)..Duration::from_millis(1250);
    assert!(delays.len() > 20 && delays.iter().all(|delay| range.contains(delay)), "{delays:?}");
    // Forty of the same would be chance once in 100 000 times.
    assert_eq!(seconds, BTreeSet::from(["1".to_owned(), "2".to_owned()]));
    drop(held);
}

#[tokio::test]
async fn floods_of_resets_end_their_connections_and_harm_no_other() {
    let server = Process::start("sqlite::memory:", &["--processing-delay", "10s"]).await;
    let memory = |page: &Page| page.value("process_resident_memory_bytes", &[]);
    let before = memory(&server.scrape().await);
    let over = Arc::new(AtomicBool::new(false));
    let mut floods = Vec::new();
    for _ in 0..4 {
        let (api, over) = (server.api, over.clone());
        floods.push(tokio::spawn(async move {
            let mut resets = 0;
            while !over.load(Ordering::Relaxed) {
                resets += flood(api, &over).await;
            }
            resets
        }));
    }
    // Others are served meanwhile, on connections old and new.
    let mut grpc = server.grpc().await;
    for _ in 0..25 {
        grpc.list(ListRequest::default()).await.unwrap();
        server.grpc().await.list(ListRequest::default()).await.unwrap();
    }
    over.store(true, Ordering::Relaxed);
    let mut resets = 0;
    for flood in floods {
        resets += timeout(PATIENCE, flood).await.expect("a flood ends").unwrap();
    }
    let page = scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 0.0).await;
    let more = memory(&page) - before;
    println!("{resets} resets: {:.1} MB more", more / 1e6);
    assert!(resets > 1000, "{resets}");
    assert!(more < 32e6, "{more}");
}

/// Resets streams as soon as they are begun, until the server has enough or the test is over;
/// returns how many.
async fn flood(api: std::net::SocketAddr, over: &AtomicBool) -> usize {
    let (mut client, connection) = h2::client::handshake::<_>(connect(api).await).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut resets = 0;
    while resets < 100_000 && !over.load(Ordering::Relaxed) {
        let Ok(ready) = client.ready().await else { break };
        client = ready;
        let (request, _) = place();
        let Ok((_answer, mut stream)) = client.send_request(request, false) else { break };
        stream.send_reset(h2::Reason::CANCEL);
        resets += 1;
        if resets % 50 == 0 {
            // So that the connection gets to send them.
            tokio::time::sleep(Duration::ZERO).await;
        }
        client = match client.ready().await {
            Ok(client) => client,
            Err(_) => break,
        };
    }
    connection.abort();
    resets
}

/// HTTP/2's flow control may let a byte through, and nothing after it.
#[tokio::test]
async fn a_response_that_is_read_by_the_byte_is_cut_off_too() {
    let server = Process::start("sqlite::memory:", &["--request-timeout", "500ms"]).await;
    let mut grpc = server.grpc().await;
    for _ in 0..300 {
        let order = PlaceRequest { product_id: "book".into(), ..Default::default() };
        grpc.place(order).await.unwrap();
    }
    let mut client = with_window(server.api, 1).await;
    for path in ["http://x/orders?page_size=300", "http://x/orders.v1.OrderService/List"] {
        client = client.ready().await.unwrap();
        let message = framed(&ListRequest { page_size: 300, ..Default::default() });
        let (request, body) = if path.ends_with("List") {
            let request = http::Request::post(path).header("content-type", "application/grpc");
            (request.header("te", "trailers").body(()).unwrap(), Some(message))
        } else {
            (http::Request::get(path).body(()).unwrap(), None)
        };
        let (answer, mut stream) = client.send_request(request, body.is_none()).unwrap();
        if let Some(body) = body {
            stream.send_data(body.into(), true).unwrap();
        }
        let mut body = answer.await.unwrap().into_body();
        assert_eq!(body.data().await.unwrap().unwrap().len(), 1);
        let end = timeout(PATIENCE, async { body.data().await.unwrap() });
        assert!(end.await.expect("it is cut off").unwrap_err().is_reset(), "{path}");
    }
}
