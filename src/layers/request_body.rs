//! The body of a request on its way in: learns when the request is whole, and lets it in then.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::BoxError;
use bytes::Bytes;
use http::Request;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::{
    admission::{Arrival, InFlight, Incomplete, Permit},
    context::Call,
};
use crate::{
    error::Error,
    listener::{Ending, caller_is_gone},
};

/// How far a request is let in. The body, which a handler reads, and the future of the request,
/// which answers, share it by the [`Call`].
#[derive(Debug, Default)]
pub(super) enum Admission {
    /// It has not arrived whole.
    #[default]
    Arriving,
    /// It is whole and in flight.
    Admitted(Permit),
    /// It is to be answered with this error.
    Refused(Error),
    /// It was answered before it was whole.
    Answered,
}

pin_project! {
    /// A request's body. Counts the request among those that are arriving from the first moment in
    /// which its handler has to wait for bytes: most requests arrive whole by one read.
    pub struct RequestBody<B> {
        #[pin]
        inner: B,
        // `None` once the request is whole, or was answered before.
        gate: Option<Gate>,
    }
}

/// What lets one request in.
pub(super) struct Gate {
    call: Arc<Call>,
    in_flight: InFlight,
    connection: Option<Ending>,
    /// Header fields of the request.
    fields: usize,
    /// Bytes of the body that have come.
    bytes: usize,
    arrival: Option<Arrival>,
    _incomplete: Option<Incomplete>,
}

impl Gate {
    pub(super) fn new<B>(
        call: Arc<Call>,
        in_flight: InFlight,
        connection: Option<Ending>,
        request: &Request<B>,
    ) -> Self {
        let fields = request.headers().len();
        let _incomplete = in_flight.expect(call.class);
        Self { call, in_flight, connection, fields, bytes: 0, arrival: None, _incomplete }
    }

    /// A part of the body has come.
    fn received(&mut self, bytes: usize) -> Result<(), Error> {
        self.bytes += bytes;
        self.arrival.as_mut().map_or(Ok(()), |arrival| arrival.add(bytes))
    }

    /// The rest of the body has not come yet.
    fn waits(&mut self) -> Result<(), Error> {
        if self.arrival.is_none() {
            let (now, connection) = (self.call.received_at, self.connection.as_ref());
            let mut arrival =
                self.in_flight.arrive(self.call.class, self.fields, connection, now)?;
            arrival.add(self.bytes)?;
            self.arrival = Some(arrival);
        }
        Ok(())
    }

    /// The request is whole.
    fn enter(self) -> Result<(), Error> {
        let mut admission = self.call.admission();
        if matches!(*admission, Admission::Arriving) {
            let (class, now) = (self.call.class, self.call.received_at);
            let permit = self.in_flight.enter(class, self.connection.as_ref(), now)?;
            *admission = Admission::Admitted(permit);
        }
        Ok(())
    }
}

impl<B> RequestBody<B> {
    /// The body of a request that is let in.
    pub(super) fn whole(inner: B) -> Self {
        Self { inner, gate: None }
    }

    pub(super) fn arriving(inner: B, gate: Gate) -> Self {
        Self { inner, gate: Some(gate) }
    }
}

impl<B> Body for RequestBody<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut this = self.project();
        let polled = this.inner.as_mut().poll_frame(cx).map_err(Into::into);
        let Some(gate) = this.gate.as_mut() else { return polled };
        let (counted, whole) = match &polled {
            Poll::Pending => (gate.waits(), false),
            Poll::Ready(Some(Ok(frame))) => (
                gate.received(frame.data_ref().map_or(0, Bytes::len)),
                frame.is_trailers() || this.inner.is_end_stream(),
            ),
            Poll::Ready(Some(Err(error))) if caller_is_gone(error.as_ref()) => {
                (Err(gate.call.caller_gone()), false)
            }
            // The body is malformed; the handler reports it.
            Poll::Ready(Some(Err(_))) => (Ok(()), false),
            Poll::Ready(None) => (Ok(()), true),
        };
        if counted.is_ok() && !whole {
            return polled;
        }
        let gate = this.gate.take().expect("it was there above");
        let call = gate.call.clone();
        match counted.and_then(|()| gate.enter()) {
            Ok(()) => polled,
            Err(error) => {
                call.refuse(error);
                Poll::Ready(Some(Err("the request was refused".into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
