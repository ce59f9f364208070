//! The log: rows at positions that no event may have, an end below the mark, a beginning that
//! leaves room for a history.

use super::{Check, Level};
use crate::database::Database;
use crate::store::{EventStore, LogEnds};

/// A log that begins above this, with nothing below, may have been begun before its history was
/// copied.
const MAX_FIRST_POSITION: u64 = 1_000;

pub(super) async fn examine(database: &Database, checks: &mut Vec<Check>) {
    let store = EventStore::new(database);
    // Where the table cannot be read, or is not there, another line has said so.
    let Ok(ends) = store.log_ends().await else { return };
    let before = checks.len();
    checks.extend(check_ends(&ends));
    if let Ok(Some(fault)) = store.log_fault().await {
        checks.push(Check::problem(
            Level::Error,
            "log",
            fault.to_string(),
            "restore the rows, or accept their loss by `projectionist audit --accept`",
        ));
    }
    if checks.len() == before {
        checks.push(Check::ok("log", "it begins and ends as it should; an audit reads the rest"));
    }
}

fn check_ends(ends: &LogEnds) -> Vec<Check> {
    let mut checks = Vec::new();
    if ends.has_position_zero {
        checks.push(Check::problem(
            Level::Error,
            "log",
            "position 0 is never read: no projector gets this row",
            "append the event anew, and delete this row",
        ));
    }
    if ends.has_max_position {
        checks.push(Check::problem(
            Level::Error,
            "log",
            format!("position {} ends the log: nothing can be appended after it", u64::MAX),
            "delete this row, and set auto_increment of the table events to the position after the last event",
        ));
    }
    if let Some(first) = ends.first.filter(|first| *first > MAX_FIRST_POSITION) {
        checks.push(Check::problem(
            Level::Warning,
            "log",
            format!(
                "it begins at position {first}, with nothing below: if a history is still to be copied, boot, play and relay \
                 would fill its positions first"
            ),
            "copy the history before anything runs; if there is none, nothing is to be done",
        ));
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_log_that_begins_far_above_position_1_is_a_warning() {
        let bad = |first| {
            check_ends(&LogEnds { first, has_position_zero: false, has_max_position: false }).len()
        };
        assert_eq!(
            [None, Some(1), Some(1_000), Some(1_001), Some(100_000)].map(bad),
            [0, 0, 0, 1, 1]
        );
    }
}
