//! The command line: what is refused, how, and with which exit code.

use std::process::{Output, Stdio};

use crate::support::{Process, database_in, server_command};

/// Runs the server to its end, which must come by itself.
pub async fn run(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = server_command(args);
    command.envs(env.iter().copied()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let ended = tokio::time::timeout(crate::support::PATIENCE, command.output());
    ended.await.expect("the server ends by itself").unwrap()
}

/// The one line that it wrote before it ended with this code.
pub async fn refusal(args: &[&str], env: &[(&str, &str)], code: i32) -> String {
    let output = run(args, env).await;
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?} {env:?}: {stderr}");
    let lines: Vec<_> = stderr.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(lines.len(), 1, "{args:?} {env:?}: {stderr}");
    assert!(output.stdout.is_empty());
    lines[0].to_owned()
}

#[tokio::test]
async fn a_bad_value_is_refused_in_one_line_that_names_it() {
    for (flag, value, expected) in [
        ("--listen", "localhost", "127.0.0.1:8181"),
        ("--admin-listen", "127.0.0.1:99999", "port"),
        ("--database-url", "mysql://localhost/orders", "sqlite://PATH"),
        ("--database-url", "", "sqlite://PATH"),
        ("--database-pool", "0", "1 to 1000"),
        ("--processing-delay", "10", "250ms"),
        ("--request-timeout", "0s", "at least 1ms"),
        ("--request-timeout", "99999999y", "at most 24h"),
        ("--max-in-flight", "many", "whole number"),
        ("--max-in-flight", "0", "from 1"),
        ("--max-connections", "-1", "whole number"),
        ("--max-connection-age", "soon", "duration"),
        ("--drain-delay", "-1s", "duration"),
        ("--drain-timeout", "1 parsec", "duration"),
        ("--final-scrape-timeout", "x", "duration"),
        ("--final-scrapes", "0", "from 1"),
        ("--read-timeout", "0ms", "at least 1ms"),
        ("--worker-threads", "0", "from 1"),
        ("--log-format", "xml", "text or json"),
        ("--migrations", "maybe", "apply or check"),
        ("--tls-cert", "cert.pem", "--tls-key"),
        ("--tls-key", "key.pem", "--tls-cert"),
        ("--tls-client-ca", "ca.pem", "--tls-cert"),
        ("--tls-client-crl", "crl.pem", "--tls-client-ca"),
    ] {
        let line = refusal(&[&format!("{flag}={value}")], &[], 2).await;
        assert!(line.contains(flag), "{line}");
        assert!(line.contains(&format!("{value:?}")), "{line}");
        assert!(line.contains(expected), "{line}");
    }
}

#[tokio::test]
async fn help_that_cannot_be_written_is_a_failure_and_no_panic() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut command = server_command(&["--help"]);
    // tokio's `output` would set the standard output anew.
    let child = command.stdout(full).stderr(Stdio::piped()).spawn().unwrap();
    let output = child.wait_with_output().await.unwrap();
    assert_eq!((output.status.code(), output.stderr), (Some(1), Vec::new()));
}

#[tokio::test]
async fn the_environment_is_refused_alike() {
    for (name, flag) in [
        ("ORDER_LISTEN", "--listen"),
        ("ORDER_ADMIN_LISTEN", "--admin-listen"),
        ("DATABASE_URL", "--database-url"),
        ("ORDER_PROCESSING_DELAY", "--processing-delay"),
        ("ORDER_REQUEST_TIMEOUT", "--request-timeout"),
        ("ORDER_MAX_IN_FLIGHT", "--max-in-flight"),
        ("ORDER_MAX_CONNECTIONS", "--max-connections"),
        ("ORDER_MAX_CONNECTION_AGE", "--max-connection-age"),
        ("ORDER_DRAIN_DELAY", "--drain-delay"),
        ("ORDER_DRAIN_TIMEOUT", "--drain-timeout"),
        ("ORDER_FINAL_SCRAPE_TIMEOUT", "--final-scrape-timeout"),
        ("ORDER_FINAL_SCRAPES", "--final-scrapes"),
        ("ORDER_LOG_FORMAT", "--log-format"),
        ("ORDER_MIGRATIONS", "--migrations"),
        ("ORDER_DATABASE_POOL", "--database-pool"),
        ("ORDER_READ_TIMEOUT", "--read-timeout"),
        ("ORDER_WORKER_THREADS", "--worker-threads"),
        ("ORDER_TLS_CERT", "--tls-cert"),
        ("ORDER_TLS_KEY", "--tls-key"),
        ("ORDER_TLS_CLIENT_CA", "--tls-client-ca"),
        ("ORDER_TLS_CLIENT_CRL", "--tls-client-crl"),
    ] {
        let line = refusal(&[], &[(name, "b@d")], 2).await;
        assert!(line.contains(flag), "{name}: {line}");
    }
    for filter in ["order_service=loud", "inof", "info,order_service"] {
        let line = refusal(&[], &[("RUST_LOG", filter)], 2).await;
        assert!(line.contains("RUST_LOG") && line.contains(&format!("{filter:?}")), "{line}");
    }
}

