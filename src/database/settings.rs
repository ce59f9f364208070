//! Every session variable that the protocol or a handler's meaning depends on, in one place.
//!
//! A server, an `init_connect` or a handler may set any of these. So each session of ours sets all
//! of them when it opens, and [`Database::open`](super::Database::open) reads them back once: a
//! server that does not take a value is refused, with the variable's name. A handler's session is
//! checked again with every commit (see [`SessionSettings::unchanged_condition`]).

use std::sync::Arc;

use sqlx::{AssertSqlSafe, MySqlConnection, Row};

use super::Flavor;
use crate::model::error::{Error, server_error_number};

/// Which modes a projector's statements run in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum SqlMode {
    /// The default of the server's release, which is strict: a value that does not fit is an error.
    #[default]
    Strict,
    /// What the server is configured with.
    Server,
}

/// When a variable is compared with its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Check {
    /// When the server is first seen.
    Once,
    /// And with every commit of a handler: another value would change what its next batch does.
    EachCommit,
    /// Like [`Check::EachCommit`], and the variable is never set: even setting it to this value has
    /// an effect.
    EachCommitNeverSet,
}
use Check::{EachCommit, EachCommitNeverSet, Once};

/// A variable, its value as SQL, when it is compared, and why it is here. One that a server does
/// not have is left out. In `a or b`, the first is set, and both are accepted. What is no literal
/// is not compared when the server is first seen.
type Setting = (&'static str, &'static str, Check, &'static str);

/// In this order: `max_join_size` resets `sql_big_selects`.
#[rustfmt::skip]
const SETTINGS: &[Setting] = &[
    ("completion_type", "'NO_CHAIN'", EachCommit, "CHAIN begins a transaction behind every commit, RELEASE hangs up"),
    // Under repeatable read the probe of a hole takes gap locks, and a long transaction does not
    // see new commits.
    ("transaction_isolation", "'READ-COMMITTED'", EachCommit, "read uncommitted shows rows that are rolled back later"),
    ("tx_isolation", "'READ-COMMITTED'", EachCommit, "the same, by its name on MariaDB before 11.1"),
    ("transaction_read_only", "0", EachCommit, "nothing can be written"),
    ("tx_read_only", "0", EachCommit, "the same, by its name on MariaDB before 11.1"),
    ("innodb_lock_wait_timeout", "50", Once, "a longer wait would count as a lost connection"),
    ("lock_wait_timeout", "60", Once, "a change of a table would wait for a year"),
    // A session whose client is gone without a word would hold its projector's row, by default for
    // eight hours.
    ("wait_timeout", "60", Once, "a silent session would keep its locks"),
    ("net_read_timeout", "60", Once, "a slow network would end a statement"),
    ("net_write_timeout", "60", Once, "a reader that pauses would be cut off"),
    ("idle_transaction_timeout", "0", Once, "a handler that waits for something else would be cut off"),
    ("idle_readonly_transaction_timeout", "0", Once, "the same"),
    ("idle_write_transaction_timeout", "0", Once, "the same"),
    ("max_statement_time", "0", EachCommit, "a long statement would be ended; the handler has its own time limit"),
    ("max_execution_time", "0", EachCommit, "the same, by its name on MySQL"),
    ("sql_select_limit", "18446744073709551615", EachCommit, "results would be cut off without an error"),
    ("max_join_size", "18446744073709551615", Once, "large reads would be refused"),
    ("sql_big_selects", "1", Once, "large reads would be refused"),
    ("sql_safe_updates", "0", Once, "updates without a key would be refused"),
    ("foreign_key_checks", "1", EachCommit, "broken references would be stored"),
    ("unique_checks", "1", EachCommit, "duplicates could be stored"),
    ("check_constraint_checks", "1", EachCommit, "what a CHECK forbids would be stored"),
    ("sql_auto_is_null", "0", EachCommit, "`is null` would find the last inserted row"),
    ("sql_notes", "1", Once, "warnings would not be counted"),
    ("sql_warnings", "0", Once, "single-row inserts would answer in another form"),
    ("auto_increment_increment", "1", EachCommit, "numbers that tables give out would differ"),
    ("auto_increment_offset", "1", EachCommit, "numbers that tables give out would differ"),
    // On MySQL, the row after `set insert_id = 0` gets the number 0.
    ("insert_id", "0", EachCommitNeverSet, "the next row would get this number"),
    ("group_concat_max_len", "1048576", EachCommit, "long lists would be cut off with a warning only"),
    ("div_precision_increment", "4", EachCommit, "quotients would have other digits"),
    ("default_week_format", "0", EachCommit, "week numbers would differ"),
    ("lc_time_names", "'en_US'", EachCommit, "names of months and days would differ"),
    ("max_sort_length", "1024", EachCommit, "long values would be sorted and grouped by their beginning"),
    ("block_encryption_mode", "'aes-128-ecb'", EachCommit, "aes_encrypt would give other bytes"),
    ("cte_max_recursion_depth", "1000", EachCommit, "recursive queries would end elsewhere"),
    ("max_recursive_iterations", "4294967295", EachCommit, "recursive queries would be cut off with a warning only"),
    ("windowing_use_high_precision", "1", EachCommit, "sums over windows would have other digits"),
    ("default_regex_flags", "''", EachCommit, "patterns would match something else"),
    ("standard_compliant_cte", "1", EachCommit, "recursive queries would give other rows"),
    ("old_mode", OLD_MODE, EachCommit, "dates and duplicate keys would be treated as by an older release"),
    ("sql_if_exists", "0", EachCommit, "a change of a table that is not there would not be an error"),
    ("system_versioning_asof", "default", EachCommit, "tables with a history would be read as of another time"),
    ("default_storage_engine", "'InnoDB'", Once, "a setup would make tables without transactions"),
    ("enforce_storage_engine", "null or 'InnoDB'", Once, "a setup would make tables without transactions"),
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

/// What the character set `utf8` is stays the server's choice.
const OLD_MODE: &str =
    "if(find_in_set('UTF8_IS_UTF8MB3', @@global.old_mode), 'UTF8_IS_UTF8MB3', '')";

/// The server's, unless it is tiny.
const TMP_TABLE_SIZE: &str = "cast(greatest(@@global.tmp_table_size, 1048576) as unsigned)";

/// An `init_connect` may have begun a transaction, in which some variables cannot be set. In words
/// that do not depend on `completion_type`.
const PLAIN_ROLLBACK: &str = "rollback and no chain no release";

/// The limits of time of a statement, which may be too short even for the first look at a server.
/// Each is of one kind of server.
pub(super) const DISABLE_TIME_LIMITS: [&str; 2] =
    ["set session max_statement_time = 0", "set session max_execution_time = 0"];

/// The modes that a new server of this kind has.
const STRICT_MYSQL: &str = "ONLY_FULL_GROUP_BY,STRICT_TRANS_TABLES,NO_ZERO_IN_DATE,NO_ZERO_DATE,\
                            ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION";
const STRICT_MARIADB: &str =
    "STRICT_TRANS_TABLES,ERROR_FOR_DIVISION_BY_ZERO,NO_AUTO_CREATE_USER,NO_ENGINE_SUBSTITUTION";

/// Modes in which a projector file's text would mean something else than what was read.
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

/// The statements that make a session what the protocol needs, for one server.
#[derive(Debug, Clone)]
pub(super) struct SessionSettings {
    /// For our own statements.
    pub(super) own: Arc<str>,
    /// For a handler: no statement commits by itself, so that what follows a rollback can be rolled
    /// back, too.
    pub(super) handler: Arc<str>,
    /// For setups: as for a handler, but each statement commits.
    pub(super) setup: Arc<str>,
    /// A condition that holds in a handler's session as long as nothing has changed it.
    unchanged_condition: Arc<str>,
    /// The variables in that condition, and their values as text.
    expected: Arc<[(String, String)]>,
    /// The default database.
    database: Arc<str>,
    /// Which modes the handlers' are.
    pub(super) sql_mode: SqlMode,
}

impl SessionSettings {
    /// Sets everything in this session, reads it back, and makes the statements of it.
    ///
    /// # Errors
    /// [`Error::Input`] with the variable's name where the server does not take a value.
    pub(super) async fn probe(
        connection: &mut MySqlConnection,
        flavor: Flavor,
        sql_mode: SqlMode,
        collation: Option<&str>,
    ) -> Result<Self, Error> {
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
                let is_fine = |mode: &&str| !INCOMPATIBLE_MODES.contains(mode) && !mode.is_empty();
                server.split(',').filter(is_fine).collect::<Vec<_>>().join(",")
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
                "{PLAIN_ROLLBACK}; set session {text}, sql_mode = '{mode}', autocommit = {autocommit}"
            )
        };

        let handler = set(0, &mode);
        sqlx::raw_sql(AssertSqlSafe(handler.clone())).execute(&mut *connection).await?;
        let mut names: Vec<&str> = settings.iter().map(|(name, ..)| *name).collect();
        names.extend(["sql_mode", "collation_connection", "autocommit"]);
        let values = read_variables(connection, &names).await?;
        for ((name, value, _, why), found) in settings.iter().zip(&values) {
            if !is_accepted(value, found) {
                return Err(Error::Input(format!(
                    "sessions on this server have {name} = {found:?}, and must have {value}, for otherwise {why}; let the \
                     database user set it, or change it on the server"
                )));
            }
        }
        let each_commit = |name: &&str| match settings.iter().find(|(setting, ..)| setting == name)
        {
            Some((.., check, _)) => *check != Once,
            None => true,
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
        Ok(SessionSettings {
            own: set(1, strict).into(),
            handler: handler.into(),
            setup: set(1, &mode).into(),
            unchanged_condition: unchanged.into(),
            expected: expected.into(),
            database: database.into(),
            sql_mode,
        })
    }

    /// A condition that holds as long as nothing has changed a handler's session: the values that
    /// were read back, the default database, and a clock that goes.
    pub(super) fn unchanged_condition(&self) -> Arc<str> {
        Arc::clone(&self.unchanged_condition)
    }

    /// What has been changed in a session, as `variable is A and was B`; `None` if nothing was.
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
            changed.push("timestamp is set, so that now() stands still".into());
        }
        Ok((!changed.is_empty()).then(|| changed.join(", ")))
    }
}

