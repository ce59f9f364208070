//! The read-only queries with which `doctor` examines a database server.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use sqlx::{AssertSqlSafe, Row};

use super::credentials::verifies_certificate;
use super::{Database, SqlMode};
use crate::database::error::{is_denied, server_error_number};

/// A variable that the server does not have is missing from the result.
const SETTINGS: &str = "\
    show global variables \
    where variable_name in ('version', 'version_comment', 'read_only', 'innodb_read_only', \
        'log_bin', 'binlog_format', 'sync_binlog', 'innodb_flush_log_at_trx_commit', \
        'max_connections', 'max_user_connections', 'innodb_lock_wait_timeout', \
        'max_allowed_packet')";

const THREADS_CONNECTED: &str = "show global status like 'Threads_connected'";

const TLS: &str = "show session status like 'Ssl_version'";

/// The server's SQL mode, the user, and the server's clock in microseconds since 1970.
const SESSION: &str =
    "select @@global.sql_mode, current_user(), cast(unix_timestamp(now(6)) * 1000000 as unsigned)";

const APPLIED_MIGRATIONS: &str =
    "select version from projectionist_migrations where success order by version";

/// Whether triggers are visible to the user: only a direct grant shows them, not one of a role.
const CAN_SEE_TRIGGERS: &str = "\
    select count(*) from (\
        select grantee, privilege_type from information_schema.user_privileges \
        union all select grantee, privilege_type from information_schema.schema_privileges \
            where cast(database() as binary) like cast(table_schema as binary) \
        union all select grantee, privilege_type from information_schema.table_privileges \
            where table_schema = database()\
    ) as granted \
    where privilege_type = 'TRIGGER' and grantee = concat(\
        '''', substring_index(current_user(), '@', 1), \
        '''@''', substring_index(current_user(), '@', -1), '''')";

/// The settings and the state of a server.
#[derive(Debug)]
pub(crate) struct ServerReport {
    pub(crate) settings: HashMap<String, String>,
    pub(crate) user: String,
    /// The server's global SQL mode. The mode of projectors also depends on `projector_sql_mode`.
    pub(crate) sql_mode: String,
    pub(crate) projector_sql_mode: SqlMode,
    /// The TLS version, such as `TLSv1.3`. Empty if the connection is not encrypted.
    pub(crate) tls: String,
    /// Whether the server's certificate is checked.
    pub(crate) is_certificate_verified: bool,
    pub(crate) threads_connected: Option<u64>,
    /// How many seconds the server's clock is ahead of this host's clock.
    pub(crate) clock_ahead_seconds: f64,
    pub(crate) can_see_triggers: bool,
}

/// Whether the tables match this release.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum MigrationState {
    /// Every migration of this release was applied.
    UpToDate,
    /// Tables or migrations are missing.
    Behind,
    /// A newer release has migrated the tables.
    Ahead,
    /// The tables exist, but the user may not read which migrations were applied.
    Unknown,
}

/// Whether the user has a privilege.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PrivilegeCheck {
    Granted,
    Denied,
}

impl Database {
    /// Reads the settings and the state of the server.
    pub(crate) async fn inspect(&self) -> Result<ServerReport, sqlx::Error> {
        let is_certificate_verified = verifies_certificate(&self.pool.connect_options());
        let query = async |connection: &mut sqlx::MySqlConnection| {
            let pairs = async |connection: &mut sqlx::MySqlConnection,
                               sql|
                   -> Result<HashMap<String, String>, sqlx::Error> {
                let rows = sqlx::raw_sql(sql).fetch_all(connection).await?;
                rows.iter()
                    .map(|row| Ok((row.try_get::<String, _>(0)?.to_lowercase(), row.try_get(1)?)))
                    .collect()
            };
            let settings = pairs(connection, SETTINGS).await?;
            let threads_connected = pairs(connection, THREADS_CONNECTED)
                .await?
                .into_values()
                .next()
                .and_then(|count| count.parse().ok());
            let tls = pairs(connection, TLS).await?.into_values().next().unwrap_or_default();
            let can_see_triggers: i64 =
                sqlx::query_scalar(CAN_SEE_TRIGGERS).fetch_one(&mut *connection).await?;
            let asked = SystemTime::now();
            let (sql_mode, user, time): (String, String, u64) =
                sqlx::query_as(SESSION).fetch_one(&mut *connection).await?;
            let here =
                unix_seconds(asked) + asked.elapsed().unwrap_or_default().as_secs_f64() / 2.0;
            let clock_ahead_seconds = time as f64 / 1e6 - here;
            Ok(ServerReport {
                settings,
                user,
                sql_mode,
                projector_sql_mode: self.settings.sql_mode,
                tls,
                is_certificate_verified,
                threads_connected,
                clock_ahead_seconds,
                can_see_triggers: can_see_triggers > 0,
            })
        };
        self.run_pooled(query).await
    }

