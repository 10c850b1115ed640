//! The servers of a URL. A login tries them in turn until one matches `target_session_attrs`, and
//! begins with the server that matched last.

use std::{
    fmt, io, iter,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use sqlx::{
    ConnectOptions as _, Row as _,
    error::DatabaseError,
    postgres::{PgConnectOptions, PgConnection, PgSslMode},
};
use tokio::time::timeout;
use tokio_rustls::rustls;

use crate::config::{PostgresServer, PostgresUrl, TargetSession};

/// Delay before the next server is tried in parallel, because a host that is down does not refuse a
/// connection. Short enough for the third of three servers to answer within the second that a caller
/// waits for a connection.
const STAGGER: Duration = Duration::from_millis(300);

/// SQLSTATE `invalid_parameter_value`.
const INVALID_VALUE: &str = "22023";

/// The list, and where it begins.
#[derive(Debug)]
pub(super) struct Servers {
    list: Vec<PostgresServer>,
    session: TargetSession,
    /// Index of the server that the next login tries first.
    first: AtomicUsize,
}

/// Index of a server in the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place(usize);

/// Why no server can be used: the name and the reason of each, at least one.
#[derive(Debug)]
pub(super) struct NoServer(Vec<(String, Refusal)>);

/// Why one server is not used.
#[derive(Debug)]
struct Refusal {
    /// Without a password or the value of a parameter.
    why: String,
    /// Whether waiting cannot help.
    is_final: bool,
}

impl Servers {
    pub(super) fn new(url: &PostgresUrl) -> Self {
        let list = url.servers().to_vec();
        let servers = Self { list, session: url.target_session(), first: AtomicUsize::new(0) };
        servers.map(|options| {
            let named = options.get_application_name().is_some();
            let options = if named { options } else { options.application_name("order-service") };
            // No column is a float, and PgBouncer refuses what it does not know.
            let options = options.extra_float_digits(None);
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

    /// Logs in to the first server that matches. The caller sets the time limit.
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
                    reasons.push((self.list[index].name.clone(), refusal));
                }
                Ok(None) => return Err(NoServer(reasons)),
                Err(_) => {}
            }
        }
    }

    /// Makes the next login begin behind this server, which takes no writes.
    pub(super) fn leave(&self, Place(index): Place) {
        let next = (index + 1) % self.list.len();
        // Several connections to one server must not skip the next server as well.
        let _ = self.first.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    async fn log_in(&self, index: usize) -> (usize, Result<PgConnection, Refusal>) {
        let options = &self.list[index].options;
        let login = async {
            let mut connection = options.connect().await?;
            let query = match self.session {
                TargetSession::Any => return Ok((connection, None)),
                TargetSession::ReadWrite => {
                    "SELECT current_setting('transaction_read_only') = 'on'"
                }
                TargetSession::Primary => "SELECT pg_is_in_recovery()",
            };
            let row = sqlx::query(query).fetch_one(&mut connection).await?;
            let why = match self.session {
                _ if !row.try_get(0)? => None,
                TargetSession::Primary => Some("it is a standby (target_session_attrs=primary)"),
                _ => Some("it takes no writes (target_session_attrs=read-write)"),
            };
            Ok((connection, why))
        };
        let result = match login.await {
            Ok((connection, None)) => Ok(connection),
            // A standby may be promoted.
            Ok((_, Some(why))) => Err(Refusal { why: why.to_owned(), is_final: false }),
            Err(error) => Err(Refusal::of(&error, options)),
        };
        (index, result)
    }
}

impl NoServer {
    /// Whether waiting cannot help with any of the servers.
    pub(super) fn is_final(&self) -> bool {
        self.0.iter().all(|(_, refusal)| refusal.is_final)
    }
}

impl fmt::Display for NoServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [(_, only)] = &self.0[..] {
            return f.write_str(&only.why);
        }
        for (index, (name, refusal)) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{name}: {}", refusal.why)?;
        }
        Ok(())
    }
}

impl Refusal {
    fn of(error: &sqlx::Error, options: &PgConnectOptions) -> Self {
        use sqlx::Error as E;
        let (why, is_final) = match error {
            E::Database(refusal) if refuses_options(refusal.as_ref()) => (
                format!(
                    "a pooler refuses the time limits of its sessions ({}): have it ignore the \
                     start-up parameter (PgBouncer: ignore_startup_parameters = options) and set \
                     statement_timeout = '2s' and lock_timeout = '1500ms' for the role instead",
                    refusal.message()
                ),
                true,
            ),
            E::Database(refusal) => {
                let code = refusal.code().unwrap_or_default();
                // Wrong password (28), no such database (3D), no privilege or setting (42).
                let is_final = code == INVALID_VALUE
                    || ["28", "3D", "42"].iter().any(|class| code.starts_with(class));
                (without_values(refusal.message(), options), is_final)
            }
            E::Io(error) if certificate_is_refused(error) => {
                (format!("its certificate: {error}"), true)
            }
            E::Io(error) if file_is_missing(error, options) => {
                (format!("a file of its TLS settings: {error}"), true)
            }
            E::Io(error) => (error.to_string(), false),
            E::Configuration(_) | E::Tls(_) => (error.to_string(), true),
            _ => (error.to_string(), false),
        };
        Self { why, is_final }
    }
}

/// The server's message without the values of the parameter `options`, which it quotes where it
/// refuses them.
fn without_values(message: &str, options: &PgConnectOptions) -> String {
    let words = options.get_options().unwrap_or_default().split_whitespace();
    let values = words.map(|word| word.split_once('=').map_or(word, |(_, value)| value));
    // Of a list the server may quote one element.
    let values = values.flat_map(|value| iter::once(value).chain(value.split(',')));
    // The flag `-c` is no value.
    let values = values.filter(|value| value.len() > 1 && *value != "-c");
    values.fold(message.to_owned(), |shown, value| shown.replace(value, "***"))
}

/// PgBouncer's answer (protocol_violation) to a start-up parameter that it does not know, `options`
/// or what is in it.
fn refuses_options(refusal: &dyn DatabaseError) -> bool {
    refusal.code().as_deref() == Some("08P01") && refusal.message().contains("startup parameter")
}

/// rustls's verdicts come wrapped as I/O errors.
fn certificate_is_refused(error: &io::Error) -> bool {
    error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
        .is_some_and(|error| matches!(error, rustls::Error::InvalidCertificate(_)))
}

/// `sslrootcert`, `sslcert` or `sslkey`: a Unix socket that is missing is a server that is not up.
fn file_is_missing(error: &io::Error, options: &PgConnectOptions) -> bool {
    use io::ErrorKind as K;
    let over_tcp = options.get_socket().is_none();
    let tls = !matches!(options.get_ssl_mode(), PgSslMode::Disable | PgSslMode::Allow);
    over_tcp && tls && matches!(error.kind(), K::NotFound | K::PermissionDenied)
}
