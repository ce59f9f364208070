//! The queue: kind, times, sizes, dead letters, encryption, permissions, clock.

use std::collections::HashMap;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::database::check_clock;
use super::{Check, Level};
use crate::command::config::Config;
use crate::model::error::Error;
use crate::queue::{Permission, Queue, SqsQueue};
use crate::store::QueueRecord;

/// In seconds: AWS refuses what was signed five minutes before or after.
const MAX_CLOCK_SKEW_SECONDS: f64 = 60.0;

/// In seconds. What expires is read from the store; that is slower, and no loss.
const MIN_RETENTION_SECONDS: u64 = 24 * 3600;

/// With fewer tries, a worker that is killed or slow now and then sends good messages to the dead
/// letters.
const MIN_RECEIVE_COUNT: u64 = 5;

/// In bytes: below, a message holds few events.
const MIN_MESSAGE_BYTES: u64 = 64 * 1024;

/// In hours: messages that are not of the log and were received since then are still worth a
/// warning.
const FOREIGN_WARNING_HOURS: i64 = 24;

pub(super) async fn examine(
    queue: &SqsQueue,
    record: Option<&QueueRecord>,
    config: &Config,
    checks: &mut Vec<Check>,
) {
    let inspected = match queue.inspect().await {
        Ok(inspected) => inspected,
        Err(error) => {
            let error = Error::Unreachable(format!("the queue cannot be used: {error}"));
            return checks.push(Check::failed("queue", &error));
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
            "AWS refuses what is signed five minutes off",
        ));
    }
    for (action, allowed) in queue.permissions().await {
        let check = format!("sqs:{action}");
        checks.push(match allowed {
            Permission::Granted => Check::ok(&check, "allowed"),
            Permission::Denied(told) => Check::problem(
                Level::Error,
                &check,
                told,
                format!("allow sqs:{action} on the queue, in the role and in its policy"),
            ),
            Permission::Unknown(told) => Check::problem(
                Level::Note,
                &check,
                format!("cannot be told: {told}"),
                "look at the role",
            ),
        });
    }
}

/// Whether the log is published to this queue.
fn check_published_queue(record: &QueueRecord, queue: Option<&str>) -> Check {
    match (&record.queue, queue) {
        (None, _) => Check::ok("published to", "nothing was published yet"),
        (Some(published_to), Some(queue)) if published_to != queue => Check::problem(
            Level::Warning,
            "published to",
            format!("the log was last published to {published_to}, which is another queue"),
            "correct QUEUE_URL, here or where the relay runs; where the queue was changed on purpose, this ends with the next event",
        ),
        (Some(_), _) => Check::ok("published to", "this queue"),
    }
}

