//! Probes the store while no order is placed, so that an idle service reports an outage before the
//! next call meets it.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{
    StoreHealth,
    engine::{Engine, Remedy},
};
use crate::order::OrderId;

/// How long no commit has ended when the store is probed, and how long until the next probe.
const PERIOD: Duration = Duration::from_secs(5);

/// Between two probes at least. A read that succeeds in an outage brings the next one forward: the
/// database may be back, and a read does not show whether it takes orders.
const PAUSE: Duration = Duration::from_secs(1);

/// Probes until the handle is dropped.
pub(super) fn start(engine: Arc<Engine>, health: StoreHealth) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(run(engine, health)))
}

async fn run(engine: Arc<Engine>, health: StoreHealth) {
    loop {
        let due = health.last_commit() + PERIOD;
        if due > Instant::now() {
            sleep_until(due).await;
            continue;
        }
        probe(&engine, &health).await;
        sleep(PAUSE).await;
        let _ = timeout(PERIOD - PAUSE, health.may_be_over()).await;
    }
}

/// Does what placing does, then reads, as a caller would.
async fn probe(engine: &Engine, health: &StoreHealth) {
    let placed = match engine.probe().await {
        // An idle connection broke, which says nothing of the next one.
        Err(failure) if failure.is_of_connection() => engine.probe().await,
        placed => placed,
    };
    if let Err(failure) = placed {
        health.probe_failed(failure.cause);
        return;
    }
    match engine.get(OrderId::from_bytes([0; 16])).await {
        // To be in line among other reads is no failure.
        Err(failure) if failure.had_no_turn => {}
        Err(failure) if failure.remedy() != Remedy::OneByOne => health.read_failed(failure.cause),
        _ => health.probed(),
    }
}
