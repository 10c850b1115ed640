//! The requests of one connection: counted to the end of their responses, told when to go, and cut
//! off when their peer does not read.

use std::{
    cell::RefCell,
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderValue, Request, Response, Version, header};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use pin_project_lite::pin_project;
use tokio::{
    runtime::Handle,
    time::{Instant, Sleep, sleep_until},
};
use tokio_util::{sync::WaitForCancellationFutureOwned, task::TaskTracker};
use tower::Service;

use super::{Ending, Unread, plan::State};

/// How long the peer of a stream without a limit may take to read its last messages, once the
/// connection was asked to go.
const LAST_MESSAGES: Duration = Duration::from_secs(5);

/// The service of one connection.
pub(super) struct Requests<S> {
    /// Borrowed while its `call` runs. To clone it for each request would count the references of
    /// all its layers, which every thread shares.
    pub(super) inner: RefCell<S>,
    pub(super) state: Arc<State>,
}

impl<S, B> hyper::service::Service<Request<Incoming>> for Requests<S>
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
{
    type Response = Response<Counted<B>>;
    type Error = Infallible;
    type Future = RequestFuture<S::Future>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        let ending = Ending::new(self.state.connection.clone());
        let http1 = request.version() != Version::HTTP_2;
        let counted = self.state.request_came(http1, ending.clone());
        request.extensions_mut().insert(ending.clone());
        // Ready without being asked: the services here shed rather than wait.
        let inner = self.inner.borrow_mut().call(request);
        RequestFuture { inner, http1, ending, counted: Some(counted) }
    }
}

/// One request in flight, as long as it lives.
#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) state: Arc<State>,
    /// Whether there was a response: without one the request was cancelled.
    pub(super) answered: bool,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.state.request_ended(!self.answered);
    }
}

pin_project! {
    pub(super) struct RequestFuture<F> {
        #[pin]
        inner: F,
        http1: bool,
        ending: Ending,
        counted: Option<InFlight>,
    }
}

impl<F, B> Future for RequestFuture<F>
where
    F: Future<Output = Result<Response<B>, Infallible>>,
{
    type Output = Result<Response<Counted<B>>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let Ok(mut response) = ready!(this.inner.poll(cx));
        this.ending.hold_limit();
        let mut counted = this.counted.take();
        if let Some(counted) = &mut counted {
            counted.answered = true;
        }
        if *this.http1 && counted.as_ref().is_some_and(|counted| counted.state.is_closing()) {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
        let after = if *this.http1 { this.ending.take_after_response() } else { None };
        let rest = Rest { counted, after };
        Poll::Ready(Ok(response.map(|inner| Counted { inner, _rest: rest })))
    }
}

/// What is left of a request once its response is written.
struct Rest {
    counted: Option<InFlight>,
    after: Option<BoxFuture<'static, ()>>,
}

impl Drop for Rest {
    fn drop(&mut self) {
        // Outside of a runtime the connection has ended, and with it what is left.
        if let Some(after) = self.after.take()
            && let Ok(runtime) = Handle::try_current()
        {
            let counted = self.counted.take();
            runtime.spawn(async move {
                after.await;
                drop(counted);
            });
        }
    }
}

pin_project! {
    /// A response's body, during which its request is in flight.
    pub(super) struct Counted<B> {
        #[pin]
        inner: B,
        _rest: Rest,
    }
}

impl<B: Body<Data = Bytes>> Body for Counted<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        self.project().inner.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Runs the streams of an HTTP/2 connection. hyper calls the service and hands its stream to this
/// one right after: the last request that came is that stream's.
#[derive(Clone)]
pub(super) struct Streams {
    pub(super) state: Arc<State>,
    pub(super) tracker: TaskTracker,
}

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let ending = self.state.take_ending();
        let ending = ending.unwrap_or_else(|| Ending::new(self.state.connection.clone()));
        self.tracker.spawn(Limited {
            inner: stream,
            ending,
            left: None,
            timer: None,
            unread: None,
        });
    }
}

pin_project! {
    /// A stream that ends at its limit; dropping it resets it towards the peer, frees what its
    /// request holds and ends its record. Without a limit of its own it ends some time after its
    /// connection was asked to go.
    struct Limited<F> {
        #[pin]
        inner: F,
        ending: Ending,
        #[pin]
        left: Option<WaitForCancellationFutureOwned>,
        #[pin]
        timer: Option<Sleep>,
        unread: Option<Unread>,
    }
}

impl<F: Future> Future for Limited<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        if this.inner.poll(cx).is_ready() {
            return Poll::Ready(());
        }
        if this.timer.is_none() {
            let ending = this.ending;
            let at = match ending.limit() {
                Some(_) if !ending.limit_holds() => return Poll::Pending,
                // There is a response, and it could not be written at once.
                Some(at) => match ending.leave_unread() {
                    Some(unread) => {
                        *this.unread = Some(unread);
                        at
                    }
                    None => return Poll::Ready(()),
                },
                None => {
                    if this.left.is_none() {
                        this.left.set(Some(ending.leaving().cancelled_owned()));
                    }
                    let left = this.left.as_mut().as_pin_mut().expect("it was set just now");
                    ready!(left.poll(cx));
                    let at = Instant::now() + LAST_MESSAGES;
                    ending.set_limit(at);
                    at
                }
            };
            this.timer.set(Some(sleep_until(at)));
        }
        let timer = this.timer.as_pin_mut().expect("it was set at the latest just now");
        timer.poll(cx)
    }
}
