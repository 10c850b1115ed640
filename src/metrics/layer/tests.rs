//! The layer driven by hand: each way in which a request can end, seen through the registry.

use std::{
    convert::Infallible,
    future::{pending, ready},
    panic::{AssertUnwindSafe, catch_unwind},
    task::Waker,
};

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode};
use http_body_util::{BodyExt as _, Empty, Full};
use proptest::prelude::*;
use tower::service_fn;

mod by_hand;

use self::by_hand::*;
use super::*;

#[test]
fn every_child_is_there_at_0() {
    let registry = Registry::new();
    layer(&registry);
    let page = page(&registry);
    for code in super::table::GRPC_CODES {
        assert_eq!(handled(&page, code), 0.0);
    }
    for (url, method, code) in [
        ("/product", "GET", "200"),
        ("/product", "POST", "201"),
        ("/product", "POST", "499"),
        ("/product", "HEAD", "405"),
        ("/product", "OTHER", "405"),
        ("/product", "GET", "other"),
        ("unmatched", "GET", "404"),
        ("unmatched", "OTHER", "404"),
        ("unmatched", "HEAD", "503"),
    ] {
        assert_eq!(requests(&page, url, method, code), 0.0);
    }
    assert_eq!(value(&page, &format!("grpc_server_started_total{{{PLACE_LABELS}}}")), 0.0);
    assert_eq!(value(&page, "requests_in_flight{protocol=\"grpc\"}"), 0.0);
    assert!(!page.contains("grpc.health"));
}

#[test]
fn a_call_is_counted_by_its_trailers_once_and_not_before() {
    for (status, code) in [
        ("0", "OK"),
        ("5", "NotFound"),
        ("16", "Unauthenticated"),
        ("17", "Unknown"),
        ("x", "Unknown"),
    ] {
        let registry = Registry::new();
        let layer = layer(&registry);
        let mut service = layer.layer(service_fn(|_: Request<Received<Empty<Bytes>>>| {
            let script = Script::new(vec![data(&[0, 0, 0, 0, 1, 7]), trailers(status)], Then::Wait);
            ready(Ok::<_, Infallible>(Response::new(script)))
        }));
        let cx = &mut Context::from_waker(Waker::noop());
        let mut future = Box::pin(service.call(grpc(PLACE)));
        let early = page(&registry);
        assert_eq!(value(&early, &format!("grpc_server_started_total{{{PLACE_LABELS}}}")), 1.0);
        assert_eq!(value(&early, "requests_in_flight{protocol=\"grpc\"}"), 1.0);
        let Poll::Ready(Ok(response)) = future.as_mut().poll(cx) else { panic!("not ready") };
        let mut body = response.into_body();
        assert!(Pin::new(&mut body).poll_frame(cx).is_ready());
        assert_eq!(sum(&page(&registry), "grpc_server_handled_total"), 0.0);
        assert!(Pin::new(&mut body).poll_frame(cx).is_ready());
        assert_eq!(handled(&page(&registry), code), 1.0);
        drop(body);
        let page = page(&registry);
        assert_eq!(sum(&page, "grpc_server_handled_total"), 1.0);
        assert_eq!(value(&page, &format!("grpc_server_msg_sent_total{{{PLACE_LABELS}}}")), 1.0);
        assert_at_rest(&page);
    }
}

