//! A service that nobody calls notices by itself that its database fails, and that it is back.

use sqlx::{Connection as _, Executor as _};

use crate::{
    database::lock_file_in,
    postgres::PostgresServer,
    support::{Process, database_in, scrape_until},
};

async fn until_up_is(service: &Process, up: f64) {
    scrape_until(service.admin, |page| page.value("order_store_up", &[]) == up).await;
}

async fn readyz(service: &Process) -> (u16, String) {
    let answer = reqwest::get(format!("http://{}/readyz", service.admin)).await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

/// Through an outage that no call meets: the pod stays ready, and says why calls would fail.
async fn is_noticed(
    service: &Process,
    why: &str,
    begin: impl AsyncFnOnce(),
    end: impl AsyncFnOnce(),
) {
    until_up_is(service, 1.0).await;
    begin().await;
    until_up_is(service, 0.0).await;
    let (status, body) = readyz(service).await;
    assert!(status == 200 && body.starts_with("ok, but the store fails: "), "{status} {body}");
    assert!(body.contains(why), "{body}");
    end().await;
    until_up_is(service, 1.0).await;
    assert_eq!(readyz(service).await, (200, "ok\n".to_owned()));
    // No attempt to place an order failed.
    assert_eq!(service.scrape().await.sum("order_store_errors_total", &[]), 0.0);
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn postgres_that_is_away_or_takes_no_writes_is_noticed() {
    let server = PostgresServer::start().await;
    let service = Process::start(&server.url(), &[]).await;
    is_noticed(&service, "onnection", async || server.stop_immediately(), async || server.run())
        .await;
    let told: Vec<_> = service.log().iter().map(|line| line["message"].clone()).collect();
    let once = [
        "serving",
        "the store fails; it is tried again until it answers",
        "the store answers again",
    ];
    assert_eq!(told, once);

    let mut connection = server.connect().await;
    connection.execute("SET default_transaction_read_only = off").await.unwrap();
    let reload = "SELECT pg_reload_conf()";
    let (set, reset) = (
        "ALTER SYSTEM SET default_transaction_read_only = on",
        "ALTER SYSTEM RESET default_transaction_read_only",
    );
    let connection = tokio::sync::Mutex::new(connection);
    let switch = async |statement: &'static str| {
        let mut connection = connection.lock().await;
        connection.execute(statement).await.unwrap();
        connection.execute(reload).await.unwrap();
    };
    let read_only = "read-only transaction";
    is_noticed(&service, read_only, async || switch(set).await, async || switch(reset).await).await;
    // The probes leave nothing behind: no row, and no garbage of one.
    let rows = "SELECT n_tup_ins + n_dead_tup FROM pg_stat_user_tables WHERE relname = 'orders'";
    let rows: i64 = sqlx::query_scalar(rows).fetch_one(&mut server.connect().await).await.unwrap();
    assert!(rows <= 1, "{rows}: the try at the start is one");
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_synchronous_standby_that_is_down_is_noticed_also_at_the_start() {
    let primary = PostgresServer::start().await;
    let standby = primary.attach_standby().await;
    let service = Process::start(&primary.url(), &[]).await;
    let back = async || {
        standby.run();
        primary.until_replicated().await;
    };
    let why = "synchronous standby is down";
    is_noticed(&service, why, async || standby.stop_immediately(), back).await;
    assert_eq!(service.terminate().await, Some(0));

    standby.stop_immediately();
    let service = Process::start(&primary.url(), &[]).await;
    let (status, body) = readyz(&service).await;
    assert!(status == 200 && body.contains(why), "{status} {body}");
    assert_eq!(service.scrape().await.value("order_store_up", &[]), 0.0);
    // Probes that nobody waits for any more do not pile up on the server.
    assert!(primary.backends().await.len() <= 4);
    back().await;
    until_up_is(&service, 1.0).await;
}

#[tokio::test]
async fn a_sqlite_file_that_another_program_holds_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let service = Process::start(&database_in(dir.path()), &[]).await;
    let held = std::cell::RefCell::new(None);
    let hold = async || {
        let lock = lock_file_in(dir.path()).await;
        held.replace(Some(lock));
    };
    let release = async || {
        let lock = held.take().unwrap();
        lock.close().await.unwrap();
    };
    is_noticed(&service, "database is locked", hold, release).await;
}
