//! Refuses gRPC on a REST route and plain HTTP on a gRPC method, each in the caller's own protocol:
//! the handlers behind them would misread the request.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    task::{Context, Poll},
};

use axum::{body::Body, extract::MatchedPath};
use futures_util::future::Either;
use http::{Request, Response};
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
        let refused = match (route, protocol(request.headers())) {
            (Some(route), Protocol::Http) if route.ends_with("/{*rest}") => {
                Some(Error::WrongContentType(
                    "this path is a gRPC method, expected content-type application/grpc".to_owned(),
                ))
            }
            (Some(route), Protocol::Grpc) if !route.ends_with("/{*rest}") => {
                Some(Error::NoSuchRoute)
            }
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
