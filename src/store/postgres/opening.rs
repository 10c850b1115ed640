//! The first connection to the server: waits for a server that is not up yet, refuses what no
//! waiting changes, and compares or migrates the tables.

use std::time::Duration;

use rand::RngExt as _;
use sqlx::{Connection as _, migrate::MigrateError, postgres::PgConnection};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::{
    confirmation::{CONFIRMATION, PROBE},
    dry_run,
    durability::Durability,
    servers::{NoServer, Place, Servers},
    session::{Backend, Session},
};
use crate::{
    config::Migrations,
    store::{
        StoreHealth, foreign_tables,
        migrate::{self, Applied, Difference, REMEDY},
    },
};

/// How long a server that is not up yet is waited for.
const OPENING: Duration = Duration::from_secs(30);

/// How long one try waits for the server to accept a connection.
const CONNECTING: Duration = Duration::from_secs(5);

/// Limit of applying migrations at the start; the last attempt may use all of it.
const MIGRATING: Duration = Duration::from_secs(10);

/// `order-service migrate` has all the time that its statements need.
const UNBOUNDED: Duration = Duration::from_secs(10 * 365 * 86_400);

/// Limit of reading what the server has.
const COMPARING: Duration = Duration::from_secs(5);

const UNDEFINED_TABLE: &str = "42P01";
const INSUFFICIENT_PRIVILEGE: &str = "42501";
const READ_ONLY: &str = "25006";

/// The `search_path` and the role, and the last schema of the path that exists: it is `public`,
/// unless an administrator chose others.
const SCHEMAS: &str = "SELECT current_setting('search_path'), CAST(quote_ident(current_user) AS TEXT), \
    (SELECT quote_ident(nspname) \
        FROM UNNEST(string_to_array(current_setting('search_path'), ',')) \
            WITH ORDINALITY AS path (entry, position) \
        JOIN pg_namespace ON nspname = \
            replace(btrim(entry, ' \"'), '$user', CAST(current_user AS TEXT)) \
        ORDER BY position DESC LIMIT 1)";

/// What an opening does with the tables.
#[derive(Debug, Clone, Copy)]
pub(super) enum Tables {
    /// Makes them ready for serving.
    Serve(Migrations),
    /// Migrates them without a time limit.
    Migrate,
}

/// A database that is ready.
pub(super) struct Opened {
    /// How the tables differed; what was pending was applied.
    pub(super) tables: Difference,
    durability: Durability,
    /// Whether a read can wait for a synchronous standby.
    pub(super) confirms: bool,
    /// The process of the server whose commit still waited for the synchronous standby when the
    /// start stopped waiting for it.
    pub(super) waiting: Option<Backend>,
}

