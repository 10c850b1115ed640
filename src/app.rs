//! Puts the parts together and runs them from the first socket to the end of the drain.
//!
//! Listeners and the shutdown signals are arguments: only `main` touches the process.

use std::{num::NonZero, sync::Arc, thread, time::Duration};

use anyhow::Context as _;
use axum::Router;
use tokio::{
    net::TcpListener,
    sync::{Notify, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use crate::{
    admin::{self, Admin, Stage},
    api::{self, Api, Extra},
    config::Settings,
    health::HealthReporter,
    layers::{InFlight, ServedBy, Stack},
    listener::{self, KEEP_ALIVE, Limits, MAX_STREAMS, OVERTIME, Phase, Shutdown, Tls},
    metrics::{ConnectionMetrics, LogMetrics, Metrics, layer::Metered},
    store::{self, Store, StoreHealth, Writers},
    workers::Workers,
};

mod drain;

/// What the process hands in.
#[derive(Debug)]
pub struct Inputs {
    /// The bound socket of the API.
    pub api: TcpListener,
    /// The bound socket of the admin routes.
    pub admin: TcpListener,
    /// TLS of the API.
    pub tls: Option<Tls>,
    /// Who answers.
    pub served_by: ServedBy,
    /// Which source the program was built from.
    pub revision: &'static str,
    /// How many files the process may have open.
    pub open_files: u64,
    /// What the process is asked for while it runs.
    pub signals: Signals,
    /// The log's metrics.
    pub log: LogMetrics,
}

/// What the process is asked for while it runs, by signals of the system.
#[derive(Debug, Clone, Default)]
pub struct Signals {
    /// Drain, then end.
    pub drain: CancellationToken,
    /// End at once.
    pub now: CancellationToken,
    /// Read the TLS files again.
    pub reload_tls: Arc<Notify>,
}

/// How the process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Every request was answered and every order stored.
    Drained,
    /// Requests were cut off, or orders of unknown outcome not resolved.
    CutOff,
}

/// Serves until a signal comes and the drain is over.
///
/// # Errors
/// If the store cannot be opened, or a listener or the store's writers end by themselves.
pub async fn run(settings: &Settings, inputs: Inputs, extra: Extra) -> anyhow::Result<Ended> {
    let Inputs { api, admin, tls, served_by, revision, open_files, signals, log } = inputs;
    let metrics = Metrics::new(env!("CARGO_PKG_VERSION"), revision)?;
    metrics.watch_log(log)?;
    let threads =
        settings.worker_threads.or_else(|| thread::available_parallelism().ok().map(NonZero::get));
    let threads = threads.unwrap_or(1);
    let workers = Workers::start(threads).context("the worker threads")?;
    metrics.watch_runtimes(workers.runtimes().cloned())?;
    let store_health = StoreHealth::new();
    let stage = watch::Sender::new(Stage::Starting);
    let addresses = (api.local_addr()?, admin.local_addr()?);

    // First, so that whoever waits for readiness learns why it takes so long.
    let mut admin = AdminServer::start(
        admin,
        Admin {
            registry: metrics.registry.clone(),
            stage: stage.subscribe(),
            store: store_health.clone(),
            final_scrapes: watch::Sender::new(0),
        },
        settings.read_timeout,
        ConnectionMetrics::new()?,
    );
    let opening = Store::open(
        settings.database_url.clone(),
        settings.database_pool,
        settings.migrations,
        metrics.store.clone(),
        store_health,
    );
    let (store, writers) = tokio::select! {
        opened = opening => match opened {
            Ok(opened) => opened,
            Err(error) => {
                admin.stop().await;
                return Err(error.into());
            }
        },
        () = signals.drain.cancelled() => {
            tracing::info!("told to end before the store had answered");
            admin.stop().await;
            return Ok(Ended::Drained);
        }
    };

    let in_flight = InFlight::new(settings.max_in_flight);
    metrics.requests.in_flight_limit.set(settings.max_in_flight.try_into().unwrap_or(i64::MAX));
    let Api { service, health, failure_log } =
        api::build(settings, store, in_flight.clone(), served_by, &metrics, extra)
            .context("the API's metrics")?;
    let tls = tls.map(|tls| tls.reload_on(signals.reload_tls.clone()));
    let limits = api_limits(settings, open_files, threads);
    let api = ApiServer::start(api, workers.clone(), tls, service, limits, &metrics);
    stage.send_replace(Stage::Serving);
    let (api_address, admin_address) = addresses;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        revision,
        api = %api_address,
        admin = %admin_address,
        database = settings.database_url.kind(),
        "serving"
    );

    let running =
        Running { stage, health, in_flight, api, writers: Some(writers), admin, _workers: workers };
    let reporting = tokio::spawn(failure_log.clone().report_omitted());
    let ended = running.until_drained(settings, &signals).await;
    reporting.abort();
    failure_log.report_now();
    ended
}

/// Brings the tables of the database up to date.
///
/// # Errors
/// If they cannot be, or a signal to drain comes first.
pub async fn migrate(settings: &Settings, signals: &Signals) -> anyhow::Result<()> {
    let applied = tokio::select! {
        applied = store::migrate(&settings.database_url) => applied?,
        () = signals.drain.cancelled() => anyhow::bail!("ended by a signal before it was done"),
    };
    let database = settings.database_url.kind();
    tracing::info!(database, ?applied, "the tables are up to date");
    Ok(())
}

