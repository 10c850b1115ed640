//! Requests that no honest client sends: each is answered in its own protocol, and nothing is
//! placed.

use http::Method;
use reqwest::Client;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::{
    in_process::place,
    support::{PATIENCE, Process, exchange, framed},
};

const PLACE: &str = "/orders.v1.OrderService/Place";

/// A valid `Place` of a book, with its prefix.
fn message() -> Vec<u8> {
    framed(&place("book"))
}

/// The head and the problem of an answer; its header fields in lower case.
fn problem(answer: &str) -> (String, Value) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer:?}"));
    let head = head.to_lowercase();
    assert!(head.contains("content-type: application/problem+json"), "{answer}");
    (head, serde_json::from_str(body).unwrap())
}

#[tokio::test]
async fn grpc_by_another_method_or_over_http_1_places_nothing() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let (http1, http2) =
        (Client::new(), Client::builder().http2_prior_knowledge().build().unwrap());
    for (client, method) in [
        (&http2, Method::GET),
        (&http2, Method::HEAD),
        (&http2, Method::PUT),
        (&http1, Method::POST),
        (&http1, Method::GET),
    ] {
        for path in [PLACE, "/grpc.health.v1.Health/Check"] {
            let request = client.request(method.clone(), server.url(path)).body(message());
            let request =
                request.header("content-type", "application/grpc").header("te", "trailers");
            let response = request.send().await.unwrap();
            assert_eq!(response.headers()["content-type"], "application/grpc", "{method} {path}");
            assert_eq!(response.headers()["grpc-status"], "12", "{method} {path}");
        }
    }
    let page = server.scrape().await;
    assert_eq!(page.value("product_order_total", &[]), 0.0);
    let refused = ["grpc_method=\"Place\"", "grpc_code=\"Unimplemented\""];
    assert_eq!(page.value("grpc_server_handled_total", &refused), 5.0);
    // The same message is an order by the one way there is.
    let request = http2.post(server.url(PLACE)).body(message());
    let request = request.header("content-type", "application/grpc").header("te", "trailers");
    assert_eq!(request.send().await.unwrap().status(), 200);
    assert_eq!(server.scrape().await.value("product_order_total", &[]), 1.0);
}

#[tokio::test]
async fn head_of_a_grpc_method_is_refused_as_get_is_but_without_the_body() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let http2 = Client::builder().http2_prior_knowledge().build().unwrap();
    for client in [Client::new(), http2] {
        let url = server.url(PLACE);
        let get = client.get(&url).send().await.unwrap();
        let head = client.head(&url).send().await.unwrap();
        assert_eq!((get.status().as_u16(), head.status().as_u16()), (415, 415));
        for header in ["content-type", "content-length"] {
            assert_eq!(get.headers().get(header), head.headers().get(header), "{header}");
        }
        assert_eq!(head.bytes().await.unwrap(), "");
        let problem: Value = get.json().await.unwrap();
        assert_eq!(problem["status"], 415);
        // The connection goes on with the next request.
        let get = client.get(server.url("/product")).send().await.unwrap();
        assert_eq!(get.text().await.unwrap(), "Order placed!");
    }
}

#[tokio::test]
async fn an_early_answer_reaches_a_client_that_sends_all_of_a_large_body_first() {
    let server = Process::start("sqlite::memory:", &[]).await;
    const LENGTH: usize = 6_000_000;
    for (request, status) in [
        ("POST /nowhere", 404),
        ("PUT /product", 405),
        ("POST /orders", 405),
        ("POST /product", 415),
        ("POST /orders.v1.OrderService/Place", 415),
        ("GET /product?quantity=0", 422),
    ] {
        for chunked in [false, true] {
            let mut stream = TcpStream::connect(server.api).await.unwrap();
            let framing = if chunked {
                "transfer-encoding: chunked".to_owned()
            } else {
                format!("content-length: {LENGTH}")
            };
            let head =
                format!("{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{framing}\r\n\r\n");
            let mut bytes = head.into_bytes();
            if chunked {
                bytes.extend(format!("{LENGTH:x}\r\n").bytes());
            }
            bytes.resize(bytes.len() + LENGTH, b'x');
            if chunked {
                bytes.extend(b"\r\n0\r\n\r\n");
            }
            stream.write_all(&bytes).await.unwrap_or_else(|error| panic!("{request}: {error}"));
            let mut answer = String::new();
            let read = timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap();
            read.unwrap_or_else(|error| panic!("{request}: {error}"));
            assert_eq!(problem(&answer).1["status"], status, "{request}: {answer}");
        }
    }
}

