//! Logging, alerts and metrics. Log lines go to standard error: as text on a terminal, otherwise as
//! one JSON object per line. Alerts are also posted to a webhook, if one is configured. Metrics, if
//! enabled, are written as log lines.

mod emf;
pub(crate) mod progress;
mod reporter;
mod webhook;

use std::fmt;
use std::io::{IsTerminal, Write, stderr};

use anstream::{AutoStream, ColorChoice};
use anstyle::AnsiColor;
use clap::ValueEnum;
use tracing::field::Field;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::filter::{FilterExt, LevelFilter, filter_fn};
use tracing_subscriber::fmt::format::{Writer, debug_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::engine::error::Error;
use crate::model::text;
pub(crate) use reporter::{LagSource, MetricsFormat, Reporter, parse_service_name};
use webhook::Poster;

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Text on a terminal, otherwise JSON.
    Auto,
    /// Text.
    Human,
    /// One JSON object per line.
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

/// Logging that was started. Dropping it at the end of the process posts the last alerts.
pub(crate) struct Telemetry {
    _poster: Option<Poster>,
}

/// Starts logging with a filter such as `info` or `projectionist=debug`, and posts the alerts of
/// `service` to `alert_url`. Alerts are logged regardless of the filter, because alarms are made
/// from the log.
pub(crate) fn start(
    format: LogFormat,
    filter: &str,
    alert_url: Option<&str>,
    service: &str,
) -> Result<Telemetry, Error> {
    // A bare level applies to our own code. Libraries log at warn.
    let scoped_filter = filter
        .bytes()
        .all(|byte| byte.is_ascii_alphabetic())
        .then(|| format!("warn,projectionist={filter}"));
    let filter =
        EnvFilter::try_new(scoped_filter.as_deref().unwrap_or(filter)).map_err(|error| {
            Error::Input(format!("the log filter {filter:?} is not valid: {error}"))
        })?;
    let logs = if format.is_json() {
        tracing_subscriber::fmt::layer()
            .json()
            .flatten_event(true)
            .with_writer(JsonToStderr::default)
            .boxed()
    } else {
        tracing_subscriber::fmt::layer()
            .fmt_fields(debug_fn(write_field).delimited(" "))
            .with_writer(|| progress::LogWriter)
            .with_target(false)
            .with_ansi(AutoStream::choice(&stderr()) != ColorChoice::Never)
            .boxed()
    };
    let (webhook, poster) = alert_url.map(|url| webhook::start(url, service)).transpose()?.unzip();
    let alerts = || {
        let is_alert = filter_fn(|line| line.fields().field("alert").is_some());
        is_alert.with_max_level_hint(LevelFilter::WARN)
    };
    let webhook = webhook.map(|webhook| webhook.with_filter(alerts()));
    if format.is_json() {
        // A handler's panic is caught and logged. The default hook would first print lines that are
        // not JSON.
        std::panic::set_hook(Box::new(|panic| {
            let location = panic.location().map(ToString::to_string);
            tracing::error!(
                location,
                "{}",
                panic.payload_as_str().unwrap_or("a panic without a message")
            );
        }));
    }
    // This fails if the binary has installed a subscriber of its own, which is then used.
    let _ = tracing_subscriber::registry()
        .with(logs.with_filter(filter.or(alerts())))
        .with(webhook)
        .try_init();
    Ok(Telemetry { _poster: poster })
}

/// Logs why a command failed. With JSON logs, the error is a JSON line, too, so that every line can
/// be parsed and an alarm on errors sees it.
pub(crate) fn log_error(error: &Error, format: LogFormat) {
    // A filter can drop errors, and with an invalid filter there is no log.
    if format.is_json() && tracing::enabled!(tracing::Level::ERROR) {
        tracing::error!("{error}");
    } else {
        let style = AnsiColor::Red.on_default().bold();
        let error = text::escape_control_lines(&text::redact(&error.to_string()));
        anstream::eprintln!("{style}error:{style:#} {error}");
    }
}

/// Writes a field as text. Control characters are escaped, so that a value cannot move the cursor
/// or begin a line.
fn write_field(writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
    let value = format!("{value:?}");
    let value = text::redact(&value);
    let value = text::escape_control(&value);
    match field.name() {
        "message" => write!(writer, "{value}"),
        // The source location of a library that logs with the crate `log`.
        name if name.starts_with("log.") => Ok(()),
        name => write!(writer, "{name}={value}"),
    }
}

/// Writes lines of JSON to standard error, each with one write.
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
        progress::LogWriter.write_all(text::redact_json(&line).as_bytes())
    }
}

impl Drop for JsonToStderr {
    fn drop(&mut self) {
        if !self.0.is_empty() {
            // A log line that cannot be written cannot be reported either.
            let _ = self.flush();
        }
    }
}
