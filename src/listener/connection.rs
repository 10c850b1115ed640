//! One connection, from the handshake to its end.

use std::{
    cell::RefCell, convert::Infallible, error::Error, future::poll_fn, net::SocketAddr, pin::pin,
    sync::Arc, task::Poll,
};

use bytes::Bytes;
use futures_util::StreamExt as _;
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use prometheus::IntGauge;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::{Notify, watch},
    time::{sleep, sleep_until, timeout},
};
use tokio_rustls::server::TlsStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::Service;

use super::{
    Limits, Phase, Tls,
    aborts::abort_reason,
    io_watch::Watched,
    news::{News, news},
    plan::{Act, LAST_WORDS, Plan, State},
    requests::{Requests, Streams},
};
use crate::metrics::ConnectionMetrics;

/// Bytes of all headers of an HTTP/2 request, as RFC 9113 counts them (section 6.5.2).
const MAX_HEADERS: u32 = 16 * 1024;

/// Bytes of hyper's read buffer of an HTTP/1 connection, which bounds its heads, too; bodies pass
/// through it.
const HTTP1_BUFFER: usize = 32 * 1024;

/// What a peer may send unread on one stream, and on one connection: requests are small.
const WINDOWS: (u32, u32) = (128 * 1024, 1024 * 1024);

/// What is kept for a peer that does not read, for one stream. Beyond it the stream waits, and
/// counts as unread.
const SEND_BUFFER: usize = 16 * 1024;

/// Streams of one HTTP/2 connection that may end by an error of its peer. By default a thousand
/// such errors end the connection: DATA that comes after an early answer is one.
const MAX_ERRORS: usize = 16 * 1024;

/// What all connections of a listener share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) limits: Limits,
    pub(super) metrics: ConnectionMetrics,
    pub(super) tls: Option<Tls>,
    pub(super) kill: CancellationToken,
    pub(super) tracker: TaskTracker,
    /// Closes one idle connection. It wakes who waits longest.
    pub(super) evict: Notify,
}

/// Serves one connection to its end.
pub(super) async fn run<S, B>(
    stream: TcpStream,
    shared: Arc<Shared>,
    phase: watch::Receiver<Phase>,
    service: S,
) where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let _open = Open::new(shared.metrics.open.clone());
    let peer = stream.peer_addr().ok();
    match &shared.tls {
        None => serve(stream, peer, &shared, phase, service).await,
        Some(tls) => match shaken_hands(stream, tls, &shared, phase.clone()).await {
            Some(stream) => serve(stream, peer, &shared, phase, service).await,
            None if shared.kill.is_cancelled() => {}
            None => shared.metrics.refused_tls.inc(),
        },
    }
}

/// The stream of a peer that finishes its TLS handshake in time, which is short once all is to
/// stop.
async fn shaken_hands(
    stream: TcpStream,
    tls: &Tls,
    shared: &Shared,
    mut phase: watch::Receiver<Phase>,
) -> Option<TlsStream<TcpStream>> {
    let stopping = async {
        let _ = phase.wait_for(|phase| *phase == Phase::Stopping).await;
        sleep(LAST_WORDS).await;
    };
    tokio::select! {
        shaken = timeout(shared.limits.read_timeout, tls.acceptor().accept(stream)) => match shaken.ok()? {
            Ok(stream) => Some(stream),
            Err(error) => {
                // For who debugs certificates; strangers' scans fail all the time.
                tracing::debug!(error = error.to_string(), "a TLS handshake failed");
                None
            }
        },
        () = stopping => None,
        () = shared.kill.cancelled() => None,
    }
}

/// An open connection, however it ends.
struct Open(IntGauge);

