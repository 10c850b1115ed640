//! What the metrics layer adds to a call: a bare service against the same one wrapped, unary and a
//! stream of 100 messages. `cargo bench --bench metrics_layer`

#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark that cannot go on has failed")]

use std::{
    convert::Infallible,
    future::{Ready, ready},
    hint::black_box,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use criterion::{Criterion, criterion_group, criterion_main};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Body, Frame};
use http_body_util::Empty;
use order_service::{
    metrics::layer::{MetricsLayer, Recording},
    proto::DESCRIPTORS,
};
use prometheus::Registry;
use tower::{Layer as _, Service};

/// A body of so many messages and trailers.
struct Messages {
    left: usize,
    trailers: bool,
}

impl Body for Messages {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.left > 0 {
            self.left -= 1;
            return Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[0, 0, 0, 0, 2, 8, 1])))));
        }
        if std::mem::take(&mut self.trailers) {
            let mut trailers = HeaderMap::with_capacity(1);
            trailers.insert("grpc-status", HeaderValue::from_static("0"));
            return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
        }
        Poll::Ready(None)
    }
}

/// Answers every call with so many messages.
#[derive(Clone)]
struct Answer(usize);

impl<B> Service<Request<B>> for Answer {
    type Response = Response<Messages>;
    type Error = Infallible;
    type Future = Ready<Result<Response<Messages>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<B>) -> Self::Future {
        ready(Ok(Response::new(Messages { left: self.0, trailers: true })))
    }
}

fn request() -> Request<Empty<Bytes>> {
    let request = Request::post("/orders.v1.OrderService/Place");
    request.header("content-type", "application/grpc").body(Empty::new()).unwrap()
}

/// One call, read to its end as hyper reads it.
fn call<S, B>(service: &mut S, request: Request<Empty<Bytes>>)
where
    S: Service<Request<Empty<Bytes>>, Response = Response<B>, Error = Infallible>,
    B: Body<Data = Bytes>,
{
    let cx = &mut Context::from_waker(Waker::noop());
    let mut future = std::pin::pin!(service.call(request));
    let Poll::Ready(Ok(response)) = future.as_mut().poll(cx) else { unreachable!("it is ready") };
    let mut body = std::pin::pin!(response.into_body());
    while let Poll::Ready(Some(Ok(frame))) = body.as_mut().poll_frame(cx) {
        if black_box(frame.is_trailers()) {
            break;
        }
    }
}

fn benches(criterion: &mut Criterion) {
    let recording = Recording { descriptors: &[DESCRIPTORS], unrecorded: &[], routes: vec![] };
    let layer = MetricsLayer::new(&Registry::new(), recording).unwrap();
    for (name, messages) in [("unary", 1), ("stream of 100", 100)] {
        let mut group = criterion.benchmark_group(name);
        let mut bare = Answer(messages);
        group.bench_function("bare", |bencher| {
            bencher.iter_batched(request, |r| call(&mut bare, r), criterion::BatchSize::SmallInput);
        });
        let mut metered = layer.layer(Answer(messages));
        group.bench_function("metered", |bencher| {
            bencher.iter_batched(
                request,
                |r| call(&mut metered, r),
                criterion::BatchSize::SmallInput,
            );
        });
        group.finish();
    }
}

criterion_group!(all, benches);
criterion_main!(all);
