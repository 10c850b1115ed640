//! Manners of HTTP: the Host, encodings, and answers that do not wait for a body that nobody reads.

use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use crate::{
    peers::{closed, connect, get, response, with_window},
    support::{PATIENCE, Process, exchange, scrape_until},
};

#[tokio::test]
async fn http_1_1_without_exactly_one_valid_host_places_nothing() {
    let server = Process::start("sqlite::memory:", &[]).await;
    for hosts in [
        "",
        "host: a\r\nhost: a\r\n",
        "host: a b\r\n",
        "host: user@a\r\n",
        "host: a/b\r\n",
        "host: :80\r\n",
        "host: a:port\r\n",
        "host:\r\n",
        "host: []\r\n",
        "host: [zz]:80\r\n",
    ] {
        for request in
            ["GET /product HTTP/1.1", "GET http://a/product HTTP/1.1", "GET /nowhere HTTP/1.1"]
        {
            let request = format!("{request}\r\n{hosts}connection: close\r\n\r\n");
            let answer = exchange(server.api, request.as_bytes()).await;
            assert!(answer.starts_with("HTTP/1.1 400 "), "{request:?}: {answer}");
            assert!(answer.contains("\"detail\":") && answer.contains("Host"), "{answer}");
        }
    }
    // Whatever the protocol.
    let request = "POST /orders.v1.OrderService/Place HTTP/1.1\r\ncontent-type: application/grpc\r\n\
                   connection: close\r\ncontent-length: 0\r\n\r\n";
    let answer = exchange(server.api, request.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("grpc-status: 3"), "{answer}");

    let page = server.scrape().await;
    assert_eq!(page.value("product_order_total", &[]), 0.0);
    let unmatched = ["url=\"unmatched\"", "method=\"GET\"", "code=\"400\""];
    assert_eq!(page.value("http_requests_total_with_path", &unmatched), 10.0);
    for host in ["host: x", "HOST: orders.test:8181", "host: [::1]:8181", "host: 127.0.0.1"] {
        let request = format!("GET /product HTTP/1.1\r\n{host}\r\nconnection: close\r\n\r\n");
        let answer = exchange(server.api, request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{host}: {answer}");
    }
    // HTTP/1.0 knows none.
    let answer = exchange(server.api, b"GET /product HTTP/1.0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 200 "), "{answer}");
}

#[tokio::test]
async fn a_compressed_body_is_refused_before_it_is_parsed() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let body = r#"{"product_id":"book"}"#;
    let post = async |encoding: &str| {
        let request = format!(
            "POST /product HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: \
             application/json\r\n{encoding}content-length: {}\r\n\r\n{body}",
            body.len()
        );
        exchange(server.api, request.as_bytes()).await.to_lowercase()
    };
    for encoding in [
        "content-encoding: gzip\r\n",
        "content-encoding: identity, br\r\n",
        "content-encoding: identity\r\ncontent-encoding: zstd\r\n",
        "content-encoding: nonsense\r\n",
    ] {
        let answer = post(encoding).await;
        assert!(answer.starts_with("http/1.1 415 "), "{encoding}: {answer}");
        assert!(answer.contains("accept-encoding: identity"), "{answer}");
        assert!(answer.contains("content-encoding \\\""), "{answer}");
    }
    for encoding in ["", "content-encoding: identity\r\n", "content-encoding: Identity\r\n"] {
        let answer = post(encoding).await;
        assert!(answer.starts_with("http/1.1 201 "), "{encoding}: {answer}");
    }
}

/// With a deadline of a minute, an answer that waited for the body would come too late for this
/// test.
#[tokio::test]
async fn early_answers_come_while_the_sender_pauses() {
    let server = Process::start("sqlite::memory:", &["--request-timeout", "120s"]).await;
    let json = "content-type: application/json\r\n";
    for (request, headers, status) in [
        ("POST /nowhere", "", "404"),
        ("PUT /product", "", "405"),
        ("POST /product", "", "415"),
        ("POST /product", "content-type: application/json\r\ncontent-encoding: br\r\n", "415"),
        ("POST /orders.v1.OrderService/Place", json, "415"),
        ("GET /product", "", "200"),
        ("GET /orders", "", "200"),
    ] {
        for framing in ["content-length: 100\r\n", "transfer-encoding: chunked\r\n"] {
            let mut peer = connect(server.api).await;
            let head = format!("{request} HTTP/1.1\r\nhost: x\r\n{headers}{framing}\r\n");
            peer.write_all(head.as_bytes()).await.unwrap();
            let head = timeout(PATIENCE, response(&mut peer)).await;
            let head = head.unwrap_or_else(|_| panic!("{request}: no answer"));
            assert!(head.starts_with(&format!("http/1.1 {status} ")), "{request}: {head}");
        }
    }
    let mut peer = connect(server.api).await;
    let head = format!("POST /product HTTP/1.1\r\nhost: x\r\n{json}content-length: 70000\r\n\r\n");
    peer.write_all(head.as_bytes()).await.unwrap();
    assert!(timeout(PATIENCE, response(&mut peer)).await.unwrap().starts_with("http/1.1 413 "));
    // Each was placed once.
    assert_eq!(server.scrape().await.value("product_order_total", &[]), 2.0);
}

