//! The doctor's checks of the queue: kind, times, sizes, dead letters, encryption, permissions and
//! clock.

use std::collections::{BTreeSet, HashMap};

use time::OffsetDateTime;

use super::database::check_clock;
use super::{Check, Level};
use crate::command::config::Config;
use crate::model::text::{count, timestamp_with_age};
use crate::queue::{Action, Permission, Queue, SqsQueue};
use crate::store::QueueRecord;

/// In seconds. AWS refuses requests that were signed more than five minutes before or after its
/// time.
const MAX_CLOCK_SKEW_SECONDS: f64 = 60.0;

/// In seconds. Events of expired messages are read from the store: that is slower, but loses
/// nothing.
const MIN_RETENTION_SECONDS: u64 = 24 * 3600;

/// With fewer receives, valid messages go to the dead-letter queue when workers are killed or slow.
const MIN_RECEIVE_COUNT: u64 = 5;

/// In bytes. Smaller messages hold few events.
const MIN_MESSAGE_BYTES: u64 = 64 * 1024;

/// In hours. A message of another log is a warning for this time after it was received.
const FOREIGN_WARNING_HOURS: i64 = 24;

pub(super) async fn examine(
    queue: &SqsQueue,
    actions: &BTreeSet<Action>,
    record: Option<&QueueRecord>,
    config: &Config,
    checks: &mut Vec<Check>,
) {
    let inspected = match queue.inspect().await {
        Ok(inspected) => inspected,
        Err(error) => {
            return checks.push(Check::failed("queue", &error.into()));
        }
    };
    checks.extend(check_attributes(
        &inspected.attributes,
        config.visibility_timeout,
        config.handler_timeout,
    ));
    if let Some(record) = record {
        checks.push(check_published_queue(record, queue.identity().as_deref()));
        checks.push(check_foreign_messages(record, OffsetDateTime::now_utc()));
    }
    if let Some(policy) = inspected.attributes.get("RedrivePolicy") {
        checks.extend(examine_dead_letter_queue(queue, policy, &inspected.attributes).await);
    }
    if let Some(ahead) = inspected.clock_ahead_seconds {
        checks.push(check_clock(
            "SQS clock",
            ahead,
            MAX_CLOCK_SKEW_SECONDS,
            "AWS refuses requests that are signed with a clock that is five minutes off",
        ));
    }
    for action in actions {
        let (action, allowed) = (action.name(), queue.permission(*action).await);
        let check = format!("sqs:{action}");
        checks.push(match allowed {
            Permission::Granted => Check::ok(&check, "allowed"),
            Permission::Denied(error) => Check::problem(
                Level::Error,
                &check,
                error,
                format!("allow sqs:{action} on the queue, in the role and in its policy"),
            ),
            Permission::KeyUnusable(error) => {
                Check { name: check, level: Level::Error, detail: error, remedy: None }
            }
            Permission::Unknown(error) => Check::problem(
                Level::Note,
                &check,
                format!("cannot be checked: {error}"),
                "look at the role",
            ),
        });
    }
}

/// Checks that the log is published to this queue.
fn check_published_queue(record: &QueueRecord, queue: Option<&str>) -> Check {
    match (&record.queue, queue) {
        (None, _) => Check::ok("published to", "nothing has been published yet"),
        (Some(published_to), Some(queue)) if published_to != queue => Check::problem(
            Level::Warning,
            "published to",
            format!("the log was last published to {published_to}, which is another queue"),
            "correct QUEUE_URL, here or for the relay; if the queue was changed on purpose, the \
            warning ends with the next event",
        ),
        (Some(_), _) => Check::ok("published to", "this queue"),
    }
}

/// Checks whether messages of other logs were received from the queue.
fn check_foreign_messages(record: &QueueRecord, now: OffsetDateTime) -> Check {
    let Some(at) = record.foreign_at else {
        return Check::ok("foreign messages", "none");
    };
    let detail = format!(
        "{} received that are not of this log, last at {}; they are neither applied nor deleted",
        record.foreign_messages,
        timestamp_with_age(at, now)
    );
    if (now - at).whole_hours() < FOREIGN_WARNING_HOURS {
        Check::problem(
            Level::Warning,
            "foreign messages",
            detail,
            "find out who sends them, give each system a queue of its own, and let only the \
            relay's role send (infra/queue.yaml); after `rotate` or a restore, purge the queue",
        )
    } else {
        Check::ok("foreign messages", detail)
    }
}