#[tokio::test]
async fn an_unknown_flag_or_a_missing_value_is_refused() {
    let line = refusal(&["--max-inflight", "3"], &[], 2).await;
    assert!(line.contains("--max-inflight"), "{line}");
    let line = refusal(&["serve"], &[], 2).await;
    assert!(line.contains("serve") && line.contains("migrate"), "{line}");
    let line = refusal(&["migrate", "--listen", "127.0.0.1:0"], &[], 2).await;
    assert!(line.contains("--listen"), "{line}");
    let line = refusal(&["migrate", "now"], &[], 2).await;
    assert!(line.contains("now"), "{line}");
    let line = refusal(&["--listen"], &[], 2).await;
    assert!(line.contains("--listen"), "{line}");
    let line = refusal(&["--max-in-flight", "3", "--max-in-flight", "4"], &[], 2).await;
    assert!(line.contains("--max-in-flight"), "{line}");
}

#[tokio::test]
async fn a_password_is_never_shown() {
    for url in [
        "mysql://user:s3cret@localhost/orders",
        "postgre://user:s3cret@localhost/orders?x=1",
        "user:s3cret@localhost/orders",
        "x://localhost/?password=s3cret",
        "sqlite://user:s3cret@host/x?password=s3cret",
        "postgres://user:s3cret@host:port/orders",
        "postgres://user:s3cret",
        "postgres://user:s3cret@ho st/orders",
        "postgresql://user:s3cret@host/orders?sslmode=s3cret",
        "host=localhost password=s3cret",
        "postgres//user:s3cret",
    ] {
        let line = refusal(&["--database-url", url], &[], 2).await;
        assert!(line.contains("--database-url") && !line.contains("s3cret"), "{line}");
    }
    // Nor where the URL stands in the wrong place.
    let url = "postgres://user:s3cret@host/orders";
    for args in [
        &["migrate", url][..],
        &[url],
        &["--migrations", url],
        &["--listen", url],
        &["--tls-cert", url, "now"],
        &["migrate", "--database-url", url, url],
    ] {
        let line = refusal(args, &[], 2).await;
        assert!(!line.contains("s3cret"), "{line}");
    }
}

#[tokio::test]
async fn help_documents_every_flag_with_its_variable_and_default() {
    let output = run(&["--help"], &[]).await;
    assert_eq!(output.status.code(), Some(0));
    let help = String::from_utf8(output.stdout).unwrap();
    for text in [
        "--listen",
        "ORDER_LISTEN",
        "127.0.0.1:8181",
        "--admin-listen",
        "127.0.0.1:9464",
        "sqlite://orders.db",
        "DATABASE_URL",
        "--processing-delay",
        "--request-timeout",
        "10s",
        "--max-in-flight",
        "1024",
        "--max-connections",
        "10000",
        "--max-connection-age",
        "2m",
        "--drain-delay",
        "--drain-timeout",
        "20s",
        "--final-scrape-timeout",
        "--final-scrapes",
        "--tls-cert",
        "--tls-key",
        "--tls-client-ca",
        "--tls-client-crl",
        "ORDER_TLS_CLIENT_CRL",
        "--log-format",
        "--migrations",
        "ORDER_MIGRATIONS",
        "migrate",
        "--database-pool",
        "--read-timeout",
        "--worker-threads",
    ] {
        assert!(help.contains(text), "{text} in\n{help}");
    }
}

#[tokio::test]
async fn a_taken_port_ends_the_start_with_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let first = Process::start("sqlite::memory:", &[]).await;
    for flag in ["--listen", "--admin-listen"] {
        let other = if flag == "--listen" { "--admin-listen" } else { "--listen" };
        let taken = first.api.to_string();
        let args = [flag, &taken, other, "127.0.0.1:0", "--database-url", &database_in(dir.path())];
        let line = refusal(&args, &[], 1).await;
        assert!(line.contains(flag) && line.contains(&taken), "{line}");
    }
}

#[tokio::test]
async fn an_unusable_database_ends_the_start_with_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text.db");
    std::fs::write(&text, "this is no database, but it is long enough to be looked at.".repeat(99))
        .unwrap();
    let missing = dir.path().join("missing/orders.db");
    for path in [&text, &missing] {
        let url = format!("sqlite://{}", path.display());
        let ports = ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
        let line = refusal(&[&ports[..], &["--database-url", &url]].concat(), &[], 1).await;
        assert!(line.contains(path.to_str().unwrap()), "{line}");
    }
}

#[tokio::test]
async fn one_line_tells_that_it_serves() {
    let server = Process::start("sqlite::memory:", &[]).await;
    let log = server.log();
    assert_eq!(log.len(), 1, "{log:?}");
    assert_eq!(log[0]["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(log[0]["database"], "sqlite");
}
