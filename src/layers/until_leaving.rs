//! Ends the streams that have no end of their own, such as health's `Watch`, once their connection is
//! asked to go: they would hold it, and with it the drain, for as long as the client likes.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use pin_project_lite::pin_project;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::{Code, Status};
use tower::{Layer, Service};

use crate::listener::Ending;

/// For routes whose responses end when their connection is asked to go, with `UNAVAILABLE`, which
/// gRPC clients take as advice to connect anew.
#[derive(Debug, Clone, Copy)]
pub struct UntilLeaving;

impl<S> Layer<S> for UntilLeaving {
    type Service = LeavingService<S>;

    fn layer(&self, inner: S) -> LeavingService<S> {
        LeavingService { inner }
    }
}

/// See [`UntilLeaving`].
#[derive(Debug, Clone)]
pub struct LeavingService<S> {
    inner: S,
}

impl<S> Service<Request<Body>> for LeavingService<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = futures_util::future::BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let ending = request.extensions().get::<Ending>().cloned();
        let response = self.inner.call(request);
        Box::pin(async move {
            let response = response.await?;
            Ok(match ending {
                Some(ending) => response.map(|inner| {
                    let leaving = ending.leaving().cancelled_owned();
                    Body::new(EndingBody { inner, leaving, over: false })
                }),
                None => response,
            })
        })
    }
}

pin_project! {
    struct EndingBody {
        #[pin]
        inner: Body,
        #[pin]
        leaving: WaitForCancellationFutureOwned,
        over: bool,
    }
}

impl http_body::Body for EndingBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.project();
        if *this.over {
            return Poll::Ready(None);
        }
        // What the stream has to say goes first: a watcher learns NOT_SERVING before the end.
        if let Poll::Ready(frame) = this.inner.poll_frame(cx) {
            return Poll::Ready(frame);
        }
        if this.leaving.poll(cx).is_pending() {
            return Poll::Pending;
        }
        *this.over = true;
        let mut trailers = HeaderMap::new();
        trailers.insert(Status::GRPC_STATUS, HeaderValue::from(Code::Unavailable as i32));
        let message = HeaderValue::from_static("the connection is asked to go; connect anew");
        trailers.insert(Status::GRPC_MESSAGE, message);
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.inner.is_end_stream()
    }
}
