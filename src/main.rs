//! The server process: arguments, logs, signals and the exit code; all else is in the library.

use std::{env, net::SocketAddr, process::ExitCode};

use anyhow::Context as _;
use mimalloc::MiMalloc;
use order_service::{
    api::Extra,
    app::{self, Ended, Inputs, Signals},
    config::Settings,
    layers::ServedBy,
    listener::Tls,
    logs::{Log, NoLog},
    metrics::LogMetrics,
    panics,
    usage::{self, NoArguments},
};
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
    match run(&settings, tls, log.metrics()) {
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
        (Some(cert), Some(key)) => Some(Tls::load(cert, key, settings.tls_client_ca.as_deref())),
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
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().build().context("the runtime")?;
    let ended = runtime.block_on(async {
        let inputs = Inputs {
            api: bind("--listen", settings.listen).await?,
            admin: bind("--admin-listen", settings.admin_listen).await?,
            tls,
            served_by: ServedBy::new(&host_name(), std::process::id()),
            revision: option_env!("ORDER_SERVICE_REVISION").unwrap_or("unknown"),
            open_files,
            signals: signals()?,
            log,
        };
        app::run(settings, inputs, Extra::default()).await
    });
    // What a blocking call may still wait for, a disk or a name server, is not waited for.
    runtime.shutdown_background();
    ended
}

async fn bind(flag: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("{flag} {address}: cannot listen"))
}

/// Its number on Linux (x86-64, ARM, RISC-V), macOS and the BSDs.
const SIGXFSZ: i32 = 25;

/// The first SIGTERM or SIGINT asks for a drain, the second for an end.
fn signals() -> anyhow::Result<Signals> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    // Unhandled, it ends the process when a log or database file reaches RLIMIT_FSIZE; handled, the write
    // fails as it does on a full disk.
    let _ = signal(SignalKind::from_raw(SIGXFSZ))?;
    let signals = Signals::default();
    let told = signals.clone();
    tokio::spawn(async move {
        for token in [told.drain, told.now] {
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            token.cancel();
        }
    });
    Ok(signals)
}

/// The pod's name on Kubernetes.
fn host_name() -> String {
    env::var("HOSTNAME")
        .unwrap_or_else(|_| gethostname::gethostname().to_string_lossy().into_owned())
}
