//! The age of connections, and peers that answer no frame.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use axum::{Extension, Router, routing::get as route};
use order_service::{
    listener::{
        self, Ending, KEEP_ALIVE, KeepAlive, Limits, MAX_STREAMS, OVERTIME, Phase, Shutdown,
    },
    metrics::ConnectionMetrics,
    workers::Workers,
};
use tokio::{
    io::AsyncWriteExt as _,
    net::TcpListener,
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};

use crate::{
    peers::{
        DATA, GOAWAY, PING, closed, connect, frame, frames, get, place, response, silent_for,
        unacknowledging, with_window,
    },
    support::{PATIENCE, Process},
};

#[tokio::test]
async fn an_old_http_1_connection_ends_with_a_response() {
    let server = Process::start("sqlite::memory:", &["--max-connection-age", "1s"]).await;
    let mut peer = connect(server.api).await;
    let mut responses = 0;
    loop {
        let head = get(&mut peer).await;
        assert!(head.starts_with("http/1.1 200"));
        responses += 1;
        if head.contains("connection: close") {
            break;
        }
    }
    assert!(responses > 1);
    closed(&mut peer).await;
    // An idle one is not closed under its client's feet, but told with its next response.
    let mut idle = connect(server.api).await;
    get(&mut idle).await;
    silent_for(&mut idle, Duration::from_millis(1500)).await;
    assert!(get(&mut idle).await.contains("connection: close"));
}

#[tokio::test]
async fn an_old_http_2_connection_finishes_its_calls_and_goes() {
    let args = ["--max-connection-age", "200ms", "--processing-delay", "1s"];
    let server = Process::start("sqlite::memory:", &args).await;
    let (mut client, connection) = h2::client::handshake(connect(server.api).await).await.unwrap();
    let connection = tokio::spawn(connection);
    let (request, body) = place();
    let (answer, mut stream) = client.send_request(request, false).unwrap();
    stream.send_data(body, true).unwrap();
    let mut body = answer.await.unwrap().into_body();
    while let Some(data) = body.data().await {
        let length = data.unwrap().len();
        body.flow_control().release_capacity(length).unwrap();
    }
    assert_eq!(body.trailers().await.unwrap().unwrap()["grpc-status"], "0");
    // GOAWAY without an error, though the client still holds its end.
    timeout(PATIENCE, connection).await.unwrap().unwrap().unwrap();
    assert!(futures_util::future::poll_fn(|cx| client.poll_ready(cx)).await.is_err());
}

/// It would be cut off with the connection 30 s after its age.
#[tokio::test]
async fn a_call_may_take_its_time_however_old_its_connection_grows() {
    let args = ["--max-connection-age", "10ms", "--processing-delay", "32s"];
    let args = [&args[..], &["--request-timeout", "60s"]].concat();
    let server = Process::start("sqlite::memory:", &args).await;
    let head = get(&mut connect(server.api).await).await;
    assert!(head.starts_with("http/1.1 200") && head.contains("connection: close"), "{head}");
}

/// When each of twenty HTTP/2 connections is told to go, after `begun`.
async fn goaways(api: SocketAddr, mut peers: Vec<tokio::net::TcpStream>) -> Vec<Duration> {
    let begun = Instant::now();
    for _ in peers.len()..20 {
        peers.push(unacknowledging(api).await);
    }
    let mut told = JoinSet::new();
    for mut peer in peers {
        told.spawn(async move {
            while frame(&mut peer).await.expect("GOAWAY comes before the end") != GOAWAY {}
            begun.elapsed()
        });
    }
    let mut told = told.join_all().await;
    told.sort();
    told
}

#[tokio::test]
async fn each_connection_has_an_age_of_its_own_within_ten_percent() {
    let server = Process::start("sqlite::memory:", &["--max-connection-age", "3s"]).await;
    let told = goaways(server.api, Vec::new()).await;
    assert!(told[0] >= Duration::from_millis(2700), "{told:?}");
    // Twenty ages at random from 600 ms are within 100 ms of each other once in 10¹³ times.
    assert!(told[19] - told[0] > Duration::from_millis(100), "{told:?}");
}

#[tokio::test]
async fn the_drain_delay_spreads_the_goaways() {
    let server = Process::start("sqlite::memory:", &["--drain-delay", "4s"]).await;
    let mut peers = Vec::new();
    for _ in 0..20 {
        let mut peer = unacknowledging(server.api).await;
        // Until the request was answered, so that all of them are HTTP/2 to the server.
        while frame(&mut peer).await.unwrap() != DATA {}
        peers.push(peer);
    }
    server.signal(rustix::process::Signal::TERM);
    let told = goaways(server.api, peers).await;
    // All in one half of the time would be chance once in 500 000 times.
    let half = Duration::from_secs(2);
    assert!(told[0] < half && told[19] > half, "{told:?}");
    assert_eq!(server.ended().await, Some(0));
}

