//! The body of a recorded request, which counts the gRPC messages that are read from it.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use prometheus::IntCounter;

use super::messages::Messages;

pin_project! {
    /// A request's body whose messages are counted as they are read.
    #[derive(Debug)]
    pub struct Received<B> {
        #[pin]
        inner: B,
        counter: Option<IntCounter>,
        messages: Messages,
    }
}

impl<B> Received<B> {
    /// Without a counter nothing is counted.
    pub(super) fn new(inner: B, counter: Option<IntCounter>) -> Self {
        Self { inner, counter, messages: Messages::default() }
    }
}

impl<B> Body for Received<B>
where
    B: Body<Data: AsRef<[u8]>>,
{
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        let frame = ready!(this.inner.poll_frame(cx));
        if let (Some(Ok(frame)), Some(counter)) = (&frame, this.counter)
            && let Some(data) = frame.data_ref()
        {
            counter.inc_by(this.messages.count(data.as_ref()));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
