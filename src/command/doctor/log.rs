//! The doctor's checks of the log: rows at positions that no event may have, an end below the
//! high-water mark, and a beginning that leaves room for a history.

use super::{Check, Level};
use crate::database::Database;
use crate::store::{EventStore, LogEnds};

/// A log whose first position is above this one may have been started before its history was
/// copied.
const MAX_FIRST_POSITION: u64 = 1_000;

pub(super) async fn examine(database: &Database, checks: &mut Vec<Check>) {
    let store = EventStore::new(database);
    // If the table is missing or cannot be read, an earlier check has reported it.
    let Ok(ends) = store.log_ends().await else { return };
    let before = checks.len();
    checks.extend(check_ends(&ends));
    if let Ok(Some(fault)) = store.log_fault().await {
        checks.push(Check::problem(
            Level::Error,
            "log",
            fault.to_string(),
            "restore the rows, or accept their loss with `projectionist audit --accept`",
        ));
    }
    if checks.len() == before {
        checks
            .push(Check::ok("log", "its beginning and its end are valid; an audit reads the rest"));
    }
}

fn check_ends(ends: &LogEnds) -> Vec<Check> {
    let mut checks = Vec::new();
    if ends.has_position_zero {
        checks.push(Check::problem(
            Level::Error,
            "log",
            "position 0 is never read: no projector gets this row",
            "append the event again, and delete this row",
        ));
    }
    if ends.has_max_position {
        checks.push(Check::problem(
            Level::Error,
            "log",
            format!("position {} ends the log: nothing can be appended after it", u64::MAX),
            "delete this row, and set auto_increment of the table events to the position after the \
            last event",
        ));
    }
    if let Some(first) = ends.first.filter(|first| *first > MAX_FIRST_POSITION) {
        checks.push(Check::problem(
            Level::Warning,
            "log",
            format!(
                "it begins at position {first}: if a history is yet to be copied to the positions \
                below, boot, play and relay would fill them first"
            ),
            "copy the history before any of them runs; if there is no history, ignore this",
        ));
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_log_that_begins_far_above_position_1_is_a_warning() {
        let count = |first| {
            check_ends(&LogEnds { first, has_position_zero: false, has_max_position: false }).len()
        };
        assert_eq!(
            [None, Some(1), Some(1_000), Some(1_001), Some(100_000)].map(count),
            [0, 0, 0, 1, 1]
        );
    }
}
