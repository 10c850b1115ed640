//! The database URL: libpq's forms reach the server they name, and a URL that is not understood in
//! full is refused before anything is connected or logged.

use order_service::proto::PlaceRequest;
use sqlx::{Executor as _, Row as _};
use tempfile::TempDir;

use crate::{
    postgres::{PASSWORD, PostgresServer},
    support::{Process, database_in, server_command},
    usage::refusal,
};

/// The line that refuses a URL before any socket opens.
async fn refused(url: &str, env: &[(&str, &str)]) -> String {
    let line = refusal(&["--database-url", url], env, 2).await;
    assert!(line.contains("--database-url"), "{line}");
    line
}

#[tokio::test]
async fn a_parameter_that_is_not_understood_is_refused_with_the_nearest_one() {
    for (name, nearest) in [
        ("sslmodee", "\"sslmode\""),
        ("SSLMODE", "\"sslmode\""),
        ("ssl", "\"sslmode\""),
        ("channel_binding", "\"sslmode\""),
        ("sslpassword", "\"sslkey\""),
        ("sslcrl", "\"sslrootcert\""),
        ("pasword", "\"password\""),
        ("target_session_attr", "\"target_session_attrs\""),
        ("option", "\"options\""),
        ("connect_timeout", "sslmode"),
        ("%73slmodee", "\"sslmode\""),
    ] {
        let url = format!("postgres://u:pa55@127.0.0.1:1/db?{name}=S3CRET");
        let line = refused(&url, &[]).await;
        assert!(line.contains(nearest), "{line}");
        assert!(line.contains(&format!("\"{}\"", name.replace("%73", "s"))), "{line}");
        assert!(!line.contains("S3CRET") && !line.contains("pa55"), "{line}");
    }
}

#[tokio::test]
async fn a_url_that_can_be_read_in_two_ways_is_refused() {
    for (rest, expected) in [
        ("h/db?sslmode=S3CRET", "verify-full"),
        ("h/db?sslmode=require&sslmode=disable", "once"),
        ("h/db?sslmode=verify-full&ssl-mode=disable", "once"),
        ("h/db?sslmode", "="),
        ("h/db?sslcert=/S3CRET", "sslkey"),
        ("h/db?sslrootcert=system&sslmode=require", "verify-full"),
        ("h/db?target_session_attrs=S3CRET", "read-write"),
        // Orders are written.
        ("h/db?target_session_attrs=standby", "read-write"),
        ("h/db?target_session_attrs=read-only", "read-write"),
        ("h/db?hostaddr=S3CRET", "hostaddr"),
        ("h/db?statement-cache-capacity=S3CRET", "statement-cache-capacity"),
        ("h/db?options[=S3CRET", "options[NAME]"),
        ("a:1,b:2/db?port=1,2,3", "port"),
        ("h:0/db", "port"),
        ("h:S3CRET/db", "port"),
        ("h/db?application_name=%zzS3CRET", "percent-encoded"),
        ("h/db?application_name=S3CRET%00", "percent-encoded"),
        ("h/d%FFb", "percent-encoded"),
        ("h/db#S3CRET", "percent-encoded"),
        // A password that was not encoded: no part of it is shown.
        ("u:12/S3CRET@h/db", "percent-encoded"),
        ("u:12?S3CRET=S3CRET@h/db", "percent-encoded"),
        ("::1/db", "[::1]"),
        ("[::1/db", "[::1]"),
        ("[nothex]/db", "[::1]"),
        ("h%0A/db", "control"),
    ] {
        let line = refused(&format!("postgres://{rest}"), &[]).await;
        assert!(line.contains(expected), "{rest}: {line}");
        assert!(!line.contains("S3CRET"), "{rest}: {line}");
    }
}

#[tokio::test]
async fn what_the_environment_asks_for_in_vain_is_refused() {
    for (name, value) in [
        ("PGSSLMODE", "verify-ful"),
        ("PGPORT", "many"),
        ("PGTARGETSESSIONATTRS", "standby"),
        ("PGCHANNELBINDING", "require"),
        ("PGREQUIREAUTH", "scram-sha-256"),
        ("PGSSLCRL", "/crl.pem"),
        ("PGSERVICE", "orders"),
        ("PGPASSFILE", "/nowhere"),
    ] {
        let line = refused("postgres://127.0.0.1/db", &[(name, value)]).await;
        assert!(line.contains(name), "{name}: {line}");
    }
    // They are nothing to SQLite.
    let dir = tempfile::tempdir().unwrap();
    let url = database_in(dir.path());
    let sqlite = Process::start_command(&url, &[], |command| {
        command.env("PGSSLMODE", "verify-ful").env("PGCHANNELBINDING", "require");
    });
    assert_eq!(sqlite.await.terminate().await, Some(0));
}