#[tokio::test]
async fn a_client_that_asks_first_is_answered_at_once_wherever_it_asks() {
    let server = Process::start("sqlite::memory:", &[]).await;
    for (request, status) in [("POST /nowhere", "404"), ("PUT /product", "405")] {
        let request = format!(
            "{request} HTTP/1.1\r\nhost: x\r\ncontent-length: 9000000000\r\n\
             expect: 100-continue\r\n\r\n"
        );
        let answer = exchange(server.api, request.as_bytes()).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
}

#[tokio::test]
async fn odd_spellings_are_problems_that_name_the_field() {
    let server = Process::start("sqlite::memory:", &[]).await;
    for (path, status, fields) in [
        ("/orders/%ff", 404, &[][..]),
        ("/orders/%", 404, &[]),
        ("/orders/%00", 404, &[]),
        ("/product?product_id=%ff", 422, &["product_id"]),
        ("/product?quantity=%ff", 422, &["quantity"]),
        ("/product?quantity=", 422, &["quantity"]),
        ("/product?quantity=two", 422, &["quantity"]),
        ("/product?quantity=1e3", 422, &["quantity"]),
        ("/product?quantity=-1", 422, &["quantity"]),
        ("/product?quantity=99999999999999999999", 422, &["quantity"]),
        ("/product?quantity=1&quantity=1", 422, &["quantity"]),
        ("/product?product_id=a&product_id=b&product_id=c", 422, &["product_id"]),
        ("/orders?page_size=ten", 422, &["page_size"]),
        ("/orders?page_size=%ff&page_token=%ff", 422, &["page_size", "page_token"]),
        ("/orders?page_size=1&page_size=2", 422, &["page_size"]),
        ("/orders?page_size=99999999999999999999", 422, &["page_size"]),
    ] {
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let (head, problem) = problem(&exchange(server.api, request.as_bytes()).await);
        assert!(head.starts_with(&format!("http/1.1 {status} ")), "{path}: {head}");
        let named: Vec<_> = problem["errors"]
            .as_array()
            .map(|errors| errors.iter().map(|error| error["field"].as_str().unwrap()).collect())
            .unwrap_or_default();
        assert_eq!(named, fields, "{path}: {problem}");
    }
    for query in ["", "?page_size=", "?page_size=&page_token=", "?page_size=0&x=1&x=2"] {
        let response = reqwest::get(server.url(&format!("/orders{query}"))).await.unwrap();
        assert_eq!(response.status(), 200, "{query}");
    }
    for (body, status) in [
        (r#"{"product_id":"a","quantity":1e3}"#, 422),
        (r#"{"product_id":"a","quantity":1.0}"#, 422),
        (r#"{"product_id":"a","quantity":-1}"#, 422),
        (r#"{"product_id":"a","quantity":99999999999999999999}"#, 422),
        (r#"{"product_id":"a","quantity":1,"quantity":2}"#, 400),
        (r#"{"product_id":"a","product_id":"a"}"#, 400),
        (r#"["a",1]"#, 400),
        ("\u{feff}{\"product_id\":\"a\"}", 400),
        ("{\"product_id\":\"\u{0}\"}", 400),
        (r#"{"product_id":"\u0000"}"#, 422),
        (r#"{"product_id":"a","quantity":01}"#, 400),
        (r#"{"product_id":"a","x":{"y":[1,1e400]},"x":2}"#, 201),
    ] {
        let request = format!(
            "POST /product HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: \
             application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = exchange(server.api, request.as_bytes()).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{body}: {answer}");
        if status != 201 {
            problem(&answer);
        }
    }
    let page = server.scrape().await;
    assert_eq!(page.value("product_order_total", &[]), 1.0);
}

/// A route that reads no body answers at once; every other request ends at its deadline. Only
/// streams of health and reflection have none, not all that bears their names.
#[tokio::test]
async fn a_body_that_never_comes_holds_no_request_on_any_path() {
    let server = Process::start("sqlite::memory:", &["--request-timeout", "300ms"]).await;
    for (path, content_type, expected) in [
        ("/product", "application/json", "http/1.1 408 "),
        ("/nowhere", "application/json", "http/1.1 404 "),
        ("/grpc.health.v1.Nothing/x", "application/json", "http/1.1 404 "),
        ("/grpc.health.v1.Health/Watch", "application/grpc", "grpc-status: 12"),
        ("/grpc.reflection.v1.x", "application/grpc", "grpc-status: 12"),
    ] {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {content_type}\r\ncontent-length: 9\r\n\r\n"
        );
        let answer = exchange(server.api, head.as_bytes()).await.to_lowercase();
        assert!(answer.contains(expected), "{path}: {answer}");
    }
}
