//! One connection, from the handshake to its end.

use std::{
    convert::Infallible,
    error::Error,
    future::poll_fn,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use prometheus::IntGauge;
use rand::RngExt as _;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::Service;

use super::{
    Limits, Phase, ResponseLimit, Tls,
    io_watch::Watched,
    requests::{InFlight, Requests, Streams},
};
use crate::metrics::ConnectionMetrics;

/// Streams of one HTTP/2 connection at a time.
const MAX_STREAMS: u32 = 256;

/// A peer that answers no PING for this long is gone: a NAT or a load balancer forgot it.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));

/// Bytes of all headers of a request, over both protocols.
const MAX_HEADERS: u32 = 16 * 1024;

/// hyper's read buffer of an HTTP/1 connection, which bounds its heads, too; bodies pass through it.
const HTTP1_BUFFER: usize = 32 * 1024;

/// What a peer may send unread on one stream, and on one connection: requests are small.
const WINDOWS: (u32, u32) = (128 * 1024, 1024 * 1024);

/// What is written to a peer that does not read, for one stream.
const SEND_BUFFER: usize = 128 * 1024;

/// How long after its age a connection may last.
const OVERTIME: Duration = Duration::from_secs(30);

/// When all is to stop: how long a connection without a request in flight may take to notice, or to
/// send what is on its way.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The same for an idle HTTP/1 connection, which does not end by itself.
const IDLE_GRACE: Duration = Duration::from_millis(100);

/// What all connections of a listener share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) limits: Limits,
    pub(super) metrics: ConnectionMetrics,
    pub(super) tls: Option<Tls>,
    pub(super) kill: CancellationToken,
    pub(super) tracker: TaskTracker,
}

/// What the parts of one connection tell each other.
#[derive(Debug)]
pub(super) struct State {
    /// Whether responses of HTTP/1 are to say `connection: close`.
    closing: AtomicBool,
    write_blocked: AtomicBool,
    pub(super) leaving: CancellationToken,
    now: Mutex<Now>,
}

/// What is going on.
#[derive(Debug)]
struct Now {
    /// `None` before the first request.
    http1: Option<bool>,
    in_flight: usize,
    /// Since when nothing is in flight; meaningless while something is.
    idle_since: Instant,
    /// When the first bytes of a head came that has not yet arrived whole: HTTP/1 only.
    head_since: Option<Instant>,
    /// The limit of the last request.
    limit: Option<ResponseLimit>,
}

impl State {
    fn new() -> Self {
        let now = Now {
            http1: None,
            in_flight: 0,
            idle_since: Instant::now(),
            head_since: None,
            limit: None,
        };
        Self {
            closing: AtomicBool::new(false),
            write_blocked: AtomicBool::new(false),
            leaving: CancellationToken::new(),
            now: Mutex::new(now),
        }
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        // No code can panic while it holds the lock.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn bytes_came(&self) {
        let mut now = self.now();
        if now.http1 == Some(true) && now.in_flight == 0 && now.head_since.is_none() {
            now.head_since = Some(Instant::now());
        }
    }

    pub(super) fn set_write_blocked(&self, blocked: bool) {
        self.write_blocked.store(blocked, Ordering::Relaxed);
    }

    pub(super) fn request_came(self: &Arc<Self>, http1: bool, limit: ResponseLimit) -> InFlight {
        let mut now = self.now();
        now.http1 = Some(http1);
        now.in_flight += 1;
        now.head_since = None;
        now.limit = Some(limit);
        InFlight(self.clone())
    }

    pub(super) fn request_ended(&self) {
        let mut now = self.now();
        now.in_flight -= 1;
        now.idle_since = Instant::now();
    }

    pub(super) fn take_limit(&self) -> Option<ResponseLimit> {
        self.now().limit.take()
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }
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
    let serving = async {
        match &shared.tls {
            None => serve(stream, &shared, phase, service).await,
            Some(tls) => {
                let handshake = tls.acceptor().accept(stream);
                match timeout(shared.limits.read_timeout, handshake).await {
                    Ok(Ok(stream)) => serve(stream, &shared, phase, service).await,
                    Ok(Err(_)) | Err(_) => shared.metrics.refused_tls.inc(),
                }
            }
        }
    };
    tokio::select! { () = serving => {}, () = shared.kill.cancelled() => {} }
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
    shared: &Arc<Shared>,
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
    let builder = builder(Streams { state: state.clone(), tracker: shared.tracker.clone() });
    let requests = Requests { inner: service, state: state.clone() };
    let mut connection = pin!(builder.serve_connection(io, requests));
    let mut plan = Plan::new(shared.limits, state.clone());
    plan.follow(*phase.borrow_and_update());
    let mut timer = pin!(sleep_until(plan.due()));
    loop {
        let step = poll_fn(|cx| {
            if connection.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Step::Ended);
            }
            // What the requests did may have brought the next step forward. One that moved back is
            // looked at when the timer fires.
            let due = plan.due();
            if due < timer.deadline() {
                timer.as_mut().reset(due);
            }
            if plan.goaway_is_due() || timer.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Step::Due);
            }
            Poll::Pending
        });
        let step = tokio::select! {
            step = step => step,
            changed = phase.changed(), if !plan.stopping => match changed {
                Ok(()) => {
                    plan.follow(*phase.borrow_and_update());
                    Step::Due
                }
                Err(_) => {
                    plan.follow(Phase::Stopping);
                    Step::Due
                }
            },
        };
        match step {
            Step::Ended => return,
            Step::Due => match plan.act() {
                Act::Nothing => {}
                Act::GoAway => connection.as_mut().graceful_shutdown(),
                Act::Refuse => {
                    shared.metrics.refused_read_timeout.inc();
                    return;
                }
                Act::Close => return,
            },
        }
        timer.as_mut().reset(plan.due());
    }
}

