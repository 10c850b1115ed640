//! Gives every request its id and every response the server's name; passes failures to the failure
//! log.

use std::{
    convert::Infallible,
    mem,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use http::{Extensions, HeaderName, HeaderValue, Method, Request, Response};
use pin_project_lite::pin_project;
use tokio::time::Instant;
use tower::{Layer, Service};
use uuid::Uuid;

use super::{
    X_REQUEST_ID,
    admission::Class,
    failure_log::{FailureLog, Path, Subject, Text, Traceparent, method, path, traceparent},
    protocol,
    request_body::Admission,
};
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

/// What the layers and the log know of a request. In its extensions as one, since each value there
/// is allocated by itself. Holds copies: a `HeaderValue` or the `Uri` would keep the whole header
/// block in memory.
#[derive(Debug)]
pub(super) struct Call {
    id: Text<MAX_ID>,
    /// Of the caller's trace; empty if there is none.
    traceparent: Traceparent,
    pub(super) protocol: Protocol,
    pub(super) method: Method,
    path: Path,
    /// Whether the caller's `grpc-timeout` is shorter than the server's deadline: the deadline
    /// layer sets it.
    pub(super) short_timeout: AtomicBool,
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

    /// Takes the admission state. An answered request is never admitted.
    pub(super) fn take_admission(&self, answered: bool) -> Admission {
        let next = if answered { Admission::Answered } else { Admission::Arriving };
        mem::replace(&mut *self.admission(), next)
    }

    /// Returns the error for a caller that left before the request was complete.
    pub(super) fn caller_gone(&self) -> Error {
        let passed = self.deadline.get().is_some_and(|deadline| *deadline <= Instant::now());
        if passed { Error::Incomplete } else { Error::CallerGone }
    }

    pub(super) fn metrics(&self) -> &RequestMetrics {
        &self.shared.metrics
    }

    pub(super) fn failure_log(&self) -> &FailureLog {
        &self.shared.failure_log
    }

    /// The fields of its log lines.
    pub(super) fn subject(&self) -> Subject<'_> {
        Subject {
            request_id: self.id.as_str(),
            traceparent: self.traceparent.as_str(),
            protocol: self.protocol,
            method: self.method.as_str(),
            path: self.path.as_str(),
            short_timeout: self.short_timeout.load(Ordering::Relaxed),
        }
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
    failure_log: FailureLog,
}

impl ContextLayer {
    pub(super) fn new(
        served_by: ServedBy,
        metrics: Arc<RequestMetrics>,
        failure_log: FailureLog,
    ) -> Self {
        Self { shared: Arc::new(Shared { served_by, metrics, failure_log }) }
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
            id: request_id(wire::first(headers, &X_REQUEST_ID)),
            traceparent: traceparent(wire::first(headers, &TRACEPARENT)),
            protocol: protocol(headers),
            method: method(request.method()),
            path: path(request.uri().path()),
            short_timeout: AtomicBool::new(false),
            deadline: OnceLock::new(),
            received_at: Instant::now(),
            class: Class::of(&request),
            admission: Mutex::default(),
            shared: self.shared.clone(),
        });
        request.extensions_mut().insert(call.clone());
        // The span is for those who debug: to make one costs more than all of the stack. The line
        // of a failed request carries the same by itself.
        let span = tracing::debug_span!(
            "request",
            request_id = call.id.as_str(),
            traceparent = call.traceparent.as_str()
        );
        let inner = {
            let _entered = span.enter();
            self.inner.call(request)
        };
        ContextFuture { inner, span, call }
    }
}

/// The caller's id if it is visible ASCII and short, else a new one.
fn request_id(given: Option<&HeaderValue>) -> Text<MAX_ID> {
    let usable = |id: &&HeaderValue| {
        (1..=MAX_ID).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    given.filter(usable).map_or_else(
        || {
            let mut text = [0; uuid::fmt::Simple::LENGTH];
            Uuid::new_v4().simple().encode_lower(&mut text);
            Text::new(&text)
        },
        |id| Text::new(id.as_bytes()),
    )
}

fn id_header(id: &Text<MAX_ID>) -> HeaderValue {
    let value = HeaderValue::from_bytes(id.as_bytes());
    let mut value = value.expect("visible ASCII makes a header value");
    // HPACK is not to remember it (RFC 7541, section 7.1.3): no other response has the same, and
    // each would push what recurs out of the tables of both ends.
    value.set_sensitive(true);
    value
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
        this.call.failure_log().record(&response, || this.call.subject());
        let headers = response.headers_mut();
        headers.insert(X_REQUEST_ID, id_header(&this.call.id));
        headers.insert(X_SERVED_BY, this.call.shared.served_by.0.clone());
        Poll::Ready(Ok(response))
    }
}
