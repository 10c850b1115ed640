//! One login: its connection, what its commits wait for, and the server's process behind it.

use std::time::Duration;

use sqlx::{Row as _, postgres::PgConnection};
use tokio::time::Instant;

use super::{servers::Place, warnings::Warnings};

/// How long after its begin a statement can still run: `statement_timeout` and a margin. The wait
/// of a commit for a standby is not bounded by it.
const STATEMENT_LIMIT: Duration = Duration::from_secs(3);

/// Run once after each login.
///
/// `synchronous_commit` is set in the session in any case: what a session has set itself, no reload
/// of the server's configuration turns off. All but `off` stays as it is. (An administrator's
/// stronger setting takes effect with the next login, at most 30 minutes later.)
/// A role without WARNINGs could not see a cancelled wait for the standby (see [`Warnings`]).
const SET_UP: &str = "SELECT pg_backend_pid(), \
    (SELECT CAST(extract(epoch FROM backend_start) * 1000000 AS INT8) \
        FROM pg_stat_activity WHERE pid = pg_backend_pid()), \
    set_config('synchronous_commit', CASE current_setting('synchronous_commit') \
        WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END, false), \
    set_config('client_min_messages', 'warning', false)";

/// Ends processes of this role, and returns those that have not ended yet.
const TERMINATE: &str = "SELECT pid, CAST(extract(epoch FROM backend_start) * 1000000 AS INT8), \
        pg_terminate_backend(pid) \
    FROM pg_stat_activity AS running WHERE EXISTS (\
        SELECT 1 FROM UNNEST($1::INT4[], $2::INT8[]) AS ended (pid, started) \
        WHERE ended.pid = running.pid AND ended.started = \
            CAST(extract(epoch FROM running.backend_start) * 1000000 AS INT8))";

/// A process of the server. The kernel gives its id to another one some day; the time of its start
/// (microseconds since 1970) tells them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Backend {
    pid: i32,
    started: i64,
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Session {
    pub(super) connection: PgConnection,
    pub(super) warnings: Warnings,
    pub(super) backend: Backend,
    pub(super) server: Place,
    pub(super) born: Instant,
    /// See [`super::connections`].
    pub(super) generation: u64,
}

impl Session {
    /// Prepares a new connection.
    pub(super) async fn set_up(
        mut connection: PgConnection,
        server: Place,
        generation: u64,
    ) -> Result<Self, sqlx::Error> {
        // Without a prepared statement: it is run once.
        let row = sqlx::raw_sql(SET_UP).fetch_one(&mut connection).await?;
        // A server that does not say when it began has no process to look for.
        let started: Option<i64> = row.try_get(1)?;
        let backend = Backend { pid: row.try_get(0)?, started: started.unwrap_or_default() };
        let (warnings, born) = (Warnings::new(), Instant::now());
        Ok(Self { connection, warnings, backend, server, born, generation })
    }

    pub(super) async fn is_standby(&mut self) -> Result<bool, sqlx::Error> {
        let row = sqlx::raw_sql("SELECT pg_is_in_recovery()").fetch_one(&mut self.connection);
        row.await?.try_get(0)
    }

    /// Ends these processes of the server; returns those that run on for now.
    pub(super) async fn terminate(
        &mut self,
        backends: &[Backend],
    ) -> Result<Vec<Backend>, sqlx::Error> {
        let (pids, started): (Vec<i32>, Vec<i64>) =
            backends.iter().map(|backend| (backend.pid, backend.started)).unzip();
        let query = sqlx::query(TERMINATE).bind(pids).bind(started);
        let rows = query.fetch_all(&mut self.connection).await?;
        rows.iter()
            .map(|row| Ok(Backend { pid: row.try_get(0)?, started: row.try_get(1)? }))
            .collect()
    }
}

/// A connection that was closed while a write was under way on it: what was sent may reach the
/// server later, or still run there.
#[derive(Debug, Clone, Copy)]
pub(super) struct LeftBehind {
    pub(super) backend: Backend,
    pub(super) at: Instant,
}

impl LeftBehind {
    pub(super) fn new(backend: Backend) -> Self {
        Self { backend, at: Instant::now() }
    }

    /// Whether a statement that the server had when the connection was closed is over by its limit.
    pub(super) fn statement_is_over(&self) -> bool {
        self.at.elapsed() >= STATEMENT_LIMIT
    }
}
