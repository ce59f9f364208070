//! The wire format: a signed list of consecutive events and the position just before the first.

use std::fmt::{self, Write};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::model::continuity::Run;
use crate::model::event::{Event, Position, RecordedEvent};
use crate::model::signature::{LogIdentity, SIGNATURE_DIGITS};

/// The content of a received message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Message {
    /// Consecutive events of this log.
    Events(Run),
    /// The position of one event of this log. The event itself is read from the store.
    Reference(Position),
    /// A message that does not belong to this log. It is never applied and never deleted.
    Foreign(ForeignReason),
}

/// Why a message is foreign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ForeignReason {
    /// The text does not begin like a message of this program.
    Unreadable,
    /// The text looks like a message of this program, but has no signature.
    Unsigned,
    /// The message names another log.
    OtherLog,
    /// The message names this log, but the signature does not match this log's key and the text.
    InvalidSignature,
    /// The signature is valid, but this release cannot parse the content.
    UnknownFormat,
    /// The positions are not consecutive.
    NotConsecutive,
    /// The last position is above the high-water mark. The message was sent before the database was
    /// restored.
    BeyondHighWater,
    /// The log has a different event at the last position. The database was restored or is a clone.
    DifferentEvent,
}

impl fmt::Display for ForeignReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ForeignReason::Unreadable => "not readable",
            ForeignReason::Unsigned => "not signed",
            ForeignReason::OtherLog => "of another log",
            ForeignReason::InvalidSignature => "wrong signature",
            ForeignReason::UnknownFormat => "unknown format",
            ForeignReason::NotConsecutive => "not consecutive",
            ForeignReason::BeyondHighWater => "beyond the high-water mark",
            ForeignReason::DifferentEvent => "a different event than in the log",
        })
    }
}

/// A message that is ready to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PackedMessage {
    pub(crate) body: String,
    /// Every event up to this position has been sent once this message is sent.
    pub(crate) last: Position,
    pub(crate) event_count: usize,
}

/// A body begins with this prefix and the signature. The signature covers every byte after
/// [`SIGNATURE_SUFFIX`]. Because its offset is fixed,
/// nothing has to be parsed before it is verified.
const SIGNATURE_PREFIX: &str = "{\"sig\":\"";
const SIGNATURE_SUFFIX: &str = "\",";

/// The offset of the signed text.
const SIGNED_OFFSET: usize = SIGNATURE_PREFIX.len() + SIGNATURE_DIGITS + SIGNATURE_SUFFIX.len();

/// A body ends with this key, the last position, and a closing brace.
const LAST_KEY: &str = "\"last\":";

/// `{"sig":"…","log":"…","prev":41,"events":[{"position":42,…},…],"last":43}`.
///
/// A reference has no `events`: its event does not fit into a message and is read from the store.
#[derive(Deserialize)]
struct Envelope<'a> {
    /// The id of the log. The same positions in another log mean other events.
    log: &'a str,
    prev: u64,
    #[serde(default, borrow)]
    events: Option<Vec<WireEvent<'a>>>,
    last: u64,
}

#[derive(Serialize, Deserialize)]
struct WireEvent<'a> {
    position: u64,
    #[serde(borrow)]
    event_id: std::borrow::Cow<'a, str>,
    #[serde(borrow)]
    stream_id: std::borrow::Cow<'a, str>,
    stream_version: u64,
    #[serde(borrow)]
    event_type: std::borrow::Cow<'a, str>,
    #[serde(with = "time::serde::rfc3339")]
    recorded_at: OffsetDateTime,
    #[serde(borrow)]
    payload: &'a RawValue,
    #[serde(default, skip_serializing_if = "Option::is_none", borrow)]
    metadata: Option<&'a RawValue>,
}

/// Parses a message. Verifies the signature before it parses anything else.
pub(crate) fn parse(body: &str, log: &LogIdentity) -> Message {
    try_parse(body, log).unwrap_or_else(Message::Foreign)
}