enum Step {
    Ended,
    Due,
}

enum Act {
    Nothing,
    /// hyper's graceful shutdown: GOAWAY, or the end after the response under way.
    GoAway,
    /// Close, the first request or a head having taken too long.
    Refuse,
    Close,
}

/// When what is to be done with a connection, whatever its peer does.
struct Plan {
    state: Arc<State>,
    read_timeout: Duration,
    begun: Instant,
    /// When to ask the connection to go.
    leave: Option<Instant>,
    /// When to close it for good.
    close: Option<Instant>,
    stopping: bool,
    stopping_since: Instant,
    /// Whether hyper was told.
    told: bool,
}

impl Plan {
    fn new(limits: Limits, state: Arc<State>) -> Self {
        let begun = Instant::now();
        let age = limits.max_age.map(|age| age.mul_f64(rand::rng().random_range(0.9..1.1)));
        Self {
            state,
            read_timeout: limits.read_timeout,
            begun,
            leave: age.map(|age| begun + age),
            close: age.map(|age| begun + age + OVERTIME),
            stopping: false,
            stopping_since: begun,
            told: false,
        }
    }

    fn follow(&mut self, phase: Phase) {
        let now = Instant::now();
        match phase {
            Phase::Serving => {}
            Phase::Leaving { until } => {
                self.state.closing.store(true, Ordering::Relaxed);
                let spread = until.saturating_duration_since(now);
                let at = now + spread.mul_f64(rand::rng().random_range(0.0..1.0));
                self.leave = Some(self.leave.map_or(at, |leave| leave.min(at)));
            }
            Phase::Stopping => {
                self.leave = Some(now);
                self.stopping = true;
                self.stopping_since = now;
            }
        }
    }

    /// When to look again.
    fn due(&self) -> Instant {
        let now = self.state.now();
        let mut due = self.begun + Duration::from_secs(86_400);
        let mut at = |instant: Option<Instant>| due = due.min(instant.unwrap_or(due));
        at(self.too_late(&now));
        at(self.unread(&now));
        at(self.leave);
        at(self.close);
        at(self.last_words(&now));
        due
    }

    /// By when the first request, or a head that has begun, must have arrived.
    fn too_late(&self, now: &Now) -> Option<Instant> {
        match now.http1 {
            None => Some(self.begun + self.read_timeout),
            Some(_) => now.head_since.map(|since| since + self.read_timeout),
        }
    }

    /// By when an HTTP/1 response must have been read; HTTP/2's streams have timers of their own.
    fn unread(&self, now: &Now) -> Option<Instant> {
        let pending = now.in_flight > 0 || self.state.write_blocked.load(Ordering::Relaxed);
        let limit = if pending && now.http1 == Some(true) { now.limit.as_ref() } else { None };
        limit.and_then(ResponseLimit::get)
    }

    /// When everything stops: by when a connection with nothing in flight must have ended.
    fn last_words(&self, now: &Now) -> Option<Instant> {
        let blocked = self.state.write_blocked.load(Ordering::Relaxed);
        if !self.stopping || now.in_flight > 0 || blocked {
            return None;
        }
        let idle_http1 = now.http1 == Some(true) && now.head_since.is_none();
        let grace = if idle_http1 { IDLE_GRACE } else { LAST_WORDS };
        Some(self.stopping_since.max(now.idle_since) + grace)
    }

    /// Whether an HTTP/2 connection that is asked to go has yet to be told.
    fn goaway_is_due(&self) -> bool {
        let asked = self.state.leaving.is_cancelled();
        asked && !self.told && self.state.now().http1 == Some(false)
    }

    /// What is to be done now.
    fn act(&mut self) -> Act {
        let at = Instant::now();
        let past = |instant: Option<Instant>| instant.is_some_and(|instant| instant <= at);
        let state = self.state.clone();
        let now = state.now();
        if past(self.too_late(&now)) {
            return Act::Refuse;
        }
        if past(self.unread(&now)) || past(self.close) || past(self.last_words(&now)) {
            return Act::Close;
        }
        if past(self.leave) {
            self.leave = None;
            state.closing.store(true, Ordering::Relaxed);
            state.leaving.cancel();
        }
        // An HTTP/1 connection leaves by its next response, and one that has sent nothing yet may be
        // sending its first request.
        if state.leaving.is_cancelled() && !self.told && now.http1 == Some(false) {
            self.told = true;
            return Act::GoAway;
        }
        Act::Nothing
    }
}

fn builder(streams: Streams) -> Builder<Streams> {
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
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .keep_alive_interval(KEEP_ALIVE.0)
        .keep_alive_timeout(KEEP_ALIVE.1)
        .initial_stream_window_size(WINDOWS.0)
        .initial_connection_window_size(WINDOWS.1)
        .max_send_buf_size(SEND_BUFFER);
    builder
}
