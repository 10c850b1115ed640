//! Connections with nothing in flight, which are ended as gently as old ones.

use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::{
    peers::{DATA, GOAWAY, closed, connect, frame, frames, get, silent_for, unacknowledging},
    support::{PATIENCE, Process, scrape_until},
};

const SHORT: [&str; 4] = ["--idle-timeout", "500ms", "--max-connection-age", "0s"];

#[tokio::test]
async fn an_idle_http_1_connection_learns_by_its_next_response_that_it_ends() {
    let server = Process::start("sqlite::memory:", &SHORT).await;
    let mut peer = connect(server.api).await;
    for _ in 0..5 {
        let head = get(&mut peer).await;
        assert!(head.starts_with("http/1.1 200") && !head.contains("connection: close"), "{head}");
    }
    // It is not closed under its client's feet.
    silent_for(&mut peer, Duration::from_millis(1500)).await;
    assert!(get(&mut peer).await.contains("connection: close"));
    closed(&mut peer).await;
}

#[tokio::test]
async fn an_idle_http_2_connection_is_asked_to_go() {
    let server = Process::start("sqlite::memory:", &SHORT).await;
    let mut peer = unacknowledging(server.api).await;
    while frame(&mut peer).await.unwrap() != DATA {}
    let begun = Instant::now();
    while frame(&mut peer).await.expect("GOAWAY comes before the end") != GOAWAY {}
    assert!(begun.elapsed() >= Duration::from_millis(400), "{:?}", begun.elapsed());
}

/// Half a minute after it was asked to go: without this, dead HTTP/1 clients hold every place.
#[tokio::test]
async fn an_idle_connection_whose_client_says_nothing_more_is_closed() {
    let server = Process::start("sqlite::memory:", &SHORT).await;
    let mut peers = Vec::new();
    for _ in 0..10 {
        let mut peer = connect(server.api).await;
        get(&mut peer).await;
        peers.push(peer);
    }
    for peer in &mut peers {
        closed(peer).await;
    }
    scrape_until(server.admin, |page| page.value("connections_open", &[]) == 0.0).await;
}

#[tokio::test]
async fn a_connection_with_a_call_in_flight_is_not_idle() {
    let args = [&SHORT[..], &["--processing-delay", "2s"]].concat();
    let server = Process::start("sqlite::memory:", &args).await;
    let mut http1 = connect(server.api).await;
    let head = timeout(PATIENCE, get(&mut http1)).await.unwrap();
    assert!(head.starts_with("http/1.1 200") && !head.contains("connection: close"), "{head}");
    let mut http2 = unacknowledging(server.api).await;
    let mut types = Vec::new();
    while !types.contains(&DATA) {
        types.push(frame(&mut http2).await.unwrap());
    }
    assert!(!types.contains(&GOAWAY), "{types:?}");
    assert!(frames(&mut http2).await.contains(&GOAWAY));
}

#[tokio::test]
async fn without_an_idle_timeout_and_an_age_a_connection_is_kept() {
    let args = ["--idle-timeout", "0s", "--max-connection-age", "0s"];
    let server = Process::start("sqlite::memory:", &args).await;
    let mut peer = connect(server.api).await;
    for _ in 0..2 {
        let head = get(&mut peer).await;
        assert!(!head.contains("connection: close"), "{head}");
        silent_for(&mut peer, Duration::from_millis(1200)).await;
    }
}
