//! Connections of every kind of peer: silent, slow, too many, too old, and those that do not read.

use std::time::Duration;

use axum::{Router, routing::get as route};
use order_service::{
    listener::{self, KEEP_ALIVE, Limits, MAX_STREAMS, OVERTIME, Phase, Shutdown},
    metrics::ConnectionMetrics,
    proto::ListRequest,
    workers::Workers,
};
use rustix::process::{Resource, Rlimit, prlimit};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    time::{interval, sleep, timeout},
};

use crate::{
    peers::{
        DATA, GET, GET_FRAME, GOAWAY, HEADERS, PREFACE, RST_STREAM, SETTINGS, call, closed,
        connect, frame, frames, get, place, response, silent_for, with_window,
    },
    support::{PATIENCE, Page, Process, scrape_until},
};

async fn refused(server: &Process, reason: &str, count: f64) {
    let label = format!("reason=\"{reason}\"");
    scrape_until(server.admin, |page| {
        page.value("connections_refused_total", &[&label]) == count
            && page.value("connections_open", &[]) == 0.0
    })
    .await;
}

#[tokio::test]
async fn peers_without_a_first_request_are_closed() {
    let server = Process::start("sqlite::memory:", &["--read-timeout", "300ms"]).await;
    let http2 = [PREFACE, SETTINGS].concat();
    for bytes in [&b""[..], b"G", b"P", &PREFACE[..10], PREFACE, &http2, &GET[..30]] {
        let mut peer = connect(server.api).await;
        peer.write_all(bytes).await.unwrap();
        closed(&mut peer).await;
    }
    refused(&server, "read_timeout", 7.0).await;
}

#[tokio::test]
async fn a_head_that_trickles_is_cut_off_on_a_used_connection_too() {
    let server = Process::start("sqlite::memory:", &["--read-timeout", "300ms"]).await;
    for used in [false, true] {
        let mut peer = connect(server.api).await;
        if used {
            assert!(get(&mut peer).await.starts_with("http/1.1 200"));
        }
        let (mut reader, mut writer) = peer.split();
        let trickle = async {
            let mut pace = interval(Duration::from_millis(50));
            for byte in std::iter::repeat(b'x') {
                pace.tick().await;
                if writer.write_all(&[byte]).await.is_err() {
                    return;
                }
            }
        };
        let mut rest = Vec::new();
        tokio::select! {
            () = trickle => {}
            ended = timeout(PATIENCE, reader.read_to_end(&mut rest)) => {
                let _ = ended.expect("the server closes the connection");
            }
        }
    }
    refused(&server, "read_timeout", 2.0).await;
}

#[tokio::test]
async fn an_idle_connection_is_kept() {
    let server = Process::start("sqlite::memory:", &["--read-timeout", "500ms"]).await;
    let mut peer = connect(server.api).await;
    for _ in 0..3 {
        let head = get(&mut peer).await;
        assert!(head.starts_with("http/1.1 200") && !head.contains("connection: close"), "{head}");
        // It stays silent for longer than a head may take.
        silent_for(&mut peer, Duration::from_millis(900)).await;
    }
}

#[tokio::test]
async fn connections_over_the_limit_are_closed_at_once() {
    let server = Process::start("sqlite::memory:", &["--max-connections", "2"]).await;
    let (mut one, mut two) = (connect(server.api).await, connect(server.api).await);
    for peer in [&mut one, &mut two] {
        get(peer).await;
    }
    closed(&mut connect(server.api).await).await;
    drop(one);
    scrape_until(server.admin, |page| page.value("connections_open", &[]) == 1.0).await;
    let mut three = connect(server.api).await;
    assert!(get(&mut three).await.starts_with("http/1.1 200"));
    let page = server.scrape().await;
    assert_eq!(page.value("connections_refused_total", &["reason=\"limit\""]), 1.0);
    assert_eq!(page.value("connections_accepted_total", &[]), 4.0);
}

/// A gRPC client that connects early and calls late must not lose its first call to the time limit.
#[tokio::test]
async fn an_http_2_peer_without_a_first_request_is_told_to_go_and_its_late_request_is_served() {
    let server = Process::start("sqlite::memory:", &["--read-timeout", "300ms"]).await;
    let mut peer = connect(server.api).await;
    peer.write_all(&[PREFACE, SETTINGS].concat()).await.unwrap();
    while frame(&mut peer).await.unwrap() != GOAWAY {}
    // The request crosses the GOAWAY.
    peer.write_all(GET_FRAME).await.unwrap();
    let types = frames(&mut peer).await;
    assert!(types.contains(&HEADERS) && types.contains(&DATA), "{types:?}");
    refused(&server, "read_timeout", 1.0).await;
    assert_eq!(server.scrape().await.value("product_order_total", &[]), 1.0);
}

