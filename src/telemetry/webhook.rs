//! Alerts as HTTP: every log line with a field `alert` is posted, too. Never in the way of the work.

use std::fmt;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use crate::error::Error;

/// Alerts that wait to be posted. Beyond, they are in the log only.
const MOST_WAITING: usize = 64;

/// One attempt, from connection to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Attempts for one alert, and the pause before the second; it doubles.
const ATTEMPTS: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// How long the end of the process may wait for what was not posted yet.
const LAST_WORDS_WITHIN: Duration = Duration::from_secs(10);

/// Takes alerts out of the log, for the thread that posts them.
pub(super) struct Webhook {
    alerts: SyncSender<Value>,
}

/// The thread that posts. Dropped, it is given a little time to end.
pub(crate) struct Poster {
    /// Null tells it to end: the log itself never lets go of its sender.
    end: SyncSender<Value>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the thread that posts alerts to this URL.
pub(super) fn start(url: &str) -> Result<(Webhook, Poster), Error> {
    if !url.starts_with("http://") && !url.starts_with("https://") {
        return Err(Error::Input("the alert URL is not an http or https URL".into()));
    }
    let (alerts, waiting) = sync_channel(MOST_WAITING);
    let url = url.to_owned();
    let thread = std::thread::Builder::new().name("alerts".into()).spawn(move || post_all(&url, &waiting));
    let thread = thread.map_err(|error| Error::Input(format!("cannot start the thread that posts alerts: {error}")))?;
    Ok((Webhook { alerts: alerts.clone() }, Poster { end: alerts, thread: Some(thread) }))
}

fn post_all(url: &str, waiting: &Receiver<Value>) {
    let agent: ureq::Agent = ureq::Agent::config_builder().timeout_global(Some(ANSWER_WITHIN)).build().into();
    while let Ok(alert) = waiting.recv() {
        if alert.is_null() {
            return;
        }
        let body = alert.to_string();
        let mut pause = FIRST_PAUSE;
        for attempt in 1..=ATTEMPTS {
            let posted = agent.post(url).header("content-type", "application/json").send(&body);
            let Err(error) = posted else { break };
            // The URL may hold a secret, so only the error's kind is told. No field `alert`: that would come back here.
            if attempt == ATTEMPTS {
                tracing::warn!(
                    attempts = attempt,
                    error = kind(&error),
                    "an alert could not be posted; it is in the log only"
                );
            } else {
                std::thread::sleep(pause);
                pause *= 2;
            }
        }
    }
}

fn kind(error: &ureq::Error) -> String {
    match error {
        ureq::Error::StatusCode(code) => format!("status {code}"),
        ureq::Error::Timeout(_) => "no answer in time".into(),
        ureq::Error::HostNotFound => "host not found".into(),
        ureq::Error::Io(error) => error.kind().to_string(),
        _ => "it cannot be reached".into(),
    }
}

impl<S: Subscriber> Layer<S> for Webhook {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields(Map::new());
        event.record(&mut fields);
        let Fields(mut fields) = fields;
        if !fields.contains_key("alert") {
            return;
        }
        let at = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
        fields.insert("at".into(), at.into());
        fields.insert("level".into(), event.metadata().level().as_str().into());
        // What chat tools show; the rest is for machines.
        let text = text(&fields);
        fields.insert("text".into(), text.into());
        if let Err(TrySendError::Full(_)) = self.alerts.try_send(Value::Object(fields)) {
            tracing::warn!("too many alerts wait to be posted; this one is in the log only");
        }
    }
}

/// An alert in one line: what happened, and the fields that tell where.
fn text(fields: &Map<String, Value>) -> String {
    let message = fields.get("message").and_then(Value::as_str).unwrap_or_default();
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let details: Vec<String> = fields
        .iter()
        .filter(|(name, _)| !matches!(name.as_str(), "message" | "alert" | "at" | "level"))
        .map(|(name, value)| format!("{name}={}", plain(value)))
        .collect();
    format!("projectionist: {message} ({})", details.join(", "))
}

/// Collects the fields of a log line.
struct Fields(Map<String, Value>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().into(), format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(field.name().into(), value.into());
    }
}

impl Drop for Poster {
    /// Waits, but not for long, until everything is posted.
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        let began = Instant::now();
        let _ = self.end.try_send(Value::Null);
        while !thread.is_finished() && began.elapsed() < LAST_WORDS_WITHIN {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
