//! The messages between a worker and a handler: one JSON object a line. `docs/handlers.md`
//! describes them, and the schemas in `docs/handlers/` fix their form.

use std::borrow::Cow;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use time::OffsetDateTime;

use crate::model::event::{Event, Position};
use crate::model::external::{Answer, ExternalBatch, HandlerFailure};
use crate::model::projector::ProjectorId;

/// The version of the protocol. A handler answers `hello` with the version that it speaks.
pub(super) const PROTOCOL: u32 = 1;

/// The longest line that a handler may write to its standard output, in bytes.
pub(super) const MAX_ANSWER_BYTES: usize = 64 * 1024;

/// The longest pause that a handler may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// The most characters of a handler's text that are shown in an error.
const MAX_SHOWN: usize = 2_000;

/// A message to a handler.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Request<'a> {
    /// The first message for a projector after the start of a process.
    Hello {
        protocol: u32,
        id: u64,
        name: &'a str,
        version: u32,
        /// The digest of the projector's definition.
        digest: &'a str,
        delivery: &'static str,
        /// The subscribed event types; `["*"]` means all.
        events: &'a [String],
    },
    /// Asks the handler to create its tables.
    Setup { id: u64, name: &'a str, version: u32 },
    /// Asks the handler to remove what setup created.
    Teardown { id: u64, name: &'a str, version: u32 },
    /// Asks the handler to apply events.
    Batch {
        id: u64,
        name: &'a str,
        version: u32,
        after: u64,
        through: u64,
        /// The first statement of the handler's transaction; null if we move the position.
        fence: Option<&'a str>,
        events: Vec<EventMessage<'a>>,
    },
}

/// An event in a batch.
#[derive(Debug, Serialize)]
pub(super) struct EventMessage<'a> {
    position: u64,
    event_id: &'a str,
    stream_id: &'a str,
    stream_version: u64,
    event_type: &'a str,
    #[serde(with = "time::serde::rfc3339")]
    recorded_at: OffsetDateTime,
    payload: Box<RawValue>,
    metadata: Option<Box<RawValue>>,
}

impl<'a> Request<'a> {
    pub(super) fn batch(
        id: u64,
        projector: &'a ProjectorId,
        batch: ExternalBatch<'a>,
    ) -> anyhow::Result<Self> {
        let ProjectorId { name, version } = projector;
        let events = batch.events.iter().map(|event| EventMessage::new(event));
        Ok(Request::Batch {
            id,
            name,
            version: *version,
            after: batch.after.get(),
            through: batch.through.get(),
            fence: batch.fence,
            events: events.collect::<anyhow::Result<_>>()?,
        })
    }

    /// The message as a line, with its end.
    pub(super) fn to_line(&self) -> anyhow::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        Ok(line)
    }
}

impl<'a> EventMessage<'a> {
    fn new(event: &'a Event) -> anyhow::Result<Self> {
        let at = || format!("event {} cannot be sent to a handler", event.position());
        let metadata =
            event.metadata_text().map(|text| raw_json(event.strict_metadata().unwrap_or(text)));
        let message = EventMessage {
            position: event.position().get(),
            event_id: event.event_id(),
            stream_id: event.stream_id(),
            stream_version: event.stream_version(),
            event_type: event.event_type(),
            recorded_at: event.recorded_at(),
            payload: raw_json(event.strict_payload().unwrap_or_else(|| event.payload_text()))
                .with_context(at)?,
            metadata: metadata.transpose().with_context(at)?,
        };
        match event.decode_error() {
            Some(error) => Err(anyhow!("event {} cannot be decoded: {error}", event.position())),
            None => Ok(message),
        }
    }
}

/// JSON on one line. In valid JSON, a line break is white space between values, because strings
/// have none.
fn raw_json(text: &str) -> serde_json::Result<Box<RawValue>> {
    let line = if text.contains(['\n', '\r']) {
        Cow::Owned(text.replace(['\n', '\r'], " "))
    } else {
        Cow::Borrowed(text)
    };
    serde_json::from_str(&line)
}

/// A message from a handler.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Response {
    /// The answer to `hello`.
    Hello { id: u64, protocol: u32 },
    /// A batch is committed, or a setup or teardown is done.
    Done { id: u64 },
    /// The fence matched no row.
    NotMine { id: u64 },
    /// An error. Nothing was committed.
    Failed {
        id: u64,
        message: String,
        /// The position of the failing event.
        #[serde(default)]
        event: Option<u64>,
        /// Seconds. Set if the error is transient.
        #[serde(default)]
        retry_after: Option<f64>,
    },
}

impl Response {
    /// Parses a line of standard output.
    pub(super) fn parse(line: &[u8]) -> anyhow::Result<Self> {
        let shown = || show(&String::from_utf8_lossy(line));
        serde_json::from_slice(line).map_err(|error| {
            anyhow!(
                "it wrote a line to standard output that is not an answer ({error}): {}. Only \
                 answers may be written there; write everything else to standard error",
                shown()
            )
        })
    }

