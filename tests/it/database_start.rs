//! Starting on PostgreSQL: what no waiting mends is refused at once, what may come is waited for.

use std::{
    net::TcpListener,
    process::Stdio,
    time::{Duration, Instant},
};

use order_service::proto::PlaceRequest;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use sqlx::{Executor as _, Row as _};
use tokio::{process::Command, time::timeout};

use crate::{
    postgres::{PASSWORD, PostgresServer},
    support::{PATIENCE, Process, server_command},
};

/// A server that is waited for is given up after 30 s; what is refused at once is so long before.
const AT_ONCE: Duration = Duration::from_secs(20);

/// Runs a service that refuses to start; returns the one line that says why.
pub async fn refusal(url: &str) -> String {
    refusal_of(url, |_| {}).await
}

/// The same of an adapted command.
pub async fn refusal_of(url: &str, adapt: impl FnOnce(&mut Command)) -> String {
    let ports = ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
    let mut command = server_command(&[&ports[..], &["--database-url", url]].concat());
    adapt(&mut command);
    let begun = Instant::now();
    let ended = timeout(PATIENCE, command.stderr(Stdio::piped()).output()).await;
    let output = ended.expect("it ends by itself").unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(!stderr.contains(PASSWORD), "{stderr}");
    assert!(begun.elapsed() < AT_ONCE, "{stderr}");
    stderr
}

