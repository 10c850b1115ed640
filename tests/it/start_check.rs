//! Ready means that an order can be placed: what keeps orders from being placed ends the start with
//! exit code 1 and one line that names the cause and the remedy.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use order_service::proto::{ListRequest, PlaceRequest};
use sqlx::{Connection as _, Executor as _, SqliteConnection};
use tokio::process::Command;

use crate::{
    database::lock_file_in,
    database_start::{places_an_order, refusal, refusal_of, says_why, starting},
    pgbouncer::PgBouncer,
    postgres::{PASSWORD, PostgresServer},
    support::{Process, database_in, run_as, server_command},
};

/// As a user whom the permissions of files concern.
fn as_nobody(command: &mut Command) {
    if rustix::process::geteuid().is_root() {
        let program = env!("CARGO_BIN_EXE_order-service");
        let nobody = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", program];
        run_as(command, &nobody);
    }
}

fn allow(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[tokio::test]
async fn a_sqlite_file_that_cannot_be_written_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let url = database_in(dir.path());
    assert_eq!(Process::start(&url, &[]).await.terminate().await, Some(0));
    let file = dir.path().join("orders.db");
    allow(&dir.path().join("orders.db.lock"), 0o666);

    // The file alone, then its directory alone.
    for (file_mode, dir_mode) in [(0o444, 0o777), (0o666, 0o555)] {
        allow(&file, file_mode);
        allow(dir.path(), dir_mode);
        let line = refusal_of(&url, as_nobody).await;
        assert!(line.contains(&url) && line.contains("this user must be able to write"), "{line}");
    }
    // Not even the lock: there is none, and none can be made.
    allow(dir.path(), 0o777);
    fs::remove_file(dir.path().join("orders.db.lock")).unwrap();
    allow(dir.path(), 0o555);
    let line = refusal_of(&url, as_nobody).await;
    assert!(line.contains("orders.db.lock") && line.contains("must be able to write"), "{line}");

    // What the tries left inherits the file's permissions.
    allow(dir.path(), 0o777);
    for left in ["orders.db-wal", "orders.db-shm"] {
        let _ = fs::remove_file(dir.path().join(left));
    }
    let service = Process::start_command(&url, &[], as_nobody).await;
    places_an_order(&service).await;
}

#[tokio::test]
async fn a_sqlite_file_that_another_program_holds_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let url = database_in(dir.path());
    assert_eq!(Process::start(&url, &[]).await.terminate().await, Some(0));
    let held = lock_file_in(dir.path()).await;
    let (mut service, readyz) = starting(&url);
    says_why(&readyz, "database is locked").await;
    held.close().await.unwrap();
    service.serving().await;
    places_an_order(&service).await;
}

#[tokio::test]
async fn the_try_at_the_start_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let url = database_in(dir.path());
    // A rule of the administrator's that the try does not meet.
    assert_eq!(Process::start(&url, &[]).await.terminate().await, Some(0));
    let mut connection = SqliteConnection::connect(&url).await.unwrap();
    let rule = "CREATE TRIGGER rule BEFORE INSERT ON orders WHEN NEW.product_id <> 'book' \
                BEGIN SELECT RAISE(ABORT, 'books alone'); END";
    connection.execute(rule).await.unwrap();
    let service = Process::start(&url, &[]).await;
    let list = service.grpc().await.list(ListRequest::default()).await.unwrap().into_inner();
    assert_eq!(list.orders, []);
    assert_eq!(service.scrape().await.value("product_order_total", &[]), 0.0);
    places_an_order(&service).await;
}

#[tokio::test]
async fn every_name_of_memory_keeps_orders_until_the_end() {
    for url in ["sqlite::memory:", "sqlite://:memory:", "sqlite://file::memory:"] {
        let service = Process::start(url, &[]).await;
        let mut grpc = service.grpc().await;
        for _ in 0..3 {
            places_an_order(&service).await;
        }
        let listed = grpc.list(ListRequest::default()).await.unwrap().into_inner();
        assert_eq!(listed.orders.len(), 3, "{url}");
    }
    assert!(!Path::new(":memory:").exists() && !Path::new("file::memory:").exists());
}

#[tokio::test]
async fn sqlites_own_uris_are_refused_with_the_forms_that_work() {
    for url in ["sqlite://file:orders.db", "sqlite://file:orders.db?mode=memory"] {
        let output = server_command(&["--database-url", url]).output().await.unwrap();
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), line.lines().count()), (Some(2), 1), "{line}");
        assert!(line.contains("--database-url") && line.contains("sqlite://PATH"), "{line}");
        assert!(line.contains("instead of SQLite's file: URI"), "{line}");
    }
}