/// `sysdate` goes on where `set timestamp` has stopped `now`.
const CLOCK_IS_RUNNING: &str = "select abs(@@timestamp - unix_timestamp(sysdate())) < 5 limit 1";

/// The session variables that this server has, of those that are of interest.
async fn list_supported(connection: &mut MySqlConnection) -> Result<Vec<String>, Error> {
    let names: Vec<String> = SETTINGS.iter().map(|(name, ..)| format!("'{name}'")).collect();
    let show = format!("show session variables where variable_name in ({})", names.join(", "));
    let rows = sqlx::raw_sql(AssertSqlSafe(show)).fetch_all(connection).await?;
    rows.iter().map(|row| row.try_get(0).map_err(Error::Database)).collect()
}

/// Variables as text, in this order.
async fn read_variables(
    connection: &mut MySqlConnection,
    names: &[&str],
) -> Result<Vec<String>, sqlx::Error> {
    // Converted here, for `character_set_results` may be wrong.
    let columns: Vec<String> = names
        .iter()
        .map(|name| format!("convert(coalesce(@@session.{name}, '') using ascii)"))
        .collect();
    // `sql_select_limit` may be 0, and a `limit` stands above it.
    let select = format!("select {} limit 1", columns.join(", "));
    let row = sqlx::raw_sql(AssertSqlSafe(select)).fetch_one(connection).await?;
    (0..names.len()).map(|column| row.try_get(column).map(as_number)).collect()
}

