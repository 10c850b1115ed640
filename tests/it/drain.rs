//! The end of a process, whatever its peers do.

use std::time::Duration;

use order_service::proto::PlaceRequest;
use rustix::process::Signal;
use sqlx::Connection as _;
use tokio::{io::AsyncWriteExt as _, net::TcpStream, task::JoinSet};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    database::lock_file_in,
    peers::{self, call, closed, connect, get, with_window},
    support::{Process, channel, scrape_until},
};

fn place() -> PlaceRequest {
    PlaceRequest { product_id: "book".into(), ..Default::default() }
}

#[tokio::test]
async fn silent_and_stuck_peers_do_not_hold_the_end() {
    let server = Process::start("sqlite::memory:", &["--drain-timeout", "30s"]).await;
    let _silent = TcpStream::connect(server.api).await.unwrap();
    let mut half = TcpStream::connect(server.api).await.unwrap();
    half.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    // An HTTP/2 connection that answers nothing any more.
    let stream = TcpStream::connect(server.api).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    let mut connection = Box::pin(connection);
    let mut client = client;
    let request = http::Request::get("http://x/product").body(()).unwrap();
    let (answer, _) = client.send_request(request, true).unwrap();
    let mut answer = Box::pin(answer);
    tokio::select! { _ = &mut answer => {}, _ = &mut connection => panic!("it ended") }
    scrape_until(server.admin, |page| page.value("connections_open", &[]) == 3.0).await;
    let begun = std::time::Instant::now();
    assert_eq!(server.terminate().await, Some(0));
    // Far less than the drain may take, and than silent peers have to speak.
    assert!(begun.elapsed().as_secs() < 9, "{:?}", begun.elapsed());
    drop(connection);
}

#[tokio::test]
async fn requests_beyond_the_drain_timeout_are_cut_off_with_exit_3() {
    let args =
        ["--drain-timeout", "300ms", "--processing-delay", "50s", "--request-timeout", "60s"];
    let mut server = Process::start("sqlite::memory:", &args).await;
    let mut grpc = server.grpc().await;
    let stuck = tokio::spawn(async move { grpc.place(place()).await });
    scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 1.0).await;
    server.signal(Signal::TERM);
    assert_eq!(server.exited().await.code(), Some(3));
    stuck.await.unwrap().unwrap_err();
    let line = server.logged("draining: the time is up, requests are cut off").await;
    assert_eq!(line["requests"], 1);
}

#[tokio::test]
async fn each_connection_that_is_cut_off_is_told_with_its_peer() {
    let args =
        ["--drain-timeout", "300ms", "--processing-delay", "50s", "--request-timeout", "60s"];
    let mut server = Process::start("sqlite::memory:", &args).await;
    let mut peer = connect(server.api).await;
    peer.write_all(b"GET /product HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 1.0).await;
    server.signal(Signal::TERM);
    let line = server.logged("requests were cut off").await;
    assert_eq!(line["requests"], 1);
    assert_eq!(line["peer"], peer.local_addr().unwrap().to_string());
    assert_eq!(server.exited().await.code(), Some(3));
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let args = ["--processing-delay", "50s", "--request-timeout", "60s", "--drain-timeout", "60s"];
    let mut server = Process::start("sqlite::memory:", &args).await;
    let mut grpc = server.grpc().await;
    let stuck = tokio::spawn(async move { grpc.place(place()).await });
    scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 1.0).await;
    server.signal(Signal::TERM);
    server.logged("draining: stopped accepting").await;
    server.signal(Signal::INT);
    assert_eq!(server.exited().await.code(), Some(3));
    stuck.await.unwrap().unwrap_err();
}

#[tokio::test]
async fn health_watches_are_told_and_end() {
    let mut server = Process::start("sqlite::memory:", &["--drain-delay", "500ms"]).await;
    let mut health = HealthClient::new(channel(server.api).await);
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    let first = watch.message().await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::Serving);
    server.signal(Signal::TERM);
    let second = watch.message().await.unwrap().unwrap();
    assert_eq!(second.status(), ServingStatus::NotServing);
    assert_eq!(watch.message().await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(server.exited().await.code(), Some(0));
}

#[tokio::test]
async fn during_the_drain_delay_everyone_is_served_and_told_to_close() {
    let mut server = Process::start("sqlite::memory:", &["--drain-delay", "1h"]).await;
    let mut kept = Vec::new();
    for _ in 0..8 {
        let mut peer = connect(server.api).await;
        assert!(!get(&mut peer).await.contains("connection: close"));
        kept.push(peer);
    }
    server.signal(Signal::TERM);
    server.logged("draining: no longer ready").await;
    for peer in &mut kept {
        let head = get(peer).await;
        assert!(head.starts_with("http/1.1 200") && head.contains("connection: close"), "{head}");
        closed(peer).await;
    }
    let head = get(&mut connect(server.api).await).await;
    assert!(head.starts_with("http/1.1 200") && head.contains("connection: close"), "{head}");
    server.grpc().await.place(place()).await.unwrap();

    let mut health = HealthClient::new(channel(server.api).await);
    for service in ["", "orders.v1.OrderService"] {
        let request = HealthCheckRequest { service: service.into() };
        let status = health.check(request).await.unwrap().into_inner().status();
        assert_eq!(status, ServingStatus::NotServing);
    }
    for (path, status) in [("readyz", 503), ("livez", 200)] {
        let answer = reqwest::get(format!("http://{}/{path}", server.admin)).await.unwrap();
        assert_eq!(answer.status(), status);
    }
    // There is nothing left that the rest of the hour is for.
    server.signal(Signal::TERM);
    assert_eq!(server.exited().await.code(), Some(0));
}

