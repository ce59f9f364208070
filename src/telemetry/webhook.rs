//! Posts every log line with a field `alert` to a webhook, on a thread of its own that never blocks
//! the work.

use std::fmt;
use std::io;
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

use crate::aws::http::{HttpClient, HttpError};
use crate::engine::error::Error;
use crate::model::text;

/// The most alerts that wait to be posted. Further alerts are only in the log.
const MAX_QUEUED_ALERTS: usize = 64;

/// The timeout of one attempt, from connection to response.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// The most attempts for one alert, and the pause before the second. The pause doubles.
const MAX_ATTEMPTS: u32 = 4;
const INITIAL_BACKOFF: Duration = Duration::from_millis(500);

/// How long the process waits at its end for alerts that have not been posted.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Sends the alerts of the log to the thread that posts them.
pub(super) struct WebhookLayer {
    alerts: SyncSender<Value>,
}

/// The thread that posts alerts. Dropping it waits for at most [`DRAIN_TIMEOUT`].
pub(crate) struct Poster {
    /// Sending null ends the thread. The log never drops its sender, so the channel stays open.
    end: SyncSender<Value>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the thread that posts alerts to `url`.
pub(super) fn start(url: &str) -> Result<(WebhookLayer, Poster), Error> {
    if !url.starts_with("http://") && !url.starts_with("https://") {
        return Err(Error::Input("the alert URL is not an http or https URL".into()));
    }
    let (alerts, waiting) = sync_channel(MAX_QUEUED_ALERTS);
    let cannot_start = |error: io::Error| {
        Error::Input(format!("cannot start the thread that posts alerts: {error}"))
    };
    // A separate runtime, because the process's own may have ended when the last alerts are posted.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot_start)?;
    let url = url.to_owned();
    let run = move || {
        let client = HttpClient::new();
        post_all(|body| runtime.block_on(post(&client, &url, body)), &waiting);
        // Does not wait for the resolver: a lookup has no time limit.
        runtime.shutdown_background();
    };
    let thread =
        std::thread::Builder::new().name("alerts".into()).spawn(run).map_err(cannot_start)?;
    Ok((WebhookLayer { alerts: alerts.clone() }, Poster { end: alerts, thread: Some(thread) }))
}

/// The reason why a post failed, without the URL, which may contain a secret.
type PostError = String;

/// Posts alerts until it receives null. A post that panics counts as failed, and the thread
/// continues with the next alert.
fn post_all(post: impl Fn(&str) -> Result<(), PostError>, waiting: &Receiver<Value>) {
    while let Ok(alert) = waiting.recv() {
        if alert.is_null() {
            return;
        }
        let body = alert.to_string();
        let mut backoff = INITIAL_BACKOFF;
        for attempt in 1..=MAX_ATTEMPTS {
            let posted = catch_unwind(AssertUnwindSafe(|| post(&body)))
                .unwrap_or_else(|_| Err("the post panicked".into()));
            let Err(error) = posted else { break };
            // Without a field `alert`, because this line would then be an alert, too.
            if attempt == MAX_ATTEMPTS {
                tracing::warn!(
                    attempts = attempt,
                    error,
                    "an alert could not be posted; it is only in the log"
                );
            } else {
                std::thread::sleep(backoff);
                backoff *= 2;
            }
        }
    }
}

/// Posts one alert. A redirect is not followed: the server that sends it would choose where alerts
/// go.
async fn post(client: &HttpClient, url: &str, body: &str) -> Result<(), PostError> {
    let posted = client.post_json(url, &[], body.to_owned(), REQUEST_TIMEOUT).await;
    match posted.map_err(|error| reason(&error))? {
        200..300 => Ok(()),
        status @ 300..400 => Err(format!("status {status}: redirects are not followed")),
        status => Err(format!("status {status}")),
    }
}

fn reason(error: &HttpError) -> PostError {
    match error {
        HttpError::Other(_) => "the server cannot be reached".into(),
        error => error.to_string(),
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
        // Chat tools show this field.
        let text = alert_text(&fields);
        fields.insert("text".into(), text.into());
        match self.alerts.try_send(Value::Object(fields)) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => {
                tracing::warn!("too many alerts wait to be posted; this one is only in the log");
            }
            Err(TrySendError::Disconnected(_)) => {
                tracing::warn!(
                    "the thread that posts alerts has ended; this one is only in the log"
                );
            }
        }
    }
}

/// Returns an alert in one line: its message, and its fields.
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

/// Escapes the three control characters of Slack's text format: `<!channel>` would notify a whole
/// channel.
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
    /// Waits until everything is posted, for at most [`DRAIN_TIMEOUT`].
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
                "\"bad\"" => panic!("the test makes the post panic"),
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
