//! Gives every request its id and tells who served it; logs every failed request once, with both
//! the id and the caller's trace.

use std::{
    convert::Infallible,
    fmt::Display,
    mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    task::{Context, Poll, ready},
};

use http::{Extensions, HeaderName, HeaderValue, Method, Request, Response, Uri};
use pin_project_lite::pin_project;
use tokio::time::Instant;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::Level;
use uuid::Uuid;

use super::{X_REQUEST_ID, admission::Class, protocol, request_body::Admission};
use crate::{
    error::Error,
    metrics::{Protocol, RequestMetrics},
    wire,
};

const X_SERVED_BY: HeaderName = HeaderName::from_static("x-served-by");
/// W3C Trace Context.
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Longest id of a caller's that is kept, in bytes.
const MAX_ID: usize = 128;

/// What the layers and the log know of a request. In its extensions as one, since each value there is
/// allocated by itself.
#[derive(Debug)]
pub(super) struct Call {
    id: Id,
    /// Of the caller's trace.
    traceparent: Option<HeaderValue>,
    pub(super) protocol: Protocol,
    pub(super) method: Method,
    uri: Uri,
    /// When the answer is due: the deadline layer sets it, of every request that is not exempt.
    pub(super) deadline: OnceLock<Instant>,
    pub(super) received_at: Instant,
    pub(super) class: Class,
    admission: Mutex<Admission>,
    shared: Arc<Shared>,
}

impl Call {
    /// Of the request with these extensions.
    pub(super) fn of(extensions: &Extensions) -> &Arc<Self> {
        extensions.get().expect("the context layer is around the others and every handler")
    }

    /// How far the request is let in.
    pub(super) fn admission(&self) -> MutexGuard<'_, Admission> {
        // No code can panic while it holds the lock.
        self.admission.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The request is to be answered with this error.
    pub(super) fn refuse(&self, error: Error) {
        *self.admission() = Admission::Refused(error);
    }

    /// Takes what became of the request since; an answered one is not let in any more.
    pub(super) fn take_admission(&self, answered: bool) -> Admission {
        let next = if answered { Admission::Answered } else { Admission::Arriving };
        mem::replace(&mut *self.admission(), next)
    }

    /// Why a request ends whose caller went before it was whole.
    pub(super) fn caller_gone(&self) -> Error {
        let passed = self.deadline.get().is_some_and(|deadline| *deadline <= Instant::now());
        if passed { Error::DeadlineExceeded } else { Error::CallerGone }
    }

    pub(super) fn metrics(&self) -> &RequestMetrics {
        &self.shared.metrics
    }

    pub(super) fn request_id(&self) -> &str {
        match &self.id {
            Id::Given(id) => shown(Some(id)),
            Id::Minted(id) => std::str::from_utf8(id).unwrap_or_default(),
        }
    }

    /// Empty if the caller sent none.
    pub(super) fn traceparent(&self) -> &str {
        shown(self.traceparent.as_ref())
    }
}

/// Which process answers: the value of `x-served-by`.
#[derive(Debug, Clone)]
pub struct ServedBy(HeaderValue);

impl ServedBy {
    /// `host:process`. Characters of the host name that no header may hold become `?`.
    pub fn new(host: &str, process: u32) -> Self {
        let visible = |c: char| if c.is_ascii_graphic() { c } else { '?' };
        let text = format!("{}:{process}", host.chars().map(visible).collect::<String>());
        Self(text.try_into().expect("visible ASCII makes a header value"))
    }
}

#[derive(Debug, Clone)]
pub(super) struct ContextLayer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    served_by: ServedBy,
    metrics: Arc<RequestMetrics>,
}

impl ContextLayer {
    pub(super) fn new(served_by: ServedBy, metrics: Arc<RequestMetrics>) -> Self {
        Self { shared: Arc::new(Shared { served_by, metrics }) }
    }
}

impl<S> Layer<S> for ContextLayer {
    type Service = WithContext<S>;

    fn layer(&self, inner: S) -> WithContext<S> {
        WithContext { inner, shared: self.shared.clone() }
    }
}

/// See the [module](self).
#[derive(Debug, Clone)]
pub struct WithContext<S> {
    inner: S,
    shared: Arc<Shared>,
}

impl<S, B, R> Service<Request<B>> for WithContext<S>
where
    S: Service<Request<B>, Response = Response<R>, Error = Infallible>,
{
    type Response = Response<R>;
    type Error = Infallible;
    type Future = ContextFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let headers = request.headers();
        let call = Arc::new(Call {
            id: Id::new(wire::first(headers, &X_REQUEST_ID)),
            traceparent: wire::first(headers, &TRACEPARENT).cloned(),
            protocol: protocol(headers),
            method: request.method().clone(),
            uri: request.uri().clone(),
            deadline: OnceLock::new(),
            received_at: Instant::now(),
            class: Class::of(&request),
            admission: Mutex::default(),
            shared: self.shared.clone(),
        });
        request.extensions_mut().insert(call.clone());
        // The span is for those who debug: to make one costs more than all of the stack. The line of
        // a failed request carries the same by itself.
        let span = tracing::debug_span!(
            "request",
            request_id = call.request_id(),
            traceparent = call.traceparent()
        );
        let inner = {
            let _entered = span.enter();
            self.inner.call(request)
        };
        ContextFuture { inner, span, call }
    }
}

