//! The exit code of every way in which a command can fail.

use std::process::ExitCode;

use crate::engine::error::Error;
use crate::model::backoff::Transient;

/// Something failed that the operator asked about: a projector, an audit, a health check.
const FAILED: u8 = 1;

/// Wrong usage, configuration or input. A retry fails in the same way.
pub(super) const USAGE: u8 = 2;

/// The database or the queue cannot be reached. A later retry may succeed.
const UNREACHABLE: u8 = 3;

/// The code of a process that SIGTERM kills: 128 + 15.
const TERMINATED: u8 = 143;

/// Returns the exit code for `error`.
pub(super) fn exit_code(error: &Error) -> ExitCode {
    ExitCode::from(match error {
        Error::Projector(_)
        | Error::LogFault(_)
        | Error::ForeignMessages(_)
        | Error::Unhealthy(_) => FAILED,
        Error::Interrupted => TERMINATED,
        error if error.is_transient() => UNREACHABLE,
        _ => USAGE,
    })
}
