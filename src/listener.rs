//! The accept loop: connections of HTTP/1.1 and HTTP/2 on one port, in plain or TLS, their limits,
//! their age, and their end without one failed call.
//!
//! Knows hyper and the connection metrics; any tower service can be served.

use std::{
    convert::Infallible,
    error::Error,
    fmt, io,
    net::{TcpListener as StdListener, TcpStream as StdStream},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, Semaphore, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::Service;

use self::connection::Shared;
use crate::{metrics::ConnectionMetrics, workers::Workers};

mod aborts;
mod connection;
mod io_watch;
mod limits;
mod load;
mod news;
mod plan;
mod requests;
mod tls;

pub use self::{
    aborts::caller_is_gone,
    limits::{KEEP_ALIVE, KeepAlive, Limits, MAX_STREAMS, OVERTIME},
    load::{ConnectionLoad, RequestLoad},
    tls::{Tls, TlsError, TlsFiles},
};

/// How far the shutdown is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Not begun.
    Serving,
    /// Connections are accepted and served, but asked to go: HTTP/1 on their next response, HTTP/2
    /// at moments spread over the time left.
    Leaving {
        /// When the next phase is to come.
        until: Instant,
    },
    /// What waits to be accepted is served, nothing more; what is in flight is finished.
    Stopping,
}

/// The listener's side of the shutdown.
#[derive(Debug, Clone)]
pub struct Shutdown {
    /// How far it is.
    pub phase: watch::Receiver<Phase>,
    /// The listener cancels it once its socket is closed.
    pub closed: CancellationToken,
    /// Cuts off what is left.
    pub kill: CancellationToken,
}

impl Shutdown {
    /// One that has not begun, and what sets its phase.
    pub fn new() -> (watch::Sender<Phase>, Self) {
        let (sender, phase) = watch::channel(Phase::Serving);
        let (closed, kill) = Default::default();
        (sender, Self { phase, closed, kill })
    }
}

/// What ends a request that does not end by itself; in its extensions. A clone is of the same
/// request.
#[derive(Debug, Clone, Default)]
pub struct Ending(Arc<EndingShared>);

#[derive(Debug, Default)]
struct EndingShared {
    connection: Arc<ConnectionControl>,
    limit: OnceLock<Instant>,
    limit_holds: AtomicBool,
    load: RequestLoad,
    after_response: Mutex<Option<AfterResponse>>,
}

/// What the requests of one connection share.
#[derive(Default)]
struct ConnectionControl {
    leaving: CancellationToken,
    load: ConnectionLoad,
    on_unread: OnceLock<OnUnread>,
}

impl fmt::Debug for ConnectionControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionControl").field("load", &self.load).finish_non_exhaustive()
    }
}

/// Called once for a response over HTTP/2 that its peer does not read at once. What it returns
/// lives as long as the response; without it the response is cut off.
pub type OnUnread = Arc<dyn Fn(&Ending) -> Option<Unread> + Send + Sync>;

/// What an unread response holds.
pub type Unread = Box<dyn Send>;

/// Runs once the response is written.
struct AfterResponse(BoxFuture<'static, ()>);

impl fmt::Debug for AfterResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AfterResponse")
    }
}

impl Ending {
    fn new(connection: Arc<ConnectionControl>) -> Self {
        Self(Arc::new(EndingShared { connection, ..Default::default() }))
    }

    /// Cancelled when the connection is asked to go, so that streams without an end of their own
    /// can end.
    pub fn leaving(&self) -> CancellationToken {
        self.0.connection.leaving.clone()
    }

    /// What the request's connection holds of the budgets that all connections share.
    pub fn load(&self) -> &ConnectionLoad {
        &self.0.connection.load
    }

    /// What the request itself holds of them.
    pub fn request_load(&self) -> &RequestLoad {
        &self.0.load
    }

    /// Sets the callback for unread responses once; later calls have no effect.
    pub fn set_on_unread(&self, make: impl FnOnce() -> OnUnread) {
        self.0.connection.on_unread.get_or_init(make);
    }

    /// What the response holds while its peer does not read it; `None` if it must not wait.
    fn leave_unread(&self) -> Option<Unread> {
        match self.0.connection.on_unread.get() {
            Some(on_unread) => on_unread(self),
            None => Some(Box::new(())),
        }
    }

    /// Sets what runs once the response of this HTTP/1 request is written, before the connection
    /// counts as idle. Only the last one set runs; over HTTP/2 none does.
    pub fn after_response(&self, future: impl Future<Output = ()> + Send + 'static) {
        *self.after_response_slot() = Some(AfterResponse(Box::pin(future)));
    }

    fn take_after_response(&self) -> Option<BoxFuture<'static, ()>> {
        self.after_response_slot().take().map(|AfterResponse(future)| future)
    }

    fn after_response_slot(&self) -> MutexGuard<'_, Option<AfterResponse>> {
        // No code can panic while it holds the lock.
        self.0.after_response.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets when the request is cut off, above all because its peer does not read the response:
    /// hyper does not poll the body of such a one, so it cannot end by itself. The first limit
    /// counts; without one there is none.
    pub fn set_limit(&self, at: Instant) {
        self.set_response_limit(at);
        self.hold_limit();
    }

    /// The same for a caller that sees to it that there is a response by then: most responses are
    /// written as they come, and cost no timer.
    pub fn set_response_limit(&self, at: Instant) {
        let _ = self.0.limit.set(at);
    }

    /// Whether the limit has passed: a response that is dropped before its end then was cut off.
    pub fn limit_has_passed(&self) -> bool {
        self.limit().is_some_and(|at| at <= Instant::now())
    }

    fn limit(&self) -> Option<Instant> {
        self.0.limit.get().copied()
    }

    /// From now on there is a response, or none is waited for.
    fn hold_limit(&self) {
        self.0.limit_holds.store(true, Ordering::Relaxed);
    }

    fn limit_holds(&self) -> bool {
        self.0.limit_holds.load(Ordering::Relaxed)
    }
}

