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
    /// The name of the installation, which each alert begins with.
    service: String,
    alerts: SyncSender<Value>,
}

/// The thread that posts alerts. Dropping it waits for at most [`DRAIN_TIMEOUT`].
pub(crate) struct Poster {
    /// Sending null ends the thread. The log never drops its sender, so the channel stays open.
    end: SyncSender<Value>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the thread that posts the alerts of `service` to `url`.
pub(super) fn start(url: &str, service: &str) -> Result<(WebhookLayer, Poster), Error> {
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
    let layer = WebhookLayer { service: service.to_owned(), alerts: alerts.clone() };
    Ok((layer, Poster { end: alerts, thread: Some(thread) }))
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
        let now = OffsetDateTime::now_utc();
        fields.insert("timestamp".into(), text::timestamp(now).into());
        fields.insert("level".into(), event.metadata().level().as_str().into());
        fields.insert("service".into(), self.service.as_str().into());
        // Chat tools show this field.
        let text = alert_text(&fields, now);
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

/// Describes an alert for people. A phone shows only the beginning, so it says at once where, what,
/// since when, and what to do. The details follow.
fn alert_text(fields: &Map<String, Value>, now: OffsetDateTime) -> String {
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let field = |name: &str| fields.get(name).map(plain);
    let shown = |name: &str| field(name).unwrap_or_default();
    let seconds = fields.get("seconds").and_then(Value::as_f64);
    // These are older than their alert. In other alerts, `seconds` is the time that work took.
    let is_older = matches!(shown("alert").as_str(), "high_water_blocked" | "projector_retrying");
    let age = seconds.filter(|_| is_older).unwrap_or_default();
    let since = to_the_minute(now - time::Duration::seconds_f64(age));
    let headline = |what: String, remedy: &str| format!("{what} since {since}; {remedy}");
    let found = |what: &str, remedy: &str| format!("{what} at {since}; {remedy}");
    let summary = match shown("alert").as_str() {
        "projector_broken" => {
            let remedy = match field("rebuild_reason") {
                Some(_) => "retire it, run boot",
                None => "fix it, run boot",
            };
            headline(format!("{} broken", shown("projector")), remedy)
        }
        "projector_retrying" => {
            headline(format!("{} retrying", shown("projector")), "see the error")
        }
        "projector_recovered" => {
            format!("{} recovered at {since}", shown("projector"))
        }
        "boot_failed" => {
            let release = field("release").map_or_else(String::new, |name| format!(" of {name}"));
            let remedy = field("broken").map_or_else(
                || "see the error, run boot again".to_owned(),
                |broken| format!("fix {broken}, run boot again"),
            );
            found(&format!("boot{release} failed"), &remedy)
        }
        "high_water_blocked" => match (field("first"), field("last")) {
            (Some(first), Some(last)) => headline(
                format!("log blocked at {first}"),
                &format!("run projectionist fill {first} {last}"),
            ),
            _ => headline(
                format!("log blocked at {}", shown("position")),
                "end the open transaction",
            ),
        },
        "log_fault" => found("log fault", "run projectionist audit"),
        "foreign_messages" => found("foreign messages in the queue", "run projectionist doctor"),
        "queue_changed" => found("another queue than before", "check QUEUE_URL"),
        _ => {
            let projector = field("projector").map(|name| format!("{name}: ")).unwrap_or_default();
            format!("{projector}{} at {since}", shown("message"))
        }
    };
    let in_headline = ["message", "alert", "timestamp", "level", "service", "projector", "error"];
    let details: Vec<String> = fields
        .iter()
        .filter(|(name, _)| !in_headline.contains(&name.as_str()))
        .map(|(name, value)| format!("{name}={}", plain(value)))
        .collect();
    let mut text = format!("{}: {summary}\n{}", shown("service"), shown("message"));
    if let Some(error) = field("error") {
        text.push_str(&format!(": {error}"));
    }
    if !details.is_empty() {
        text.push_str(&format!("\n{}", details.join(", ")));
    }
    escape_for_chat(&text)
}

/// A time in UTC, in ISO 8601, to the minute: an alert has little room, and is read at once.
fn to_the_minute(at: OffsetDateTime) -> String {
    let (year, month, day) = at.to_calendar_date();
    let (hour, minute, _) = at.to_hms();
    format!("{year:04}-{:02}-{day:02}T{hour:02}:{minute:02}Z", u8::from(month))
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

    fn record_f64(&mut self, field: &Field, value: f64) {
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

    /// An alert of the service "shop", at 2026-11-29T16:09:59Z.
    fn text_of(fields: Value) -> String {
        let Value::Object(mut fields) = fields else { panic!("the fields are an object") };
        fields.insert("service".into(), "shop".into());
        let now = OffsetDateTime::UNIX_EPOCH + time::Duration::seconds(1_795_968_599);
        alert_text(&fields, now)
    }

    #[test]
    fn chat_markup_in_an_alert_is_escaped() {
        let text = text_of(json!({"message": "it broke", "error": "<!channel> & <https://x|y>"}));
        assert_eq!(
            text,
            "shop: it broke at 2026-11-29T16:09Z\n\
             it broke: &lt;!channel&gt; &amp; &lt;https://x|y&gt;"
        );
    }

    #[test]
    fn the_first_80_characters_say_where_what_since_when_and_what_to_do() {
        let broken = json!({"alert": "projector_broken", "projector": "case_status@1"});
        let mut rebuild = broken.clone();
        rebuild["rebuild_reason"] = "a part of a batch is stored".into();
        for (fields, expected) in [
            (broken, "shop: case_status@1 broken since 2026-11-29T16:09Z; fix it, run boot"),
            (
                json!({"alert": "projector_retrying", "projector": "mails@1", "seconds": 61}),
                "shop: mails@1 retrying since 2026-11-29T16:08Z; see the error",
            ),
            (rebuild, "shop: case_status@1 broken since 2026-11-29T16:09Z; retire it, run boot"),
            (
                json!({"alert": "boot_failed", "broken": "a@1", "release": "v7"}),
                "shop: boot of v7 failed at 2026-11-29T16:09Z; fix a@1, run boot again",
            ),
            (
                json!({"alert": "high_water_blocked", "position": 12, "seconds": 61}),
                "shop: log blocked at 12 since 2026-11-29T16:08Z; end the open transaction",
            ),
            (
                json!({"alert": "high_water_blocked", "first": 10, "last": 70_019}),
                "shop: log blocked at 10 since 2026-11-29T16:09Z; run projectionist fill 10 70019",
            ),
            (
                json!({"alert": "log_fault"}),
                "shop: log fault at 2026-11-29T16:09Z; run projectionist audit",
            ),
        ] {
            let text = text_of(fields);
            assert_eq!(text.lines().next(), Some(expected));
            assert!(expected.len() <= 80, "{expected}");
        }
    }

    #[test]
    fn numbers_stay_numbers() {
        struct Capture(std::sync::Arc<std::sync::Mutex<Value>>);
        impl<S: Subscriber> Layer<S> for Capture {
            fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
                let mut fields = FieldVisitor(Map::new());
                event.record(&mut fields);
                *self.0.lock().expect("the lock is not poisoned") = Value::Object(fields.0);
            }
        }
        use tracing_subscriber::layer::SubscriberExt;
        let captured = std::sync::Arc::default();
        let capture = Capture(std::sync::Arc::clone(&captured));
        let subscriber = tracing_subscriber::registry().with(capture);
        tracing::subscriber::with_default(subscriber, || {
            tracing::error!(seconds = 12.464, position = 7_u64, "it broke");
        });
        let captured = captured.lock().expect("the lock is not poisoned").clone();
        assert_eq!(captured, json!({"seconds": 12.464, "position": 7, "message": "it broke"}));
    }
}
