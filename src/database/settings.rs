//! Every session variable on which the protocol or the meaning of a handler depends.
//!
//! A server, an `init_connect` or a handler may set any of these variables. Each session therefore
//! sets all of them when it opens. [`Database::open`](super::Database::open) also reads them back
//! once, and refuses a server that does not accept a value; the error names the variable. A
//! handler's session is checked again with every commit (see
//! [`SessionSettings::unchanged_condition`]).

use std::sync::Arc;
use std::time::Duration;

use sqlx::{AssertSqlSafe, MySqlConnection, Row};

use super::Flavor;
use crate::database::error::{DatabaseError, server_error_number};

/// The SQL mode of projectors' statements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum SqlMode {
    /// The default of the server's release. It is strict: a value that does not fit is an error.
    #[default]
    Strict,
    /// The mode that is configured on the server.
    Server,
}

/// When a variable is compared with its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Check {
    /// At the first connection to the server.
    Once,
    /// At the first connection, and with every commit of a handler: if the handler changed the
    /// variable, its next batch would run with the wrong value.
    EachCommit,
    /// Like [`Check::EachCommit`], but the variable is never set, because setting it has an effect
    /// even with this value.
    EachCommitNeverSet,
}
use Check::{EachCommit, EachCommitNeverSet, Once};