fn try_parse(body: &str, log: &LogIdentity) -> Result<Message, ForeignReason> {
    let Some((signature, signed)) = split_signature(body) else {
        return Err(if body.starts_with("{\"log\":") {
            ForeignReason::Unsigned
        } else {
            ForeignReason::Unreadable
        });
    };
    if !log.key.verifies(signed, signature) {
        let is_named =
            signed.strip_prefix("\"log\":\"").is_some_and(|rest| rest.starts_with(&log.id));
        return Err(if is_named {
            ForeignReason::InvalidSignature
        } else {
            ForeignReason::OtherLog
        });
    }
    let envelope: Envelope<'_> =
        serde_json::from_str(body).map_err(|_| ForeignReason::UnknownFormat)?;
    if envelope.log != log.id {
        return Err(ForeignReason::OtherLog);
    }
    let last = Position::new(envelope.last);
    let Some(events) = envelope.events else { return Ok(Message::Reference(last)) };
    let events = events.into_iter().map(WireEvent::into_event).collect();
    let run = Run::new(Position::new(envelope.prev), events).filter(|run| run.last() == last);
    run.map(Message::Events).ok_or(ForeignReason::NotConsecutive)
}

/// Splits a body into the signature and the signed text.
fn split_signature(body: &str) -> Option<(&str, &str)> {
    let (signature, rest) =
        body.strip_prefix(SIGNATURE_PREFIX)?.split_at_checked(SIGNATURE_DIGITS)?;
    Some((signature, rest.strip_prefix(SIGNATURE_SUFFIX)?))
}

/// The last position that a message claims to have, before its signature is verified. The caller
/// uses it to look up the row with which the message is compared.
pub(crate) fn unverified_last(body: &str) -> Option<Position> {
    let body = body.strip_suffix('}')?;
    let before = body.trim_end_matches(|digit: char| digit.is_ascii_digit());
    before.ends_with(LAST_KEY).then(|| body[before.len()..].parse().ok().map(Position::new))?
}

/// Packs the first of these consecutive events into one message: as many as fit, at most
/// `max_events`. If the first event alone is too large, the message is a reference.
/// `events` must not be empty.
pub(crate) fn pack(
    log: &LogIdentity,
    prev: Position,
    events: &[Event],
    max_bytes: usize,
    max_events: usize,
) -> PackedMessage {
    let (id, no_signature) = (&log.id, "0".repeat(SIGNATURE_DIGITS));
    let mut body = format!(
        "{SIGNATURE_PREFIX}{no_signature}{SIGNATURE_SUFFIX}\"log\":\"{id}\",\"prev\":{prev},"
    );
    let head = body.len();
    body.push_str("\"events\":[");
    let mut last = prev;
    let mut count = 0;
    for event in events.iter().take(max_events) {
        let Some(text) = WireEvent::to_json(event) else { break };
        // Includes the comma before the event and the text that follows the last event.
        let end = 1 + "],".len() + LAST_KEY.len() + digits(event.position()) + "}".len();
        if body.len() + text.len() + end > max_bytes {
            break;
        }
        if count > 0 {
            body.push(',');
        }
        body.push_str(&text);
        last = event.position();
        count += 1;
    }
    if count > 0 {
        body.push_str("],");
    } else {
        body.truncate(head);
        last = prev.next();
        count = 1;
    }
    // Writing to a String cannot fail.
    let _ = write!(body, "{LAST_KEY}{last}}}");
    let signature = log.key.sign(&body[SIGNED_OFFSET..]);
    body.replace_range(
        SIGNATURE_PREFIX.len()..SIGNATURE_PREFIX.len() + SIGNATURE_DIGITS,
        &signature,
    );
    PackedMessage { body, last, event_count: count }
}

fn digits(position: Position) -> usize {
    position.get().checked_ilog10().map_or(1, |log| log as usize + 1)
}

impl<'a> WireEvent<'a> {
    /// Serializes an event. `None` if the event must be sent as a reference instead.
    ///
    /// SQS does not accept U+FFFE and U+FFFF. The message must also reproduce payload and metadata
    /// byte for byte. That fails for invalid JSON, surrounding white space, and metadata that is
    /// the text `null`.
    fn to_json(event: &'a Event) -> Option<String> {
        let recorded_at = event.recorded_at();
        recorded_at.format(&Rfc3339).ok()?;
        let wire = WireEvent {
            position: event.position().get(),
            event_id: event.event_id().into(),
            stream_id: event.stream_id().into(),
            stream_version: event.stream_version(),
            event_type: event.event_type().into(),
            recorded_at,
            payload: raw_json(event.payload_text())?,
            metadata: match event.metadata_text() {
                Some(text) => Some(raw_json(text).filter(|raw| raw.get() != "null")?),
                None => None,
            },
        };
        let text = serde_json::to_string(&wire).ok()?;
        // Two searches, because memchr makes the search for a single character fast.
        (!text.contains('\u{fffe}') && !text.contains('\u{ffff}')).then_some(text)
    }

