//! The outcome of a transaction that ended while a handler was running.
//!
//! A deadlock rolls back the whole transaction, and so does a handler's own `rollback`: nothing is
//! stored, and the batch may be applied again. A commit by the handler, or by a statement that
//! commits implicitly (DDL), stores a part of the batch without its position: the batch must never
//! be applied again. The server counts the commands of each session, and these counts tell the two
//! cases apart.

use std::collections::HashMap;

use sqlx::{AssertSqlSafe, MySqlConnection, Row};

use super::Database;
use super::session_cache::HandlerSession;
use super::settings::PLAIN_ROLLBACK;
use crate::database::error::server_error_number;

/// Makes sure that all counters are returned and readable. The server counts it as one more `set`.
const MAKE_COUNTS_READABLE: &str =
    "set session sql_select_limit = 18446744073709551615, names utf8mb4";

const SHOW_COMMAND_COUNTS: &str = "show session status like 'Com\\_%'";

/// The commands that open a session: one statement of the driver and one of this program.
const SETS_ON_OPEN: u64 = 2;
const BEGINS_ON_OPEN: u64 = 1;

/// Commands that never end a transaction. Every other command may have committed.
const NON_COMMITTING: &[&str] = &[
    "admin_commands",
    "call_procedure",
    "change_db",
    "compound_sql",
    "create_temporary_table",
    "dealloc_sql",
    "delete",
    "delete_multi",
    "do",
    "drop_temporary_table",
    "empty_query",
    "execute_immediate",
    "execute_sql",
    "explain_other",
    "get_diagnostics",
    "ha_close",
    "ha_open",
    "ha_read",
    "help",
    "insert",
    "insert_select",
    "kill",
    "multi",
    "prepare_sql",
    "release_savepoint",
    "replace",
    "replace_select",
    "resignal",
    "rollback",
    "rollback_to_savepoint",
    "savepoint",
    "select",
    "set_role",
    "signal",
    "stmt_close",
    "stmt_execute",
    "stmt_fetch",
    "stmt_prepare",
    "stmt_reprepare",
    "stmt_reset",
    "stmt_send_long_data",
    "update",
    "update_multi",
];

/// The commands that this program sent on a handler's session, as the server counts them.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct CommandCounts {
    commits: u64,
    sets: u64,
}

/// How a transaction ended that was open when the handler started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TransactionOutcome {
    /// The transaction was still open, and has now been rolled back.
    StillOpen,
    /// The whole transaction was rolled back, by the server or by the handler. Nothing is stored.
    RolledBack,
    /// A part of the transaction was, or may have been, committed by these commands.
    Committed(String),
}

impl HandlerSession {
    /// Records that this program committed on the session.
    pub(crate) fn record_commit(&mut self) {
        self.commands.commits += 1;
    }

    /// Records that this program set a variable on the session.
    pub(crate) fn record_set(&mut self) {
        self.commands.sets += 1;
    }
}

impl Database {
    /// Rolls back the transaction of a handler's session, and returns how the transaction of the
    /// batch ended.
    ///
    /// # Errors
    /// If the connection is lost. The outcome is then unknown.
    pub(crate) async fn roll_back(
        &self,
        session: &mut HandlerSession,
    ) -> Result<TransactionOutcome, sqlx::Error> {
        let release = format!("release savepoint {}; {PLAIN_ROLLBACK}", session.savepoint);
        let rolled_back = sqlx::raw_sql(AssertSqlSafe(release)).execute(&mut *session.connection);
        match self.with_short_timeout(rolled_back).await {
            Ok(_) => Ok(TransactionOutcome::StillOpen),
            Err(error) if server_error_number(&error).is_none() => Err(error),
            Err(_) => self.determine_outcome(session).await,
        }
    }

    /// Determines how a transaction ended whose savepoint is gone.
    ///
    /// # Errors
    /// If the connection is lost. The outcome is then unknown.
    pub(crate) async fn determine_outcome(
        &self,
        session: &mut HandlerSession,
    ) -> Result<TransactionOutcome, sqlx::Error> {
        let counts = async {
            let roll_back = format!("{PLAIN_ROLLBACK}; {MAKE_COUNTS_READABLE}");
            sqlx::raw_sql(AssertSqlSafe(roll_back)).execute(&mut *session.connection).await?;
            read_counts(&mut session.connection).await
        };
        let counts = self.with_short_timeout(counts).await?;
        session.record_set();
        Ok(classify(counts, session.commands))
    }
}

async fn read_counts(
    connection: &mut MySqlConnection,
) -> Result<HashMap<String, u64>, sqlx::Error> {
    let rows = sqlx::raw_sql(SHOW_COMMAND_COUNTS).fetch_all(connection).await?;
    let mut counts = HashMap::new();
    for row in rows {
        let (name, count): (String, String) = (row.try_get(0)?, row.try_get(1)?);
        counts.insert(
            name.trim_start_matches("Com_").to_lowercase(),
            count.parse().unwrap_or(u64::MAX),
        );
    }
    Ok(counts)
}

fn classify(counts: HashMap<String, u64>, ours: CommandCounts) -> TransactionOutcome {
    let expected = |name: &str| match name {
        "commit" => ours.commits,
        "begin" => BEGINS_ON_OPEN,
        "set_option" => SETS_ON_OPEN + ours.sets,
        _ => 0,
    };
    // A handler can make the server return fewer counters.
    if !["commit", "begin", "set_option"]
        .iter()
        .all(|name| counts.get(*name).is_some_and(|count| *count >= expected(name)))
    {
        return TransactionOutcome::Committed("the counters are unreadable".into());
    }
    let is_harmless = |name: &str| NON_COMMITTING.contains(&name) || name.starts_with("show_");
    let mut committed: Vec<String> = counts
        .iter()
        .filter(|(name, count)| !is_harmless(name) && **count > expected(name))
        .map(|(name, _)| name.replace('_', " "))
        .collect();
    committed.sort();
    if committed.is_empty() {
        TransactionOutcome::RolledBack
    } else {
        TransactionOutcome::Committed(committed.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(counts: &[(&str, u64)]) -> HashMap<String, u64> {
        let opened =
            [("begin", 1), ("set_option", 2), ("commit", 3), ("rollback", 4), ("create_table", 0)];
        opened.iter().chain(counts).map(|(name, count)| ((*name).to_owned(), *count)).collect()
    }

    #[test]
    fn an_unexpected_command_makes_a_transaction_count_as_committed() {
        let ours = CommandCounts { commits: 3, sets: 0 };
        assert_eq!(
            classify(counts(&[("insert", 9), ("call_procedure", 1), ("show_warnings", 1)]), ours),
            TransactionOutcome::RolledBack
        );
        for (name, count) in [
            ("commit", 4),
            ("begin", 2),
            ("set_option", 3),
            ("create_table", 1),
            ("no_such_command", 1),
        ] {
            let stored = classify(counts(&[(name, count)]), ours);
            assert_eq!(stored, TransactionOutcome::Committed(name.replace('_', " ")), "{name}");
        }
    }
}