/// Whether the queue brings messages of others.
fn check_foreign_messages(record: &QueueRecord, now: OffsetDateTime) -> Check {
    let Some(at) = record.foreign_at else {
        return Check::ok("foreign messages", "none");
    };
    let detail = format!(
        "{} received that are not of this log, last at {}; they are neither applied nor deleted",
        record.foreign_messages,
        at.format(&Rfc3339).unwrap_or_else(|_| at.to_string())
    );
    match (now - at).whole_hours() < FOREIGN_WARNING_HOURS {
        true => Check::problem(
            Level::Warning,
            "foreign messages",
            detail,
            "look who sends them, give each system a queue of its own, and let only the relay's role send (infra/queue.yaml); \
             after `rotate` or a restore, purge the queue",
        ),
        false => Check::ok("foreign messages", detail),
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

    checks.push(match visibility >= handler_timeout {
        true => Check::ok("visibility timeout", format!("{visibility} s for a worker, extended while it works")),
        false => Check::problem(
            Level::Warning,
            "visibility timeout",
            format!("{visibility} s, and a handler may take {handler_timeout} s: a message comes again if it is not extended in time"),
            "raise --visibility-timeout to --handler-timeout or more",
        ),
    });
    if let Some(own) = number("VisibilityTimeout").filter(|own| *own < handler_timeout) {
        checks.push(Check::problem(
            Level::Note,
            "queue visibility timeout",
            format!("{own} s; a worker sets its own, but a Lambda function has this, and a handler may take {handler_timeout} s"),
            "for Lambda, raise VisibilityTimeout to six times the function's timeout",
        ));
    }
    let retention = number("MessageRetentionPeriod").unwrap_or_default();
    checks.push(match retention >= MIN_RETENTION_SECONDS {
        true => Check::ok("retention", format!("{} days", retention / 86_400)),
        false => Check::problem(
            Level::Warning,
            "retention",
            format!("{retention} s: what expires while no worker runs is read from the database, which is slower"),
            "raise MessageRetentionPeriod to four days",
        ),
    });
    let largest = number("MaximumMessageSize").unwrap_or_default();
    checks.push(match largest >= MIN_MESSAGE_BYTES {
        true => Check::ok("message size", format!("{largest} bytes")),
        false => Check::problem(
            Level::Warning,
            "message size",
            format!("{largest} bytes: a message holds few events, and what does not fit is read from the database"),
            "raise MaximumMessageSize to what SQS takes",
        ),
    });
    if is_true("FifoQueue") {
        let scope = attributes.get("DeduplicationScope").map_or("queue", String::as_str);
        let limit = attributes.get("FifoThroughputLimit").map_or("perQueue", String::as_str);
        checks.push(Check::ok(
            "deduplication",
            format!("of each {scope}, limit {limit}: our events are one group, so any will do"),
        ));
    }
    if let Some(delay) = number("DelaySeconds").filter(|delay| *delay > 0) {
        checks.push(Check::problem(
            Level::Warning,
            "delay",
            format!("every message is held back for {delay} s"),
            "set DelaySeconds to 0",
        ));
    }
    checks.push(
        match is_true("SqsManagedSseEnabled") || attributes.contains_key("KmsMasterKeyId") {
            true => Check::ok(
                "encryption",
                attributes.get("KmsMasterKeyId").map_or("by SQS's own key", String::as_str),
            ),
            false => Check::problem(
                Level::Warning,
                "encryption",
                "messages, and the events in them, are not encrypted at rest",
                "set SqsManagedSseEnabled to true",
            ),
        },
    );
    if !attributes.contains_key("RedrivePolicy") {
        checks.push(Check::problem(
            Level::Note,
            "dead letters",
            "there is no dead-letter queue: a message that nobody can delete comes again until it expires, and loses nothing",
            "to see such messages, set RedrivePolicy",
        ));
    }
    checks
}

/// The queue that messages go to which were received too often.
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
                "after {receives} receives: a few workers that are killed send good messages to the dead letters"
            ),
            format!("raise maxReceiveCount to {MIN_RECEIVE_COUNT} or more"),
        ),
    }];
    checks.push(match queue.dead_letter_queue_attributes(name).await {
        Ok(Some(attributes)) => check_dead_letter_queue(name, &attributes, source),
        Ok(None) => Check::problem(
            Level::Note,
            "dead letters",
            format!("{name}, which we may not look at"),
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
    let number = |of: &HashMap<String, String>, name: &str| {
        of.get(name).and_then(|value| value.parse::<u64>().ok())
    };
    if dead_letter_attributes.get("FifoQueue") != source.get("FifoQueue") {
        return Check::problem(
            Level::Error,
            "dead letters",
            format!(
                "{name} is of the other kind than the queue: SQS drops what it cannot hand over"
            ),
            "make both FIFO or both standard",
        );
    }
    if number(dead_letter_attributes, "MessageRetentionPeriod")
        < number(source, "MessageRetentionPeriod")
    {
        return Check::problem(
            Level::Warning,
            "dead letters",
            format!(
                "{name} keeps messages for less long than the queue, counted from when they were sent"
            ),
            "raise its MessageRetentionPeriod to 14 days",
        );
    }
    match number(dead_letter_attributes, "ApproximateNumberOfMessages").unwrap_or_default() {
        0 => Check::ok("dead letters", format!("{name}, empty")),
        waiting => Check::problem(
            Level::Warning,
            "dead letters",
            format!("{name} has {waiting} messages"),
            "nothing is lost by them; look for workers that were killed, then purge it",
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
        let bad = |attributes: &HashMap<String, String>, visibility| -> Vec<(String, Level)> {
            let checks = check_attributes(attributes, visibility, 30).into_iter();
            checks
                .filter(|check| check.level != Level::Ok)
                .map(|check| (check.name, check.level))
                .collect()
        };
        assert_eq!(bad(&attributes(&[]), 30), []);
        assert_eq!(bad(&attributes(&[]), 10), [("visibility timeout".to_owned(), Level::Warning)]);
        for (name, value, check, level) in [
            ("VisibilityTimeout", "10", "queue visibility timeout", Level::Note),
            ("MessageRetentionPeriod", "3600", "retention", Level::Warning),
            ("MaximumMessageSize", "1024", "message size", Level::Warning),
            ("DelaySeconds", "5", "delay", Level::Warning),
            ("SqsManagedSseEnabled", "false", "encryption", Level::Warning),
        ] {
            assert_eq!(
                bad(&attributes(&[(name, value)]), 30),
                [(check.to_owned(), level)],
                "{name} = {value}"
            );
        }
    }

    #[test]
    fn a_dead_letter_queue_with_a_wrong_kind_or_retention_is_reported() {
        let source = attributes(&[]);
        let level = |changed: &[(&str, &str)]| {
            check_dead_letter_queue("dead.fifo", &attributes(changed), &source).level
        };
        assert_eq!(level(&[]), Level::Ok);
        assert_eq!(level(&[("FifoQueue", "false")]), Level::Error);
        assert_eq!(level(&[("MessageRetentionPeriod", "60")]), Level::Warning);
        assert_eq!(level(&[("ApproximateNumberOfMessages", "3")]), Level::Warning);
    }
}