#[tokio::test]
async fn tables_of_another_program_in_a_sqlite_file_are_told_as_such() {
    let list = "CREATE TABLE _sqlx_migrations (version BIGINT PRIMARY KEY, description TEXT NOT NULL, \
                installed_on TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP, success BOOLEAN NOT NULL, \
                checksum BLOB NOT NULL, execution_time BIGINT NOT NULL);";
    for (made, told) in [
        ("CREATE TABLE orders (number INTEGER)".to_owned(), "table orders is another program's"),
        (
            format!(
                "{list} INSERT INTO _sqlx_migrations VALUES (20240101, 'customers', 0, 1, x'', 0)"
            ),
            "another program, whose migration 20240101",
        ),
        (
            format!("{list} INSERT INTO _sqlx_migrations VALUES (1, 'init', 0, 1, x'', 0)"),
            "another program, whose migration 1",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("{}?mode=rwc", database_in(dir.path()));
        let mut connection = SqliteConnection::connect(&url).await.unwrap();
        connection.execute(sqlx::AssertSqlSafe(made)).await.unwrap();
        connection.close().await.unwrap();
        let line = refusal(&database_in(dir.path())).await;
        assert!(line.contains(told) && line.contains("a database of its own"), "{line}");
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn tables_of_another_program_on_postgres_are_told_as_such() {
    let server = PostgresServer::start().await;
    let list = "CREATE TABLE _sqlx_migrations (version BIGINT PRIMARY KEY, description TEXT NOT NULL, \
                installed_on TIMESTAMPTZ NOT NULL DEFAULT now(), success BOOLEAN NOT NULL, \
                checksum BYTEA NOT NULL, execution_time BIGINT NOT NULL);";
    for (made, told) in [
        ("CREATE TABLE orders (number INT)".to_owned(), "table orders is another program's"),
        ("CREATE VIEW orders AS SELECT 1".to_owned(), "table orders is another program's"),
        (
            format!(
                "{list} INSERT INTO _sqlx_migrations VALUES (20240101, 'customers', now(), true, '', 0)"
            ),
            "another program, whose migration 20240101",
        ),
    ] {
        let mut connection = server.connect().await;
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public").await.unwrap();
        connection.execute(sqlx::AssertSqlSafe(made)).await.unwrap();
        let line = refusal(&server.url()).await;
        assert!(line.contains(told) && line.contains("a database of its own"), "{line}");
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_postgres_role_or_table_that_takes_no_order_is_refused() {
    let server = PostgresServer::start().await;
    assert_eq!(Process::start(&server.url(), &[]).await.terminate().await, Some(0));
    let mut connection = server.connect().await;
    let clerk = format!(
        "CREATE ROLE clerk LOGIN PASSWORD '{PASSWORD}'; GRANT CREATE ON SCHEMA public TO clerk; \
         GRANT SELECT ON orders, _sqlx_migrations TO clerk"
    );
    connection.execute(sqlx::AssertSqlSafe(clerk)).await.unwrap();
    let as_clerk = server.url().replace("postgres:s", "clerk:s");
    let line = refusal(&as_clerk).await;
    assert!(line.contains("permission denied for table orders"), "{line}");
    assert!(line.contains("SELECT and INSERT on orders"), "{line}");
    // A role that can write and not read.
    let writes = "REVOKE SELECT ON orders FROM clerk; GRANT INSERT, SELECT (id) ON orders TO clerk";
    connection.execute(writes).await.unwrap();
    let line = refusal(&as_clerk).await;
    assert!(line.contains("permission denied for table orders"), "{line}");

    connection.execute("ALTER TABLE orders RENAME quantity TO amount").await.unwrap();
    let line = refusal(&server.url()).await;
    assert!(line.contains("table orders is not as this program made it"), "{line}");
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_postgres_role_without_a_schema_is_refused_with_the_grant() {
    let server = PostgresServer::start().await;
    assert_eq!(Process::start(&server.url(), &[]).await.terminate().await, Some(0));
    let mut connection = server.connect().await;
    let clerk = format!(
        "CREATE ROLE clerk LOGIN PASSWORD '{PASSWORD}'; REVOKE USAGE ON SCHEMA public FROM public; \
         GRANT SELECT, INSERT ON orders, _sqlx_migrations TO clerk"
    );
    connection.execute(sqlx::AssertSqlSafe(clerk)).await.unwrap();
    let as_clerk = server.url().replace("postgres:s", "clerk:s");
    let line = refusal(&as_clerk).await;
    assert!(line.contains("GRANT USAGE ON SCHEMA public TO clerk"), "{line}");

    connection.execute("ALTER ROLE clerk SET search_path = shop").await.unwrap();
    let line = refusal(&as_clerk).await;
    assert!(line.contains("no schema of search_path (shop) exists"), "{line}");

    let grant = "ALTER ROLE clerk RESET search_path; GRANT USAGE ON SCHEMA public TO clerk";
    connection.execute(grant).await.unwrap();
    places_an_order(&Process::start(&as_clerk, &[]).await).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_postgres_server_that_takes_no_writes_is_waited_for() {
    let server = PostgresServer::start().await;
    assert_eq!(Process::start(&server.url(), &[]).await.terminate().await, Some(0));
    let mut connection = server.connect().await;
    let read_only = "ALTER SYSTEM SET default_transaction_read_only = on";
    connection.execute(read_only).await.unwrap();
    connection.execute("SELECT pg_reload_conf()").await.unwrap();
    let (mut service, readyz) = starting(&server.url());
    says_why(&readyz, "it takes no writes").await;
    connection.execute("SET default_transaction_read_only = off").await.unwrap();
    connection.execute("ALTER SYSTEM RESET default_transaction_read_only").await.unwrap();
    connection.execute("SELECT pg_reload_conf()").await.unwrap();
    service.serving().await;
    places_an_order(&service).await;
}

#[tokio::test]
#[ignore = "needs PgBouncer and PostgreSQL's server programs; run by make test"]
async fn a_pooler_that_refuses_the_time_limits_is_found_at_the_start() {
    let server = PostgresServer::start().await;
    let pooler = PgBouncer::start(&server, &["pool_mode = session"]).await;
    let line = refusal(&server.url_at(pooler.port)).await;
    assert!(line.contains("unsupported startup parameter"), "{line}");
    assert!(line.contains("ignore_startup_parameters = options"), "{line}");
    assert!(line.contains("statement_timeout = '2s'"), "{line}");
}

/// Debian's PgBouncer does not track prepared statements.
#[tokio::test]
#[ignore = "needs PgBouncer and PostgreSQL's server programs; run by make test"]
async fn a_pooler_that_mixes_up_prepared_statements_is_found_at_the_start() {
    let server = PostgresServer::start().await;
    let settings = ["pool_mode = transaction", "ignore_startup_parameters = options"];
    let pooler = PgBouncer::start(&server, &settings).await;
    let line = refusal(&server.url_at(pooler.port)).await;
    assert!(line.contains("use session pooling"), "{line}");
}

#[tokio::test]
#[ignore = "needs PgBouncer and PostgreSQL's server programs; run by make test"]
async fn a_pooler_that_ignores_the_time_limits_serves_with_a_warning() {
    let server = PostgresServer::start().await;
    let settings = ["pool_mode = session", "ignore_startup_parameters = options"];
    let pooler = PgBouncer::start(&server, &settings).await;
    let url = server.url_at(pooler.port);
    let warned = |service: &Process| {
        let lines = service.log();
        lines.iter().filter(|line| line["message"].as_str().unwrap().contains("limit")).count()
    };
    let service = Process::start(&url, &[]).await;
    assert_eq!(warned(&service), 2, "{:?}", service.log());
    places_an_order(&service).await;
    assert_eq!(service.terminate().await, Some(0));

    let limits = "ALTER ROLE postgres SET statement_timeout = '2s'; \
                  ALTER ROLE postgres SET lock_timeout = '1500ms'";
    server.connect().await.execute(limits).await.unwrap();
    // The sessions that the pooler holds were made before.
    drop(pooler);
    let pooler = PgBouncer::start(&server, &settings).await;
    let service = Process::start(&server.url_at(pooler.port), &[]).await;
    assert_eq!(warned(&service), 0, "{:?}", service.log());
    let mut grpc = service.grpc().await;
    let request = || PlaceRequest {
        product_id: "book".into(),
        idempotency_key: "k".into(),
        ..Default::default()
    };
    assert!(!grpc.place(request()).await.unwrap().into_inner().replayed);
    assert!(grpc.place(request()).await.unwrap().into_inner().replayed);
}
