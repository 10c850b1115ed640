//! A layer without a server: requests, scripted bodies, and the registry's page.

use std::{
    convert::Infallible,
    future::ready,
    panic::{AssertUnwindSafe, catch_unwind},
    task::Waker,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method};
use http_body_util::Empty;
use prometheus::TextEncoder;
use tower::service_fn;

use super::super::*;
use crate::proto::DESCRIPTORS;

pub(super) const PLACE: &str = "/orders.v1.OrderService/Place";
pub(super) const PLACE_LABELS: &str =
    "grpc_method=\"Place\",grpc_service=\"orders.v1.OrderService\",grpc_type=\"unary\"";

pub(super) fn layer(registry: &Registry) -> MetricsLayer {
    let recording = Recording {
        descriptors: &[DESCRIPTORS],
        unrecorded: &["grpc.health.v1.Health"],
        routes: vec![Route::new("/product", &[(Method::GET, &[200]), (Method::POST, &[201, 422])])],
    };
    MetricsLayer::new(registry, recording).unwrap()
}

pub(super) fn grpc(path: &str) -> Request<Empty<Bytes>> {
    let request = Request::post(path).header("content-type", "application/grpc");
    request.body(Empty::new()).unwrap()
}

pub(super) fn http(method: Method, path: &str) -> Request<Empty<Bytes>> {
    Request::builder().method(method).uri(path).body(Empty::new()).unwrap()
}

pub(super) fn page(registry: &Registry) -> String {
    TextEncoder::new().encode_to_string(&registry.gather()).unwrap()
}

/// The value of a series as the page spells it; 0 if it is not there, which no test asks for twice.
pub(super) fn value(page: &str, series: &str) -> f64 {
    let line = page
        .lines()
        .find(|line| line.strip_prefix(series).is_some_and(|rest| rest.starts_with(' ')));
    line.unwrap_or_else(|| panic!("no {series} in\n{page}"))
        .rsplit_once(' ')
        .unwrap()
        .1
        .parse()
        .unwrap()
}

pub(super) fn handled(page: &str, code: &str) -> f64 {
    let (_, rest) = PLACE_LABELS.split_once(',').unwrap();
    value(
        page,
        &format!("grpc_server_handled_total{{grpc_code=\"{code}\",grpc_method=\"Place\",{rest}}}"),
    )
}

pub(super) fn requests(page: &str, url: &str, method: &str, code: &str) -> f64 {
    value(
        page,
        &format!(
            "http_requests_total_with_path{{code=\"{code}\",method=\"{method}\",url=\"{url}\"}}"
        ),
    )
}

pub(super) fn sum(page: &str, name: &str) -> f64 {
    let of = page.lines().filter(|line| line.starts_with(&format!("{name}{{")));
    of.map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()).sum()
}

/// Nothing is in flight, and what was started was handled, and timed, once.
pub(super) fn assert_at_rest(page: &str) {
    assert_eq!(sum(page, "requests_in_flight"), 0.0, "{page}");
    let handled = sum(page, "grpc_server_handled_total");
    assert_eq!(sum(page, "grpc_server_started_total"), handled);
    assert_eq!(sum(page, "grpc_server_handling_seconds_count"), handled);
    let requests = sum(page, "http_requests_total_with_path");
    assert_eq!(sum(page, "http_request_duration_seconds_count"), requests);
}

pub(super) type Frames = Vec<Result<Frame<Bytes>, &'static str>>;

/// What a body does when it is polled after its frames.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Then {
    /// It ends, having said so before.
    End,
    /// It ends, as a surprise.
    None,
    Wait,
    Panic,
}

use http_body::Frame;

/// A body of these frames.
pub(super) struct Script {
    frames: std::collections::VecDeque<Result<Frame<Bytes>, &'static str>>,
    then: Then,
}

impl Script {
    pub(super) fn new(frames: Frames, then: Then) -> Self {
        Self { frames: frames.into(), then }
    }
}

impl Body for Script {
    type Data = Bytes;
    type Error = &'static str;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, &'static str>>> {
        match (self.frames.pop_front(), self.then) {
            (Some(frame), _) => Poll::Ready(Some(frame)),
            (None, Then::End | Then::None) => Poll::Ready(None),
            (None, Then::Wait) => Poll::Pending,
            (None, Then::Panic) => panic!("the body panics"),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.frames.is_empty() && self.then == Then::End
    }
}

pub(super) fn data(bytes: &[u8]) -> Result<Frame<Bytes>, &'static str> {
    Ok(Frame::data(Bytes::copy_from_slice(bytes)))
}

pub(super) fn trailers(status: &'static str) -> Result<Frame<Bytes>, &'static str> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static(status));
    Ok(Frame::trailers(trailers))
}

/// Answers one request with this response, whose body is polled until `polls` frames were seen or it
/// ended; then it is dropped.
pub(super) fn answer(
    layer: &MetricsLayer,
    request: Request<Empty<Bytes>>,
    response: Response<Script>,
    polls: usize,
) {
    let mut response = Some(response);
    let mut service = layer.layer(service_fn(move |_: Request<Received<Empty<Bytes>>>| {
        ready(Ok::<_, Infallible>(response.take().unwrap()))
    }));
    let cx = &mut Context::from_waker(Waker::noop());
    let mut future = std::pin::pin!(service.call(request));
    let Poll::Ready(Ok(response)) = future.as_mut().poll(cx) else { panic!("not ready") };
    let mut body = response.into_body();
    for _ in 0..polls {
        let polled = catch_unwind(AssertUnwindSafe(|| Pin::new(&mut body).poll_frame(cx)));
        match polled {
            Ok(Poll::Ready(Some(Ok(_)))) => {}
            // hyper drops a body that failed, ended or panicked.
            _ => break,
        }
    }
}
