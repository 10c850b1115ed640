//! Refuses gRPC on a REST route, plain HTTP on a gRPC method, and gRPC by anything but a POST over
//! HTTP/2, each in the caller's own protocol: the handlers behind them would misread the request, or
//! do the work of one that no gRPC client sends.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::body::Body;
use futures_util::future::Either;
use http::{Method, Request, Response, Version};
use tower::{Layer, Service};

use super::context::Call;
use crate::{error::Error, metrics::Protocol};

/// The gRPC services on the API's port.
#[derive(Debug, Clone)]
pub struct GrpcServices(Arc<[String]>);

impl GrpcServices {
    /// By their full names, such as `package.Service`.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self(names.into_iter().collect())
    }

    /// Whether one of them is called by this path, be there such a method or not.
    fn have(&self, path: &str) -> bool {
        let parts = path.strip_prefix('/').and_then(|path| path.split_once('/'));
        parts.is_some_and(|(name, method)| !method.is_empty() && self.0.iter().any(|n| n == name))
    }
}

#[derive(Debug, Clone)]
pub(super) struct SpeaksLayer(pub(super) GrpcServices);

impl<S> Layer<S> for SpeaksLayer {
    type Service = Speaks<S>;

    fn layer(&self, inner: S) -> Speaks<S> {
        Speaks { inner, services: self.0.clone() }
    }
}

/// See the [module](self).
#[derive(Debug, Clone)]
pub struct Speaks<S> {
    inner: S,
    services: GrpcServices,
}

impl<S> Service<Request<Body>> for Speaks<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = Either<
        Ready<Result<Response<Body>, Error>>,
        futures_util::future::MapErr<Pin<Box<S::Future>>, fn(Infallible) -> Error>,
    >;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx).map_err(|never| match never {})
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let is_call = request.method() == Method::POST && request.version() == Version::HTTP_2;
        let is_grpcs = self.services.have(request.uri().path());
        let refused = match (is_grpcs, Call::of(request.extensions()).protocol) {
            (true, Protocol::Http) => Some(Error::WrongContentType(
                "this path is a gRPC method, expected content-type application/grpc".to_owned(),
            )),
            (true, Protocol::Grpc) if !is_call => Some(Error::NotACall(format!(
                "{} over {:?} given, expected a gRPC call: POST over HTTP/2.0",
                request.method(),
                request.version()
            ))),
            (false, Protocol::Grpc) => Some(Error::NoSuchRoute),
            _ => None,
        };
        match refused {
            Some(error) => Either::Left(ready(Err(error))),
            None => {
                let never: fn(Infallible) -> Error = |never| match never {};
                // axum's future holds the request until it is polled. Each layer around this one would
                // move it.
                let called = Box::pin(self.inner.call(request));
                Either::Right(futures_util::TryFutureExt::map_err(called, never))
            }
        }
    }
}