#[test]
fn each_end_of_a_call_has_its_code() {
    let ok = || Response::new(());
    let with_status =
        |status: &'static str| Response::builder().header("grpc-status", status).body(()).unwrap();
    let with_code = |code: u16| Response::builder().status(code).body(()).unwrap();
    for (head, frames, then, polls, code) in [
        (with_status("3"), vec![], Then::End, 0, "InvalidArgument"),
        (ok(), vec![], Then::End, 0, "Unknown"),
        (with_code(404), vec![], Then::End, 0, "Unimplemented"),
        (with_code(503), vec![], Then::End, 0, "Unavailable"),
        (with_status("0"), vec![data(b"x")], Then::None, 9, "OK"),
        (ok(), vec![data(b"x")], Then::None, 9, "Unknown"),
        (ok(), vec![data(b"x")], Then::End, 1, "Unknown"),
        (ok(), vec![data(b"x"), trailers("2")], Then::Wait, 9, "Unknown"),
        (ok(), vec![data(b"x"), Err("broken")], Then::Wait, 9, "Unknown"),
        (ok(), vec![data(b"x")], Then::Wait, 9, "Canceled"),
        (ok(), vec![data(b"x")], Then::Wait, 0, "Canceled"),
        (ok(), vec![data(b"x")], Then::Panic, 9, "Internal"),
    ] {
        let registry = Registry::new();
        answer(&layer(&registry), grpc(PLACE), head.map(|()| Script::new(frames, then)), polls);
        let page = page(&registry);
        assert_eq!(handled(&page, code), 1.0, "{then:?} {polls} {code}");
        assert_eq!(sum(&page, "grpc_server_handled_total"), 1.0);
        assert_at_rest(&page);
    }
}

#[test]
fn each_end_of_a_request_has_its_code() {
    let with_code = |code: u16| Response::builder().status(code).body(()).unwrap();
    let of_length = Response::builder().header("content-length", "4").body(()).unwrap();
    for (head, frames, then, polls, code) in [
        (with_code(200), vec![], Then::End, 0, "200"),
        (with_code(204), vec![], Then::Wait, 0, "other"),
        (with_code(304), vec![], Then::Wait, 0, "other"),
        (with_code(200), vec![data(b"x")], Then::End, 1, "200"),
        (with_code(200), vec![data(b"x")], Then::None, 2, "200"),
        (with_code(200), vec![data(b"x"), trailers("9")], Then::Wait, 2, "200"),
        (of_length, vec![data(b"xx"), data(b"xx")], Then::None, 2, "200"),
        (with_code(418), vec![], Then::End, 0, "other"),
        (with_code(200), vec![data(b"x")], Then::Wait, 2, "499"),
        (with_code(200), vec![data(b"x")], Then::Panic, 2, "500"),
        (with_code(200), vec![Err("broken")], Then::Wait, 1, "500"),
    ] {
        let registry = Registry::new();
        let response = head.map(|()| Script::new(frames, then));
        answer(&layer(&registry), http(Method::GET, "/product"), response, polls);
        let page = page(&registry);
        assert_eq!(requests(&page, "/product", "GET", code), 1.0, "{then:?} {polls} {code}");
        assert_eq!(sum(&page, "http_requests_total_with_path"), 1.0);
        assert_at_rest(&page);
    }
}

#[test]
fn a_response_to_head_ends_at_its_head() {
    let registry = Registry::new();
    let layer = layer(&registry);
    let response = Response::builder().status(405).header("content-length", "9").body(());
    let response = response.unwrap().map(|()| Script::new(vec![data(b"forbidden")], Then::End));
    answer(&layer, http(Method::HEAD, "/product"), response, 0);
    let mut call = grpc(PLACE);
    *call.method_mut() = Method::HEAD;
    answer(&layer, call, Response::new(Script::new(vec![data(b"x")], Then::Wait)), 0);
    let page = page(&registry);
    assert_eq!(requests(&page, "/product", "HEAD", "405"), 1.0);
    assert_eq!(handled(&page, "Unknown"), 1.0);
    assert_at_rest(&page);
}

#[test]
fn a_request_dropped_before_its_head_is_cancelled_or_too_late() {
    let registry = Registry::new();
    let layer = layer(&registry);
    let mut service = layer.layer(service_fn(|_: Request<Received<Empty<Bytes>>>| {
        pending::<Result<Response<Script>, Infallible>>()
    }));
    drop(service.call(grpc(PLACE)));
    drop(service.call(http(Method::GET, "/product")));
    let mut late = grpc(PLACE);
    // It has passed by the time the request is dropped.
    late.headers_mut().insert("grpc-timeout", HeaderValue::from_static("0n"));
    drop(service.call(late));
    let page = page(&registry);
    assert_eq!((handled(&page, "Canceled"), handled(&page, "DeadlineExceeded")), (1.0, 1.0));
    assert_eq!(requests(&page, "/product", "GET", "499"), 1.0);
    assert_at_rest(&page);
}

