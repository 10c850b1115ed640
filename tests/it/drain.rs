//! The end of a process, whatever its peers do.

use order_service::proto::PlaceRequest;
use rustix::process::Signal;
use tokio::{io::AsyncWriteExt as _, net::TcpStream};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::support::{Process, channel, scrape_until};

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
async fn during_the_drain_delay_new_connections_are_served_and_told_to_close() {
    let mut server = Process::start("sqlite::memory:", &["--drain-delay", "2s"]).await;
    server.signal(Signal::TERM);
    server.logged("draining: no longer ready").await;
    let response = reqwest::get(server.url("/product")).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["connection"]),
        (200, &"close".parse().unwrap())
    );
    server.grpc().await.place(place()).await.unwrap();
    assert_eq!(server.exited().await.code(), Some(0));
}
