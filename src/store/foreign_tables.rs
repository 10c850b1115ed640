//! Tables that another program made where ours should be. They are recognised before the migrations
//! run: these would say only that a table exists or that a version is missing.

use super::migrate::{Applied, FIRST};

/// Checks whose tables they are: whether there is a table `orders`, and the applied migrations.
///
/// # Errors
/// If they are another program's: one line with the remedy.
pub(super) fn check(has_orders: bool, applied: &[Applied]) -> Result<(), String> {
    let (first, name) = FIRST;
    if applied.iter().any(|(version, description, ..)| *version == first && description == name) {
        return Ok(());
    }
    let remedy = "give this program a database of its own, or a schema by the role's search_path";
    match applied.first() {
        Some((version, description, ..)) => Err(format!(
            "it belongs to another program, whose migration {version} ({description:?}) is in \
             _sqlx_migrations: {remedy}"
        )),
        None if has_orders => Err(format!(
            "its table orders is another program's: no migration of this one is in \
             _sqlx_migrations: {remedy}"
        )),
        None => Ok(()),
    }
}
