//! One limit of requests in flight over both protocols; who is one too many is told at once. The
//! permit is held to the end of the response's body, since a response is work until it is read.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
};

use axum::body::Body;
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::Instant;
use tower::{Layer, Service};

use super::{deadline::READING, failure_log::Limit, is_exempt};
use crate::{error::Error, listener::Ending, metrics::ShedReason};

/// The limit of requests in flight, and how many there are.
#[derive(Debug, Clone)]
pub struct InFlight(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    count: AtomicUsize,
    max_in_flight: usize,
    /// Whether the last request was shed: the begin and the end of such a time are logged, not each
    /// request in it.
    shedding: AtomicBool,
    /// Whether the begin was logged, and the end must be.
    begin_logged: AtomicBool,
    /// A stranger can make shedding begin and end many times a second.
    lines: Limit,
}

impl InFlight {
    /// None in flight, and at most `max_in_flight`, 1 to a million.
    pub fn new(max_in_flight: usize) -> Self {
        let (count, shedding, begin_logged, lines) = Default::default();
        Self(Arc::new(Shared { count, max_in_flight, shedding, begin_logged, lines }))
    }

    /// How many requests are in flight.
    pub fn count(&self) -> usize {
        self.0.count.load(Ordering::Relaxed)
    }

    fn enter(&self) -> Result<Permit, Error> {
        let Shared { count, max_in_flight, shedding, begin_logged, lines } = &*self.0;
        let one_more = |count| (count < *max_in_flight).then_some(count + 1);
        let Ok(before) = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more) else {
            if !shedding.swap(true, Ordering::Relaxed) && lines.admits() {
                begin_logged.store(true, Ordering::Relaxed);
                tracing::warn!(max_in_flight, "too many requests in flight: shedding begins");
            }
            return Err(Error::Shed(ShedReason::InFlight));
        };
        // It is over only once half of the permits are free: at the limit every second one would be
        // shed and logged.
        if shedding.load(Ordering::Relaxed)
            && before < max_in_flight / 2
            && shedding.swap(false, Ordering::Relaxed)
            && begin_logged.swap(false, Ordering::Relaxed)
        {
            tracing::info!("requests are no longer shed");
        }
        Ok(Permit(self.0.clone()))
    }
}

/// One request in flight, as long as it lives. Nobody waits for a permit, so that a count is enough: a
/// semaphore takes a lock that all threads share when a permit is given back.
#[derive(Debug)]
struct Permit(Arc<Shared>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Admits requests as long as there are permits.
#[derive(Debug, Clone)]
pub(super) struct ShedLayer(pub(super) InFlight);

impl<S> Layer<S> for ShedLayer {
    type Service = Shed<S>;

    fn layer(&self, inner: S) -> Shed<S> {
        Shed { inner, in_flight: self.0.clone() }
    }
}

/// See the [module](self).
#[derive(Debug, Clone)]
pub struct Shed<S> {
    inner: S,
    in_flight: InFlight,
}

impl<S, B> Service<Request<B>> for Shed<S>
where
    S: Service<Request<B>, Response = Response<Body>, Error = Error>,
{
    type Response = Response<Held>;
    type Error = Error;
    type Future = ShedFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let permit = if is_exempt(&request) {
            None
        } else {
            match self.in_flight.enter() {
                Ok(permit) => Some(permit),
                Err(error) => {
                    // The deadline layer, which limits all others, does not see it.
                    if let Some(ending) = request.extensions().get::<Ending>() {
                        ending.set_limit(Instant::now() + READING);
                    }
                    return ShedFuture::Refused { error: Some(error) };
                }
            }
        };
        ShedFuture::Entered { inner: self.inner.call(request), permit }
    }
}

pin_project! {
    #[project = ShedProjection]
    /// A request that was let in, or not.
    pub enum ShedFuture<F> {
        Entered { #[pin] inner: F, permit: Option<Permit> },
        Refused { error: Option<Error> },
    }
}

impl<F> Future for ShedFuture<F>
where
    F: Future<Output = Result<Response<Body>, Error>>,
{
    type Output = Result<Response<Held>, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project() {
            ShedProjection::Entered { inner, permit } => {
                let response = ready!(inner.poll(cx))?;
                let permit = permit.take();
                Poll::Ready(Ok(response.map(|inner| Held { inner, permit })))
            }
            ShedProjection::Refused { error } => {
                Poll::Ready(Err(error.take().expect("a future is not polled after its end")))
            }
        }
    }
}

/// A response's body and the permit of its request.
#[derive(Debug)]
pub struct Held {
    inner: Body,
    permit: Option<Permit>,
}

impl From<Body> for Held {
    fn from(inner: Body) -> Self {
        Self { inner, permit: None }
    }
}

impl http_body::Body for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        if self.inner.is_end_stream() || !matches!(frame, Some(Ok(_))) {
            self.permit = None;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_are_counted_and_one_too_many_is_shed() {
        let in_flight = InFlight::new(2);
        let first = in_flight.enter().unwrap();
        let _second = in_flight.enter().unwrap();
        assert!(matches!(in_flight.enter(), Err(Error::Shed(ShedReason::InFlight))));
        assert_eq!(in_flight.count(), 2);
        drop(first);
        assert_eq!(in_flight.count(), 1);
        in_flight.enter().unwrap();
    }
}
