//! Migrations apart from serving: `order-service migrate`, `--migrations`, the roles of
//! docs/database.md, and tables that are newer than the program.

use std::{process::Stdio, time::Duration};

use order_service::proto::{GetRequest, ListRequest, PlaceRequest};
use rustix::process::{Pid, Signal, kill_process};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection, Row as _};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    time::{Instant, timeout},
};

use crate::{
    database::Database,
    postgres::{PASSWORD, PostgresServer},
    prune::documented,
    support::{PATIENCE, Process, server_command},
    usage::{refusal, run},
};

const PORTS: [&str; 4] = ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];

/// Runs `order-service migrate`, which must succeed; returns its one log line.
async fn migrate(url: &str) -> String {
    let output = run(&["migrate", "--database-url", url], &[]).await;
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(output.stdout.is_empty());
    stderr
}

/// The one line of a server that refuses to start.
async fn refused(url: &str, mode: &str) -> String {
    let args = [&PORTS[..], &["--database-url", url, "--migrations", mode]].concat();
    refusal(&args, &[], 1).await
}

/// Places, replays, reads and lists an order: all that the service asks of its database.
async fn serves(service: &Process, key: &str) {
    let mut grpc = service.grpc().await;
    let request = PlaceRequest {
        product_id: "book".into(),
        idempotency_key: key.into(),
        ..Default::default()
    };
    let placed = grpc.place(request.clone()).await.unwrap().into_inner();
    assert!(!placed.replayed);
    let order = placed.order.unwrap();
    let replayed = grpc.place(request).await.unwrap().into_inner();
    assert!(replayed.replayed);
    assert_eq!(replayed.order.as_ref(), Some(&order));
    let get = GetRequest { order_id: order.order_id.clone() };
    assert_eq!(grpc.get(get).await.unwrap().into_inner().order.as_ref(), Some(&order));
    let list = grpc.list(ListRequest::default()).await.unwrap().into_inner();
    assert_eq!(list.orders[0], order);
}

fn warnings(service: &Process) -> Vec<serde_json::Value> {
    service.log().into_iter().filter(|line| line["level"] == "WARN").collect()
}

async fn check_refuses_what_migrate_makes(database: Database) {
    let url = database.url();
    let line = refused(&url, "check").await;
    assert!(line.contains("--migrations check"), "{line}");
    assert!(line.contains("run `order-service migrate`"), "{line}");
    match &database {
        Database::File(dir) => {
            assert!(line.contains("no such file"), "{line}");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "it leaves no file");
            // An empty file is an empty database.
            std::fs::write(dir.path().join("orders.db"), "").unwrap();
            let line = refused(&url, "check").await;
            assert!(line.contains("lack migration 1"), "{line}");
            let written = std::fs::metadata(dir.path().join("orders.db")).unwrap().len();
            assert_eq!(written, 0, "it writes nothing");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "it makes no other file");
        }
        _ => assert!(line.contains("lack migration 1"), "{line}"),
    }

    assert!(migrate(&url).await.contains("applied=[1]"));
    assert!(migrate(&url).await.contains("applied=[]"));
    for mode in ["check", "apply"] {
        let service = Process::start(&url, &["--migrations", mode]).await;
        serves(&service, mode).await;
        assert_eq!(warnings(&service), Vec::<serde_json::Value>::new());
        assert_eq!(service.terminate().await, Some(0));
    }
}

/// What a newer version of this program does to the tables, as far as an older one sees it.
async fn migrate_further(database: &Database, version: i64, description: &str) {
    let row = format!(
        "INSERT INTO _sqlx_migrations \
         (version, description, installed_on, success, checksum, execution_time) \
         SELECT {version}, '{description}', installed_on, success, checksum, 0 \
         FROM _sqlx_migrations WHERE version = 1"
    );
    let mut connection = database.connect().await;
    let column = format!("ALTER TABLE orders ADD COLUMN note_{version} TEXT");
    connection.execute(AssertSqlSafe(column)).await.unwrap();
    let index = format!("CREATE INDEX orders_note_{version} ON orders (note_{version})");
    connection.execute(AssertSqlSafe(index)).await.unwrap();
    connection.execute(AssertSqlSafe(row)).await.unwrap();
}

