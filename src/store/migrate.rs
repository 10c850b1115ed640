//! The migrations of both engines, compiled in. (sqlx's own macro would compile SQLite twice, once for
//! the build.)

use sqlx::{
    SqlSafeStr as _,
    migrate::{Migration, MigrationType, Migrator},
};

const SQLITE: &[(i64, &str, &str)] =
    &[(1, "orders", include_str!("../../migrations/sqlite/0001_orders.sql"))];
const POSTGRES: &[(i64, &str, &str)] =
    &[(1, "orders", include_str!("../../migrations/postgres/0001_orders.sql"))];

pub(super) fn sqlite() -> Migrator {
    migrator(SQLITE)
}

/// Without sqlx's advisory lock, which CockroachDB has not: several at once may fail, and are to be
/// tried again.
pub(super) fn postgres() -> Migrator {
    let mut migrator = migrator(POSTGRES);
    migrator.set_locking(false);
    migrator
}

fn migrator(list: &[(i64, &'static str, &'static str)]) -> Migrator {
    let migration = |&(version, description, sql): &(i64, &'static str, &'static str)| {
        Migration::new(
            version,
            description.into(),
            MigrationType::Simple,
            sql.into_sql_str(),
            false,
        )
    };
    Migrator::with_migrations(list.iter().map(migration).collect())
}
