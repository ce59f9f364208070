//! The error type of the commands and of the library's functions.

use crate::aws::AwsError;
use crate::database::DatabaseError;
use crate::declared::LoadError;
use crate::model::backoff::Transient;
use crate::queue::QueueError;

/// The reason for which a command or a function of the library failed.
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
    /// The loop of a worker makes no progress any more.
    #[error("{0}")]
    Unhealthy(String),
    /// The usage, the configuration or the input is wrong.
    #[error("{0}")]
    Input(String),
    /// A service was not ready in time, so the command stopped before its end.
    #[error("{0}")]
    Unreachable(String),
    /// A signal stopped the command before its end.
    #[error("interrupted; run it again: it continues where it stopped")]
    Interrupted,
    /// The projector files have errors.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The database cannot be used, or did not carry out a statement.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// The queue cannot be used, or did not carry out a call.
    #[error("the queue cannot be used: {0}")]
    Queue(#[from] QueueError),
    /// An AWS setting is wrong, or an AWS service did not carry out a call.
    #[error(transparent)]
    Aws(#[from] AwsError),
}

impl Transient for Error {
    fn is_transient(&self) -> bool {
        match self {
            Error::Unreachable(_) => true,
            Error::Database(error) => error.is_transient(),
            Error::Queue(error) => error.is_transient(),
            Error::Aws(error) => error.is_transient(),
            Error::Projector(_)
            | Error::LogFault(_)
            | Error::ForeignMessages(_)
            | Error::Unhealthy(_)
            | Error::Input(_)
            | Error::Interrupted
            | Error::Load(_) => false,
        }
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        Error::Database(error.into())
    }
}
