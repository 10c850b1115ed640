//! Refuses gRPC on a REST route, plain HTTP on a gRPC method, and gRPC by anything but a POST over
//! HTTP/2, each in the caller's own protocol: the handlers behind them would misread the request, or
//! do the work of one that no gRPC client sends.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    task::{Context, Poll},
};

use axum::{body::Body, extract::MatchedPath};
use futures_util::future::Either;
use http::{Method, Request, Response, Version};
use tower::{Layer, Service};

use super::protocol;
use crate::{error::Error, metrics::Protocol};

#[derive(Debug, Clone, Copy)]
pub(super) struct SpeaksLayer;

impl<S> Layer<S> for SpeaksLayer {
    type Service = Speaks<S>;

    fn layer(&self, inner: S) -> Speaks<S> {
        Speaks { inner }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Speaks<S> {
    inner: S,
}

impl<S> Service<Request<Body>> for Speaks<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = Either<
        Ready<Result<Response<Body>, Error>>,
        futures_util::future::MapErr<S::Future, fn(Infallible) -> Error>,
    >;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx).map_err(|never| match never {})
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // tonic registers a service as `/package.Service/{*rest}`; no REST route ends so. What
        // matched nothing goes on to the fallback.
        let route = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
        let is_grpcs = route.map(|route| route.ends_with("/{*rest}"));
        let is_call = request.method() == Method::POST && request.version() == Version::HTTP_2;
        let refused = match (is_grpcs, protocol(request.headers())) {
            (Some(true), Protocol::Http) => Some(Error::WrongContentType(
                "this path is a gRPC method, expected content-type application/grpc".to_owned(),
            )),
            (Some(true), Protocol::Grpc) if !is_call => Some(Error::NotACall(format!(
                "{} over {:?} given, expected a gRPC call: POST over HTTP/2.0",
                request.method(),
                request.version()
            ))),
            (Some(false), Protocol::Grpc) => Some(Error::NoSuchRoute),
            _ => None,
        };
        match refused {
            Some(error) => Either::Left(ready(Err(error))),
            None => {
                let never: fn(Infallible) -> Error = |never| match never {};
                Either::Right(futures_util::TryFutureExt::map_err(self.inner.call(request), never))
            }
        }
    }
}