    fn into_event(self) -> Event {
        Event::from(RecordedEvent {
            position: Position::new(self.position),
            event_id: self.event_id.into_owned(),
            stream_id: self.stream_id.into_owned(),
            stream_version: self.stream_version,
            event_type: self.event_type.into_owned(),
            recorded_at: self.recorded_at,
            payload: self.payload.get().to_owned(),
            metadata: self.metadata.map(|metadata| metadata.get().to_owned()),
        })
    }
}

/// Returns `text` as raw JSON if it is valid and has no surrounding white space.
fn raw_json(text: &str) -> Option<&RawValue> {
    serde_json::from_str::<&RawValue>(text).ok().filter(|raw| raw.get().len() == text.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::continuity::tests::{event, recorded_event};
    use crate::model::signature::SigningKey;
    use crate::testing::{corrupted, hot_path};

    const LOG: &str = "5f9c2a1e-0000-0000-0000-000000000001";

    fn log() -> LogIdentity {
        LogIdentity { id: LOG.into(), key: SigningKey::new(&[7; 32]) }
    }

    /// Signs a text with the key of [`log`].
    fn signed(text: &str) -> String {
        format!("{SIGNATURE_PREFIX}{}{SIGNATURE_SUFFIX}{text}", log().key.sign(text))
    }

    /// Parses a message. Also checks that the unverified last position of a valid message is right.
    fn parse(body: &str) -> Message {
        let message = super::parse(body, &log());
        let last = match &message {
            Message::Events(run) => run.last(),
            Message::Reference(last) => *last,
            Message::Foreign(_) => return message,
        };
        assert_eq!(unverified_last(body), Some(last), "{body}");
        message
    }

    fn unpack(packed: &PackedMessage) -> Run {
        match parse(&packed.body) {
            Message::Events(run) => run,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_packed_run_is_parsed_byte_for_byte() {
        let mut first = recorded_event(8);
        first.payload =
            r#"{ "amount" : 1.50, "ab": "é\u0041", "big": 123456789012345678901234567890 }"#.into();
        first.metadata = Some("[ ]".into());
        first.event_type = "with \"quotes\" and \\".into();
        let events = vec![first.into(), event(9)];
        let packed = pack(&log(), Position::new(7), &events, 100_000, 100);
        assert_eq!(Some(unpack(&packed)), Run::new(Position::new(7), events));
        assert_eq!((packed.last, packed.event_count), (Position::new(9), 2));
    }

    #[test]
    fn hot_path_pack() {
        let (events, log) = (hot_path::events(), log());
        let packed = hot_path::count(|| pack(&log, Position::START, &events, 100_000, 100));
        assert_eq!(packed.last, Position::new(hot_path::EVENT_COUNT));
    }

    #[test]
    fn hot_path_parse() {
        let body = pack(&log(), Position::START, &hot_path::events(), 100_000, 100).body;
        let log = log();
        let Message::Events(run) = hot_path::count(|| super::parse(&body, &log)) else {
            panic!("the message is foreign")
        };
        assert_eq!(run.last(), Position::new(hot_path::EVENT_COUNT));
    }

    #[test]
    fn an_event_sqs_cannot_carry_is_sent_as_a_reference() {
        for payload in [format!("\"{}\"", "x".repeat(5_000)), "\"\u{ffff}\"".into()] {
            let large = RecordedEvent { payload, ..recorded_event(8) }.into();
            let packed = pack(&log(), Position::new(7), &[large, event(9)], 2_000, 100);
            assert_eq!(packed.last, Position::new(8));
            assert_eq!(parse(&packed.body), Message::Reference(Position::new(8)));
        }
    }

    #[test]
    fn an_event_that_packing_would_change_is_sent_as_a_reference() {
        for (payload, metadata) in
            [(" {}", None), ("{}\n", None), ("{}", Some("null")), ("{}", Some("1 "))]
        {
            let spaced = RecordedEvent {
                payload: payload.into(),
                metadata: metadata.map(str::to_owned),
                ..recorded_event(8)
            };
            let packed = pack(&log(), Position::new(7), &[spaced.into(), event(9)], 2_000, 100);
            assert_eq!(packed.last, Position::new(8), "{payload:?} {metadata:?}");
            assert_eq!(parse(&packed.body), Message::Reference(Position::new(8)));
        }
        // As a payload, null is a value like any other.
        let null =
            RecordedEvent { payload: "null".into(), metadata: None, ..recorded_event(8) }.into();
        assert_eq!(
            unpack(&pack(&log(), Position::new(7), &[null], 2_000, 100)).last(),
            Position::new(8)
        );
    }

    #[test]
    fn a_message_not_signed_with_this_logs_key_is_foreign() {
        let good = pack(&log(), Position::new(7), &[event(8), event(9)], 100_000, 100).body;
        assert!(matches!(parse(&good), Message::Events(_)));
        let unsigned = format!("{{{}", &good[SIGNED_OFFSET..]);
        let other = LogIdentity { key: SigningKey::new(&[8; 32]), ..log() };
        for (body, why) in [
            (String::new(), ForeignReason::Unreadable),
            ("hello".into(), ForeignReason::Unreadable),
            ("[1,2]".into(), ForeignReason::Unreadable),
            (format!(" {good}"), ForeignReason::Unreadable),
            (good[..SIGNED_OFFSET - 3].into(), ForeignReason::Unreadable),
            (unsigned, ForeignReason::Unsigned),
            (good[..SIGNED_OFFSET].into(), ForeignReason::OtherLog),
            (good.replace(LOG, "another"), ForeignReason::OtherLog),
            (good[..good.len() - 1].into(), ForeignReason::InvalidSignature),
            (format!("{good} "), ForeignReason::InvalidSignature),
            (good.replace("\"prev\":7", "\"prev\":6"), ForeignReason::InvalidSignature),
            (good.replace("Confirmation", "confirmation"), ForeignReason::InvalidSignature),
            (
                pack(&other, Position::new(7), &[event(8), event(9)], 100_000, 100).body,
                ForeignReason::InvalidSignature,
            ),
        ] {
            assert_eq!(parse(&body), Message::Foreign(why), "{body}");
        }
    }

    /// Such a message comes from a bug or from a later release.
    #[test]
    fn a_signed_message_that_is_not_a_run_is_foreign() {
        let good = pack(&log(), Position::new(7), &[event(8), event(9)], 100_000, 100).body;
        let good = &good[SIGNED_OFFSET..];
        assert!(matches!(parse(&signed(good)), Message::Events(_)));
        for (text, why) in [
            (good[..good.len() - 1].into(), ForeignReason::UnknownFormat),
            ("}".into(), ForeignReason::UnknownFormat),
            (good.replace(LOG, "another"), ForeignReason::OtherLog),
            (good.replace("\"prev\":7", "\"prev\":6"), ForeignReason::NotConsecutive),
            (good.replace("\"position\":9", "\"position\":10"), ForeignReason::NotConsecutive),
            (good.replace("\"last\":9", "\"last\":8"), ForeignReason::NotConsecutive),
            (
                format!("\"log\":\"{LOG}\",\"prev\":7,\"events\":[],\"last\":7}}"),
                ForeignReason::NotConsecutive,
            ),
        ] {
            assert_eq!(super::parse(&signed(&text), &log()), Message::Foreign(why), "{text}");
        }
    }

    #[test]
    fn the_claimed_last_position_is_read_from_the_end_of_the_message() {
        for (body, claimed) in [
            ("{\"last\":42}", Some(42)),
            ("\"last\":0}", Some(0)),
            ("{\"last\":18446744073709551615}", Some(u64::MAX)),
            ("{\"last\":18446744073709551616}", None),
            ("{\"last\":}", None),
            ("{\"last\":-1}", None),
            ("{\"last\":42}\n", None),
            ("42}", None),
            ("}", None),
            ("", None),
        ] {
            assert_eq!(unverified_last(body), claimed.map(Position::new), "{body}");
        }
        let mut tricky = recorded_event(8);
        tricky.payload = "{\"last\":5}".into();
        let packed = pack(&log(), Position::new(7), &[tricky.into()], 100_000, 100);
        assert_eq!(unverified_last(&packed.body), Some(Position::new(8)));
    }

    /// A message that uses every optional part of the format.
    fn three_events() -> String {
        let mut events = [recorded_event(8), recorded_event(9), recorded_event(10)];
        events[0].event_type = "with \"quotes\" and \\".into();
        events[1].payload = r#"{"a":[1,-2.5e3,"é\u0041",{"b":null}]}"#.into();
        events[2].metadata = Some("[true]".into());
        pack(&log(), Position::new(7), &events.map(Event::from), 100_000, 100).body
    }

    #[test]
    fn json_of_any_depth_does_not_exhaust_the_stack() {
        let body = pack(&log(), Position::new(7), &[event(8)], 100_000, 100).body;
        for deep in
            ["[".repeat(200_000), format!("{}1{}", "[".repeat(200_000), "]".repeat(200_000))]
        {
            let text =
                body[SIGNED_OFFSET..].replace("\"payload\":{}", &format!("\"payload\":{deep}"));
            super::parse(&signed(&text), &log());
            super::parse(&signed(&deep), &log());
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(body in ".{0,300}") {
            super::parse(&body, &log());
            super::parse(&signed(&body), &log());
            unverified_last(&body);
        }

        /// Without the key, every change makes a message foreign.
        #[test]
        fn a_corrupted_message_is_foreign(body in corrupted::text(&three_events())) {
            let message = super::parse(&body, &log());
            let is_foreign = matches!(message, Message::Foreign(_));
            prop_assert!(is_foreign || body == three_events(), "{message:?}");
        }

        /// With the key, a changed message is foreign or consecutive, and no larger than its body.
        #[test]
        fn a_corrupted_text_that_is_signed_is_foreign_or_a_run_no_larger_than_itself(
            text in corrupted::text(&three_events()[SIGNED_OFFSET..]),
        ) {
            let body = signed(&text);
            let Message::Events(run) = super::parse(&body, &log()) else { return Ok(()) };
            let events = run.above(run.prev());
            let positions: Vec<u64> = events.iter().map(|event| event.position().get()).collect();
            let expected: Vec<u64> = (run.prev().get() + 1..=run.last().get()).collect();
            prop_assert_eq!(positions, expected);
            let text = |event: &Event| {
                event.event_id().len()
                    + event.stream_id().len()
                    + event.event_type().len()
                    + event.json_bytes()
            };
            prop_assert!(!events.is_empty());
            prop_assert!(events.iter().map(text).sum::<usize>() <= body.len());
        }

        /// Packing a log message by message preserves every event and respects the size limits.
        #[test]
        fn packing_loses_nothing_and_respects_the_limits(
            sizes in prop::collection::vec(0usize..400, 1..30),
            max_bytes in 400usize..2_000,
            max_events in 1usize..10,
        ) {
            let events: Vec<Event> = sizes.iter().zip(1..).map(|(&size, position)| {
                let payload = format!("\"{}\"", "x".repeat(size));
                RecordedEvent { payload, ..recorded_event(position) }.into()
            }).collect();
            let mut prev = Position::START;
            let mut travelled = Vec::new();
            while (prev.get() as usize) < events.len() {
                let rest = &events[prev.get() as usize..];
                let packed = pack(&log(), prev, rest, max_bytes, max_events);
                prop_assert!(packed.body.len() <= max_bytes && packed.event_count <= max_events);
                match parse(&packed.body) {
                    Message::Events(run) => travelled.extend(run.above(prev).to_vec()),
                    Message::Reference(_) => travelled.push(rest[0].clone()),
                    Message::Foreign(why) => prop_assert!(false, "{why}"),
                }
                prop_assert_eq!(travelled.last().map(Event::position), Some(packed.last));
                prev = packed.last;
            }
            prop_assert_eq!(travelled, events);
        }
    }
}