/// A switch as SQL compares it, whichever way the server prints it.
fn as_number(value: String) -> String {
    match value.as_str() {
        "ON" | "YES" => "1".into(),
        "OFF" | "NO" => "0".into(),
        _ => value,
    }
}

/// Compared without a conversion: a number with a number, text with text.
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

/// Whether a value that was read back is one of those that are wanted.
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

/// Variables that a session of ours does not set.
#[derive(Debug, Default)]
struct Unsettable<'s> {
    /// The server lets only an administrator set them. They must have their values already: that is
    /// checked when they are read back.
    restricted: Vec<&'s str>,
    /// In this release of the server, no session can set them: what they do is the server's choice.
    fixed: Vec<&'s str>,
}

/// Sets each variable, to find those that cannot be set.
///
/// # Errors
/// [`Error::Input`] with the variable's name where the server refuses a value for another reason.
async fn find_unsettable<'s>(
    connection: &mut MySqlConnection,
    settings: &[&'s Setting],
) -> Result<Unsettable<'s>, Error> {
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
                return Err(Error::Database(error));
            }
            Err(error) => {
                return Err(Error::Input(format!(
                    "the server does not let a session set {name} to {value}, and with another value {why}: {error}"
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
            "not @@autocommit and @@unique_checks and @@div = 4 and @@zone = '+00:00' and @@flags = '' and database() = 'app'"
        ));
    }
}
