//! A peer whose connections share a rate, and count what they send.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep, sleep},
};

/// One peer, with as many connections as it opens.
#[derive(Debug, Clone)]
pub struct HostilePeer {
    target: SocketAddr,
    admin: SocketAddr,
    pace: Arc<Pace>,
}

/// What a peer did so far.
#[derive(Debug, Clone, Copy)]
pub struct Wire {
    /// Connections that it opened.
    pub connections: u64,
    /// Bytes that it sent.
    pub sent: u64,
}

#[derive(Debug)]
struct Pace {
    bytes_per_second: u64,
    connections: AtomicU64,
    sent: AtomicU64,
    /// When what was sent so far has had its time.
    free: Mutex<Instant>,
}

/// Writes longer than this are cut, so that connections take turns.
const TURN: usize = 16 * 1024;

/// A delay shorter than this is left to a later write.
const SLACK: Duration = Duration::from_millis(4);

impl HostilePeer {
    pub fn new(api: SocketAddr, admin: SocketAddr, bytes_per_second: u64) -> Self {
        let (connections, sent) = Default::default();
        let free = Mutex::new(Instant::now());
        let pace = Arc::new(Pace { bytes_per_second, connections, sent, free });
        Self { target: api, admin, pace }
    }

    /// The same peer, against the admin listener.
    pub fn against_admin(mut self) -> Self {
        self.target = self.admin;
        self
    }

    /// Opens a connection.
    pub async fn connect(&self) -> io::Result<Paced> {
        let inner = TcpStream::connect(self.target).await?;
        let number = self.pace.connections.fetch_add(1, Ordering::Relaxed);
        Ok(Paced { number, inner, pace: self.pace.clone(), pause: Box::pin(sleep(Duration::ZERO)) })
    }

    /// Waits until so many bytes were sent, no more of them are taken, or a while has passed.
    pub async fn has_sent(&self, bytes: u64) {
        let (mut last, mut idle) = (0, 0);
        for _ in 0..50 {
            sleep(Duration::from_millis(100)).await;
            let sent = self.wire().sent;
            idle = if sent == last { idle + 1 } else { 0 };
            last = sent;
            if sent >= bytes || idle > 5 {
                return;
            }
        }
    }

    pub fn wire(&self) -> Wire {
        Wire {
            connections: self.pace.connections.load(Ordering::Relaxed),
            sent: self.pace.sent.load(Ordering::Relaxed),
        }
    }
}

impl Pace {
    /// Counts bytes; gives when the next may be sent.
    fn spend(&self, bytes: usize) -> Instant {
        let bytes = u64::try_from(bytes).unwrap();
        self.sent.fetch_add(bytes, Ordering::Relaxed);
        let cost = Duration::from_nanos(bytes * 1_000_000_000 / self.bytes_per_second);
        let mut free = self.free.lock().unwrap();
        *free = (*free).max(Instant::now()) + cost;
        *free
    }
}

/// A connection that sends at its peer's rate.
pub struct Paced {
    /// How many its peer opened before it.
    pub number: u64,
    inner: TcpStream,
    pace: Arc<Pace>,
    pause: Pin<Box<Sleep>>,
}

impl AsyncRead for Paced {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for Paced {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if !self.pause.is_elapsed() {
            ready!(self.pause.as_mut().poll(cx));
        }
        let turn = &buf[..buf.len().min(TURN)];
        let written = ready!(Pin::new(&mut self.inner).poll_write(cx, turn))?;
        let next = self.pace.spend(written);
        if next > Instant::now() + SLACK {
            self.pause.as_mut().reset(next);
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