/// A listener alone, with shorter limits than the program has flags for.
struct Listening {
    api: SocketAddr,
    _phase: watch::Sender<Phase>,
    _serving: JoinHandle<()>,
}

impl Listening {
    async fn start(limits: Limits) -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let api = socket.local_addr().unwrap();
        let routes = Router::new()
            .route("/product", route(async || "served"))
            .route("/hang", route(std::future::pending::<()>))
            .route("/slow", route(slow));
        let metrics = ConnectionMetrics::new().unwrap();
        let (phase, shutdown) = Shutdown::new();
        let serving =
            listener::serve(socket, Workers::here(), None, routes, limits, metrics, shutdown);
        Self { api, _phase: phase, _serving: tokio::spawn(serving) }
    }
}

/// Takes its time, and has a limit of its own, as all requests of the program have.
async fn slow(Extension(ending): Extension<Ending>) -> &'static str {
    ending.set_response_limit(tokio::time::Instant::now() + PATIENCE);
    sleep(Duration::from_millis(1500)).await;
    "served"
}

const LIMITS: Limits = Limits {
    max_connections: 100,
    evicts_idle: false,
    read_timeout: PATIENCE,
    max_age: None,
    overtime: OVERTIME,
    max_idle: None,
    keep_alive: KEEP_ALIVE,
    max_streams: MAX_STREAMS,
};

#[tokio::test]
async fn a_peer_that_answers_no_ping_is_closed_and_one_that_does_is_kept() {
    let soon = Duration::from_millis(300);
    let keep_alive = KeepAlive { interval: soon, timeout: Duration::from_secs(3) };
    let server = Listening::start(Limits { keep_alive, ..LIMITS }).await;
    let mut answering = with_window(server.api, 65_535).await;
    let request = || http::Request::get("http://x/product").body(()).unwrap();
    let (answer, _) = answering.send_request(request(), true).unwrap();
    assert_eq!(answer.await.unwrap().status(), 200);

    let mut silent = unacknowledging(server.api).await;
    let types = frames(&mut silent).await;
    assert!(types.contains(&PING), "{types:?}");

    let mut answering = answering.ready().await.unwrap();
    let (answer, _) = answering.send_request(request(), true).unwrap();
    assert_eq!(answer.await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_peer_that_acknowledges_nothing_goes_after_its_overtime() {
    let short = Duration::from_millis(300);
    let limits = Limits { max_age: Some(short), overtime: short, ..LIMITS };
    let server = Listening::start(limits).await;
    let mut peer = unacknowledging(server.api).await;
    assert!(frames(&mut peer).await.contains(&GOAWAY));
    // An HTTP/1 request that is never answered does not hold it either.
    let mut stuck = connect(server.api).await;
    let request = b"GET /hang HTTP/1.1\r\nhost: x\r\n\r\n";
    stuck.write_all(request).await.unwrap();
    closed(&mut stuck).await;
}

/// Its client cannot know that the connection is old before it is told.
#[tokio::test]
async fn a_request_on_an_old_http_1_connection_is_answered_however_old_and_an_idle_one_is_closed() {
    let (age, overtime) = (Duration::from_millis(300), Duration::from_millis(600));
    let limits = Limits { max_age: Some(age), overtime, ..LIMITS };
    let server = Listening::start(limits).await;
    let begun = Instant::now();
    let (mut early, mut late, mut idle) =
        (connect(server.api).await, connect(server.api).await, connect(server.api).await);
    let request = b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n";
    early.write_all(request).await.unwrap();
    for peer in [&mut late, &mut idle] {
        assert!(get(peer).await.starts_with("http/1.1 200"));
    }
    // The age of the connection.
    sleep(age * 2).await;
    late.write_all(request).await.unwrap();
    closed(&mut idle).await;
    assert!(begun.elapsed() >= (age + overtime).mul_f64(0.9), "{:?}", begun.elapsed());
    for peer in [&mut early, &mut late] {
        let head = timeout(PATIENCE, response(peer)).await.unwrap();
        assert!(head.starts_with("http/1.1 200") && head.contains("connection: close"), "{head}");
        closed(peer).await;
    }
}

#[tokio::test]
async fn a_peer_that_acknowledges_nothing_does_not_hold_the_drain() {
    let server = Process::start("sqlite::memory:", &["--drain-timeout", "50s"]).await;
    let mut peer = unacknowledging(server.api).await;
    while frame(&mut peer).await.unwrap() != DATA {}
    let begun = Instant::now();
    assert_eq!(server.terminate().await, Some(0));
    assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
    assert!(frames(&mut peer).await.contains(&GOAWAY));
}
