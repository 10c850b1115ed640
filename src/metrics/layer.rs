//! One tower layer that records every request of both protocols, each exactly once, at its real end:
//! gRPC calls by their status in the trailers, HTTP requests by their code, and what never got that
//! far as cancelled.
//!
//! Knows `http` and `prometheus` only. To use it, make a [`MetricsLayer`] from the descriptors of the
//! gRPC services and the list of HTTP routes, and put it around everything, the router included: in
//! axum that is `layer.layer(router)`, not `Router::layer`, which would box the bodies once more.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{Request, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use prometheus::Registry;
use tower::{Layer, Service};

use self::{guard::Guard, table::Table};
use super::MetricsError;

mod body;
mod families;
mod guard;
mod messages;
mod received;
mod routes;
mod table;

pub use self::{
    body::Recorded,
    received::Received,
    routes::Route,
    table::{UNMATCHED, services},
};

/// What a layer records.
#[derive(Debug, Clone)]
pub struct Recording<'a> {
    /// Encoded `FileDescriptorSet`s: their services' methods are recorded by name, all others as
    /// `other`.
    pub descriptors: &'a [&'a [u8]],
    /// Full names of gRPC services whose calls are not recorded at all.
    pub unrecorded: &'a [&'a str],
    /// The HTTP routes; requests of all others are [`UNMATCHED`].
    pub routes: Vec<Route>,
}

/// See the [module](self).
#[derive(Debug, Clone)]
pub struct MetricsLayer {
    table: Arc<Table>,
}

impl MetricsLayer {
    /// Creates and registers the families, with every child that can ever be, at 0.
    ///
    /// # Errors
    /// If descriptors or a route's template cannot be read, a family is registered already, or two sets
    /// of labels would share a series.
    pub fn new(registry: &Registry, recording: Recording<'_>) -> Result<Self, MetricsError> {
        Ok(Self { table: Arc::new(Table::new(registry, recording)?) })
    }
}

impl<S> Layer<S> for MetricsLayer {
    type Service = Metered<S>;

    fn layer(&self, inner: S) -> Metered<S> {
        Metered { inner, table: self.table.clone() }
    }
}

/// A service whose requests are recorded.
#[derive(Debug, Clone)]
pub struct Metered<S> {
    inner: S,
    table: Arc<Table>,
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for Metered<S>
where
    S: Service<Request<Received<ReqBody>>, Response = Response<ResBody>>,
    ResBody: Body<Data: AsRef<[u8]>>,
{
    type Response = Response<Recorded<ResBody>>;
    type Error = S::Error;
    type Future = RecordFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        let mut guard = Guard::start(&self.table, &request);
        let received = guard.as_ref().and_then(Guard::grpc).map(|call| call.received.clone());
        let request = request.map(|body| Received::new(body, received));
        // A panic in the call itself drops the guard, too.
        Guard::set_polling(&mut guard, true);
        let inner = self.inner.call(request);
        Guard::set_polling(&mut guard, false);
        RecordFuture { inner, guard }
    }
}

pin_project! {
    /// A response that is recorded at its end.
    #[derive(Debug)]
    pub struct RecordFuture<F> {
        #[pin]
        inner: F,
        guard: Option<Guard>,
    }
}

impl<F, B, E> Future for RecordFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Body<Data: AsRef<[u8]>>,
{
    type Output = Result<Response<Recorded<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        Guard::set_polling(this.guard, true);
        let polled = this.inner.poll(cx);
        Guard::set_polling(this.guard, false);
        let result = ready!(polled);
        let guard = this.guard.take();
        Poll::Ready(match result {
            Ok(response) => Ok(Recorded::of(response, guard)),
            Err(error) => {
                if let Some(guard) = guard {
                    guard.failed();
                }
                Err(error)
            }
        })
    }
}

#[cfg(test)]
mod tests;
