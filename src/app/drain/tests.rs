//! What no client can bring about: a part that fails by itself.

use tokio::sync::watch;

use super::*;
use crate::{
    app::{AdminServer, ApiServer},
    config::{DatabaseUrl, Migrations},
    layers::InFlight,
    listener::Shutdown,
    metrics::Metrics,
    store::{Store, StoreHealth},
    workers::Workers,
};

#[tokio::test]
async fn a_writer_that_ends_by_itself_drains_the_rest_and_is_the_error() {
    let metrics = Metrics::new("0", "test").unwrap();
    let opening = Store::open(
        DatabaseUrl::SqliteMemory,
        1,
        Migrations::Apply,
        metrics.store,
        StoreHealth::new(),
    );
    let (store, writers) = opening.await.unwrap();
    // The writer ends while the API serves.
    drop(store);

    let (api_phase, mut api) = Shutdown::new();
    let (closed, kill) = (api.closed.clone(), api.kill.clone());
    let listener = tokio::spawn(async move {
        api.phase.wait_for(|phase| *phase == Phase::Stopping).await.unwrap();
        api.closed.cancel();
    });
    let (admin_phase, mut admin) = Shutdown::new();
    let admin_kill = admin.kill.clone();
    let admin_listener = tokio::spawn(async move {
        admin.phase.wait_for(|phase| *phase == Phase::Stopping).await.unwrap();
    });
    let stage = watch::Sender::new(Stage::Serving);
    let stages = stage.subscribe();
    let running = Running {
        stage,
        health: crate::health::service().0,
        in_flight: InFlight::new(1),
        api: ApiServer { phase: api_phase, closed, kill, task: listener },
        writers: Some(writers),
        admin: AdminServer {
            phase: admin_phase,
            kill: admin_kill,
            task: admin_listener,
            final_scrapes: watch::Sender::new(0).subscribe(),
        },
        _workers: Workers::here(),
    };
    let settings = Settings::read(["order-service".into()]).unwrap();
    let error = running.until_drained(&settings, &Signals::default()).await.unwrap_err();
    assert!(error.to_string().contains("a writer of the store ended by itself"), "{error}");
    assert_eq!(*stages.borrow(), Stage::Flushed);
}
