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

/// Starts logging, with a filter such as `info` or `projectionist=debug`.
pub(crate) fn start(format: LogFormat, filter: &str) -> Result<(), Error> {
    // A bare level is meant for us: the libraries below us say enough at warn.
    let ours = filter.bytes().all(|byte| byte.is_ascii_alphabetic()).then(|| format!("warn,projectionist={filter}"));
    let filter = EnvFilter::try_new(ours.as_deref().unwrap_or(filter))
        .map_err(|error| Error::Input(format!("the log filter {filter:?} cannot be read: {error}")))?;
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr);
    let is_terminal = stderr().is_terminal();
    let started = match format {
        LogFormat::Auto if is_terminal => logs.with_target(false).with_ansi(true).try_init(),
        LogFormat::Human => logs.with_target(false).with_ansi(is_terminal).try_init(),
        LogFormat::Auto | LogFormat::Json => logs.json().flatten_event(true).try_init(),
    };
    // A team's binary may have a subscriber of its own: then its logs are the right ones.
    let _ = started;
    Ok(())
}
