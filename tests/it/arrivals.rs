//! Requests that do not arrive whole, and connections that take more than their part.

use bytes::Bytes;
use http::Request;
use order_service::proto::{PlaceRequest, PlaceResponse};
use tokio::{io::AsyncWriteExt as _, task::JoinSet, time::timeout};
use tonic::{Code, Status};

use crate::{
    in_process::place,
    peers::{connect, grpc, response, with_window},
    support::{PATIENCE, Process, framed, scrape_until},
};

const PLACE: &str = "/orders.v1.OrderService/Place";

/// The HEADERS of a call without its message.
fn head() -> Request<()> {
    grpc(PLACE, &place("book")).0
}

async fn placed(server: &Process) -> Result<PlaceResponse, Status> {
    let mut grpc = server.grpc().await;
    let order = PlaceRequest { product_id: "book".into(), ..Default::default() };
    grpc.place(order).await.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn requests_without_their_body_take_no_permit() {
    let args = ["--max-in-flight", "8", "--request-timeout", "120s"];
    let server = Process::start("sqlite::memory:", &args).await;
    let (mut clients, mut streams) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let mut client = with_window(server.api, 65_535).await;
        for _ in 0..256 {
            client = client.ready().await.unwrap();
            streams.push(client.send_request(head(), false).unwrap());
        }
        clients.push(client);
    }
    let mut slow = connect(server.api).await;
    let head = "POST /product HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                content-length: 21\r\n\r\n{\"product_id\":";
    slow.write_all(head.as_bytes()).await.unwrap();
    scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 1281.0).await;
    for _ in 0..50 {
        placed(&server).await.unwrap();
        let answer = reqwest::get(server.url("/product")).await.unwrap();
        assert_eq!(answer.status(), 200);
    }
    // Each is served once it is whole.
    slow.write_all(b"\"book\"}").await.unwrap();
    assert!(timeout(PATIENCE, response(&mut slow)).await.unwrap().starts_with("http/1.1 201 "));
    let (answer, mut stream) = streams.pop().unwrap();
    stream.send_data(Bytes::from(framed(&place("book"))), true).unwrap();
    let mut body = timeout(PATIENCE, answer).await.unwrap().unwrap().into_body();
    while body.data().await.is_some() {}
    assert_eq!(body.trailers().await.unwrap().unwrap()["grpc-status"], "0");
    let page = server.scrape().await;
    assert_eq!(page.value("product_order_total", &[]), 102.0);
    assert_eq!(page.sum("requests_shed_total", &[]), 0.0);
}

#[tokio::test]
async fn while_others_ask_a_connection_gets_a_quarter_of_the_permits() {
    let args = ["--max-in-flight", "40", "--processing-delay", "500ms"];
    let server = Process::start("sqlite::memory:", &args).await;
    // The other one, which asks for as long as the test lasts.
    let mut polite = server.grpc().await;
    let asking = tokio::spawn(async move {
        for _ in 0..10 {
            polite.place(place("polite")).await?;
        }
        Ok::<_, Status>(())
    });
    scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 1.0).await;
    let greedy = server.grpc().await;
    let mut calls = JoinSet::new();
    for _ in 0..200 {
        let mut greedy = greedy.clone();
        calls.spawn(async move { greedy.place(place("greedy")).await });
    }
    let results = timeout(PATIENCE, calls.join_all()).await.unwrap();
    let placed = results.iter().filter(|result| result.is_ok()).count();
    assert_eq!(placed, 10);
    for status in results.into_iter().filter_map(Result::err) {
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    }
    asking.await.unwrap().expect("the other connection loses no call");
}

#[tokio::test]
async fn a_connection_alone_may_take_every_permit() {
    let args = ["--max-in-flight", "40", "--processing-delay", "500ms"];
    let server = Process::start("sqlite::memory:", &args).await;
    let grpc = server.grpc().await;
    let mut calls = JoinSet::new();
    for _ in 0..100 {
        let mut grpc = grpc.clone();
        calls.spawn(async move { grpc.place(place("book")).await });
    }
    let results = timeout(PATIENCE, calls.join_all()).await.unwrap();
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 40);
}