/// The name of a variable, its value as SQL, when it is compared, and the consequence of
/// another value. A variable that the server does not have is skipped. With `a or b`, `a` is set
/// and both are accepted. A value that is not a literal is not compared at the first connection.
type Setting = (&'static str, &'static str, Check, &'static str);

/// The order matters: `max_join_size` resets `sql_big_selects`.
#[rustfmt::skip]
const SETTINGS: &[Setting] = &[
    ("completion_type", "'NO_CHAIN'", EachCommit, "CHAIN begins another transaction, RELEASE closes the connection"),
    // Under repeatable read, the probe of a gap takes gap locks, and a long transaction does not
    // see new commits.
    ("transaction_isolation", "'READ-COMMITTED'", EachCommit, "read uncommitted shows rows that are rolled back later"),
    // The name on MariaDB before 11.1.
    ("tx_isolation", "'READ-COMMITTED'", EachCommit, "read uncommitted shows rows that are rolled back later"),
    ("transaction_read_only", "0", EachCommit, "statements could not write"),
    // The name on MariaDB before 11.1.
    ("tx_read_only", "0", EachCommit, "statements could not write"),
    ("innodb_lock_wait_timeout", "50", Once, "a longer wait would count as a lost connection"),
    ("lock_wait_timeout", "60", Once, "a change of a table would wait for a year"),
    // By default, a session whose client has vanished would hold its projector's row for eight
    // hours.
    ("wait_timeout", "60", Once, "the session of a client that has vanished would keep its locks"),
    ("net_read_timeout", "60", Once, "a slow network would end a statement"),
    ("net_write_timeout", "60", Once, "the connection of a pausing reader would be closed"),
    ("idle_transaction_timeout", "0", Once, "a waiting handler's transaction would be ended"),
    ("idle_readonly_transaction_timeout", "0", Once, "a waiting handler's transaction would be ended"),
    ("idle_write_transaction_timeout", "0", Once, "a waiting handler's transaction would be ended"),
    ("max_statement_time", "0", EachCommit, "a long statement would be ended; the handler has its own time limit"),
    // The name on MySQL.
    ("max_execution_time", "0", EachCommit, "a long statement would be ended; the handler has its own time limit"),
    ("sql_select_limit", "18446744073709551615", EachCommit, "results would be truncated without an error"),
    ("max_join_size", "18446744073709551615", Once, "large reads would be refused"),
    ("sql_big_selects", "1", Once, "large reads would be refused"),
    ("sql_safe_updates", "0", Once, "updates without a key would be refused"),
    ("foreign_key_checks", "1", EachCommit, "broken references would be stored"),
    ("unique_checks", "1", EachCommit, "duplicates could be stored"),
    ("check_constraint_checks", "1", EachCommit, "rows that violate a CHECK would be stored"),
    ("sql_auto_is_null", "0", EachCommit, "`is null` would find the last inserted row"),
    ("sql_notes", "1", Once, "warnings would not be counted"),
    ("sql_warnings", "0", Once, "single-row inserts would return another kind of result"),
    ("auto_increment_increment", "1", EachCommit, "auto-increment numbers would differ"),
    ("auto_increment_offset", "1", EachCommit, "auto-increment numbers would differ"),
    // On MySQL, the row after `set insert_id = 0` gets the number 0.
    ("insert_id", "0", EachCommitNeverSet, "the next row would get this number"),
    ("group_concat_max_len", "1048576", EachCommit, "long lists would be truncated with only a warning"),
    ("div_precision_increment", "4", EachCommit, "quotients would have other digits"),
    ("default_week_format", "0", EachCommit, "week numbers would differ"),
    ("lc_time_names", "'en_US'", EachCommit, "names of months and days would differ"),
    ("max_sort_length", "1024", EachCommit, "long values would be sorted and grouped by their first bytes"),
    ("block_encryption_mode", "'aes-128-ecb'", EachCommit, "aes_encrypt would give other bytes"),
    ("cte_max_recursion_depth", "1000", EachCommit, "recursive queries would stop at another depth"),
    ("max_recursive_iterations", "4294967295", EachCommit, "recursive queries would be truncated with only a warning"),
    ("windowing_use_high_precision", "1", EachCommit, "sums over windows would have other digits"),
    ("default_regex_flags", "''", EachCommit, "patterns would match other text"),
    ("standard_compliant_cte", "1", EachCommit, "recursive queries would return other rows"),
    ("old_mode", OLD_MODE, EachCommit, "dates and duplicate keys would be treated as by an older release"),
    ("sql_if_exists", "0", EachCommit, "changing a table that does not exist would not be an error"),
    ("system_versioning_asof", "default", EachCommit, "tables with a history would be read as of another time"),
    ("default_storage_engine", "'InnoDB'", Once, "a setup would create tables without transactions"),
    ("enforce_storage_engine", "null or 'InnoDB'", Once, "a setup would create tables without transactions"),
    ("explicit_defaults_for_timestamp", "1", Once, "a setup's timestamp columns would change by themselves"),
    ("default_tmp_storage_engine", "'InnoDB'", Once, "temporary tables would have no transactions"),
    ("sql_buffer_result", "0", Once, "every result would be copied to a table first"),
    ("tmp_table_size", TMP_TABLE_SIZE, Once, "`group_concat(distinct …)` would repeat values if it is tiny"),
    ("big_tables", "0", Once, "every temporary table would be on disk"),
    ("updatable_views_with_limit", "1", Once, "updates of some views would be refused"),
    ("profiling", "0", Once, "every statement would be recorded"),
    ("time_zone", "'+00:00'", EachCommit, "timestamps would be stored and read in another zone"),
    ("character_set_client", "'utf8mb4'", EachCommit, "text would arrive as other characters"),
    ("character_set_results", "'utf8mb4'", EachCommit, "text would be read as other characters"),
    ("character_set_connection", "'utf8mb4'", EachCommit, "literals would be converted to other characters"),
];

/// The session keeps the server's choice of what the character set `utf8` means.
const OLD_MODE: &str =
    "if(find_in_set('UTF8_IS_UTF8MB3', @@global.old_mode), 'UTF8_IS_UTF8MB3', '')";

/// The server's value, but at least 1 MiB.
const TMP_TABLE_SIZE: &str = "cast(greatest(@@global.tmp_table_size, 1048576) as unsigned)";

/// A rollback that does not depend on `completion_type`. A session's first statement is one,
/// because an `init_connect` may have begun a transaction, in which some variables cannot be set.
/// After a handler has set `completion_type` to `RELEASE`, a mere `rollback` ends the connection.
pub(super) const PLAIN_ROLLBACK: &str = "rollback and no chain no release";

/// Disables the statement time limits, which may be too short even for the first statements.
/// MariaDB has the first variable, MySQL the second one.
pub(super) const DISABLE_TIME_LIMITS: [&str; 2] =
    ["set session max_statement_time = 0", "set session max_execution_time = 0"];

/// The default mode of a new server of this kind.
const STRICT_MYSQL: &str = "ONLY_FULL_GROUP_BY,STRICT_TRANS_TABLES,NO_ZERO_IN_DATE,NO_ZERO_DATE,\
                            ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION";
const STRICT_MARIADB: &str =
    "STRICT_TRANS_TABLES,ERROR_FOR_DIVISION_BY_ZERO,NO_AUTO_CREATE_USER,NO_ENGINE_SUBSTITUTION";

/// Modes that would change the meaning of a projector file's SQL.
const INCOMPATIBLE_MODES: &[&str] = &[
    "ANSI_QUOTES",
    "NO_BACKSLASH_ESCAPES",
    "ANSI",
    "ORACLE",
    "DB2",
    "MAXDB",
    "MSSQL",
    "POSTGRESQL",
];

/// The statements that set up a session on one server.
#[derive(Debug, Clone)]
pub(super) struct SessionSettings {
    /// Sets up a session for this program's own statements. They wait for a row lock for less time
    /// than a handler's statements do, so that a statement that gets no answer is soon recognized.
    pub(super) own: Arc<str>,
    /// Sets up a session for a handler. Autocommit is off, so that statements after a rollback can
    /// be rolled back, too.
    pub(super) handler: Arc<str>,
    /// Sets up a session for setups: like a handler's, but with autocommit.
    pub(super) setup: Arc<str>,
    /// Whether a handler's session is unchanged, as an SQL condition.
    unchanged_condition: Arc<str>,
    /// The variables in that condition, with their values as text.
    expected: Arc<[(String, String)]>,
    /// The default database.
    database: Arc<str>,
    /// The SQL mode of handlers.
    pub(super) sql_mode: SqlMode,
}

impl SessionSettings {
    /// Sets every variable in this session, reads them back, and builds the statements.
    ///
    /// # Errors
    /// [`DatabaseError::Settings`] with the variable's name if the server does not accept a value.
    pub(super) async fn probe(
        connection: &mut MySqlConnection,
        flavor: Flavor,
        sql_mode: SqlMode,
        collation: Option<&str>,
        own_lock_wait: Duration,
    ) -> Result<Self, DatabaseError> {
        let supported = list_supported(connection).await?;
        let is_supported =
            |name: &str| supported.iter().any(|supported| supported.eq_ignore_ascii_case(name));
        let settings: Vec<&Setting> =
            SETTINGS.iter().filter(|(name, ..)| is_supported(name)).collect();
        let strict = match flavor {
            Flavor::MySql => STRICT_MYSQL,
            Flavor::MariaDb => STRICT_MARIADB,
        };
        let collation = collation.unwrap_or(match flavor {
            Flavor::MySql => "utf8mb4_0900_ai_ci",
            Flavor::MariaDb => "utf8mb4_general_ci",
        });
        let mode = match sql_mode {
            SqlMode::Strict => strict.to_owned(),
            SqlMode::Server => {
                let server: String = sqlx::query_scalar("select @@global.sql_mode")
                    .fetch_one(&mut *connection)
                    .await?;
                let is_compatible =
                    |mode: &&str| !INCOMPATIBLE_MODES.contains(mode) && !mode.is_empty();
                server.split(',').filter(is_compatible).collect::<Vec<_>>().join(",")
            }
        };
        let Unsettable { restricted, fixed } = find_unsettable(connection, &settings).await?;
        let settings: Vec<&Setting> =
            settings.into_iter().filter(|(name, ..)| !fixed.contains(name)).collect();
        let common: String = settings
            .iter()
            .filter(|setting| is_set(setting) && !restricted.contains(&setting.0))
            .map(|setting| format!("{}, ", assignment(setting)))
            .collect();
        let text = format!("{common}collation_connection = '{collation}', timestamp = default");
        let set = |autocommit: u8, mode: &str| {
            format!(
                "{PLAIN_ROLLBACK}; set session {text}, sql_mode = '{mode}', \
                 autocommit = {autocommit}"
            )
        };

        let handler = set(0, &mode);
        sqlx::raw_sql(AssertSqlSafe(handler.clone())).execute(&mut *connection).await?;
        let mut names: Vec<&str> = settings.iter().map(|(name, ..)| *name).collect();
        names.extend(["sql_mode", "collation_connection", "autocommit"]);
        let values = read_variables(connection, &names).await?;
        for ((name, value, _, why), found) in settings.iter().zip(&values) {
            if !is_accepted(value, found) {
                return Err(DatabaseError::Settings(format!(
                    "sessions on this server have {name} = {found:?}, but must have {value}; \
                     otherwise {why}. Let the database user set it, or change it on the server"
                )));
            }
        }
        let each_commit = |name: &&str| {
            let setting = settings.iter().find(|(setting, ..)| setting == name);
            setting.is_none_or(|(.., check, _)| *check != Once)
        };
        let expected: Vec<(String, String)> = names
            .iter()
            .zip(&values)
            .filter(|(name, _)| each_commit(name))
            .map(|(name, value)| ((*name).to_owned(), value.clone()))
            .collect();
        let database: String =
            sqlx::query_scalar("select database()").fetch_one(&mut *connection).await?;
        let unchanged = build_condition(&expected, &database);
        sqlx::raw_sql("rollback").execute(connection).await?;
        // A variable may be set twice in one statement, and the last value stays.
        let lock_wait = own_lock_wait.as_secs();
        Ok(SessionSettings {
            own: format!("{}, innodb_lock_wait_timeout = {lock_wait}", set(1, strict)).into(),
            handler: handler.into(),
            setup: set(1, &mode).into(),
            unchanged_condition: unchanged.into(),
            expected: expected.into(),
            database: database.into(),
            sql_mode,
        })
    }

    /// An SQL condition that is true while a handler's session is unchanged. It compares the values
    /// that were read back and the default database, and checks that the clock is running.
    pub(super) fn unchanged_condition(&self) -> Arc<str> {
        Arc::clone(&self.unchanged_condition)
    }

    /// Returns the changes of a session as `variable is A and was B`; `None` if nothing has
    /// changed.
    pub(super) async fn find_changes(
        &self,
        connection: &mut MySqlConnection,
    ) -> Result<Option<String>, sqlx::Error> {
        let names: Vec<&str> = self.expected.iter().map(|(name, _)| name.as_str()).collect();
        let values = read_variables(connection, &names).await?;
        let mut changed: Vec<String> = self
            .expected
            .iter()
            .zip(&values)
            .filter(|((_, expected), found)| expected != *found)
            .map(|((name, expected), found)| format!("{name} is {found:?} and was {expected:?}"))
            .collect();
        let now: Option<String> =
            sqlx::query_scalar("select database() limit 1").fetch_one(&mut *connection).await?;
        if now.as_deref() != Some(&*self.database) {
            let now = now.as_deref().unwrap_or("none");
            changed.push(format!("the default database is {now} and was {}", self.database));
        }
        let clock: bool = sqlx::query_scalar(CLOCK_IS_RUNNING).fetch_one(&mut *connection).await?;
        if !clock {
            changed.push("timestamp is set, so that now() does not advance".into());
        }
        Ok((!changed.is_empty()).then(|| changed.join(", ")))
    }
}

/// `set timestamp` stops `now()`, but not `sysdate()`.
const CLOCK_IS_RUNNING: &str = "select abs(@@timestamp - unix_timestamp(sysdate())) < 5 limit 1";

/// Reads which variables of [`SETTINGS`] this server has.
async fn list_supported(connection: &mut MySqlConnection) -> Result<Vec<String>, DatabaseError> {
    let names: Vec<String> = SETTINGS.iter().map(|(name, ..)| format!("'{name}'")).collect();
    let show = format!("show session variables where variable_name in ({})", names.join(", "));
    let rows = sqlx::raw_sql(AssertSqlSafe(show)).fetch_all(connection).await?;
    rows.iter().map(|row| row.try_get(0).map_err(DatabaseError::Statement)).collect()
}

/// Reads variables as text, in this order.
async fn read_variables(
    connection: &mut MySqlConnection,
    names: &[&str],
) -> Result<Vec<String>, sqlx::Error> {
    // The server converts the values, because `character_set_results` may be wrong.
    let columns: Vec<String> = names
        .iter()
        .map(|name| format!("convert(coalesce(@@session.{name}, '') using ascii)"))
        .collect();
    // An explicit `limit` overrides `sql_select_limit`, which may be 0.
    let select = format!("select {} limit 1", columns.join(", "));
    let row = sqlx::raw_sql(AssertSqlSafe(select)).fetch_one(connection).await?;
    (0..names.len()).map(|column| row.try_get(column).map(as_number)).collect()
}

/// Converts a switch to the number with which SQL compares it.
fn as_number(value: String) -> String {
    match value.as_str() {
        "ON" | "YES" => "1".into(),
        "OFF" | "NO" => "0".into(),
        _ => value,
    }
}

/// Builds a condition that needs no type conversion: numbers are compared with numbers, text with
/// text.
fn build_condition(expected: &[(String, String)], database: &str) -> String {
    let mut condition = String::new();
    for (name, value) in expected {
        let is_number = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
        match (is_number, value.as_str()) {
            (true, "1") => condition.push_str(&format!("@@{name} and ")),
            (true, "0") => condition.push_str(&format!("not @@{name} and ")),
            (true, number) => condition.push_str(&format!("@@{name} = {number} and ")),
            (false, text) => condition.push_str(&format!("@@{name} = '{text}' and ")),
        }
    }
    let database = database.replace('\\', "\\\\").replace('\'', "''");
    condition.push_str(&format!(
        "database() = '{database}' and abs(@@timestamp - unix_timestamp(sysdate())) < 5"
    ));
    condition
}

/// Whether a value that was read back is an allowed one.
fn is_accepted(wanted: &str, found: &str) -> bool {
    wanted.split(" or ").any(|wanted| {
        let literal = wanted.trim_matches('\'');
        match (literal.parse::<f64>(), found.parse::<f64>()) {
            (Ok(wanted), Ok(found)) => wanted == found,
            _ if wanted == "null" => found.is_empty(),
            _ if wanted == "default" || wanted.contains('(') => true,
            _ => literal.eq_ignore_ascii_case(found),
        }
    })
}

fn is_set((_, _, check, _): &Setting) -> bool {
    *check != EachCommitNeverSet
}

fn assignment((name, value, ..): &Setting) -> String {
    format!("{name} = {}", value.split(" or ").next().unwrap_or(value))
}

/// Variables that a session cannot set.
#[derive(Debug, Default)]
struct Unsettable<'s> {
    /// Only an administrator may set these. They must already have their values, which is checked
    /// when they are read back.
    restricted: Vec<&'s str>,
    /// No session can set these in this release of the server. Their values are the server's
    /// choice.
    fixed: Vec<&'s str>,
}

