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
    logs, panics,
    usage::NoArguments,
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    let (settings, tls) = match read_settings() {
        Ok(read) => read,
        Err(refused) => return refused.tell("order-service"),
    };
    panics::log_panics();
    match run(&settings, tls) {
        Ok(Ended::Drained) => ExitCode::SUCCESS,
        Ok(Ended::CutOff) => ExitCode::from(3),
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn read_settings() -> Result<(Settings, Option<Tls>), NoArguments> {
    let settings = Settings::read(env::args_os())?;
    let filter = env::var_os("RUST_LOG").map(|filter| filter.to_string_lossy().into_owned());
    logs::start(settings.log_format, filter.as_deref()).map_err(NoArguments::BadUsage)?;
    let tls = match (&settings.tls_cert, &settings.tls_key) {
        (Some(cert), Some(key)) => Some(Tls::load(cert, key, settings.tls_client_ca.as_deref())),
        _ => None,
    };
    let tls = tls.transpose().map_err(|error| NoArguments::BadUsage(error.to_string()))?;
    Ok((settings, tls))
}

fn run(settings: &Settings, tls: Option<Tls>) -> anyhow::Result<Ended> {
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

/// The first SIGTERM or SIGINT asks for a drain, the second for an end.
fn signals() -> anyhow::Result<Signals> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
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