/// Returns once a server has answered, its tables fit this program and, if it is to serve, an order
/// can be placed. `servers` have the options of the connection that applies migrations, `limited`
/// those of the connections that place orders; `health` learns why it takes so long.
///
/// # Errors
/// One line, without a password.
pub(super) async fn wait_until_ready(
    servers: &Servers,
    limited: &Servers,
    tables: Tables,
    health: &StoreHealth,
) -> Result<Opened, String> {
    let until = Instant::now() + OPENING;
    loop {
        let ready = match (prepare(servers, tables, until).await, tables) {
            (Ok(opened), Tables::Serve(_)) => {
                let tried = try_placing(limited, opened.confirms, until).await;
                tried.map(|waiting| Opened { waiting, ..opened })
            }
            (prepared, _) => prepared,
        };
        let why = match ready {
            Ok(opened) => {
                // Once, however many tries it took.
                opened.durability.warn();
                opened.tables.warn_if_newer();
                return Ok(opened);
            }
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

/// Makes the tables and the session's durability ready.
async fn prepare(servers: &Servers, tables: Tables, until: Instant) -> Result<Opened, NotReady> {
    let (mut connection, place) = connect(servers, until).await?;
    let migrator = migrate::postgres();
    let seen = timeout(COMPARING, look(&mut connection)).await;
    let (applied, read_only) =
        seen.map_err(|_| NotReady::NotYet("it does not answer".to_owned()))??;
    let difference = migrate::compare(&migrator, &applied).map_err(NotReady::Never)?;
    if read_only {
        servers.leave(place);
        return Err(NotReady::NotYet("it takes no writes (transaction_read_only)".to_owned()));
    }
    if let (Tables::Serve(Migrations::Check), Some(why)) = (tables, difference.refusal()) {
        return Err(NotReady::Never(why));
    }
    // Applying begins with CREATE TABLE, which needs more rights than serving.
    if !difference.pending.is_empty() {
        let limit = match tables {
            Tables::Serve(_) => MIGRATING,
            Tables::Migrate => UNBOUNDED,
        };
        // `Migrator::run` on a connection makes a future that is not `Send`; sqlx has this for it.
        match timeout(limit, migrator.run_direct(None, &mut connection, false)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(NotReady::of_migrating(&error)),
            Err(_) => {
                let seconds = MIGRATING.as_secs();
                let why = format!("its migrations took longer than {seconds} s");
                return Err(NotReady::NotYet(format!("{why}: {REMEDY}, which has no time limit")));
            }
        }
    }
    let reading = Durability::read(&mut connection);
    let durability = match timeout_at(Instant::now() + CONNECTING, reading).await {
        Ok(Ok(durability)) => durability,
        Ok(Err(error)) => return Err(NotReady::NotYet(error.to_string())),
        Err(_) => return Err(NotReady::NotYet("it does not answer".to_owned())),
    };
    let confirms = durability.confirms().map_err(NotReady::Never)?;
    let _ = timeout(CONNECTING, connection.close()).await;
    Ok(Opened { tables: difference, durability, confirms, waiting: None })
}

async fn connect(servers: &Servers, until: Instant) -> Result<(PgConnection, Place), NotReady> {
    let connected = until.min(Instant::now() + CONNECTING);
    match timeout_at(connected, servers.connect()).await {
        Ok(Ok(connected)) => Ok(connected),
        Ok(Err(none)) => Err(NotReady::of_connecting(&none)),
        Err(_) => Err(NotReady::NotYet("it does not answer".to_owned())),
    }
}

/// Does what placing an order and reading one does, on such a connection; nothing of it is kept.
/// Then, if it `confirms`, commits as an order does; returns the process of a commit that waits for
/// longer than an order's would.
async fn try_placing(
    limited: &Servers,
    confirms: bool,
    until: Instant,
) -> Result<Option<Backend>, NotReady> {
    let (connection, place) = connect(limited, until).await?;
    let trying = async {
        let mut session = Session::set_up(connection, place, 0).await?;
        dry_run::place_and_read(&mut session.connection).await?;
        Ok(session)
    };
    match timeout(CONNECTING, trying).await {
        Ok(Ok(Session { mut connection, backend, .. })) => {
            if confirms {
                let commit = sqlx::raw_sql(PROBE).execute(&mut connection);
                match timeout(CONFIRMATION, commit).await {
                    Ok(Ok(_)) => {}
                    Ok(Err(error)) => return Err(NotReady::of_placing(&error)),
                    Err(_) => return Ok(Some(backend)),
                }
            }
            let _ = timeout(CONNECTING, connection.close()).await;
            Ok(None)
        }
        Ok(Err(error)) => {
            if has_code(&error, READ_ONLY) {
                limited.leave(place);
            }
            Err(NotReady::of_placing(&error))
        }
        Err(_) => Err(NotReady::NotYet("it does not answer".to_owned())),
    }
}

/// The applied migrations, none if nothing was ever applied; and whether the server takes no writes.
async fn look(connection: &mut PgConnection) -> Result<(Vec<Applied>, bool), NotReady> {
    // Before the list: another replica makes the table and its entry in the list together.
    let orders =
        sqlx::query_as("SELECT to_regclass('orders') IS NOT NULL, current_schema() IS NULL");
    let (orders, no_schema): (bool, bool) = orders
        .fetch_one(&mut *connection)
        .await
        .map_err(|error| NotReady::of_tables(&error, ""))?;
    if no_schema {
        return Err(no_schema_of_role(connection).await);
    }
    let applied: Vec<Applied> =
        match sqlx::query_as(migrate::LIST).fetch_all(&mut *connection).await {
            Ok(applied) => applied,
            Err(error) if has_code(&error, UNDEFINED_TABLE) => Vec::new(),
            Err(error) => return Err(NotReady::of_tables(&error, "")),
        };
    foreign_tables::check(orders, &applied).map_err(NotReady::Never)?;
    let read_only = sqlx::query_scalar("SHOW transaction_read_only").fetch_one(connection).await;
    let read_only: String = read_only.map_err(|error| NotReady::of_tables(&error, ""))?;
    Ok((applied, read_only == "on"))
}

/// None of the schemas of `search_path` exists and may be used by the role.
async fn no_schema_of_role(connection: &mut PgConnection) -> NotReady {
    let row: Result<(String, String, Option<String>), _> =
        sqlx::query_as(SCHEMAS).fetch_one(connection).await;
    match row {
        Ok((path, role, Some(schema))) => NotReady::Never(format!(
            "the role {role} may not use the schema {schema} (search_path {path}): GRANT USAGE ON \
             SCHEMA {schema} TO {role}"
        )),
        Ok((path, role, None)) => NotReady::Never(format!(
            "no schema of search_path ({path}) exists: create one that the role {role} may use, or \
             set its search_path"
        )),
        Err(error) => NotReady::of_tables(&error, ""),
    }
}

fn has_code(error: &sqlx::Error, code: &str) -> bool {
    error.as_database_error().is_some_and(|error| error.code().as_deref() == Some(code))
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

    /// Of the statements that place and read an order.
    fn of_placing(error: &sqlx::Error) -> Self {
        match error {
            sqlx::Error::Database(refusal) => match refusal.code().as_deref() {
                Some(INSUFFICIENT_PRIVILEGE) => Self::Never(format!(
                    "its tables: {}; the role needs SELECT and INSERT on orders and SELECT on \
                     _sqlx_migrations",
                    refusal.message()
                )),
                Some("26000" | "42P05") => Self::Never(format!(
                    "a pooler shares its connections between statements, and prepared statements \
                     with them ({}): use session pooling, or a pooler that tracks prepared \
                     statements (PgBouncer 1.21 with max_prepared_statements)",
                    refusal.message()
                )),
                // A column that is not there, or of another type.
                Some(code) if code.starts_with("42") => Self::Never(format!(
                    "its table orders is not as this program made it: {}",
                    refusal.message()
                )),
                // A standby may be promoted.
                Some(READ_ONLY) => {
                    Self::NotYet(format!("it takes no writes: {}", refusal.message()))
                }
                _ => Self::NotYet(refusal.message().to_owned()),
            },
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::ColumnNotFound(_) => {
                Self::Never(format!("its table orders is not as this program made it: {error}"))
            }
            _ => Self::NotYet(error.to_string()),
        }
    }

    fn of_migrating(error: &MigrateError) -> Self {
        match error {
            MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => {
                let remedy = format!(": {REMEDY} with a role that may create tables");
                Self::of_tables(error, &remedy)
            }
            other => Self::NotYet(format!("its tables: {other}")),
        }
    }

    /// `remedy` is for a missing privilege.
    fn of_tables(error: &sqlx::Error, remedy: &str) -> Self {
        let message = match error.as_database_error() {
            Some(refusal) => refusal.message().to_owned(),
            None => error.to_string(),
        };
        if has_code(error, INSUFFICIENT_PRIVILEGE) {
            Self::Never(format!("its tables: {message}{remedy}"))
        } else {
            // Replicas that start together get into each other's way once.
            Self::NotYet(format!("its tables: {message}"))
        }
    }
}
