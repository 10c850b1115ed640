//! The body of a recorded response, which looks for its end.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::{Response, header};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::{guard::Guard, messages::Messages};

pin_project! {
    /// A response's body that ends its request's record.
    #[derive(Debug)]
    pub struct Recorded<B> {
        #[pin]
        inner: B,
        guard: Option<Guard>,
        messages: Messages,
        // Of an HTTP response: hyper drops the body at the last byte of its declared length.
        rest: Option<u64>,
    }
}

impl<B: Body> Recorded<B> {
    /// Looks at the head: a response without a body ends here, since hyper never polls its body.
    pub(super) fn of(response: Response<B>, mut guard: Option<Guard>) -> Response<Self> {
        let mut rest = None;
        let mut bodiless = false;
        if let Some(guard) = &mut guard {
            guard.head(response.status(), response.headers());
            bodiless = guard.is_bodiless(response.status());
            if guard.grpc().is_none() {
                let declared = response.headers().get(header::CONTENT_LENGTH);
                rest = declared
                    .and_then(|length| length.to_str().ok()?.parse().ok())
                    .or_else(|| response.body().size_hint().exact());
            }
        }
        if (bodiless || rest == Some(0) || response.body().is_end_stream())
            && let Some(guard) = guard.take()
        {
            guard.ended(None);
        }
        response.map(|inner| Self { inner, guard, messages: Messages::default(), rest })
    }
}

impl<B> Body for Recorded<B>
where
    B: Body<Data: AsRef<[u8]>>,
{
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut this = self.project();
        Guard::set_polling(this.guard, true);
        let polled = this.inner.as_mut().poll_frame(cx);
        Guard::set_polling(this.guard, false);
        let frame = ready!(polled);
        let Some(guard) = this.guard.as_ref() else { return Poll::Ready(frame) };
        let ended = match &frame {
            Some(Ok(frame)) => match frame.data_ref() {
                Some(data) => {
                    let data = data.as_ref();
                    if let Some(handles) = guard.grpc() {
                        handles.sent.inc_by(this.messages.count(data));
                    }
                    let rest = this.rest.as_mut().map(|rest| {
                        *rest = rest.saturating_sub(data.len() as u64);
                        *rest
                    });
                    rest == Some(0) || this.inner.is_end_stream()
                }
                // Trailers: after them there is not even a `None`.
                None => true,
            },
            Some(Err(_)) | None => true,
        };
        if ended && let Some(guard) = this.guard.take() {
            match &frame {
                Some(Ok(frame)) => guard.ended(frame.trailers_ref()),
                Some(Err(_)) => guard.failed(),
                None => guard.ended(None),
            }
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
