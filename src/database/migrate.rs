//! The migrations of this program's tables.

use std::borrow::Cow;
use std::pin::pin;

use sqlx::migrate::{MigrateError, Migration, MigrationType, Migrator};
use sqlx::{AssertSqlSafe, MySqlConnection, SqlSafeStr};

use super::Database;
use crate::database::error::{DatabaseError, is_denied, server_error_number};
use crate::model::signature::random_key;
use crate::model::wait_log::log_wait;

/// The migrator derives its lock and its table from this name. The name is our own, so that an
/// application's own sqlx migrations can live in the same database.
const MIGRATIONS_TABLE: &str = "projectionist_migrations";

const BEGUN_MIGRATIONS: &str = "select version from projectionist_migrations";

const OWN_DATABASE_TABLES: &str = "\
    select cast(table_name as char) from information_schema.tables \
    where table_schema = database()";

const MARK_EXECUTED: &str = "update projectionist_migrations set success = true where version = ?";

const SET_INITIAL_KEY: &str = "update event_log set signing_key = ? where signing_key is null";

/// The tables that each migration creates.
const CREATED_TABLES: &[(i64, &[&str])] =
    &[(1, &["events", "event_log", "projectors"]), (2, &["log_acceptances"])];

/// The errors of a statement that an interrupted migration has already executed: the table, the
/// column, the row or the constraint exists.
const ALREADY_EXECUTED: &[u16] = &[1050, 1060, 1062, 1826, 3822];

impl Database {
    /// Creates or upgrades the tables. May be repeated, and may run on several hosts at once. A
    /// migration that was interrupted is continued.
    ///
    /// # Errors
    /// If a statement fails, if the database was migrated by a newer release than this one, or if a
    /// table of our names exists that is not ours. In the last case nothing is changed.
    pub async fn migrate(&self) -> Result<(), DatabaseError> {
        let mut connection = self.acquire().await?;
        let foreign = foreign_tables(&mut connection).await?;
        if !foreign.is_empty() {
            return Err(DatabaseError::Settings(explain_foreign_tables(&foreign)));
        }
        let migrator = Self::migrator();
        let what = "the migrations: another migrate may run, or a transaction may use the tables";
        let migrated = log_wait(what, pin!(migrator.run(&mut *connection))).await;
        if let Err(error) = migrated {
            let MigrateError::Dirty(version) = error else { return Err(explain(error)) };
            continue_migration(&mut connection, version).await?;
            Self::migrator().run(&mut *connection).await.map_err(explain)?;
        }
        let key = random_key().ok_or_else(|| {
            let reason = "the operating system provides no random numbers for a signing key";
            DatabaseError::Settings(reason.into())
        })?;
        sqlx::query(SET_INITIAL_KEY).bind(key.as_slice()).execute(&mut *connection).await?;
        Ok(())
    }

    /// The tables of our names that projectionist did not create.
    pub(crate) async fn foreign_tables(&self) -> Result<Vec<String>, sqlx::Error> {
        self.run_pooled(foreign_tables).await
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

/// The tables of our names that exist although the migration that creates them was never begun.
async fn foreign_tables(connection: &mut MySqlConnection) -> Result<Vec<String>, sqlx::Error> {
    // The tables are read first: a migration that runs meanwhile is recorded before its tables.
    let existing: Vec<String> =
        sqlx::query_scalar(OWN_DATABASE_TABLES).fetch_all(&mut *connection).await?;
    let begun = sqlx::query_scalar::<_, i64>(BEGUN_MIGRATIONS).fetch_all(connection).await;
    let begun = match begun {
        Ok(begun) => begun,
        Err(error) if server_error_number(&error) == Some(1146) => Vec::new(),
        // A user that may not read the migrations does not migrate.
        Err(error) if is_denied(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let pending = CREATED_TABLES.iter().filter(|(version, _)| !begun.contains(version));
    Ok(pending
        .flat_map(|(_, tables)| *tables)
        .filter(|table| existing.iter().any(|existing| existing.eq_ignore_ascii_case(table)))
        .map(|table| (*table).to_owned())
        .collect())
}

/// What to do about tables that are not ours.
pub(crate) fn explain_foreign_tables(tables: &[String]) -> String {
    format!(
        "the database has tables of our names that projectionist did not create: {}. Rename them, \
         or use another database",
        tables.join(", ")
    )
}

/// Executes the statements of an interrupted migration that were not executed yet. Each statement
/// is executed whole or not at all.
async fn continue_migration(
    connection: &mut MySqlConnection,
    version: i64,
) -> Result<(), DatabaseError> {
    let migrator = Database::migrator();
    let Some(migration) = migrator.iter().find(|migration| migration.version == version) else {
        return Err(DatabaseError::Settings(format!(
            "migration {version} was interrupted, and this release does not have it: run the \
             release that began it"
        )));
    };
    let sql: Vec<&str> = migration
        .sql
        .as_str()
        .lines()
        .filter(|line| !line.trim_start().starts_with("--"))
        .collect();
    for statement in sql.join("\n").split(';').map(str::trim).filter(|sql| !sql.is_empty()) {
        match sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut *connection).await {
            Err(error)
                if !server_error_number(&error)
                    .is_some_and(|number| ALREADY_EXECUTED.contains(&number)) =>
            {
                return Err(error.into());
            }
            _ => {}
        }
    }
    sqlx::query(MARK_EXECUTED).bind(version).execute(connection).await?;
    Ok(())
}

fn explain(error: MigrateError) -> DatabaseError {
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => {
            match server_error_number(&error) {
                Some(1709) => DatabaseError::Settings(format!(
                    "the tables cannot be migrated: set innodb_default_row_format to dynamic, its \
                     default; the indexes are too long for other formats: {error}"
                )),
                _ => DatabaseError::Statement(error),
            }
        }
        error => DatabaseError::Settings(format!("the tables cannot be migrated: {error}")),
    }
}