/// Sets each variable, to find those that cannot be set.
///
/// # Errors
/// [`DatabaseError::Settings`] with the variable's name if the server refuses a value for another
/// reason.
async fn find_unsettable<'s>(
    connection: &mut MySqlConnection,
    settings: &[&'s Setting],
) -> Result<Unsettable<'s>, DatabaseError> {
    let set: Vec<&&Setting> = settings.iter().filter(|setting| is_set(setting)).collect();
    let all: Vec<String> = set.iter().map(|setting| assignment(setting)).collect();
    let all = format!("{PLAIN_ROLLBACK}; set session {}", all.join(", "));
    let mut unsettable = Unsettable::default();
    if sqlx::raw_sql(AssertSqlSafe(all)).execute(&mut *connection).await.is_ok() {
        return Ok(unsettable);
    }
    for setting in set {
        let (name, value, _, why) = setting;
        let one = format!("set session {}", assignment(setting));
        match sqlx::raw_sql(AssertSqlSafe(one)).execute(&mut *connection).await {
            Ok(_) => {}
            Err(error) if server_error_number(&error) == Some(1227) => {
                unsettable.restricted.push(*name)
            }
            Err(error) if server_error_number(&error) == Some(1238) => unsettable.fixed.push(*name),
            Err(error) if server_error_number(&error).is_none() => {
                return Err(DatabaseError::Statement(error));
            }
            Err(error) => {
                return Err(DatabaseError::Settings(format!(
                    "the server refuses to set {name} to {value} in a session, and with another \
                     value {why}: {error}"
                )));
            }
        }
    }
    Ok(unsettable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_variable_is_listed_once_with_a_reason() {
        for (index, (name, value, _, why)) in SETTINGS.iter().enumerate() {
            assert!(!value.is_empty() && !why.is_empty(), "{name}");
            assert!(
                SETTINGS[..index].iter().all(|(other, ..)| other != name),
                "{name} is listed twice"
            );
        }
    }

    #[test]
    fn only_allowed_setting_values_are_accepted() {
        for (wanted, found, accepted) in [
            ("0", "0", true),
            ("0", "0.000000", true),
            ("0", "1", false),
            ("'NO_CHAIN'", "NO_CHAIN", true),
            ("'InnoDB'", "INNODB", true),
            ("'InnoDB'", "MyISAM", false),
            ("null or 'InnoDB'", "", true),
            ("null or 'InnoDB'", "InnoDB", true),
            ("null or 'InnoDB'", "MyISAM", false),
            ("''", "", true),
            ("''", "EXTENDED", false),
            ("default", "anything", true),
            (OLD_MODE, "UTF8_IS_UTF8MB3", true),
        ] {
            assert_eq!(is_accepted(wanted, found), accepted, "{wanted} {found:?}");
        }
    }

    #[test]
    fn a_condition_compares_numbers_as_numbers_and_text_as_text() {
        let expected = [
            ("autocommit", "0"),
            ("unique_checks", "1"),
            ("div", "4"),
            ("zone", "+00:00"),
            ("flags", ""),
        ];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert!(build_condition(&expected, "app").starts_with(
            "not @@autocommit and @@unique_checks and @@div = 4 and @@zone = '+00:00' \
             and @@flags = '' and database() = 'app'"
        ));
    }
}
