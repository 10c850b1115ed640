//! Ends the streams that have no end of their own, such as health's `Watch`, once their connection
//! is asked to go, and idle ones by limits of their own: they would hold the connection, and with
//! it the drain, for as long as the client likes.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::{Code, Status};
use tower::{Layer, Service};

use crate::listener::Ending;

/// For routes whose responses end when their connection is asked to go, with `UNAVAILABLE`, which
/// gRPC clients take as advice to connect anew.
#[derive(Debug, Clone, Copy)]
pub struct UntilLeaving {
    limits: Option<StreamLimits>,
}

/// How long a stream may last.
#[derive(Debug, Clone, Copy)]
pub struct StreamLimits {
    /// Without a response; then it ends with `UNAVAILABLE`.
    pub idle: Duration,
    /// In all, even if its peer reads nothing; then it is reset.
    pub total: Duration,
}

impl UntilLeaving {
    /// Without limits of their own.
    pub fn new() -> Self {
        Self { limits: None }
    }

    /// With limits of their own.
    pub fn with_limits(limits: StreamLimits) -> Self {
        Self { limits: Some(limits) }
    }
}

impl Default for UntilLeaving {
    fn default() -> Self {
        Self::new()
    }
}

impl<S> Layer<S> for UntilLeaving {
    type Service = LeavingService<S>;

    fn layer(&self, inner: S) -> LeavingService<S> {
        LeavingService { inner, limits: self.limits }
    }
}

/// See [`UntilLeaving`].
#[derive(Debug, Clone)]
pub struct LeavingService<S> {
    inner: S,
    limits: Option<StreamLimits>,
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
        let limits = self.limits;
        if let (Some(limits), Some(ending)) = (limits, &ending) {
            ending.set_limit(Instant::now() + limits.total);
        }
        let response = self.inner.call(request);
        Box::pin(async move {
            let response = response.await?;
            Ok(match ending {
                Some(ending) => response.map(|inner| {
                    let leaving = ending.leaving().cancelled_owned();
                    let idle = limits.map(|limits| Idle::new(limits.idle));
                    Body::new(EndingBody { inner, leaving, idle, over: false })
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
        idle: Option<Idle>,
        over: bool,
    }
}

/// Fires once there was no response for some time.
struct Idle {
    limit: Duration,
    timer: Pin<Box<Sleep>>,
}

impl Idle {
    fn new(limit: Duration) -> Self {
        Self { limit, timer: Box::pin(sleep(limit)) }
    }

    fn restart(&mut self) {
        self.timer.as_mut().reset(Instant::now() + self.limit);
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
            if let Some(idle) = this.idle {
                idle.restart();
            }
            return Poll::Ready(frame);
        }
        let message = if this.leaving.poll(cx).is_ready() {
            "the connection is asked to go; connect anew"
        } else if this.idle.as_mut().is_some_and(|idle| idle.timer.as_mut().poll(cx).is_ready()) {
            "the stream was idle; begin another"
        } else {
            return Poll::Pending;
        };
        *this.over = true;
        let mut trailers = HeaderMap::new();
        trailers.insert(Status::GRPC_STATUS, HeaderValue::from(Code::Unavailable as i32));
        let message = HeaderValue::from_static(message);
        trailers.insert(Status::GRPC_MESSAGE, message);
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.inner.is_end_stream()
    }
}
