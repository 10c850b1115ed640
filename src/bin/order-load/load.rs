//! One run, from the first connection to the report.

use std::{
    io::{Write as _, stderr, stdout},
    sync::Arc,
};

use anyhow::Context as _;
use rand::RngExt as _;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    args::Args,
    audit::{Journal, Reader},
    call::Api,
    pacer::Pacer,
    pool::Pool,
    progress::Progress,
    recorder::Recorder,
    report::Report,
    schedule::Schedule,
    sender::{Names, Sender},
    target::Target,
};

/// Sends, audits and prints. Whether all was well.
///
/// # Errors
/// If there is nothing to report: the audit could not begin, or nothing can be printed.
pub async fn run(args: &Args, target: Target) -> anyhow::Result<bool> {
    let seed = args.seed.unwrap_or_else(|| rand::rng().random());
    let stop = stop_on_signals()?;
    let names = Names {
        run: format!("{:012x}", rand::rng().random::<u64>() >> 16),
        product: args.product.as_str().to_owned(),
        seed,
        own_products: args.audit,
    };
    let sender = Arc::new(Sender {
        api: Api::new(&target, args.timeout),
        pool: Pool::start(target, args.connections()),
        names,
        recorder: Recorder::new(args.phases.0.len()),
        journal: args.audit.then(Journal::default),
        timeout: args.timeout,
        patience: args.patience,
        stop: stop.clone(),
    });
    let before = match &sender.journal {
        Some(_) => {
            Some(Reader::new(&sender).newest().await.context("--audit: no order can be listed")?)
        }
        None => None,
    };
    // Bounded by the time limit of an attempt, which is then a failure.
    sender.pool.opened(args.connections()).await;
    let pacer = Pacer::start().context("a thread to keep time")?;

    let start = Instant::now();
    let progress = Progress::start(&args.phases, sender.clone(), start);
    let end = start + args.phases.duration();
    let due = sender.run(Schedule::new(&args.phases, seed), start, end, &pacer).await;
    progress.end().await;

    let audit = match (&sender.journal, before) {
        (Some(journal), Some(before)) => {
            Some(Reader::new(&sender).audit(journal, before, due).await)
        }
        _ => None,
    };
    let interrupted = stop.is_cancelled();
    let report = Report { args, seed, records: sender.recorder.records(), audit, interrupted };
    let table = report.table();
    if args.json {
        // The document is the report; a broken stderr is ignored.
        let _ = write!(stderr(), "{table}");
        writeln!(stdout(), "{}", report.json())
    } else {
        write!(stdout(), "{table}")
    }
    .context("the report")?;
    Ok(report.passed())
}

/// Cancelled at the first SIGINT or SIGTERM; the second ends the process on the spot.
fn stop_on_signals() -> anyhow::Result<CancellationToken> {
    let (mut int, mut term) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let stop = CancellationToken::new();
    let told = stop.clone();
    tokio::spawn(async move {
        tokio::select! { _ = int.recv() => {}, _ = term.recv() => {} }
        told.cancel();
        tokio::select! { _ = int.recv() => {}, _ = term.recv() => {} }
        std::process::exit(1);
    });
    Ok(stop)
}
