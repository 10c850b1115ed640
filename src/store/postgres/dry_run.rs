//! Places and reads an order in a transaction that is rolled back, with the statements that placing
//! and reading use: whatever refuses them is found at the start, not by the first caller.

use sqlx::{Connection as _, error::DatabaseError, postgres::PgConnection};

use super::{
    GET, LOCK_TIMEOUT, STATEMENT_TIMEOUT,
    rows::{insert, stored_row, uuid},
};
use crate::store::dry_run;

/// # Errors
/// If the server refuses a statement, unless it is the order itself that it refuses.
pub(super) async fn place_and_read(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let new = dry_run::order();
    let mut transaction = connection.begin().await?;
    match insert(&mut transaction, std::slice::from_ref(&new)).await {
        Err(error) if !is_of_the_row(&error) => return Err(error),
        // The refusal has ended the transaction: the read has one of its own.
        Err(_) => {
            transaction.rollback().await?;
            transaction = connection.begin().await?;
        }
        Ok(_) => {}
    }
    let read = sqlx::query(GET).bind(uuid(new.order.id)).fetch_optional(&mut *transaction).await?;
    read.as_ref().map(stored_row).transpose()?;
    transaction.rollback().await?;
    // Last, so that a start of many tries warns once.
    warn_without_limits(connection).await
}

/// A pooler may ignore what sets the limits; then statements that nobody waits for any more go on.
async fn warn_without_limits(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    for (name, value) in [STATEMENT_TIMEOUT, LOCK_TIMEOUT] {
        let setting = sqlx::query_scalar("SELECT current_setting($1)").bind(name);
        let setting: String = setting.fetch_one(&mut *connection).await?;
        if setting == "0" {
            tracing::warn!(
                name,
                expected = value,
                "a time limit of the session is not in force: set it for the role"
            );
        }
    }
    Ok(())
}

/// A constraint or a trigger of the administrator's, which other orders may pass.
fn is_of_the_row(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(DatabaseError::code);
    code.is_some_and(|code| code.starts_with("23") || code.starts_with("P0"))
}