/// First and longest pause after an error of `accept`, such as no file descriptor left.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// As many connections as can wait to be accepted: tokio listens with this backlog.
const BACKLOG: usize = 1024;

/// How often errors of `accept` are logged at most: out of descriptors, every one that is freed
/// lets one connection in and the next one fail.
const TOLD_AGAIN: Duration = Duration::from_secs(30);

/// How long a new connection waits for an idle one to close.
const EVICTION: Duration = Duration::from_millis(100);

/// Accepts connections and serves them on `workers` until they have all ended after
/// [`Phase::Stopping`], or are cut off.
pub async fn serve<S, B>(
    socket: TcpListener,
    workers: Workers,
    tls: Option<Tls>,
    service: S,
    limits: Limits,
    metrics: ConnectionMetrics,
    shutdown: Shutdown,
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
    let Shutdown { phase, closed, kill } = shutdown;
    let closed = closed.drop_guard();
    let watching = tls.clone().map(|tls| tokio::spawn(tls.reload_on_change()));
    let tracker = TaskTracker::new();
    let connections = Connections {
        workers,
        free: Arc::new(Semaphore::new(limits.max_connections)),
        shared: Arc::new(Shared {
            limits,
            metrics,
            tls,
            kill,
            tracker: tracker.clone(),
            evict: Notify::new(),
        }),
        phase: phase.clone(),
        service,
    };
    accept_until_stopping(&socket, &connections, phase).await;
    if let Err(error) = accept_backlog(socket, &connections) {
        tracing::warn!(%error, "connections that waited to be accepted may have been reset");
    }
    drop(closed);
    tracker.close();
    tracker.wait().await;
    if let Some(watching) = watching {
        watching.abort();
    }
}

/// Makes connections of accepted sockets.
struct Connections<S> {
    workers: Workers,
    free: Arc<Semaphore>,
    shared: Arc<Shared>,
    phase: watch::Receiver<Phase>,
    service: S,
}

impl<S, B> Connections<S>
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    /// Closes the connection that has been idle longest if all places are taken and the limits say
    /// so. Returns once a place is free, or after [`EVICTION`].
    async fn make_room(&self) {
        if self.shared.limits.evicts_idle && self.free.available_permits() == 0 {
            self.shared.evict.notify_one();
            // The permit is given back at once: nobody else takes one.
            let _ = timeout(EVICTION, self.free.acquire()).await;
        }
    }

    fn begin(&self, stream: StdStream) {
        let metrics = &self.shared.metrics;
        metrics.accepted.inc();
        let Ok(permit) = self.free.clone().try_acquire_owned() else {
            metrics.refused_limit.inc();
            return;
        };
        // Answers are written whole; to hold back their last segment only delays them.
        let _ = stream.set_nodelay(true);
        let (shared, phase, service) =
            (self.shared.clone(), self.phase.clone(), self.service.clone());
        let (runtime, placed) = self.workers.place();
        let connection = async move {
            // Fails only if the runtime is ending, and the connection with it.
            if let Ok(stream) = TcpStream::from_std(stream) {
                connection::run(stream, shared, phase, service).await;
            }
            drop((permit, placed));
        };
        self.shared.tracker.spawn_on(connection, runtime);
    }
}

async fn accept_until_stopping<S, B>(
    socket: &TcpListener,
    connections: &Connections<S>,
    mut phase: watch::Receiver<Phase>,
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
    let stopping = async {
        // A sender that is gone has nobody left to tell when to stop: that is now.
        let _ = phase.wait_for(|phase| *phase == Phase::Stopping).await;
    };
    let accepting = async {
        let mut back_off = BACK_OFF.0;
        let mut told: Option<Instant> = None;
        loop {
            match socket.accept().await {
                Ok((stream, _)) => {
                    back_off = BACK_OFF.0;
                    // Leaves this runtime for that of its worker.
                    if let Ok(stream) = stream.into_std() {
                        connections.make_room().await;
                        connections.begin(stream);
                    }
                }
                // The peer was gone before we came to it.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    if told.is_none_or(|told| told.elapsed() > TOLD_AGAIN) {
                        tracing::error!(%error, "no connection can be accepted; trying again");
                        told = Some(Instant::now());
                    }
                    sleep(back_off).await;
                    back_off = (back_off * 2).min(BACK_OFF.1);
                }
            }
        }
    };
    tokio::select! { () = stopping => {}, () = accepting => {} }
}

/// Serves the connections that the kernel has accepted for us, and closes the socket: what is not
/// taken from its queue by then would be reset.
fn accept_backlog<S, B>(socket: TcpListener, connections: &Connections<S>) -> io::Result<()>
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    // The runtime's socket tells only what its last poll saw; the kernel's is asked.
    let socket: StdListener = socket.into_std()?;
    // New ones may come faster than they are taken. The kernel holds one more than it was told.
    for _ in 0..=BACKLOG {
        match socket.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                connections.begin(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