/// Everything that is to be ended, in the order of [`drain`].
struct Running {
    stage: watch::Sender<Stage>,
    health: HealthReporter,
    in_flight: InFlight,
    api: ApiServer,
    /// `None` once the drain has come to them.
    writers: Option<Writers>,
    admin: AdminServer,
    /// The last to end: the store's connections may have been opened on their runtimes.
    _workers: Workers,
}

struct ApiServer {
    phase: watch::Sender<Phase>,
    closed: CancellationToken,
    kill: CancellationToken,
    task: JoinHandle<()>,
}

impl ApiServer {
    fn start(
        socket: TcpListener,
        workers: Workers,
        tls: Option<Tls>,
        service: Metered<Stack<Router>>,
        limits: Limits,
        metrics: &Metrics,
    ) -> Self {
        let (phase, shutdown) = Shutdown::new();
        let (closed, kill) = (shutdown.closed.clone(), shutdown.kill.clone());
        let connections = metrics.connections.clone();
        let serving = listener::serve(socket, workers, tls, service, limits, connections, shutdown);
        Self { phase, closed, kill, task: tokio::spawn(serving) }
    }
}

/// The limits of the API's connections. `--max-connections` is cut to the descriptors that the rest
/// of the process leaves: without one, no probe is answered and no file is opened.
fn api_limits(settings: &Settings, open_files: u64, threads: usize) -> Limits {
    let reserved = reserved_descriptors(settings, threads);
    let left = usize::try_from(open_files).unwrap_or(usize::MAX).saturating_sub(reserved).max(1);
    if left < settings.max_connections {
        tracing::warn!(
            max_connections = settings.max_connections,
            open_files,
            reserved,
            accepted = left,
            "fewer connections than --max-connections are accepted: the limit of open files is low"
        );
    }
    Limits {
        max_connections: settings.max_connections.min(left),
        evicts_idle: false,
        max_age: Some(settings.max_connection_age).filter(|age| !age.is_zero()),
        overtime: OVERTIME,
        max_idle: Some(settings.idle_timeout).filter(|idle| !idle.is_zero()),
        read_timeout: settings.read_timeout,
        keep_alive: KEEP_ALIVE,
        max_streams: MAX_STREAMS,
    }
}

/// File descriptors that everything but the API's connections needs at most.
fn reserved_descriptors(settings: &Settings, threads: usize) -> usize {
    /// An epoll, its waker and the clone of each that a runtime makes.
    const PER_THREAD: usize = 4;
    /// The standard streams, both sockets, the signals, the TLS files, `/proc`, a connection that
    /// is accepted to be closed.
    const OTHERS: usize = 32;
    /// SQLite's files and the lock, or PostgreSQL's pool and as many logins as it begins at once, at
    /// least four, each to every server of the URL.
    const STORE: usize = 24;
    let pool = settings.database_pool;
    let logins = settings.database_url.servers() * pool.max(4);
    AdminServer::MAX_CONNECTIONS + PER_THREAD * threads + OTHERS + STORE.max(pool + logins)
}

struct AdminServer {
    phase: watch::Sender<Phase>,
    kill: CancellationToken,
    task: JoinHandle<()>,
    final_scrapes: watch::Receiver<usize>,
}

impl AdminServer {
    /// Room for scrapers, probes and people.
    const MAX_CONNECTIONS: usize = 64;

    /// Requests of one HTTP/2 connection at a time.
    const MAX_STREAMS: u32 = 16;

    /// A client that died must not hold a connection. Not one of the usual scrape intervals: the
    /// connection would close as the next scrape comes.
    const MAX_IDLE: Duration = Duration::from_secs(45);

    /// How long the answers in flight may take at the end.
    const LAST_ANSWERS: Duration = Duration::from_secs(1);

    fn start(
        socket: TcpListener,
        admin: Admin,
        read_timeout: Duration,
        metrics: ConnectionMetrics,
    ) -> Self {
        let (phase, shutdown) = Shutdown::new();
        let kill = shutdown.kill.clone();
        let limits = Limits {
            max_connections: Self::MAX_CONNECTIONS,
            // Idle peers must not keep probes out: the pod would be restarted for it.
            evicts_idle: true,
            max_age: None,
            overtime: Duration::ZERO,
            max_idle: Some(Self::MAX_IDLE),
            read_timeout,
            keep_alive: KEEP_ALIVE,
            max_streams: Self::MAX_STREAMS,
        };
        let final_scrapes = admin.final_scrapes.subscribe();
        let serving = listener::serve(
            socket,
            Workers::here(),
            None,
            admin::routes(admin),
            limits,
            // `connections_*` tell of the API alone.
            metrics,
            shutdown,
        );
        Self { phase, kill, task: tokio::spawn(serving), final_scrapes }
    }

    async fn stop(&mut self) {
        self.phase.send_replace(Phase::Stopping);
        if tokio::time::timeout(Self::LAST_ANSWERS, &mut self.task).await.is_err() {
            self.kill.cancel();
        }
    }
}
