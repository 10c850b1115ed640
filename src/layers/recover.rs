//! Turns what the layers below could not answer, panics included, into an answer in the caller's
//! protocol; other calls on the connection notice nothing. A body that panics ends with the same
//! status in its trailers, or, over HTTP, by breaking off. Of a body that is cut off the log is
//! told.

use std::{
    convert::Infallible,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use axum::body::Body;
use bytes::Bytes;
use http::{Method, Request, Response, header};
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use tonic::Status;
use tower::{Layer, Service};

use super::context::Call;
use crate::{error::Error, listener::Ending, metrics::Protocol, panics};

#[derive(Debug, Clone, Copy)]
pub(super) struct RecoverLayer;

impl<S> Layer<S> for RecoverLayer {
    type Service = Recover<S>;

    fn layer(&self, inner: S) -> Recover<S> {
        Recover { inner }
    }
}

/// See the [module](self).
#[derive(Debug, Clone)]
pub struct Recover<S> {
    inner: S,
}

impl<S, B, R> Service<Request<B>> for Recover<S>
where
    S: Service<Request<B>, Response = Response<R>, Error = Error>,
    R: From<Body>,
{
    type Response = Response<Recovered<R>>;
    type Error = Infallible;
    type Future = RecoverFuture<S::Future>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // The layers below and the routes are always ready: they shed rather than wait.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let call = Call::of(request.extensions()).clone();
        let ending = request.extensions().get::<Ending>().cloned();
        let watch = Watch { call, ending };
        // A handler may panic before there is a future of it.
        match watch.run(|| self.inner.call(request)) {
            Ok(inner) => RecoverFuture::Called { inner, watch: Some(watch) },
            Err(error) => RecoverFuture::Panicked { error: Some(error), watch: Some(watch) },
        }
    }
}

/// Runs pieces of one request and tells of a panic in them, once: a counted one, logged by the
/// context layer with the cause that the error carries.
#[derive(Debug)]
struct Watch {
    call: Arc<Call>,
    ending: Option<Ending>,
}

impl Watch {
    /// A future or a body that panicked is not polled again, and the layers keep nothing from one
    /// call to the next, so that no state left half-done is seen.
    fn run<T>(&self, piece: impl FnOnce() -> T) -> Result<T, Error> {
        panics::contained(|| catch_unwind(AssertUnwindSafe(piece))).map_err(|panic| {
            self.call.metrics().panics(self.call.protocol).inc();
            Error::Internal(panic)
        })
    }

    /// An answer that no route made. To HEAD it has no body, as axum sees to for its routes.
    fn answer(&self, error: Error) -> Response<Body> {
        let mut answer = error.into_answer(self.call.protocol);
        if self.call.method == Method::HEAD {
            let length = http_body::Body::size_hint(answer.body()).exact().unwrap_or_default();
            answer.headers_mut().insert(header::CONTENT_LENGTH, length.into());
            *answer.body_mut() = Body::empty();
        }
        answer
    }
}

pin_project! {
    #[project = RecoverProjection]
    /// A request that is answered even if it panics.
    pub enum RecoverFuture<F> {
        Called { #[pin] inner: F, watch: Option<Watch> },
        Panicked { error: Option<Error>, watch: Option<Watch> },
    }
}

impl<F, R> Future for RecoverFuture<F>
where
    F: Future<Output = Result<Response<R>, Error>>,
    R: From<Body>,
{
    type Output = Result<Response<Recovered<R>>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        const ONCE: &str = "a future is not polled after its end";
        let (result, watch) = match self.project() {
            RecoverProjection::Called { inner, watch } => {
                let running = watch.as_ref().expect(ONCE);
                let result = match running.run(|| inner.poll(cx)) {
                    Ok(polled) => ready!(polled),
                    Err(error) => Err(error),
                };
                (result, watch.take().expect(ONCE))
            }
            RecoverProjection::Panicked { error, watch } => {
                (Err(error.take().expect(ONCE)), watch.take().expect(ONCE))
            }
        };
        let response = result.unwrap_or_else(|error| watch.answer(error).map(R::from));
        Poll::Ready(Ok(response.map(|inner| Recovered { inner, watch, over: false })))
    }
}

pin_project! {
    /// A response's body that ends in order even if it panics.
    pub struct Recovered<B> {
        #[pin]
        inner: B,
        watch: Watch,
        over: bool,
    }

    impl<B> PinnedDrop for Recovered<B> {
        fn drop(this: Pin<&mut Self>) {
            let Watch { ending, .. } = &this.watch;
            if !this.over && ending.as_ref().is_some_and(Ending::limit_has_passed) {
                let call = &this.watch.call;
                call.failure_log().cut_off(&call.subject());
            }
        }
    }
}

impl<B> http_body::Body for Recovered<B>
where
    B: http_body::Body<Data = Bytes, Error = axum::Error>,
{
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut this = self.project();
        if *this.over {
            return Poll::Ready(None);
        }
        let error = match this.watch.run(|| this.inner.as_mut().poll_frame(cx)) {
            Ok(polled) => {
                let ended = match &polled {
                    Poll::Pending => false,
                    Poll::Ready(Some(Ok(frame))) => {
                        frame.is_trailers() || this.inner.is_end_stream()
                    }
                    Poll::Ready(Some(Err(_)) | None) => true,
                };
                *this.over |= ended;
                return polled;
            }
            Err(error) => error,
        };
        *this.over = true;
        let call = &this.watch.call;
        call.failure_log().broke_off(&call.subject(), error.cause().unwrap_or_default());
        Poll::Ready(Some(match this.watch.call.protocol {
            Protocol::Grpc => Ok(Frame::trailers(trailers(error))),
            Protocol::Http => Err(axum::Error::new(error)),
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// The trailers of an error: the headers of its answer without a body.
fn trailers(error: Error) -> http::HeaderMap {
    let mut trailers = Status::from(error).into_http::<()>().into_parts().0.headers;
    trailers.remove(http::header::CONTENT_TYPE);
    trailers
}
