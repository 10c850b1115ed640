//! The one error that a caller can get, and the one table from it to a gRPC status and to an HTTP
//! problem (RFC 9457).
//!
//! Depends on [`crate::store`] and the metrics' label enums alone.

use std::{fmt, sync::Arc, time::Duration};

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use rand::RngExt as _;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{
    metrics::{Protocol, ShedReason},
    store::StoreError,
};

/// A field of a request that breaks its rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadField {
    /// The field's name in the proto and in JSON.
    pub field: &'static str,
    /// The value and what was expected.
    pub detail: String,
}

impl BadField {
    /// Names the value, shortened if it is long, and what was expected instead.
    pub fn new(field: &'static str, value: &str, expected: &str) -> Self {
        const SHOWN: usize = 64;
        let detail = match value.char_indices().nth(SHOWN) {
            None if value.is_empty() => format!("nothing given, expected {expected}"),
            None => format!("{value:?} given, expected {expected}"),
            Some((end, _)) => format!(
                "{:?} and {} bytes more given, expected {expected}",
                &value[..end],
                value.len() - end
            ),
        };
        Self { field, detail }
    }
}

/// Why a request failed.
#[derive(Debug, Clone)]
pub enum Error {
    /// Fields break their rules: all of them are named.
    Invalid(Vec<BadField>),
    /// The body is not a JSON object, or a member is of the wrong type. HTTP only.
    Malformed(String),
    /// The body's content type, or the protocol spoken on this path, is not the one expected; the
    /// text names both. HTTP only.
    WrongContentType(String),
    /// The `Host` of an HTTP/1.1 request is missing, there twice or invalid; the text says which.
    BadHost(String),
    /// The body is compressed; the text names the encoding. HTTP only.
    WrongContentEncoding(String),
    /// The messages of a gRPC request are not protobuf; the text names the content type. gRPC only.
    UnknownCodec(String),
    /// A gRPC request by another method than POST, or over another HTTP than 2; the text names
    /// both. gRPC only.
    NotACall(String),
    /// The body is longer than the limit, in bytes. HTTP only.
    TooLarge(usize),
    /// The idempotency key named another order before.
    KeyReused,
    /// No such order.
    NoSuchOrder,
    /// No such route, or no such gRPC method.
    NoSuchRoute,
    /// The route does not serve this method; these it does. HTTP only.
    WrongMethod(&'static str),
    /// The request was shed before anything was done.
    Shed(ShedReason),
    /// The store cannot be reached; the outcome of a `Place` may be unknown.
    StoreUnavailable,
    /// The deadline passed.
    DeadlineExceeded,
    /// The deadline passed before the request was whole (RFC 9110, section 15.5.9): the caller's
    /// fault, unlike a deadline that the service missed.
    Incomplete,
    /// The caller went before its request was whole; nobody reads the answer.
    CallerGone,
    /// A bug or a failure that no retry mends. The cause is logged, never sent.
    Internal(String),
}

/// One row of the error table.
struct Row {
    code: Code,
    status: StatusCode,
    /// The last part of the problem's `type`, and its title.
    kind: &'static str,
    title: &'static str,
}

/// nginx's code for a client that closed the request.
fn client_closed_request() -> StatusCode {
    StatusCode::from_u16(499).expect("three digits are a status code")
}

impl Error {
    #[rustfmt::skip]
    fn row(&self) -> Row {
        let (code, status, kind, title) = match self {
            Self::Invalid(_) => (Code::InvalidArgument, StatusCode::UNPROCESSABLE_ENTITY, "invalid-fields", "Invalid fields"),
            Self::Malformed(_) => (Code::InvalidArgument, StatusCode::BAD_REQUEST, "malformed", "Malformed JSON"),
            Self::WrongContentType(_) => (Code::Unimplemented, StatusCode::UNSUPPORTED_MEDIA_TYPE, "wrong-content-type", "Wrong content type"),
            Self::BadHost(_) => (Code::InvalidArgument, StatusCode::BAD_REQUEST, "bad-host", "Bad Host"),
            Self::WrongContentEncoding(_) => (Code::Unimplemented, StatusCode::UNSUPPORTED_MEDIA_TYPE, "wrong-content-encoding", "Wrong content encoding"),
            Self::UnknownCodec(_) => (Code::Unimplemented, StatusCode::UNSUPPORTED_MEDIA_TYPE, "unknown-codec", "Unknown codec"),
            Self::NotACall(_) => (Code::Unimplemented, StatusCode::BAD_REQUEST, "not-a-call", "Not a gRPC call"),
            Self::TooLarge(_) => (Code::ResourceExhausted, StatusCode::PAYLOAD_TOO_LARGE, "too-large", "Body too large"),
            Self::KeyReused => (Code::AlreadyExists, StatusCode::UNPROCESSABLE_ENTITY, "idempotency-key-reused", "Idempotency key reused"),
            Self::NoSuchOrder => (Code::NotFound, StatusCode::NOT_FOUND, "no-such-order", "No such order"),
            Self::NoSuchRoute => (Code::Unimplemented, StatusCode::NOT_FOUND, "no-such-route", "No such route"),
            Self::WrongMethod(_) => (Code::Unimplemented, StatusCode::METHOD_NOT_ALLOWED, "wrong-method", "Method not allowed"),
            Self::Shed(_) => (Code::ResourceExhausted, StatusCode::SERVICE_UNAVAILABLE, "shed", "Too many requests in flight"),
            Self::StoreUnavailable => (Code::Unavailable, StatusCode::SERVICE_UNAVAILABLE, "store-unavailable", "Store unavailable"),
            Self::DeadlineExceeded => (Code::DeadlineExceeded, StatusCode::GATEWAY_TIMEOUT, "deadline-exceeded", "Deadline exceeded"),
            Self::Incomplete => (Code::DeadlineExceeded, StatusCode::REQUEST_TIMEOUT, "incomplete-request", "Incomplete request"),
            Self::CallerGone => (Code::Cancelled, client_closed_request(), "caller-gone", "Client closed request"),
            Self::Internal(_) => (Code::Internal, StatusCode::INTERNAL_SERVER_ERROR, "internal", "Internal error"),
        };
        Row { code, status, kind, title }
    }

