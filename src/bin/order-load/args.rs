//! The flags of `order-load`, parsed and checked before any connection is opened.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{Parser, ValueEnum};
use order_service::{
    order::ProductId,
    usage::{self, NoArguments, pem_file, single_line},
};

use crate::schedule::Phases;

/// Places orders at fixed times, whatever the server does, and reports what came of them.
///
/// Each order's latency counts from the moment at which it was to be sent. Every order carries an
/// idempotency key; a call whose connection was lost is sent again with it, and reported as retried.
///
/// Exit code 0: all well; 1: more failures than --max-failures, or the audit failed; 2: bad usage.
#[derive(Debug, Clone, Parser)]
#[command(name = "order-load", version = env!("CARGO_PKG_VERSION"), max_term_width = 100)]
pub struct Args {
    /// What to send: DURATION@RATE, RATE in orders per second, several parted by commas
    #[arg(long, value_name = "PHASES", default_value = "30s@5,60s@0,30s@2")]
    pub phases: Phases,

    /// The service: http://HOST:PORT, or https:// for TLS. Every address of the name gets its share
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8181", value_parser = url)]
    pub target: String,

    /// What to speak: grpc (over HTTP/2) or http (POST /product over HTTP/1.1)
    #[arg(long, value_name = "PROTOCOL", default_value = "grpc")]
    pub protocol: Protocol,

    /// Connections, at least one for each address of the target. One carries up to 256 gRPC calls at
    /// a time, or one HTTP request [default: 10 over gRPC, 100 over HTTP]
    #[arg(long, value_name = "COUNT", value_parser = connections)]
    pub connections: Option<usize>,

    /// Time limit of a call, and of an order's wait for its turn
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = timeout)]
    pub timeout: Duration,

    /// Product to order; with --audit it is the beginning of each order's own product
    #[arg(long, value_name = "PRODUCT", default_value = "book", value_parser = product)]
    pub product: ProductId,

    /// CA that signed the server's certificate, PEM [default: those this machine trusts]
    #[arg(long, value_name = "FILE", value_parser = pem_file)]
    pub tls_ca: Option<PathBuf>,

    /// Certificate chain to show to the server (mTLS), PEM; needs --tls-key
    #[arg(long, value_name = "FILE", value_parser = pem_file)]
    pub tls_cert: Option<PathBuf>,

    /// Private key of that certificate, PEM; needs --tls-cert
    #[arg(long, value_name = "FILE", value_parser = pem_file)]
    pub tls_key: Option<PathBuf>,

    /// Print one JSON document to stdout, and everything else to stderr
    #[arg(long)]
    pub json: bool,

    /// Fixes the moments of the orders, and with --audit their quantities [default: a random one]
    #[arg(long, value_name = "NUMBER", value_parser = number)]
    pub seed: Option<u64>,

    /// Orders that may fail, or go unsent, before the exit code is 1
    #[arg(long, value_name = "COUNT", default_value = "0", value_parser = number)]
    pub max_failures: u64,

    /// Retry what fails, and at the end read every order back: none lost, doubled or altered
    #[arg(long)]
    pub audit: bool,

    /// With --audit: how long to go on asking a service that is away
    #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = timeout)]
    pub patience: Duration,
}

/// What is spoken to the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    Grpc,
    Http,
}

/// The longest `--product` under `--audit`: `.RUN.N` is put behind it (see [`crate::sender`]).
pub const MAX_AUDITED_PRODUCT: usize = 40;

impl Args {
    /// Reads the arguments; the first is the program's name.
    ///
    /// # Errors
    /// See [`NoArguments`].
    pub fn read(args: impl IntoIterator<Item = OsString>) -> Result<Self, NoArguments> {
        let args: Self = usage::read(args, |flag, value| match flag {
            "--target" => without_userinfo(value),
            _ => usage::without_secrets(value),
        })?;
        let product = args.product.as_str();
        if args.audit && product.len() > MAX_AUDITED_PRODUCT {
            return Err(NoArguments::BadUsage(format!(
                "--product {product:?}: expected at most {MAX_AUDITED_PRODUCT} characters with --audit"
            )));
        }
        let bad = |given, file, missing| Err(NoArguments::without(given, file, missing));
        match (&args.tls_cert, &args.tls_key) {
            (Some(cert), None) => bad("--tls-cert", cert, "--tls-key"),
            (None, Some(key)) => bad("--tls-key", key, "--tls-cert"),
            _ => Ok(args),
        }
    }

    /// How many connections to hold.
    pub fn connections(&self) -> usize {
        self.connections.unwrap_or(match self.protocol {
            Protocol::Grpc => 10,
            Protocol::Http => 100,
        })
    }
}

fn url(text: &str) -> Result<String, &'static str> {
    single_line(text).map(str::to_owned)
}

fn connections(text: &str) -> Result<usize, &'static str> {
    match text.parse() {
        Ok(number @ 1..=10_000) => Ok(number),
        _ => Err("a whole number from 1 to 10000"),
    }
}

fn number(text: &str) -> Result<u64, &'static str> {
    text.parse().map_err(|_| "a whole number from 0 to 18446744073709551615")
}

fn timeout(text: &str) -> Result<Duration, &'static str> {
    match humantime::parse_duration(text) {
        Ok(time) if (Duration::from_millis(1)..=Duration::from_secs(3600)).contains(&time) => {
            Ok(time)
        }
        _ => Err("a duration such as 250ms, 30s or 5m, at least 1ms and at most 1h"),
    }
}

fn product(text: &str) -> Result<ProductId, &'static str> {
    text.parse().map_err(|order_service::order::Expected(expected)| expected)
}

/// A URL that was not understood may hold a password anywhere before its last `@`.
pub fn without_userinfo(url: &str) -> String {
    match url.rsplit_once('@') {
        Some((_, rest)) => format!("***@{rest}"),
        None => url.to_owned(),
    }
}
