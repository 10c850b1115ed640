//! The servers of a URL: a login goes through them until one is as asked, and begins with the one
//! that was so last.

use std::{
    fmt,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use sqlx::{
    ConnectOptions as _, Row as _,
    postgres::{PgConnectOptions, PgConnection},
};
use tokio::time::timeout;

use crate::config::{PostgresServer, PostgresUrl, TargetSession};

/// How long a server is waited for before the next one is tried beside it: a server that is gone
/// may not even refuse. Short, so that the third of three answers within the second that a caller
/// waits for a connection.
const STAGGER: Duration = Duration::from_millis(300);

/// SQLSTATE `invalid_parameter_value`.
pub(super) const INVALID_VALUE: &str = "22023";

/// See the module.
#[derive(Debug)]
pub(super) struct Servers {
    list: Vec<PostgresServer>,
    session: TargetSession,
    /// Where the next login begins.
    first: AtomicUsize,
}

/// The place of a server in the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place(usize);

/// Why no server is as asked.
#[derive(Debug)]
pub(super) struct NoServer {
    /// Each server and its reason, at least one.
    reasons: Vec<(PostgresServer, Refusal)>,
}

/// Why one server is not used.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The connection or the login failed.
    Failed(sqlx::Error),
    /// It is none that `target_session_attrs` asks for.
    NotAsAsked(&'static str),
}

impl Servers {
    pub(super) fn new(url: &PostgresUrl) -> Self {
        let list = url.servers().to_vec();
        let servers = Self { list, session: url.target_session(), first: AtomicUsize::new(0) };
        servers.map(|options| {
            let named = options.get_application_name().is_some();
            let options = if named { options } else { options.application_name("order-service") };
            // Durations are in the metrics, failures in our own lines.
            options.disable_statement_logging()
        })
    }

    /// The same servers, each with other options.
    pub(super) fn map(self, change: impl Fn(PgConnectOptions) -> PgConnectOptions) -> Self {
        let list = self.list.into_iter().map(|PostgresServer { name, options }| PostgresServer {
            name,
            options: change(options),
        });
        Self { list: list.collect(), ..self }
    }

    /// Logs in to the first server that is as asked. The caller sets the time limit.
    pub(super) async fn connect(&self) -> Result<(PgConnection, Place), NoServer> {
        let first = self.first.load(Ordering::Relaxed);
        let mut next = (0..self.list.len()).map(|step| (first + step) % self.list.len());
        let mut logins = FuturesUnordered::new();
        let mut reasons = Vec::new();
        loop {
            if let Some(index) = next.next() {
                logins.push(self.log_in(index));
            }
            match timeout(STAGGER, logins.next()).await {
                Ok(Some((index, Ok(connection)))) => {
                    self.first.store(index, Ordering::Relaxed);
                    return Ok((connection, Place(index)));
                }
                Ok(Some((index, Err(refusal)))) => {
                    reasons.push((self.list[index].clone(), refusal));
                }
                Ok(None) => return Err(NoServer { reasons }),
                Err(_) => {}
            }
        }
    }

    /// Begins the next logins with another server than this one, which does not take writes.
    pub(super) fn leave(&self, Place(index): Place) {
        let next = (index + 1) % self.list.len();
        // Only once for however many connections to it there are.
        let _ = self.first.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    async fn log_in(&self, index: usize) -> (usize, Result<PgConnection, Refusal>) {
        let login = async {
            let mut connection = self.list[index].options.connect().await?;
            let (query, refusal) = match self.session {
                TargetSession::Any => return Ok(connection),
                TargetSession::ReadWrite => (
                    "SELECT current_setting('transaction_read_only') = 'on'",
                    "it takes no writes (target_session_attrs=read-write)",
                ),
                TargetSession::Primary => (
                    "SELECT pg_is_in_recovery()",
                    "it is a standby (target_session_attrs=primary)",
                ),
            };
            let row = sqlx::query(query).fetch_one(&mut connection).await?;
            if row.try_get(0)? { Err(Refusal::NotAsAsked(refusal)) } else { Ok(connection) }
        };
        (index, login.await)
    }
}

impl From<sqlx::Error> for Refusal {
    fn from(error: sqlx::Error) -> Self {
        Self::Failed(error)
    }
}

impl NoServer {
    /// Each with the options of its server.
    pub(super) fn refusals(&self) -> impl Iterator<Item = (&PgConnectOptions, &Refusal)> {
        self.reasons.iter().map(|(server, refusal)| (&server.options, refusal))
    }
}

impl fmt::Display for NoServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [(_, only)] = &self.reasons[..] {
            return only.fmt(f);
        }
        for (index, (server, refusal)) in self.reasons.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{}: {refusal}", server.name)?;
        }
        Ok(())
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(sqlx::Error::Database(error)) => {
                let message = error.message();
                // The server quotes the value of an `options` that it refuses.
                match message.split_once("\": ") {
                    Some((name, _)) if error.code().as_deref() == Some(INVALID_VALUE) => {
                        write!(f, "{name}\" (options)")
                    }
                    _ => f.write_str(message),
                }
            }
            Self::Failed(error) => error.fmt(f),
            Self::NotAsAsked(why) => f.write_str(why),
        }
    }
}