    /// Compares the applied migrations with those of this release.
    pub(crate) async fn migration_state(&self) -> Result<MigrationState, sqlx::Error> {
        let ours: Vec<i64> = Self::migrator().iter().map(|migration| migration.version).collect();
        let query = async |connection: &mut sqlx::MySqlConnection| {
            sqlx::query_scalar::<_, i64>(APPLIED_MIGRATIONS).fetch_all(connection).await
        };
        match self.run_pooled(query).await {
            Ok(applied) if applied.iter().any(|version| !ours.contains(version)) => {
                Ok(MigrationState::Ahead)
            }
            Ok(applied) if ours.iter().all(|version| applied.contains(version)) => {
                Ok(MigrationState::UpToDate)
            }
            Ok(_) => Ok(MigrationState::Behind),
            Err(error) if server_error_number(&error) == Some(1146) => Ok(MigrationState::Behind),
            Err(error) if is_denied(&error) => Ok(if self.has_tables().await? {
                MigrationState::Unknown
            } else {
                MigrationState::Behind
            }),
            Err(error) => Err(error),
        }
    }

    /// Whether no table is known to be missing. A table that the user may not access counts as
    /// present, because the server does not reveal whether it exists.
    async fn has_tables(&self) -> Result<bool, sqlx::Error> {
        for table in ["events", "event_log", "projectors"] {
            let explain = format!("explain select 1 from {table}");
            let query = async |connection: &mut sqlx::MySqlConnection| {
                sqlx::raw_sql(AssertSqlSafe(explain)).execute(connection).await
            };
            match self.run_pooled(query).await {
                Err(error) if server_error_number(&error) == Some(1146) => return Ok(false),
                Err(error) if !is_denied(&error) => return Err(error),
                _ => {}
            }
        }
        Ok(true)
    }

    /// Checks whether the user has this privilege on a table; `create` is checked for the database.
    ///
    /// The server checks privileges, including those of roles, before it plans or prepares a
    /// statement. No statement is executed, so nothing changes.
    pub(crate) async fn check_privilege(
        &self,
        privilege: &str,
        table: &str,
    ) -> Result<PrivilegeCheck, sqlx::Error> {
        let column = match table {
            "events" => "event_type",
            "event_log" => "published",
            "projectors" => "name",
            _ => "version",
        };
        let query = match privilege {
            // Preparing an `alter` checks no privilege. Executing this one does, and then fails
            // because the column does not exist.
            "alter" => format!("alter table {table} drop column projectionist_doctor"),
            "select" => format!("explain select 1 from {table}"),
            "insert" => format!("explain insert into {table} ({column}) values (0)"),
            "update" => format!("explain update {table} set {column} = {column}"),
            "delete" => format!("explain delete from {table}"),
            _ => "prepare projectionist_doctor from 'create table projectionist_doctor (n int)'"
                .into(),
        };
        let query = async |connection: &mut sqlx::MySqlConnection| {
            sqlx::raw_sql(AssertSqlSafe(query)).execute(&mut *connection).await?;
            // Fails unless the query was a `prepare`, which is harmless.
            let _ =
                sqlx::raw_sql("deallocate prepare projectionist_doctor").execute(connection).await;
            Ok(())
        };
        match self.run_pooled(query).await {
            Err(error) if is_denied(&error) => Ok(PrivilegeCheck::Denied),
            // Any other server error comes after the privilege check: a missing table, an invalid
            // value, a read-only server.
            Err(error) if server_error_number(&error).is_none() => Err(error),
            _ => Ok(PrivilegeCheck::Granted),
        }
    }

    /// The quoted name of the database.
    pub(crate) fn quoted_name(&self) -> String {
        let options = self.pool.connect_options();
        format!("`{}`", options.get_database().unwrap_or_default().replace('`', "``"))
    }

    /// The user, host, port and database, without the password.
    pub(crate) fn address(&self) -> String {
        address(&self.pool.connect_options())
    }
}

pub(super) fn address(options: &sqlx::mysql::MySqlConnectOptions) -> String {
    format!(
        "{}@{}:{}/{}",
        options.get_username(),
        options.get_host(),
        options.get_port(),
        options.get_database().unwrap_or_default()
    )
}

fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}