    fn id(&self) -> u64 {
        match self {
            Response::Hello { id, .. }
            | Response::Done { id }
            | Response::NotMine { id }
            | Response::Failed { id, .. } => *id,
        }
    }

    /// Checks that this is the answer to the message with this id.
    pub(super) fn check_id(&self, expected: u64) -> anyhow::Result<()> {
        let id = self.id();
        ensure!(id == expected, "it answered message {id}, and message {expected} was sent");
        Ok(())
    }

    /// The answer to a batch.
    pub(super) fn into_answer(self) -> anyhow::Result<Answer> {
        Ok(match self {
            Response::Done { .. } => Answer::Done,
            Response::NotMine { .. } => Answer::NotMine,
            Response::Failed { message, event, retry_after, .. } => {
                let pause = |seconds: f64| {
                    Duration::try_from_secs_f64(seconds)
                        .map_or(MAX_RETRY_AFTER, |pause| pause.min(MAX_RETRY_AFTER))
                };
                Answer::Failed(HandlerFailure {
                    message: show(&message),
                    event: event.map(Position::new),
                    retry_after: retry_after.map(pause),
                })
            }
            Response::Hello { .. } => bail!("it answered a batch with `hello`"),
        })
    }

    /// The answer to a setup or a teardown.
    pub(super) fn into_done(self) -> anyhow::Result<()> {
        match self {
            Response::Done { .. } => Ok(()),
            Response::Failed { message, .. } => Err(anyhow!("{}", show(&message))),
            Response::NotMine { .. } | Response::Hello { .. } => {
                bail!("it answered a message without events with neither `done` nor `failed`")
            }
        }
    }

    /// The answer to a hello.
    pub(super) fn into_hello(self) -> anyhow::Result<()> {
        match self {
            Response::Hello { protocol: PROTOCOL, .. } => Ok(()),
            Response::Hello { protocol, .. } => bail!(
                "it speaks version {protocol} of the protocol, and this program speaks version \
                 {PROTOCOL}"
            ),
            Response::Failed { message, .. } => Err(anyhow!("{}", show(&message))),
            Response::Done { .. } | Response::NotMine { .. } => {
                bail!("it answered `hello` with neither `hello` nor `failed`")
            }
        }
    }
}

