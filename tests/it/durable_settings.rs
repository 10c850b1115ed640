//! What the server's settings mean for acknowledged orders: an asynchronous commit is made a
//! synchronous one, and what the service cannot change it warns of.

use order_service::proto::PlaceRequest;
use sqlx::{AssertSqlSafe, Executor as _};

use crate::{
    postgres::PostgresServer,
    support::{Process, scrape_until},
};

async fn place(service: &Process, orders: usize) {
    let mut grpc = service.grpc().await;
    for _ in 0..orders {
        let request = PlaceRequest { product_id: "book".into(), ..Default::default() };
        grpc.place(request).await.unwrap();
    }
}

/// The lines that warn, each with the setting that was found.
fn warnings(service: &Process) -> Vec<String> {
    let lines = service.log().into_iter().filter(|line| line["level"] == "WARN");
    lines.map(|line| line["found"].as_str().unwrap().to_owned()).collect()
}

async fn rows(server: &PostgresServer, query: &'static str) -> i64 {
    sqlx::query_as::<_, (i64,)>(query).fetch_one(&mut server.connect().await).await.unwrap().0
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn asynchronous_commits_of_the_server_or_the_role_lose_no_acknowledged_order() {
    for of_role in [false, true] {
        let mut server = PostgresServer::make();
        // So long that only a commit that waits for the disk is on it.
        server.set(&["wal_writer_delay=10s", "wal_writer_flush_after=0"]);
        if !of_role {
            server.set(&["synchronous_commit=off"]);
        }
        server.run();
        if of_role {
            let alter = "ALTER ROLE postgres SET synchronous_commit = off";
            server.connect().await.execute(alter).await.unwrap();
        }
        let service = Process::start(&server.url(), &[]).await;
        place(&service, 20).await;
        server.stop_immediately();
        server.run();
        assert_eq!(rows(&server, "SELECT COUNT(*) FROM orders").await, 20, "of_role: {of_role}");
        assert_eq!(warnings(&service), ["synchronous_commit=off"]);
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_start_of_many_tries_warns_once() {
    let mut server = PostgresServer::make();
    server.set(&["fsync=off"]);
    server.run();
    assert_eq!(Process::start(&server.url(), &[]).await.terminate().await, Some(0));
    let mut connection = server.connect().await;
    connection.execute("BEGIN; LOCK TABLE orders IN SHARE MODE").await.unwrap();
    let mut service = Process::spawn(&server.url(), &[], |_| {});
    service.logged("the store does not answer yet").await;
    // A try that logs its reason no more.
    let waiting = "SELECT COUNT(*) FROM pg_locks WHERE NOT granted";
    while rows(&server, waiting).await == 0 {}
    connection.execute("COMMIT").await.unwrap();
    service.serving().await;
    let log = service.log();
    let found = log.iter().filter(|line| line["found"] == "fsync=off").count();
    assert_eq!(found, 1, "{log:?}");
}

/// An asynchronous commit, on a server that is told so while the service runs.
#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_reload_turns_no_session_asynchronous() {
    let mut server = PostgresServer::make();
    server.set(&["wal_writer_delay=10s", "wal_writer_flush_after=0"]);
    server.run();
    let service = Process::start(&server.url(), &[]).await;
    place(&service, 1).await;
    let mut connection = server.connect().await;
    connection.execute("ALTER SYSTEM SET synchronous_commit = off").await.unwrap();
    connection.execute("SELECT pg_reload_conf()").await.unwrap();
    let off = "SELECT COUNT(*) FROM pg_settings \
               WHERE name = 'synchronous_commit' AND setting = 'off'";
    while rows(&server, off).await == 0 {}
    place(&service, 20).await;
    server.stop_immediately();
    server.run();
    assert_eq!(rows(&server, "SELECT COUNT(*) FROM orders").await, 21);
    assert_eq!(warnings(&service), Vec::<String>::new());
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn an_administrators_stronger_or_weaker_setting_is_kept() {
    let server = PostgresServer::start().await;
    let mut connection = server.connect().await;
    // The service makes the tables.
    drop(Process::start(&server.url(), &[]).await);
    connection
        .execute(
            "CREATE TABLE settings (value TEXT); \
             CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
                 INSERT INTO settings VALUES (current_setting('synchronous_commit')); \
                 RETURN NULL; END $$; \
             CREATE TRIGGER note AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION note();",
        )
        .await
        .unwrap();
    for (set, found) in [
        ("off", "on"),
        ("local", "local"),
        ("remote_write", "remote_write"),
        ("on", "on"),
        ("remote_apply", "remote_apply"),
    ] {
        let alter =
            format!("ALTER ROLE postgres SET synchronous_commit = {set}; DELETE FROM settings");
        connection.execute(AssertSqlSafe(alter)).await.unwrap();
        let service = Process::start(&server.url(), &[]).await;
        place(&service, 2).await;
        let noted: Vec<(String,)> =
            sqlx::query_as("SELECT value FROM settings").fetch_all(&mut connection).await.unwrap();
        assert_eq!(noted, vec![(found.to_owned(),); 2], "{set}");
        let expected: &[&str] = if set == "off" { &["synchronous_commit=off"] } else { &[] };
        assert_eq!(warnings(&service), expected, "{set}");
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn settings_that_lose_orders_with_the_machine_are_warned_of_once_each() {
    let mut server = PostgresServer::make();
    server.set(&["fsync=off", "full_page_writes=off", "synchronous_commit=off"]);
    server.run();
    let service = Process::start(&server.url(), &[]).await;
    place(&service, 3).await;
    scrape_until(service.admin, |page| page.value("product_order_total", &[]) == 3.0).await;
    let found = ["synchronous_commit=off", "fsync=off", "full_page_writes=off"];
    assert_eq!(warnings(&service), found);
}

/// A hardened server: the role cannot make a commit that waits for a standby.
#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_role_that_may_not_wait_for_a_standby_is_refused_with_the_remedy() {
    let server = PostgresServer::start().await;
    let mut connection = server.connect().await;
    let function = "FUNCTION pg_logical_emit_message(BOOLEAN, TEXT, TEXT)";
    let statements = format!(
        "CREATE ROLE clerk LOGIN PASSWORD '{}'; GRANT CREATE ON SCHEMA public TO clerk; \
         REVOKE EXECUTE ON {function} FROM PUBLIC",
        crate::postgres::PASSWORD
    );
    connection.execute(AssertSqlSafe(statements)).await.unwrap();
    let url = server.url().replace("postgres:s", "clerk:s");
    let mut service = Process::spawn(&url, &[], |_| {});
    assert_eq!(service.exited().await.code(), Some(1));
    let log = format!("{:?}", service.log());
    assert!(
        log.contains("GRANT EXECUTE ON FUNCTION pg_logical_emit_message(boolean,text,text"),
        "{log}"
    );
    let grant = format!("GRANT EXECUTE ON {function} TO clerk");
    connection.execute(AssertSqlSafe(grant)).await.unwrap();
    place(&Process::start(&url, &[]).await, 1).await;
}
