//! The error type of the database, and the classification of the driver's errors.

use sqlx::mysql::MySqlDatabaseError;

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

/// Server errors that a retry can cure: they depend on the moment and not on the statement.
///
/// They are a deadlock, a lock wait timeout, an interrupted or killed session, and a server that is
/// starting, stopping, full or read-only. After a failover, old connections still lead to the
/// former primary, which is read-only.
const TRANSIENT: &[u16] = &[
    1040, // too many connections
    1053, // server shutdown in progress
    1152, // aborted connection
    1158, 1159, 1160, 1161, // network packets
    1203, // user has too many connections
    1205, // lock wait timeout
    1213, // deadlock
    1317, // query interrupted
    1927, // MariaDB: connection was killed
    3100, 3101, // group replication rolled the transaction back
    3572, // nowait and the row is locked
    4031, // disconnected for inactivity
];

/// The session was killed: 1927 on MariaDB, 3169 on MySQL.
const SESSION_KILLED: &[u16] = &[1927, 3169];

/// A table or a column is missing: the tables were not created, or are of an older release.
const NOT_MIGRATED: &[u16] = &[1054, 1146];

/// The server's error number; `None` if the error is not from the server.
pub(crate) fn server_error_number(error: &sqlx::Error) -> Option<u16> {
    let sqlx::Error::Database(error) = error else { return None };
    Some(error.try_downcast_ref::<MySqlDatabaseError>()?.number())
}

/// Whether a retry of the same statement may succeed.
pub(crate) fn is_transient(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => true,
        error if is_read_only(error) => true,
        error => server_error_number(error).is_some_and(|number| TRANSIENT.contains(&number)),
    }
}

/// Whether the server ended the session or the network lost it. A timeout is not included: the
/// server may still hold such a session.
pub(crate) fn is_connection_lost(error: &sqlx::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    match error {
        sqlx::Error::Io(error) => {
            matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
        }
        error => server_error_number(error).is_some_and(|number| SESSION_KILLED.contains(&number)),
    }
}

/// Whether no answer arrived in time. The statement may still be running, or may have been
/// executed.
pub(crate) fn is_timeout(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Io(error) if error.kind() == std::io::ErrorKind::TimedOut)
}

/// Whether the server is read-only, like a former primary after a failover. Error 1290 also reports
/// other options, such as `--secure-file-priv`, so its text is checked.
pub(crate) fn is_read_only(error: &sqlx::Error) -> bool {
    match server_error_number(error) {
        Some(1836) => true,
        Some(1290) => error.to_string().contains("read-only"),
        _ => false,
    }
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
    let error = error.to_string();
    let error = text::redact(&error);
    match number {
        Some(number) if NOT_MIGRATED.contains(&number) => {
            format!(
                "the tables of projectionist are missing or belong to another release ({error}); \
                 run `projectionist migrate`"
            )
        }
        Some(1050) => format!(
            "a table of that name exists and projectionist did not create it ({error}); \
             rename it, or use another database"
        ),
        Some(1044 | 1142 | 1143 | 1227 | 1370) => {
            format!(
                "the database user lacks a privilege ({error}); grant the privileges that \
                 docs/command-line.md lists for this command"
            )
        }
        _ => format!("database: {error}"),
    }
}
