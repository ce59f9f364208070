//! Logs: for people on a terminal, one JSON object a line elsewhere; always to standard error.
//! Alerts go to a web hook besides, where one is named. Metrics, where they are asked for, are
//! lines among those of the log.

mod emf;
mod reporter;
mod webhook;

use std::fmt;
use std::io::{IsTerminal, Write, stderr};

use clap::ValueEnum;
use tracing::field::Field;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::filter::{FilterExt, LevelFilter, filter_fn};
use tracing_subscriber::fmt::format::{Writer, debug_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::model::error::Error;
use crate::model::text;
pub(crate) use reporter::{LagSource, MetricsFormat, Reporter, parse_service_name};
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

impl LogFormat {
    fn is_json(self) -> bool {
        match self {
            LogFormat::Auto => !stderr().is_terminal(),
            LogFormat::Human => false,
            LogFormat::Json => true,
        }
    }
}

/// Logging that was started; dropped at the end of the process, it posts the last alerts.
pub(crate) struct Telemetry {
    _poster: Option<Poster>,
}

/// A field for a terminal: nothing in it moves the cursor or begins a line.
fn write_field(writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
    let value = format!("{value:?}");
    let value = text::redact(&value);
    let value = text::escape_control(&value);
    match field.name() {
        "message" => write!(writer, "{value}"),
        // What a library that logs by another crate says of its place.
        name if name.starts_with("log.") => Ok(()),
        name => write!(writer, "{name}={value}"),
    }
}

/// Standard error for lines of JSON. Each is written at once.
#[derive(Default)]
struct JsonToStderr(Vec<u8>);

impl Write for JsonToStderr {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let line = std::mem::take(&mut self.0);
        let line = String::from_utf8_lossy(&line);
        stderr().lock().write_all(text::redact_json(&line).as_bytes())
    }
}

impl Drop for JsonToStderr {
    fn drop(&mut self) {
        if !self.0.is_empty() {
            // As with every log line, nobody can be told that it cannot be written.
            let _ = self.flush();
        }
    }
}

/// Says why a command did not end well: among JSON lines as one of them, so that every line of the
/// log can be read, and an alarm on errors sees this one, too.
pub(crate) fn log_error(error: &Error, format: LogFormat) {
    // Not where the filter, or a filter that could not be read, would swallow it.
    match format.is_json() && tracing::enabled!(tracing::Level::ERROR) {
        true => tracing::error!("{error}"),
        false => {
            eprintln!("error: {}", text::escape_control_lines(&text::redact(&error.to_string())))
        }
    }
}

/// Starts logging, with a filter such as `info` or `projectionist=debug`, and posts alerts to
/// `alert_url`. What somebody should look at is in the log whatever the filter says: an alarm that
/// reads the log waits for it.
pub(crate) fn start(
    format: LogFormat,
    filter: &str,
    alert_url: Option<&str>,
) -> Result<Telemetry, Error> {
    // A bare level is meant for us: the libraries below us say enough at warn.
    let scoped_filter = filter
        .bytes()
        .all(|byte| byte.is_ascii_alphabetic())
        .then(|| format!("warn,projectionist={filter}"));
    let filter =
        EnvFilter::try_new(scoped_filter.as_deref().unwrap_or(filter)).map_err(|error| {
            Error::Input(format!("the log filter {filter:?} cannot be read: {error}"))
        })?;
    let logs = match format.is_json() {
        true => tracing_subscriber::fmt::layer()
            .json()
            .flatten_event(true)
            .with_writer(JsonToStderr::default)
            .boxed(),
        false => tracing_subscriber::fmt::layer()
            .fmt_fields(debug_fn(write_field).delimited(" "))
            .with_writer(stderr)
            .with_target(false)
            .with_ansi(stderr().is_terminal())
            .boxed(),
    };
    let (webhook, poster) = alert_url.map(webhook::start).transpose()?.unzip();
    let alerts = || {
        let is_alert = filter_fn(|line| line.fields().field("alert").is_some());
        is_alert.with_max_level_hint(LevelFilter::WARN)
    };
    let webhook = webhook.map(|webhook| webhook.with_filter(alerts()));
    if format.is_json() {
        // A handler's panic is caught and told, but the default would print lines that are no JSON
        // before that.
        std::panic::set_hook(Box::new(|panic| {
            let location = panic.location().map(ToString::to_string);
            tracing::error!(
                location,
                "{}",
                panic.payload_as_str().unwrap_or("a panic without a message")
            );
        }));
    }
    // A team's binary may have a subscriber of its own: then its logs are the right ones.
    let _ = tracing_subscriber::registry()
        .with(logs.with_filter(filter.or(alerts())))
        .with(webhook)
        .try_init();
    Ok(Telemetry { _poster: poster })
}
