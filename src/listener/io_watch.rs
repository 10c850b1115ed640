//! The bytes of a connection, watched: when a head begins to arrive, and whether the peer reads. A
//! peer that cancels requests by the hundred is read more slowly, and none is read for long at a
//! time.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep_until},
};

use super::plan::State;

pin_project! {
    pub(super) struct Watched<I> {
        #[pin]
        inner: I,
        state: Arc<State>,
        pause: Option<Pin<Box<Sleep>>>,
    }
}

impl<I> Watched<I> {
    pub(super) fn new(inner: I, state: Arc<State>) -> Self {
        Self { inner, state, pause: None }
    }
}

impl<I: AsyncRead> AsyncRead for Watched<I> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.project();
        while let Some(until) = this.state.paused_until() {
            let pause = this.pause.get_or_insert_with(|| Box::pin(sleep_until(until)));
            ready!(pause.as_mut().poll(cx));
            *this.pause = None;
            this.state.resume();
        }
        if !this.state.is_readable() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        let result = ready!(this.inner.poll_read(cx, buffer));
        if buffer.filled().len() > before {
            this.state.bytes_came(&buffer.filled()[before..]);
        }
        Poll::Ready(result)
    }
}

impl<I: AsyncWrite> AsyncWrite for Watched<I> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.project();
        let polled = this.inner.poll_write(cx, bytes);
        this.state.set_write_blocked(polled.is_pending());
        polled
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.project();
        // To the kernel a vector costs more than a buffer. Most are one batch of small frames, or a
        // head and a short body.
        let mut together = [0; TOGETHER];
        let polled = match slices {
            [one] => this.inner.poll_write(cx, one),
            _ => match joined(slices, &mut together) {
                Some(bytes) => this.inner.poll_write(cx, bytes),
                None => this.inner.poll_write_vectored(cx, slices),
            },
        };
        this.state.set_write_blocked(polled.is_pending());
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.project();
        let polled = this.inner.poll_flush(cx);
        // TLS takes what is written before the peer has room for it.
        this.state.set_write_blocked(polled.is_pending());
        polled
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().inner.poll_shutdown(cx)
    }
}

/// Bytes up to which slices are copied together.
const TOGETHER: usize = 1024;

fn joined<'b>(slices: &[io::IoSlice<'_>], room: &'b mut [u8; TOGETHER]) -> Option<&'b [u8]> {
    let mut end = 0;
    for slice in slices {
        room.get_mut(end..end + slice.len())?.copy_from_slice(slice);
        end += slice.len();
    }
    Some(&room[..end])
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufWriter, duplex};

    use super::*;

    #[tokio::test]
    async fn slices_are_written_in_order_and_whole_whatever_their_number_and_size() {
        for sizes in [&[5][..], &[5, 7], &[1000, 24], &[1000, 25], &[3000, 1, 3000], &[0, 9]] {
            let (inner, mut peer) = duplex(100);
            let mut watched = Watched::new(inner, Arc::new(State::new()));
            let mut number = 0_u8;
            let mut bytes = |size: &usize| -> Vec<u8> {
                std::iter::repeat_with(|| {
                    number = number.wrapping_add(1);
                    number
                })
                .take(*size)
                .collect()
            };
            let parts: Vec<Vec<u8>> = sizes.iter().map(&mut bytes).collect();
            let whole = parts.concat();
            let writing = async {
                let mut slices: Vec<_> = parts.iter().map(|part| io::IoSlice::new(part)).collect();
                let mut left = &mut slices[..];
                while !left.is_empty() {
                    let written = watched.write_vectored(left).await.unwrap();
                    io::IoSlice::advance_slices(&mut left, written);
                }
            };
            let mut read = vec![0; whole.len()];
            let (_, peers) = tokio::join!(writing, peer.read_exact(&mut read));
            peers.unwrap();
            assert_eq!(read, whole, "{sizes:?}");
        }
    }

    #[tokio::test]
    async fn what_is_written_and_not_flushed_is_blocked() {
        let (inner, mut peer) = duplex(16);
        let state = Arc::new(State::new());
        // It takes all at once and hands it on as there is room, as TLS does.
        let mut watched = Watched::new(BufWriter::with_capacity(1024, inner), state.clone());
        watched.write_all(&[0; 100]).await.unwrap();
        {
            let mut flushing = std::pin::pin!(watched.flush());
            assert!(futures_util::poll!(flushing.as_mut()).is_pending());
            assert!(state.is_write_blocked());
            let mut read = [0; 100];
            let (flushed, _) = tokio::join!(flushing, peer.read_exact(&mut read));
            flushed.unwrap();
        }
        assert!(!state.is_write_blocked());
    }
}
