//! One limit of requests in flight over both protocols; who is one too many is told at once. The
//! permit is held to the end of the response's body, since a response is work until it is read.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use axum::body::Body;
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tower::{Layer, Service};

use super::{deadline::READING, is_exempt};
use crate::{error::Error, listener::ResponseLimit, metrics::ShedReason};

/// The limit of requests in flight, and how many there are.
#[derive(Debug, Clone)]
pub struct InFlight {
    permits: Arc<Semaphore>,
    max_in_flight: usize,
    /// Whether the last request was shed: the begin and the end of such a time are logged, not each
    /// request in it.
    shedding: Arc<AtomicBool>,
}

impl InFlight {
    /// None in flight, and at most `max_in_flight`, 1 to a million.
    pub fn new(max_in_flight: usize) -> Self {
        let permits = Arc::new(Semaphore::new(max_in_flight));
        Self { permits, max_in_flight, shedding: Arc::default() }
    }

    /// How many requests are in flight.
    pub fn count(&self) -> usize {
        self.max_in_flight - self.permits.available_permits()
    }

    fn enter(&self) -> Result<OwnedSemaphorePermit, Error> {
        match self.permits.clone().try_acquire_owned() {
            Ok(permit) => {
                // The load keeps the line of all cores' caches shared while nothing is shed. It is
                // over only once half of the permits are free: at the limit every second one would
                // be shed and logged.
                if self.shedding.load(Ordering::Relaxed)
                    && self.count() <= self.max_in_flight / 2
                    && self.shedding.swap(false, Ordering::Relaxed)
                {
                    tracing::info!("requests are no longer shed");
                }
                Ok(permit)
            }
            Err(_) => {
                if !self.shedding.swap(true, Ordering::Relaxed) {
                    let max_in_flight = self.max_in_flight;
                    tracing::warn!(max_in_flight, "too many requests in flight: shedding begins");
                }
                Err(Error::Shed(ShedReason::InFlight))
            }
        }
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

#[derive(Debug, Clone)]
pub(super) struct Shed<S> {
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
                    if let Some(limit) = request.extensions().get::<ResponseLimit>() {
                        limit.set(Instant::now() + READING);
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
    pub(super) enum ShedFuture<F> {
        Entered { #[pin] inner: F, permit: Option<OwnedSemaphorePermit> },
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
    permit: Option<OwnedSemaphorePermit>,
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
