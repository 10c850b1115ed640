//! The bytes of a connection, watched: when a head begins to arrive, and whether the peer reads.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::plan::State;

pin_project! {
    pub(super) struct Watched<I> {
        #[pin]
        inner: I,
        state: Arc<State>,
    }
}

impl<I> Watched<I> {
    pub(super) fn new(inner: I, state: Arc<State>) -> Self {
        Self { inner, state }
    }
}

impl<I: AsyncRead> AsyncRead for Watched<I> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.project();
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
        let polled = this.inner.poll_write_vectored(cx, slices);
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

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufWriter, duplex};

    use super::*;

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
