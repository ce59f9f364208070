//! The log: rows at positions that no event may have, an end below the mark, a beginning that leaves room for a history.

use super::{Check, Level};
use crate::database::Database;
use crate::store::{Ends, EventStore};

/// A log that begins above this, with nothing below, may have been begun before its history was copied.
const FIRST_MAY_BE: u64 = 1_000;

pub(super) async fn examine(database: &Database, checks: &mut Vec<Check>) {
    let store = EventStore::new(database);
    // Where the table cannot be read, or is not there, another line has said so.
    let Ok(ends) = store.ends().await else { return };
    let before = checks.len();
    checks.extend(judge(&ends));
    if let Ok(Some(fault)) = store.log_fault().await {
        checks.push(Check::bad(
            Level::Wrong,
            "log",
            fault.to_string(),
            "restore the rows, or accept their loss by `projectionist audit --accept`",
        ));
    }
    if checks.len() == before {
        checks.push(Check::ok("log", "it begins and ends as it should; an audit reads the rest"));
    }
}

fn judge(ends: &Ends) -> Vec<Check> {
    let mut checks = Vec::new();
    if ends.has_zero {
        checks.push(Check::bad(
            Level::Wrong,
            "log",
            "position 0 is never read: no projector gets this row",
            "append the event anew, and delete this row",
        ));
    }
    if ends.has_last {
        checks.push(Check::bad(
            Level::Wrong,
            "log",
            format!("position {} ends the log: nothing can be appended after it", u64::MAX),
            "delete this row, and set auto_increment of the table events to the position after the last event",
        ));
    }
    if let Some(first) = ends.first.filter(|first| *first > FIRST_MAY_BE) {
        checks.push(Check::bad(
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
    fn a_log_that_begins_far_above_one_is_a_warning_and_one_that_begins_near_it_is_not() {
        let bad = |first| judge(&Ends { first, has_zero: false, has_last: false }).len();
        assert_eq!([None, Some(1), Some(1_000), Some(1_001), Some(100_000)].map(bad), [0, 0, 0, 1, 1]);
    }
}