async fn an_old_build_serves_from_tables_that_are_newer_by_additive_migrations(database: Database) {
    let url = database.url();
    migrate(&url).await;
    // As in a roll-out: the old replica serves while the new version migrates.
    let service = Process::start(&url, &[]).await;
    serves(&service, "before").await;
    migrate_further(&database, 2, "additive: notes").await;
    serves(&service, "between").await;
    assert_eq!(service.terminate().await, Some(0));

    migrate_further(&database, 3, "additive: more notes").await;
    for mode in ["apply", "check"] {
        // As after `kubectl rollout undo`: the old version starts anew.
        let service = Process::start(&url, &["--migrations", mode]).await;
        serves(&service, mode).await;
        let warnings = warnings(&service);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        let newer = warnings[0]["migrations"].as_str().unwrap();
        assert_eq!(newer, "2 (additive: notes), 3 (additive: more notes)");
        assert_eq!(service.terminate().await, Some(0));
    }
    let output = run(&["migrate", "--database-url", &url], &[]).await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

async fn tables_that_are_newer_by_another_migration_are_refused(database: Database) {
    let url = database.url();
    migrate(&url).await;
    migrate_further(&database, 2, "additive: notes").await;
    migrate_further(&database, 3, "quantities as text").await;
    for mode in ["apply", "check"] {
        let line = refused(&url, mode).await;
        assert!(line.contains("migration 3") && line.contains("newer version"), "{line}");
    }
    let line = refusal(&["migrate", "--database-url", &url], &[], 1).await;
    assert!(line.contains("migration 3"), "{line}");
}

macro_rules! suite {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test] async fn $name() { super::$name(super::Database::file()).await; })*
        }
        mod postgres {
            $(
                #[tokio::test]
                #[ignore = "needs PostgreSQL's server programs; run by make test"]
                async fn $name() { super::$name(super::Database::postgres().await).await; }
            )*
        }
    };
}

suite!(
    check_refuses_what_migrate_makes,
    an_old_build_serves_from_tables_that_are_newer_by_additive_migrations,
    tables_that_are_newer_by_another_migration_are_refused,
);

/// The server's URL for a role of docs/database.md.
fn url_of(server: &PostgresServer, role: &str, password: &str) -> String {
    server.url().replace(&format!("postgres:{PASSWORD}"), &format!("{role}:{password}"))
}

/// Runs a script of docs/database.md as a managed cloud's administrator, who is no superuser.
async fn as_administrator(server: &PostgresServer, words: &[&str]) {
    let role = format!(
        "CREATE ROLE administrator LOGIN CREATEROLE PASSWORD '{PASSWORD}'; \
         ALTER DATABASE postgres OWNER TO administrator"
    );
    server.connect().await.execute(AssertSqlSafe(role)).await.unwrap();
    let mut connection = connect(&url_of(server, "administrator", PASSWORD)).await;
    connection.execute(AssertSqlSafe(documented(words))).await.unwrap();
}

async fn connect(url: &str) -> PgConnection {
    PgConnection::connect(url).await.unwrap()
}

