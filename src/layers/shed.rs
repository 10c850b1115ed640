//! Sheds requests: one limit of requests in flight over both protocols, budgets for the others. The
//! permit is held to the end of the response's body, since a response is work until it is read.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use axum::body::Body;
use bytes::Bytes;
use http::{Method, Request, Response};
use http_body::{Body as _, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::Instant;
use tower::{Layer, Service};

use super::{
    admission::{InFlight, Permit},
    context::Call,
    deadline::READING,
    request_body::{Admission, Gate, RequestBody},
};
use crate::{error::Error, listener::Ending};

/// Admits requests as long as there are permits.
#[derive(Debug, Clone)]
pub(super) struct ShedLayer(pub(super) InFlight);

impl<S> Layer<S> for ShedLayer {
    type Service = Shed<S>;

    fn layer(&self, inner: S) -> Shed<S> {
        Shed { inner, in_flight: self.0.clone() }
    }
}

/// See the [module](self).
#[derive(Debug, Clone)]
pub struct Shed<S> {
    inner: S,
    in_flight: InFlight,
}

impl<S, B> Service<Request<B>> for Shed<S>
where
    S: Service<Request<RequestBody<B>>, Response = Response<Body>, Error = Error>,
    B: http_body::Body,
{
    type Response = Response<Held>;
    type Error = Error;
    type Future = ShedFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let call = Call::of(request.extensions());
        let connection = request.extensions().get::<Ending>();
        // Bodies that come with other methods are read by no handler.
        if request.method() == Method::POST
            && !request.body().is_end_stream()
            && !call.class.is_stream()
        {
            let gate =
                Gate::new(call.clone(), self.in_flight.clone(), connection.cloned(), &request);
            let arriving = Some(call.clone());
            let request = request.map(|body| RequestBody::arriving(body, gate));
            let inner = self.inner.call(request);
            return ShedFuture::Entered { inner, permit: None, arriving };
        }
        match self.in_flight.enter(call.class, connection, call.received_at) {
            Ok(permit) => {
                let inner = self.inner.call(request.map(RequestBody::whole));
                ShedFuture::Entered { inner, permit: Some(permit), arriving: None }
            }
            Err(error) => {
                // The deadline layer, which limits all others, does not see it.
                if let Some(ending) = connection {
                    ending.set_limit(Instant::now() + READING);
                }
                ShedFuture::Refused { error: Some(error) }
            }
        }
    }
}

pin_project! {
    #[project = ShedProjection]
    /// A request that was let in, or not.
    pub enum ShedFuture<F> {
        Entered {
            #[pin]
            inner: F,
            permit: Option<Permit>,
            // `None` once the request is whole.
            arriving: Option<Arc<Call>>,
        },
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
            ShedProjection::Entered { inner, permit, arriving } => {
                let polled = inner.poll(cx);
                if let Some(call) = arriving {
                    match call.take_admission(polled.is_ready()) {
                        Admission::Arriving
                            if matches!(polled, Poll::Ready(Err(Error::DeadlineExceeded))) =>
                        {
                            return Poll::Ready(Err(Error::Incomplete));
                        }
                        Admission::Arriving | Admission::Answered => {}
                        Admission::Admitted(admitted) => {
                            (*permit, *arriving) = (Some(admitted), None);
                        }
                        Admission::Refused(error) => return Poll::Ready(Err(error)),
                    }
                }
                let response = ready!(polled)?;
                let permit = permit.take().filter(|permit| !permit.ends_with_head());
                if let Some(permit) = &permit {
                    let size = response.extensions().get().map(|ResponseSize(bytes)| *bytes);
                    permit.answered(size.or_else(|| response.body().size_hint().exact()));
                }
                Poll::Ready(Ok(response.map(|inner| Held {
                    inner,
                    rest: Bytes::new(),
                    permit,
                    producing: false,
                })))
            }
            ShedProjection::Refused { error } => {
                Poll::Ready(Err(error.take().expect("a future is not polled after its end")))
            }
        }
    }
}

/// Bytes of a response whose body does not say so: in its extensions, if its handler knows.
#[derive(Debug, Clone, Copy)]
pub struct ResponseSize(pub u64);

/// A response's body and the permit of its request.
#[derive(Debug)]
pub struct Held {
    inner: Body,
    /// What is left of a frame that is longer than a piece.
    rest: Bytes,
    permit: Option<Permit>,
    /// Whether the handler was still making the body when it was polled last.
    producing: bool,
}

impl From<Body> for Held {
    fn from(inner: Body) -> Self {
        Self { inner, rest: Bytes::new(), permit: None, producing: false }
    }
}

/// Longest data frame of a response, in bytes. hyper hands a frame to h2 once its peer has room for
/// one byte of it: in pieces, the rest stays here until it is read.
const PIECE: usize = 8 * 1024;

impl Held {
    fn next_piece(&mut self) -> Frame<Bytes> {
        let piece = self.rest.split_to(PIECE.min(self.rest.len()));
        if self.is_end_stream() {
            self.permit = None;
        }
        Frame::data(piece)
    }
}

impl http_body::Body for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if !self.rest.is_empty() {
            return Poll::Ready(Some(Ok(self.next_piece())));
        }
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        if polled.is_pending() != self.producing {
            self.producing = polled.is_pending();
            if let Some(permit) = &self.permit {
                permit.set_producing(self.producing);
            }
        }
        let frame = match ready!(polled) {
            Some(Ok(frame)) if frame.data_ref().is_some_and(|data| data.len() > PIECE) => {
                self.rest = frame.into_data().unwrap_or_default();
                return Poll::Ready(Some(Ok(self.next_piece())));
            }
            frame => frame,
        };
        if self.inner.is_end_stream() || !matches!(frame, Some(Ok(_))) {
            self.permit = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (mut hint, rest) = (self.inner.size_hint(), self.rest.len() as u64);
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper + rest);
        }
        hint.set_lower(hint.lower() + rest);
        hint
    }
}