fn check_attributes(
    attributes: &HashMap<String, String>,
    visibility: u64,
    handler_timeout: u64,
) -> Vec<Check> {
    let number = |name: &str| attributes.get(name).and_then(|value| value.parse::<u64>().ok());
    let is_true = |name: &str| attributes.get(name).is_some_and(|value| value == "true");
    let arn = attributes.get("QueueArn").map_or("", String::as_str);
    let mut checks = vec![Check::ok(
        "queue",
        format!("{arn}, {}", if is_true("FifoQueue") { "FIFO" } else { "standard" }),
    )];

    checks.push(if visibility >= handler_timeout {
        Check::ok(
            "visibility timeout",
            format!("{visibility} s for a worker, extended while it works"),
        )
    } else {
        Check::problem(
            Level::Warning,
            "visibility timeout",
            format!(
                "{visibility} s, and a handler may take {handler_timeout} s: a message comes again \
                if its timeout is not extended in time"
            ),
            "raise --visibility-timeout to --handler-timeout or more",
        )
    });
    if let Some(own) = number("VisibilityTimeout").filter(|own| *own < handler_timeout) {
        checks.push(Check::problem(
            Level::Note,
            "queue visibility timeout",
            format!(
                "{own} s; a worker sets its own, but a Lambda function uses this one, and a \
                handler may take {handler_timeout} s"
            ),
            "for Lambda, raise VisibilityTimeout to six times the function's timeout",
        ));
    }
    let retention = number("MessageRetentionPeriod").unwrap_or_default();
    checks.push(if retention >= MIN_RETENTION_SECONDS {
        Check::ok("retention", count(retention / 86_400, "day"))
    } else {
        Check::problem(
            Level::Warning,
            "retention",
            format!(
                "{retention} s: messages that expire while no worker runs are read from the \
                database, which is slower"
            ),
            "raise MessageRetentionPeriod to four days",
        )
    });
    let largest = number("MaximumMessageSize").unwrap_or_default();
    checks.push(if largest >= MIN_MESSAGE_BYTES {
        Check::ok("message size", count(largest, "byte"))
    } else {
        Check::problem(
            Level::Warning,
            "message size",
            format!(
                "{largest} bytes: a message holds few events, and an event that does not fit is \
                read from the database"
            ),
            "raise MaximumMessageSize to the most that SQS accepts",
        )
    });
    if is_true("FifoQueue") {
        let scope = attributes.get("DeduplicationScope").map_or("queue", String::as_str);
        let limit = attributes.get("FifoThroughputLimit").map_or("perQueue", String::as_str);
        checks.push(Check::ok(
            "deduplication",
            format!(
                "of each {scope}, limit {limit}: our events are one group, so every setting works"
            ),
        ));
    }
    if let Some(delay) = number("DelaySeconds").filter(|delay| *delay > 0) {
        checks.push(Check::problem(
            Level::Warning,
            "delay",
            format!("every message is delayed by {delay} s"),
            "set DelaySeconds to 0",
        ));
    }
    let kms_key = attributes.get("KmsMasterKeyId");
    checks.push(if is_true("SqsManagedSseEnabled") || kms_key.is_some() {
        let detail = kms_key.map_or("with SQS's own key".to_owned(), |key| {
            format!(
                "with the KMS key {key}: sending needs kms:GenerateDataKey and kms:Decrypt on it, \
                 receiving needs kms:Decrypt"
            )
        });
        Check::ok("encryption", detail)
    } else {
        Check::problem(
            Level::Warning,
            "encryption",
            "messages, and the events in them, are not encrypted at rest",
            "set SqsManagedSseEnabled to true",
        )
    });
    if !attributes.contains_key("RedrivePolicy") {
        checks.push(Check::problem(
            Level::Note,
            "dead letters",
            "there is no dead-letter queue: a message that is never deleted comes again until it \
            expires; no event is lost",
            "to see such messages, set RedrivePolicy",
        ));
    }
    checks
}

/// Checks the redrive policy, and the dead-letter queue that it names.
async fn examine_dead_letter_queue(
    queue: &SqsQueue,
    policy: &str,
    source: &HashMap<String, String>,
) -> Vec<Check> {
    let policy: serde_json::Value = serde_json::from_str(policy).unwrap_or_default();
    let receives = policy["maxReceiveCount"]
        .as_u64()
        .or_else(|| policy["maxReceiveCount"].as_str()?.parse().ok());
    let name = policy["deadLetterTargetArn"]
        .as_str()
        .and_then(|arn| arn.rsplit(':').next())
        .unwrap_or_default();
    let mut checks = vec![match receives.unwrap_or_default() {
        receives if receives >= MIN_RECEIVE_COUNT => {
            Check::ok("redrive", format!("after {receives} receives"))
        }
        receives => Check::problem(
            Level::Warning,
            "redrive",
            format!(
                "after {receives} receives: when a few workers are killed, valid messages go to \
                the dead-letter queue"
            ),
            format!("raise maxReceiveCount to {MIN_RECEIVE_COUNT} or more"),
        ),
    }];
    checks.push(match queue.dead_letter_queue_attributes(name).await {
        Ok(Some(attributes)) => check_dead_letter_queue(name, &attributes, source),
        Ok(None) => Check::problem(
            Level::Note,
            "dead letters",
            format!("{name}, which we have no permission to inspect"),
            "to have it checked, allow sqs:GetQueueUrl and sqs:GetQueueAttributes on it",
        ),
        Err(error) => Check::problem(
            Level::Error,
            "dead letters",
            format!("{name}: {error}"),
            "correct RedrivePolicy",
        ),
    });
    checks
}

