//! The server process: arguments, logs, signals and the exit code; all else is in the library.

use std::{env, net::SocketAddr, process::ExitCode};

use anyhow::Context as _;
use mimalloc::MiMalloc;
use order_service::{
    api::Extra,
    app::{self, Ended, Inputs, Signals},
    config::{Command, Settings},
    layers::ServedBy,
    listener::{Tls, TlsFiles},
    logs::{Log, NoLog},
    metrics::LogMetrics,
    panics,
    usage::{self, NoArguments},
};
use rustix::process::Signal;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

const PROGRAM: &str = "order-service";

fn main() -> ExitCode {
    let (settings, tls) = match read_settings() {
        Ok(read) => read,
        Err(refused) => return refused.tell(PROGRAM),
    };
    // Dropped last, so that it flushes on every way out.
    let log = match start_log(&settings) {
        Ok(log) => log,
        Err(NoLog::BadFilter(line)) => return NoArguments::BadUsage(line).tell(PROGRAM),
        Err(error @ NoLog::NoThread(_)) => {
            usage::report(PROGRAM, &error.to_string());
            return ExitCode::FAILURE;
        }
    };
    panics::log_panics();
    let ended = match settings.command {
        Some(Command::Migrate) => migrate(&settings).map(|()| Ended::Drained),
        None => run(&settings, tls, log.metrics()),
    };
    match ended {
        Ok(Ended::Drained) => ExitCode::SUCCESS,
        Ok(Ended::CutOff) => ExitCode::from(3),
        Err(error) => {
            tracing::error!(cause = format!("{error:#}"), "ended by a failure");
            ExitCode::FAILURE
        }
    }
}

fn read_settings() -> Result<(Settings, Option<Tls>), NoArguments> {
    let settings = Settings::read(env::args_os())?;
    let tls = match (&settings.tls_cert, &settings.tls_key) {
        (Some(cert), Some(key)) if settings.command.is_none() => Some(Tls::load(TlsFiles {
            cert: cert.clone(),
            key: key.clone(),
            client_ca: settings.tls_client_ca.clone(),
            client_crl: settings.tls_client_crl.clone(),
        })),
        _ => None,
    };
    let tls = tls.transpose().map_err(|error| NoArguments::BadUsage(error.to_string()))?;
    Ok((settings, tls))
}

fn start_log(settings: &Settings) -> Result<Log, NoLog> {
    let filter = env::var_os("RUST_LOG").map(|filter| filter.to_string_lossy().into_owned());
    Log::start(settings.log_format, filter.as_deref())
}

fn run(settings: &Settings, tls: Option<Tls>, log: LogMetrics) -> anyhow::Result<Ended> {
    let open_files = rlimit::increase_nofile_limit(u64::MAX).context("the limit of open files")?;
    // The first of the worker threads is this one; the library starts the others.
    let runtime = runtime()?;
    let ended = runtime.block_on(async {
        // Before any socket opens: a supervisor that sees the port may send a signal at once.
        let signals = signals()?;
        let inputs = Inputs {
            api: bind("--listen", settings.listen).await?,
            admin: bind("--admin-listen", settings.admin_listen).await?,
            tls,
            served_by: ServedBy::new(&host_name(), std::process::id()),
            revision: option_env!("ORDER_SERVICE_REVISION").unwrap_or("unknown"),
            open_files,
            signals,
            log,
        };
        app::run(settings, inputs, Extra::default()).await
    });
    // What a blocking call may still wait for, a disk or a name server, is not waited for.
    runtime.shutdown_background();
    ended
}

fn migrate(settings: &Settings) -> anyhow::Result<()> {
    let runtime = runtime()?;
    let migrated = runtime.block_on(async { app::migrate(settings, &signals()?).await });
    runtime.shutdown_background();
    migrated
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("the runtime")
}

async fn bind(flag: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("{flag} {address}: cannot listen"))
}

/// Signals that end a process by default and ask nothing of this one: those free for the user,
/// those of timers, and those of files. With SIGXFSZ handled, a write beyond `ulimit -f` fails like
/// one to a full disk.
const IGNORED: [Signal; 7] = [
    Signal::USR1,
    Signal::USR2,
    Signal::ALARM,
    Signal::VTALARM,
    Signal::PROF,
    Signal::IO,
    Signal::XFSZ,
];

/// The first SIGTERM, SIGINT or SIGQUIT starts the drain, the second ends it. SIGHUP reads the TLS
/// files again. Rust's runtime ignores SIGPIPE by itself.
fn signals() -> anyhow::Result<Signals> {
    for ignored in IGNORED {
        // The handler stays installed when the stream of its signals is dropped.
        drop(signal(SignalKind::from_raw(ignored.as_raw()))?);
    }
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (mut quit, mut hangup) = (signal(SignalKind::quit())?, signal(SignalKind::hangup())?);
    let signals = Signals::default();
    let Signals { drain, now, reload_tls } = signals.clone();
    tokio::spawn(async move {
        for token in [drain, now] {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
                _ = quit.recv() => {}
            }
            token.cancel();
        }
    });
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            reload_tls.notify_one();
        }
    });
    Ok(signals)
}

/// The pod's name on Kubernetes.
fn host_name() -> String {
    env::var("HOSTNAME")
        .unwrap_or_else(|_| gethostname::gethostname().to_string_lossy().into_owned())
}
