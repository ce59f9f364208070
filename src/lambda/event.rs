//! The events that invoke a function: messages of an event source mapping, or a schedule. Only the
//! fields that are used.
//!
//! Why ours: the function reads five fields. `aws_lambda_events` would add 9 crates for them,
//! `chrono` among these.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::engine::error::Error;

/// Why a function is invoked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Trigger {
    /// An event source mapping of SQS has messages.
    Messages(MessageBatch),
    /// An EventBridge schedule, or a manual invocation with the same event.
    Schedule,
}

/// Messages of one queue, in the order in which the queue delivered them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MessageBatch {
    pub(crate) ids: Vec<String>,
    pub(crate) bodies: Vec<String>,
    /// The ARN of the queue; empty if the event does not have it.
    pub(crate) queue_arn: String,
}

#[derive(Deserialize)]
struct Envelope {
    #[serde(rename = "Records")]
    records: Option<Vec<Record>>,
    #[serde(rename = "detail-type")]
    detail_type: Option<String>,
}

/// All fields are optional, so that the error for a record of another service can name the service.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    message_id: Option<String>,
    body: Option<String>,
    event_source: Option<String>,
    #[serde(rename = "eventSourceARN", default)]
    event_source_arn: String,
}

/// The end of every error message.
const EXPECTED: &str = "expected the messages of an SQS event source mapping \
    ({\"Records\":[{\"eventSource\":\"aws:sqs\",…}]}) \
    or an EventBridge schedule ({\"detail-type\":\"Scheduled Event\"})";

/// Parses an event.
///
/// # Errors
/// [`Error::Input`] if the event is of another kind; the message names the expected kinds.
pub(crate) fn parse(event: &str) -> Result<Trigger, Error> {
    let refuse = |why: String| {
        Error::Input(format!("the function was invoked with an unknown event: {why}; {EXPECTED}"))
    };
    let envelope: Envelope =
        serde_json::from_str(event).map_err(|error| refuse(error.to_string()))?;
    match envelope {
        Envelope { records: Some(records), .. } => {
            let queue_arn =
                records.first().map(|record| record.event_source_arn.clone()).unwrap_or_default();
            let (mut ids, mut bodies) =
                (Vec::with_capacity(records.len()), Vec::with_capacity(records.len()));
            for record in records {
                match (record.event_source.as_deref(), record.message_id, record.body) {
                    (Some("aws:sqs"), Some(id), Some(body)) => {
                        ids.push(id);
                        bodies.push(body);
                    }
                    (Some("aws:sqs"), ..) => {
                        return Err(refuse("a message without messageId or body".into()));
                    }
                    (source, ..) => {
                        return Err(refuse(format!(
                            "records of {}",
                            source.unwrap_or("no named source")
                        )));
                    }
                }
            }
            Ok(Trigger::Messages(MessageBatch { ids, bodies, queue_arn }))
        }
        Envelope { detail_type: Some(detail_type), .. } if detail_type == "Scheduled Event" => {
            Ok(Trigger::Schedule)
        }
        Envelope { detail_type: Some(other), .. } => {
            Err(refuse(format!("an event of type {other:?}")))
        }
        Envelope { .. } => Err(refuse("neither Records nor a detail-type".into())),
    }
}

impl MessageBatch {
    /// Returns the response of the invocation. Unprocessed messages are reported as batch item
    /// failures; the mapping deletes all others. `processed` has a flag for each message. In a FIFO
    /// queue, all messages after the first unprocessed one are reported, too, so that they come
    /// again in order.
    pub(crate) fn response(&self, processed: &[bool]) -> Value {
        let mut is_returned = false;
        let is_fifo = self.queue_arn.ends_with(".fifo");
        let failed = self.ids.iter().zip(processed).filter(|(_, processed)| {
            is_returned = !**processed || is_returned && is_fifo;
            is_returned
        });
        let failures: Vec<Value> = failed.map(|(id, _)| json!({ "itemIdentifier": id })).collect();
        json!({ "batchItemFailures": failures })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(arn: &str) -> MessageBatch {
        let record = |id| {
            json!({
                "messageId": id, "body": "b", "eventSource": "aws:sqs",
                "eventSourceARN": arn, "awsRegion": "x",
            })
        };
        let event = json!({ "Records": [record("1"), record("2"), record("3")] }).to_string();
        let Ok(Trigger::Messages(batch)) = parse(&event) else {
            panic!("the event has no messages")
        };
        batch
    }

    #[test]
    fn a_fifo_batch_returns_all_after_the_first_failure_a_standard_one_only_failures() {
        let (fifo, standard) = (batch("arn:aws:sqs:x:1:q.fifo"), batch("arn:aws:sqs:x:1:q"));
        let returned = |batch: &MessageBatch, processed| {
            let response = batch.response(processed);
            let failures = response["batchItemFailures"].as_array().expect("a list").clone();
            failures
                .iter()
                .map(|failure| failure["itemIdentifier"].as_str().expect("an id").to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(returned(&fifo, &[true, false, true]), ["2", "3"]);
        assert_eq!(returned(&standard, &[true, false, true]), ["2"]);
        assert_eq!(returned(&standard, &[false, true, false]), ["1", "3"]);
        for batch in [fifo, standard] {
            assert_eq!(returned(&batch, &[true; 3]), Vec::<String>::new());
            assert_eq!(returned(&batch, &[false; 3]), ["1", "2", "3"]);
        }
    }

    #[test]
    fn a_schedule_event_is_recognized_by_its_type_alone() {
        for event in [
            r#"{"version":"0","source":"aws.events","detail-type":"Scheduled Event","detail":{}}"#,
            concat!(
                r#"{"source":"aws.scheduler","detail-type":"Scheduled Event","#,
                r#""resources":["x"],"detail":"{}"}"#,
            ),
            r#"{"detail-type":"Scheduled Event"}"#,
        ] {
            assert_eq!(parse(event).expect("a schedule"), Trigger::Schedule);
        }
    }

    #[test]
    fn an_unknown_event_is_refused_with_the_expected_kinds() {
        for (event, why) in [
            ("", "EOF"),
            ("[1]", "expected"),
            ("{}", "neither Records nor a detail-type"),
            (r#"{"Records":[{"eventSource":"aws:s3","s3":{}}]}"#, "records of aws:s3"),
            (r#"{"Records":[{"EventSource":"aws:sns"}]}"#, "records of no named source"),
            (
                r#"{"Records":[{"eventSource":"aws:sqs","messageId":"1"}]}"#,
                "without messageId or body",
            ),
            (r#"{"detail-type":"EC2 Instance State-change Notification"}"#, "EC2 Instance"),
        ] {
            let error = parse(event).expect_err("it is none").to_string();
            assert!(
                error.contains(why)
                    && error.contains("aws:sqs")
                    && error.contains("Scheduled Event"),
                "{error}"
            );
        }
    }
}
