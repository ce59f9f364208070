//! The error type of the database, and the classification of the driver's errors.

use sqlx::mysql::MySqlDatabaseError;

pub(crate) use super::server_error::{ServerCondition, server_condition, server_error_number};
use crate::aws::AwsError;
use crate::model::backoff::Transient;
use crate::model::text;

/// Why the database cannot be used, or did not carry out a statement.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatabaseError {
    /// The URL, the credentials or a setting of the server is unsuitable. A retry fails in the same
    /// way.
    #[error("{0}")]
    Settings(String),
    /// AWS did not return the secret or the token that the credentials need.
    #[error(transparent)]
    Aws(#[from] AwsError),
    /// The server does not answer, or it refuses the credentials.
    #[error("{0}")]
    Unreachable(String),
    /// The server rejected a statement, or the connection was lost.
    #[error("{}", explain(.0))]
    Statement(#[from] sqlx::Error),
}

impl Transient for DatabaseError {
    fn is_transient(&self) -> bool {
        match self {
            DatabaseError::Settings(_) => false,
            DatabaseError::Aws(error) => error.is_transient(),
            DatabaseError::Unreachable(_) => true,
            DatabaseError::Statement(error) => is_transient(error),
        }
    }
}

/// A table or a column is missing: the tables were not created, or are of an older release.
const NOT_MIGRATED: &[u16] = &[1054, 1146];

/// Whether a retry of the same statement may succeed, without a person's action.
pub(crate) fn is_transient(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => true,
        error => server_condition(error).is_some() && !is_denied(error),
    }
}

/// Whether the account lacks a privilege or cannot log in. A retry may succeed on a new connection,
/// after a person has granted the privilege or changed the account.
pub(crate) fn is_denied(error: &sqlx::Error) -> bool {
    use ServerCondition::{Denied, Refused};
    matches!(server_condition(error), Some(Denied | Refused))
}

/// Whether the server ended the session or the network lost it. A timeout is not included: the
/// server may still hold such a session.
pub(crate) fn is_connection_lost(error: &sqlx::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    match error {
        sqlx::Error::Io(error) => {
            matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
        }
        error => server_condition(error) == Some(ServerCondition::SessionEnded),
    }
}

/// Whether no answer arrived in time. The statement may still be running, or may have been
/// executed.
pub(crate) fn is_timeout(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Io(error) if error.kind() == std::io::ErrorKind::TimedOut)
}

/// Whether all connections that are as old as this one must be replaced. They lead to a server that
/// is read-only since a failover, or they keep privileges that were changed.
pub(crate) fn is_connection_outdated(error: &sqlx::Error) -> bool {
    server_condition(error) == Some(ServerCondition::ReadOnly) || is_denied(error)
}

/// The first database error in the chain of causes of a handler's error.
pub(crate) fn database_error(error: &anyhow::Error) -> Option<&sqlx::Error> {
    error.chain().find_map(|cause| cause.downcast_ref::<sqlx::Error>())
}

impl Transient for sqlx::Error {
    fn is_transient(&self) -> bool {
        is_transient(self)
    }
}

impl Transient for anyhow::Error {
    fn is_transient(&self) -> bool {
        has_transient_cause(self)
    }
}

/// Whether the database error in the chain of causes, if there is one, is transient.
pub(crate) fn has_transient_cause(error: &anyhow::Error) -> bool {
    database_error(error).is_some_and(is_transient)
}

/// Whether the database error in the chain of causes, if there is one, is a missing privilege or a
/// refused account.
pub(crate) fn has_denied_cause(error: &anyhow::Error) -> bool {
    database_error(error).is_some_and(is_denied)
}

/// The error and its causes as one line. A cause whose text is already part of the line is left
/// out. If errors are redacted, the server's messages are replaced by their numbers.
pub(crate) fn format_chain(error: &anyhow::Error) -> String {
    let mut message = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if message.is_empty() {
            message = cause;
        } else if !message.contains(&cause) {
            message = format!("{message}: {cause}");
        }
    }
    let server = database_error(error).and_then(sqlx::Error::as_database_error);
    match server.filter(|server| text::redacts_errors() && !server.message().is_empty()) {
        // A handler may have quoted the server's message in a text of its own.
        Some(server) => {
            let number = server
                .try_downcast_ref::<MySqlDatabaseError>()
                .map_or(0, MySqlDatabaseError::number);
            let number = text::format_error_number(&number.to_string(), server.code().as_deref());
            text::redact(&message).replace(server.message(), &number)
        }
        None => text::redact(&message).into_owned(),
    }
}

fn explain(error: &sqlx::Error) -> String {
    let number = server_error_number(error);
    let condition = server_condition(error);
    let error = error.to_string();
    let error = text::redact(&error);
    match (number, condition) {
        (Some(number), _) if NOT_MIGRATED.contains(&number) => {
            format!(
                "the tables of projectionist are missing or belong to another release ({error}); \
                 run `projectionist migrate`"
            )
        }
        (Some(1050), _) => format!(
            "a table of that name exists and projectionist did not create it ({error}); \
             rename it, or use another database"
        ),
        (_, Some(ServerCondition::Denied)) => {
            format!(
                "the database user lacks a privilege ({error}); grant the privileges that \
                 docs/command-line.md lists for this command"
            )
        }
        (_, Some(ServerCondition::Refused)) => {
            format!(
                "the database refuses the account ({error}); check the user, the password and the \
                 account's state"
            )
        }
        _ => format!("database: {error}"),
    }
}
