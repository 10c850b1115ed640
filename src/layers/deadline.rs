//! The deadline of a request: the server's or, if it is sooner, the one that the client asked for
//! by `grpc-timeout`.

use std::{
    pin::Pin,
    sync::atomic::Ordering,
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{Extensions, Request, Response};
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};
use tower::{Layer, Service};

use super::context::Call;
use crate::{error::Error, listener::Ending, metrics::Protocol, wire};

/// How long after the deadline the layer answers for a handler that has not answered by itself. The
/// store keeps the deadline too, and knows better what to answer: it gets the first word.
const GRACE: Duration = Duration::from_millis(10);

/// How long after the deadline, or after it was shed, a peer may take to read its response.
pub const READING: Duration = Duration::from_secs(5);

/// When the answer is due to the request with these extensions, which is not exempt.
pub fn deadline_of(extensions: &Extensions) -> Instant {
    *Call::of(extensions).deadline.get().expect("the deadline layer is around every handler")
}

#[derive(Debug, Clone, Copy)]
pub(super) struct DeadlineLayer {
    request_timeout: Duration,
}

impl DeadlineLayer {
    pub(super) fn new(request_timeout: Duration) -> Self {
        Self { request_timeout }
    }
}

impl<S> Layer<S> for DeadlineLayer {
    type Service = KeepDeadline<S>;

    fn layer(&self, inner: S) -> KeepDeadline<S> {
        KeepDeadline { inner, request_timeout: self.request_timeout }
    }
}

/// See the [module](self).
#[derive(Debug, Clone)]
pub struct KeepDeadline<S> {
    inner: S,
    request_timeout: Duration,
}

impl<S, B, R> Service<Request<B>> for KeepDeadline<S>
where
    S: Service<Request<B>, Response = Response<R>, Error = Error>,
{
    type Response = Response<R>;
    type Error = Error;
    type Future = DeadlineFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let call = Call::of(request.extensions());
        if !call.class.has_deadline() {
            return DeadlineFuture { inner: self.inner.call(request), due: None, expired: None };
        }
        let asked = match call.protocol {
            Protocol::Grpc => wire::timeout(request.headers()),
            Protocol::Http => None,
        };
        let timeout = asked.map_or(self.request_timeout, |asked| asked.min(self.request_timeout));
        call.short_timeout.store(timeout < self.request_timeout, Ordering::Relaxed);
        let now = call.received_at;
        let deadline = now + timeout;
        if let Some(ending) = request.extensions().get::<Ending>()
            && call.class.ends()
        {
            ending.set_response_limit(now + self.request_timeout + READING);
        }
        // The request is new, and so is its call.
        let _ = call.deadline.set(deadline);
        let due = Some(deadline + GRACE);
        DeadlineFuture { inner: self.inner.call(request), due, expired: None }
    }
}

pin_project! {
    /// A request that is answered by its deadline.
    pub struct DeadlineFuture<F> {
        #[pin]
        inner: F,
        due: Option<Instant>,
        // Made once the answer is waited for.
        #[pin]
        expired: Option<Sleep>,
    }
}

impl<F, R> Future for DeadlineFuture<F>
where
    F: Future<Output = Result<Response<R>, Error>>,
{
    type Output = Result<Response<R>, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(answer) = this.inner.poll(cx) {
            return Poll::Ready(answer);
        }
        let Some(due) = *this.due else { return Poll::Pending };
        let mut expired = this.expired;
        if expired.is_none() {
            expired.set(Some(sleep_until(due)));
        }
        ready!(expired.as_pin_mut().expect("it was set at the latest just now").poll(cx));
        Poll::Ready(Err(Error::DeadlineExceeded))
    }
}
