//! The error type of the library, and the rules that tell transient errors from permanent ones.

use sqlx::mysql::MySqlDatabaseError;

use crate::model::text;

/// Why a command or a call of the library failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A projector failed.
    #[error("{0}")]
    Projector(String),
    /// An audit found a fault in the log.
    #[error("{0}")]
    LogFault(String),
    /// The queue has messages that are not from this log.
    #[error("{0}")]
    ForeignMessages(String),
    /// A worker's loop has stopped turning.
    #[error("{0}")]
    Unhealthy(String),
    /// Wrong usage, configuration or input.
    #[error("{0}")]
    Input(String),
    /// The database or the queue cannot be reached.
    #[error("{0}")]
    Unreachable(String),
    /// A signal stopped the command before its end.
    #[error("interrupted; run it again, it goes on where it stopped")]
    Interrupted,
    /// The database refused a statement of this program.
    #[error("{}", explain(.0))]
    Database(#[from] sqlx::Error),
}

/// Server errors that say nothing about the statement, only about the moment: it may be tried
/// again.
///
/// Deadlock and lock wait time-out; a server that starts, stops, is full or has become read-only
/// (a failover leaves old connections on the former primary); an interrupted or killed session.
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

/// Table or column is not there: the tables were not made, or are of an older release.
const NOT_MIGRATED: &[u16] = &[1054, 1146];

/// The server's number for an error, if the server raised it.
pub(crate) fn server_error_number(error: &sqlx::Error) -> Option<u16> {
    let sqlx::Error::Database(error) = error else { return None };
    Some(error.try_downcast_ref::<MySqlDatabaseError>()?.number())
}

/// Whether the same thing may well succeed a moment later.
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

/// Whether the other end was gone while we were sending. (A session that is killed while it waits
/// for an answer ends in another way: with an error of the server's, or the end of the stream.)
pub(crate) fn is_connection_reset(error: &sqlx::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    matches!(error, sqlx::Error::Io(error) if matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset))
}

/// Whether no answer came in time, so that nobody knows what the other end does.
pub(crate) fn is_timeout(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Io(error) if error.kind() == std::io::ErrorKind::TimedOut)
}

/// Whether the server does not write, as a former primary after a failover. (1290 says of other
/// options, too, that they are in the way: `--secure-file-priv`.)
pub(crate) fn is_read_only(error: &sqlx::Error) -> bool {
    match server_error_number(error) {
        Some(1836) => true,
        Some(1290) => error.to_string().contains("read-only"),
        _ => false,
    }
}

/// The database's error in what a handler returned, somewhere in its chain of causes.
pub(crate) fn database_error(error: &anyhow::Error) -> Option<&sqlx::Error> {
    error.chain().find_map(|cause| cause.downcast_ref::<sqlx::Error>())
}

/// An error that may pass by itself.
pub(crate) trait Transient {
    /// Whether the same thing may well succeed a moment later.
    fn is_transient(&self) -> bool;
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

/// [`is_transient`], for what a handler returned: somewhere in its chain of causes.
pub(crate) fn has_transient_cause(error: &anyhow::Error) -> bool {
    database_error(error).is_some_and(is_transient)
}

/// An error with its causes, each once: some repeat their cause in their own words. Where errors
/// are kept to their numbers, without what a server said.
pub(crate) fn format_chain(error: &anyhow::Error) -> String {
    let message =
        error.chain().map(ToString::to_string).fold(String::new(), |message, cause| match message
            .as_str()
        {
            "" => cause,
            message if message.contains(&cause) => message.to_owned(),
            message => format!("{message}: {cause}"),
        });
    let server = database_error(error).and_then(sqlx::Error::as_database_error);
    match server.filter(|server| text::redacts_errors() && !server.message().is_empty()) {
        // A handler may have put the message into words of its own.
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
                "the database lacks our tables, or has those of another release ({error}); run `projectionist migrate`"
            )
        }
        Some(1050) => format!(
            "a table of that name is there already, and not of our making ({error}); rename it, or take another database"
        ),
        Some(1044 | 1142 | 1143 | 1227 | 1370) => {
            format!(
                "the database user may not do this ({error}); grant the privileges that docs/command-line.md lists"
            )
        }
        _ => format!("database: {error}"),
    }
}