impl Open {
    fn new(gauge: IntGauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

async fn serve<I, S, B>(
    stream: I,
    peer: Option<SocketAddr>,
    shared: &Shared,
    mut phase: watch::Receiver<Phase>,
    service: S,
) where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let state = Arc::new(State::new());
    let io = TokioIo::new(Watched::new(stream, state.clone()));
    let streams = Streams { state: state.clone(), tracker: shared.tracker.clone() };
    let builder = builder(streams, &shared.limits);
    let requests = Requests { inner: RefCell::new(service), state: state.clone() };
    let mut connection = pin!(builder.serve_connection(io, requests));
    let mut plan = Plan::new(shared.limits, state.clone());
    plan.follow(*phase.borrow_and_update());
    let mut timer = pin!(sleep_until(plan.next_look()));
    let mut news = news(phase, shared.kill.clone());
    // Waits since nothing is in flight.
    let mut evicted = pin!(None);
    loop {
        let step = poll_fn(|cx| {
            // The news first: a request that came after the phase changed is answered by it.
            if let Poll::Ready(Some(news)) = news.poll_next_unpin(cx) {
                return Poll::Ready(Step::News(news));
            }
            state.begin_turn();
            if let Poll::Ready(ended) = connection.as_mut().poll(cx) {
                return Poll::Ready(Step::Ended(ended));
            }
            // What the requests did may have brought the next step forward. One that moved back is
            // looked at when the timer fires.
            if let Some(due) = plan.turn_ended().filter(|due| *due < timer.deadline()) {
                timer.as_mut().reset(due);
            }
            if plan.goaway_is_due() || timer.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Step::Due);
            }
            let busy = || state.in_flight() > 0 || state.is_write_blocked();
            if !shared.limits.evicts_idle || busy() {
                evicted.set(None);
                return Poll::Pending;
            }
            if evicted.is_none() {
                evicted.set(Some(shared.evict.notified()));
            }
            if evicted.as_mut().as_pin_mut().is_some_and(|evicted| evicted.poll(cx).is_ready()) {
                return Poll::Ready(Step::Evicted);
            }
            Poll::Pending
        });
        match step.await {
            Step::Ended(ended) => {
                if let Err(error) = ended
                    && let Some(reason) = abort_reason(error.as_ref())
                {
                    shared.metrics.aborted(reason).inc();
                    tracing::debug!(
                        reason = reason.as_str(),
                        error = error.to_string(),
                        "connection aborted"
                    );
                }
                return;
            }
            Step::News(News::Kill) => {
                let requests = state.in_flight();
                if requests > 0 {
                    let peer = peer.map(tracing::field::display);
                    tracing::warn!(peer, requests, "requests were cut off");
                }
                return;
            }
            Step::News(News::Phase(_)) if plan.stopping => {}
            Step::News(News::Phase(phase)) => plan.follow(phase),
            Step::Evicted => return,
            Step::Due => {}
        }
        match plan.act() {
            Act::Nothing => {}
            Act::GoAway => connection.as_mut().graceful_shutdown(),
            Act::Refuse => {
                shared.metrics.refused_read_timeout.inc();
                return;
            }
            Act::RefuseByGoAway => {
                shared.metrics.refused_read_timeout.inc();
                connection.as_mut().graceful_shutdown();
            }
            Act::Close => return,
        }
        timer.as_mut().reset(plan.next_look());
    }
}

enum Step {
    Ended(Result<(), Box<dyn Error + Send + Sync>>),
    News(News),
    Evicted,
    Due,
}

fn builder(streams: Streams, limits: &Limits) -> Builder<Streams> {
    let Limits { keep_alive, max_streams, .. } = *limits;
    let mut builder = Builder::new(streams);
    builder
        .http1()
        .timer(TokioTimer::new())
        // hyper's would close idle connections, too; ours begins with the first byte of a head.
        .header_read_timeout(None)
        .max_buf_size(HTTP1_BUFFER);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(max_streams)
        // A caller may cancel all of its calls at once; by default twenty cancelled calls that
        // hyper has not seen yet end the connection, and everybody else's calls with it.
        .max_pending_accept_reset_streams(Some(max_streams as usize))
        .max_local_error_reset_streams(Some(MAX_ERRORS))
        .max_header_list_size(MAX_HEADERS)
        .keep_alive_interval(keep_alive.interval)
        .keep_alive_timeout(keep_alive.timeout)
        .initial_stream_window_size(WINDOWS.0)
        .initial_connection_window_size(WINDOWS.1)
        .max_send_buf_size(SEND_BUFFER);
    builder
}
