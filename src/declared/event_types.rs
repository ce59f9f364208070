//! Checks the names of event types in a file.

use crate::model::event::NewEvent;

/// PHP's class names, such as `App\Billing\Paid`, have backslashes.
const SINGLE_QUOTES: &str = "In double quotes, TOML reads a backslash as the start of an escape \
                             (\\b is a backspace): write a name with backslashes in single quotes, \
                             like 'App\\Billing\\Paid'";

/// The advice for a text that is not TOML because of a backslash; `None` if it has another fault.
pub(super) fn escape_advice(toml_error: &str) -> Option<&'static str> {
    toml_error.contains("escape").then_some(SINGLE_QUOTES)
}

/// Refuses a type that no event can have, because the handler would never run.
pub(super) fn check_event_type(event_type: &str, is_alone: bool) -> Result<(), String> {
    let characters = event_type.chars().count();
    if event_type == "*" && !is_alone {
        Err("\"*\" means every event: write it alone, or leave it out".into())
    } else if event_type.contains('*') && event_type != "*" {
        Err(format!(
            "{event_type:?} would match no event, because there are no wildcards: list the event \
             types, or write [\"*\"] for every event"
        ))
    } else if event_type.contains(char::is_control) {
        Err(format!("the event type {event_type:?} has a control character. {SINGLE_QUOTES}"))
    } else if event_type.starts_with('$') {
        Err(format!(
            "no event has the type {event_type:?}: types that begin with `$` are the log's own, \
             and no projector receives them"
        ))
    } else if characters == 0 || characters > NewEvent::MAX_NAME || event_type.ends_with(' ') {
        Err(format!(
            "no event has the type {event_type:?}: a type has 1 to {} characters and does not \
             end with a space",
            NewEvent::MAX_NAME
        ))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_can_match_no_event_is_refused_with_the_reason() {
        for (name, reason) in [
            ("Order*", "there are no wildcards"),
            ("*Placed", "there are no wildcards"),
            ("App\u{8}illing", "in single quotes, like 'App\\Billing\\Paid'"),
            ("App\tools", "has a control character"),
            ("$filler", "the log's own"),
            ("", "1 to 200 characters"),
        ] {
            let refused = check_event_type(name, true).expect_err(name);
            assert!(refused.contains(reason), "{refused}");
        }
        for name in ["*", "OrderPlaced", "App\\Billing\\Paid", "größe", "a b"] {
            check_event_type(name, true).expect(name);
        }
    }
}