/// An idle connection that is closed at once is closed under the request that its client is sending.
#[tokio::test]
async fn who_asks_again_within_a_second_is_told_before_the_connection_ends() {
    let mut server = Process::start("sqlite::memory:", &[]).await;
    let mut kept = connect(server.api).await;
    assert!(!get(&mut kept).await.contains("connection: close"));
    server.signal(Signal::TERM);
    server.logged("draining: stopped accepting").await;
    // The client's own pace.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let head = get(&mut kept).await;
    assert!(head.starts_with("http/1.1 200") && head.contains("connection: close"), "{head}");
    closed(&mut kept).await;
    assert_eq!(server.exited().await.code(), Some(0));
}

#[tokio::test]
async fn each_step_comes_in_its_order_and_is_logged() {
    let args = ["--drain-delay", "100ms", "--final-scrape-timeout", "60s", "--final-scrapes", "2"];
    let args = [&args[..], &["--request-timeout", "60s", "--drain-timeout", "60s"]].concat();
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start_in(dir.path(), &args).await;
    // The call is answered when this test wants it.
    let locked = lock_file_in(dir.path()).await;
    let mut grpc = server.grpc().await;
    let call = tokio::spawn(async move { grpc.place(place()).await });
    scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 1.0).await;
    server.signal(Signal::TERM);
    server.logged("draining: stopped accepting").await;
    TcpStream::connect(server.api).await.unwrap_err();
    // Scrapes that come before the flush do not count, however many.
    let early = server.scrape().await;
    server.scrape().await;
    assert_eq!(early.value("product_order_total", &[]), 0.0);
    locked.close().await.unwrap();
    call.await.unwrap().unwrap();
    server.logged("draining: waiting for the final scrape").await;
    let page = server.scrape().await;
    assert_eq!(page.value("product_order_total", &[]), 1.0);
    assert_eq!(page.sum("requests_in_flight", &[]), 0.0);
    // Two were asked for.
    server.scrape().await;
    assert_eq!(server.exited().await.code(), Some(0));
    let log = server.log();
    let messages = log.iter().map(|line| line["message"].as_str().unwrap());
    // The store may have noticed that it was kept waiting.
    let steps: Vec<_> = messages.filter(|message| !message.starts_with("the store ")).collect();
    let expected = [
        "serving",
        "draining: no longer ready",
        "draining: stopped accepting",
        "draining: every request is answered",
        "draining: every order is stored",
        "draining: waiting for the final scrape",
        "draining: the final scrape was answered",
        "drained",
    ];
    assert_eq!(steps, expected);
}

#[tokio::test]
async fn without_a_final_scrape_the_end_comes_all_the_same_and_says_so() {
    let mut server = Process::start("sqlite::memory:", &["--final-scrape-timeout", "300ms"]).await;
    server.signal(Signal::TERM);
    let line = server.logged("draining: no final scrape came; the last orders may go uncounted");
    assert_eq!(line.await["level"], "WARN");
    assert_eq!(server.exited().await.code(), Some(0));
}

#[tokio::test]
async fn a_stuck_stream_is_cut_off_with_exit_3_after_the_others_have_finished() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["--drain-timeout", "5s", "--request-timeout", "60s"];
    let mut server = Process::start_in(dir.path(), &args).await;
    // Its peer never reads the answer.
    let mut stuck = with_window(server.api, 0).await;
    let unread = call(&mut stuck, peers::place()).await;
    scrape_until(server.admin, |page| page.value("product_order_total", &[]) == 1.0).await;
    let locked = lock_file_in(dir.path()).await;
    let mut others = JoinSet::new();
    for _ in 0..20 {
        let mut grpc = server.grpc().await;
        others.spawn(async move { drop(grpc.place(place()).await.unwrap()) });
    }
    scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 21.0).await;
    server.signal(Signal::TERM);
    server.logged("draining: stopped accepting").await;
    locked.close().await.unwrap();
    others.join_all().await;
    let line = server.logged("draining: the time is up, requests are cut off").await;
    assert_eq!(line["requests"], 1);
    // And whose it was.
    let line = server.logged("requests were cut off").await;
    assert_eq!(line["requests"], 1);
    assert!(line["peer"].as_str().unwrap().starts_with("127.0.0.1:"));
    assert_eq!(server.exited().await.code(), Some(3));
    drop(unread);
}

#[tokio::test]
async fn a_watch_that_nobody_reads_does_not_hold_the_end() {
    let server = Process::start("sqlite::memory:", &["--drain-timeout", "50s"]).await;
    let mut client = with_window(server.api, 0).await;
    let request = peers::grpc("/grpc.health.v1.Health/Watch", &HealthCheckRequest::default());
    let watch = call(&mut client, request).await.await.unwrap();
    let begun = std::time::Instant::now();
    assert_eq!(server.terminate().await, Some(0));
    assert!(begun.elapsed().as_secs() < 40, "{:?}", begun.elapsed());
    drop(watch);
}

#[tokio::test]
async fn a_second_signal_that_cuts_nothing_off_exits_with_0() {
    let mut server = Process::start("sqlite::memory:", &["--drain-delay", "1h"]).await;
    server.signal(Signal::INT);
    server.logged("draining: no longer ready").await;
    server.signal(Signal::TERM);
    assert_eq!(server.exited().await.code(), Some(0));
}
