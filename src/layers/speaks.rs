//! Refuses gRPC on a REST route, plain HTTP on a gRPC method, gRPC by anything but a POST over
//! HTTP/2 with messages in protobuf, and HTTP/1.1 without one valid `Host`, each in the caller's
//! own protocol: the handlers behind them would misread the request, or run a request that no valid
//! client sends.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    net::Ipv6Addr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::body::Body;
use futures_util::future::Either;
use http::{HeaderMap, Method, Request, Response, Version, header};
use tower::{Layer, Service};

use super::context::Call;
use crate::{error::Error, metrics::Protocol, wire};

/// Bytes of a refused header that the answer shows.
const MAX_SHOWN: usize = 64;

/// The gRPC services on the API's port.
#[derive(Debug, Clone)]
pub struct GrpcServices(Arc<[MethodPath]>);

/// A method's path, such as `/package.Service/Method`, and the length of its service's part, up to
/// and with the second slash.
#[derive(Debug)]
struct MethodPath {
    path: String,
    service: usize,
}

impl GrpcServices {
    /// By the paths of their methods, such as `/package.Service/Method`.
    pub fn new(methods: impl IntoIterator<Item = String>) -> Self {
        let parts = |path: String| MethodPath { service: service_part(&path), path };
        Self(methods.into_iter().map(parts).collect())
    }

    /// Whether one of them is called by this path, be there such a method or not.
    fn have(&self, path: &str) -> bool {
        let called = &path[..service_part(path)];
        called.len() < path.len()
            && self.0.iter().any(|method| method.path[..method.service] == *called)
    }

    fn have_method(&self, path: &str) -> bool {
        self.0.iter().any(|method| method.path == path)
    }
}

fn service_part(path: &str) -> usize {
    path.rfind('/').map_or(0, |end| end + 1)
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
        let refused = check(&request, &self.services);
        match refused {
            Some(error) => Either::Left(ready(Err(error))),
            None => {
                let never: fn(Infallible) -> Error = |never| match never {};
                // axum's future holds the request until it is polled. Each layer around this one
                // would move it.
                let called = Box::pin(self.inner.call(request));
                Either::Right(futures_util::TryFutureExt::map_err(called, never))
            }
        }
    }
}

fn check(request: &Request<Body>, services: &GrpcServices) -> Option<Error> {
    let (method, version, headers) = (request.method(), request.version(), request.headers());
    if version == Version::HTTP_11
        && let Err(error) = check_host(headers)
    {
        return Some(error);
    }
    let is_call = method == Method::POST && version == Version::HTTP_2;
    let path = request.uri().path();
    let is_grpcs = services.have(path);
    match (is_grpcs, Call::of(request.extensions()).protocol) {
        (true, Protocol::Http) => Some(Error::WrongContentType(
            "this path is a gRPC method, expected content-type application/grpc".to_owned(),
        )),
        // Only calls of methods that exist are malformed: the error ratio rests on it.
        (true, Protocol::Grpc) if !services.have_method(path) => Some(Error::NoSuchRoute),
        (true, Protocol::Grpc) if !is_call => Some(Error::NotACall(format!(
            "{method} over {version:?} given, expected a gRPC call: POST over HTTP/2.0"
        ))),
        (true, Protocol::Grpc) if !wire::is_protobuf(headers) => {
            let given =
                wire::first(headers, &header::CONTENT_TYPE).map_or(&b""[..], |v| v.as_bytes());
            let given = String::from_utf8_lossy(&given[..given.len().min(MAX_SHOWN)]);
            Some(Error::UnknownCodec(format!(
                "content-type {given:?} given, expected application/grpc or application/grpc+proto"
            )))
        }
        (false, Protocol::Grpc) => Some(Error::NoSuchRoute),
        _ => None,
    }
}

/// RFC 9112, section 3.2: exactly one, and an authority without user information.
fn check_host(headers: &HeaderMap) -> Result<(), Error> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let bad = |what: &str| Err(Error::BadHost(format!("{what}, expected exactly one host name")));
    match (hosts.next(), hosts.next()) {
        (None, _) => bad("no Host given"),
        (Some(_), Some(_)) => bad("more than one Host given"),
        (Some(host), None) if is_host(host.as_bytes()) => Ok(()),
        (Some(host), None) => {
            let host = host.as_bytes();
            let shown = String::from_utf8_lossy(&host[..host.len().min(MAX_SHOWN)]);
            bad(&format!("Host {shown:?} given"))
        }
    }
}

/// `host [":" port]` of RFC 3986, section 3.2, where the host is an IPv6 address in brackets or a
/// name that is not empty. (`http`'s `Authority` would copy it, and accepts brackets around
/// anything.)
fn is_host(host: &[u8]) -> bool {
    let Ok(host) = str::from_utf8(host) else { return false };
    let (host_is_valid, port) = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, port)) => (address.parse::<Ipv6Addr>().is_ok(), port),
            None => return false,
        },
        None => {
            let (name, port) = host.split_at(host.find(':').unwrap_or(host.len()));
            (!name.is_empty() && name.bytes().all(is_name_byte), port)
        }
    };
    let port_is_valid = port.is_empty()
        || port.strip_prefix(':').is_some_and(|port| {
            port.bytes().all(|digit| digit.is_ascii_digit())
                && (port.is_empty() || port.parse::<u16>().is_ok())
        });
    host_is_valid && port_is_valid
}

/// Whether a byte may stand in a `reg-name`.
fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_a_name_or_an_address_with_or_without_a_port() {
        for host in
            ["x", "orders.test", "orders.test:8181", "127.0.0.1:1", "[::1]:8181", "a_b", "x:"]
        {
            assert!(is_host(host.as_bytes()), "{host}");
        }
        for host in [
            "",
            " ",
            "a b",
            "a/b",
            "user@host",
            ":80",
            "x:y",
            "x:99999",
            "x:80:80",
            "x:+80",
            "[::1",
            "[]",
            "[zz]",
            "[]:80",
            "a\\b",
            "http://x",
            "\u{e4}",
        ] {
            assert!(!is_host(host.as_bytes()), "{host}");
        }
    }
}
