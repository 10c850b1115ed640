//! The migrations of both engines, compiled in, and the decision whether tables fit this program.
//! (sqlx's own macro would compile SQLite twice, once for the build.)
//!
//! An older program does not have the files of newer migrations, so the list of applied migrations
//! in the database says which of them are additive.

use sqlx::{
    SqlSafeStr as _,
    migrate::{Migration, MigrationType, Migrator},
};

/// The version and the description of the first migration of both engines.
pub(super) const FIRST: (i64, &str) = (1, "orders");

const SQLITE: &[(i64, &str, &str)] =
    &[(1, "orders", include_str!("../../migrations/sqlite/0001_orders.sql"))];
const POSTGRES: &[(i64, &str, &str)] =
    &[(1, "orders", include_str!("../../migrations/postgres/0001_orders.sql"))];

/// The first line of a migration whose tables older programs can use: it adds tables, indexes that
/// are not unique, or columns that are nullable or have a default.
const MARKER: &str = "-- additive\n";

/// Begins the recorded description of an additive migration.
const ADDITIVE: &str = "additive: ";

/// The remedy for tables that are older than the program.
pub(super) const REMEDY: &str = "run `order-service migrate`";

/// Lists the applied migrations, see [`Applied`]. A program that never migrated has no such table.
pub(super) const LIST: &str =
    "SELECT version, description, checksum, success FROM _sqlx_migrations ORDER BY version";

/// Version, description, checksum and success of an applied migration.
pub(super) type Applied = (i64, String, Vec<u8>, bool);

/// How tables differ from those that this program was built for.
#[derive(Debug, Default)]
pub(super) struct Difference {
    /// The migrations that the tables lack.
    pub pending: Vec<i64>,
    /// The additive migrations that this program does not have, with their descriptions.
    pub newer: Vec<String>,
}

pub(super) fn sqlite() -> Migrator {
    migrator(SQLITE)
}

/// Runs without sqlx's advisory lock, which CockroachDB lacks: one of several concurrent runs may
/// fail and must be retried.
pub(super) fn postgres() -> Migrator {
    let mut migrator = migrator(POSTGRES);
    migrator.set_locking(false);
    migrator
}

fn migrator(list: &[(i64, &'static str, &'static str)]) -> Migrator {
    let migrations = list.iter().map(|&(version, description, sql)| {
        let description = match sql.starts_with(MARKER) {
            true => format!("{ADDITIVE}{description}").into(),
            false => description.into(),
        };
        Migration::new(version, description, MigrationType::Simple, sql.into_sql_str(), false)
    });
    let mut migrator = Migrator::with_migrations(migrations.collect());
    // `compare` decides about them.
    migrator.set_ignore_missing(true);
    migrator
}

/// Compares the tables with the program.
///
/// # Errors
/// If this program must not use them: one line.
pub(super) fn compare(migrator: &Migrator, applied: &[Applied]) -> Result<Difference, String> {
    let mut newer = Vec::new();
    for (version, description, checksum, success) in applied {
        if !success {
            return Err(format!(
                "its tables: migration {version} failed halfway; complete or undo it by hand, then \
                 correct its row of _sqlx_migrations"
            ));
        }
        match migrator.iter().find(|migration| migration.version == *version) {
            Some(migration) if *migration.checksum == **checksum => {}
            Some(_) => return Err(format!("its migration {version} is not this program's")),
            None if description.starts_with(ADDITIVE) => {
                newer.push(format!("{version} ({description})"));
            }
            None => {
                return Err(format!(
                    "its tables were made by a newer version of this program: migration {version} \
                     ({description:?}) is not additive"
                ));
            }
        }
    }
    let is_applied = |version| applied.iter().any(|applied| applied.0 == version);
    let pending = migrator.iter().map(|migration| migration.version);
    Ok(Difference { pending: pending.filter(|&version| !is_applied(version)).collect(), newer })
}

impl Difference {
    /// The line that refuses pending migrations under `--migrations check`.
    pub(super) fn refusal(&self) -> Option<String> {
        let first = self.pending.first()?;
        Some(format!(
            "its tables lack migration {first}, which --migrations check does not apply: {REMEDY}"
        ))
    }

    /// Logs one warning if the tables are newer than the program.
    pub(super) fn warn_if_newer(&self) {
        if !self.newer.is_empty() {
            tracing::warn!(
                migrations = self.newer.join(", "),
                "the tables are newer than this program: additive migrations that it does not have"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_marker_of_a_migration_is_recorded_in_its_description() {
        let migrator = migrator(&[
            (1, "orders", "CREATE TABLE orders (id INT4)"),
            (2, "notes", "-- additive\nALTER TABLE orders ADD COLUMN note TEXT"),
            (3, "words", "-- additive, but not by the marker\nSELECT 1"),
        ]);
        let descriptions: Vec<_> = migrator.iter().map(|m| &*m.description).collect();
        assert_eq!(descriptions, ["orders", "additive: notes", "words"]);
    }

    #[test]
    fn the_first_migration_is_recorded_as_it_always_was() {
        for migrator in [sqlite(), postgres()] {
            assert_eq!(migrator.iter().next().map(|m| &*m.description), Some("orders"));
        }
    }

    #[test]
    fn a_failed_or_changed_migration_is_refused() {
        let migrator = sqlite();
        let first = migrator.iter().next().expect("one");
        let row = |checksum: &[u8], success| (1, "orders".to_owned(), checksum.to_vec(), success);
        assert!(compare(&migrator, &[row(&first.checksum, true)]).is_ok());
        assert!(compare(&migrator, &[row(&first.checksum, false)]).is_err());
        assert!(compare(&migrator, &[row(b"other", true)]).is_err());
        assert_eq!(compare(&migrator, &[]).map(|difference| difference.pending), Ok(vec![1]));
    }
}