#[test]
fn a_service_that_fails_or_panics_is_recorded() {
    let registry = Registry::new();
    let layer = layer(&registry);
    let mut failing = layer.layer(service_fn(|_: Request<Received<Empty<Bytes>>>| {
        ready(Err::<Response<Script>, _>("it failed"))
    }));
    let mut panicking = layer.layer(service_fn(|_: Request<Received<Empty<Bytes>>>| async {
        if true {
            panic!("a bug");
        }
        Ok::<_, Infallible>(Response::new(Script::new(vec![], Then::End)))
    }));
    let cx = &mut Context::from_waker(Waker::noop());
    for request in [grpc(PLACE), http(Method::POST, "/product")] {
        let mut future = Box::pin(failing.call(request.clone()));
        assert!(future.as_mut().poll(cx).is_ready());
        let mut future = Box::pin(panicking.call(request));
        let panicked = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx).is_ready()));
        assert!(panicked.is_err());
    }
    let page = page(&registry);
    assert_eq!((handled(&page, "Unknown"), handled(&page, "Internal")), (1.0, 1.0));
    assert_eq!(requests(&page, "/product", "POST", "500"), 2.0);
    assert_at_rest(&page);
}

#[test]
fn strangers_share_a_few_series() {
    let registry = Registry::new();
    let layer = layer(&registry);
    let before = page(&registry).lines().count();
    let done = |head: StatusCode| {
        Response::builder().status(head).body(Script::new(vec![], Then::End)).unwrap()
    };
    for i in 0..1000 {
        answer(&layer, grpc(&format!("/stranger.v{i}.Service/Call{i}")), done(StatusCode::OK), 0);
        answer(&layer, grpc(&format!("/orders.v1.OrderService/Call{i}")), done(StatusCode::OK), 0);
        let method = Method::from_bytes(format!("METHOD{i}").as_bytes()).unwrap();
        answer(&layer, http(method, &format!("/stranger/{i}")), done(StatusCode::NOT_FOUND), 0);
        let code = StatusCode::from_u16(100 + i % 900).unwrap();
        answer(&layer, http(Method::GET, "/product"), done(code), 0);
    }
    let page = page(&registry);
    assert_eq!(page.lines().count(), before);
    let other = "grpc_method=\"other\",grpc_service=\"other\",grpc_type=\"unary\"";
    assert_eq!(value(&page, &format!("grpc_server_started_total{{{other}}}")), 2000.0);
    assert_eq!(requests(&page, "unmatched", "OTHER", "404"), 1000.0);
    assert_at_rest(&page);
}

#[test]
fn unrecorded_services_leave_no_trace() {
    let registry = Registry::new();
    let layer = layer(&registry);
    let before = page(&registry);
    let response = Response::new(Script::new(vec![data(b"x")], Then::Wait));
    answer(&layer, grpc("/grpc.health.v1.Health/Watch"), response, 1);
    assert_eq!(page(&registry), before);
}

#[test]
fn a_second_layer_on_the_same_registry_is_refused() {
    let registry = Registry::new();
    layer(&registry);
    let recording = Recording { descriptors: &[], unrecorded: &[], routes: vec![] };
    assert!(matches!(MetricsLayer::new(&registry, recording), Err(MetricsError::Family(_))));
}

