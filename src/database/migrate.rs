//! The migrations of this program's tables.

use std::borrow::Cow;

use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::{MySqlConnection, SqlSafeStr};

use super::Database;
use crate::database::error::{DatabaseError, server_error_number};
use crate::model::signature::random_key;

/// The migrator derives its lock and its table from this name. The name is our own, so that an
/// application's own sqlx migrations can live in the same database.
const MIGRATIONS_TABLE: &str = "projectionist_migrations";

const SET_INITIAL_KEY: &str = "update event_log set signing_key = ? where signing_key is null";

impl Database {
    /// Creates or upgrades the tables. May be repeated, and may run on several hosts at once.
    ///
    /// # Errors
    /// If a statement fails, or if the database was migrated by a newer release than this one.
    pub async fn migrate(&self) -> Result<(), DatabaseError> {
        let mut connection = self.acquire().await?;
        self.run_migrations(&mut connection).await?;
        let key = random_key().ok_or_else(|| {
            let reason = "the operating system provides no random numbers for a signing key";
            DatabaseError::Settings(reason.into())
        })?;
        sqlx::query(SET_INITIAL_KEY).bind(key.as_slice()).execute(&mut *connection).await?;
        Ok(())
    }

    async fn run_migrations(&self, connection: &mut MySqlConnection) -> Result<(), DatabaseError> {
        Self::migrator().run(connection).await.map_err(|error| match error {
            sqlx::migrate::MigrateError::Execute(error)
            | sqlx::migrate::MigrateError::ExecuteMigration(error, _) => {
                match server_error_number(&error) {
                    Some(1709) => DatabaseError::Settings(format!(
                        "the tables cannot be migrated: set innodb_default_row_format to dynamic, \
                         its default; the indexes are too long for other formats: {error}"
                    )),
                    _ => DatabaseError::Statement(error),
                }
            }
            sqlx::migrate::MigrateError::Dirty(version) => DatabaseError::Settings(format!(
                "migration {version} was begun and not finished: one of its tables already \
                 existed, or it was interrupted. Look which parts of events, event_log and \
                 projectors exist, drop the parts that the migration created, \
                 `delete from {MIGRATIONS_TABLE} where not success`, and run \
                 `projectionist migrate` again"
            )),
            error => DatabaseError::Settings(format!("the tables cannot be migrated: {error}")),
        })
    }

    pub(super) fn migrator() -> Migrator {
        let migration = |version, name: &'static str, sql: &'static str| {
            Migration::new(
                version,
                Cow::Borrowed(name),
                MigrationType::Simple,
                sql.into_sql_str(),
                false,
            )
        };
        let mut migrator = Migrator::with_migrations(vec![
            migration(1, "tables", include_str!("../../migrations/0001_tables.sql")),
            migration(2, "guarantees", include_str!("../../migrations/0002_guarantees.sql")),
        ]);
        migrator.dangerous_set_table_name(MIGRATIONS_TABLE);
        migrator
    }
}