#[tokio::test]
async fn streams_beyond_256_on_a_connection_are_refused_and_the_others_go_on() {
    let args = ["--processing-delay", "60s", "--request-timeout", "60s"];
    let server = Process::start("sqlite::memory:", &args).await;
    let mut peer = connect(server.api).await;
    let mut bytes = [PREFACE, SETTINGS].concat();
    for stream in 0..300_u32 {
        let id = (2 * stream + 1).to_be_bytes();
        bytes.extend([&GET_FRAME[..5], &id, &GET_FRAME[9..]].concat());
    }
    peer.write_all(&bytes).await.unwrap();
    let mut refused = 0;
    while refused < 300 - 256 {
        let kind = frame(&mut peer).await.expect("the connection stays");
        assert!(kind != GOAWAY && kind != HEADERS, "{kind}");
        refused += u32::from(kind == RST_STREAM);
    }
    scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 256.0).await;
}

#[tokio::test]
async fn without_descriptors_the_server_waits_idly_and_recovers() {
    let mut server = Process::start("sqlite::memory:", &[]).await;
    let mut old = connect(server.api).await;
    get(&mut old).await;
    let open = std::fs::read_dir(format!("/proc/{}/fd", server.id())).unwrap().count();
    let limit = Some(u64::try_from(open).unwrap() + 8);
    prlimit(Some(server.pid()), Resource::Nofile, Rlimit { current: limit, maximum: limit })
        .unwrap();

    let mut waiting = Vec::new();
    for _ in 0..40 {
        waiting.push(connect(server.api).await);
    }
    server.logged("no connection can be accepted; trying again").await;
    let before = cpu_ticks(server.id());
    // The length of the fault.
    sleep(Duration::from_secs(2)).await;
    let used = cpu_ticks(server.id()) - before;
    assert!(used < 40, "{used} of the 200 hundredths of a second that the fault took");
    // Who is connected is served.
    assert!(get(&mut old).await.starts_with("http/1.1 200"));

    // Whoever waited is served once there is room.
    let mut last = waiting.pop().unwrap();
    drop(waiting);
    let head = timeout(PATIENCE, get(&mut last)).await.expect("the server recovers");
    assert!(head.starts_with("http/1.1 200"));
    let told = server.log().into_iter().filter(|line| line["level"] == "ERROR").count();
    assert_eq!(told, 1, "{:?}", server.log());
    assert_eq!(server.terminate().await, Some(0));
}

/// User and system time of a process, in hundredths of a second.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, after_name) = stat.rsplit_once(") ").unwrap();
    let fields: Vec<_> = after_name.split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// On one thread nothing accepts between the connections of these clients and the close.
#[tokio::test]
async fn connections_that_wait_in_the_backlog_at_the_close_are_served() {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let mut waiting = Vec::new();
    for _ in 0..100 {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        std::io::Write::write_all(&mut stream, GET).unwrap();
        stream.set_nonblocking(true).unwrap();
        waiting.push(tokio::net::TcpStream::from_std(stream).unwrap());
    }
    let (phase, shutdown) = Shutdown::new();
    phase.send_replace(Phase::Stopping);
    let limits = Limits {
        max_connections: 1000,
        evicts_idle: false,
        read_timeout: PATIENCE,
        max_age: None,
        overtime: OVERTIME,
        max_idle: None,
        keep_alive: KEEP_ALIVE,
        max_streams: MAX_STREAMS,
    };
    let routes = Router::new().route("/product", route(async || "served"));
    let metrics = ConnectionMetrics::new().unwrap();
    let serving = tokio::spawn(listener::serve(
        socket,
        Workers::here(),
        None,
        routes,
        limits,
        metrics,
        shutdown,
    ));
    for stream in &mut waiting {
        let head = timeout(PATIENCE, response(stream)).await.unwrap();
        assert!(head.starts_with("http/1.1 200") && head.contains("connection: close"), "{head}");
    }
    timeout(PATIENCE, serving).await.expect("the listener ends").unwrap();
    std::net::TcpStream::connect(address).unwrap_err();
}

#[tokio::test]
async fn two_thousand_idle_connections_cost_little() {
    rlimit::increase_nofile_limit(8192).unwrap();
    let server = Process::start("sqlite::memory:", &["--read-timeout", "60s"]).await;
    let memory = |page: &Page| page.value("process_resident_memory_bytes", &[]);
    let before = memory(&server.scrape().await);
    // A third each that never spoke, that were used over HTTP/1, and over HTTP/2.
    let (mut idle, mut used) = (Vec::new(), Vec::new());
    for i in 0..2000 {
        if i % 3 == 2 {
            let mut client = with_window(server.api, 65_535).await;
            let answer = call(&mut client, place()).await;
            assert_eq!(answer.await.unwrap().status(), 200);
            used.push(client);
        } else {
            let mut stream = connect(server.api).await;
            if i % 3 == 1 {
                get(&mut stream).await;
            }
            idle.push(stream);
        }
    }
    let page = scrape_until(server.admin, |page| {
        page.value("connections_open", &[]) == 2000.0 && page.sum("requests_in_flight", &[]) == 0.0
    })
    .await;
    let more = memory(&page) - before;
    println!("2000 idle connections: {:.1} MB more, {:.0} bytes each", more / 1e6, more / 2000.0);
    assert!(more < 2000.0 * 48.0 * 1024.0, "{more}");
    server.grpc().await.list(ListRequest::default()).await.unwrap();
}