fn check_dead_letter_queue(
    name: &str,
    dead_letter_attributes: &HashMap<String, String>,
    source: &HashMap<String, String>,
) -> Check {
    let number = |attributes: &HashMap<String, String>, name: &str| {
        attributes.get(name).and_then(|value| value.parse::<u64>().ok())
    };
    if dead_letter_attributes.get("FifoQueue") != source.get("FifoQueue") {
        return Check::problem(
            Level::Error,
            "dead letters",
            format!(
                "{name} is not of the queue's kind: SQS drops messages that it cannot move there"
            ),
            "make both FIFO or both standard",
        );
    }
    let retention = number(dead_letter_attributes, "MessageRetentionPeriod").unwrap_or_default();
    // In a FIFO queue, the time begins when the message is moved. In a standard queue, it began
    // when the message was sent.
    let too_short = if source.get("FifoQueue").is_some_and(|is_fifo| is_fifo == "true") {
        (retention < MIN_RETENTION_SECONDS)
            .then(|| format!("{name} keeps messages for {retention} s after they were moved there"))
    } else {
        let source = number(source, "MessageRetentionPeriod").unwrap_or_default();
        (retention < source).then(|| {
            format!(
                "{name} keeps messages for a shorter time than the queue, counted from when they \
                were sent"
            )
        })
    };
    if let Some(detail) = too_short {
        let remedy = "raise its MessageRetentionPeriod to 14 days";
        return Check::problem(Level::Warning, "dead letters", detail, remedy);
    }
    match number(dead_letter_attributes, "ApproximateNumberOfMessages").unwrap_or_default() {
        0 => Check::ok("dead letters", format!("{name}, empty")),
        waiting => Check::problem(
            Level::Warning,
            "dead letters",
            format!("{name} has {}", count(waiting, "message")),
            "no event is lost; look for workers that were killed, then purge the queue",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes(changed: &[(&str, &str)]) -> HashMap<String, String> {
        let usual = [
            ("QueueArn", "arn:aws:sqs:us-east-1:123456789012:projectionist.fifo"),
            ("FifoQueue", "true"),
            ("VisibilityTimeout", "30"),
            ("MessageRetentionPeriod", "345600"),
            ("MaximumMessageSize", "1048576"),
            ("DelaySeconds", "0"),
            ("SqsManagedSseEnabled", "true"),
            ("RedrivePolicy", "{}"),
        ];
        usual
            .iter()
            .chain(changed)
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn each_wrong_queue_attribute_has_exactly_one_line() {
        let problems = |attributes: &HashMap<String, String>, visibility| -> Vec<(String, Level)> {
            let checks = check_attributes(attributes, visibility, 30).into_iter();
            checks
                .filter(|check| check.level != Level::Ok)
                .map(|check| (check.name, check.level))
                .collect()
        };
        assert_eq!(problems(&attributes(&[]), 30), []);
        let short_visibility = problems(&attributes(&[]), 10);
        assert_eq!(short_visibility, [("visibility timeout".to_owned(), Level::Warning)]);
        for (name, value, check, level) in [
            ("VisibilityTimeout", "10", "queue visibility timeout", Level::Note),
            ("MessageRetentionPeriod", "3600", "retention", Level::Warning),
            ("MaximumMessageSize", "1024", "message size", Level::Warning),
            ("DelaySeconds", "5", "delay", Level::Warning),
            ("SqsManagedSseEnabled", "false", "encryption", Level::Warning),
        ] {
            assert_eq!(
                problems(&attributes(&[(name, value)]), 30),
                [(check.to_owned(), level)],
                "{name} = {value}"
            );
        }
    }

    #[test]
    fn a_dead_letter_queue_with_a_wrong_kind_or_retention_is_reported() {
        let level = |is_fifo: &str, changed: &[(&str, &str)]| {
            let source = attributes(&[("FifoQueue", is_fifo)]);
            check_dead_letter_queue("dead", &attributes(changed), &source).level
        };
        assert_eq!(level("true", &[]), Level::Ok);
        assert_eq!(level("false", &[]), Level::Error);
        assert_eq!(level("true", &[("MessageRetentionPeriod", "60")]), Level::Warning);
        let shorter_than_the_queue = ("MessageRetentionPeriod", "172800");
        assert_eq!(level("true", &[shorter_than_the_queue]), Level::Ok);
        let standard = [("FifoQueue", "false"), shorter_than_the_queue];
        assert_eq!(level("false", &standard), Level::Warning);
        assert_eq!(level("true", &[("ApproximateNumberOfMessages", "3")]), Level::Warning);
    }
}
