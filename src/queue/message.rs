//! The wire format: consecutive events, with the position just before the first.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::chain::Run;
use crate::event::{Event, Position, Recorded};

/// What a message says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Message {
    /// Consecutive events of our log.
    Events(Run),
    /// Only that there is something to look for in the store, and why it says no more.
    Doorbell(&'static str),
}

/// A message that is ready to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packed {
    pub(crate) body: String,
    /// Everything up to here has been sent once this message is.
    pub(crate) last: Position,
    pub(crate) events: usize,
}

/// `{"log":"…","prev":41,"events":[{"position":42,…},…]}`; a reference has `"last":42` in the place of `events`.
#[derive(Serialize, Deserialize)]
struct Envelope<'a> {
    /// Which log: positions of another one would mean other events.
    log: &'a str,
    prev: u64,
    #[serde(default, skip_serializing_if = "Option::is_none", borrow)]
    events: Option<Vec<Wire<'a>>>,
    /// Only in a reference: an event that is too large to travel, and is read from the store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    last: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct Wire<'a> {
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

/// Reads a message. Whatever is not a run of events of this log rings the doorbell: it can delay, and
/// cost a read of the store, but it can neither change nor stop anything.
pub(crate) fn parse(body: &str, log_id: &str) -> Message {
    let Ok(envelope) = serde_json::from_str::<Envelope<'_>>(body) else {
        return Message::Doorbell("not readable");
    };
    if envelope.log != log_id {
        return Message::Doorbell("of another log");
    }
    let Some(events) = envelope.events else { return Message::Doorbell("a reference") };
    let events = events.into_iter().map(Wire::into_event).collect();
    match Run::new(Position::new(envelope.prev), events) {
        Some(run) => Message::Events(run),
        None => Message::Doorbell("not consecutive"),
    }
}

