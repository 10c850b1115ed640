//! Commits that change nothing and wait for the synchronous standby, and what a warning says of one.

use std::time::Duration;

use sqlx::Row as _;

use super::{RESOLVE, session::Session};

/// How long to wait for the commit of [`RESOLVE_CONFIRMED`] or [`PROBE`]. Longer than an attempt: a
/// retry sends a new commit, which waits as long again, so that a standby that takes longer than
/// this limit confirms nothing.
pub(super) const CONFIRMATION: Duration = Duration::from_secs(5);

/// The cause when that commit does not return in time.
pub(super) const UNCONFIRMED: &str =
    "no commit of the server within 5 s, as when its synchronous standby is down";

/// The rows of [`RESOLVE`], and its own commit waits for the synchronous standby.
///
/// A row that can be read is on the primary's disk, and may be nowhere else: a restart of the
/// primary, or the end of the backend that committed it, ends the wait for the standby and makes
/// the row visible. A SELECT waits for nothing. A transaction waits for the standby only if it has
/// an id and wrote WAL; a transactional logical message does both, and nothing else: no table
/// changes, and by default any role may send it (no-op updates and row locks need UPDATE and leave
/// dead rows). The read is in the same transaction, so that no pooler can send the two to different
/// servers. The message is written once, if there is a row at all, since the subquery depends on
/// none.
///
/// Cost: a batch with a replay flushes about 100 bytes of WAL more than a read, and takes as long
/// as a commit. A batch of new orders does not come here.
pub(super) const RESOLVE_CONFIRMED: &str = "SELECT id, product_id, quantity, idempotency_key, placed_at, \
    (SELECT pg_logical_emit_message(true, 'order-service', '') IS NOT NULL) FROM (\
    SELECT id, product_id, quantity, idempotency_key, placed_at \
    FROM orders WHERE id = ANY($1::UUID[]) \
    UNION ALL SELECT id, product_id, quantity, idempotency_key, placed_at \
    FROM orders WHERE idempotency_key = ANY($2::TEXT[])) AS stored";

/// Commits as an order does, and waits for the synchronous standby as one does. Writes nothing where
/// none is configured.
pub(super) const PROBE: &str = "SELECT CASE \
    WHEN current_setting('synchronous_standby_names', true) <> '' \
    THEN pg_logical_emit_message(true, 'order-service', '') IS NOT NULL END";

/// The text of a cancelled wait, be it on behalf of the user or of the administrator, as the server
/// sends it unless `lc_messages` chooses another language.
const CANCELLED: &str = "wait for synchronous replication";

const SETTINGS: &str = "SELECT current_setting('synchronous_standby_names', true), \
    current_setting('lc_messages', true)";

/// Why a commit may not have waited for the synchronous standby: `warned` are the texts that
/// [`Warnings`](super::warnings::Warnings) noted during it.
///
/// A text in another language cannot be told from other warnings by itself. It is another warning
/// if the server has no synchronous standby, if its language is English, or if a read comes with
/// the same text, because a read waits for no standby.
pub(super) async fn doubt(
    session: &mut Session,
    warned: &[String],
) -> Result<Option<String>, sqlx::Error> {
    if warned.iter().any(|text| text.contains(CANCELLED)) {
        return Ok(Some("the wait for the synchronous standby was cancelled".to_owned()));
    }
    let row = sqlx::raw_sql(SETTINGS).fetch_one(&mut session.connection).await?;
    let (names, language): (Option<String>, Option<String>) = (row.try_get(0)?, row.try_get(1)?);
    if names.is_none_or(|names| names.is_empty())
        || matches!(language.as_deref(), Some("C" | "POSIX"))
    {
        return Ok(None);
    }
    let read = sqlx::query(RESOLVE).bind(Vec::<uuid::Uuid>::new()).bind(Vec::<String>::new());
    let read = read.fetch_all(&mut session.connection);
    session.warnings.during(read).await?;
    let of_a_read = session.warnings.take();
    let unknown = warned.iter().find(|text| !of_a_read.contains(text));
    Ok(unknown.map(|text| {
        format!(
            "the wait for the synchronous standby may have been cancelled, or the server warned of \
             something else ({text}): set lc_messages = 'C' for the role"
        )
    }))
}
