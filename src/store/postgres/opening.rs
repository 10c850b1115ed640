//! The first connection to the server: waits for one that is not up yet, refuses what no waiting
//! mends, and brings the tables up to date.

use std::{io, time::Duration};

use rand::RngExt as _;
use sqlx::{
    Connection as _,
    migrate::MigrateError,
    postgres::{PgConnectOptions, PgSslMode},
};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_rustls::rustls;

use super::servers::{INVALID_VALUE, NoServer, Refusal, Servers};
use crate::store::{StoreHealth, migrate};

/// How long a server that is not up yet is waited for.
const OPENING: Duration = Duration::from_secs(30);

/// How long one try waits for the server to accept a connection.
const CONNECTING: Duration = Duration::from_secs(5);

/// How long the tables may take; the last try may use it all.
const MIGRATING: Duration = Duration::from_secs(10);

/// Returns once the server has answered and its tables are this program's. `servers` have the
/// options of the connection that makes the tables; `health` learns why it takes so long.
///
/// # Errors
/// One line, without a password.
pub(super) async fn wait_until_ready(
    servers: &Servers,
    health: &StoreHealth,
) -> Result<(), String> {
    let until = Instant::now() + OPENING;
    loop {
        let why = match prepare(servers, until).await {
            Ok(()) => return Ok(()),
            Err(NotReady::Never(why)) => return Err(why),
            Err(NotReady::NotYet(why)) => why,
        };
        // Random, so that replicas that got into each other's way do so but once.
        let pause = Duration::from_millis(rand::rng().random_range(200..600));
        if Instant::now() + pause >= until {
            let seconds = OPENING.as_secs();
            return Err(format!("it was not ready within {seconds} s: {why}"));
        }
        health.not_open_yet(why);
        sleep(pause).await;
    }
}

async fn prepare(servers: &Servers, until: Instant) -> Result<(), NotReady> {
    let connected = until.min(Instant::now() + CONNECTING);
    let (mut connection, place) = match timeout_at(connected, servers.connect()).await {
        Ok(Ok(connected)) => connected,
        Ok(Err(none)) => return Err(NotReady::of_connecting(&none)),
        Err(_) => return Err(NotReady::NotYet("it does not answer".to_owned())),
    };
    let migrator = migrate::postgres();
    // `Migrator::run` on a connection makes a future that is not `Send`; sqlx has this for it.
    let migrating = migrator.run_direct(None, &mut connection, false);
    match timeout_at(Instant::now() + MIGRATING, migrating).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            if is_read_only(&error) {
                servers.leave(place);
            }
            return Err(NotReady::of_migrating(&error));
        }
        Err(_) => return Err(NotReady::NotYet("its tables were not made in time".to_owned())),
    }
    let _ = timeout_at(Instant::now() + CONNECTING, connection.close()).await;
    Ok(())
}

enum NotReady {
    /// It may become ready.
    NotYet(String),
    /// It never will by itself.
    Never(String),
}

impl NotReady {
    /// Waiting helps as long as it may help one of the servers.
    fn of_connecting(none: &NoServer) -> Self {
        let never = none.refusals().all(|(options, refusal)| is_final(options, refusal));
        let why = none.to_string();
        if never { Self::Never(why) } else { Self::NotYet(why) }
    }

    fn of_migrating(error: &MigrateError) -> Self {
        match error {
            MigrateError::VersionMissing(version) => Self::Never(format!(
                "its tables were made by a newer version of this program (migration {version})"
            )),
            MigrateError::VersionMismatch(version) => {
                Self::Never(format!("its migration {version} is not this program's"))
            }
            MigrateError::Execute(sqlx::Error::Database(refusal))
            | MigrateError::ExecuteMigration(sqlx::Error::Database(refusal), _)
                // insufficient_privilege
                if refusal.code().as_deref() == Some("42501") =>
            {
                Self::Never(format!("its tables: {}", refusal.message()))
            }
            // Replicas that start together get into each other's way once.
            other => Self::NotYet(format!("its tables: {other}")),
        }
    }
}

/// Whether no waiting mends it.
fn is_final(options: &PgConnectOptions, refusal: &Refusal) -> bool {
    match refusal {
        // Wrong password (28), no such database (3D), no privilege (42).
        Refusal::Failed(sqlx::Error::Database(refusal)) => {
            refusal.code().is_some_and(|code| {
                code == INVALID_VALUE
                    || ["28", "3D", "42"].iter().any(|class| code.starts_with(class))
            })
        }
        Refusal::Failed(sqlx::Error::Configuration(_) | sqlx::Error::Tls(_)) => true,
        Refusal::Failed(sqlx::Error::Io(error)) => {
            certificate_is_refused(error) || file_is_missing(error, options)
        }
        // A standby may be promoted.
        Refusal::Failed(_) | Refusal::NotAsAsked(_) => false,
    }
}

fn is_read_only(error: &MigrateError) -> bool {
    let (MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)) = error else {
        return false;
    };
    // read_only_sql_transaction
    error.as_database_error().is_some_and(|error| error.code().as_deref() == Some("25006"))
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