/// Statements that the serving role must not be able to run.
async fn is_restricted(url: &str) {
    let mut connection = connect(url).await;
    for statement in [
        "CREATE TABLE other (id INT4)",
        "ALTER TABLE orders ADD COLUMN other TEXT",
        "UPDATE orders SET quantity = 1",
        "DELETE FROM orders",
        "TRUNCATE orders",
        "UPDATE _sqlx_migrations SET checksum = ''",
    ] {
        let error = connection.execute(statement).await.expect_err(statement);
        let code = error.as_database_error().unwrap().code().unwrap().into_owned();
        assert_eq!(code, "42501", "{statement}: {error}");
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn the_service_needs_no_more_than_select_and_insert() {
    let server = PostgresServer::start().await;
    as_administrator(&server, &["CREATE ROLE orders LOGIN"]).await;
    let owner = url_of(&server, "orders_owner", "OWNER-PASSWORD");
    let serving = url_of(&server, "orders", "SERVICE-PASSWORD");

    let line = refused(&serving, "apply").await;
    assert!(line.contains("permission denied for schema public"), "{line}");
    assert!(line.contains("order-service migrate"), "{line}");

    migrate(&owner).await;
    is_restricted(&serving).await;
    // Nothing is to be applied, so that `apply` needs no more than `check`.
    for mode in ["check", "apply"] {
        let service = Process::start(&serving, &["--migrations", mode]).await;
        serves(&service, mode).await;
        assert_eq!(service.terminate().await, Some(0));
    }
    assert!(migrate(&serving).await.contains("applied=[]"));
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_database_of_one_role_gets_two_while_it_serves() {
    let server = PostgresServer::start().await;
    let one = "CREATE ROLE orders LOGIN PASSWORD 'SERVICE-PASSWORD'; \
               GRANT CREATE ON SCHEMA public TO orders";
    server.connect().await.execute(one).await.unwrap();
    let serving = url_of(&server, "orders", "SERVICE-PASSWORD");
    let service = Process::start(&serving, &[]).await;
    serves(&service, "one-role").await;

    as_administrator(&server, &["OWNER TO orders_owner"]).await;
    serves(&service, "two-roles").await;
    assert_eq!(service.terminate().await, Some(0));

    is_restricted(&serving).await;
    migrate(&url_of(&server, "orders_owner", "OWNER-PASSWORD")).await;
    let service = Process::start(&serving, &["--migrations", "check"]).await;
    serves(&service, "restarted").await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_role_without_select_on_the_list_of_migrations_is_told_so_at_once() {
    let server = PostgresServer::start().await;
    migrate(&server.url()).await;
    let role = format!(
        "CREATE ROLE clerk LOGIN PASSWORD '{PASSWORD}'; GRANT SELECT, INSERT ON orders TO clerk"
    );
    server.connect().await.execute(AssertSqlSafe(role)).await.unwrap();
    let line = refused(&url_of(&server, "clerk", PASSWORD), "check").await;
    assert!(line.contains("permission denied for table _sqlx_migrations"), "{line}");
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn five_migrate_at_once_on_an_empty_database() {
    let server = PostgresServer::start().await;
    let url = server.url();
    let mut all = tokio::task::JoinSet::new();
    for _ in 0..5 {
        let url = url.clone();
        all.spawn(async move { run(&["migrate", "--database-url", &url], &[]).await });
    }
    for output in all.join_all().await {
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn migrate_takes_as_long_as_its_statements_do() {
    let server = PostgresServer::start().await;
    // A table of the same name that is not committed: the migration waits for its fate.
    let mut holder = server.connect().await;
    holder.execute("BEGIN; CREATE TABLE orders (id INT4)").await.unwrap();
    let migrating = tokio::spawn({
        let url = server.url();
        async move { migrate(&url).await }
    });
    // Longer than a start gives them.
    let mut observer = server.connect().await;
    let waits = "SELECT COUNT(*) FROM pg_stat_activity WHERE application_name = 'order-service' \
                 AND wait_event_type = 'Lock' AND now() - query_start > INTERVAL '12 seconds'";
    let until = Instant::now() + PATIENCE;
    while observer.fetch_one(waits).await.unwrap().get::<i64, _>(0) == 0 {
        assert!(Instant::now() < until && !migrating.is_finished());
    }
    holder.execute("ROLLBACK").await.unwrap();
    assert!(migrating.await.unwrap().contains("applied=[1]"));
}

#[tokio::test]
async fn a_migrate_that_is_told_to_end_fails() {
    // A name that cannot be resolved (RFC 6761): it is waited for.
    let url = "postgres://orders@database.invalid/orders";
    let mut command = server_command(&["migrate", "--database-url", url]);
    command.env("ORDER_LOG_FORMAT", "json").env("RUST_LOG", "debug");
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let pid = Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    // Its first words: from then on signals are handled.
    timeout(PATIENCE, lines.read_line(&mut line)).await.expect("it says that it waits").unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    let ended = timeout(Duration::from_secs(20), child.wait()).await.expect("at once").unwrap();
    assert_eq!(ended.code(), Some(1), "{line}");
}

#[tokio::test]
async fn migrate_refuses_a_file_that_a_service_uses() {
    let database = Database::file();
    let service = Process::start(&database.url(), &[]).await;
    let line = refusal(&["migrate", "--database-url", &database.url()], &[], 1).await;
    assert!(line.contains("another process"), "{line}");
    serves(&service, "still").await;
}

#[tokio::test]
async fn the_flags_of_migrate_stand_before_or_behind_it_or_in_the_environment() {
    for (args, env) in [
        (&["migrate", "--database-url", "URL"][..], None),
        (&["--database-url", "URL", "migrate"][..], None),
        (&["migrate", "--log-format", "json"][..], Some("DATABASE_URL")),
    ] {
        let database = Database::file();
        let url = database.url();
        let args: Vec<_> = args.iter().map(|arg| if *arg == "URL" { &url } else { *arg }).collect();
        let env: Vec<_> = env.into_iter().map(|name| (name, url.as_str())).collect();
        let output = run(&args, &env).await;
        assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
        let service = Process::start(&url, &["--migrations", "check"]).await;
        serves(&service, "key").await;
    }
}

#[tokio::test]
async fn migrate_is_refused_where_nothing_would_last() {
    let line = refusal(&["migrate", "--database-url", "sqlite::memory:"], &[], 2).await;
    assert!(line.contains("--database-url") && line.contains("sqlite::memory:"), "{line}");
    // The server makes such a database itself, whatever it may do with others.
    let service = Process::start("sqlite::memory:", &["--migrations", "check"]).await;
    serves(&service, "key").await;
}