/// Packs as many of these consecutive events as fit into one message, at most `max_events`; a first event
/// that does not fit alone travels as a reference. `events` must not be empty.
pub(crate) fn pack(log_id: &str, prev: Position, events: &[Event], max_bytes: usize, max_events: usize) -> Packed {
    let head = format!("{{\"log\":\"{log_id}\",\"prev\":{prev},\"events\":[");
    let mut body = head;
    let mut last = prev;
    let mut count = 0;
    for event in events.iter().take(max_events) {
        let Some(text) = Wire::write(event) else { break };
        // With the comma before it, and the brackets after.
        if body.len() + text.len() + 3 > max_bytes {
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
        body.push_str("]}");
        return Packed { body, last, events: count };
    }
    let last = prev.next();
    Packed { body: format!("{{\"log\":\"{log_id}\",\"prev\":{prev},\"last\":{last}}}"), last, events: 1 }
}

impl<'a> Wire<'a> {
    /// `None`: it cannot travel in SQS, which takes neither U+FFFE and U+FFFF nor what is not JSON to us; or it would not come
    /// out byte for byte, for white space around it, or as it says `null` where there could be nothing.
    fn write(event: &'a Event) -> Option<String> {
        let recorded_at = event.recorded_at();
        recorded_at.format(&Rfc3339).ok()?;
        let wire = Wire {
            position: event.position().get(),
            event_id: event.event_id().into(),
            stream_id: event.stream_id().into(),
            stream_version: event.stream_version(),
            event_type: event.event_type().into(),
            recorded_at,
            payload: raw(event.payload_text())?,
            metadata: match event.metadata_text() {
                Some(text) => Some(raw(text).filter(|raw| raw.get() != "null")?),
                None => None,
            },
        };
        let text = serde_json::to_string(&wire).ok()?;
        // One by one: a search for a single character goes by memchr, one for either of two does not.
        (!text.contains('\u{fffe}') && !text.contains('\u{ffff}')).then_some(text)
    }

    fn into_event(self) -> Event {
        Event::from(Recorded {
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

/// A JSON text as it is, if it has nothing around it that would be lost.
fn raw(text: &str) -> Option<&RawValue> {
    serde_json::from_str::<&RawValue>(text).ok().filter(|raw| raw.get().len() == text.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::chain::tests::{event, recorded};
    use crate::{hot_path, spoiled};

    const LOG: &str = "5f9c2a1e-0000-0000-0000-000000000001";

    fn unpack(packed: &Packed) -> Run {
        match parse(&packed.body, LOG) {
            Message::Events(run) => run,
            doorbell => panic!("{doorbell:?}"),
        }
    }

    #[test]
    fn what_is_packed_comes_out_byte_for_byte() {
        let mut first = recorded(8);
        first.payload = r#"{ "amount" : 1.50, "ab": "é\u0041", "big": 123456789012345678901234567890 }"#.into();
        first.metadata = Some("[ ]".into());
        first.event_type = "with \"quotes\" and \\".into();
        let events = vec![first.into(), event(9)];
        let packed = pack(LOG, Position::new(7), &events, 100_000, 100);
        assert_eq!(Some(unpack(&packed)), Run::new(Position::new(7), events));
        assert_eq!((packed.last, packed.events), (Position::new(9), 2));
    }

    #[test]
    fn hot_path_pack() {
        let events = hot_path::events();
        let packed = hot_path::count(|| pack(LOG, Position::START, &events, 100_000, 100));
        assert_eq!(packed.last, Position::new(hot_path::EVENTS));
    }

    #[test]
    fn hot_path_parse() {
        let body = pack(LOG, Position::START, &hot_path::events(), 100_000, 100).body;
        let Message::Events(run) = hot_path::count(|| parse(&body, LOG)) else { panic!("a doorbell") };
        assert_eq!(run.last(), Position::new(hot_path::EVENTS));
    }

    #[test]
    fn an_event_that_cannot_travel_is_sent_as_a_reference() {
        for payload in [format!("\"{}\"", "x".repeat(5_000)), "\"\u{ffff}\"".into()] {
            let large = Recorded { payload, ..recorded(8) }.into();
            let packed = pack(LOG, Position::new(7), &[large, event(9)], 2_000, 100);
            assert_eq!(packed.last, Position::new(8));
            assert_eq!(parse(&packed.body, LOG), Message::Doorbell("a reference"));
        }
    }

    #[test]
    fn what_would_not_come_out_byte_for_byte_is_sent_as_a_reference() {
        for (payload, metadata) in [(" {}", None), ("{}\n", None), ("{}", Some("null")), ("{}", Some("1 "))] {
            let spaced = Recorded { payload: payload.into(), metadata: metadata.map(str::to_owned), ..recorded(8) };
            let packed = pack(LOG, Position::new(7), &[spaced.into(), event(9)], 2_000, 100);
            assert_eq!(packed.last, Position::new(8), "{payload:?} {metadata:?}");
            assert_eq!(parse(&packed.body, LOG), Message::Doorbell("a reference"));
        }
        // As a payload, null is as good as anything.
        let null = Recorded { payload: "null".into(), metadata: None, ..recorded(8) }.into();
        assert_eq!(unpack(&pack(LOG, Position::new(7), &[null], 2_000, 100)).last(), Position::new(8));
    }

    #[test]
    fn what_is_not_a_run_of_this_log_is_a_doorbell() {
        let good = pack(LOG, Position::new(7), &[event(8), event(9)], 100_000, 100).body;
        assert!(matches!(parse(&good, LOG), Message::Events(_)));
        for (body, why) in [
            (String::new(), "not readable"),
            ("hello".into(), "not readable"),
            ("[1,2]".into(), "not readable"),
            (good[..good.len() - 1].into(), "not readable"),
            (good.replace(LOG, "another"), "of another log"),
            (good.replace("\"prev\":7", "\"prev\":6"), "not consecutive"),
            (good.replace("\"position\":9", "\"position\":10"), "not consecutive"),
            (format!("{{\"log\":\"{LOG}\",\"prev\":7,\"events\":[]}}"), "not consecutive"),
        ] {
            assert_eq!(parse(&body, LOG), Message::Doorbell(why), "{body}");
        }
    }

    /// A message with everything in it that a message may have.
    fn three_events() -> String {
        let mut events = [recorded(8), recorded(9), recorded(10)];
        events[0].event_type = "with \"quotes\" and \\".into();
        events[1].payload = r#"{"a":[1,-2.5e3,"é\u0041",{"b":null}]}"#.into();
        events[2].metadata = Some("[true]".into());
        pack(LOG, Position::new(7), &events.map(Event::from), 100_000, 100).body
    }

    #[test]
    fn json_of_any_depth_does_not_exhaust_the_stack() {
        let body = pack(LOG, Position::new(7), &[event(8)], 100_000, 100).body;
        for deep in ["[".repeat(200_000), format!("{}1{}", "[".repeat(200_000), "]".repeat(200_000))] {
            parse(&body.replace("\"payload\":{}", &format!("\"payload\":{deep}")), LOG);
            parse(&deep, LOG);
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(body in ".{0,300}") {
            parse(&body, LOG);
        }

        /// Whatever is made of a message, what is read is consecutive, and no larger than what was received.
        #[test]
        fn a_spoiled_message_is_a_run_no_larger_than_itself_or_a_doorbell(body in spoiled::text(&three_events())) {
            let Message::Events(run) = parse(&body, LOG) else { return Ok(()) };
            let events = run.above(run.prev());
            let positions: Vec<u64> = events.iter().map(|event| event.position().get()).collect();
            prop_assert_eq!(positions, (run.prev().get() + 1..=run.last().get()).collect::<Vec<_>>());
            let text = |event: &Event| {
                event.event_id().len() + event.stream_id().len() + event.event_type().len() + event.json_bytes()
            };
            prop_assert!(!events.is_empty() && events.iter().map(text).sum::<usize>() <= body.len());
        }

        /// Packing a log message by message gives back every event, in messages that the queue takes.
        #[test]
        fn packing_loses_nothing_and_keeps_to_the_limits(
            sizes in prop::collection::vec(0usize..400, 1..30),
            max_bytes in 400usize..2_000,
            max_events in 1usize..10,
        ) {
            let events: Vec<Event> = sizes.iter().zip(1..).map(|(&size, position)| {
                Recorded { payload: format!("\"{}\"", "x".repeat(size)), ..recorded(position) }.into()
            }).collect();
            let mut prev = Position::START;
            let mut travelled = Vec::new();
            while (prev.get() as usize) < events.len() {
                let rest = &events[prev.get() as usize..];
                let packed = pack(LOG, prev, rest, max_bytes, max_events);
                prop_assert!(packed.body.len() <= max_bytes && packed.events <= max_events);
                match parse(&packed.body, LOG) {
                    Message::Events(run) => travelled.extend(run.above(prev).to_vec()),
                    Message::Doorbell(_) => travelled.push(rest[0].clone()),
                }
                prop_assert_eq!(travelled.last().map(Event::position), Some(packed.last));
                prev = packed.last;
            }
            prop_assert_eq!(travelled, events);
        }
    }
}
