//! The settings of the server: every flag and environment variable, parsed and checked before any
//! socket opens.
//!
//! Depends on [`crate::usage`] alone.

use std::{ffi::OsString, net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Parser, Subcommand, ValueEnum};

use crate::usage::{self, NoArguments, pem_file};

mod database_url;
mod postgres_url;

use self::database_url::without_password;
pub use self::{
    database_url::DatabaseUrl,
    postgres_url::{PostgresServer, PostgresUrl, TargetSession},
};

/// Takes orders over gRPC and REST, stores each durably before acknowledging it, and exposes
/// Prometheus metrics on a port of its own.
///
/// Log lines go to stderr; RUST_LOG sets their level (default: info). Durations are written 250ms,
/// 30s, 5m.
#[derive(Debug, Clone, Parser)]
#[allow(clippy::doc_markdown, reason = "clap shows these comments as they stand")]
#[command(
    name = "order-service",
    version = env!("CARGO_PKG_VERSION"),
    max_term_width = 100,
    disable_help_subcommand = true
)]
pub struct Settings {
    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// Address of the API listener: gRPC and REST, HTTP/1.1 and HTTP/2, on one port
    #[arg(long, env = "ORDER_LISTEN", value_name = "IP:PORT", default_value = "127.0.0.1:8181", value_parser = address)]
    pub listen: SocketAddr,

    /// Address of the admin listener: /metrics, /livez, /readyz
    #[arg(long, env = "ORDER_ADMIN_LISTEN", value_name = "IP:PORT", default_value = "127.0.0.1:9464", value_parser = address)]
    pub admin_listen: SocketAddr,

    /// Where orders are kept: sqlite://PATH (a file of this process alone), sqlite::memory: (lost
    /// at the end) or postgres://USER:PASSWORD@HOST/DATABASE (shared by many replicas; libpq's
    /// forms, also of several hosts)
    #[arg(
        long,
        env = "DATABASE_URL",
        value_name = "URL",
        default_value = "sqlite://orders.db",
        hide_env_values = true,
        global = true
    )]
    pub database_url: DatabaseUrl,

    /// What the start does with tables that are older than this program: apply brings them up to
    /// date, check refuses them. Tables that are newer by additive migrations alone are accepted
    #[arg(long, env = "ORDER_MIGRATIONS", value_name = "MODE", default_value = "apply")]
    pub migrations: Migrations,

    /// PostgreSQL connections of this process; times the replicas, they must fit into the server's
    /// max_connections
    #[arg(long, env = "ORDER_DATABASE_POOL", value_name = "COUNT", default_value = "4", value_parser = count::<1000>)]
    pub database_pool: usize,

    /// Simulated work per order, holding no lock
    #[arg(long, env = "ORDER_PROCESSING_DELAY", value_name = "DURATION", default_value = "0ms", value_parser = duration)]
    pub processing_delay: Duration,

    /// Time limit of a request; a shorter grpc-timeout of the client wins
    #[arg(long, env = "ORDER_REQUEST_TIMEOUT", value_name = "DURATION", default_value = "10s", value_parser = positive_duration)]
    pub request_timeout: Duration,

    /// Requests in flight over both protocols; beyond it requests are shed at once
    #[arg(long, env = "ORDER_MAX_IN_FLIGHT", value_name = "COUNT", default_value = "1024", value_parser = count::<1_000_000>)]
    pub max_in_flight: usize,

    /// API connections; beyond it a new one is closed at once. Cut to what the limit of open files
    /// leaves
    #[arg(long, env = "ORDER_MAX_CONNECTIONS", value_name = "COUNT", default_value = "10000", value_parser = count::<1_000_000>)]
    pub max_connections: usize,

    /// A connection with nothing in flight for that long is asked to go, and closed 30 s later; 0s:
    /// never
    #[arg(long, env = "ORDER_IDLE_TIMEOUT", value_name = "DURATION", default_value = "2m", value_parser = duration)]
    pub idle_timeout: Duration,

    /// After it, 10 % more or less at random, a connection is asked to go (GOAWAY, connection:
    /// close), so that clients find new replicas; 0s: never
    #[arg(long, env = "ORDER_MAX_CONNECTION_AGE", value_name = "DURATION", default_value = "2m", value_parser = duration)]
    pub max_connection_age: Duration,

    /// Time limit of a connection's first bytes, of HTTP/1 headers and of the TLS handshake
    #[arg(long, env = "ORDER_READ_TIMEOUT", value_name = "DURATION", default_value = "10s", value_parser = positive_duration)]
    pub read_timeout: Duration,

    /// After SIGTERM: how long to go on serving while readiness is already false
    #[arg(long, env = "ORDER_DRAIN_DELAY", value_name = "DURATION", default_value = "0s", value_parser = duration)]
    pub drain_delay: Duration,

    /// Then: hard time limit for requests in flight
    #[arg(long, env = "ORDER_DRAIN_TIMEOUT", value_name = "DURATION", default_value = "20s", value_parser = duration)]
    pub drain_timeout: Duration,

    /// Then: at most how long to keep /metrics up for the final scrapes; must exceed the scrape
    /// interval
    #[arg(long, env = "ORDER_FINAL_SCRAPE_TIMEOUT", value_name = "DURATION", default_value = "0s", value_parser = duration)]
    pub final_scrape_timeout: Duration,

    /// Scrapes to wait for after the last order is stored: one for each Prometheus server
    #[arg(long, env = "ORDER_FINAL_SCRAPES", value_name = "COUNT", default_value = "1", value_parser = count::<100>)]
    pub final_scrapes: usize,

    /// Certificate chain of the API listener, PEM; needs --tls-key. Re-read when it changes
    #[arg(long, env = "ORDER_TLS_CERT", value_name = "FILE", value_parser = pem_file)]
    pub tls_cert: Option<PathBuf>,

    /// Private key of the certificate, PEM; needs --tls-cert. Re-read when it changes
    #[arg(long, env = "ORDER_TLS_KEY", value_name = "FILE", value_parser = pem_file)]
    pub tls_key: Option<PathBuf>,

    /// CA of the clients, PEM: with it, clients must show a certificate that it signed (mTLS), and
    /// no TLS session is resumed. Re-read when it changes
    #[arg(long, env = "ORDER_TLS_CLIENT_CA", value_name = "FILE", value_parser = pem_file)]
    pub tls_client_ca: Option<PathBuf>,

    /// Revoked certificates of clients, PEM: one or more CRLs; needs --tls-client-ca. Every CA in a
    /// client's chain must have its CRL here, or the client is refused. Re-read when it changes; a
    /// CRL past its nextUpdate stays in force
    #[arg(long, env = "ORDER_TLS_CLIENT_CRL", value_name = "FILE", value_parser = pem_file)]
    pub tls_client_crl: Option<PathBuf>,

    /// Form of the log lines on stderr
    #[arg(
        long,
        env = "ORDER_LOG_FORMAT",
        value_name = "FORMAT",
        default_value = "text",
        global = true
    )]
    pub log_format: LogFormat,

    /// Threads that serve connections, each connection on one [default: one per available core]
    #[arg(long, env = "ORDER_WORKER_THREADS", value_name = "COUNT", value_parser = count::<1024>)]
    pub worker_threads: Option<usize>,
}

