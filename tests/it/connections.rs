//! Connections of every kind of peer: silent, slow, too many, too old, and those that do not read.

use std::time::Duration;

use order_service::proto::PlaceRequest;
use prost::Message as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{interval, timeout},
};

use crate::support::{PATIENCE, Process, scrape_until};

const GET: &[u8] = b"GET /product HTTP/1.1\r\nhost: x\r\n\r\n";

async fn connect(server: &Process) -> TcpStream {
    TcpStream::connect(server.api).await.unwrap()
}

/// Waits for the end of a connection.
async fn closed(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    let ended = timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
    // A reset is an end, too.
    let _ = ended.expect("the server closes the connection");
}

/// Reads one response with a body of a declared length; returns its head.
async fn response(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    stream.read_exact(&mut body).await.unwrap();
    head
}

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
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    for bytes in [&b""[..], b"G", &preface[..10], preface, &GET[..30]] {
        let mut peer = connect(&server).await;
        peer.write_all(bytes).await.unwrap();
        closed(&mut peer).await;
    }
    refused(&server, "read_timeout", 5.0).await;
}

#[tokio::test]
async fn a_head_that_trickles_is_cut_off_on_a_used_connection_too() {
    let server = Process::start("sqlite::memory:", &["--read-timeout", "300ms"]).await;
    for used in [false, true] {
        let mut peer = connect(&server).await;
        if used {
            peer.write_all(GET).await.unwrap();
            assert!(response(&mut peer).await.starts_with("http/1.1 200"));
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
    let server = Process::start("sqlite::memory:", &["--read-timeout", "100ms"]).await;
    let mut peer = connect(&server).await;
    for _ in 0..3 {
        peer.write_all(GET).await.unwrap();
        let head = response(&mut peer).await;
        assert!(head.starts_with("http/1.1 200") && !head.contains("connection: close"), "{head}");
        // It stays silent for longer than a head may take.
        timeout(Duration::from_millis(300), peer.read_u8()).await.unwrap_err();
    }
}

#[tokio::test]
async fn connections_over_the_limit_are_closed_at_once() {
    let server = Process::start("sqlite::memory:", &["--max-connections", "2"]).await;
    let (mut one, mut two) = (connect(&server).await, connect(&server).await);
    for peer in [&mut one, &mut two] {
        peer.write_all(GET).await.unwrap();
        response(peer).await;
    }
    closed(&mut connect(&server).await).await;
    drop(one);
    scrape_until(server.admin, |page| page.value("connections_open", &[]) == 1.0).await;
    let mut three = connect(&server).await;
    three.write_all(GET).await.unwrap();
    assert!(response(&mut three).await.starts_with("http/1.1 200"));
    let page = server.scrape().await;
    assert_eq!(page.value("connections_refused_total", &["reason=\"limit\""]), 1.0);
    assert_eq!(page.value("connections_accepted_total", &[]), 4.0);
}

#[tokio::test]
async fn an_old_http_1_connection_ends_with_a_response() {
    let server = Process::start("sqlite::memory:", &["--max-connection-age", "300ms"]).await;
    let mut peer = connect(&server).await;
    let mut responses = 0;
    loop {
        peer.write_all(GET).await.unwrap();
        let head = response(&mut peer).await;
        assert!(head.starts_with("http/1.1 200"));
        responses += 1;
        if head.contains("connection: close") {
            break;
        }
    }
    assert!(responses > 1);
    closed(&mut peer).await;
    // An idle one is not closed under its client's feet, but told with its next response.
    let mut idle = connect(&server).await;
    idle.write_all(GET).await.unwrap();
    response(&mut idle).await;
    timeout(Duration::from_millis(700), idle.read_u8()).await.unwrap_err();
    idle.write_all(GET).await.unwrap();
    assert!(response(&mut idle).await.contains("connection: close"));
}

/// A gRPC request for `Place`, and its body.
fn place() -> (http::Request<()>, bytes::Bytes) {
    let message = PlaceRequest { product_id: "book".into(), ..Default::default() };
    let mut body = vec![0; 5];
    body[4] = message.encoded_len().try_into().unwrap();
    message.encode(&mut body).unwrap();
    let request = http::Request::post("http://x/orders.v1.OrderService/Place");
    let request = request.header("content-type", "application/grpc").header("te", "trailers");
    (request.body(()).unwrap(), body.into())
}

#[tokio::test]
async fn an_old_http_2_connection_finishes_its_calls_and_goes() {
    let args = ["--max-connection-age", "200ms", "--processing-delay", "1s"];
    let server = Process::start("sqlite::memory:", &args).await;
    let (mut client, connection) = h2::client::handshake(connect(&server).await).await.unwrap();
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

#[tokio::test]
async fn peers_that_do_not_read_free_their_permits_at_the_time_limit() {
    let args = ["--max-in-flight", "64", "--request-timeout", "3s"];
    let server = Process::start("sqlite::memory:", &args).await;
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(0);
    let handshake = builder.handshake::<_, bytes::Bytes>(connect(&server).await);
    let (client, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let mut calls = Vec::new();
    for _ in 0..64 {
        let (request, body) = place();
        let (answer, mut stream) = client.send_request(request, false).unwrap();
        stream.send_data(body, true).unwrap();
        calls.push(answer);
        client = client.ready().await.unwrap();
    }
    // Their orders are placed and their heads answered, but nobody reads.
    scrape_until(server.admin, |page| page.value("product_order_total", &[]) == 64.0).await;
    let status = server.grpc().await.place(PlaceRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::ResourceExhausted);

    let freed = scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 0.0).await;
    let cancelled = ["grpc_method=\"Place\"", "grpc_code=\"Canceled\""];
    assert_eq!(freed.value("grpc_server_handled_total", &cancelled), 64.0);
    let order = PlaceRequest { product_id: "book".into(), ..Default::default() };
    server.grpc().await.place(order).await.unwrap();
    for answer in calls {
        let mut body = answer.await.unwrap().into_body();
        assert!(body.data().await.unwrap().unwrap_err().is_reset());
    }
}

#[tokio::test]
async fn a_flood_of_resets_ends_its_connection_and_harms_no_other() {
    let server = Process::start("sqlite::memory:", &["--processing-delay", "10s"]).await;
    let (client, connection) = h2::client::handshake::<_>(connect(&server).await).await.unwrap();
    let connection = tokio::spawn(connection);
    let flood = async move {
        let mut client = client;
        for _ in 0..100_000 {
            let Ok(ready) = client.ready().await else { return };
            client = ready;
            let (request, _) = place();
            let Ok((answer, mut stream)) = client.send_request(request, false) else { return };
            stream.send_reset(h2::Reason::CANCEL);
            drop(answer);
        }
    };
    flood.await;
    // It is told ENHANCE_YOUR_CALM, or it ended by itself with nothing left behind.
    let _ = timeout(PATIENCE, connection).await.expect("it ends");
    let list = order_service::proto::ListRequest::default();
    server.grpc().await.list(list).await.unwrap();
    let page = scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 0.0).await;
    assert!(page.value("process_resident_memory_bytes", &[]) < 200e6);
}

#[tokio::test]
async fn two_thousand_idle_connections_cost_little() {
    let server = Process::start("sqlite::memory:", &["--read-timeout", "60s"]).await;
    let memory = |page: &crate::support::Page| page.value("process_resident_memory_bytes", &[]);
    let before = memory(&server.scrape().await);
    let mut idle = Vec::new();
    for _ in 0..2000 {
        idle.push(connect(&server).await);
    }
    let open =
        scrape_until(server.admin, |page| page.value("connections_open", &[]) == 2000.0).await;
    let each = (memory(&open) - before) / 2000.0;
    println!(
        "2000 idle connections: {:.1} MB, {each:.0} bytes each",
        (memory(&open) - before) / 1e6
    );
    assert!(each < 64.0 * 1024.0, "{each}");
    server.grpc().await.list(order_service::proto::ListRequest::default()).await.unwrap();
}
