//! Logs: for people on a terminal, one JSON object a line elsewhere; always to standard error. Alerts go to a
//! web hook besides, where one is named.

mod webhook;

use std::io::{IsTerminal, stderr};

use clap::ValueEnum;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, fmt};

use crate::error::Error;
use webhook::Poster;

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

/// Logging that was started; dropped at the end of the process, it posts the last alerts.
pub(crate) struct Telemetry {
    _poster: Option<Poster>,
}

/// Starts logging, with a filter such as `info` or `projectionist=debug`, and posts alerts to `alert_url`.
pub(crate) fn start(format: LogFormat, filter: &str, alert_url: Option<&str>) -> Result<Telemetry, Error> {
    // A bare level is meant for us: the libraries below us say enough at warn.
    let ours = filter.bytes().all(|byte| byte.is_ascii_alphabetic()).then(|| format!("warn,projectionist={filter}"));
    let filter = EnvFilter::try_new(ours.as_deref().unwrap_or(filter))
        .map_err(|error| Error::Input(format!("the log filter {filter:?} cannot be read: {error}")))?;
    let is_terminal = stderr().is_terminal();
    let logs = fmt::layer().with_writer(stderr);
    let logs = match format {
        LogFormat::Auto if is_terminal => logs.with_target(false).with_ansi(true).boxed(),
        LogFormat::Human => logs.with_target(false).with_ansi(is_terminal).boxed(),
        LogFormat::Auto | LogFormat::Json => logs.json().flatten_event(true).boxed(),
    };
    let (webhook, poster) = alert_url.map(webhook::start).transpose()?.unzip();
    // A team's binary may have a subscriber of its own: then its logs are the right ones.
    let _ = tracing_subscriber::registry().with(logs.with_filter(filter)).with(webhook).try_init();
    Ok(Telemetry { _poster: poster })
}
