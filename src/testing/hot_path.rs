//! The code that runs for every event. `.ci/guard` counts its instructions: each test whose name
//! begins with `hot_path_` runs one such path. In the test suite, these tests only check that the
//! code works.
//!
//! The counted code is that of the test binary, without optimisation. CI builds no other binary,
//! and an optimised build of all dependencies would take minutes. The counts therefore do not
//! measure speed; `cargo bench` does. They are the same in every run. They show work that is done
//! twice, and needless copies, allocations and searches.

use crate::model::event::{Event, Position, RecordedEvent};

/// The number of events in one message.
pub(crate) const EVENT_COUNT: u64 = 100;

/// Runs `path` once to warm up, and once to be counted.
pub(crate) fn count<T>(path: impl Fn() -> T) -> T {
    drop(path());
    hot_path_counted(path)
}

/// The function in which `valgrind` counts. `.ci/guard` has its name.
#[inline(never)]
fn hot_path_counted<T>(path: impl Fn() -> T) -> T {
    path()
}

/// The events of one message: about 300 bytes each, of four types in turn.
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
            "{{\"channel\":\"Internet\",\"deadline\":\"2026-03-11T00:00:00Z\",\
             \"department\":\"General\",\"responsible\":\"Resource {number}\",\
             \"amount\":{number}.25,\"concept_instance\":\"task-{number}\",\
             \"org\":{{\"group\":\"Group 4\",\"size\":12}},\
             \"note\":\"Sent on to the responsible department for assessment. \"}}"
        ),
        metadata: Some(r#"{"user":"anna"}"#.into()),
    };
    types.iter().cycle().zip(1..=EVENT_COUNT).map(event).map(Event::from).collect()
}
