//! The paths that every event takes, as `.ci/guard` counts their instructions: the tests whose
//! names begin with `hot_path_` run one each. In the suite they only show that it works.
//!
//! Counted is the test binary's code, which is not optimised: CI builds no other, and all
//! dependencies once more would take it minutes. So the counts are no measure of speed, which is
//! for `cargo bench` to tell. But they are the same from run to run, and they show what makes a
//! path slower for good: what is done twice, copied, allocated, or searched from the start each
//! time.

use crate::model::event::{Event, Position, RecordedEvent};

/// The events of one message.
pub(crate) const EVENT_COUNT: u64 = 100;

/// Runs what is counted once to warm up, and once by itself.
pub(crate) fn count<T>(path: impl Fn() -> T) -> T {
    drop(path());
    hot_path_counted(path)
}

/// The function that `valgrind` begins and ends to count at: `.ci/guard` has its name.
#[inline(never)]
fn hot_path_counted<T>(path: impl Fn() -> T) -> T {
    path()
}

/// Events of about 300 bytes, of four types in turn.
pub(crate) fn events() -> Vec<Event> {
    let types = [
        "Confirmation of receipt",
        "Check confirmation",
        "Determine necessity of advice",
        "Draft decision",
    ];
    let event = |(event_type, number): (&&str, u64)| RecordedEvent {
        position: Position::new(number),
        event_id: format!("0199b0c0-0000-7000-8000-{number:012}"),
        stream_id: format!("case-{}", number % 25),
        stream_version: number / 25 + 1,
        event_type: (*event_type).to_owned(),
        recorded_at: time::OffsetDateTime::UNIX_EPOCH + time::Duration::seconds(number as i64),
        payload: format!(
            r#"{{"channel":"Internet","deadline":"2026-03-11T00:00:00Z","department":"General","responsible":"Resource {number}","amount":{number}.25,"concept_instance":"task-{number}","org":{{"group":"Group 4","size":12}},"note":"Sent on to the responsible department for assessment. "}}"#
        ),
        metadata: Some(r#"{"user":"anna"}"#.into()),
    };
    types.iter().cycle().zip(1..=EVENT_COUNT).map(event).map(Event::from).collect()
}
