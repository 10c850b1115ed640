//! A body that tells when all of it was handed to the connection.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use axum::body::Body;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::sync::watch;

/// Adds one to a count at the end of the body; a body dropped before its end adds nothing.
pub(super) struct Scraped {
    inner: Body,
    count: Option<watch::Sender<usize>>,
}

impl Scraped {
    pub(super) fn new(inner: Body, count: watch::Sender<usize>) -> Self {
        Self { inner, count: Some(count) }
    }
}

impl http_body::Body for Scraped {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        let failed = matches!(frame, Some(Err(_)));
        if (frame.is_none() || self.inner.is_end_stream())
            && !failed
            && let Some(count) = self.count.take()
        {
            count.send_modify(|count| *count += 1);
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