/// What the program does instead of serving.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Brings the tables of the database up to date, then exits: 0 once they are, 1 if they cannot
    /// be. Needs a role that may create and alter tables; serving needs SELECT and INSERT
    Migrate,
}

/// What the start does with tables that are older than the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Migrations {
    /// Brings them up to date.
    Apply,
    /// Refuses them.
    Check,
}

/// Form of the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One line of text.
    Text,
    /// One JSON object a line.
    Json,
}

impl Settings {
    /// Reads the arguments (the first is the program's name) and, for flags not given, the
    /// environment.
    ///
    /// # Errors
    /// See [`NoArguments`].
    pub fn read(args: impl IntoIterator<Item = OsString>) -> Result<Self, NoArguments> {
        let settings: Self = usage::read(args, |flag, value| match flag {
            "--database-url" => without_password(value),
            _ => usage::without_secrets(value),
        })?;
        if settings.command == Some(Command::Migrate) {
            settings.check_migrate()?;
        } else {
            settings.check_tls()?;
        }
        Ok(settings)
    }

    fn check_migrate(&self) -> Result<(), NoArguments> {
        if !matches!(self.database_url, DatabaseUrl::SqliteMemory) {
            return Ok(());
        }
        let line = format!(
            "--database-url {:?}: expected a database that outlasts migrate, sqlite://PATH or \
             postgres://USER:PASSWORD@HOST/DATABASE",
            self.database_url.to_string()
        );
        Err(NoArguments::BadUsage(line))
    }

    fn check_tls(&self) -> Result<(), NoArguments> {
        let bad = |given, file, missing| Err(NoArguments::without(given, file, missing));
        match (&self.tls_cert, &self.tls_key, &self.tls_client_ca, &self.tls_client_crl) {
            (Some(cert), None, ..) => bad("--tls-cert", cert, "--tls-key"),
            (None, Some(key), ..) => bad("--tls-key", key, "--tls-cert"),
            (None, None, Some(ca), _) => bad("--tls-client-ca", ca, "--tls-cert and --tls-key"),
            (_, _, None, Some(crl)) => bad("--tls-client-crl", crl, "--tls-client-ca"),
            _ => Ok(()),
        }
    }
}

fn address(text: &str) -> Result<SocketAddr, &'static str> {
    text.parse().map_err(|_| "an IP address and a port such as 127.0.0.1:8181")
}

/// Up to a day: longer is a mistake, and no sum of instants overflows.
fn duration(text: &str) -> Result<Duration, &'static str> {
    match humantime::parse_duration(text) {
        Ok(duration) if duration <= Duration::from_secs(86_400) => Ok(duration),
        _ => Err("a duration such as 250ms, 30s or 5m, at most 24h"),
    }
}

fn positive_duration(text: &str) -> Result<Duration, &'static str> {
    match duration(text) {
        Ok(duration) if duration >= Duration::from_millis(1) => Ok(duration),
        _ => Err("a duration such as 250ms, 30s or 5m, at least 1ms and at most 24h"),
    }
}

fn count<const MOST: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if (1..=MOST).contains(&number) => Ok(number),
        _ => Err(format!("a whole number from 1 to {MOST}")),
    }
}
