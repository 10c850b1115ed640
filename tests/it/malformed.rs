//! Requests whose bytes cannot be decoded: refused as gRPC's status table says, and counted as
//! their callers' fault.

use bytes::Bytes;
use http::Request;
use tokio::time::timeout;

use crate::{
    in_process::place,
    peers::with_window,
    support::{PATIENCE, Process, exchange, framed},
};

const PLACE: &str = "/orders.v1.OrderService/Place";

/// The status of a call with these headers and bytes.
async fn called(server: &Process, path: &str, headers: &[(&str, &str)], bytes: &[u8]) -> String {
    let mut client = with_window(server.api, 65_535).await;
    let mut request = Request::post(format!("http://x{path}")).header("te", "trailers");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let (answer, mut stream) = client.send_request(request.body(()).unwrap(), false).unwrap();
    stream.send_data(Bytes::copy_from_slice(bytes), true).unwrap();
    let answer = timeout(PATIENCE, answer).await.expect("it is answered").unwrap();
    let status = answer.headers().get("grpc-status").cloned();
    let mut body = answer.into_body();
    while body.data().await.is_some() {}
    let status = match status {
        Some(status) => status,
        None => body.trailers().await.unwrap().unwrap()["grpc-status"].clone(),
    };
    status.to_str().unwrap().to_owned()
}

const GRPC: (&str, &str) = ("content-type", "application/grpc");

#[tokio::test]
async fn undecodable_calls_are_internal_or_unimplemented_and_counted() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let whole = framed(&place("book"));
    let json = br#"{"product_id":"book"}"#;
    let json = [&[0, 0, 0, 0, u8::try_from(json.len()).unwrap()], &json[..]].concat();
    let compressed = [&[1], &whole[1..]].concat();
    let (mut internal, mut unimplemented) = (0.0, 0.0);
    for (what, headers, bytes, status) in [
        ("bad protobuf", &[GRPC][..], &[0, 0, 0, 0, 2, 0x0a, 0x7f][..], "13"),
        ("no message", &[GRPC], &[], "13"),
        ("a cut message", &[GRPC], &whole[..8], "13"),
        ("a cut prefix", &[GRPC], &whole[..3], "13"),
        ("a compressed flag without an encoding", &[GRPC], &compressed, "13"),
        ("an unknown flag", &[GRPC], &[9, 0, 0, 0, 0], "13"),
        ("an unknown codec", &[("content-type", "application/grpc+json")], &json, "12"),
        ("no codec", &[("content-type", "application/grpc+")], &whole, "12"),
        ("an unknown encoding", &[GRPC, ("grpc-encoding", "zz")], &compressed, "12"),
    ] {
        assert_eq!(called(&server, PLACE, headers, bytes).await, status, "{what}");
        internal += f64::from(u8::from(status == "13"));
        unimplemented += f64::from(u8::from(status == "12"));
        let page = server.scrape().await;
        let malformed = page.value("requests_malformed_total", &["protocol=\"grpc\""]);
        assert_eq!(malformed, internal + unimplemented, "{what}");
        // What the error ratio rests on: the malformed calls are those of these two codes.
        let method = "grpc_method=\"Place\"";
        for (code, count) in [("Internal", internal), ("Unimplemented", unimplemented)] {
            let code = format!("grpc_code=\"{code}\"");
            let handled = page.value("grpc_server_handled_total", &[method, &code]);
            assert_eq!(handled, count, "{what}");
        }
    }
    // Calls that are in no other family are not counted: they would hide failures that are.
    for path in [
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/orders.v1.OrderService/Cancel",
    ] {
        for (headers, bytes) in [
            (&[("content-type", "application/grpc+json")][..], &json[..]),
            (&[GRPC], &[0, 0, 0, 0, 2, 0x0a, 0x7f]),
            (&[GRPC], &compressed),
        ] {
            called(&server, path, headers, bytes).await;
        }
    }
    let before = server.scrape().await;
    // What can be decoded, and what names no method, is not malformed.
    let proto = [("content-type", "application/grpc+proto")];
    assert_eq!(called(&server, PLACE, &proto, &whole).await, "0");
    assert_eq!(called(&server, PLACE, &[GRPC], &framed(&place(""))).await, "3");
    assert_eq!(called(&server, PLACE, &[GRPC], &[0, 0, 1, 0x11, 0x70]).await, "11");
    assert_eq!(called(&server, "/orders.v1.OrderService/Cancel", &[GRPC], &whole).await, "12");
    assert_eq!(called(&server, "/orders.v1.Other/Place", &[GRPC], &whole).await, "12");
    let after = server.scrape().await;
    for page in [&before, &after] {
        let malformed = page.value("requests_malformed_total", &["protocol=\"grpc\""]);
        assert_eq!(malformed, 9.0);
    }
    assert_eq!(after.value("product_order_total", &[]), 1.0);
}

#[tokio::test]
async fn undecodable_bodies_are_400_and_counted() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let mut malformed = 0.0;
    for (body, status) in [("{", 400), (r#"{"product_id":7}"#, 400), (r#"{"product_id":""}"#, 422)]
    {
        let request = format!(
            "POST /product HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: \
             application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = exchange(server.api, request.as_bytes()).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{body}: {answer}");
        malformed += f64::from(u8::from(status == 400));
        let page = server.scrape().await;
        assert_eq!(page.value("requests_malformed_total", &["protocol=\"http\""]), malformed);
    }
    // A body whose chunks are no chunks is malformed, too, and no caller that went.
    let request = b"POST /product HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: \
                    application/json\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n";
    let answer = exchange(server.api, request).await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    let page = server.scrape().await;
    assert_eq!(page.value("requests_malformed_total", &["protocol=\"http\""]), 3.0);
}
