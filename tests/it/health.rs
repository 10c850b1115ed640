//! Health and reflection: what they answer, and what they cost.

use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use rustix::process::Signal;
use tokio::{process::Command, time::timeout};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    peers::{grpc, with_window},
    support::{PATIENCE, Process, channel},
};

const CHECK: &str = "/grpc.health.v1.Health/Check";
const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";

fn of(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.to_owned() }
}

#[tokio::test]
async fn an_unknown_service_is_watched_as_unknown_on_a_stream_that_stays_open() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut health = HealthClient::new(channel(server.api).await);
    let mut unknown = health.watch(of("orders.v2.OrderService")).await.unwrap().into_inner();
    let first = unknown.message().await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::ServiceUnknown);
    timeout(Duration::from_millis(500), unknown.message()).await.unwrap_err();
    let status = health.check(of("orders.v2.OrderService")).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);

    for name in ["", "orders.v1.OrderService"] {
        let answer = health.check(of(name)).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving);
        let mut watch = health.watch(of(name)).await.unwrap().into_inner();
        assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
        timeout(Duration::from_millis(200), watch.message()).await.unwrap_err();
    }
}

#[tokio::test]
async fn watchers_learn_of_the_drain_before_their_stream_ends() {
    let server = Process::start("sqlite::memory:", &["--drain-delay", "500ms"]).await;
    let mut health = HealthClient::new(channel(server.api).await);
    let mut watch = health.watch(of("")).await.unwrap().into_inner();
    let mut unknown = health.watch(of("x")).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    server.signal(Signal::TERM);
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert_eq!(watch.message().await.unwrap_err().code(), Code::Unavailable);
    let first = unknown.message().await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::ServiceUnknown);
    assert_eq!(unknown.message().await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(server.ended().await, Some(0));
}

/// Sends the first bytes of a call and leaves it open; the headers that it is answered with, or its
/// trailers.
async fn begun(server: &Process, path: &str, bytes: &[u8]) -> HeaderMap {
    let mut client = with_window(server.api, 65_535).await;
    let (request, _) = grpc(path, &());
    let (answer, mut stream) = client.send_request(request, false).unwrap();
    stream.send_data(Bytes::copy_from_slice(bytes), false).unwrap();
    let answer = timeout(PATIENCE, answer).await.expect("it is answered").unwrap();
    if answer.headers().contains_key("grpc-status") {
        return answer.into_parts().0.headers;
    }
    let mut body = answer.into_body();
    while let Some(data) = timeout(PATIENCE, body.data()).await.expect("it ends") {
        data.unwrap();
    }
    body.trailers().await.unwrap().unwrap()
}

#[tokio::test]
async fn messages_over_4_kib_are_refused_by_their_length() {
    let server = Process::start("sqlite::memory:", &[]).await;
    // The prefix of a message of 4097 bytes, and none of them.
    let prefix = [0, 0, 0, 0x10, 1];
    for path in [CHECK, "/grpc.health.v1.Health/Watch"] {
        let headers = begun(&server, path, &prefix).await;
        assert_eq!(headers["grpc-status"], "11", "{path}: {headers:?}");
    }
    // tonic's reflection ends the stream without a reason, and long before it is idle.
    let headers = timeout(Duration::from_secs(5), begun(&server, REFLECTION, &prefix)).await;
    assert_eq!(headers.expect("the stream ends")["grpc-status"], "0");
}

#[tokio::test]
async fn a_check_that_does_not_arrive_ends_at_the_deadline() {
    let server = Process::start("sqlite::memory:", &["--request-timeout", "300ms"]).await;
    let headers = begun(&server, CHECK, &[0, 0, 0, 0, 9]).await;
    assert_eq!(headers["grpc-status"], "4", "{headers:?}");
}

#[tokio::test]
async fn a_stream_of_reflection_without_a_query_ends() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let headers = begun(&server, REFLECTION, &[]).await;
    assert_eq!(headers["grpc-status"], "14", "{headers:?}");
    assert!(headers["grpc-message"].to_str().unwrap().contains("idle"), "{headers:?}");
}

#[tokio::test]
#[ignore = "needs grpcurl; run by make test"]
async fn grpcurl_prints_the_bad_fields() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let address = server.api.to_string();
    let mut grpcurl = Command::new("grpcurl");
    grpcurl.args(["-plaintext", "-d", r#"{"product_id":"a b","quantity":0}"#, &address]);
    let output = grpcurl.arg("orders.v1.OrderService/Place").output().await.unwrap();
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(text.contains("fieldViolations"), "{text}");
    assert!(text.contains(r#""field": "product_id""#) && text.contains(r#""field": "quantity""#));
    let mut grpcurl = Command::new("grpcurl");
    let output = grpcurl.args(["-plaintext", &address, "list"]).output().await.unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap().lines().count(), 4);
}

#[tokio::test]
async fn checks_are_answered_while_others_hold_every_stream_of_reflection() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let (mut clients, mut streams) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let mut client = with_window(server.api, 0).await;
        for _ in 0..256 {
            client = client.ready().await.unwrap();
            streams.push(client.send_request(grpc(REFLECTION, &()).0, false).unwrap());
        }
        clients.push(client);
    }
    for _ in 0..20 {
        // Each on a connection of its own, as a probe is.
        let mut health = HealthClient::new(channel(server.api).await);
        health.check(of("")).await.unwrap();
    }
}
