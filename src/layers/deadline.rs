//! The deadline of a request: the server's or, if it is sooner, the one that the client asked for by
//! `grpc-timeout`.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{Extensions, Request, Response};
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};
use tower::{Layer, Service};

use super::{is_exempt, protocol};
use crate::{error::Error, listener::ResponseLimit, metrics::Protocol, wire};

/// How long after the deadline the layer answers for a handler that has not answered by itself. The
/// store keeps the deadline too, and knows better what to answer: it gets the first word.
const GRACE: Duration = Duration::from_millis(10);

/// How long after the deadline, or after it was shed, a peer may take to read its response.
pub const READING: Duration = Duration::from_secs(5);

/// When the answer is due; in the extensions of every request that is not exempt.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(Instant);

impl Deadline {
    /// The deadline of the request with these extensions.
    pub fn of(extensions: &Extensions) -> Instant {
        extensions.get::<Self>().expect("the deadline layer is around every handler").0
    }
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

#[derive(Debug, Clone)]
pub(super) struct KeepDeadline<S> {
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

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        if is_exempt(&request) {
            return DeadlineFuture { inner: self.inner.call(request), expired: None };
        }
        let asked = match protocol(request.headers()) {
            Protocol::Grpc => wire::timeout(request.headers()),
            Protocol::Http => None,
        };
        let timeout = asked.map_or(self.request_timeout, |asked| asked.min(self.request_timeout));
        let now = Instant::now();
        let deadline = now + timeout;
        if let Some(limit) = request.extensions().get::<ResponseLimit>() {
            limit.set(now + self.request_timeout + READING);
        }
        request.extensions_mut().insert(Deadline(deadline));
        let expired = Some(sleep_until(deadline + GRACE));
        DeadlineFuture { inner: self.inner.call(request), expired }
    }
}

pin_project! {
    pub(super) struct DeadlineFuture<F> {
        #[pin]
        inner: F,
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
        match this.expired.as_pin_mut() {
            Some(expired) => {
                ready!(expired.poll(cx));
                Poll::Ready(Err(Error::DeadlineExceeded))
            }
            None => Poll::Pending,
        }
    }
}
