//! Logs: for people on a terminal, one JSON object a line elsewhere; always to standard error.

use std::io::{IsTerminal, stderr};

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

use crate::error::Error;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people on a terminal, JSON elsewhere.
    Auto,
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

impl LogFormat {
    fn is_json(self) -> bool {
        match self {
            LogFormat::Auto => !stderr().is_terminal(),
            LogFormat::Human => false,
            LogFormat::Json => true,
        }
    }
}

/// Says why a command did not end well: among JSON lines as one of them, so that every line of the log can be
/// read, and an alarm on errors sees this one, too.
pub(crate) fn report(error: &Error, format: LogFormat) {
    // Not where the filter, or a filter that could not be read, would swallow it.
    match format.is_json() && tracing::enabled!(tracing::Level::ERROR) {
        true => tracing::error!("{error}"),
        false => eprintln!("error: {error}"),
    }
}

/// Starts logging, with a filter such as `info` or `projectionist=debug`.
pub(crate) fn start(format: LogFormat, filter: &str) -> Result<(), Error> {
    // A bare level is meant for us: the libraries below us say enough at warn.
    let ours = filter.bytes().all(|byte| byte.is_ascii_alphabetic()).then(|| format!("warn,projectionist={filter}"));
    let filter = EnvFilter::try_new(ours.as_deref().unwrap_or(filter))
        .map_err(|error| Error::Input(format!("the log filter {filter:?} cannot be read: {error}")))?;
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr);
    let started = match format.is_json() {
        true => logs.json().flatten_event(true).try_init(),
        false => logs.with_target(false).with_ansi(stderr().is_terminal()).try_init(),
    };
    // A team's binary may have a subscriber of its own: then its logs are the right ones.
    let _ = started;
    Ok(())
}
