//! Counts the messages that gRPC calls receive. It is a layer of its own since it must see the
//! request's body before a router boxes it: inside, a body of our own would cost every request an
//! allocation.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::Request;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower::{Layer, Service};

use super::{
    messages::Messages,
    table::{GrpcIndex, Table},
};
use crate::wire;

/// See [`MetricsLayer::received`](super::MetricsLayer::received).
#[derive(Debug, Clone)]
pub struct ReceivedLayer {
    table: Arc<Table>,
}

impl ReceivedLayer {
    pub(super) fn new(table: Arc<Table>) -> Self {
        Self { table }
    }
}

impl<S> Layer<S> for ReceivedLayer {
    type Service = Received<S>;

    fn layer(&self, inner: S) -> Received<S> {
        Received { inner, table: self.table.clone() }
    }
}

/// A service whose received gRPC messages are counted.
#[derive(Debug, Clone)]
pub struct Received<S> {
    inner: S,
    table: Arc<Table>,
}

impl<S, B> Service<Request<B>> for Received<S>
where
    S: Service<Request<ReceivedBody<B>>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> S::Future {
        let call = if wire::is_grpc(request.headers()) {
            self.table.find_grpc(request.uri().path())
        } else {
            None
        };
        let counted = call.map(|index| (self.table.clone(), index));
        let body = |inner| ReceivedBody { inner, counted, messages: Messages::default() };
        self.inner.call(request.map(body))
    }
}

pin_project! {
    /// A request's body whose messages are counted as they are read.
    #[derive(Debug)]
    pub struct ReceivedBody<B> {
        #[pin]
        inner: B,
        counted: Option<(Arc<Table>, GrpcIndex)>,
        messages: Messages,
    }
}

impl<B> Body for ReceivedBody<B>
where
    B: Body<Data: AsRef<[u8]>>,
{
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        let frame = ready!(this.inner.poll_frame(cx));
        if let (Some(Ok(frame)), Some((table, index))) = (&frame, &this.counted)
            && let Some(data) = frame.data_ref()
        {
            table.grpc(*index).received.inc_by(this.messages.count(data.as_ref()));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