/// A handler's text for an error: bounded, and without control characters.
fn show(text: &str) -> String {
    let text = text.trim();
    let shown = text.chars().take(MAX_SHOWN).map(|c| if c.is_control() { ' ' } else { c });
    let shown: String = shown.collect();
    if text.chars().count() > MAX_SHOWN { format!("{shown}…") } else { shown }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::model::event::RecordedEvent;

    /// Whether a value satisfies a schema. Knows the keywords that our schemas use, and panics at
    /// any other.
    fn is_valid(schema: &Value, value: &Value) -> bool {
        let Some(schema) = schema.as_object() else { return schema == &json!(true) };
        schema.iter().all(|(keyword, rule)| match keyword.as_str() {
            "$schema" | "title" => true,
            "oneOf" => {
                let schemas = rule.as_array().expect("a list of schemas");
                schemas.iter().filter(|schema| is_valid(schema, value)).count() == 1
            }
            "type" => match rule {
                Value::Array(names) => names.iter().any(|name| has_type(name, value)),
                name => has_type(name, value),
            },
            "const" => rule == value,
            "enum" => rule.as_array().expect("a list").contains(value),
            "minimum" => {
                value.as_f64().is_none_or(|value| value >= rule.as_f64().expect("a bound"))
            }
            "required" => {
                let keys = rule.as_array().expect("a list");
                keys.iter().all(|key| value.get(key.as_str().expect("a key")).is_some())
            }
            "properties" => {
                let properties = rule.as_object().expect("properties");
                properties
                    .iter()
                    .all(|(key, schema)| value.get(key).is_none_or(|value| is_valid(schema, value)))
            }
            "items" => {
                value.as_array().is_none_or(|items| items.iter().all(|item| is_valid(rule, item)))
            }
            other => panic!("{other} is not a keyword that this test knows"),
        })
    }

    fn has_type(name: &Value, value: &Value) -> bool {
        match name.as_str().expect("the name of a type") {
            "object" => value.is_object(),
            "array" => value.is_array(),
            "string" => value.is_string(),
            "integer" => value.is_u64() || value.is_i64(),
            "number" => value.is_number(),
            "null" => value.is_null(),
            other => panic!("{other} is not a type that this test knows"),
        }
    }

    fn schema(text: &str) -> Value {
        serde_json::from_str(text).expect("the schema is JSON")
    }

    fn line(request: &Request<'_>) -> Value {
        let line = request.to_line().expect("it is written");
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1, "one line");
        assert!(line.ends_with(b"\n"));
        serde_json::from_slice(&line).expect("it is JSON")
    }

    fn event(payload: &str, metadata: Option<&str>) -> Event {
        Event::from(RecordedEvent {
            position: Position::new(42),
            event_id: "e-1".into(),
            stream_id: "order-7".into(),
            stream_version: 1,
            event_type: "OrderPlaced".into(),
            recorded_at: OffsetDateTime::UNIX_EPOCH,
            payload: payload.into(),
            metadata: metadata.map(str::to_owned),
        })
    }

    fn batch(event: &Event) -> anyhow::Result<Value> {
        let id = ProjectorId { name: "orders".into(), version: 1 };
        let (after, through) = (Position::new(41), Position::new(43));
        let batch = ExternalBatch { after, through, fence: Some("update …"), events: &[event] };
        Ok(line(&Request::batch(2, &id, batch)?))
    }

    #[test]
    fn every_message_to_a_handler_satisfies_the_schema() {
        let requests = schema(include_str!("../../docs/handlers/requests.json"));
        let events = ["*".to_owned()];
        let hello = Request::Hello {
            protocol: PROTOCOL,
            id: 1,
            name: "orders",
            version: 1,
            digest: "5f",
            delivery: "at_least_once",
            events: &events,
        };
        let messages = [
            line(&hello),
            line(&Request::Setup { id: 2, name: "orders", version: 1 }),
            line(&Request::Teardown { id: 3, name: "orders", version: 1 }),
            batch(&event("{}", None)).expect("a batch"),
            batch(&event("[1]", Some("{\"user\":7}"))).expect("a batch"),
        ];
        for message in messages {
            assert!(is_valid(&requests, &message), "{message}");
            let mut without_id = message.clone();
            without_id.as_object_mut().expect("an object").remove("id");
            assert!(!is_valid(&requests, &without_id), "the schema requires the id");
        }
    }

    #[test]
    fn an_answer_is_read_if_and_only_if_it_satisfies_the_schema() {
        let answers = schema(include_str!("../../docs/handlers/answers.json"));
        for (answer, expected) in [
            (json!({"type": "hello", "id": 1, "protocol": 1}), true),
            (json!({"type": "done", "id": 2}), true),
            (json!({"type": "done", "id": 2, "later": "ignored"}), true),
            (json!({"type": "not_mine", "id": 2}), true),
            (json!({"type": "failed", "id": 2, "message": "x"}), true),
            (json!({"type": "failed", "id": 2, "message": "x", "event": 4}), true),
            (json!({"type": "failed", "id": 2, "message": "x", "retry_after": 0.5}), true),
            (json!({"type": "failed", "id": 2, "message": "x", "event": null}), true),
            (json!({"type": "failed", "id": 2}), false),
            (json!({"type": "failed", "id": 2, "message": 3}), false),
            (json!({"type": "failed", "id": 2, "message": "x", "event": "4"}), false),
            (json!({"type": "done"}), false),
            (json!({"type": "done", "id": "2"}), false),
            (json!({"type": "finished", "id": 2}), false),
            (json!([]), false),
        ] {
            let is_read = Response::parse(answer.to_string().as_bytes()).is_ok();
            assert_eq!((is_valid(&answers, &answer), is_read), (expected, expected), "{answer}");
        }
    }

    #[test]
    fn line_breaks_between_values_are_replaced_and_those_in_strings_stay() {
        let sent =
            batch(&event("{\"a\":\n\"b\\nc\",\r\n\"d\": 1.50}", Some("\n{}"))).expect("sent");
        assert_eq!(sent["events"][0]["payload"], json!({"a": "b\nc", "d": 1.50}));
        assert_eq!(sent["events"][0]["metadata"], json!({}));
    }

    #[test]
    fn json_that_only_mariadb_accepts_is_sent_as_strict_json() {
        let sent = batch(&event(r#"{"a":"\'","b":1.}"#, None)).expect("it is sent");
        assert_eq!(sent["events"][0]["payload"], json!({"a": "'", "b": 1.0}));
    }

    #[test]
    fn an_answer_to_another_message_and_a_long_text_are_refused_or_cut() {
        let answer = Response::parse(br#"{"type":"done","id":7}"#).expect("an answer");
        let error = answer.check_id(8).expect_err("another message").to_string();
        assert_eq!(error, "it answered message 7, and message 8 was sent");
        let long = json!({"type": "failed", "id": 1, "message": "x\n".repeat(5_000)}).to_string();
        let answer = Response::parse(long.as_bytes()).expect("an answer").into_answer();
        let Answer::Failed(failure) = answer.expect("an answer to a batch") else { panic!() };
        assert_eq!(failure.message.chars().count(), MAX_SHOWN + 1);
        assert!(!failure.message.contains('\n'));
    }
}