#[test]
fn labels_that_would_share_a_series_are_refused() {
    use prost::Message as _;
    use prost_types::{
        FileDescriptorProto, FileDescriptorSet, MethodDescriptorProto, ServiceDescriptorProto,
    };
    let service = |name: &str, method: &str| ServiceDescriptorProto {
        name: Some(name.into()),
        method: vec![MethodDescriptorProto { name: Some(method.into()), ..Default::default() }],
        ..Default::default()
    };
    let file = FileDescriptorProto {
        package: Some("pkg".into()),
        service: vec![service("Foo", "BarBaz"), service("FooBar", "Baz")],
        ..Default::default()
    };
    let set = FileDescriptorSet { file: vec![file] }.encode_to_vec();
    let recording = Recording { descriptors: &[&set], unrecorded: &[], routes: vec![] };
    let refused = MetricsLayer::new(&Registry::new(), recording);
    assert!(matches!(refused, Err(MetricsError::Shared { .. })), "{refused:?}");
    let recording = Recording { descriptors: &[b"no set"], unrecorded: &[], routes: vec![] };
    let refused = MetricsLayer::new(&Registry::new(), recording);
    assert!(matches!(refused, Err(MetricsError::Descriptors(_))), "{refused:?}");
}

#[tokio::test]
async fn received_messages_are_counted_across_frames() {
    let registry = Registry::new();
    let mut service =
        layer(&registry).layer(service_fn(async |request: Request<Received<Script>>| {
            let read = request.into_body().collect().await.unwrap().to_bytes();
            Ok::<_, Infallible>(Response::new(Full::new(read)))
        }));
    let bytes = [0, 0, 0, 0, 2, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 9];
    let frames = bytes.chunks(4).map(data).collect();
    let request = grpc(PLACE).map(|_| Script::new(frames, Then::None));
    let echoed = service.call(request).await.unwrap().into_body().collect().await.unwrap();
    assert_eq!(echoed.to_bytes(), bytes[..]);
    let page = page(&registry);
    assert_eq!(value(&page, &format!("grpc_server_msg_received_total{{{PLACE_LABELS}}}")), 3.0);
}

/// One request and what becomes of it.
fn outcomes() -> impl Strategy<Value = (bool, usize, usize, usize)> {
    (any::<bool>(), 0..6_usize, 0..4_usize, 0..5_usize)
}

proptest! {
    #[test]
    fn whatever_happens_each_request_is_recorded_once(mix in prop::collection::vec(outcomes(), 1..40)) {
        let registry = Registry::new();
        let layer = layer(&registry);
        let cx = &mut Context::from_waker(Waker::noop());
        // All in flight together, and dropped at the end in whatever state they are.
        let mut bodies = Vec::new();
        for (is_grpc, then, length, polls) in &mix {
            let then = [Then::End, Then::None, Then::Wait, Then::Panic][*then % 4];
            let mut frames: Frames = (0..*length).map(|_| data(&[0, 0, 0, 0, 0])).collect();
            match polls {
                0 => frames.push(trailers("0")),
                1 => frames.push(Err("broken")),
                _ => {}
            }
            let mut response = Some(Response::new(Script::new(frames, then)));
            let mut service = layer.layer(service_fn(move |_: Request<Received<Empty<Bytes>>>| {
                ready(Ok::<_, Infallible>(response.take().unwrap()))
            }));
            let request = if *is_grpc { grpc(PLACE) } else { http(Method::GET, "/product") };
            let mut future = Box::pin(service.call(request));
            let Poll::Ready(Ok(response)) = future.as_mut().poll(cx) else { panic!("not ready") };
            bodies.push((response.into_body(), *polls));
        }
        for round in 0..5 {
            for (body, polls) in &mut bodies {
                if round < *polls {
                    let _ = catch_unwind(AssertUnwindSafe(|| Pin::new(body).poll_frame(cx).is_ready()));
                }
            }
            let page = page(&registry);
            let (handled, started) = (sum(&page, "grpc_server_handled_total"), sum(&page, "grpc_server_started_total"));
            prop_assert!(handled <= started);
            let open = value(&page, "requests_in_flight{protocol=\"grpc\"}");
            prop_assert_eq!(open, started - handled);
        }
        drop(bodies);
        let page = page(&registry);
        assert_at_rest(&page);
        let calls = mix.iter().filter(|(is_grpc, ..)| *is_grpc).count();
        prop_assert_eq!(sum(&page, "grpc_server_started_total"), calls as f64);
        prop_assert_eq!(sum(&page, "http_requests_total_with_path"), (mix.len() - calls) as f64);
    }
}