#[tokio::test]
async fn a_caller_that_goes_before_its_request_is_whole_has_cancelled_it() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let canceled = ["grpc_method=\"Place\"", "grpc_code=\"Canceled\""];
    let mut client = with_window(server.api, 65_535).await;
    // With nothing of its message, and with a part of it.
    for part in [&b""[..], b"\0\0\0\0", &framed(&place("book"))[..6]] {
        client = client.ready().await.unwrap();
        let (_answer, mut stream) = client.send_request(head(), false).unwrap();
        if !part.is_empty() {
            stream.send_data(Bytes::copy_from_slice(part), false).unwrap();
        }
        scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 1.0).await;
        stream.send_reset(h2::Reason::CANCEL);
        scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 0.0).await;
    }
    let page = server.scrape().await;
    assert_eq!(page.value("grpc_server_handled_total", &canceled), 3.0);

    // By the end of its connection.
    let mut peer = connect(server.api).await;
    let mut h2 = h2::client::handshake(connect(server.api).await).await.unwrap();
    let (_answer, _stream) = h2.0.send_request(head(), false).unwrap();
    let connection = tokio::spawn(h2.1);
    let request = "POST /product HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                   content-length: 21\r\n\r\n{\"product_id\":";
    peer.write_all(request.as_bytes()).await.unwrap();
    scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 2.0).await;
    connection.abort();
    drop(peer);
    let page = scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 0.0).await;
    assert_eq!(page.value("grpc_server_handled_total", &canceled), 4.0);
    let post = ["url=\"/product\"", "method=\"POST\"", "code=\"499\""];
    assert_eq!(page.value("http_requests_total_with_path", &post), 1.0);
    assert_eq!(page.sum("requests_malformed_total", &[]), 0.0);
}

/// Its caller neither left nor waited for the service: no failure of the service's is recorded.
#[tokio::test]
async fn a_request_that_does_not_arrive_by_its_deadline_is_its_callers_fault() {
    let server = Process::start("sqlite::memory:", &["--request-timeout", "300ms"]).await;
    let mut client = with_window(server.api, 65_535).await;
    let (answer, _stream) = client.send_request(head(), false).unwrap();
    let answer = timeout(PATIENCE, answer).await.unwrap().unwrap();
    assert_eq!(answer.headers()["grpc-status"], "4");
    let mut peer = connect(server.api).await;
    let request = "POST /product HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                   transfer-encoding: chunked\r\n\r\n4\r\n{\"pr\r\n";
    peer.write_all(request.as_bytes()).await.unwrap();
    assert!(timeout(PATIENCE, response(&mut peer)).await.unwrap().starts_with("http/1.1 408 "));
    let page = scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 0.0).await;
    for protocol in ["protocol=\"grpc\"", "protocol=\"http\""] {
        assert_eq!(page.value("requests_malformed_total", &[protocol]), 1.0, "{protocol}");
    }
    let handled = ["grpc_method=\"Place\"", "grpc_code=\"DeadlineExceeded\""];
    assert_eq!(page.value("grpc_server_handled_total", &handled), 1.0);
    assert_eq!(page.sum("http_requests_total_with_path", &["code=\"504\""]), 0.0);
}

#[tokio::test]
async fn the_end_of_the_drain_cuts_off_what_has_not_arrived_and_says_so() {
    let server = Process::start("sqlite::memory:", &["--drain-timeout", "500ms"]).await;
    let mut client = with_window(server.api, 65_535).await;
    let (_answer, _stream) = client.send_request(head(), false).unwrap();
    scrape_until(server.admin, |page| page.sum("requests_in_flight", &[]) == 1.0).await;
    assert_eq!(server.terminate().await, Some(3));
}
