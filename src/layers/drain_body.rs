//! Reads what is left of an HTTP/1 request's body once it was answered early: a server that closes
//! with unread bytes resets the connection, and the answer is lost on its way.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{BoxError, body::Body};
use bytes::Bytes;
use futures_util::future::{BoxFuture, Either};
use http::{Request, Response, Version, header};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;
use tokio::{sync::oneshot, time::timeout};
use tower::{Layer, Service};

use crate::{error::Error, listener::Ending};

/// Limit of discarded body bytes, counted from the start of the body, and of the time after the
/// response was written. Beyond either the connection is closed under the sender.
const MAX_DRAIN: usize = 8 * 1024 * 1024;
const MAX_DRAIN_TIME: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy)]
pub(super) struct DrainBodyLayer;

impl<S> Layer<S> for DrainBodyLayer {
    type Service = DrainBody<S>;

    fn layer(&self, inner: S) -> DrainBody<S> {
        DrainBody { inner }
    }
}

/// See the [module](self).
#[derive(Debug, Clone)]
pub struct DrainBody<S> {
    inner: S,
}

impl<S, B> Service<Request<B>> for DrainBody<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Error>,
    S::Future: Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = Either<S::Future, BoxFuture<'static, Result<Response<Body>, Error>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        if request.body().is_end_stream() {
            return Either::Left(self.inner.call(request.map(|_| Body::empty())));
        }
        // HTTP/2 has a code for it: a stream is reset without an error once its answer is sent.
        if request.version() == Version::HTTP_2 {
            return Either::Left(self.inner.call(request.map(Body::new)));
        }
        // A client that asks first sends nothing until the body is read.
        let asks_first = request.headers().contains_key(header::EXPECT);
        let ending = request.extensions().get::<Ending>().cloned();
        let (back, mut unread) = oneshot::channel();
        let lent =
            |inner| Body::new(Lent { rest: Some(Rest { inner, read: 0 }), back: Some(back) });
        let answer = self.inner.call(request.map(lent));
        Either::Right(Box::pin(async move {
            let answer = answer.await;
            // A body that is not back yet is still being read, by the response.
            if let (Ok(rest), Some(ending)) = (unread.try_recv(), ending)
                && !(asks_first && rest.read == 0)
            {
                ending.after_response(rest.drain());
            }
            answer
        }))
    }
}

/// What is left of a body.
struct Rest<B> {
    inner: B,
    /// Bytes.
    read: usize,
}

impl<B: http_body::Body<Data = Bytes> + Unpin> Rest<B> {
    async fn drain(mut self) {
        let reading = async {
            while self.read < MAX_DRAIN {
                match self.inner.frame().await {
                    Some(Ok(frame)) => self.read += frame.data_ref().map_or(0, Bytes::len),
                    Some(Err(_)) | None => return,
                }
            }
        };
        // Over time or not, the body is dropped now, and the rest is not read.
        let _ = timeout(MAX_DRAIN_TIME, reading).await;
    }
}

/// A body that is handed back when it is dropped before its end.
struct Lent<B> {
    /// `None` after the end.
    rest: Option<Rest<B>>,
    /// `None` once it was handed back.
    back: Option<oneshot::Sender<Rest<B>>>,
}

impl<B> Drop for Lent<B> {
    fn drop(&mut self) {
        if let (Some(back), Some(rest)) = (self.back.take(), self.rest.take()) {
            // A request that was given up has nobody to hand it to.
            let _ = back.send(rest);
        }
    }
}

impl<B: http_body::Body<Data = Bytes> + Unpin> http_body::Body for Lent<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let Some(rest) = &mut self.rest else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(&mut rest.inner).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => rest.read += frame.data_ref().map_or(0, Bytes::len),
            Some(Err(_)) | None => self.rest = None,
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.rest.as_ref().is_none_or(|rest| rest.inner.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.rest.as_ref().map_or_else(SizeHint::default, |rest| rest.inner.size_hint())
    }
}
