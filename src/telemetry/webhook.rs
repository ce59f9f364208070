//! Alerts as HTTP: every log line with a field `alert` is posted, too. Never in the way of the
//! work.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
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

use crate::model::error::Error;
use crate::model::text;

/// Alerts that wait to be posted. Beyond, they are in the log only.
const MAX_QUEUED_ALERTS: usize = 64;

/// One attempt, from connection to answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Attempts for one alert, and the pause before the second; it doubles.
const MAX_ATTEMPTS: u32 = 4;
const INITIAL_BACKOFF: Duration = Duration::from_millis(500);

/// How long the end of the process may wait for what was not posted yet.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Takes alerts out of the log, for the thread that posts them.
pub(super) struct WebhookLayer {
    alerts: SyncSender<Value>,
}

/// The thread that posts. Dropped, it is given a little time to end.
pub(crate) struct Poster {
    /// Null tells it to end: the log itself never lets go of its sender.
    end: SyncSender<Value>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the thread that posts alerts to this URL.
pub(super) fn start(url: &str) -> Result<(WebhookLayer, Poster), Error> {
    if !url.starts_with("http://") && !url.starts_with("https://") {
        return Err(Error::Input("the alert URL is not an http or https URL".into()));
    }
    let (alerts, waiting) = sync_channel(MAX_QUEUED_ALERTS);
    let post = post_to(url);
    let thread =
        std::thread::Builder::new().name("alerts".into()).spawn(move || post_all(post, &waiting));
    let thread = thread.map_err(|error| {
        Error::Input(format!("cannot start the thread that posts alerts: {error}"))
    })?;
    Ok((WebhookLayer { alerts: alerts.clone() }, Poster { end: alerts, thread: Some(thread) }))
}

/// Why a post failed, without the URL, which may hold a secret.
type PostError = String;

/// Posts alerts until it is told to end. A post that panics is one that failed: the thread goes on
/// with the next.
fn post_all(post: impl Fn(&str) -> Result<(), PostError>, waiting: &Receiver<Value>) {
    while let Ok(alert) = waiting.recv() {
        if alert.is_null() {
            return;
        }
        let body = alert.to_string();
        let mut backoff = INITIAL_BACKOFF;
        for attempt in 1..=MAX_ATTEMPTS {
            let posted = catch_unwind(AssertUnwindSafe(|| post(&body)))
                .unwrap_or_else(|_| Err("it panicked".into()));
            let Err(error) = posted else { break };
            // No field `alert`: that would come back here.
            if attempt == MAX_ATTEMPTS {
                tracing::warn!(
                    attempts = attempt,
                    error,
                    "an alert could not be posted; it is in the log only"
                );
            } else {
                std::thread::sleep(backoff);
                backoff *= 2;
            }
        }
    }
}

/// Posts one alert. A redirect is not followed: whoever answers by one would choose where alerts
/// go.
fn post_to(url: &str) -> impl Fn(&str) -> Result<(), PostError> + use<> {
    let config =
        ureq::Agent::config_builder().timeout_global(Some(REQUEST_TIMEOUT)).max_redirects(0);
    let (agent, url): (ureq::Agent, String) = (config.build().into(), url.to_owned());
    move |body| {
        let posted = agent.post(&url).header("content-type", "application/json").send(body);
        match posted.map_err(|error| describe_error(&error))?.status() {
            status if status.is_success() => Ok(()),
            status if status.is_redirection() => {
                Err(format!("status {}: redirects are not followed", status.as_u16()))
            }
            status => Err(format!("status {}", status.as_u16())),
        }
    }
}

fn describe_error(error: &ureq::Error) -> String {
    match error {
        ureq::Error::StatusCode(code) => format!("status {code}"),
        ureq::Error::Timeout(_) => "no answer in time".into(),
        ureq::Error::HostNotFound => "host not found".into(),
        ureq::Error::Io(error) => error.kind().to_string(),
        _ => "it cannot be reached".into(),
    }
}

impl<S: Subscriber> Layer<S> for WebhookLayer {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = FieldVisitor(Map::new());
        event.record(&mut fields);
        let FieldVisitor(mut fields) = fields;
        if !fields.contains_key("alert") {
            return;
        }
        let timestamp = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
        fields.insert("timestamp".into(), timestamp.into());
        fields.insert("level".into(), event.metadata().level().as_str().into());
        // What chat tools show; the rest is for machines.
        let text = alert_text(&fields);
        fields.insert("text".into(), text.into());
        match self.alerts.try_send(Value::Object(fields)) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => {
                tracing::warn!("too many alerts wait to be posted; this one is in the log only");
            }
            Err(TrySendError::Disconnected(_)) => {
                tracing::warn!(
                    "the thread that posts alerts has ended; this one is in the log only"
                );
            }
        }
    }
}

/// An alert in one line: what happened, and the fields that tell where.
fn alert_text(fields: &Map<String, Value>) -> String {
    let message = fields.get("message").and_then(Value::as_str).unwrap_or_default();
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let details: Vec<String> = fields
        .iter()
        .filter(|(name, _)| !matches!(name.as_str(), "message" | "alert" | "timestamp" | "level"))
        .map(|(name, value)| format!("{name}={}", plain(value)))
        .collect();
    escape_for_chat(&format!("projectionist: {message} ({})", details.join(", ")))
}

/// Slack's format for text has these three of its own: `<!channel>` would call everybody.
fn escape_for_chat(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Collects the fields of a log line.
struct FieldVisitor(Map<String, Value>);

impl Visit for FieldVisitor {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().into(), text::redact(&format!("{value:?}")).into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().into(), text::redact(value).into());
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
        while !thread.is_finished() && began.elapsed() < DRAIN_TIMEOUT {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use serde_json::json;

    use super::*;

    #[test]
    fn a_panicking_post_stops_neither_the_thread_nor_later_alerts() {
        let (alerts, waiting) = sync_channel(4);
        for alert in [json!("bad"), json!("good"), Value::Null] {
            alerts.send(alert).expect("there is room");
        }
        let posted = RefCell::new(Vec::new());
        let post = |body: &str| {
            posted.borrow_mut().push(body.to_owned());
            match body {
                "\"bad\"" => panic!("as the test asks"),
                _ => Ok(()),
            }
        };
        post_all(post, &waiting);
        let posted = posted.take();
        assert_eq!(
            (posted.len(), posted.last().map(String::as_str)),
            (MAX_ATTEMPTS as usize + 1, Some("\"good\""))
        );
    }

    #[test]
    fn chat_markup_in_an_alert_is_escaped() {
        let fields = json!({"message": "it broke", "error": "<!channel> & <https://x|y>"});
        let text = alert_text(fields.as_object().expect("an object"));
        assert_eq!(
            text,
            "projectionist: it broke (error=&lt;!channel&gt; &amp; &lt;https://x|y&gt;)"
        );
    }
}