    /// How long a caller had better wait before it tries again, at random, so that callers who were
    /// refused together do not come back together; `None` if trying again is no use.
    fn retry_after(&self) -> Option<Duration> {
        matches!(self, Self::Shed(_) | Self::StoreUnavailable)
            .then(|| Duration::from_millis(rand::rng().random_range(250..1250)))
    }

    /// The cause that the log tells and no client sees.
    pub fn cause(&self) -> Option<&str> {
        if let Self::Internal(cause) = self { Some(cause) } else { None }
    }

    /// This error as an answer in the caller's protocol.
    pub fn into_answer(self, protocol: Protocol) -> Response {
        match protocol {
            // RFC 9112 (section 3.2) wants this status whatever the protocol.
            Protocol::Grpc if matches!(self, Self::BadHost(_)) => {
                let status = self.row().status;
                let mut answer: Response = Status::from(self).into_http();
                *answer.status_mut() = status;
                answer
            }
            Protocol::Grpc => Status::from(self).into_http(),
            Protocol::Http => self.into_response(),
        }
    }
}

/// What the client is told.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(fields) => {
                for (i, BadField { field, detail }) in fields.iter().enumerate() {
                    write!(f, "{}{field}: {detail}", if i == 0 { "" } else { "; " })?;
                }
                Ok(())
            }
            Self::Malformed(detail)
            | Self::BadHost(detail)
            | Self::WrongContentType(detail)
            | Self::WrongContentEncoding(detail)
            | Self::UnknownCodec(detail)
            | Self::NotACall(detail) => f.write_str(detail),
            Self::TooLarge(limit) => write!(f, "the body is longer than {limit} bytes"),
            Self::KeyReused => f.write_str(
                "the idempotency key was used for an order of another product or quantity",
            ),
            Self::NoSuchOrder => f.write_str("there is no order of this id"),
            Self::NoSuchRoute => f.write_str("nothing is served on this path"),
            Self::WrongMethod(allowed) => write!(f, "this path serves {allowed}"),
            Self::Shed(ShedReason::InFlight) => {
                f.write_str("too many requests are in flight; nothing was done, try again later")
            }
            Self::Shed(ShedReason::QueueFull) => {
                f.write_str("too many orders are waiting; nothing was done, try again later")
            }
            Self::Shed(ShedReason::ReadersBusy) => {
                f.write_str("too many reads are waiting; nothing was done, try again later")
            }
            Self::StoreUnavailable => f.write_str(
                "the store cannot be reached; try again later, with an idempotency key so that no \
                 order is placed twice",
            ),
            Self::DeadlineExceeded => f.write_str("the deadline passed"),
            Self::Incomplete => f.write_str("the deadline passed before the request arrived whole"),
            Self::CallerGone => f.write_str("the caller went before its request was whole"),
            Self::Internal(_) => f.write_str("internal error"),
        }
    }
}

impl std::error::Error for Error {}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::QueueFull => Self::Shed(ShedReason::QueueFull),
            StoreError::ReadersBusy => Self::Shed(ShedReason::ReadersBusy),
            StoreError::KeyReused => Self::KeyReused,
            StoreError::Unavailable => Self::StoreUnavailable,
            StoreError::DeadlineExceeded => Self::DeadlineExceeded,
            StoreError::Internal(cause) => Self::Internal(cause),
        }
    }
}

/// The error itself stays the status's source, where the request log finds it.
impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let mut details = ErrorDetails::new();
        match &error {
            Error::Invalid(fields) => {
                for BadField { field, detail } in fields {
                    details.add_bad_request_violation(*field, detail);
                }
            }
            Error::KeyReused => {
                details.set_error_info("IDEMPOTENCY_KEY_REUSED", "orders.v1", []);
            }
            _ => {}
        }
        if let Some(delay) = error.retry_after() {
            details.set_retry_info(Some(delay));
        }
        let mut status = Self::with_error_details(error.row().code, error.to_string(), details);
        status.set_source(Arc::new(error));
        status
    }
}

/// An `application/problem+json` answer (RFC 9457). The error itself is in the response's
/// extensions, where the request log finds it.
impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let Row { status, kind, title, .. } = self.row();
        let mut problem = serde_json::json!({
            "type": format!("urn:orders:problem:{kind}"),
            "title": title,
            "status": status.as_u16(),
            "detail": self.to_string(),
        });
        if let Self::Invalid(fields) = &self {
            let errors = fields.iter().map(|BadField { field, detail }| {
                serde_json::json!({ "field": field, "detail": detail })
            });
            problem["errors"] = errors.collect();
        }
        let content_type = HeaderValue::from_static("application/problem+json");
        let mut response =
            (status, [(header::CONTENT_TYPE, content_type)], problem.to_string()).into_response();
        if let Some(delay) = self.retry_after() {
            // Whole seconds are all that the header can say: 1 or 2 of them.
            response.headers_mut().insert(header::RETRY_AFTER, (delay.as_secs() + 1).into());
        }
        if let Self::WrongMethod(allowed) = &self {
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allowed));
        }
        if let Self::WrongContentEncoding(_) = &self {
            let identity = HeaderValue::from_static("identity");
            response.headers_mut().insert(header::ACCEPT_ENCODING, identity);
        }
        response.extensions_mut().insert(Arc::new(self));
        response
    }
}