/// Of every place where this environment could reach a PostgreSQL server, none is left.
fn without_pg(command: &mut tokio::process::Command) {
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PG")) {
        command.env_remove(name);
    }
}

/// Places an order by a service on that URL.
async fn works(url: &str, env: &[(&str, &str)]) {
    let service = Process::start_command(url, &[], |command| {
        without_pg(command);
        command.envs(env.iter().copied());
    });
    let service = service.await;
    let request = PlaceRequest { product_id: "book".into(), ..Default::default() };
    service.grpc().await.place(request).await.unwrap();
    let log = format!("{:?}", service.log());
    assert!(!log.contains(PASSWORD) && !log.contains("WARN"), "{url}: {log}");
}

/// How the service's connections came to the server: addresses, or `None` for its socket.
async fn addresses(server: &PostgresServer) -> Vec<Option<String>> {
    let query = "SELECT DISTINCT host(client_addr) FROM pg_stat_activity \
                 WHERE application_name = 'order-service'";
    let rows = server.connect().await.fetch_all(query).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn an_ipv6_address_is_connected_to() {
    let mut server = PostgresServer::make();
    server.set(&["listen_addresses=127.0.0.1,::1"]);
    server.run();
    let port = server.port;
    for url in [
        format!("postgres://postgres:{PASSWORD}@[::1]:{port}/postgres"),
        format!("postgresql://postgres:{PASSWORD}@/postgres?host=::1&port={port}"),
        format!("postgres:///?hostaddr=::1&port={port}&user=postgres&password={PASSWORD}"),
        // A Secret made with `echo`.
        format!("postgres://postgres:{PASSWORD}@[::1]:{port}/postgres\n"),
        format!("postgres://postgres:{PASSWORD}@[::1]:{port}/postgres\r\n"),
    ] {
        let service = Process::start_command(&url, &[], without_pg).await;
        let request = PlaceRequest { product_id: "book".into(), ..Default::default() };
        service.grpc().await.place(request).await.unwrap();
        assert_eq!(addresses(&server).await, [Some("::1".to_owned())], "{url:?}");
        assert_eq!(service.terminate().await, Some(0));
    }
}

/// A server that is also reached by a socket in a directory that others may enter.
fn with_socket() -> (PostgresServer, TempDir) {
    let sockets = tempfile::tempdir_in("/tmp").unwrap();
    let mut server = PostgresServer::make();
    server.give(sockets.path());
    server.set(&[&format!("unix_socket_directories={}", sockets.path().display())]);
    server.run();
    (server, sockets)
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_unix_socket_is_connected_to() {
    let (server, sockets) = with_socket();
    let (port, dir) = (server.port, sockets.path().to_str().unwrap());
    let encoded = dir.replace('/', "%2F");
    for (url, env) in [
        (format!("postgres://postgres:{PASSWORD}@/postgres?host={dir}&port={port}"), vec![]),
        (format!("postgres://postgres:{PASSWORD}@:{port}/postgres?host={dir}"), vec![]),
        (format!("postgres://postgres:{PASSWORD}@{encoded}:{port}/postgres"), vec![]),
        // As in libpq, TLS is for TCP alone.
        (
            format!("postgres://postgres:{PASSWORD}@{encoded}:{port}/postgres?sslmode=verify-full"),
            vec![],
        ),
        (
            "postgresql:///postgres".to_owned(),
            vec![
                ("PGHOST", format!("{dir}\n")),
                ("PGPORT", port.to_string()),
                ("PGUSER", "postgres".to_owned()),
                // A Secret made with `echo`.
                ("PGPASSWORD", format!("{PASSWORD}\n")),
            ],
        ),
    ] {
        let env: Vec<_> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
        works(&url, &env).await;
    }
    // None of them came by TCP: none is let in there.
    let query = "SELECT COUNT(*) FROM orders";
    let rows = server.connect().await.fetch_one(query).await.unwrap();
    assert_eq!(rows.get::<i64, _>(0), 5);
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_url_without_a_host_is_debians_socket() {
    let sockets = std::path::Path::new("/var/run/postgresql");
    if !sockets.is_dir() {
        return;
    }
    let mut server = PostgresServer::make();
    server.set(&["unix_socket_directories=/var/run/postgresql"]);
    let port = server.port;
    let url = format!("postgresql:///postgres?port={port}&user=postgres&password={PASSWORD}");
    // The server is looked for at each login, not once when the URL is read.
    let mut service = Process::spawn(&url, &[], without_pg);
    service.logged("the store does not answer yet").await;
    server.run();
    service.serving().await;
    let request = PlaceRequest { product_id: "book".into(), ..Default::default() };
    service.grpc().await.place(request).await.unwrap();
    assert_eq!(addresses(&server).await, [None]);
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn the_value_of_no_parameter_is_in_a_log_line_of_any_level() {
    let server = PostgresServer::start().await;
    let ports = ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
    let dir = tempfile::tempdir().unwrap();
    let passfile = dir.path().join("pgpass");
    // The first line is malformed; a parser that says so must not quote it.
    std::fs::write(&passfile, "127.0.0.1:S3CRET\n*:*:*:*:S3CRET\n").unwrap();
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&passfile, private).unwrap();
    let port = server.port;
    for url in [
        format!("{}?options=-c%20lock_timeout%3DS3CRET", server.url()),
        format!("{}?options[lock_timeout]=S3CRET", server.url()),
        format!("{}?options=S3CRET", server.url()),
        format!("{}?options=--S3CRET", server.url()),
        format!("{}?options=-c%20role%3DS3CRET", server.url()),
        format!("{}?options=-c%20session_preload_libraries%3Dauto_explain,S3CRET", server.url()),
        format!("{}?sslpassword=S3CRET", server.url()),
        format!("postgres://postgres@127.0.0.1:{port}/postgres?application_name=S3CRET"),
        format!("{}?sslmode=verify-full&sslrootcert=/S3CRET", server.url()),
    ] {
        let args = [&ports[..], &["--database-url", &url]].concat();
        let mut command = server_command(&args);
        without_pg(&mut command);
        command.env("RUST_LOG", "trace").env("PGPASSFILE", &passfile);
        let output = command.stderr(std::process::Stdio::piped()).output();
        let output = tokio::time::timeout(crate::support::PATIENCE, output).await.unwrap().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && !stderr.is_empty());
        assert!(!stderr.contains("S3CRET"), "{url}: {stderr}");
    }
    // Nor of one that serves.
    let url =
        format!("{}?application_name=S3CRET&options[search_path]=S3CRET,public", server.url());
    let service = Process::start_command(&url, &[], |command| {
        without_pg(command);
        command.env("RUST_LOG", "trace");
    });
    let mut service = service.await;
    let request = PlaceRequest { product_id: "book".into(), ..Default::default() };
    service.grpc().await.place(request).await.unwrap();
    service.signal(rustix::process::Signal::TERM);
    assert_eq!(service.exited().await.code(), Some(0));
    assert!(!format!("{:?}", service.log()).contains("S3CRET"));
}

#[tokio::test]
async fn control_characters_within_a_url_or_file_are_refused_and_a_last_newline_is_not() {
    for url in ["postgres://u:pa55@ho\nst/db", "postgres://u:pa\t55@host/db", "sqlite://a\nb.db"] {
        let line = refused(url, &[]).await;
        assert!(line.contains("control character") && !line.contains("55"), "{line}");
    }
    for flag in ["--tls-cert", "--tls-key", "--tls-client-ca", "--tls-client-crl"] {
        let line = refusal(&[&format!("{flag}=/a\nb.pem")], &[], 2).await;
        assert!(line.contains(flag) && line.contains("control character"), "{line}");
        // Trimmed, so that what is missing is the file, or the other flag.
        let line = refusal(&[&format!("{flag}=/nowhere.pem\n")], &[], 2).await;
        assert!(line.contains("\"/nowhere.pem\""), "{line}");
        let line = refusal(&[&format!("{flag}=\n")], &[], 2).await;
        assert!(line.contains(flag) && line.contains("PEM file"), "{line}");
    }
    let dir = tempfile::tempdir().unwrap();
    let service = Process::start(&format!("{}\n", database_in(dir.path())), &[]).await;
    assert!(dir.path().join("orders.db").exists());
    assert_eq!(service.terminate().await, Some(0));
}