/// The id of a request.
#[derive(Debug)]
enum Id {
    /// By the caller.
    Given(HeaderValue),
    /// Hexadecimal digits.
    Minted([u8; uuid::fmt::Simple::LENGTH]),
}

impl Id {
    /// The caller's, if it is one that can be logged, else a new one.
    fn new(given: Option<&HeaderValue>) -> Self {
        let usable = |id: &&HeaderValue| {
            (1..=MAX_ID).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
        };
        given.filter(usable).map_or_else(
            || {
                let mut text = [0; uuid::fmt::Simple::LENGTH];
                Uuid::new_v4().simple().encode_lower(&mut text);
                Self::Minted(text)
            },
            |id| Self::Given(id.clone()),
        )
    }

    fn to_header(&self) -> HeaderValue {
        let mut value = match self {
            Self::Given(id) => id.clone(),
            Self::Minted(id) => {
                HeaderValue::from_bytes(id).expect("hexadecimal digits make a header value")
            }
        };
        // HPACK is not to remember it (RFC 7541, section 7.1.3): no other response has the same, and
        // each would push what recurs out of the tables of both ends.
        value.set_sensitive(true);
        value
    }
}

fn shown(value: Option<&HeaderValue>) -> &str {
    value.and_then(|value| value.to_str().ok()).unwrap_or_default()
}

pin_project! {
    /// A request that has its names.
    pub struct ContextFuture<F> {
        #[pin]
        inner: F,
        span: tracing::Span,
        call: Arc<Call>,
    }
}

impl<F, R> Future for ContextFuture<F>
where
    F: Future<Output = Result<Response<R>, Infallible>>,
{
    type Output = Result<Response<R>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let _entered = this.span.enter();
        let Ok(mut response) = ready!(this.inner.poll(cx));
        record_failure(this.call, &response);
        let headers = response.headers_mut();
        headers.insert(X_REQUEST_ID, this.call.id.to_header());
        headers.insert(X_SERVED_BY, this.call.shared.served_by.0.clone());
        Poll::Ready(Ok(response))
    }
}

/// One line for a failed request; a shed one is counted, too. Errors that come by the thousand while
/// an outage or an overload lasts are for `debug`: their begin and end are logged where they are
/// noticed, their number is in the metrics.
fn record_failure<R>(call: &Call, response: &Response<R>) {
    let extensions = response.extensions();
    if let Some(error) = extensions.get::<Arc<Error>>() {
        return record_error(call, response.status().as_u16(), error);
    }
    let Some(status) = extensions.get::<Status>().filter(|status| status.code() != Code::Ok) else {
        return;
    };
    let source = std::error::Error::source(status).and_then(<dyn std::error::Error>::downcast_ref);
    match source {
        Some(error) => record_error(call, format_args!("{:?}", status.code()), error),
        // tonic's own: the bytes are no message, or a message of an encoding that it does not know.
        None => {
            if matches!(status.code(), Code::Internal | Code::Unimplemented) {
                call.metrics().malformed(call.protocol).inc();
            }
            log(Level::INFO, call, format_args!("{:?}", status.code()), status.message());
        }
    }
}

fn record_error(call: &Call, code: impl Display, error: &Error) {
    let level = match error {
        Error::Internal(_) => Level::ERROR,
        Error::DeadlineExceeded => Level::WARN,
        Error::Shed(reason) => {
            call.metrics().shed(call.protocol, *reason).inc();
            Level::DEBUG
        }
        Error::Malformed(_) | Error::UnknownCodec(_) | Error::NotACall(_) => {
            call.metrics().malformed(call.protocol).inc();
            Level::INFO
        }
        Error::StoreUnavailable | Error::CallerGone => Level::DEBUG,
        _ => Level::INFO,
    };
    match error.cause() {
        Some(cause) => log(level, call, code, cause),
        None => log(level, call, code, error),
    }
}

fn log(level: Level, call: &Call, code: impl Display, cause: impl Display) {
    macro_rules! line {
        ($level:ident) => {
            tracing::$level!(
                request_id = call.request_id(),
                traceparent = call.traceparent(),
                protocol = call.protocol.as_str(),
                method = %call.method,
                path = call.uri.path(),
                %code,
                %cause,
                "request failed"
            )
        };
    }
    match level {
        Level::ERROR => line!(error),
        Level::WARN => line!(warn),
        Level::INFO => line!(info),
        _ => line!(debug),
    }
}