#[tokio::test]
async fn what_is_left_of_a_body_is_read_for_two_seconds_and_the_connection_goes_on() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut peer = connect(server.api).await;
    for _ in 0..3 {
        let head = b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 300000\r\n\r\n";
        peer.write_all(head).await.unwrap();
        assert!(response(&mut peer).await.starts_with("http/1.1 404 "));
        peer.write_all(&[b'x'; 300_000]).await.unwrap();
        assert!(get(&mut peer).await.starts_with("http/1.1 200 "));
    }
    // One that sends nothing more is closed, at once after that time, and is in flight no longer.
    let head = b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 300000\r\n\r\n";
    peer.write_all(head).await.unwrap();
    assert!(response(&mut peer).await.starts_with("http/1.1 404 "));
    let begun = Instant::now();
    closed(&mut peer).await;
    assert!(begun.elapsed() > Duration::from_millis(1900), "{:?}", begun.elapsed());
    scrape_until(server.admin, |page| page.value("connections_open", &[]) == 0.0).await;
    assert_eq!(server.scrape().await.sum("connections_refused_total", &[]), 0.0);
}

#[tokio::test]
async fn a_drain_waits_for_no_body_longer_than_that() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut peer = connect(server.api).await;
    let head = b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 300000\r\n\r\n";
    peer.write_all(head).await.unwrap();
    assert!(response(&mut peer).await.starts_with("http/1.1 404 "));
    assert_eq!(server.terminate().await, Some(0));
    let mut rest = Vec::new();
    let _ = timeout(PATIENCE, peer.read_to_end(&mut rest)).await.expect("it is closed");
}

#[tokio::test]
async fn what_the_http_layer_refuses_by_itself_is_counted() {
    let server = Process::start("sqlite::memory:", &[]).await;
    for request in [&b"GET /product\r\n\r\n"[..], b"G\x01T / HTTP/1.1\r\nhost: x\r\n\r\n"] {
        assert!(exchange(server.api, request).await.starts_with("HTTP/1.1 400 "));
    }
    let long = format!("GET /product HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "x".repeat(100_000));
    let mut peer = connect(server.api).await;
    // The rest of it may meet a reset.
    let _ = peer.write_all(long.as_bytes()).await;
    closed(&mut peer).await;
    let aborted = |reason: &str| format!("reason=\"{reason}\"");
    scrape_until(server.admin, |page| {
        page.value("connections_aborted_total", &[&aborted("bad_request")]) == 2.0
            && page.value("connections_aborted_total", &[&aborted("head_too_large")]) == 1.0
    })
    .await;
    // Frames that break HTTP/2: DATA on a stream that was never opened.
    let mut peer = connect(server.api).await;
    let data = [crate::peers::PREFACE, crate::peers::SETTINGS, b"\0\0\x01\0\0\0\0\0\x01x"].concat();
    peer.write_all(&data).await.unwrap();
    closed(&mut peer).await;
    scrape_until(server.admin, |page| {
        page.value("connections_aborted_total", &[&aborted("protocol_error")]) == 1.0
    })
    .await;
    // A header block that is far over the limit.
    let mut client = with_window(server.api, 65_535).await;
    let request = http::Request::get("http://x/product").header("x", "x".repeat(70_000));
    let (answer, _) = client.send_request(request.body(()).unwrap(), true).unwrap();
    timeout(PATIENCE, answer).await.expect("the connection ends").unwrap_err();
    scrape_until(server.admin, |page| {
        page.value("connections_aborted_total", &[&aborted("enhance_your_calm")]) == 1.0
    })
    .await;
    // A peer that just goes is no abort.
    drop(connect(server.api).await);
    let mut peer = connect(server.api).await;
    get(&mut peer).await;
    drop(peer);
    let page = scrape_until(server.admin, |page| page.value("connections_open", &[]) == 0.0).await;
    assert_eq!(page.sum("connections_aborted_total", &[]), 5.0);
}

#[tokio::test]
async fn problems_of_the_host_name_what_was_expected() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let answer = exchange(server.api, b"GET /product HTTP/1.1\r\nconnection: close\r\n\r\n").await;
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let problem: Value = serde_json::from_str(body).unwrap();
    assert_eq!(problem["type"], "urn:orders:problem:bad-host");
    assert_eq!(problem["detail"], "no Host given, expected exactly one host name");
}
