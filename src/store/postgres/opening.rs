//! The first connection to the server: waits for one that is not up yet, refuses what no waiting
//! mends, and brings the tables up to date.

use std::time::Duration;

use rand::RngExt as _;
use sqlx::{Connection as _, migrate::MigrateError};
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    durability::Durability,
    servers::{NoServer, Servers},
};
use crate::store::{StoreHealth, migrate};

/// How long a server that is not up yet is waited for.
const OPENING: Duration = Duration::from_secs(30);

/// How long one try waits for the server to accept a connection.
const CONNECTING: Duration = Duration::from_secs(5);

/// How long the tables may take; the last try may use it all.
const MIGRATING: Duration = Duration::from_secs(10);

/// Returns once the server has answered and its tables are this program's: whether a read can wait
/// for a synchronous standby. `servers` have the options of the connection that makes the tables;
/// `health` learns why it takes so long.
///
/// # Errors
/// One line, without a password.
pub(super) async fn wait_until_ready(
    servers: &Servers,
    health: &StoreHealth,
) -> Result<bool, String> {
    let until = Instant::now() + OPENING;
    loop {
        let why = match prepare(servers, until).await {
            Ok(confirms) => return Ok(confirms),
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

async fn prepare(servers: &Servers, until: Instant) -> Result<bool, NotReady> {
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
    let reading = Durability::read(&mut connection);
    let durability = match timeout_at(Instant::now() + CONNECTING, reading).await {
        Ok(Ok(durability)) => durability,
        Ok(Err(error)) => return Err(NotReady::NotYet(error.to_string())),
        Err(_) => return Err(NotReady::NotYet("it does not answer".to_owned())),
    };
    let confirms = durability.confirms().map_err(NotReady::Never)?;
    durability.warn();
    let _ = timeout_at(Instant::now() + CONNECTING, connection.close()).await;
    Ok(confirms)
}

enum NotReady {
    /// It may become ready.
    NotYet(String),
    /// It never will by itself.
    Never(String),
}

impl NotReady {
    fn of_connecting(none: &NoServer) -> Self {
        let why = none.to_string();
        if none.is_final() { Self::Never(why) } else { Self::NotYet(why) }
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

fn is_read_only(error: &MigrateError) -> bool {
    let (MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)) = error else {
        return false;
    };
    // read_only_sql_transaction
    error.as_database_error().is_some_and(|error| error.code().as_deref() == Some("25006"))
}