/// The same server's, of a database that it has not.
fn other_database(url: &str) -> String {
    format!("{}/orders", url.strip_suffix("/postgres").unwrap())
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn what_no_waiting_mends_is_refused_at_once_in_one_line() {
    let server = PostgresServer::start().await;
    let wrong_password = server.url().replace(PASSWORD, "wr0ng");
    let line = refusal(&wrong_password).await;
    assert!(line.contains("password authentication failed"), "{line}");
    assert!(line.contains("postgres:***@127.0.0.1") && !line.contains("wr0ng"), "{line}");

    let line = refusal(&other_database(&server.url())).await;
    // The text format quotes the cause, and the quotes in it.
    assert!(line.contains(r#"database \"orders\" does not exist"#), "{line}");

    let clerk = format!("CREATE ROLE clerk LOGIN PASSWORD '{PASSWORD}'");
    server.connect().await.execute(sqlx::AssertSqlSafe(clerk)).await.unwrap();
    let line = refusal(&server.url().replace("postgres:s", "clerk:s")).await;
    assert!(line.contains("permission denied for schema public"), "{line}");

    let line = refusal(&format!("{}?sslmode=require", server.url())).await;
    assert!(line.contains("does not support TLS"), "{line}");
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn the_password_is_in_no_log_line_of_any_level() {
    let server = PostgresServer::start().await;
    let url = other_database(&server.url());
    let ports = ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
    let mut command = server_command(&[&ports[..], &["--database-url", &url]].concat());
    let output = command.env("RUST_LOG", "trace").stderr(Stdio::piped()).output().await.unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("does not exist"), "{stderr}");
    assert!(!stderr.contains(PASSWORD), "{stderr}");
}

/// A service that is starting, and the URL of its readiness.
pub fn starting(url: &str) -> (Process, String) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let admin = format!("127.0.0.1:{port}");
    let process = Process::spawn(url, &["--admin-listen", &admin], |_| {});
    (process, format!("http://{admin}/readyz"))
}

/// Waits until a starting service says why it is not ready.
pub async fn says_why(readyz: &str, why: &str) {
    let waiting = async {
        loop {
            let Ok(answer) = reqwest::get(readyz).await else { continue };
            assert_eq!(answer.status(), 503);
            let body = answer.text().await.unwrap();
            if body.starts_with("starting: the store has not answered yet: ") && body.contains(why)
            {
                return;
            }
        }
    };
    timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("/readyz says {why:?}"));
}

pub async fn places_an_order(service: &Process) {
    let request = PlaceRequest { product_id: "book".into(), ..Default::default() };
    service.grpc().await.place(request).await.unwrap();
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_server_that_is_not_up_yet_is_waited_for() {
    let server = PostgresServer::make();
    let (mut service, readyz) = starting(&server.url());
    says_why(&readyz, "Connection refused").await;
    server.run();
    service.serving().await;
    places_an_order(&service).await;
    assert_eq!(reqwest::get(&readyz).await.unwrap().text().await.unwrap(), "ok\n");
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn a_server_without_a_free_connection_is_waited_for() {
    let mut server = PostgresServer::make();
    server.set(&["max_connections=8"]);
    server.run();
    let hogged = server.hog().await;
    let (mut service, readyz) = starting(&server.url());
    says_why(&readyz, "too many clients").await;
    drop(hogged);
    service.serving().await;
    places_an_order(&service).await;
}

#[tokio::test]
async fn a_server_that_never_comes_is_given_up_after_30_s() {
    // A name that cannot be resolved (RFC 6761), as in a cluster whose database is not there yet.
    let url = format!("postgres://orders:{PASSWORD}@database.invalid/orders");
    let begun = Instant::now();
    let (mut service, readyz) = starting(&url);
    says_why(&readyz, "").await;
    assert_eq!(service.exited().await.code(), Some(1));
    assert!(begun.elapsed() >= Duration::from_secs(29), "{:?}", begun.elapsed());
    let log = service.log();
    let last = log.last().unwrap()["cause"].as_str().unwrap().to_owned();
    assert!(last.contains("database.invalid"), "{last}");
    assert!(last.contains("not ready within 30 s"), "{last}");
    // Each new reason is a line, not each try.
    assert!(log.len() <= 4, "{log:?}");
    assert!(!format!("{log:?}").contains(PASSWORD));
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn five_processes_start_at_once_on_an_empty_database() {
    let server = PostgresServer::start().await;
    let mut services: Vec<_> = (0..5).map(|_| starting(&server.url()).0).collect();
    for service in &mut services {
        service.serving().await;
        places_an_order(service).await;
    }
    let rows: (i64,) = sqlx::query_as("SELECT COUNT(*) FROM orders")
        .fetch_one(&mut server.connect().await)
        .await
        .unwrap();
    assert_eq!(rows.0, 5);
}

fn params_of_ca() -> CertificateParams {
    let mut params = CertificateParams::new([]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

#[tokio::test]
#[ignore = "needs PostgreSQL's server programs; run by make test"]
async fn tls_to_the_server_is_used_and_verified_as_asked() {
    let ca = CertifiedIssuer::self_signed(params_of_ca(), KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    // For the name alone, not for the address.
    let certificate = CertificateParams::new(["localhost".to_owned()]).unwrap();
    let certificate = certificate.signed_by(&key, &ca).unwrap();

    let mut server = PostgresServer::make();
    let chain = server.private_file("server.crt", &certificate.pem());
    let key = server.private_file("server.key", &key.serialize_pem());
    server.set(&[
        "ssl=on",
        &format!("ssl_cert_file={}", chain.display()),
        &format!("ssl_key_file={}", key.display()),
    ]);
    server.run();
    let own = tempfile::tempdir().unwrap();
    let ca_file = own.path().join("ca.crt");
    std::fs::write(&ca_file, ca.pem()).unwrap();
    let stranger = CertifiedIssuer::self_signed(params_of_ca(), KeyPair::generate().unwrap());
    let stranger_pem = stranger.unwrap().pem();
    let stranger = own.path().join("stranger.crt");
    std::fs::write(&stranger, stranger_pem).unwrap();
    let by_address = server.url();
    let by_name = by_address.replace("127.0.0.1", "localhost");
    let root = format!("sslrootcert={}", ca_file.display());

    for url in [
        format!("{by_address}?sslmode=require"),
        format!("{by_name}?sslmode=verify-full&{root}"),
        format!("{by_address}?sslmode=verify-ca&{root}"),
    ] {
        let service = Process::start(&url, &[]).await;
        places_an_order(&service).await;
        let query = "SELECT s.ssl FROM pg_stat_ssl s JOIN pg_stat_activity a USING (pid) \
                     WHERE a.application_name = 'order-service'";
        let rows = server.connect().await.fetch_all(query).await.unwrap();
        assert!(!rows.is_empty() && rows.iter().all(|row| row.get::<bool, _>(0)), "{url}");
    }
    // A stranger's certificate, one for another name, and no file to check it with.
    for (url, why) in [
        (format!("{by_name}?sslmode=verify-full"), "UnknownIssuer"),
        (format!("{by_name}?sslrootcert=system"), "UnknownIssuer"),
        (format!("{by_name}?sslmode=require&sslrootcert={}", stranger.display()), "BadSignature"),
        (format!("{by_address}?sslmode=verify-full&{root}"), "not valid for name"),
        (format!("{by_name}?sslmode=verify-full&sslrootcert=/nowhere.crt"), "No such file"),
    ] {
        let line = refusal(&url).await;
        assert!(line.contains(why), "{line}");
    }
}
