//! What the server's settings mean for acknowledged orders; read once, at the start.

use sqlx::{Row as _, postgres::PgConnection};

/// The settings as the role's sessions have them (NULL where the server has none); the function
/// that sends a logical message, and whether the role may call it. The function's arguments differ:
/// PostgreSQL 17 added one.
const SETTINGS: &str = "SELECT current_setting('synchronous_commit', true) = 'off', \
    current_setting('fsync', true) = 'off', current_setting('full_page_writes', true) = 'off', \
    CAST(CAST(message.oid AS REGPROCEDURE) AS TEXT), \
    has_function_privilege(message.oid, 'EXECUTE') \
    FROM (SELECT 1) AS one LEFT JOIN pg_proc AS message \
    ON proname = 'pg_logical_emit_message' AND proargtypes[2] = CAST('text' AS REGTYPE) \
    AND pronamespace = CAST('pg_catalog' AS REGNAMESPACE)";

/// What [`read`] found.
#[derive(Debug)]
pub(super) struct Durability {
    /// Commits return before they are on disk.
    asynchronous: bool,
    /// The settings, `name=value`, that a failure of the server's machine makes fatal.
    unsafe_settings: Vec<&'static str>,
    /// The function that sends a logical message, and whether the role may call it. `None` on a
    /// server that is not PostgreSQL: it replicates a row before it shows it.
    message: Option<(String, bool)>,
}

impl Durability {
    pub(super) async fn read(connection: &mut PgConnection) -> Result<Self, sqlx::Error> {
        let row = sqlx::raw_sql(SETTINGS).fetch_one(connection).await?;
        let is_off =
            |column| Ok::<_, sqlx::Error>(row.try_get::<Option<bool>, _>(column)? == Some(true));
        let mut unsafe_settings = Vec::new();
        for (column, setting) in [(1, "fsync=off"), (2, "full_page_writes=off")] {
            if is_off(column)? {
                unsafe_settings.push(setting);
            }
        }
        let (function, may_call): (Option<String>, Option<bool>) =
            (row.try_get(3)?, row.try_get(4)?);
        Ok(Self { asynchronous: is_off(0)?, unsafe_settings, message: function.zip(may_call) })
    }

    /// Logs what loses acknowledged orders, a line for each setting.
    pub(super) fn warn(&self) {
        if self.asynchronous {
            tracing::warn!(
                found = "synchronous_commit=off",
                "the database reports commits that are not on disk; the service's sessions set \
                 synchronous_commit=on"
            );
        }
        for found in &self.unsafe_settings {
            tracing::warn!(
                found,
                "the database can lose acknowledged orders when its machine fails"
            );
        }
    }

    /// Whether a read can be confirmed by a commit that waits for a synchronous standby.
    ///
    /// # Errors
    /// One line with the remedy, if the role lacks a privilege that PostgreSQL gives to every role.
    pub(super) fn confirms(&self) -> Result<bool, String> {
        match &self.message {
            Some((_, true)) => Ok(true),
            Some((function, false)) => Err(format!(
                "the role may not call {function}, by which a replay waits for the synchronous \
                 standby; grant it: GRANT EXECUTE ON FUNCTION {function} TO the role"
            )),
            None => Ok(false),
        }
    }
}
